"""Run: pytest tests/test_discriminator.py

Experts, rows, Bradley-Terry loss, variants, checkpoints, warm-up, scoring, the copy; CPU only."""

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ONE,
    ROOT,
    assert_same_grads,
    grads,
    ids_of,
    read_jsonl,
    run_stage,
    short,
    stage,
    stock_inputs,
    untimed,
    write_jsonl,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeForConditionalGeneration, Qwen3VLModel, Qwen3VLMoeModel

import discriminator
import rollout
import runtime
from data import encode_prompt, encode_response, load_examples
from discriminator import (
    HEADS,
    MIXTURES,
    Discriminator,
    Pairs,
    add_mismatched,
    bradley_terry,
    expert_metrics,
    load_discriminator,
    mix,
    save_discriminator,
    score_and_backward,
    visible_prompt,
    wilson,
)
from flags import READOUTS, VARIANTS, InputError
from rollout import split_segments
from rows import Prompt, pack_rows, set_attention

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
    """What an MLP of the discriminator means for a single segment: the prompt goes through the
    shared copy, the rest through one expert."""

    def __init__(self, mlp, expert, cut):
        super().__init__()
        self.shared, self.expert, self.cut = mlp.shared, getattr(mlp, expert), cut

    def forward(self, hidden):
        prompt, segment = hidden[:, : self.cut], hidden[:, self.cut :]
        return torch.cat([self.shared(prompt), self.expert(segment)], dim=1)


def alone(disc, prompt, ids, expert):
    """Score of one segment as a sequence of its own: plain causal attention, positions worked out
    by transformers. The head reads the last token, or token by token the mean."""
    layers, backbone = disc.backbone.language_model.layers, disc.backbone
    before = [layer.mlp for layer in layers]
    for layer, mlp in zip(layers, before):
        layer.mlp = Routed(mlp, expert, len(prompt.input_ids))
    backbone.set_attn_implementation("sdpa")
    inputs = stock_inputs(prompt, ids, backbone.config)
    hidden = backbone(**inputs, use_cache=False).last_hidden_state[0, -len(ids) :]
    set_attention(backbone, "sdpa")
    for layer, mlp in zip(layers, before):
        layer.mlp = mlp
    if disc.readout == "last":
        return disc.heads[expert](hidden[-1])[0]
    return sum(disc.heads[expert](token)[0] for token in hidden) / len(ids)


def pairs_of(tiny, places, seed=0):
    """Captions and traces [(index into prompts, ids)] of random lengths."""
    rng = np.random.default_rng(seed)
    return [list(zip(places, ids_of(rng, tiny, *rng.integers(2, 9, len(places))))) for _ in "vr"]


# ------------------------------------------------------------------------------------------- rows
PLACES = [([0], [0, 0, 0]), ([1], [0, 0]), ([3], [0, 0]), ([1, 0, 3, 0], [0, 2, 1, 0, 3, 2])]


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("counts, places", PLACES)
def test_a_row_equals_separate_sequences(tiny, counts, places, readout):
    disc, prompts = trained(tiny), [tiny.prompts[c] for c in counts]
    disc.readout = readout
    segments = pairs_of(tiny, places)
    weights = torch.randn(2, len(places), generator=torch.Generator().manual_seed(1))
    weights /= len(places)
    scores = torch.stack(disc.scores(prompts, *segments))
    assert scores.dtype == torch.float32 and scores.std() > 0.1
    (weights * scores).sum().backward()
    row = grads(disc)
    disc.zero_grad()
    expected = []
    for part, expert in zip(segments, EXPERT):
        expected.append(torch.stack([alone(disc, prompts[p], ids, expert) for p, ids in part]))
    expected = torch.stack(expected)
    assert (scores - expected).abs().max() <= 1e-5
    (weights * expected).sum().backward()
    assert_same_grads(row, grads(disc))


def test_a_shared_segment_is_one_branch(tiny, monkeypatch):
    """Responses that share a caption or a trace: each one's own scores, in a pack without twins."""
    disc, packs, (first, second) = trained(tiny), [], ([30, 31, 2], [32, 33, 34, 2])
    captions = [(0, first), (0, second), (0, first), (1, first)]
    traces = [(0, second), (0, second), (0, first), (1, second)]
    prompts = [tiny.prompts[1], tiny.prompts[0]]
    expected = []
    for (p, caption), (_, trace) in zip(captions, traces):
        expected.append(torch.stack(disc.scores([prompts[p]], [(0, caption)], [(0, trace)])))
    keep = lambda *args: packs.append(pack_rows(*args)) or packs[-1]  # noqa: E731
    monkeypatch.setattr(discriminator, "pack_rows", keep)
    found = torch.stack(disc.scores(prompts, captions, traces))
    assert (found - torch.cat(expected, 1)).abs().max() < 1e-5
    assert packs[0].lengths == [3, 4, 3, 4, 3, 4]  # three captions, three traces


