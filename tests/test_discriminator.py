"""Run: pytest tests/test_discriminator.py          (experts, rows, Bradley-Terry loss, variants, scoring; CPU only)"""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ONE, assert_same_grads, grads, ids_of, read_jsonl, stage, stock_inputs, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeForConditionalGeneration

import runtime
from rows import Prompt, set_attention
from data import encode_prompt, encode_response, load_examples
import rollout
from discriminator import VARIANTS, bradley_terry, load_discriminator, save_discriminator, visible_prompt

EXPERT = {"perception": "reasoning", "reasoning": "perception"}  # each one's other


def trained(tiny, variant="moe", seed=0):
    """A discriminator whose heads and experts differ, as after training."""
    model = load_discriminator(tiny.released if variant == "learned" else tiny.base, variant)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "mlp" in name or "heads" in name:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


class Routed(torch.nn.Module):
    """What an MLP of the discriminator means for a single segment: the prompt goes through the shared copy, the rest
    through one expert."""

    def __init__(self, mlp, expert, cut):
        super().__init__()
        self.shared, self.expert, self.cut = mlp.shared, getattr(mlp, expert), cut

    def forward(self, hidden):
        return torch.cat([self.shared(hidden[:, : self.cut]), self.expert(hidden[:, self.cut :])], dim=1)


def alone(disc, prompt, ids, expert):
    """Score of one segment as a sequence of its own: plain causal attention, positions worked out by transformers."""
    layers, backbone = disc.backbone.language_model.layers, disc.backbone
    before = [layer.mlp for layer in layers]
    for layer, mlp in zip(layers, before):
        layer.mlp = Routed(mlp, expert, len(prompt.input_ids))
    backbone.set_attn_implementation("sdpa")
    hidden = backbone(**stock_inputs(prompt, ids, backbone.config), use_cache=False).last_hidden_state[0, -1]
    set_attention(backbone, "sdpa")
    for layer, mlp in zip(layers, before):
        layer.mlp = mlp
    return disc.heads[expert](hidden)[0]


def pairs_of(tiny, places, seed=0):
    """Captions and traces [(index into prompts, ids)] of random lengths."""
    rng = np.random.default_rng(seed)
    return [list(zip(places, ids_of(rng, tiny, *rng.integers(2, 9, len(places))))) for _ in range(2)]


# ------------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("counts, places", [([0], [0, 0, 0]), ([1], [0, 0]), ([3], [0, 0]), ([1, 0, 3, 0], [0, 2, 1, 0, 3, 2])])
def test_a_row_equals_separate_sequences(tiny, counts, places):
    disc, prompts = trained(tiny), [tiny.prompts[c] for c in counts]
    segments = pairs_of(tiny, places)
    weights = torch.randn(2, len(places), generator=torch.Generator().manual_seed(1)) / len(places)
    scores = torch.stack(disc.scores(prompts, *segments))
    assert scores.dtype == torch.float32 and scores.std() > 0.1
    (weights * scores).sum().backward()
    row = grads(disc)
    disc.zero_grad()
    expected = torch.stack([
        torch.stack([alone(disc, prompts[p], ids, expert) for p, ids in part]) for part, expert in zip(segments, EXPERT)
    ])  # fmt: skip
    assert (scores - expected).abs().max() <= 1e-5
    (weights * expected).sum().backward()
    assert_same_grads(row, grads(disc))


def test_at_the_start_both_experts_equal_the_dense_model(tiny):
    prompt, (captions, traces) = tiny.prompts[3], pairs_of(tiny, [0, 0, 0])
    backbone = tiny.stock.model
    head = torch.randn(1, backbone.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))

    def dense(ids):
        with torch.no_grad():
            return (backbone(**stock_inputs(prompt, ids, tiny.stock.config)).last_hidden_state[0, -1] @ head[0]).item()

    expected = {
        "moe": [[dense(ids) for _, ids in part] for part in (captions, traces)],
        "dense": [[dense(c[:-1] + t) for (_, c), (_, t) in zip(captions, traces)]] * 2,  # one score for the whole response
    }
    for variant, numbers in expected.items():
        disc = load_discriminator(tiny.base, variant)
        assert all(score.abs().max() == 0 for score in disc.scores([prompt], captions, traces))  # heads start at zero
        with torch.no_grad():
            for linear in disc.heads.values():
                linear.weight.copy_(head)
        got = torch.stack(disc.scores([prompt], captions, traces)).detach()
        assert (got - torch.tensor(numbers)).abs().max() <= 1e-5
        assert len(disc.heads) == (1 if variant == "dense" else 2)


