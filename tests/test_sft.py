"""Run: pytest tests/test_sft.py          (data order, loss; CPU only)"""

import argparse
import shutil
from itertools import islice

import pytest
import torch
from conftest import ONE, assert_same_grads, branch_logprobs, grads, read_jsonl, run_stage, stage
from conftest import stock_logprobs, untimed, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from data import Example, Feed, load_examples, look, mixed_order, order
import runtime
import sft
from rows import set_attention
from flags import InputError


# --------------------------------------------------------------------------------------- data order
def take(n, count, steps, out, lost=(), position=0, seed=3, **more):
    """n rows of a file, those in `lost` cannot be decoded -> batches, the feed after them."""
    path = write_jsonl(out / "numbers.jsonl", [{"id": str(i), "prompt": "x"} for i in range(n)])
    flags = {"out": str(out), "seed": seed, "bad_rows": "skip", "max_bad": 1.0, "split": None}
    args = argparse.Namespace(**flags, resume=False, **more)
    found, batches = look(path, lambda example: (int(example.id) + 1, 1), args, ONE), []
    assert found.prompt.tolist() == list(range(1, n + 1)) and found.response.tolist() == [1] * n

    def encode(example):
        if int(example.id) in lost:
            raise ValueError("cut off")
        return f"row {example.id}"

    feed = Feed(found, encode, args, ONE, {"step": 0, "position": position})
    for step in range(steps):
        drawn = feed.draw(count, step)
        assert [item.encoded for item in drawn] == [f"row {item.index}" for item in drawn]
        batches.append([item.index for item in drawn])
    return batches, feed


def test_draw_covers_every_row_once_an_epoch(tmp_path):
    batches, feed = take(12, 5, 12, tmp_path)  # five epochs, batches that cross their borders
    flat = [i for batch in batches for i in batch]
    epochs = [flat[at : at + 12] for at in range(0, 60, 12)]
    assert (
        all(sorted(epoch) == list(range(12)) for epoch in epochs)
        and len(set(map(tuple, epochs))) == 5
    )
    assert feed.progress() == {"position": 60, "lost": []} and feed.bad == feed.dropped == 0
    assert take(12, 5, 12, tmp_path)[0] == batches
    assert take(12, 5, 12, tmp_path, seed=4)[0] != batches
    assert take(12, 5, 2, tmp_path, position=25)[0] == batches[5:7]  # as after --resume


def test_a_picture_that_cannot_be_decoded_leaves_its_batch(tmp_path):
    """It is counted and named once, however many epochs; the other batches stay as they were."""
    whole, _ = take(12, 4, 6, tmp_path)
    batches, feed = take(12, 4, 6, tmp_path, lost=(2, 7))
    assert batches == [[i for i in batch if i not in (2, 7)] for batch in whole]
    assert feed.bad == 2 and feed.progress() == {"position": 24, "lost": [2, 7]}
    skipped = read_jsonl(tmp_path / "skipped.jsonl")
    assert sorted(line["row"] for line in skipped) == [3, 8] and all(
        "cut off" in line["reason"] for line in skipped
    )
    steps = [
        next(s for s, batch in enumerate(whole, 1) if line["row"] - 1 in batch) for line in skipped
    ]
    assert steps == [line["step"] for line in skipped]


def test_nothing_that_can_be_decoded_ends_the_run(tmp_path):
    with pytest.raises(InputError, match="12 of 12 rows cannot be used"):
        take(12, 4, 6, tmp_path, lost=range(12))


def test_sources_are_drawn_by_weight(tmp_path):
    """Whatever their sizes; each source in epochs of its own, and from any position as from the
    start."""
    whole = list(islice(mixed_order([(0, 40, 3.0), (40, 7, 1.0)], 5), 4000))
    small = [i for i in whole if i >= 40]
    assert 0.22 < len(small) / 4000 < 0.28 and len(whole) == 4000
    for part, n, first in ((small, 7, 40), ([i for i in whole if i < 40], 40, 0)):
        assert part == [first + i for i in islice(order(n, 5), len(part))]
    _, feed = take(47, 4, 1, tmp_path, seed=5)
    feed.examples.sources = [(0, 40, 3.0), (40, 7, 1.0)]
    for start in (0, 1, 1023, 1024, 2500):
        assert list(islice(feed.indices(start), 50)) == whole[start : start + 50]


