"""Run: pytest tests/test_rollout.py          (prompts, response format, shared-prompt rows, log-probs, sampling; CPU only)"""

import copy
import math
import time

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from conftest import assert_same_grads, grads, ids_of, stock_inputs, stock_logprobs

import runtime
from rows import Layout, branch_logprobs, hidden_states, pack_rows, set_attention, split_rows, target_logprobs
from data import Example, encode_prompt, encode_response, mrope_positions
import rollout
from runtime import InputError
from rollout import parse_response, sample, split_segments

GOOD = "<caption>\n1 red cross\n</caption>\n<think>\n1 + 1 = 2\n</think>\n<answer>\n2\n</answer>"


# ---------------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize("count", [0, 1, 3])
def test_positions_equal_those_of_transformers(tiny, count):
    prompt = tiny.prompts[count]
    inputs = stock_inputs(prompt, [], tiny.stock.config)
    expected, _ = tiny.stock.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], prompt.image_grid_thw, attention_mask=inputs["attention_mask"]
    )
    assert torch.equal(prompt.position_ids, expected[:, 0])
    assert (prompt.input_ids == tiny.stock.config.image_token_id).sum() == (0, 9, None, 9 + 2 + 3)[count]


def test_positions_of_a_hand_made_picture():
    ids = torch.tensor([5, 9, 9, 9, 9, 9, 9, 7])  # 9: an image of 2 x 3 merged tokens
    got = mrope_positions(ids, torch.tensor([[1, 4, 6]]), 9, 2)
    assert got.tolist() == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]


def test_long_prompts_are_dropped_and_never_cut(tiny):
    example = Example("x", [{"role": "user", "content": "one two three"}])
    length = len(encode_prompt(example, tiny.tokenizer, tiny.image_processor).input_ids)
    assert encode_prompt(example, tiny.tokenizer, tiny.image_processor, length) is not None
    assert encode_prompt(example, tiny.tokenizer, tiny.image_processor, length - 1) is None


def test_placeholders_and_pictures_must_agree(tiny):
    picture = tiny.folder / tiny.rows["rl"][0]["images"][0]
    example = Example("row 7", [{"role": "user", "content": "<image><image> same?"}], [str(picture)])
    with pytest.raises(InputError, match="row 7: 2 <image> in the text but 1 images"):
        encode_prompt(example, tiny.tokenizer, tiny.image_processor)