@pytest.mark.parametrize("expert", EXPERT)
def test_the_loss_of_one_expert_never_touches_the_other(tiny, expert):
    disc = trained(tiny)
    scores = dict(zip(EXPERT, disc.scores([tiny.prompts[1], tiny.prompts[0]], *pairs_of(tiny, [0, 0, 1, 1]))))[expert]
    bradley_terry(scores[::2], scores[1::2], torch.ones(2, dtype=torch.bool)).backward()
    own, others = [], []
    for name, p in disc.named_parameters():
        part = name.split(".")
        if EXPERT[expert] in part:
            others.append(p.grad is None or not p.grad.any())
        elif expert in part or "shared" in part and "0" in part:  # prompt tokens that leave the last layer are not read
            own.append(p.grad is not None and bool(p.grad.any()))
    assert len(others) == 3 * 2 + 1 and all(others)  # three matrices in each of two layers, and the head
    assert len(own) == 3 * 2 + 1 + 3 and all(own)


# --------------------------------------------------------------------------------------------------------------- variants
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_text_only_variant_is_blind(tiny, variant):
    disc, prompt, segments = trained(tiny, variant), tiny.prompts[1], pairs_of(tiny, [0, 0])
    other = Prompt(prompt.input_ids, prompt.position_ids, -prompt.pixel_values, prompt.image_grid_thw)
    here, there = (torch.stack(disc.scores([visible_prompt(p, tiny.tokenizer, variant)], *segments)) for p in (prompt, other))
    assert torch.equal(here, there) == (variant == "text-only")
    seen = visible_prompt(prompt, tiny.tokenizer, "text-only")
    assert tiny.tokenizer.decode(seen.input_ids).count("<|") == tiny.tokenizer.decode(prompt.input_ids).count("<|") - 11
    assert seen.pixel_values is None and seen.position_ids.tolist() == [list(range(len(seen.input_ids)))] * 3


# ------------------------------------------------------------------------------------------------------------------- loss
def test_bradley_terry_equals_float64():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(0, 8, (2, 40))
    valid = rng.random(40) < 0.7
    expected, gradient = 0.0, np.zeros(40)
    for i in range(40):
        if valid[i]:
            gap = teacher[i] - student[i]
            expected += -math.log(1 / (1 + math.exp(-gap))) / valid.sum()
            gradient[i] = -1 / (1 + math.exp(gap)) / valid.sum()
    t, s = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (teacher, student))
    loss = bradley_terry(t, s, torch.tensor(valid))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert np.abs(t.grad.numpy() - gradient).max() < 1e-6 and torch.equal(s.grad, -t.grad)
    parts = [bradley_terry(t[p], s[p], torch.tensor(valid[p]), valid.sum()) for p in (slice(0, 9), slice(9, 30), slice(30, 40))]
    assert sum(parts).item() == pytest.approx(expected, rel=1e-5)  # parts with the global count add up


