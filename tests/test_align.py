"""Run: pytest tests/test_align.py   (advantages, the discriminator's step, the game's loop; CPU)"""

import argparse
import json
import math
import random
import shutil
import sys
import zlib
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ONE, assert_same_grads, grads, read_jsonl, run_stage, short, stage, untimed
from conftest import write_jsonl
from safetensors.torch import load_file

from data import Example, encode_response
import align
import rl
import rollout
import runtime
from discriminator import MIXTURES, load_discriminator, mix, visible_prompt
from flags import VARIANTS

# --------------------------------------------------------------------------------------- advantages


def zscore(values, floor):
    """Of the valid members of one group, in float64."""
    if len(values) < 2 or max(values) == min(values):
        return [0.0] * len(values)
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [(v - mean) / max(std, floor) for v in values]


def expected_advantages(d_v, d_r, valid, alpha, normalize, floor, penalty, clip):
    out = np.zeros(d_v.shape)
    for b in range(len(d_v)):
        members = [i for i in range(d_v.shape[1]) if valid[b, i]]
        v = [min(max(d_v[b, i], -clip), clip) for i in members]
        r = [min(max(d_r[b, i], -clip), clip) for i in members]
        if normalize == "per-expert":
            z_v, z_r = zscore(v, floor), zscore(r, floor)
            z = [alpha * a + (1 - alpha) * b for a, b in zip(z_v, z_r)]
        else:
            z = zscore([alpha * a + (1 - alpha) * b for a, b in zip(v, r)], floor)
        for i in range(d_v.shape[1]):
            if i in members:
                out[b, i] = z[members.index(i)]
            elif members:
                out[b, i] = -penalty
    return out


