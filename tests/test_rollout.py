"""Run: pytest tests/test_rollout.py          (response format, sampling; CPU only)"""

import copy
import gc
import math
import re
import weakref
from collections import deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ONE, SYSTEM, run_alone, stage, stock_inputs
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForImageTextToText

import gpu
import rollout
import rows
from data import Example, encode_prompt, encode_response
from discriminator import load_discriminator, save_discriminator
from rollout import parse_response, sample, split_segments
from rows import pack_rows, set_attention, target_logprobs
from runtime import load_policy

GOOD = "<caption>\n1 red cross\n</caption>\n<think>\n1 + 1 = 2\n</think>\n<answer>\n2\n</answer>"


# ---------------------------------------------------------------------------------- response format
BROKEN = {
    "nothing": "",
    "no tags": "2",
    "repeated block": GOOD.replace("<think>", "<caption>\n</caption>\n<think>"),
    "repeated tag": GOOD + "</answer>",
    "tag in text": GOOD.replace("1 + 1", "<answer>"),
    "missing block": GOOD.replace("<think>\n1 + 1 = 2\n</think>\n", ""),
    "missing end": GOOD.removesuffix("</answer>"),
    "reordered": GOOD.replace("caption", "x").replace("think", "caption").replace("x>", "think>"),
    "closed first": (
        GOOD.replace("<think>", "#").replace("</think>", "<think>").replace("#", "</think>")
    ),
    "text before": "So: " + GOOD,
    "text between": GOOD.replace("</caption>\n", "</caption> so "),
    "text after": GOOD + " done",
    "special token inside a tag": GOOD.replace("<think>", "<th<|im_start|>ink>"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_format_has_no_parts(tiny, name):
    assert parse_response(BROKEN[name]) is None
    assert split_segments(encode_response(BROKEN[name], tiny.tokenizer), tiny.tokenizer) is None


WHOLE = {
    "plain": GOOD,
    "no white space": GOOD.replace("\n", ""),  # `</caption><think>` may share a token
    "white space around": f" \n{GOOD} \n\n ",
    "empty blocks": "<caption></caption><think></think><answer></answer>",
    "special tokens inside": GOOD.replace("cross", "<|vision_end|><|im_start|> cross"),
    "several bytes a character": GOOD.replace("cross", "çà 中文 🙂 \u0085"),
    "other tags": GOOD.replace("cross", "<b>cross</b> </ caption> <Caption> <caption"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_segments_join_to_the_response(tiny, name):
    ids = encode_response(WHOLE[name], tiny.tokenizer)
    caption, trace = split_segments(ids, tiny.tokenizer)
    assert caption[:-1] + trace == ids
    assert caption[-1] == trace[-1] == tiny.eos
    text = tiny.tokenizer.decode(caption[:-1])
    assert "</caption>" in text and "<think>" not in text
    assert tiny.tokenizer.decode(trace[:-1]).count("<think>") == 1
    assert split_segments(ids[:-1], tiny.tokenizer) == (caption, trace)  # also without the EOS
    parts = parse_response(WHOLE[name])
    assert [parts.think, parts.answer] in (["1 + 1 = 2", "2"], ["", ""])


def test_a_token_over_the_boundary_belongs_to_the_caption(tiny):
    ids = encode_response(GOOD, tiny.tokenizer)
    caption, _ = split_segments(ids, tiny.tokenizer)
    straddling = tiny.tokenizer.decode(caption[-2:-1])
    assert straddling.endswith(">\n"), "this tokenizer joins the tag and the line break after it"


def test_characters_cut_in_two_keep_the_offsets(tiny):
    """Sampling may stop between the bytes of a character: the pieces decode to U+FFFD, of another
    length than the bytes."""

    def encode(text):
        return tiny.tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = encode("🙂")
    assert len(whole) > 1
    parts = GOOD.partition("cross")
    for broken in (whole[:1], whole[1:], whole[:1] * 9, whole[-1:] * 5):
        ids = [*encode(parts[0]), *broken, *encode(parts[2]), tiny.eos]
        caption, trace = split_segments(ids, tiny.tokenizer)
        assert caption[:-1] + trace == ids
        assert trace == split_segments(encode_response(GOOD, tiny.tokenizer), tiny.tokenizer)[1]


class Counted(str):
    """A text that counts the characters which are read by `find` and by slices."""

    read = 0

    def find(self, tag, start=0):
        found = super().find(tag, start)
        Counted.read += (found if found >= 0 else len(self)) - start
        return found

    def __getitem__(self, key):
        part = Counted(super().__getitem__(key))
        Counted.read += len(part)
        return part


class CountedIds(list):
    """The same of ids."""

    read = 0

    def __getitem__(self, key):
        part = super().__getitem__(key)
        CountedIds.read += len(part) if isinstance(key, slice) else 1
        return CountedIds(part) if isinstance(key, slice) else part


UNITS = ["<caption>", "<caption>\n</caption>", "<think>", "</answer>", "<", "\n", "<caption", "> "]


@pytest.mark.parametrize("unit", UNITS)
def test_adversarial_repetition_takes_linear_work(tiny, monkeypatch, unit):
    """Six tags are looked for, each once for its place and once for a second one; what lies outside
    and inside of the blocks is cut out: 14 times the text at most, however often what repeats."""
    for text in (GOOD.replace("red", unit * (20_000 // len(unit))), unit * (20_000 // len(unit))):
        ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        Counted.read = CountedIds.read = 0
        parse_response(Counted(text))
        assert 0 < Counted.read <= 14 * len(text)
        with monkeypatch.context() as patch:
            parse_spans = rollout.parse_spans
            patch.setattr(rollout, "parse_spans", lambda text: parse_spans(Counted(text)))
            Counted.read = 0
            split_segments(CountedIds(ids), tiny.tokenizer)
        assert 0 < Counted.read <= 14 * len(text) and CountedIds.read <= 3 * len(ids) + 2
    assert not hasattr(rollout, "re")  # the steps of a pattern would not be counted


def test_quadratic_work_would_be_counted():
    text, ids = Counted("<" * 2000), CountedIds([7] * 2000)
    Counted.read = CountedIds.read = 0
    for i in range(2000):
        text.find("<caption>", i)
        ids[:i]
    assert Counted.read > 14 * 2000 * 50 and CountedIds.read > 3 * 2000 * 50


# ----------------------------------------------------------------------------------------- sampling
def flat(groups):
    return [(r.ids, r.finished) for group in groups for r in group]


def numbers(groups):
    return np.concatenate([r.logprobs for group in groups for r in group])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_greedy_equals_generate(tiny, count):
    prompt, model = tiny.prompts[count], copy.deepcopy(tiny.stock)
    inputs = {k: v for k, v in stock_inputs(prompt, [], model.config).items() if v is not None}
    settings = {"suppress_tokens": tiny.banned, "eos_token_id": tiny.eos}
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=12, **settings)
    got = sample(tiny.model, [prompt], 1, max_new_tokens=12, eos_id=tiny.eos, temperature=0)[0][0]
    assert got.ids == expected[0, len(prompt.input_ids) :].tolist()


def test_samples_depend_on_their_seed_only(tiny):
    prompts, seeds = [tiny.prompts[c] for c in (1, 0, 3)], [(7, 1), (7, 2), (7, 3)]

    def draw(prompts=prompts, seeds=seeds, **more):
        return sample(tiny.model, prompts, 4, max_new_tokens=9, eos_id=0, seeds=seeds, **more)

    whole = draw()
    assert len(set(map(str, flat(whole)))) == 12  # twelve different ones
    for slots in (1, 3, 5):
        other = draw(slots=slots)
        assert flat(other) == flat(whole)
        assert np.abs(numbers(other) - numbers(whole)).max() <= 1e-4
    for i in range(3):  # a prompt alone, and a group in two halves as on two ranks
        alone = draw(prompts[i : i + 1], seeds[i : i + 1])
        assert flat(alone) == flat(whole[i : i + 1])
    halves = [draw(samples=[part] * 3) for part in (range(2), range(2, 4))]
    assert flat([a + b for a, b in zip(*halves)]) == flat(whole)
    assert flat(draw(seeds=[(8, 1), (8, 2), (8, 3)])) != flat(whole)


def test_the_samples_wanted_and_no_others(tiny):
    """When a group is spread over ranks, one of them may want none of a prompt, or none at all."""
    prompts = [tiny.prompts[c] for c in (1, 0, 3)]
    draw = partial(sample, tiny.model, prompts, 3, max_new_tokens=5, eos_id=0)
    whole = draw()
    part = draw(samples=[[], [2], [0, 1]])
    assert [len(group) for group in part] == [0, 1, 2]
    assert flat(part) == flat([whole[1][2:], whole[2][:2]])
    assert draw(samples=[[], [], []]) == [[], [], []]
    assert sample(tiny.model, [], 3, max_new_tokens=5, eos_id=0) == []


# -------------------------------------------------------------------------------------------- pages
SEEDS = [(7, 1), (7, 2), (7, 3)]
PAGED = {"max_new_tokens": 20, "seeds": SEEDS, "temperature": 1.5}


def draw_alone(tiny, prompt, seed, s, ends):
    """A rollout by whole forwards of the stock model, without a cache: ids."""
    noise = np.random.default_rng([*seed, s]).random(PAGED["max_new_tokens"], np.float32)
    ids, banned = [], torch.tensor(tiny.banned)
    for uniform in noise.astype(np.float64):
        logits = tiny.stock(**stock_inputs(prompt, ids, tiny.stock.config)).logits[0, -1].double()
        p = logits.index_fill(-1, banned, -torch.inf).div(PAGED["temperature"]).softmax(-1)
        ids.append(int((p.cumsum(-1) <= uniform).sum()))
        if ids[-1] in ends:
            break
    return ids


@pytest.fixture(scope="module")
@torch.no_grad()
def alone(tiny):
    """Four rollouts of each of three prompts, two with pictures, that end at one of many ids."""
    prompts = [tiny.prompts[c] for c in (1, 0, 3)]
    ends = range(len(tiny.tokenizer) // 10)
    ids = [[draw_alone(tiny, prompt, seed, s, ends) for s in range(4)]
           for prompt, seed in zip(prompts, SEEDS)]  # fmt: skip
    assert len({len(one) for group in ids for one in group}) > 4
    return SimpleNamespace(prompts=prompts, ends=list(ends), ids=ids)


@pytest.fixture
def pools(monkeypatch):
    """Every pool that is made, with the highest number of its pages that were in use."""
    made = []

    class Watched(rollout.Pool):
        def __init__(self, *args):
            super().__init__(*args)
            self.pages, self.highest = len(self.free), 0
            made.append(self)

        def take(self, count):
            taken = super().take(count)
            self.highest = max(self.highest, self.pages - len(self.free))
            return taken

    monkeypatch.setattr(rollout, "Pool", Watched)
    return made


@pytest.mark.parametrize("page", [1, 3, 16, 256])
def test_pages_and_slots_do_not_change_the_samples(tiny, alone, pools, monkeypatch, page):
    """In a pool for all, and in one for a single rollout of full length, where the youngest give up
    their pages again and again; nor does it how often tokens are read. What `watch` sees of a
    rollout only grows."""
    monkeypatch.setitem(rows.PAGE, "rows", page)
    given_up, evicted, prefill = [], set(), rollout.Batch.prefill

    def count(self, slots):
        given_up.extend(slot for slot, _ in slots if slot.ids)
        prefill(self, slots)

    monkeypatch.setattr(rollout.Batch, "prefill", count)
    for slots, every in ((1, 1), (1, 8), (3, 1), (3, 3), (64, 1), (64, 8)):
        for max_tokens in (16384, 1):
            seen = {}

            def watch(growing, ended, seen=seen, every=every):
                for slot in growing:
                    before = seen.get((slot.prompt, slot.sample), [])
                    assert slot.ids[: len(before)] == before
                    assert 1 <= len(slot.ids) - len(before) <= every
                    seen[slot.prompt, slot.sample] = list(slot.ids)

            given_up.clear()
            settings = {**PAGED, "slots": slots, "max_tokens": max_tokens, "watch": watch}
            settings |= {"eos_id": alone.ends, "read_every": every}
            groups = sample(tiny.model, alone.prompts, 4, **settings)
            assert [[r.ids for r in group] for group in groups] == alone.ids
            assert seen == {(p, s): alone.ids[p][s] for p in range(3) for s in range(4)}
            pressed = max_tokens == 1 and slots > 1 and page < 256
            assert pressed or not given_up
            assert given_up or not pressed or every > 1  # who reads seldom starts fewer
            evicted |= {every} if given_up else set()
            pack = pack_rows(alone.prompts, [(p, r.ids) for p in range(3) for r in groups[p]])
            expected, _ = target_logprobs(tiny.model, pack, PAGED["temperature"])
            assert np.abs(numbers(groups) - expected.detach().numpy()).max() <= 1e-4
    assert evicted == {1: {1, 3, 8}, 3: {1, 3, 8}, 16: {1, 3}, 256: set()}[page]
    longest = max(len(p.input_ids) for p in alone.prompts) + PAGED["max_new_tokens"]
    assert {pool.pages for pool in pools[1::2]} == {-(-longest // page)}
    assert all(len(pool.free) == pool.pages and not +pool.holders for pool in pools)


def test_the_host_reads_every_so_many_tokens(tiny, monkeypatch):
    """20 tokens, 8 at a time: three reads, the last after 4. In between nothing is asked of the
    device: a model on `meta` has no numbers that could be read."""
    reads, append = [], rollout.Batch.append

    def count(self, tokens, *rest):
        reads.append(tokens.shape[1])
        return append(self, tokens, *rest)

    monkeypatch.setattr(rollout.Batch, "append", count)
    draw = partial(sample, tiny.model, [tiny.prompts[1]], 2, eos_id=-1, max_new_tokens=20)
    assert flat(draw(read_every=8)) == flat(draw())
    assert reads == [8, 8, 4] + [1] * 20

    model = copy.deepcopy(tiny.model).to("meta")
    monkeypatch.setattr(rollout.Batch, "prefill", lambda batch, slots: None)  # that may ask
    queue = deque([rollout.Slot(p, 0, 30, np.zeros(20, np.float32)) for p in range(2)])
    batch = rollout.Batch(model, None, queue, 2, 20, 256, False, 8)
    assert batch.refill()
    with torch.no_grad():
        tokens, logprobs = batch.draw(temperature=1.0)
    assert tokens.is_meta and logprobs.is_meta and tokens.shape == (2, 8)


def test_memory_grows_with_the_tokens_that_exist(tiny, pools, monkeypatch):
    """64 rollouts of two prompts with pictures, 63 of which end after two tokens, start at once in
    a pool that holds the prompts once, a page for each of the 64 and little more."""
    page, limit, sizes = 4, 120, []
    monkeypatch.setitem(rows.PAGE, "rows", page)

    def choose(logits, uniform, temperature):
        sizes.append(len(logits))
        tokens = torch.full((len(logits),), 5 if len(sizes) < 2 else tiny.eos)
        tokens[0] = 5
        return tokens, torch.zeros(len(logits))

    monkeypatch.setattr(rollout, "choose", choose)
    prompts = [tiny.prompts[1], tiny.prompts[3]]
    p, q = (len(prompt.input_ids) for prompt in prompts)
    # a page holds what is left of the prompt and the first token; the second token is read by
    # nobody but the long one, whose other pages come when those of the 63 are free
    expected = p // page + q // page + 64
    assert (p + limit) // page < expected and 64 * (p + limit) > 10 * expected * page
    max_tokens = -(-(expected + 1) * page // rollout.SLOT_TOKENS)
    settings = {"max_new_tokens": limit, "eos_id": tiny.eos, "max_tokens": max_tokens}
    groups = sample(tiny.model, prompts, 32, **settings)
    assert [len(r.ids) for group in groups for r in group] == [limit] + 63 * [2]
    assert sizes == [64, 64] + [1] * (limit - 2)
    (pool,) = pools
    assert pool.highest == expected and pool.pages in (expected + 1, expected + 2)
    assert len(pool.free) == pool.pages and pool.kv.shape[1] == 1 + pool.pages


def test_memory_is_bounded_by_the_flags(tiny, pools, monkeypatch):
    """Pages stay within 8 x max_tokens positions, or what a rollout of full length takes, and
    within what the batch could need."""
    prompts, page = [tiny.prompts[c] for c in (3, 0, 1)], 4
    monkeypatch.setitem(rows.PAGE, "rows", page)
    whole = -(-(max(len(p.input_ids) for p in prompts) + 6) // page)
    draw = partial(sample, tiny.model, prompts, 4, max_new_tokens=6, eos_id=0)
    groups = draw()
    for max_tokens, slots, pages in ((1, 9, whole), (whole, 9, 2 * whole), (16384, 2, 2 * whole)):
        assert flat(draw(max_tokens=max_tokens, slots=slots)) == flat(groups)
        assert pools[-1].pages == pages
    assert pools[0].pages == 12 * whole


def test_nothing_is_left_of_an_interrupted_call(tiny, pools):
    def stop(growing, ended):
        if len(growing[0].ids) == 3:
            raise KeyboardInterrupt

    draw = partial(sample, tiny.model, [tiny.prompts[1]], 3, max_new_tokens=6, eos_id=0)
    with pytest.raises(KeyboardInterrupt):
        draw(watch=stop)
    pool = weakref.ref(pools.pop())
    gc.collect()
    assert pool() is None
    assert len(draw()[0]) == 3


def test_the_kernel_reads_pages_where_they_are(tiny, monkeypatch):
    """Decoding with flash in bf16, by an emulation that takes what the kernel takes: log-probs are
    those of a forward, and nothing is gathered."""
    monkeypatch.setattr(rows, "varlen_kernel", gpu.emulated_kernel)
    monkeypatch.delattr(rows.Paged, "gather")
    model = set_attention(copy.deepcopy(tiny.model).bfloat16(), "flash")
    prompts = [tiny.prompts[1], tiny.prompts[0], tiny.prompts[3]]
    groups = sample(model, prompts, 3, max_new_tokens=8, eos_id=-1, slots=4)
    pack = pack_rows(prompts, [(p, r.ids) for p in range(3) for r in groups[p]])
    with torch.no_grad():
        expected, _ = target_logprobs(model, pack)
    assert np.abs(numbers(groups) - expected.numpy()).mean() < 2e-2
    for page, dtype, words in ((16, torch.int32, "multiple of 256"), (256, torch.int64, "int32")):
        table = torch.zeros(1, 1, dtype=dtype)
        kv = torch.zeros(1, 1, page, 4, 32, dtype=torch.bfloat16)
        paged = rows.Paged(kv, table, torch.tensor([4]))
        query, module = kv.new_zeros(1, 4, 1, 32), SimpleNamespace(layer_idx=0)
        with pytest.raises(TypeError, match=words):
            rows.flash_rows(module, query, None, None, None, scaling=1.0, paged=paged)


def test_the_decode_step_is_one_graph(tiny):
    """It can be captured: compiled whole, once for each width of the table, whatever the pages,
    lengths and tokens of the slots."""
    text, counter = tiny.model.model.language_model, CompileCounter()
    step = torch.compile(rollout.decode_step, fullgraph=True, backend=counter)
    pools = [rollout.Pool(text.config, 9, 4, torch.float32, "cpu") for _ in range(2)]
    tables = [[1, 2, 0], [3, 0, 0], [4, 5, 6]], [[2, 1, 0], [8, 0, 0], [7, 4, 9]], [[1], [2], [3]]
    for lengths, table in zip(([4, 0, 9], [7, 3, 11], [0, 1, 2]), tables):
        state = torch.tensor([[5, 6, 7], lengths, [0, 2, 1]]).T
        table = torch.tensor(table, dtype=torch.int32)
        with torch.no_grad():
            eager = rollout.decode_step(text, pools[0].kv, table, state)
            compiled = step(text, pools[1].kv, table, state)
        assert (eager - compiled).abs().max() <= 1e-5
        assert (pools[0].kv - pools[1].kv).abs().max() <= 1e-5
    assert counter.frame_count == 2  # tables of 3 pages and of 1


def test_the_pool_of_compiled_steps_is_one_and_static(tiny, monkeypatch):
    """Inductor captures no graph that writes to an input whose address may change: the pool's may
    not, and is the same in the next call, whatever prompts it has."""
    types, pools = [], []

    def backend(module, inputs):
        for node in module.graph.find_nodes(op="placeholder"):
            value = node.meta.get("example_value")
            if torch.is_tensor(value) and value.dim() == 5:
                types.append(node.meta["tensor_dict"].get("_dynamo_static_input_type"))
        return module.forward

    step = torch.compile(rollout.decode_step, backend=backend, dynamic=False)

    def watched(text, pool, table, state):
        pools.append(pool.data_ptr())
        return step(text, pool, table, state)

    rollout.static_memory.cache_clear()
    monkeypatch.setattr(rollout, "compiled_decode_step", lambda: watched)
    settings = {"max_new_tokens": 4, "eos_id": -1, "compiled": True, "max_tokens": 256}
    for cases in ((0, 1), (3,)):
        sample(tiny.model, [tiny.prompts[c] for c in cases], 2, **settings)
    assert types and None not in types
    assert len(pools) == 6 and len(set(pools)) == 1


def test_compiled_sampling_equals_eager(tiny, monkeypatch):
    """The same tokens whatever the slots, which empty and are filled again. (Traced and replayed,
    but without the code generator, which needs a C++ compiler.)"""
    step = torch.compile(rollout.decode_step, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(rollout, "compiled_decode_step", lambda: step)
    prompts = [tiny.prompts[c] for c in (1, 0, 3)]
    settings = {"max_new_tokens": 7, "eos_id": tiny.eos, "temperature": 2.0}
    eager = sample(tiny.model, prompts, 3, **settings)
    compiled = sample(tiny.model, prompts, 3, **settings, slots=4, compiled=True)
    assert flat(compiled) == flat(eager)
    assert np.abs(numbers(compiled) - numbers(eager)).max() <= 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_logprobs_equal_a_row(tiny, temperature):
    prompts = [tiny.prompts[c] for c in (0, 1, 3)]
    settings = {"max_new_tokens": 10, "eos_id": tiny.eos, "temperature": temperature}
    groups = sample(tiny.model, prompts, 3, **settings, slots=4)
    for prompt, group in zip(prompts, groups):
        pack = pack_rows([prompt], [(0, r.ids) for r in group])
        expected, _ = target_logprobs(tiny.model, pack, temperature)
        assert np.abs(numbers([group]) - expected.detach().numpy()).max() <= 1e-4


def test_eos_ends_a_rollout_and_the_limit_cuts_it(tiny):
    """Rollouts of different lengths: at first half of the mass is on the EOS, so that many stop at
    once and some are cut."""
    model = biased(tiny, [tiny.eos], 0.5)
    groups = sample(model, [tiny.prompts[0]], 64, max_new_tokens=3, eos_id=tiny.eos, slots=8)
    kinds = {(len(r.ids), r.finished) for r in groups[0]}
    assert {(1, True), (3, False)} <= kinds <= {(1, True), (2, True), (3, True), (3, False)}
    for r in groups[0]:
        assert r.finished == (r.ids[-1] == tiny.eos)
        assert tiny.eos not in r.ids[:-1] and len(r.logprobs) == len(r.ids)


def biased(tiny, tokens, share):
    """The model with an untied head that gives each of `tokens` about this share of the first
    token's mass."""
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        hidden = model.model(**pack_rows([tiny.prompts[0]], []).inputs).last_hidden_state[0, -1]
        weight = model.lm_head.weight.clone()
        logit = (weight @ hidden).logsumexp(0) + math.log(share / (1 - share))
        weight[tokens] = hidden / hidden.square().sum() * logit
    model.lm_head.weight = torch.nn.Parameter(weight)
    return model


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_vision_tokens_are_never_sampled(tiny, temperature):
    """A sampled <|image_pad|> would make the next forward look for pixels that are not there."""
    model = biased(tiny, tiny.banned, 1 - 1e-9)
    logits = model(**stock_inputs(tiny.prompts[0], [], model.config)).logits[0, -1]
    assert logits.softmax(-1)[tiny.banned].sum() > 0.999  # unbanned, it would sample nothing else
    settings = {"max_new_tokens": 4, "eos_id": tiny.eos, "temperature": temperature}
    groups = sample(model, [tiny.prompts[0]], 16, **settings)
    assert not {token for r in groups[0] for token in r.ids} & set(tiny.banned)
    assert np.isfinite(numbers(groups)).all()


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_ids_beyond_the_tokenizer_are_never_sampled(tiny, temperature):
    """The embedding of a padded vocabulary has rows that are no tokens; here nearly all the mass is
    on the last of 64 such rows."""
    model, size = biased(tiny, [0], 0.5), len(tiny.tokenizer)
    model.resize_token_embeddings(size + 64)
    model.usable_vocabulary = size + 64
    weight = model.lm_head.weight.detach()
    with torch.no_grad():
        hidden = model.model(**pack_rows([tiny.prompts[0]], []).inputs).last_hidden_state[0, -1]
        weight[size:] = 100 * hidden / hidden.square().sum()
    settings = {"max_new_tokens": 4, "eos_id": tiny.eos, "temperature": temperature}
    draw = partial(sample, model, [tiny.prompts[0]], 16, **settings)
    assert all(r.ids[0] >= size for r in draw()[0])  # unbanned, it would sample nothing else
    model.usable_vocabulary = size
    groups = draw()
    assert max(token for r in groups[0] for token in r.ids) < size
    if temperature:
        pack = pack_rows([tiny.prompts[0]], [(0, r.ids) for r in groups[0]])
        expected, _ = target_logprobs(model, pack)
        assert np.abs(numbers(groups) - expected.detach().numpy()).max() <= 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_match_the_softmax(tiny, temperature):
    n, prompt = 20000, tiny.prompts[1]
    inputs = stock_inputs(prompt, [], tiny.stock.config)
    logits = tiny.stock(**inputs).logits[0, -1].double()
    logits = logits.index_fill(-1, torch.tensor(tiny.banned), -torch.inf)
    p = (logits / temperature).softmax(-1).detach().numpy()
    settings = {"max_new_tokens": 1, "eos_id": tiny.eos, "temperature": temperature}
    got = sample(tiny.model, [prompt], n, **settings, slots=4096)
    counts = np.bincount([r.ids[0] for r in got[0]], minlength=len(p))
    often = p * n >= 10
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(p[often], p[~often].sum()) * n
    keep = expected > 0
    chi2, degrees = ((observed - expected)[keep] ** 2 / expected[keep]).sum(), keep.sum() - 1
    assert degrees > 20 and abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees), (chi2, degrees)


def test_choose_is_the_inverse_of_the_distribution():
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    cases = [(0.0, 1), (0.1999, 1), (0.2001, 3), (0.6999, 3), (0.7001, 4), (0.99999994, 4)]
    for u, expected in cases:
        tokens, logprobs = rollout.choose(p.log().clamp(min=-1e30)[None], torch.tensor([u]), 1.0)
        assert tokens.item() == expected
        assert abs(logprobs.item() - p[expected].log().item()) < 1e-6


# ------------------------------------------------------------------------------------------- script
@pytest.fixture(scope="module")
def shown(tiny, policy):
    """A picture, a question, the flags that ask it, and the prompt that they stand for."""
    example = next(row for row in tiny.examples["rl"] if len(row["images"]) == 1)
    picture = tiny.folder / example["images"][0]
    question = example["prompt"][-1]["content"].replace("<image>", "")
    (tiny.folder / "system.txt").write_text(SYSTEM)
    flags = ["--ckpt", policy, "--image", picture, "--system-prompt", tiny.folder / "system.txt"]
    flags += ["--max-new-tokens", 30]
    turns = [{"role": "user", "content": question}]
    tools = tiny.tokenizer, tiny.image_processor
    prompt = encode_prompt(Example("x", turns, [str(picture)]), *tools, system_prompt=SYSTEM)
    return SimpleNamespace(flags=flags, question=question, prompt=prompt)


def texts_of(tiny, rollouts):
    return [tiny.tokenizer.decode(r.ids[: len(r.ids) - r.finished]) for r in rollouts]


def test_the_script_answers_as_generate_does(tiny, policy, shown, capfd):
    assert stage("rollout", *shown.flags, "--prompt", shown.question) == 0
    stock = AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float32)
    inputs = stock_inputs(shown.prompt, [], stock.config)
    ids = stock.generate(
        **inputs, max_new_tokens=30, do_sample=False, suppress_tokens=tiny.banned
    )[0, len(shown.prompt.input_ids) :].tolist()
    text = tiny.tokenizer.decode(ids[:-1] if ids[-1] == tiny.eos else ids)
    assert f"\n{text}\n\nanswer 1: {len(ids)} tokens" in "\n" + capfd.readouterr().out


def test_the_script_prints_samples_and_what_both_experts_say(tiny, policy, shown, tmp_path, capfd):
    """The scores are those of each response alone with its prompt."""
    disc = load_discriminator(tiny.base)
    for head in disc.heads.values():
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    save_discriminator(disc, str(tmp_path), ONE, tiny.base)
    more = ["--samples", 3, "--temperature", 0.7, "--seed", 4, "--disc", tmp_path]
    assert stage("rollout", *shown.flags, "--prompt", shown.question, *more) == 0
    model, ends = set_attention(load_policy(policy), "sdpa"), tiny.eos
    (rollouts,) = sample(
        model, [shown.prompt], 3, max_new_tokens=30, eos_id=ends, temperature=0.7, seeds=[(4,)]
    )
    printed, _, told = capfd.readouterr().out.rpartition("\n\n")
    assert printed.endswith("\n---\n".join(texts_of(tiny, rollouts)))
    lines = told.splitlines()
    assert len(lines) == 3
    scored = 0
    for line, made in zip(lines, rollouts):
        parts = split_segments(made.ids[:-1], tiny.tokenizer) if made.finished else None
        assert ("D_v" in line) == (parts is not None)
        if parts:
            with torch.no_grad():
                d_v, d_r = disc.scores([shown.prompt], *([(0, part)] for part in parts))
            assert line.endswith(f", D_v {d_v.item():.3f}, D_r {d_r.item():.3f}")
            scored += 1
    assert scored


def test_the_script_asks_until_there_is_no_question(shown, monkeypatch, capfd):
    """One that cannot be asked is said, and does not end it."""
    questions = iter([shown.question, "<image> and <image>", shown.question, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    assert stage("rollout", *shown.flags) == 0
    text = capfd.readouterr().out
    assert text.count("answer 1: ") == 2
    assert "--prompt: 2 <image> in the text but 1 images" in text


def test_samples_appear_while_they_grow(tiny, capsys):
    """The first by the token, the second from where it is; a character of two tokens at once; what
    would steer a terminal as a question mark."""
    stream = rollout.Stream(tiny.tokenizer, [tiny.eos], 2)
    first, second = (rollout.Slot(0, s, 1, np.zeros(9)) for s in (0, 1))
    head, tail = tiny.tokenizer("\u00e9", add_special_tokens=False)["input_ids"]
    red = tiny.tokenizer("red", add_special_tokens=False)["input_ids"]
    (escape,) = tiny.tokenizer("\x1b", add_special_tokens=False)["input_ids"]
    seen = []
    for token, other in [(head, red), (tail, []), (escape, []), (tiny.eos, [])]:
        first.ids.append(token)
        second.ids += other
        stream([first, second], [first] if token == tiny.eos else [])
        seen.append(capsys.readouterr().out)
    second.ids.append(tiny.eos)
    stream([second], [second])
    assert [*seen, capsys.readouterr().out] == ["", "\u00e9", "?", "\n---\nred", "\n"]


WRONG = {
    "no picture": (["--image", "none.png"], "--image none.png is no picture that can be read: "),
    "text": (["--image", __file__], "--image .*test_rollout.py is no picture that can be read: "),
    "greedy": (["--samples", "2", "--temperature", "0"], "--samples > 1 needs --temperature > 0"),
    "no folder": (["--ckpt", "nowhere"], "--ckpt nowhere: no such folder"),
    "policy": (["--disc", "POLICY"], "--disc: discriminator .*: neither a folder that align.py"),
    "pictures": (["--prompt", "<image><image>"], "--prompt: 2 <image> in the text but 1 images"),
    "token": (["--prompt", "<|image_pad|>"], "--prompt: the text contains <.image_pad.>; write "),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_of_the_script_is_one_line(policy, shown, capfd, name):
    flags, words = WRONG[name]
    flags = [policy if flag == "POLICY" else flag for flag in flags]
    begun = shown.flags
    if "--image" in flags:
        at = begun.index("--image")
        begun = begun[:at] + begun[at + 2 :]
    assert stage("rollout", *begun, "--prompt", "?", *flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(f"rollout.py: error: {words}", line)


# -------------------------------------------------------------------------------------------- copy
ALONE = '''
import sys

import torch
from transformers import Qwen3VLForConditionalGeneration

from rollout import parse_response, sample
from rows import Prompt, banned_ids, set_attention

stock = Qwen3VLForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
model = Qwen3VLForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
set_attention(model, "sdpa")
ids = [torch.tensor([20, 21, 22, 23]), torch.tensor([30, 31])]
prompts = [Prompt(i, torch.arange(len(i)).expand(3, -1), None, None) for i in ids]
groups = sample(model, prompts, 2, max_new_tokens=6, eos_id=0, temperature=0)
for one, group in zip(ids, groups):
    settings = {"do_sample": False, "suppress_tokens": banned_ids(stock), "eos_token_id": 0}
    expected = stock.generate(one[None], max_new_tokens=6, **settings)[0, len(one) :]
    print([r.ids for r in group] == [expected.tolist()] * 2)
print(parse_response("<caption>a</caption><think>b</think><answer>c</answer>").answer)
print(sorted({"data", "runtime", "toy"} & set(sys.modules)))
'''


def test_rollout_and_rows_alone_in_an_empty_folder(tiny, tmp_path):
    """They sample from a stock model what its own `generate` gives."""
    printed = run_alone(tmp_path, ["rollout.py", "rows.py"], ALONE, tiny.base).split()
    assert printed == ["True", "True", "c", "[]"]