def test_without_a_valid_pair_the_loss_is_zero():
    t, s = torch.tensor([3.0, 1e9], requires_grad=True), torch.tensor([-3.0, -torch.inf], requires_grad=True)
    loss = bradley_terry(t, s, torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not t.grad.any() and not s.grad.any()


# -------------------------------------------------------------------------------------------------------- save and score
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_discriminator_scores_the_same(tiny, tmp_path, variant):
    disc, segments = trained(tiny, variant), pairs_of(tiny, [0, 1, 1])
    save_discriminator(disc, str(tmp_path / "disc"), ONE, tiny.base)
    again = load_discriminator(str(tmp_path / "disc"), variant)
    prompts = [visible_prompt(tiny.prompts[c], tiny.tokenizer, variant) for c in (1, 0)]
    assert torch.equal(torch.stack(disc.scores(prompts, *segments)), torch.stack(again.scores(prompts, *segments)))
    for other in set(VARIANTS) - {variant} - ({"moe"} if variant == "learned" else set()):  # moe is only the default there
        with pytest.raises(runtime.InputError, match=f"trained as {variant}"):
            load_discriminator(str(tmp_path / "disc"), other)


def test_the_released_layout_is_read_as_it_is(tiny, tmp_path):
    """Shards with the experts as (E, hidden, 2 inter) and the head among them; without the head it is an error."""
    disk = {key: t for file in Path(tiny.released).glob("*.safetensors") for key, t in load_file(file).items()}
    disc = load_discriminator(tiny.released)
    assert disc.variant == "learned" and list(disc.heads) == ["perception"]
    assert torch.equal(disc.heads["perception"].weight, disk["v_head.1.weight"])
    experts = disc.backbone.language_model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        stored = disk[f"model.language_model.layers.1.mlp.experts.{name}"]
        assert stored.shape[1:] == getattr(experts, name).shape[:0:-1] and torch.equal(getattr(experts, name), stored.mT)
    shutil.copytree(tiny.released, tmp_path / "headless")
    last = sorted((tmp_path / "headless").glob("*.safetensors"))[-1]
    save_file({key: t for key, t in load_file(last).items() if not key.startswith("v_head")}, last, metadata={"format": "pt"})
    with pytest.raises(runtime.InputError, match="headless.*v_head.1.weight"):
        load_discriminator(str(tmp_path / "headless"))
    with pytest.raises(runtime.InputError, match="Qwen3-VL-MoE"):
        load_discriminator(tiny.base, "learned")


def test_one_head_reads_both_segments_of_the_learned_variant(tiny):
    """Scores equal those of the stock Qwen3-VL-MoE on whole sequences: prompt + segment, the head on the last token."""
    disc, (captions, traces) = load_discriminator(tiny.released), pairs_of(tiny, [0, 0])
    stock = Qwen3VLMoeForConditionalGeneration.from_pretrained(tiny.released, dtype=torch.float32).model
    for found, segments in zip(disc.scores([tiny.prompts[1]], captions, traces), (captions, traces)):
        for score, (_, ids) in zip(found, segments):
            last = stock(**stock_inputs(tiny.prompts[1], ids, stock.config)).last_hidden_state[0, -1]
            assert abs(score - disc.heads["perception"].weight[0] @ last) <= 1e-5


def test_the_load_balancing_loss(tiny):
    """E * sum_e (share of choices of e) * (mean probability of e), over the tokens of all layers together, in float64."""
    disc = load_discriminator(tiny.released)
    gates, logits = [layer.mlp.gate for layer in disc.backbone.language_model.layers], []
    hooks = [gate.register_forward_hook(lambda module, inputs, output: logits.append(output[0])) for gate in gates]
    disc.scores([tiny.prompts[1]], *pairs_of(tiny, [0, 0]))
    p = torch.cat(logits).double().softmax(-1)
    chosen = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0)
    expected = 4 * sum(chosen[:, e].mean() * p[:, e].mean() for e in range(4))
    assert len(hooks) == 2 and len(logits) == 2
    found, weight = disc.balance(), disc.backbone.config.text_config.router_aux_loss_coef
    assert found.item() == pytest.approx(weight * expected.item(), rel=1e-5) and weight > 0
    found.backward()
    assert all(gate.weight.grad.any() for gate in gates)


def rows_with_broken_ones(tiny):
    rows = [dict(row, images=[str(tiny.folder / path) for path in row["images"]]) for row in tiny.rows["align"]]
    rows[2]["response"] = "no blocks"
    rows[5]["prompt"] = [{"role": "user", "content": "far " * 200 + "<image>" * len(rows[5]["images"])}]
    return rows


def test_scoring_a_data_set(tiny, tmp_path, capsys):
    disc, rows = trained(tiny), rows_with_broken_ones(tiny)
    save_discriminator(disc, str(tmp_path / "disc"), ONE, tiny.base)
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    found = []
    for i, max_tokens in enumerate((10**6, 200)):
        flags = ["--max-tokens", max_tokens, "--max-prompt", 150, "--alpha", 0.3, "--out", tmp_path / str(i)]
        assert stage("discriminator", "--score", data, "--ckpt", tmp_path / "disc", *flags) == 0
        found.append(read_jsonl(tmp_path / str(i) / "scores.jsonl"))
    assert f"{len(rows) - 2} of {len(rows)} responses scored" in capsys.readouterr().out
    examples = load_examples(data)
    for i, (example, whole, split) in enumerate(zip(examples, *found, strict=True)):
        assert whole["id"] == split["id"] == example.id
        if i in (2, 5):
            assert [whole[key] for key in ("perception", "reasoning", "combined")] == [None] * 3
            continue
        prompt = encode_prompt(example, tiny.tokenizer, tiny.image_processor)
        segments = rollout.split_segments(encode_response(example.response, tiny.tokenizer), tiny.tokenizer)
        d_v, d_r = (score.item() for score in disc.scores([prompt], *([(0, part)] for part in segments)))
        expected = {"perception": d_v, "reasoning": d_r, "combined": 0.3 * d_v + 0.7 * d_r}
        for key, value in expected.items():
            assert whole[key] == pytest.approx(value, abs=1e-5) and split[key] == pytest.approx(value, abs=1e-5)


def test_nothing_to_score_is_an_error(tiny, tmp_path, capsys):
    save_discriminator(trained(tiny), str(tmp_path / "disc"), ONE, tiny.base)
    rows = [{"prompt": [{"role": "user", "content": "x"}], "response": "no blocks"}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert stage("discriminator", "--score", data, "--ckpt", tmp_path / "disc", "--out", tmp_path / "out") == 2
    assert "no response can be scored" in capsys.readouterr().err and not (tmp_path / "out").exists()