@pytest.mark.parametrize("variant", VARIANTS[:3])  # torch's grouped matmul knows no float64
def test_the_mean_over_a_segment_equals_float64(tiny, variant):
    """Of the dense variant over the whole response, without the caption's EOS."""
    disc, exact = trained(tiny, variant), trained(tiny, variant).double()
    disc.readout, (captions, traces) = "mean", pairs_of(tiny, [0, 1, 1, 0])
    prompts = [visible_prompt(tiny.prompts[c], tiny.tokenizer, variant) for c in (3, 1)]
    scores = torch.stack(disc.scores(prompts, captions, traces))
    exact.backbone.set_attn_implementation("sdpa")
    for i, ((p, caption), (_, trace)) in enumerate(zip(captions, traces)):
        for k, expert in enumerate(EXPERT):
            ids = caption[:-1] + trace if variant == "dense" else (caption, trace)[k]
            sizes = [len(prompts[p].input_ids), (1 - k) * len(ids), k * len(ids)]
            inputs = stock_inputs(prompts[p], ids, exact.backbone.config)
            hidden = exact.backbone(**inputs, segment_sizes=sizes).last_hidden_state[0]
            head = exact.heads[expert if len(exact.heads) == 2 else "perception"].weight[0]
            tokens = [(head @ token).item() for token in hidden[-len(ids) :]]
            assert scores[k, i].item() == pytest.approx(sum(tokens) / len(ids), abs=1e-5)


def test_at_the_start_both_experts_equal_the_dense_model(tiny):
    prompt, (captions, traces) = tiny.prompts[3], pairs_of(tiny, [0, 0, 0])
    backbone = tiny.stock.model
    size = backbone.config.text_config.hidden_size
    head = torch.randn(1, size, generator=torch.Generator().manual_seed(0))

    def dense(ids):
        with torch.no_grad():
            inputs = stock_inputs(prompt, ids, tiny.stock.config)
            return (backbone(**inputs).last_hidden_state[0, -1] @ head[0]).item()

    whole = [dense(c[:-1] + t) for (_, c), (_, t) in zip(captions, traces)]
    expected = {
        "moe": [[dense(ids) for _, ids in captions], [dense(ids) for _, ids in traces]],
        "dense": [whole, whole],  # one score for the whole response
    }
    for variant, numbers in expected.items():
        disc = load_discriminator(tiny.base, variant)
        scores = disc.scores([prompt], captions, traces)
        assert all(score.abs().max() == 0 for score in scores)  # heads start at zero
        with torch.no_grad():
            for linear in disc.heads.values():
                linear.weight.copy_(head)
        got = torch.stack(disc.scores([prompt], captions, traces)).detach()
        assert (got - torch.tensor(numbers)).abs().max() <= 1e-5
        assert len(disc.heads) == (1 if variant == "dense" else 2)


@pytest.mark.parametrize("expert", EXPERT)
def test_the_loss_of_one_expert_never_touches_the_other(tiny, expert):
    disc = trained(tiny)
    both = disc.scores([tiny.prompts[1], tiny.prompts[0]], *pairs_of(tiny, [0, 0, 1, 1]))
    scores = dict(zip(EXPERT, both))[expert]
    bradley_terry(scores[::2], scores[1::2], torch.ones(2, dtype=torch.bool)).backward()
    own, others = [], []
    for name, p in disc.named_parameters():
        part = name.split(".")
        if EXPERT[expert] in part:
            others.append(p.grad is None or not p.grad.any())
        elif expert in part or "shared" in part and "0" in part:  # the last layer's is not read
            own.append(p.grad is not None and bool(p.grad.any()))
    assert len(others) == 3 * 2 + 1 and all(others)  # three matrices in each layer, and the head
    assert len(own) == 3 * 2 + 1 + 3 and all(own)


@pytest.mark.parametrize("variant", ["moe", "learned"])
def test_another_forward_before_the_backward_does_no_harm(tiny, variant):
    """Backward recomputes activations. The sizes of a pack's slices were once one list that every
    forward overwrote, so it recomputed with those of the last forward: here as many tokens, cut
    otherwise, which nothing would have noticed; and a router's logits were kept twice."""
    rng, prompts = np.random.default_rng(0), [tiny.prompts[1]]
    one, other = ([[(0, ids)] for ids in ids_of(rng, tiny, *n)] for n in ((3, 9), (9, 3)))
    gradients = {}
    for checkpointing in (False, True):
        disc = runtime.shard(
            trained(tiny, variant), [], ONE, Discriminator.scores, checkpointing=checkpointing
        )
        d_v, d_r = disc.scores(prompts, *one)
        balance = disc.balance()
        if checkpointing:
            disc.scores(prompts, *other)
        (d_v.sum() + 2 * d_r.sum() + balance).backward()
        assert len(disc.routed) == (2 if variant == "learned" else 0)
        gradients[checkpointing] = grads(disc)
    assert_same_grads(gradients[True], gradients[False], 1e-6)