# -------------------------------------------------------------------------------------------------------- response format
BROKEN = {
    "nothing": "",
    "no tags": "2",
    "repeated block": GOOD.replace("<think>", "<caption>\n</caption>\n<think>"),
    "repeated tag": GOOD + "</answer>",
    "tag in text": GOOD.replace("1 + 1", "<answer>"),
    "missing block": GOOD.replace("<think>\n1 + 1 = 2\n</think>\n", ""),
    "missing end": GOOD.removesuffix("</answer>"),
    "reordered": GOOD.replace("caption", "x").replace("think", "caption").replace("x>", "think>"),
    "closed first": GOOD.replace("<think>", "#").replace("</think>", "<think>").replace("#", "</think>"),
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
    assert split_segments(ids[:-1], tiny.tokenizer) == (caption, trace)  # with or without the EOS at its end
    parts = parse_response(WHOLE[name])
    assert [parts.think, parts.answer] in (["1 + 1 = 2", "2"], ["", ""])


def test_a_token_over_the_boundary_belongs_to_the_caption(tiny):
    ids = encode_response(GOOD, tiny.tokenizer)
    caption, _ = split_segments(ids, tiny.tokenizer)
    straddling = tiny.tokenizer.decode(caption[-2:-1])
    assert straddling.endswith(">\n"), "the tokenizer of this world joins the tag and the line break after it"


def test_characters_cut_in_two_keep_the_offsets(tiny):
    """Sampling may stop between the bytes of a character: the pieces decode to U+FFFD, of another length than the bytes."""
    whole = tiny.tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert len(whole) > 1
    parts = GOOD.partition("cross")
    encode = lambda text: tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    for broken in (whole[:1], whole[1:], whole[:1] * 9, whole[-1:] * 5):
        ids = [*encode(parts[0]), *broken, *encode(parts[2]), tiny.eos]
        caption, trace = split_segments(ids, tiny.tokenizer)
        assert caption[:-1] + trace == ids
        assert trace == split_segments(encode_response(GOOD, tiny.tokenizer), tiny.tokenizer)[1]


@pytest.mark.parametrize("unit", ["<caption>", "<caption>\n</caption>", "<think>", "</answer>", "<", "\n", "<caption", "> "])
def test_adversarial_repetition_takes_linear_time(tiny, unit):
    """Ten times the length may cost ten times the work; quadratic would be a hundred times."""

    def cost(characters):
        text = GOOD.replace("red", unit * (characters // len(unit)))
        ids = tiny.tokenizer(text[: characters // 10], add_special_tokens=False)["input_ids"]
        began = time.process_time()
        parse_response(text)
        split_segments(ids, tiny.tokenizer)
        return time.process_time() - began

    assert min(cost(1_000_000) for _ in range(3)) < 40 * max(cost(100_000), 0.002)


# ------------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_row_equals_separate_sequences(tiny, count):
    rng = np.random.default_rng(count)
    prompt, branches = tiny.prompts[count], ids_of(rng, tiny, 5, 1, 12, 5)
    weights = [torch.from_numpy(rng.normal(size=len(b)) / 23).float() for b in branches]
    tiny.model.zero_grad(), tiny.stock.zero_grad()
    row = branch_logprobs(tiny.model, prompt, branches)
    sum((w * got).sum() for w, got in zip(weights, row)).backward()
    for w, got, ids in zip(weights, row, branches):
        expected = stock_logprobs(tiny, prompt, ids)
        assert (got - expected).abs().max() <= 1e-5
        (w * expected).sum().backward()
    assert_same_grads(grads(tiny.model), grads(tiny.stock))


def test_several_prompts_in_one_pack(tiny):
    rng = np.random.default_rng(3)
    prompts = [tiny.prompts[c] for c in (3, 0, 1, 0)]  # the same prompt twice
    branches = list(zip([1, 0, 3, 0, 2, 1], ids_of(rng, tiny, 4, 9, 2, 6, 1, 7)))  # not in the order of the prompts
    tiny.model.zero_grad(), tiny.stock.zero_grad()
    got, _ = target_logprobs(tiny.model, pack_rows(prompts, branches))
    expected = torch.cat([stock_logprobs(tiny, prompts[p], ids) for p, ids in branches])
    assert (got - expected).abs().max() <= 1e-5
    got.mean().backward(), expected.mean().backward()
    assert_same_grads(grads(tiny.model), grads(tiny.stock))


def test_a_branch_sees_no_sibling(tiny):
    first, second, third = ids_of(np.random.default_rng(4), tiny, 6, 6, 6)
    left = branch_logprobs(tiny.model, tiny.prompts[1], [first, second])
    right = branch_logprobs(tiny.model, tiny.prompts[1], [first, third])
    assert torch.equal(left[0], right[0]) and not torch.allclose(left[1], right[1])


def test_read_out_positions(tiny):
    """`ends` are the last tokens of the branches, `source` the token before each target."""
    prompts, branches = [tiny.prompts[0], tiny.prompts[1]], [(1, [11, 12, 13]), (0, [14, 15]), (1, [16])]
    pack = pack_rows(prompts, branches)
    ids = pack.inputs["input_ids"][0]
    assert ids[pack.ends].tolist() == [13, 15, 16]
    assert pack.targets.tolist() == [11, 12, 13, 14, 15, 16] and pack.lengths == [3, 2, 1]
    lengths = [len(p.input_ids) for p in prompts]
    at = sum(lengths)
    assert pack.source.tolist() == [at - 1, at, at + 1, lengths[0] - 1, at + 3, at - 1]
    after = tiny.prompts[1].next_position
    assert pack.inputs["position_ids"][:, 0, at : at + 3].tolist() == [[after, after + 1, after + 2]] * 3


def test_flex_attention_equals_separate_sequences(tiny):
    """Log-probs only: on a CPU flex attention has no backward."""
    rng, model = np.random.default_rng(3), copy.deepcopy(tiny.model).requires_grad_(False)
    set_attention(model.model, "flex")
    prompts, branches = [tiny.prompts[c] for c in (3, 0)], list(zip([1, 0, 1], ids_of(rng, tiny, 4, 9, 2)))
    got, _ = target_logprobs(model, pack_rows(prompts, branches))
    expected = torch.cat([stock_logprobs(tiny, prompts[p], ids) for p, ids in branches])
    assert (got - expected).abs().max() <= 1e-5


def test_the_forms_of_a_layout_agree():
    """SDPA's padded index, the variable-length kernels' ragged one and flex attention's block mask say the same."""
    segments = [(0, 3, 0, 0), (3, 2, 0, 0), (5, 4, 3, 2), (9, 1, 0, 3), (10, 2, 3, 2)]
    layout, expected = Layout(segments), torch.zeros(12, 12, dtype=torch.bool)
    for start, length, prefix_start, prefix in segments:
        for q in range(start, start + length):
            expected[q, prefix_start : prefix_start + prefix] = True
            expected[q, start : q + 1] = True
    padded, ragged = torch.zeros_like(expected), torch.zeros_like(expected)
    for query, key, real, mask in layout.padded:
        for s, i, k in (mask[:, 0] & real[:, :, None]).nonzero().tolist():
            padded[query[s, i], key[s, k]] = True
    cu_q, cu_k, index = (x.tolist() for x in layout.ragged)
    for s in range(len(segments)):
        for q in range(cu_q[s], cu_q[s + 1]):
            ragged[q, index[cu_k[s] : cu_k[s + 1] - (cu_q[s + 1] - 1 - q)]] = True  # causal, aligned bottom-right
    sees = layout.block_mask.mask_mod
    flex = torch.tensor([[bool(sees(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(12)] for q in range(12)])
    assert torch.equal(padded, expected) and torch.equal(ragged, expected) and torch.equal(flex, expected)


@pytest.mark.parametrize("seed", range(20))
def test_split_rows_keeps_every_branch_and_the_budget(seed):
    rng = np.random.default_rng(seed)
    rows = [(int(rng.integers(1, 30)), rng.integers(1, 30, rng.integers(0, 6)).tolist()) for _ in range(8)]
    budget = int(rng.integers(1, 120))
    packs = list(split_rows(rows, budget))
    assert [(r, b) for pack in packs for r, part in pack for b in part] == [
        (r, b) for r, (_, lengths) in enumerate(rows) for b in range(len(lengths))
    ]
    for pack in packs:
        tokens = sum(rows[r][0] + sum(rows[r][1][b] for b in part) for r, part in pack)
        assert tokens <= budget or [len(part) for _, part in pack] == [1]


# -------------------------------------------------------------------------------------------------------------- log-probs
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_head_equals_float64_whatever_the_chunk(tiny, temperature):
    ids = ids_of(np.random.default_rng(5), tiny, 7, 4)
    pack = pack_rows([tiny.prompts[1]], [(0, i) for i in ids])
    with torch.no_grad():
        hidden = hidden_states(tiny.model.model, pack.inputs)[pack.source]
        table = (tiny.model.lm_head(hidden).double() / temperature).numpy()
    logp, entropy = [], []
    for logits, target in zip(table, pack.targets.tolist()):
        allowed = [v for v in range(len(logits)) if v not in tiny.banned]
        p = np.exp(logits - logits[allowed].max())
        p = p / p[allowed].sum()
        logp.append(np.log(p[target]))
        entropy.append(-sum(p[v] * np.log(p[v]) for v in allowed))
    found = []
    for chunk in (1, 3, 11, 1024):
        tiny.model.zero_grad()
        got, got_entropy = target_logprobs(tiny.model, pack, temperature, chunk)
        assert np.abs(got.detach().numpy() - logp).max() <= 1e-5
        assert np.abs(got_entropy.numpy() - entropy).max() <= 1e-5
        got.mean().backward()
        found.append(grads(tiny.model))
    for other in found[1:]:
        assert_same_grads(found[0], other, 1e-6)


# --------------------------------------------------------------------------------------------------------------- sampling
def flat(groups):
    return [(r.ids, r.finished) for group in groups for r in group]


def numbers(groups):
    return np.concatenate([r.logprobs for group in groups for r in group])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_greedy_equals_generate(tiny, count):
    prompt, model = tiny.prompts[count], copy.deepcopy(tiny.stock)
    inputs = {k: v for k, v in stock_inputs(prompt, [], model.config).items() if v is not None}
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=12, suppress_tokens=tiny.banned, eos_token_id=tiny.eos)
    got = sample(tiny.model, [prompt], 1, max_new_tokens=12, eos_id=tiny.eos, temperature=0)[0][0]
    assert got.ids == expected[0, len(prompt.input_ids) :].tolist()


def test_samples_depend_on_their_seed_only(tiny):
    prompts, seeds = [tiny.prompts[c] for c in (1, 0, 3)], [(7, 1), (7, 2), (7, 3)]
    draw = lambda **more: sample(tiny.model, **({"prompts": prompts, "n": 4, "seeds": seeds} | more), max_new_tokens=9, eos_id=0)
    whole = draw()
    assert len(set(map(str, flat(whole)))) == 12  # twelve different ones
    for slots in (1, 3, 5):
        other = draw(slots=slots)
        assert flat(other) == flat(whole)
        assert np.abs(numbers(other) - numbers(whole)).max() <= 1e-4
    for i in range(3):  # a prompt alone, and a group in two halves as on two ranks
        assert flat(draw(prompts=prompts[i : i + 1], seeds=seeds[i : i + 1])) == flat(whole[i : i + 1])
    halves = [draw(samples=[part] * 3) for part in (range(2), range(2, 4))]
    assert flat([a + b for a, b in zip(*halves)]) == flat(whole)
    assert flat(draw(seeds=[(8, 1), (8, 2), (8, 3)])) != flat(whole)


def test_memory_is_bounded_by_the_flags(tiny):
    """Rows times columns stay within 8 x max_tokens (one row is always possible), and the samples do not change."""
    prompts, rows = [tiny.prompts[c] for c in (3, 0, 1)], []
    columns = max(len(p.input_ids) for p in prompts) + 6
    hook = tiny.model.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(len(output)))
    draw = lambda **more: sample(tiny.model, prompts, 4, max_new_tokens=6, eos_id=0, **more)
    whole = draw()
    assert max(rows) == 12
    for max_tokens, slots in ((1, 1), (columns // 2, 4), (columns, 8)):
        rows.clear()
        part = draw(max_tokens=max_tokens)
        assert max(rows) == slots and flat(part) == flat(whole)
        assert np.abs(numbers(part) - numbers(whole)).max() <= 1e-4
    hook.remove()


def test_the_decode_step_is_one_graph(tiny):
    """It can be captured: compiled whole, once for each window, whatever the lengths and tokens of the rows."""
    text, counter = tiny.model.model.language_model, CompileCounter()
    step = torch.compile(rollout.decode_step, fullgraph=True, backend=counter)
    caches = [rollout.SlotCache(2, 3, 2, 20, text.config.head_dim, torch.float32, "cpu") for _ in range(2)]
    for lengths in ([4, 0, 9], [2, 3, 11], [11, 10, 10]):
        tokens, offset = torch.tensor([5, 6, 7]), torch.tensor([0, 2, 1])
        for cache in caches:
            cache.lengths[:] = torch.tensor(lengths)
            cache.open_window(max(lengths) + 1, compiled=False)
        with torch.no_grad():
            eager, compiled = (f(text, cache, tokens, offset) for f, cache in zip((rollout.decode_step, step), caches))
        assert (eager - compiled).abs().max() <= 1e-5
    assert counter.frame_count == 2  # windows of 10 and 12 columns


def test_compiled_sampling_equals_eager(tiny, monkeypatch):
    """The same tokens whatever the slots, with rows that finish and slots that are filled again. (Traced and replayed, but
    without the code generator, which needs a C++ compiler.)"""
    step = torch.compile(rollout.decode_step, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(rollout, "compiled_decode_step", lambda: step)
    prompts = [tiny.prompts[c] for c in (1, 0, 3)]
    draw = lambda **more: sample(tiny.model, prompts, 3, max_new_tokens=7, eos_id=tiny.eos, temperature=2.0, **more)
    eager, compiled = draw(), draw(slots=4, compiled=True)
    assert flat(compiled) == flat(eager) and np.abs(numbers(compiled) - numbers(eager)).max() <= 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_logprobs_equal_a_row(tiny, temperature):
    prompts = [tiny.prompts[c] for c in (0, 1, 3)]
    groups = sample(tiny.model, prompts, 3, max_new_tokens=10, eos_id=tiny.eos, temperature=temperature, slots=4)
    for prompt, group in zip(prompts, groups):
        pack = pack_rows([prompt], [(0, r.ids) for r in group])
        expected, _ = target_logprobs(tiny.model, pack, temperature)
        assert np.abs(numbers([group]) - expected.detach().numpy()).max() <= 1e-4


def test_eos_ends_a_rollout_and_the_limit_cuts_it(tiny):
    """Rows of different lengths: at first half of the mass is on the EOS, so that many stop at once and some are cut."""
    model = biased(tiny, [tiny.eos], 0.5)
    groups = sample(model, [tiny.prompts[0]], 64, max_new_tokens=3, eos_id=tiny.eos, slots=8)
    kinds = {(len(r.ids), r.finished) for r in groups[0]}
    assert {(1, True), (3, False)} <= kinds <= {(1, True), (2, True), (3, True), (3, False)}
    for r in groups[0]:
        assert r.finished == (r.ids[-1] == tiny.eos) and tiny.eos not in r.ids[:-1] and len(r.logprobs) == len(r.ids)


def biased(tiny, tokens, share):
    """The model with an untied head that gives each of `tokens` about this share of the first token's mass."""
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        hidden = model.model(**pack_rows([tiny.prompts[0]], []).inputs).last_hidden_state[0, -1]
        weight = model.lm_head.weight.clone()
        weight[tokens] = hidden / hidden.square().sum() * ((weight @ hidden).logsumexp(0) + math.log(share / (1 - share)))
    model.lm_head.weight = torch.nn.Parameter(weight)
    return model


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_vision_tokens_are_never_sampled(tiny, temperature):
    """A sampled <|image_pad|> would make the next forward look for pixels that are not there."""
    model = biased(tiny, tiny.banned, 1 - 1e-9)
    logits = model(**stock_inputs(tiny.prompts[0], [], model.config)).logits[0, -1]
    assert logits.softmax(-1)[tiny.banned].sum() > 0.999  # unbanned, it would sample nothing else
    groups = sample(model, [tiny.prompts[0]], 16, max_new_tokens=4, eos_id=tiny.eos, temperature=temperature)
    assert not {token for r in groups[0] for token in r.ids} & set(tiny.banned)
    assert np.isfinite(numbers(groups)).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_match_the_softmax(tiny, temperature):
    n, prompt = 20000, tiny.prompts[1]
    inputs = stock_inputs(prompt, [], tiny.stock.config)
    logits = tiny.stock(**inputs).logits[0, -1].double().index_fill(-1, torch.tensor(tiny.banned), -torch.inf)
    p = (logits / temperature).softmax(-1).detach().numpy()
    got = sample(tiny.model, [prompt], n, max_new_tokens=1, eos_id=tiny.eos, temperature=temperature, slots=4096)
    counts = np.bincount([r.ids[0] for r in got[0]], minlength=len(p))
    often = p * n >= 10
    observed, expected = np.append(counts[often], counts[~often].sum()), np.append(p[often], p[~often].sum()) * n
    keep = expected > 0
    chi2, degrees = ((observed - expected)[keep] ** 2 / expected[keep]).sum(), keep.sum() - 1
    assert degrees > 20 and abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees), (chi2, degrees)


def test_choose_is_the_inverse_of_the_distribution():
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    for u, expected in [(0.0, 1), (0.1999, 1), (0.2001, 3), (0.6999, 3), (0.7001, 4), (0.99999994, 4)]:
        tokens, logprobs = rollout.choose(p.log().clamp(min=-1e30)[None], torch.tensor([u]), 1.0)
        assert tokens.item() == expected
        assert abs(logprobs.item() - p[expected].log().item()) < 1e-6


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"])
def test_a_literal_vision_token_in_a_text_is_refused(tiny, token):
    """It would be taken for a picture that is not there."""
    with pytest.raises(runtime.InputError, match="the text contains"):
        encode_response(f"a {token} b", tiny.tokenizer)
    example = Example("row 7", [{"role": "user", "content": f"what is {token}?"}])
    with pytest.raises(runtime.InputError, match="row 7: the text contains"):
        encode_prompt(example, tiny.tokenizer, tiny.image_processor)