# --------------------------------------------------------------------------------------------- loss
def demonstrations(tiny, count):
    args = argparse.Namespace(max_prompt=512, max_length=1024)
    examples = load_examples(tiny.sft)
    tools = tiny.tokenizer, tiny.image_processor, "", args
    return [sft.encode_demonstration(examples[i], *tools)[0] for i in range(count)]


def test_loss_is_the_token_mean_whatever_the_split(tiny):
    batch = demonstrations(tiny, 6)
    assert all(ids[-1] == tiny.eos for _, ids in batch)  # the EOS is trained
    tiny.stock.zero_grad()
    total = sum(len(ids) for _, ids in batch)
    expected = -sum(stock_logprobs(tiny, prompt, ids).sum() for prompt, ids in batch) / total
    expected.backward()
    for max_tokens in (10**6, 200, 1):
        tiny.model.zero_grad()
        loss, tokens = sft.accumulate_gradient(
            tiny.model, batch, argparse.Namespace(max_tokens=max_tokens), ONE
        )
        assert tokens == total and loss == pytest.approx(expected.item(), abs=1e-5)
        assert_same_grads(grads(tiny.model), grads(tiny.stock))


def test_long_demonstrations_are_dropped_or_cut_when_asked(tiny):
    example = load_examples(tiny.sft)[0]

    def look_and_encode(limit, cut=False):
        """-> (prompt, ids) when the look lets the example pass, else None."""
        args = argparse.Namespace(max_prompt=512, max_length=limit, truncate=cut, bad_rows="skip")
        tools = tiny.tokenizer, tiny.image_processor, "", args
        lengths = sft.measure_demonstration(example, *tools)
        if lengths is None:
            return None
        [(prompt, ids)] = sft.encode_demonstration(example, *tools)
        assert lengths == (len(prompt.input_ids), len(ids))
        return prompt, ids

    prompt, ids = look_and_encode(1024)
    start = len(prompt.input_ids)
    fits = start + len(ids)
    assert look_and_encode(fits)[1] == look_and_encode(fits, True)[1] == ids
    assert look_and_encode(fits - 1) is None and look_and_encode(fits - 1, True)[1] == ids[:-1]
    assert look_and_encode(start + 1, True)[1] == ids[:1]
    assert look_and_encode(start, True) is None


def test_every_turn_of_the_assistant_is_trained(tiny):
    """Each after what was said before it, with the pictures that it has seen by then."""
    chat = [("user", "one <image>?"), ("assistant", "first"), ("user", "two <image>?")]
    prompt = [{"role": role, "content": content} for role, content in chat]
    pictures = tiny.folder / "sft_0_0.png", tiny.folder / "sft_2_0.png"
    example = Example("x", prompt, list(map(str, pictures)), "second")
    args = argparse.Namespace(max_prompt=512, max_length=1024, truncate=False, bad_rows="skip")
    tools = tiny.tokenizer, tiny.image_processor, "", args
    pairs = sft.encode_demonstration(example, *tools)
    assert [tiny.tokenizer.decode(ids[:-1]) for _, ids in pairs] == ["first", "second"]
    assert [len(prompt.image_grid_thw) for prompt, _ in pairs] == [1, 2]
    shown = tiny.tokenizer.decode(pairs[1][0].input_ids)
    assert shown.index("one") < shown.index("first") < shown.index("two")
    lengths = [
        sum(map(len, (prompt.input_ids for prompt, _ in pairs))),
        sum(len(i) for _, i in pairs),
    ]
    assert list(sft.measure_demonstration(example, *tools)) == lengths