# --------------------------------------------------------------------------------------- variants
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_text_only_variant_is_blind(tiny, variant):
    disc, prompt, segments = trained(tiny, variant), tiny.prompts[1], pairs_of(tiny, [0, 0])
    grid = prompt.image_grid_thw
    other = Prompt(prompt.input_ids, prompt.position_ids, -prompt.pixel_values, grid)
    visible = [visible_prompt(p, tiny.tokenizer, variant) for p in (prompt, other)]
    here, there = (torch.stack(disc.scores([p], *segments)) for p in visible)
    assert torch.equal(here, there) == (variant == "text-only")
    seen = visible_prompt(prompt, tiny.tokenizer, "text-only")
    before, after = (tiny.tokenizer.decode(p.input_ids).count("<|") for p in (prompt, seen))
    assert after == before - 11
    assert seen.pixel_values is None
    assert seen.position_ids.tolist() == [list(range(len(seen.input_ids)))] * 3


# ------------------------------------------------------------------------------------------- loss
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
    cuts, whole = (slice(0, 9), slice(9, 30), slice(30, 40)), valid.sum()
    parts = [bradley_terry(t[cut], s[cut], torch.tensor(valid[cut]), whole) for cut in cuts]
    assert sum(parts).item() == pytest.approx(expected, rel=1e-5)  # they add up


def text_of(caption, think, answer):
    caption = f"<caption>\n{caption}\n</caption>"
    return f"{caption}\n<think>\n{think}\n</think>\n<answer>{answer}</answer>"


def test_mixtures_exchange_words_in_their_places():
    """Of the caption alone: word by word where two lines have as many words, else line by line; of
    free text sentences. What the other has no place for stays."""
    lines = ["1 red cross\n", "2 lime circle\n", "It is 3.5 m. ", "So be it\n", "3 blue square"]
    new_lines = ["1 blue cross\n", "2 one lime cross\n", "That was. ", "But\n"]
    mine = text_of("".join(lines), "3 blue", "no")
    other = text_of("".join(new_lines).rstrip(), "4 red", "yes")
    assert mix(mine, other, 0.0, random.Random(0)) == mine
    whole = mix(mine, other, 1.0, random.Random(0))
    assert whole == text_of("".join([*new_lines, "3 blue square"]), "3 blue", "no")
    exchanged = np.zeros(4)
    for seed in range(300):
        text = mix(mine, other, 0.3, random.Random(seed))
        assert text.endswith(mine[mine.index("3 blue square") :])
        for i, (new, old) in enumerate(zip(new_lines, lines)):
            assert (new in text) != (old in text), text
            exchanged[i] += new in text
    assert (abs(exchanged / 300 - 0.3) < 0.12).all()
    mine = text_of("A red cross.\nIt is big.", "", "")
    other = text_of("A blue dot. He was old.", "", "")
    mixed = text_of("A blue dot.\nHe was old.", "", "")  # what stands between words stays
    assert mix(mine, other, 1.0, random.Random(0)) == mixed


