"""Run: pytest tests/test_rows.py          (rows, layouts, attention, log-probs; CPU only)"""

import copy

import numpy as np
import pytest
import torch
from conftest import assert_same_grads, branch_logprobs, grads, ids_of, run_alone, stock_inputs
from conftest import stock_logprobs

import rollout
from rows import Layout, Prompt, hidden_states, pack_rows, set_attention, split_rows
from rows import target_logprobs
from runtime import multiply_patches


# -------------------------------------------------------------------------------------------- rows
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
    ids = ids_of(rng, tiny, 4, 9, 2, 6, 1, 7)
    branches = list(zip([1, 0, 3, 0, 2, 1], ids))  # not in the order of the prompts
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
    prompts = [tiny.prompts[0], tiny.prompts[1]]
    branches = [(1, [11, 12, 13]), (0, [14, 15]), (1, [16])]
    pack = pack_rows(prompts, branches)
    ids = pack.inputs["input_ids"][0]
    assert ids[pack.ends].tolist() == [13, 15, 16]
    assert pack.targets.tolist() == [11, 12, 13, 14, 15, 16] and pack.lengths == [3, 2, 1]
    lengths = [len(p.input_ids) for p in prompts]
    at = sum(lengths)
    assert pack.source.tolist() == [at - 1, at, at + 1, lengths[0] - 1, at + 3, at - 1]
    after = tiny.prompts[1].next_position
    positions = pack.inputs["position_ids"][:, 0, at : at + 3].tolist()
    assert positions == [[after, after + 1, after + 2]] * 3


def text_prompt(ids):
    return Prompt(torch.tensor(ids), torch.arange(len(ids)).expand(3, -1), None, None)


def test_the_drawings_are_right():
    """The numbers in the docstring of `pack_rows` and the table in that of `Layout`."""
    prompts = [text_prompt([1, 2, 3]), text_prompt([4, 5])]
    pack = pack_rows(prompts, [(0, [6, 7]), (1, [8, 9]), (0, [10])])
    drawn = [line.split() for line in pack_rows.__doc__.splitlines()]
    numbers = {line[0]: [int(n) for n in line[1:] if n.isdigit()] for line in drawn if line}
    assert pack.inputs["position_ids"][0, 0].tolist() == numbers["position"]
    assert pack.targets.tolist() == [6, 7, 8, 9, 10]
    assert pack.source.tolist() == numbers["source"]
    assert pack.ends.tolist() == numbers["ends"] and pack.lengths == numbers["lengths"]

    lines = Layout.__doc__.splitlines()
    top = next(i for i, line in enumerate(lines) if line.split()[:2] == ["p0", "p1"])
    columns = [lines[top].index(f" {name} ") + 1 for name in "p0 p1 p2 q0 q1 a A b B c".split()]
    table = [[line.ljust(99)[c] == "x" for c in columns] for line in lines[top + 1 : top + 11]]
    assert torch.equal(seen_by_padded(pack.inputs["layout"], 10), torch.tensor(table))


def test_an_empty_branch_is_refused(tiny):
    with pytest.raises(ValueError, match="a branch of prompt 0 has no token"):
        pack_rows([tiny.prompts[0]], [(0, [])])