# ------------------------------------------------------------------------------------------- frozen
@pytest.mark.parametrize("processes, more", [
    (None, []), (None, ["--checkpointing"]),
    pytest.param(0, ["--dtype", "bf16"], marks=pytest.mark.slow),
    pytest.param(2, ["--dtype", "bf16", "--checkpointing"], marks=pytest.mark.slow),
])  # fmt: skip
def test_a_frozen_vision_tower_stays_as_it_is(tiny, tmp_path, processes, more):
    """Bitwise, mergers and all, whatever the weight decay, also after --resume; the first step
    moves all other weights as it does where nothing is frozen."""
    flags = ["--ckpt", tiny.base, "--data", tiny.sft, "--batch", 4, "--lr", 1e-3, *more]
    flags += ["--weight-decay", 0.5, "--clip", 1e9]  # so large that no norm matters

    def run(name, *flags_of_run):
        arguments = [*flags, "--out", tmp_path / name, *flags_of_run]
        run_stage("sft", arguments, processes)
        return load_file(tmp_path / name / "model.safetensors")

    base, free = load_file(f"{tiny.base}/model.safetensors"), run("free", "--steps", 1)
    once = run("once", "--steps", 1, "--freeze", "vision")
    assert once.keys() == base.keys()
    frozen = {name for name in base if name.startswith("model.visual.")}
    assert {name.split(".")[2] for name in frozen} >= {"merger", "deepstack_merger_list", "blocks"}
    for name in base:
        expected = base[name].to(once[name].dtype) if name in frozen else free[name]
        assert torch.equal(once[name], expected), name
        if name not in frozen and base[name].ndim == 2:  # bf16 does not show a step of a norm of 1
            assert not torch.equal(once[name], base[name].to(once[name].dtype))
    whole = run("whole", "--steps", 4, "--freeze", "vision", "--save-every", 2, "--keep", 2)
    (tmp_path / "whole" / "state.4").rename(tmp_path / "taken away")
    log = untimed(read_jsonl(tmp_path / "whole" / "metrics.jsonl"))
    again = run("whole", "--steps", 4, "--freeze", "vision", "--save-every", 2, "--resume")
    assert untimed(read_jsonl(tmp_path / "whole" / "metrics.jsonl")) == log and len(log) == 4
    assert all(torch.equal(again[name], whole[name]) for name in base)
    assert all(torch.equal(whole[name], base[name].to(whole[name].dtype)) for name in frozen)


def test_another_freeze_is_another_run(tiny, tmp_path, capfd):
    flags = ["--ckpt", tiny.base, "--data", tiny.sft, "--batch", 4, "--out", tmp_path / "out"]
    assert stage("sft", *flags, "--steps", 1) == 0
    capfd.readouterr()
    assert stage("sft", *flags, "--steps", 2, "--resume", "--freeze", "vision") == 2
    assert "made with --freeze None, not vision" in capfd.readouterr().err
    assert stage("sft", *flags, "--steps", 2, "--resume", "--freeze", "tower") == 2
    assert "invalid choice: 'tower'" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------- LoRA