def test_without_a_valid_pair_the_loss_is_zero():
    t = torch.tensor([3.0, 1e9], requires_grad=True)
    s = torch.tensor([-3.0, -torch.inf], requires_grad=True)
    loss = bradley_terry(t, s, torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not t.grad.any() and not s.grad.any()


def test_whose_response_is_mismatched(tiny):
    """The next one's that has another picture, in a cycle; place 3 has none. A prompt that is a row
    on two ranks counts on the first. All ranks together are one, in whatever order they are."""
    rng = np.random.default_rng(0)
    texts = {place: short(rng, f"answer {place}") for place in (0, 1, 2, 3, 4, 7)}
    ids = {}
    for place, text in texts.items():
        ids[place] = split_segments(encode_response(text, tiny.tokenizer), tiny.tokenizer)
    pictures = {0: 1.0, 1: 1.0, 2: 2.0, 3: None, 4: 3.0, 7: 1.0}

    def rows(*places):
        made = {}
        for place in places:
            color = pictures[place]
            picture = None if color is None else torch.full((2, 3), color)
            made[place] = Pairs(None, None, [], picture=picture, text=texts[place])
        return made

    expected = {0: 2, 1: 2, 2: 4, 3: None, 4: 7, 7: 2}
    for split in ([(0, 1, 2, 3, 4, 7)], [(0, 1, 2), (2, 3, 4, 7)], [(4, 7), (), (0, 1, 2, 3)]):
        found, offered = [], []
        for rank, places in enumerate(split):  # what each rank hands in
            keep = lambda mine: offered.append(mine) or [mine]  # noqa: E731
            add_mismatched(rows(*places), SimpleNamespace(rank=rank, gather=keep), tiny.tokenizer)
        for rank, places in enumerate(split):
            part = rows(*places)
            world = SimpleNamespace(rank=rank, gather=lambda mine: offered)
            add_mismatched(part, world, tiny.tokenizer, chain=True)
            for place, row in part.items():
                if row.mismatched:
                    found.append((place, row.mismatched[-1]))
                    assert len(row.mismatched) == len(MIXTURES) + 1
                    assert all(trace == ids[place][1] for _, trace in row.mismatched[:-1])
        pairs = [(place, ids[other]) for place, other in expected.items() if other]
        assert sorted(found) == pairs
    same = rows(0, 1, 7)
    add_mismatched(same, ONE, tiny.tokenizer)
    assert not any(row.mismatched for row in same.values())


def test_ground_is_the_share_ranked_rightly():
    """Columns: the other's D_v, D_r, the teacher's; a tie up to rounding is one half."""
    mismatched = torch.tensor([[1, 2, 3, 2.000001], [1, 0, 0, 5], [0, 0, 1, 1], [1, 2, 1, 0]])
    expected = {"ground_v": (1 + 0 + 1 + 0.5) / 4, "ground_r": (0.5 + 1 + 1 + 0) / 4}
    assert expert_metrics(torch.full((2, 4), torch.nan), mismatched) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rank_without_pairs_takes_part_and_learns_nothing(tiny, variant):
    """The other rank has two packs: so many forwards, each with a backward that is exactly zero in
    every weight that a rank with pairs reaches."""
    disc = trained(tiny, variant)
    args = argparse.Namespace(max_tokens=100, score_l2=0.1, mismatch=0.0)
    forwards = []
    disc.backbone.register_forward_hook(lambda *_: forwards.append(1))
    torch.stack(disc.scores([tiny.prompts[1]], *pairs_of(tiny, [0, 0]))).sum().backward()
    reached = set(grads(disc))
    disc.zero_grad()
    forwards.clear()
    two_ranks = SimpleNamespace(
        size=2, gather=lambda packs: [packs, 2], sum=lambda *counts: [3.0, 0.0]
    )
    scores, _ = score_and_backward(disc, [], args, two_ranks)
    assert scores.shape == (0, 4) and len(forwards) == 2
    assert set(grads(disc)) == reached and not any(g.any() for g in grads(disc).values())


# ----------------------------------------------------------------------------------- checkpoints
def test_the_flag_takes_the_variants_that_the_model_has():
    assert VARIANTS == (*HEADS,)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("readout", READOUTS)
def test_saved_discriminator_scores_the_same(tiny, tmp_path, variant, readout):
    disc, segments = trained(tiny, variant), pairs_of(tiny, [0, 1, 1])
    disc.readout = readout
    save_discriminator(disc, str(tmp_path / "disc"), ONE, tiny.base)
    again = load_discriminator(str(tmp_path / "disc"), variant)
    prompts = [visible_prompt(tiny.prompts[c], tiny.tokenizer, variant) for c in (1, 0)]
    before, after = (torch.stack(d.scores(prompts, *segments)) for d in (disc, again))
    assert torch.equal(before, after)
    assert load_discriminator(str(tmp_path / "disc"), None).variant == variant
    other = READOUTS[1 - READOUTS.index(readout)]
    assert load_discriminator(str(tmp_path / "disc"), variant, readout=readout).readout == readout
    with pytest.raises(InputError, match=f"trained with --readout {readout}, not {other}"):
        load_discriminator(str(tmp_path / "disc"), variant, readout=other)
    settings = tmp_path / "disc" / "discriminator.json"
    settings.write_text(json.dumps({"variant": variant}))  # of before there was a choice
    assert load_discriminator(str(tmp_path / "disc"), variant).readout == "last"
    fits = {variant, "moe"} if variant == "learned" else {variant}  # moe is only the default there
    for other in set(VARIANTS) - fits:
        with pytest.raises(InputError, match=f"trained as {variant}"):
            load_discriminator(str(tmp_path / "disc"), other)


def test_the_released_layout_is_read_as_it_is(tiny, tmp_path):
    """Shards with the experts as (E, hidden, 2 inter) and the head among them; without the head, or
    with one of another size, which would be spread over all hidden units, it is an error."""
    disk = {}
    for file in Path(tiny.released).glob("*.safetensors"):
        disk |= load_file(file)
    disc = load_discriminator(tiny.released)
    assert disc.variant == "learned" and list(disc.heads) == ["perception"]
    assert torch.equal(disc.heads["perception"].weight, disk["v_head.1.weight"])
    experts = disc.backbone.language_model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        stored = disk[f"model.language_model.layers.1.mlp.experts.{name}"]
        loaded = getattr(experts, name)
        assert stored.shape[1:] == loaded.shape[:0:-1] and torch.equal(loaded, stored.mT)
    shutil.copytree(tiny.released, tmp_path / "headless")
    last = sorted((tmp_path / "headless").glob("*.safetensors"))[-1]
    weights = load_file(last)
    for head in ({}, {"v_head.1.weight": torch.ones(1, 1)}):
        rest = {key: t for key, t in weights.items() if not key.startswith("v_head")}
        save_file(rest | head, last, metadata={"format": "pt"})
        with pytest.raises(InputError, match="headless.*v_head.1.weight"):
            load_discriminator(str(tmp_path / "headless"))
    with pytest.raises(InputError, match="Qwen3-VL-MoE"):
        load_discriminator(tiny.base, "learned")
    with pytest.raises(InputError, match="trained as learned"):
        load_discriminator(tiny.released, "dense")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_discriminator_has_the_weights_that_transformers_reads(tiny, tmp_path, variant):
    """Each copy of an MLP those of the one, and frequencies of rotary embeddings, which are not
    stored. Nothing is initialised at random, also where a stored one is loaded."""
    kind, path = Qwen3VLModel, tiny.base
    if variant == "learned":
        kind, path = Qwen3VLMoeModel, tiny.released
    stock, state = kind.from_pretrained(path, dtype=torch.float32), torch.get_rng_state()
    disc = load_discriminator(path, variant)
    save_discriminator(disc, str(tmp_path / "disc"), ONE, tiny.base)
    for found in (disc, load_discriminator(str(tmp_path / "disc"), variant)):
        for name, weight in found.backbone.named_parameters():
            name = re.sub(r"\.mlp\.(shared|perception|reasoning)\.", ".mlp.", name)
            assert torch.equal(weight, stock.get_parameter(name)), name
        for mine, theirs in zip(found.backbone.buffers(), stock.buffers(), strict=True):
            assert torch.equal(mine, theirs)
        heads = torch.cat([head.weight for head in found.heads.values()])
        assert heads.dtype == torch.float32 and heads.any() == (variant == "learned")
        mine, theirs = (m.config._experts_implementation for m in (found.backbone, stock))
        assert mine == theirs
    assert torch.equal(torch.get_rng_state(), state)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


HEAD = "heads.reasoning.weight"
MATRIX = "backbone.language_model.layers.1.mlp.shared.up_proj.weight"
BROKEN = {  # what is done to a stored discriminator: words of the line
    "settings are no JSON": (lambda f: (f / "discriminator.json").write_text("{"), "Expecting"),
    "settings are a list": (lambda f: (f / "discriminator.json").write_text("[]"), "variant"),
    "no variant": (lambda f: (f / "discriminator.json").write_text("{}"), "variant .*moe"),
    "unknown variant": (
        lambda f: (f / "discriminator.json").write_text('{"variant": ["x"]}'),
        "variant .*moe",
    ),
    "unknown readout": (
        lambda f: (f / "discriminator.json").write_text('{"variant": "moe", "readout": "max"}'),
        "readout .*mean",
    ),
    "another variant's weights": (
        lambda f: (f / "discriminator.json").write_text('{"variant": "dense"}'),
        "backbone.language_model.layers.0.mlp",
    ),
    "a variant without its backbone": (
        lambda f: (f / "discriminator.json").write_text('{"variant": "learned"}'),
        "Qwen3-VL-MoE",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "another model": (lambda f: change_config(f, model_type="qwen2_vl"), "qwen2_vl"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "weights in another file": (
        lambda f: (f / "model.safetensors").rename(f / "other.safetensors"),
        "model.safetensors",
    ),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 5000), "incomplete"),
    "no head": (lambda f: change_weights(f, lambda w: w.pop(HEAD)), HEAD),
    "no matrix": (lambda f: change_weights(f, lambda w: w.pop(MATRIX)), MATRIX),
    "a weight too many": (
        lambda f: change_weights(f, lambda w: w.update({"heads.style.weight": w[HEAD].clone()})),
        "heads.style.weight",
    ),
    "a head of another size": (
        lambda f: change_weights(f, lambda w: w.update({HEAD: torch.ones(1, 1)})),
        HEAD,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line(tiny, tmp_path, capsys, name):
    breaks, words = BROKEN[name]
    save_discriminator(load_discriminator(tiny.base), str(tmp_path / "disc"), ONE, tiny.base)
    breaks(tmp_path / "disc")
    with pytest.raises(InputError, match=f"(?s)disc.*{words}") as error:
        load_discriminator(str(tmp_path / "disc"), None)
    assert "\n" not in str(error.value)
    flags = ["--ckpt", tmp_path / "disc", "--out", tmp_path / "out"]
    assert stage("discriminator", "--score", tiny.align, *flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in line and str(tmp_path / "disc") in line and not (tmp_path / "out").exists()


def test_one_head_reads_both_segments_of_the_learned_variant(tiny):
    """Scores equal those of the stock Qwen3-VL-MoE on whole sequences: prompt + segment, the head
    on the last token."""
    disc, segments = load_discriminator(tiny.released), pairs_of(tiny, [0, 0])
    load = Qwen3VLMoeForConditionalGeneration.from_pretrained
    stock, head = load(tiny.released, dtype=torch.float32).model, disc.heads["perception"].weight[0]
    for found, part in zip(disc.scores([tiny.prompts[1]], *segments), segments):
        for score, (_, ids) in zip(found, part):
            inputs = stock_inputs(tiny.prompts[1], ids, stock.config)
            last = stock(**inputs).last_hidden_state[0, -1]
            assert abs(score - head @ last) <= 1e-5


def test_the_load_balancing_loss(tiny):
    """E * sum_e (share of choices of e) * (mean probability of e), over the tokens of all layers
    together, in float64."""
    disc = load_discriminator(tiny.released)
    gates, logits = [layer.mlp.gate for layer in disc.backbone.language_model.layers], []
    keep = lambda module, inputs, output: logits.append(output[0])  # noqa: E731
    hooks = [gate.register_forward_hook(keep) for gate in gates]
    disc.scores([tiny.prompts[1]], *pairs_of(tiny, [0, 0]))
    p = torch.cat(logits).double().softmax(-1)
    chosen = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0)
    expected = 4 * sum(chosen[:, e].mean() * p[:, e].mean() for e in range(4))
    assert len(hooks) == 2 and len(logits) == 2
    found, weight = disc.balance(), disc.backbone.config.text_config.router_aux_loss_coef
    assert weight > 0 and found.item() == pytest.approx(weight * expected.item(), rel=1e-5)
    found.backward()
    assert all(gate.weight.grad.any() for gate in gates)


# ---------------------------------------------------------------------------- warm-up and scoring
def write_pairs(path, count):
    """Warm-up pairs whose teacher always says another word than the student."""
    examples = []
    for i in range(count):
        example = {"question": f"How many in row {i % 3 + 1}?"}
        for who, word in (("teacher", "red"), ("student", "blue")):
            cot = "<think>\neven\n</think>\n<answer>\neven\n</answer>"
            example |= {f"{who}_caption": f"2 {word} square", f"{who}_cot": cot}
        examples.append(example)
    return write_jsonl(path, examples)


def test_warm_up_has_the_papers_settings(tiny, tmp_path):
    """One epoch of 128 pairs a step; the learning rate rises to 1e-5 in 10 % of the steps, then
    half a cosine."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20 * 4)
    flags = ["--pairs", pairs, "--ckpt", tiny.base]
    assert stage("discriminator", *flags, "--batch", 4, "--out", tmp_path / "out") == 0
    log = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    expected = [5e-6, 1e-5] + [5e-6 * (1 + math.cos(math.pi * i / 18)) for i in range(18)]
    assert [metrics["lr"] for metrics in log] == pytest.approx(expected)
    assert log[0]["loss_v"] == pytest.approx(math.log(2)) and log[-1]["loss_v"] < math.log(2)
    assert stage("discriminator", *flags, "--steps", 0, "--out", tmp_path / "none") == 0
    assert json.loads((tmp_path / "none" / "meta.json").read_text())["args"]["batch"] == 128


WRONG = [("--alpha", -0.1), ("--alpha", 1.1), ("--alpha", "nan"), ("--batch", 0), ("--batch", 1.5)]
WRONG += [("--steps", -1), ("--lr", -1e-9), ("--lr", "inf"), ("--warmup", 1.1), ("--score-l2", -1)]


@pytest.mark.parametrize("flag, value", WRONG)
def test_flags_out_of_range(tiny, tmp_path, capsys, flag, value):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    flags = ["--pairs", pairs, "--ckpt", tiny.base, "--out", tmp_path / "out", f"{flag}={value}"]
    assert stage("discriminator", *flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert flag in line and str(value) in line and not (tmp_path / "out").exists()


def examples_with_broken_ones(tiny):
    examples = []
    for example in tiny.examples["align"]:
        images = [str(tiny.folder / path) for path in example["images"]]
        examples.append(dict(example, images=images))
    examples[2]["response"] = "no blocks"
    text = "far " * 200 + "<image>" * len(examples[5]["images"])
    examples[5]["prompt"] = [{"role": "user", "content": text}]
    return examples


def test_scoring_a_data_set(tiny, tmp_path, capsys):
    disc, rows = trained(tiny), examples_with_broken_ones(tiny)
    save_discriminator(disc, str(tmp_path / "disc"), ONE, tiny.base)
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    found = []
    for i, max_tokens in enumerate((10**6, 200)):
        flags = ["--max-tokens", max_tokens, "--max-prompt", 150, "--alpha", 0.3]
        flags += ["--score", data, "--ckpt", tmp_path / "disc", "--out", tmp_path / str(i)]
        assert stage("discriminator", *flags) == 0
        found.append(read_jsonl(tmp_path / str(i) / "scores.jsonl"))
    assert f"{len(rows) - 2} of {len(rows)} responses scored" in capsys.readouterr().out
    examples = load_examples(data)
    for i, (example, whole, split) in enumerate(zip(examples, *found, strict=True)):
        assert whole["id"] == split["id"] == example.id
        if i in (2, 5):
            assert [whole[key] for key in ("perception", "reasoning", "combined")] == [None] * 3
            continue
        prompt = encode_prompt(example, tiny.tokenizer, tiny.image_processor)
        ids = encode_response(example.response, tiny.tokenizer)
        segments = rollout.split_segments(ids, tiny.tokenizer)
        captions, traces = ([(0, segment)] for segment in segments)
        d_v, d_r = (score.item() for score in disc.scores([prompt], captions, traces))
        expected = {"perception": d_v, "reasoning": d_r, "combined": 0.3 * d_v + 0.7 * d_r}
        for key, value in expected.items():
            assert whole[key] == pytest.approx(value, abs=1e-5)
            assert split[key] == pytest.approx(value, abs=1e-5)


def test_nothing_to_score_is_an_error(tiny, tmp_path, capsys):
    save_discriminator(trained(tiny), str(tmp_path / "disc"), ONE, tiny.base)
    examples = [{"prompt": [{"role": "user", "content": "x"}], "response": "no blocks"}]
    data = write_jsonl(tmp_path / "data.jsonl", examples)
    flags = ["--ckpt", tmp_path / "disc", "--out", tmp_path / "out"]
    assert stage("discriminator", "--score", data, *flags) == 2
    assert "no response can be scored" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- grounding
def write_pictures(folder, name, count):
    """Examples of a teacher whose caption names the colour of the picture, which nothing else
    tells; the trace is always the same."""
    colors = {"red": (220, 30, 30), "blue": (30, 60, 220)}
    rng, examples = np.random.default_rng(0), []
    for color, fill in colors.items():
        Image.new("RGB", (32, 32), fill).save(folder / f"{color}.png")
    for _ in range(count):
        color = str(rng.choice(list(colors)))
        response = f"<caption>\n1 {color} square\n</caption>\n<think>\neven\n</think>\n"
        response += "<answer>\neven\n</answer>"
        prompt = [{"role": "user", "content": "<image>How many?"}]
        example = {"prompt": prompt, "images": [str(folder / f"{color}.png")]}
        examples.append({**example, "response": response})
    return write_jsonl(folder / f"{name}.jsonl", examples)


def probe(tiny, folder, variant, readout):
    """Ground a discriminator on teacher responses alone and probe it -> results.json."""
    data = write_pictures(folder, "data", 48)
    rate = 1e-2 if readout == "mean" else 3e-3  # a single token bears less
    train = ["--pairs", data, "--ckpt", tiny.base, "--out", folder / variant, "--lr", rate]
    train += ["--disc-variant", variant, "--readout", readout, "--mismatch", 1, "--batch", 12]
    assert stage("discriminator", *train, "--steps", 60) == 0
    out = folder / f"probe {variant}"
    flags = ["--probe", data, "--ckpt", folder / variant, "--out", out, "--max-tokens", 150]
    assert stage("discriminator", *flags) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    "variant, readout",
    [("moe", "mean"), ("text-only", "mean"), pytest.param("moe", "last", marks=pytest.mark.slow)],
)
def test_grounding_on_teachers_alone(tiny, tmp_path, capsys, variant, readout):
    """An expert that sees learns which caption is right; without the picture there is nothing to
    learn, and the measure stays at chance: each caption is as often wrong as right."""
    results = probe(tiny, tmp_path, variant, readout)
    log = read_jsonl(tmp_path / variant / "metrics.jsonl")
    assert "acc_v" not in log[0] and log[0]["ground_v"] == 0.5  # the heads start at zero
    assert all(metrics["ground_r"] == 0.5 for metrics in log)  # the same trace
    assert results["ground_r"]["share"] == 0.5 and results["ground_v"]["pairs"] == 48
    share = results["ground_v"]["share"]
    assert share == 1 if variant == "moe" else abs(share - 0.5) < 0.2
    assert variant == "text-only" or log[-1]["ground_v"] == 1
    assert "ground_v" in capsys.readouterr().out
    lines = read_jsonl(tmp_path / f"probe {variant}" / "scores.jsonl")
    gaps = np.array([line["perception"] - line["other_perception"] for line in lines])
    ties = (abs(gaps) < 1e-5).mean()
    assert (gaps >= 1e-5).mean() + ties / 2 == pytest.approx(share)


@pytest.mark.slow
def test_grounding_on_two_processes_is_the_same(tiny, tmp_path):
    """The learning rate is low because the trace is always the same: its gradient is rounding, of
    which AdamW makes steps of full size."""
    data = write_pictures(tmp_path, "data", 21)
    flags = ["--pairs", data, "--ckpt", tiny.base, "--lr", 1e-6, "--mismatch", 0.5, "--batch", 6]
    assert stage("discriminator", *flags, "--out", tmp_path / "1") == 0
    flags += ["--out", tmp_path / "2", "--max-tokens", 100]
    run_stage("discriminator", flags, 2)
    one, two = (untimed(read_jsonl(tmp_path / n / "metrics.jsonl")) for n in ("1", "2"))
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
    shares = []
    for processes in (0, 2):
        out = tmp_path / f"probe {processes}"
        flags = ["--probe", data, "--ckpt", tmp_path / "1", "--out", out, "--seed", 3]
        run_stage("discriminator", flags, processes)
        shares.append(json.loads((out / "results.json").read_text())["ground_v"])
    assert shares[0] == shares[1] and shares[0]["pairs"] == 21


def test_wilson():
    """p between the two roots of (share - p)^2 = z^2 p (1 - p) / n."""
    for right, n in ((0, 10), (32.5, 64), (48, 48)):
        for p in wilson(right, n):
            assert (right / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)


def test_teachers_alone_need_mismatch(tiny, tmp_path, capsys):
    data = write_pictures(tmp_path, "data", 4)
    flags = ["--pairs", data, "--ckpt", tiny.base, "--out", tmp_path / "out"]
    for more, words in (([], "no well-formed student response"), (["--batch", 1], "--batch 1")):
        more += ["--mismatch", 0.5] if more else []
        assert stage("discriminator", *flags, *more) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- the copy
COPY = """
import math
import torch
from transformers import Qwen3VLConfig, Qwen3VLModel
from discriminator import Discriminator, Pairs, bradley_terry, pair_loss
from rows import Prompt, set_attention

rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
text |= {"rope_parameters": rope}
vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
vision |= {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
backbone = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=63))
disc = Discriminator(set_attention(backbone, "sdpa"))
for head in disc.heads.values():
    torch.nn.init.normal_(head.weight)
ids = torch.tensor([1, 2, 63, 3])  # one picture of one token
positions = torch.arange(4).expand(3, -1)
size = 3 * backbone.config.vision_config.temporal_patch_size * 16 * 16
picture = Prompt(ids, positions, torch.randn(4, size), torch.tensor([[1, 2, 2]]))
words = Prompt(ids[:2], positions[:, :2], None, None)
teacher, students = ([5, 6], [7, 6]), [([8, 9, 6], [10, 6]), ([11, 6], [12, 13, 6])]
rows = [Pairs(picture, teacher, students), Pairs(words, teacher, students[:1])]
loss, scores, _ = pair_loss(disc, rows, (3, 0), 0.0)
loss.backward()
expected = sum(math.log1p(math.exp(s[k] - s[k + 2])) / 3 for s in scores.tolist() for k in (0, 1))
assert abs(loss.item() - expected) < 1e-4, (loss, expected)
valid = torch.ones(3, dtype=torch.bool)
assert abs(sum(bradley_terry(scores[:, k + 2], scores[:, k], valid) for k in (0, 1)) - loss) < 1e-6
assert all(p.grad is not None for head in disc.heads.values() for p in head.parameters())
"""


def test_the_model_can_be_copied_with_rows_alone(tmp_path):
    """As a script the copy says what is missing."""
    for name in ("discriminator.py", "rows.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "copy_of_the_model.py").write_text(COPY)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = {}
    for script in ("copy_of_the_model.py", "discriminator.py"):
        found[script] = subprocess.run(
            [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert found["copy_of_the_model.py"].returncode == 0, found["copy_of_the_model.py"].stderr
    assert "No module named 'flags'" in found["discriminator.py"].stderr