def seen_by_padded(layout, tokens):
    """[T, T]: which key each query sees by the form of a layout that SDPA reads."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for query, key, real, mask in layout.padded:
        for s, i, k in (mask[:, 0] & real[:, :, None]).nonzero().tolist():
            seen[query[s, i], key[s, k]] = True
    return seen


def test_the_forms_of_a_layout_agree():
    """SDPA's padded index and the variable-length kernels' ragged one say the same."""
    segments = [(0, 3, 0, 0), (3, 2, 0, 0), (5, 4, 3, 2), (9, 1, 0, 3), (10, 2, 3, 2)]
    layout, expected = Layout(segments), torch.zeros(12, 12, dtype=torch.bool)
    for start, length, prefix_start, prefix in segments:
        for q in range(start, start + length):
            expected[q, prefix_start : prefix_start + prefix] = True
            expected[q, start : q + 1] = True
    ragged = torch.zeros_like(expected)
    cu_q, cu_k, index = (x.tolist() for x in layout.ragged)
    for s in range(len(segments)):
        for q in range(cu_q[s], cu_q[s + 1]):
            causal = cu_k[s + 1] - (cu_q[s + 1] - 1 - q)  # aligned bottom-right
            ragged[q, index[cu_k[s] : causal]] = True
    assert torch.equal(seen_by_padded(layout, 12), expected) and torch.equal(ragged, expected)


@pytest.mark.parametrize("seed", range(20))
def test_split_rows_keeps_every_branch_and_the_budget(seed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(8):
        rows.append((int(rng.integers(1, 30)), rng.integers(1, 30, rng.integers(0, 6)).tolist()))
    budget = int(rng.integers(1, 120))
    packs = list(split_rows(rows, budget))
    assert [(r, b) for pack in packs for r, part in pack for b in part] == [
        (r, b) for r, (_, lengths) in enumerate(rows) for b in range(len(lengths))
    ]
    for pack in packs:
        tokens = sum(rows[r][0] + sum(rows[r][1][b] for b in part) for r, part in pack)
        assert tokens <= budget or [len(part) for _, part in pack] == [1]


# --------------------------------------------------------------------------------------- attention
def test_rows_on_a_stock_model_are_refused(tiny):
    """Its attention would ignore the layout: every branch would see its siblings, and the log-probs
    were wrong by up to 2 nats without a word."""
    pack = pack_rows([tiny.prompts[1]], [(0, [20, 21])])
    with pytest.raises(ValueError, match=r"attention sdpa .* rows.set_attention\(model, 'sdpa'\)"):
        hidden_states(tiny.stock.model, pack.inputs)
    with pytest.raises(ValueError, match="set_attention"):
        target_logprobs(tiny.stock, pack)
    with pytest.raises(ValueError, match="set_attention"):
        rollout.sample(tiny.stock, [tiny.prompts[1]], 1, max_new_tokens=2, eos_id=tiny.eos)
    model = set_attention(copy.deepcopy(tiny.stock), "sdpa")
    multiply_patches(model.model.visual)  # as load_policy does
    assert torch.equal(target_logprobs(model, pack)[0], target_logprobs(tiny.model, pack)[0])


def test_a_padded_batch_on_a_model_for_rows_is_refused(tiny):
    """transformers hands such attention functions no mask, so that padding was attended to."""
    inputs = stock_inputs(tiny.prompts[0], [20, 21], tiny.stock.config)
    ids = inputs["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    got, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (tiny.model, tiny.stock))
    assert (got - expected).abs().max() <= 1e-5  # without padding it is an ordinary causal batch
    mask[0, :3] = 0
    model = copy.deepcopy(tiny.model)
    for name in ("sdpa", "flash"):
        set_attention(model, name)
        with pytest.raises(ValueError, match="padded batch.*set_attn_implementation"):
            model(input_ids=ids, attention_mask=mask)
    model.set_attn_implementation("sdpa")  # the cure that the message names
    got, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (model, tiny.stock))
    assert torch.equal(got, expected)


# --------------------------------------------------------------------------------------- log-probs
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


def test_ids_beyond_the_tokenizer_have_no_share(tiny, tmp_path):
    """Padded vocabularies have logits for ids that are no tokens; the rest sums to 1 without them.
    A replica bans them too, and a saved config says nothing of it."""
    model, size = copy.deepcopy(tiny.model), len(tiny.tokenizer) - 40
    model.usable_vocabulary = size
    prompt, ids = tiny.prompts[1], [20, 21, tiny.eos]
    logits = tiny.stock(**stock_inputs(prompt, ids, tiny.stock.config)).logits[0, -4:-1].double()
    p = logits.softmax(-1).detach().numpy()
    allowed = [v for v in range(size) if v not in tiny.banned]
    p = p / p[:, allowed].sum(-1, keepdims=True)
    pack = pack_rows([prompt], [(0, ids)])
    for one in (model, copy.deepcopy(model)):
        logp, entropy = target_logprobs(one, pack)
        assert np.abs(logp.detach().numpy() - np.log(p[range(3), ids])).max() <= 1e-5
        assert np.abs(entropy.numpy() + (p * np.log(p))[:, allowed].sum(-1)).max() <= 1e-5
    model.config.save_pretrained(tmp_path / "model")
    tiny.model.config.save_pretrained(tmp_path / "tiny")
    saved = [(tmp_path / name / "config.json").read_text() for name in ("model", "tiny")]
    assert saved[0] == saved[1]


# -------------------------------------------------------------------------------------------- copy
ALONE = '''
import sys

import torch
from transformers import Qwen3VLForConditionalGeneration

from rows import Prompt, banned_ids, pack_rows, set_attention, target_logprobs


def inputs(ids, picture):
    """One sequence as transformers wants it; the picture is one of 2 x 2 tokens."""
    ids = torch.tensor(ids)[None]
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return out | ({"pixel_values": pixels, "image_grid_thw": grid} if picture else {})


def encode(ids, picture):
    given = inputs(ids, picture)
    if not picture:
        return Prompt(torch.tensor(ids), torch.arange(len(ids)).expand(3, -1), None, None)
    kinds, mask = given["mm_token_type_ids"], given["attention_mask"]
    positions, _ = stock.model.get_rope_index(given["input_ids"], kinds, grid, attention_mask=mask)
    return Prompt(torch.tensor(ids), positions[:, 0], pixels, grid)


stock = Qwen3VLForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
model = Qwen3VLForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
set_attention(model, "sdpa")
config = stock.config
grid, pixels = torch.tensor([[1, 4, 4]]), torch.randn(16, 3 * 2 * 16 * 16)
image = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
prompts = [([*image, 20, 21], True), ([22, 23, 24], False)]
branches = [(0, [30, 31, 32]), (1, [33, 34]), (0, [35])]
pack = pack_rows([encode(*prompt) for prompt in prompts], branches)
got = target_logprobs(model, pack)[0].split(pack.lengths)
for (p, branch), logp in zip(branches, got):
    ids, picture = prompts[p]
    logits = stock(**inputs(ids + branch, picture)).logits[0, len(ids) - 1 : -1]
    logits[:, banned_ids(stock)] = -torch.inf
    expected = logits.log_softmax(-1)[range(len(branch)), branch]
    print((logp - expected).abs().max().item() <= 1e-5)
print(sorted({"data", "rollout", "runtime", "toy"} & set(sys.modules)))
'''


def test_rows_alone_in_an_empty_folder(tiny, tmp_path):
    """Two prompts and three branches on a stock model equal separate sequences."""
    assert run_alone(tmp_path, ["rows.py"], ALONE, tiny.base).split() == ["True"] * 3 + ["[]"]
