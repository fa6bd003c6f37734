"""Run: pytest tests/test_sft.py          (data order, loss; CPU only)"""

import argparse
from itertools import islice

import pytest
from conftest import ONE, assert_same_grads, grads, read_jsonl, stock_logprobs

from data import Feed, load_examples, mixed_order, order
import sft
from runtime import InputError

# -------------------------------------------------------------------------------------------------------------- data order
class Numbers(list):
    weighted = False

    def where(self, i):
        return "numbers", i + 1


def feed_of(examples, encode, out, seed=3, **more):
    flags = {"out": str(out), "seed": seed, "bad_rows": "skip", "max_bad": 1.0} | more
    return Feed(examples, encode, argparse.Namespace(**flags), ONE, {"position": flags.get("position", 0)})


def take(n, count, steps, usable, out, **more):
    """-> batches, the feed after them."""
    feed, batches = feed_of(Numbers(range(n)), lambda x: f"row {x}" if usable(x) else None, out, **more), []
    for step in range(steps):
        indices, encoded = feed.draw(count, step)
        assert encoded == {place: f"row {i}" for place, i in enumerate(indices)}
        batches.append(indices)
    return batches, feed


def test_draw_covers_every_row_once_an_epoch(tmp_path):
    batches, feed = take(12, 5, 12, lambda x: True, tmp_path)  # five epochs, batches that cross their borders
    flat = [i for batch in batches for i in batch]
    epochs = [flat[at : at + 12] for at in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and len(set(map(tuple, epochs))) == 5
    assert feed.progress() == {"position": 60, "dropped": 0, "bad": 0, "rows": 12}
    assert take(12, 5, 12, lambda x: True, tmp_path)[0] == batches
    assert take(12, 5, 12, lambda x: True, tmp_path, seed=4)[0] != batches


def test_draw_replaces_dropped_rows_and_counts_them(tmp_path):
    usable = lambda x: x % 3 > 0
    batches, feed = take(12, 4, 4, usable, tmp_path)
    upcoming = list(islice(order(12, 0, 3), feed.position))
    assert [i for batch in batches for i in batch] == [i for i in upcoming if usable(i)]
    assert feed.dropped == sum(not usable(i) for i in upcoming) == feed.position - 16 > 0
    written = [row["row"] - 1 for row in read_jsonl(tmp_path / "skipped.jsonl")]
    assert written == list(dict.fromkeys(i for i in upcoming if not usable(i)))  # once each, in the order they were met
    indices = take(12, 3, 1, usable, tmp_path, position=7)[0][0]
    assert indices == [i for i in islice(order(12, 7, 3), 12) if usable(i)][:3]  # from any position, as after --resume


def test_draw_gives_up_when_nothing_fits(tmp_path):
    with pytest.raises(InputError, match="--max-prompt"):
        take(12, 4, 1, lambda x: False, tmp_path)


def test_sources_are_drawn_by_weight(tmp_path):
    """Whatever their sizes; each source in epochs of its own, and from any position as from the start."""
    whole = list(islice(mixed_order([(0, 40, 3.0), (40, 7, 1.0)], 0, 5), 4000))
    small = [i for i in whole if i >= 40]
    assert 0.22 < len(small) / 4000 < 0.28 and len(whole) == 4000
    for part, n, first in ((small, 7, 40), ([i for i in whole if i < 40], 40, 0)):
        assert part == [first + i for i in islice(order(n, 0, 5), len(part))]
    for start in (1, 1023, 1024, 2500):
        assert list(islice(mixed_order([(0, 40, 3.0), (40, 7, 1.0)], start, 5), 50)) == whole[start : start + 50]


# -------------------------------------------------------------------------------------------------------------------- loss
def demonstrations(tiny, count):
    args = argparse.Namespace(max_prompt=512, max_length=1024)
    examples = load_examples(tiny.sft)
    return [sft.encode_demonstration(examples[i], tiny.tokenizer, tiny.image_processor, args, "") for i in range(count)]


def test_loss_is_the_token_mean_whatever_the_split(tiny):
    batch = demonstrations(tiny, 6)
    assert all(ids[-1] == tiny.eos for _, ids in batch)  # the EOS is trained
    tiny.stock.zero_grad()
    total = sum(len(ids) for _, ids in batch)
    expected = -sum(stock_logprobs(tiny, prompt, ids).sum() for prompt, ids in batch) / total
    expected.backward()
    for max_tokens in (10**6, 200, 1):
        tiny.model.zero_grad()
        loss, tokens = sft.update(tiny.model, batch, argparse.Namespace(max_tokens=max_tokens), ONE)
        assert tokens == total and loss == pytest.approx(expected.item(), abs=1e-5)
        assert_same_grads(grads(tiny.model), grads(tiny.stock))


def test_long_demonstrations_are_dropped_or_cut_when_asked(tiny):
    example = load_examples(tiny.sft)[0]
    flags = lambda limit, cut: argparse.Namespace(max_prompt=512, max_length=limit, truncate=cut)
    tools = tiny.tokenizer, tiny.image_processor
    encode = lambda limit, cut=False: sft.encode_demonstration(example, *tools, flags(limit, cut), "")
    prompt, ids = encode(1024)
    fits = len(prompt.input_ids) + len(ids)
    assert encode(fits)[1] == encode(fits, True)[1] == ids
    assert encode(fits - 1) is None and encode(fits - 1, True)[1] == ids[:-1]
    assert encode(len(prompt.input_ids) + 1, True)[1] == ids[:1] and encode(len(prompt.input_ids), True) is None