def adapted(tiny):
    """A policy with adapters that are not 0."""
    model = set_attention(runtime.load_policy(tiny.base), "sdpa")
    runtime.add_lora(model, 3, ONE)
    runtime.start_lora(model, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def test_adapters_are_merged_into_what_is_saved(tiny, tmp_path):
    """transformers says of the saved checkpoint what the policy said with them."""
    model = adapted(tiny)
    runtime.write_checkpoint(model, str(tmp_path), ONE, tiny.base)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    for prompt, ids in demonstrations(tiny, 4):
        with torch.no_grad():
            expected = stock_logprobs(tiny, prompt, ids, stock)
            (found,) = branch_logprobs(model, prompt, [ids])
            before = stock_logprobs(tiny, prompt, ids)
        assert (found - expected).abs().max() <= 1e-5 < 0.01 < (before - expected).abs().max()


def test_the_gradient_of_adapters_is_that_of_the_merged_matrix(tiny, tmp_path):
    """L(W + 2 B A): dA = 2 B^T dW and dB = 2 dW A^T; nothing else has one."""
    model, batch = adapted(tiny), demonstrations(tiny, 4)
    runtime.write_checkpoint(model, str(tmp_path), ONE, tiny.base)
    merged = set_attention(runtime.load_policy(str(tmp_path)), "sdpa")
    for one in (model, merged):
        sft.accumulate_gradient(one, batch, argparse.Namespace(max_tokens=200), ONE)
    whole, weights, expected = grads(merged), dict(model.named_parameters()), {}
    for name in [name for name in weights if name.endswith("lora_a")]:
        other, gradient = name[:-1] + "b", whole[name.replace("lora_a", "weight")]
        expected[name] = 2 * weights[other].detach().T @ gradient
        expected[other] = 2 * gradient @ weights[name].detach().T
    assert len(expected) == 2 * 7 * 2  # two layers of seven matrices
    assert_same_grads(grads(model), expected)


@pytest.mark.parametrize("script, dtype, processes", [
    ("sft", "float32", (None, None)), ("rl", "float32", (None, None)),
    pytest.param("sft", "bf16", (0, 0), marks=pytest.mark.slow),
    pytest.param("sft", "float32", (None, 2), marks=pytest.mark.slow),
    pytest.param("rl", "float32", (None, 2), marks=pytest.mark.slow),
    pytest.param("rl", "bf16", (2, 2), marks=pytest.mark.slow),
])  # fmt: skip
def test_adapters_train_resume_and_shard(tiny, policy, tmp_path, script, dtype, processes):
    """Alone and on two processes alike; a resumed run is bitwise the unbroken one; all that is no
    matrix of a decoder layer stays as it was."""
    flags = ["--ckpt", policy, "--data", getattr(tiny, script), "--lora", 3, "--lr", 1e-2]
    flags += ["--dtype", dtype, "--save-every", 1, "--keep", 2, "--steps", 3]
    flags += ["--batch", 4] if script == "sft" else ["--prompts", 2, "--rollouts", 4]
    flags += [] if script == "sft" else ["--max-new-tokens", 24]

    def run(name, count, *more):
        run_stage(script, [*flags, "--out", tmp_path / name, *more], count)
        log = untimed(read_jsonl(tmp_path / name / "metrics.jsonl"))
        return log, load_file(tmp_path / name / "model.safetensors")

    log, whole = run("out", processes[0])
    base = load_file(f"{policy}/model.safetensors")
    assert whole.keys() == base.keys() and len(log) == 3
    for name in base:
        same = torch.equal(base[name].to(whole[name].dtype), whole[name])
        assert same == (".layers." not in name or "norm" in name), name
    if script == "rl":
        assert max(line["drift"] for line in log) < (1e-5 if dtype == "float32" else 0.05)
    other, weights = run("other", processes[1])
    close = 0 if processes[0] == processes[1] else 1e-5
    for left, right in zip(log, other):
        assert left.keys() == right.keys()
        assert all(left[key] == pytest.approx(right[key], abs=close, rel=close) for key in left)
    assert max((weights[name] - whole[name]).abs().max() for name in base) <= 10 * close
    shutil.rmtree(tmp_path / "other" / "state.3")
    again, resumed = run("other", processes[1], "--resume")
    assert again == other and all(torch.equal(resumed[name], weights[name]) for name in base)


def test_adapters_have_no_higher_rank_than_their_matrices(tiny, tmp_path, capfd):
    """Whose bytes would fill the memory; that of a run stays the same."""
    flags = ["--ckpt", tiny.base, "--data", tiny.sft, "--batch", 4, "--out", tmp_path / "out"]
    assert stage("sft", *flags, "--steps", 1, "--lora", 10**6) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("sft.py: error: --lora 1000000: the smallest matrix has rank ")
    highest = int(line.split()[-3].rstrip(";"))
    assert stage("sft", *flags, "--steps", 1, "--lora", highest + 1) == 2
    assert stage("sft", *flags, "--steps", 1, "--lora", highest) == 0
    capfd.readouterr()
    assert stage("sft", *flags, "--steps", 2, "--lora", 2, "--resume") == 2
    assert f"made with --lora {highest}, not 2" in capfd.readouterr().err