@pytest.mark.parametrize("normalize", ["per-expert", "combined"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_advantages_equal_float64(normalize, alpha):
    rng = np.random.default_rng(0)
    d_v, d_r = rng.normal(0, 6, (2, 12, 7))
    d_v[0], d_r[0] = 2.0, 0.1 + 0.2  # equal scores
    d_v[1] = 2.0  # equal for one expert only
    d_v[2], d_r[2] = 3 + 0.01 * rng.normal(size=(2, 7))  # under the floor
    d_v[3], d_r[3] = rng.choice([-40, 11, 25, 3], (2, 7))  # beyond the clip
    valid = rng.random((12, 7)) < 0.7
    valid[:4] = True
    valid[4], valid[5] = False, np.arange(7) == 2  # none; one
    settings = {"alpha": alpha, "normalize": normalize, "floor": 0.1, "penalty": 1.5, "clip": 10.0}
    expected = expected_advantages(d_v, d_r, valid, **settings)
    tensors = [torch.tensor(x).float() for x in (d_v, d_r)]
    # the defaults are these settings
    got = align.alignment_advantages(*tensors, torch.tensor(valid), alpha, normalize)
    assert np.abs(got.numpy() - expected).max() < 1e-4
    assert not got[0].any() and not got[4].any()
    assert got[5].tolist() == [0.0 if i == 2 else -1.5 for i in range(7)]
    # what an invalid rollout scores is nobody's business: not its group's, not its own
    for b, i in [(2, 0), (3, 1)]:
        broken, mask = tensors[0].clone(), torch.tensor(valid)
        broken[b, i], mask[b, i] = torch.nan, False
        again = align.alignment_advantages(broken, tensors[1], mask, alpha, normalize)
        expected = expected_advantages(d_v, d_r, mask.numpy(), **settings)
        assert np.abs(again.numpy() - expected).max() < 1e-4


def test_equal_scores_give_exactly_nothing():
    """In float32 the mean of seven times 0.1 is not 0.1."""
    for value in (0.1, 0.1 + 0.2, 1 / 3, 9.7):
        for n in range(1, 17):
            scores, valid = torch.full((1, n), value), torch.ones(1, n, dtype=torch.bool)
            assert not align.alignment_advantages(scores, scores, valid, floor=1e-12).any()


# -------------------------------------------------------------------------------- the discriminator
# three groups of three
RESPONSES = ["good", "good", "cut", "broken", "good", "good", "good", "broken", "broken"]


def make_game(tiny, responses=RESPONSES, counts=(1, 0, 3)):
    """Records of three groups of three, each with its teacher, cut into segments."""
    rng, records = np.random.default_rng(0), []
    for i, kind in enumerate(responses):
        ids = encode_response(short(rng, "odd"), tiny.tokenizer)
        if kind == "broken":
            del ids[0]
        drawn = rollout.Rollout(ids, [], kind != "cut")
        records.append(rl.Record(i // 3, i, None, tiny.prompts[counts[i // 3]], drawn, ""))
    teachers = [Example(str(group), [], response=short(rng, "odd")) for group in range(3)]
    for record in records:
        record.example = teachers[record.group]
    align.cut_segments(records, tiny.tokenizer)
    return records


def with_heads(tiny, variant="moe"):
    disc = load_discriminator(tiny.released if variant == "learned" else tiny.base, variant)
    # of the learned variant: depends on the packing
    disc.backbone.config.text_config.router_aux_loss_coef = 0.0
    for i, head in enumerate(disc.heads.values()):
        torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(i))
    return disc


def learn(tiny, disc, records, max_tokens=10**6, mismatch=0.0, step=0):
    """-> scores [9, 4] of the records, NaN where invalid, [m, 4] of mismatched teachers, and the
    gradient that scoring leaves."""
    args = argparse.Namespace(max_tokens=max_tokens, score_l2=0.01, mismatch=mismatch)
    args.log_rollouts = 2
    disc.zero_grad()
    found = align.score_records(disc, records, tiny.tokenizer, args, ONE, step)
    return *found, grads(disc)


def test_cut_and_broken_rollouts_are_invalid(tiny):
    records = make_game(tiny)
    assert [r.segments is not None for r in records] == [kind == "good" for kind in RESPONSES]
    assert all(part[-1] == tiny.eos for r in records if r.segments for part in r.segments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_and_gradient_equal_one_pair_at_a_time(tiny, variant):
    """Whatever --max-tokens, which splits groups and then repeats prompt and teacher."""
    disc, records = with_heads(tiny, variant), make_game(tiny)
    prompts = [visible_prompt(r.prompt, tiny.tokenizer, variant) for r in records]
    expected, loss, count = torch.full((9, 4), torch.nan), 0.0, 5
    for i, record in enumerate(records):
        if record.segments is not None:
            student, teacher = (torch.cat(disc.scores([prompts[i]], [(0, caption)], [(0, trace)]))
                                for caption, trace in (record.segments, record.teacher))
            expected[i] = torch.cat([student, teacher]).detach()
            for s, t in zip(student, teacher):
                preference = -torch.log(torch.sigmoid((t - s).double()))
                loss = loss + (preference + 0.01 / 2 * (s**2 + t**2)) / count
    disc.zero_grad()
    loss.backward()
    reference = grads(disc)
    for max_tokens in (10**6, 150, 1):
        scores, _, got = learn(tiny, disc, records, max_tokens)
        assert torch.equal(scores.isnan(), expected.isnan())
        assert (scores - expected).nan_to_num().abs().max() <= 1e-5
        assert_same_grads(got, reference)


@pytest.mark.parametrize("normalize", ["per-expert", "combined"])
def test_segment_credit(tiny, normalize):
    """Tokens of the caption get both signals, those of the trace that of the reasoning expert
    alone, those of an invalid rollout the penalty."""
    records, rng = make_game(tiny), np.random.default_rng(0)
    valid = np.array([kind == "good" for kind in RESPONSES]).reshape(3, 3)
    d_v, d_r = rng.normal(0, 2, (2, 3, 3))
    settings = {"alpha": 0.3, "normalize": normalize, "floor": 0.1, "penalty": 1.5, "clip": 10.0}
    whole = expected_advantages(d_v, d_r, valid, **settings).flatten()
    trace = expected_advantages(np.zeros((3, 3)), d_r, valid, **settings).flatten()
    scores = torch.full((3, 3, 4), math.nan)
    scores[torch.tensor(valid)] = torch.tensor(np.stack([d_v, d_r, d_v, d_r], -1)[valid]).float()
    args = argparse.Namespace(alpha=0.3, normalize=normalize, std_floor=0.1, invalid_penalty=1.5)
    for credit in ("response", "segment"):
        args.credit = credit
        align.give_advantages(records, scores, args)
        for i, record in enumerate(records):
            text = tiny.tokenizer.decode(record.rollout.ids)
            of_token = record.token_advantages().tolist()
            split = credit == "segment" and RESPONSES[i] == "good"
            for k in range(len(of_token)):  # a token of the caption does not begin after it
                before = tiny.tokenizer.decode(record.rollout.ids[:k])
                expected = trace[i] if split and "</caption>" in before else whole[i]
                assert of_token[k] == pytest.approx(expected, abs=1e-5), (text, k)


def pair_in_float64(disc, prompt, teacher, other, experts=(0, 1)):
    """Scores [4] with the columns SCORES and the loss of one pair, each response by itself."""
    s, t = (torch.cat(disc.scores([prompt], [(0, caption)], [(0, trace)]))
            for caption, trace in (other, teacher))
    preference = -torch.log(torch.sigmoid((t - s).double()))
    size = (0.01 / 2 * (s**2 + t**2)).sum()
    return torch.cat([s, t]).detach(), sum(preference[k] for k in experts) + size


@pytest.mark.parametrize("variant", VARIANTS)
def test_mismatched_teachers_equal_one_pair_at_a_time(tiny, variant):
    """Groups 0 and 2 have pictures and have chains to each other's teacher over mixtures, group 1
    has none; each is a pair with the one before it, for the perception expert."""
    disc, records = with_heads(tiny, variant), make_game(tiny)
    prompts = [visible_prompt(r.prompt, tiny.tokenizer, variant) for r in records]
    loss, expected = 0.0, []
    for prompt, r in zip(prompts, records):
        if r.segments is not None:
            loss = loss + pair_in_float64(disc, prompt, r.teacher, r.segments)[1] / 5
    for i, j in ((0, 6), (6, 0)):
        mine, other = (records[k].example.response for k in (i, j))
        seed, chain = zlib.crc32((mine + other).encode()), [records[i].teacher]
        for rate in MIXTURES:
            ids = encode_response(mix(mine, other, rate, random.Random(seed)), tiny.tokenizer)
            chain.append(rollout.split_segments(ids, tiny.tokenizer))
        chain.append(records[j].teacher)
        for better, worse in zip(chain, chain[1:]):
            loss = loss + 0.3 * pair_in_float64(disc, prompts[i], better, worse, (0,))[1] / 8
        expected.append(pair_in_float64(disc, prompts[i], chain[0], chain[-1])[0])
    disc.zero_grad()
    loss.backward()
    reference = grads(disc)
    for max_tokens in (10**6, 150, 1):
        scores, mismatched, got = learn(tiny, disc, records, max_tokens, mismatch=0.3)
        assert (mismatched - torch.stack(expected)).abs().max() <= 1e-5 and len(scores) == 9
        assert_same_grads(got, reference)


def test_measuring_changes_nothing(tiny):
    """Without --mismatch: scores and gradient are bitwise those of a step without measurement."""
    disc, records = with_heads(tiny), make_game(tiny)
    scores, none, gradient = learn(tiny, disc, records, step=1)
    again, mismatched, same = learn(tiny, disc, records, step=2)
    assert len(none) == 0 and len(mismatched) == 2
    assert torch.equal(scores.nan_to_num(), again.nan_to_num())
    assert gradient.keys() == same.keys()
    assert all(torch.equal(gradient[name], same[name]) for name in same)
    _, weighted, _ = learn(tiny, disc, records, mismatch=1.0)
    assert (mismatched - weighted).abs().max() <= 1e-5


def test_without_a_valid_rollout_nothing_is_learned(tiny):
    scores, _, got = learn(tiny, with_heads(tiny), make_game(tiny, ["broken", "cut", "broken"] * 3))
    assert scores.isnan().all() and not any(g.any() for g in got.values())
    assert align.expert_metrics(scores, torch.empty(0, 4)) == {}


def test_expert_metrics():
    # student v, r, teacher v, r
    scores = torch.tensor([[1.0, 0.0, 3.0, 0.0], [2.0, 5.0, 1.0, 1.0], [torch.nan] * 4])
    got = align.expert_metrics(scores, torch.empty(0, 4))
    expected = {"gap_v": (2 - 1) / 2, "gap_r": (0 - 4) / 2}
    expected |= {"acc_v": 0.5, "acc_r": (0.5 + 0) / 2, "score_v": 1.5, "score_r": 2.5}
    expected["loss_v"] = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    expected["loss_r"] = (math.log(2) + math.log(1 + math.exp(4))) / 2
    assert got == pytest.approx(expected)


# ----------------------------------------------------------------------------------------- the loop
def flags_of(tiny, policy, out, **more):
    flags = {"ckpt": policy, "data": tiny.align, "out": out, "prompts": 2, "rollouts": 4}
    flags |= {"max-new-tokens": 24, "lr": 1e-4, "disc-lr": 1e-3, "log-rollouts": 1, "steps": 2}
    flags |= {key.replace("_", "-"): value for key, value in more.items()}
    return [part for key, value in flags.items() for part in (f"--{key}", value)]


def test_rewards_come_from_before_the_update(tiny, policy, tmp_path):
    """The heads start at zero, so the first step has no preference, however often the discriminator
    learns in it."""
    assert stage("align", *flags_of(tiny, policy, tmp_path, disc_updates=3)) == 0
    first, second = read_jsonl(tmp_path / "metrics.jsonl")
    assert first["loss_v"] == pytest.approx(math.log(2)) and first["gap_v"] == first["score_r"] == 0
    assert second["loss_v"] != first["loss_v"] and second["gap_v"] != 0
    rows = read_jsonl(tmp_path / "rollouts.jsonl")
    scores = {1: [], 2: []}
    for row in rows:
        if "d_v" in row:
            scores[row["step"]].append(row["d_v"])
    assert set(scores[1]) == {0.0} and 0.0 not in scores[2] and 0 < len(scores[2])
    assert len(rows) == 16 and first["valid"] == len(scores[1]) / 8


def test_warm_up_trains_the_discriminator_only(tiny, policy, tmp_path):
    assert stage("align", *flags_of(tiny, policy, tmp_path, warmup_steps=2, steps=0)) == 0
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (policy, tmp_path))
    assert all(torch.equal(before[key], after[key]) for key in before | after)
    disc, fresh = load_discriminator(str(tmp_path / "discriminator")), load_discriminator(policy)
    pairs = list(zip(disc.parameters(), fresh.parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in pairs)
    assert "grad_norm" not in read_jsonl(tmp_path / "metrics.jsonl")[0]


WARM = [0.9, 0.85]  # acc_v, acc_r of a step
STEPS = {  # [acc_v, acc_r] of each step (None: no valid rollout), early, steps of the warm-up
    "from the first step on": ([WARM] * 9, True, 5),
    "one expert is late": ([[1.0, 0.5]] * 4 + [[1.0, 1.0]] * 4, True, 7),
    "on average": ([[0.7, 0.98], [0.98, 0.7]] * 4, True, 5),
    "steps without a pair": ([WARM, None] * 4, True, 7 + 2),
    "never": ([[1.0, 0.79]] * 9, True, 9),
    "as many as were asked for": ([WARM] * 9, False, 9),
}


@pytest.mark.parametrize("name", STEPS)
def test_how_long_the_warm_up_is(capsys, name):
    """Until both experts rank 80 % of the pairs of five steps rightly, unless a number is given; if
    they do not at its end, there is a warning."""
    shares, early, expected = STEPS[name]
    warm_up = align.WarmUp(9, early)
    for step, share in enumerate([*shares, *[WARM] * 9]):
        if step < warm_up.steps:
            warm_up.watch(step, share, ONE)
        warm_up = align.WarmUp(**json.loads(json.dumps(asdict(warm_up))))  # as a state keeps it
    assert warm_up.steps == expected
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{expected} steps of warm-up" in line
    assert line.startswith("warning") == (name == "never")


def test_a_warm_up_without_a_flag_ends_by_itself_and_resumes(tiny, policy, tmp_path, monkeypatch):
    """--steps counts those of the game. A state from within the warm-up carries on to its end."""
    monkeypatch.setattr(align, "READY", 0.0)  # both experts are once there were five steps

    def play(out, *more):
        flags = [*flags_of(tiny, policy, out, save_every=3, keep=9), *more]
        monkeypatch.setattr(sys, "argv", ["align.py", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            runtime.run(align.main)
        assert end.value.code == 0
        return untimed(read_jsonl(out / "metrics.jsonl"))

    whole = play(tmp_path / "whole")
    assert ["grad_norm" in metrics for metrics in whole] == [False] * 5 + [True] * 2
    shutil.copytree(tmp_path / "whole" / "state.3", tmp_path / "broken" / "state.3")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "broken")
    assert play(tmp_path / "broken", "--resume") == whole


def test_pairs_of_equal_texts_say_nothing_of_an_expert():
    """Of four pairs two have the teacher's caption, a tie each, and all have its trace."""
    teacher, other = ([1], [2]), ([3], [2])
    records = [SimpleNamespace(segments=s, teacher=teacher) for s in (teacher, other, None)]
    records += records[:2]
    args = SimpleNamespace(disc_variant="moe")
    experts = {"acc_v": (0.5 + 1 + 0.5 + 0) / 4, "acc_r": 0.5}
    assert align.told_apart(experts, records, args, ONE) == [0.5, 1.0]
    args.disc_variant = "dense"  # one score of both
    assert align.told_apart({"acc_v": 0.75, "acc_r": 0.75}, records, args, ONE) == [1.0, 1.0]


def test_a_resumed_run_equals_an_unbroken_one(tiny, policy, tmp_path):
    """Policy, discriminator and both optimizers come back."""
    for out, steps in (("whole", 3), ("broken", 1)):
        flags = flags_of(tiny, policy, tmp_path / out, warmup_steps=1, steps=steps)
        assert stage("align", *flags) == 0
    flags = flags_of(tiny, policy, tmp_path / "broken", warmup_steps=1, steps=3)
    assert stage("align", *flags, "--resume") == 0
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        whole, broken = (untimed(read_jsonl(tmp_path / out / name)) for out in ("whole", "broken"))
        assert whole == broken and len(whole) >= 4


def test_rows_without_a_well_formed_teacher_are_left_out(tiny, policy, tmp_path):
    examples = []
    for i, example in enumerate(tiny.examples["align"]):
        images = [str(tiny.folder / path) for path in example["images"]]
        response = example["response"] if i in (2, 5) else ["no blocks", None][i % 2]
        examples.append(dict(example, images=images, response=response))
    data = write_jsonl(tmp_path / "data.jsonl", examples)
    flags = flags_of(tiny, policy, tmp_path / "out", data=data, rollouts=2)
    assert stage("align", *flags, "--max-bad", 1) == 0
    rollouts = read_jsonl(tmp_path / "out" / "rollouts.jsonl")
    assert {line["id"] for line in rollouts} == {f"{data}:3", f"{data}:6"}


@pytest.mark.slow
def test_with_mismatch_two_processes_give_the_same(tiny, policy, tmp_path):
    """The second of three groups spans both ranks, the packs differ."""
    more = {"prompts": 3, "mismatch": 0.5, "readout": "mean", "warmup_steps": 1, "lr": 1e-6}
    flags = flags_of(tiny, policy, tmp_path / "1", **more)
    assert stage("align", *flags) == 0
    flags = flags_of(tiny, policy, tmp_path / "2", max_tokens=200, **more)
    run_stage("align", flags, 2)
    one, two = (untimed(read_jsonl(tmp_path / n / "metrics.jsonl")) for n in ("1", "2"))
    assert len(one) == 3 and all("ground_v" in metrics for metrics in one)
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
