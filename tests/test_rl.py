"""Run: pytest tests/test_rl.py   (advantages, policy loss, normalisation, dynamic sampling; CPU)"""

import argparse
import ast
import math
import re
import shutil
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
    run_alone,
    run_stage,
    stage,
    stock_logprobs,
    untimed,
    write_jsonl,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import rl
import rollout

CLIPS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}


# --------------------------------------------------------------------------------------- advantages
def test_group_advantages_equal_float64():
    rewards = torch.tensor(np.random.default_rng(0).choice([0, 0.2, 1.0, -0.3], (7, 5)))
    rewards[3] = 0.2
    expected = []
    for group in rewards.tolist():
        mean = sum(group) / 5
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 4)
        expected.append([(r - mean) / (std + 1e-6) for r in group])
    assert np.abs(rl.group_advantages(rewards).numpy() - expected).max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(dtype):
    """The float mean of equal values need not be equal to them: the z-score of 0.1 + 0.2 in a group
    of 3 is not 0."""
    trapped = 0
    for value in (0.1, 0.1 + 0.2, 0.2, 0.7, 1 / 3, 1e-8, 1e6 + 0.1):
        for n in range(1, 17):
            rewards = torch.full((2, n), value, dtype=dtype)
            trapped += bool((rewards - rewards.mean(1, keepdim=True)).any())
            assert not rl.group_advantages(rewards).any()
    assert trapped > 0
    group_of_one = torch.tensor([[5.0], [-2.0]])
    assert rl.group_advantages(group_of_one).tolist() == [[0.0], [0.0]]


OVERLONG = [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (500, -1)]


@pytest.mark.parametrize("length, expected", OVERLONG)
def test_overlong_penalty(length, expected):
    assert rl.overlong_penalty(length, limit=100, buffer=20) == pytest.approx(expected)
    assert rl.overlong_penalty(length, limit=100, buffer=0) == 0


# -------------------------------------------------------------------------------------- policy loss
def surrogate(algo, logp, old, advantages, ref=None, kl=0.0):
    """The loss from the formulas, one token at a time. logp, old, ref: lists of float64 tensors
    without padding."""
    low, high = CLIPS[algo]
    tokens, total, sides = sum(map(len, logp)), 0.0, []
    for i, a in enumerate(advantages):
        gaps = [new - before for new, before in zip(logp[i], old[i])]
        for t in range(len(gaps)):
            ratio = torch.exp(sum(gaps) / len(gaps) if algo == "gspo" else gaps[t])
            clipped = min(max(ratio, ratio.new_tensor(1 - low)), ratio.new_tensor(1 + high))
            loss = -min(ratio * a, clipped * a)
            sides.append((a > 0, bool(ratio < 1 - low) - bool(ratio > 1 + high)))
            if kl:
                d = ref[i][t] - logp[i][t]
                loss = loss + kl * min(torch.exp(d) - d - 1, d.new_tensor(10.0))
            total = total + loss / (len(gaps) * len(logp) if algo == "gspo" else tokens)
    return total, sides


def random_batch(algo, seed, n=30, longest=9):
    """Ragged rows whose ratios lie below, inside and above the clip range; some of the k3 terms
    reach the clamp."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, n)
    lengths[0] = longest
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    logp = torch.tensor(rng.normal(-2, 1, (n, longest)))
    old = logp + torch.tensor(rng.normal(0, 0.001 if algo == "gspo" else 0.4, (n, longest)))
    ref = logp + torch.tensor(rng.normal(0, 2, (n, longest)))
    advantages = torch.tensor(rng.normal(0, 1, n))
    advantages[3:5] = 0.0
    return mask, logp, old, ref, advantages


@pytest.mark.parametrize("algo", CLIPS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_policy_loss_equals_float64(algo, kl, seed):
    mask, logp, old, ref, advantages = random_batch(algo, seed)

    def unpadded(table):
        return [values[m] for values, m in zip(table, mask)]

    def padded(table):
        return torch.where(mask, table, 1e4).float()  # with garbage, which must not matter

    exact = logp.clone().requires_grad_()
    columns = [unpadded(exact), unpadded(old), advantages.tolist(), unpadded(ref)]
    expected, sides = surrogate(algo, *columns, kl)
    expected.backward()
    # clips of both sides, both signs
    assert {(up, side) for up in (True, False) for side in (-1, 0, 1)} <= set(sides)
    k3 = (ref - logp).exp() - (ref - logp) - 1
    assert (k3[mask] > 10).any() and (k3[mask] < 10).any()

    ours = padded(logp).requires_grad_()
    reference = {"ref_logp": padded(ref), "kl": kl} if kl else {}
    loss, metrics = rl.policy_loss(ours, padded(old), advantages.float(), mask, algo, **reference)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert (ours.grad - exact.grad).abs().max() < 1e-6 and exact.grad.abs().max() > 1e-3
    per_token = advantages.repeat_interleave(mask.sum(1)).tolist()
    active = sum(a != 0 and side == (-1 if up else 1) for (up, side), a in zip(sides, per_token))
    assert metrics["clipped"] == pytest.approx(active / mask.sum().item(), abs=1e-6)
    assert ("kl" in metrics) == (kl > 0)
    if kl:
        assert metrics["kl"] == pytest.approx(k3[mask].clamp(max=10).mean().item(), rel=1e-4)


@pytest.mark.parametrize("algo", CLIPS)
def test_a_mask_of_integers_is_one_of_booleans(algo):
    """Other code keeps masks as integers; where() would refuse one."""
    mask, *columns, advantages = random_batch(algo, 3)
    logp, old, ref = (column.float() for column in columns)
    found = []
    for kind in (torch.bool, torch.long, torch.int32, torch.float32):
        made = rl.policy_loss(logp, old, advantages.float(), mask.to(kind), algo, ref, 0.1)
        found.append((made[0].item(), made[1]))
    assert found == found[:1] * 4


@pytest.mark.parametrize("algo", CLIPS)
def test_micro_batches_with_global_counts_add_up(algo):
    mask, logp, old, ref, advantages = random_batch(algo, 2)
    logp, old, ref, advantages = (x.float() for x in (logp, old, ref, advantages))

    def run(parts, **counts):
        leaf, total, sums = logp.clone().requires_grad_(), 0.0, {}
        for part in parts:
            longest = int(mask[part].sum(1).max())  # a part is padded to its own longest row only
            here = part, slice(longest)
            loss, metrics = rl.policy_loss(
                leaf[here], old[here], advantages[part], mask[here], algo, ref[here], 0.1, **counts
            )
            total = total + loss
            sums = {key: sums.get(key, 0.0) + value for key, value in metrics.items()}
        total.backward()
        values = [total.item(), *sums.values()]
        return torch.cat([leaf.grad.flatten(), torch.tensor(values)])

    whole = run([slice(0, 30)])
    counts = {"tokens": mask.sum(), "sequences": 30}
    thirds = [slice(i, i + 10) for i in (0, 10, 20)]
    singles = [slice(i, i + 1) for i in range(30)]
    for parts in ([slice(0, 1), slice(1, 30)], thirds, singles):
        assert (run(parts, **counts) - whole).abs().max() < 1e-6


def make_records(tiny, seed=0):
    """Rollouts of three prompts; old log-probs off-policy; one group has equal rewards."""
    rng, records = np.random.default_rng(seed), []
    for group, count in enumerate((1, 0, 3)):
        for ids in ids_of(rng, tiny, *rng.integers(2, 8, 3)):
            drawn = rollout.Rollout(ids, [-1.0] * len(ids), True)
            record = rl.Record(group, len(records), None, tiny.prompts[count], drawn, "")
            with torch.no_grad():
                exact = stock_logprobs(tiny, record.prompt, ids)
            record.old_logp = exact + torch.tensor(rng.normal(0, 0.3, len(ids))).float()
            record.ref_logp = exact + torch.tensor(rng.normal(0, 0.3, len(ids))).float()
            records.append(record)
    for record, advantage in zip(records, [1.0, -0.5, -0.5, 0.0, 0.0, 0.0, 0.7, 0.6, -1.3]):
        record.advantage = advantage
    return records


@pytest.mark.parametrize("algo, kl", [("grpo", 0.0), ("grpo", 0.2), ("dapo", 0.0), ("gspo", 0.0)])
def test_gradient_equals_separate_sequences_whatever_the_split(tiny, algo, kl):
    """Rollouts with advantage 0 are not computed but count in the means."""
    records = make_records(tiny)
    advantages = [r.advantage for r in records]
    tiny.stock.zero_grad()
    logp = [stock_logprobs(tiny, r.prompt, r.rollout.ids) for r in records]
    columns = [[r.old_logp for r in records], advantages, [r.ref_logp for r in records]]
    expected, _ = surrogate(algo, logp, *columns, kl)
    expected.backward()
    for max_tokens in (10**6, 120, 1):
        tiny.model.zero_grad()
        args = argparse.Namespace(max_tokens=max_tokens, temperature=1.0)
        metrics = rl.accumulate_policy_gradient(tiny.model, records, algo, args, ONE, kl)
        assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
        assert_same_grads(grads(tiny.model), grads(tiny.stock))
        computed = torch.cat([logp[i].detach() for i, a in enumerate(advantages) if a or kl])
        drift = (computed + 1.0).abs().mean().item()  # sampled log-probs are -1 here
        assert metrics["drift"] == pytest.approx(drift, abs=1e-4)
        assert ("kl" in metrics) == (kl > 0)


def test_without_advantages_there_is_no_gradient(tiny):
    records = make_records(tiny)
    for r in records:
        r.advantage = 0.0
    tiny.model.zero_grad()
    args = argparse.Namespace(max_tokens=100, temperature=1.0)
    metrics = rl.accumulate_policy_gradient(tiny.model, records, "grpo", args, ONE)
    assert metrics == {}
    assert not any(g.any() for g in grads(tiny.model).values())


@pytest.mark.parametrize("max_tokens", [10**6, 90, 1])
def test_stored_logprobs_equal_separate_sequences(tiny, max_tokens):
    records = make_records(tiny)
    args = argparse.Namespace(max_tokens=max_tokens, temperature=1.0)
    rl.store_logprobs(tiny.model, records, "old_logp", args, ONE)
    for r in records:
        expected = stock_logprobs(tiny, r.prompt, r.rollout.ids)
        assert r.old_logp.shape == expected.shape and (r.old_logp - expected).abs().max() <= 1e-5


# ----------------------------------------------------------------------------------------- the loop
def flags_of(tiny, policy, out, algo="grpo", **more):
    flags = {"ckpt": policy, "data": tiny.rl, "out": out, "algo": algo, "prompts": 2, "rollouts": 4}
    flags |= {"max-new-tokens": 24, "lr": 1e-4, "log-rollouts": 1, "steps": 2}
    flags |= {key.replace("_", "-"): value for key, value in more.items()}
    return [part for key, value in flags.items() for part in (f"--{key}", value)]


def test_rewards_in_the_log_are_those_of_the_rollouts(tiny, policy, tmp_path):
    more = {"overlong_buffer": 23, "max_gen_batches": 20}
    assert stage("rl", *flags_of(tiny, policy, tmp_path, algo="dapo", **more)) == 0
    rows, log = read_jsonl(tmp_path / "rollouts.jsonl"), read_jsonl(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        here = [row for row in rows if row["step"] == step]
        assert len(here) == 4 * log[step - 1]["groups"] > 0
        # dynamic sampling: no group that is all right or all wrong
        for i in range(0, len(here), 4):
            assert {row["accuracy"] for row in here[i : i + 4]} == {0.0, 1.0}
        assert all(row["score"] == 0.8 * row["accuracy"] + 0.2 * row["format"] for row in here)
        # the buffer is all of the limit but one token: every token after the first costs the same
        penalty = (log[step - 1]["length"] - 1) / 23
        assert np.mean([row["score"] - row["reward"] for row in here]) == pytest.approx(penalty)
        assert log[step - 1]["reward"] == pytest.approx(np.mean([row["reward"] for row in here]))


def test_every_step_makes_k_updates(tiny, policy, tmp_path):
    """Under dynamic sampling the groups of a step come from several rounds, in each of which they
    are numbered from 0."""
    more = {"steps": 5, "updates_per_rollout": 2, "max_gen_batches": 40, "rollouts": 2}
    assert stage("rl", *flags_of(tiny, policy, tmp_path, algo="dapo", **more)) == 0
    log = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["groups"] for row in log] == [2] * 5 and any(row["gen_batches"] > 1 for row in log)
    dcp_to_torch_save(tmp_path / "state.5", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=False)["policy"]["optimizer"]["state"]
    assert {float(entry["step"]) for entry in state.values()} == {10.0}


def test_a_resumed_run_equals_an_unbroken_one(tiny, policy, tmp_path):
    """Metrics and rollouts: also the rollouts of a step that is repeated appear once."""
    for out, steps in (("whole", 4), ("broken", 3), ("two", 2)):
        assert stage("rl", *flags_of(tiny, policy, tmp_path / out, steps=steps)) == 0
    # as if killed in step 4, after the save of step 2
    shutil.rmtree(tmp_path / "broken" / "state.3")
    (tmp_path / "two" / "state.2").rename(tmp_path / "broken" / "state.2")
    assert stage("rl", *flags_of(tiny, policy, tmp_path / "broken", steps=4), "--resume") == 0
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        whole, broken = (untimed(read_jsonl(tmp_path / out / name)) for out in ("whole", "broken"))
        assert whole == broken and len(whole) > 3, name


def test_a_new_run_does_not_keep_the_rollouts_of_an_old_one(tiny, policy, tmp_path):
    for more in ([], ["--overwrite"]):
        assert stage("rl", *flags_of(tiny, policy, tmp_path, steps=1), *more) == 0
    assert len(read_jsonl(tmp_path / "rollouts.jsonl")) == 8


# --------------------------------------------------------------------------------- own rewards
OWN = """
from __future__ import annotations
import sys
from dataclasses import dataclass
from beside import LEVEL

@dataclass
class Kept:  # with annotations as texts it needs its module in sys.modules
    count: int = 0

def length(response, answer, row):
    assert row["answer"] == answer and row["prompt"] and row["level"] == 3
    return LEVEL * len(response) + row["level"]

def without_answer(response, answer, row):
    assert answer is None and "answer" not in row
    return response.count("e")

def sometimes(response, answer, row):
    if len(response) % 4 == 0:
        raise KeyError("no such\\nkey")
    if len(response) % 4 == 1:
        while True:
            pass
    if len(response) % 4 == 2:
        return float("nan")
    return 1

def leaves(response, answer, row):
    if len(response) % 3 == 0:
        sys.exit()
    if len(response) % 3 == 1:
        raise KeyboardInterrupt
    return 1

def never(response, answer, row):
    return "a lot"
"""


@pytest.fixture
def own(tiny, tmp_path):
    """A file of functions that imports another beside it, and rows with a column of their own."""
    (tmp_path / "beside.py").write_text("LEVEL = 0.01")
    (tmp_path / "own.py").write_text(OWN)
    rows = [row | {"level": 3} for row in tiny.examples["rl"]]
    for row in rows:
        row["images"] = [str(tiny.folder / name) for name in row["images"]]
    data = write_jsonl(tmp_path / "own.jsonl", rows)
    return SimpleNamespace(data=data, path=str(tmp_path / "own.py"))


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_an_own_reward_takes_the_place_of_ours(tiny, policy, own, tmp_path, processes):
    """All of equation (5): what it says of a response is what the advantages are made of; accuracy
    and format are still logged."""
    flags = flags_of(tiny, policy, tmp_path / "out", data=own.data, reward=f"{own.path}:length")
    run_stage("rl", flags, processes)
    log = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    rows = read_jsonl(tmp_path / "out" / "rollouts.jsonl")
    assert len(rows) == 16 and {row["accuracy"] for row in rows} == {0.0, 1.0}
    for i in range(0, 16, 4):
        group = [0.01 * len(row["response"]) + 3 for row in rows[i : i + 4]]
        expected = (group - np.mean(group)) / (np.std(group, ddof=1) + 1e-6)
        assert np.abs([row["advantage"] for row in rows[i : i + 4]] - expected).max() < 1e-6
        assert [row["score"] for row in rows[i : i + 4]] == pytest.approx(group)
    for line, part in zip(log, (rows[:8], rows[8:])):
        assert line["reward"] == pytest.approx(np.mean([row["score"] for row in part]))
        assert line["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in part]))
        assert line["reward_errors"] == 0


def test_dynamic_sampling_follows_an_own_reward(tiny, policy, own, tmp_path):
    """Groups leave the batch when it says the same of all their rollouts; rows need no answer."""
    rows = [{key: row[key] for key in ("prompt", "images")} for row in tiny.examples["rl"]]
    for row in rows:
        row["images"] = [str(tiny.folder / name) for name in row["images"]]
    data = write_jsonl(tmp_path / "asked.jsonl", rows)
    flags = flags_of(tiny, policy, tmp_path / "out", algo="dapo", data=data, rollouts=2, steps=6)
    assert stage("rl", *flags) == 2  # without it rows are of no use
    more = ["--max-gen-batches", 20, "--overlong-buffer", 1]
    assert stage("rl", *flags, *more, "--reward", f"{own.path}:without_answer") == 0
    rows = read_jsonl(tmp_path / "out" / "rollouts.jsonl")
    assert len(rows) == 24 and not any("accuracy" in row for row in rows)
    for first, second in zip(rows[::2], rows[1::2]):
        assert first["score"] == first["response"].count("e") != second["score"]
    log = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert not any("accuracy" in line for line in log)
    assert max(line["gen_batches"] for line in log) > 1


def test_calls_that_fail_are_worth_nothing_and_counted(
    tiny, policy, own, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(rl, "REWARD_SECONDS", 0.05)
    flags = flags_of(tiny, policy, tmp_path / "out", steps=3)
    assert stage("rl", *flags, "--reward", f"{own.path}:sometimes") == 0
    rows = read_jsonl(tmp_path / "out" / "rollouts.jsonl")
    log = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    good = [len(row["response"]) % 4 == 3 for row in rows]
    assert [row["score"] for row in rows] == [float(one) for one in good] and 0 < sum(good)
    assert {len(row["response"]) % 4 for row in rows} >= {1, 3}  # one that never ends was stopped
    assert [line["reward_errors"] for line in log] == [n - sum(good[:n]) for n in (8, 16, 24)]
    told = [line for line in capfd.readouterr().out.splitlines() if "warning: --reward" in line]
    assert len(told) == 1 and told[0].endswith("; it is worth 0")


def test_a_call_that_ends_the_process_does_not(tiny, policy, own, tmp_path):
    """sys.exit() and KeyboardInterrupt would end the run in silence, with status 0 or as Ctrl-C.
    What is counted goes on after --resume."""
    flags = flags_of(tiny, policy, tmp_path / "out", reward=f"{own.path}:leaves", steps=3)
    flags += ["--save-every", 2, "--keep", 2]
    assert stage("rl", *flags) == 0
    rows = read_jsonl(tmp_path / "out" / "rollouts.jsonl")
    good = [len(row["response"]) % 3 == 2 for row in rows]
    assert {len(row["response"]) % 3 for row in rows} == {0, 1, 2}
    assert [row["score"] for row in rows] == [float(one) for one in good]
    log = untimed(read_jsonl(tmp_path / "out" / "metrics.jsonl"))
    assert [line["reward_errors"] for line in log] == [n - sum(good[:n]) for n in (8, 16, 24)]
    shutil.rmtree(tmp_path / "out" / "state.3")
    assert stage("rl", *flags, "--resume") == 0
    assert untimed(read_jsonl(tmp_path / "out" / "metrics.jsonl")) == log


REFUSED = {
    "quits.py:f": "quits.py:f: SystemExit 0",
    "own.py:absent": "own.py:absent: .*has no attribute 'absent'",
    "own.py:LEVEL": "own.py:LEVEL: .*LEVEL is no function",
    "own.py:never": r"never: .*:\d+: ValueError: could not .*'a lot' \(as all 8 calls of the first",
    "own.py": "own.py: a FILE.py:FUNCTION that is there",
    "gone.py:f": "gone.py:f: a FILE.py:FUNCTION that is there",
    "broken.py:f": "broken.py:f: .*broken.py, line 1",
    "missing.py:f": "missing.py:f: No module named 'of_no_such_name'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_reward_that_is_none_ends_the_run_in_one_line(tiny, policy, own, tmp_path, capfd, name):
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "missing.py").write_text("import of_no_such_name")
    (tmp_path / "quits.py").write_text("raise SystemExit(0)")
    flags = flags_of(tiny, policy, tmp_path / "out", steps=1)
    assert stage("rl", *flags, "--reward", tmp_path / name) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert line.startswith("rl.py: error: --reward ") and re.search(REFUSED[name], line)


def test_a_reward_belongs_to_the_run(tiny, policy, own, tmp_path, capfd):
    """By its file's content and its name, wherever the file lies."""
    flags = flags_of(tiny, policy, tmp_path / "out", data=own.data, steps=1)
    assert stage("rl", *flags, "--reward", f"{own.path}:length") == 0
    flags[-1] = 2
    moved = tmp_path / "moved.py"
    moved.write_text(OWN.replace("LEVEL *", "2 * LEVEL *"))
    for other in (f"{moved}:length", f"{own.path}:sometimes", None):
        capfd.readouterr()
        more = ["--reward", other] if other else []
        assert stage("rl", *flags, *more, "--resume") == 2
        assert "the state was made with --reward " in capfd.readouterr().err
    moved.write_text(OWN)
    assert stage("rl", *flags, "--reward", f"{moved}:length", "--resume") == 0
    capfd.readouterr()
    assert stage("rl", *flags, "--reward", "", "--overwrite") == 2  # of a variable that is not set
    assert "--reward : a FILE.py:FUNCTION that is there is needed" in capfd.readouterr().err


def test_graphs_that_torch_does_not_capture_are_counted(tiny, policy, tmp_path, monkeypatch):
    """Torch's own counter, on a machine where it captures nothing."""
    monkeypatch.setattr(rollout, "compiled_decode_step", lambda: rollout.decode_step)
    monkeypatch.setitem(torch._dynamo.utils.counters["inductor"], "cudagraph_skips", 3)
    flags = ["--ckpt", policy, "--data", tiny.rl, "--prompts", 2, "--rollouts", 2, "--steps", 1]
    flags += ["--max-new-tokens", 8, "--out", tmp_path]
    assert stage("rl", *flags, "--compile") == 0
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["graph_skips"] == 3
    assert stage("rl", *flags, "--overwrite") == 0
    assert "graph_skips" not in read_jsonl(tmp_path / "metrics.jsonl")[0]


# ------------------------------------------------------------------------------------- validation
@pytest.mark.parametrize("script, processes", [
    ("rl", None), ("align", None), pytest.param("rl", 2, marks=pytest.mark.slow),
    pytest.param("align", 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_validation_says_what_eval_says_of_the_state(tiny, policy, tmp_path, script, processes):
    """And changes nothing of the run."""
    flags = ["--ckpt", policy, "--data", getattr(tiny, script), "--prompts", 2, "--rollouts", 4]
    flags += ["--lr", 1e-3, "--max-new-tokens", 24, "--steps", 4, "--save-every", 2, "--keep", 2]
    logs = []
    for name, more in (("with", ["--eval-every", 2, "--eval-data", tiny.sft]), ("without", [])):
        arguments = [*flags, "--out", tmp_path / name, *more]
        run_stage(script, arguments, processes)
        logs.append(untimed(read_jsonl(tmp_path / name / "metrics.jsonl")))
    found = {line["step"]: line.pop("eval_accuracy") for line in logs[0] if "eval_accuracy" in line}
    assert logs[0] == logs[1] and found.keys() == {2, 4}
    states = [tmp_path / "with" / f"state.{step}" for step in found]
    asked = ["--data", tiny.sft, "--max-new-tokens", 24, "--temperature", 0]
    assert stage("eval", "--ckpt", *states, *asked, "--out", tmp_path / "eval") == 0
    for state, share in zip(states, found.values()):
        rows = read_jsonl(tmp_path / "eval" / state.name / "sft.jsonl")
        right = [row["accuracy"] for row in rows]
        assert len(rows) == 24 and share == pytest.approx(np.mean(right))
    assert 0 < max(found.values()) < 1


def test_the_best_state_stays(tiny, policy, tmp_path):
    """Besides the newest: the first with the highest accuracy. It is saved when it is found, and a
    continued run knows it from the log."""
    flags = ["--ckpt", policy, "--data", tiny.rl, "--out", tmp_path, "--prompts", 2, "--lr", 1e-3]
    flags += ["--rollouts", 4, "--max-new-tokens", 24, "--eval-every", 1, "--eval-data", tiny.sft]
    for steps, more in ((5, []), (8, ["--resume"])):
        assert stage("rl", *flags, "--steps", steps, *more) == 0
        found = [line["eval_accuracy"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
        best = 1 + found.index(max(found))
        states = {path.name for path in tmp_path.glob("state.*")}
        assert states == {f"state.{best}", f"state.{steps}"}
    assert len(found) == 8 and len(set(found)) > 1


def test_validation_needs_rows_that_can_all_be_used(tiny, policy, tmp_path, capfd):
    bad = [dict(row, images=[], prompt="How many?") for row in tiny.examples["rl"]]
    bad[3].pop("answer")
    bad[3].pop("response")
    picture = (tiny.folder / "rl_0_0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(picture[: len(picture) // 2])  # its header is whole
    cut = [*bad[:3], bad[4] | {"images": ["cut.png"]}]
    cases = {
        "--eval-every and --eval-data need each other": ["--eval-every", 1],
        f"--eval-data: {tmp_path}/bad.jsonl:4: the row has no answer": [
            "--eval-every", 1, "--eval-data", write_jsonl(tmp_path / "bad.jsonl", bad)
        ],
        f"--eval-data: {tmp_path}/cut.jsonl:4: image cannot be read: image file is truncated": [
            "--eval-every", 1, "--eval-data", write_jsonl(tmp_path / "cut.jsonl", cut)
        ],
        "--eval-data: nowhere.jsonl: no such file": ["--eval-every", 1, "--eval-data",
                                                     "nowhere.jsonl"],
        f"is, holds or lies in --eval-data {tmp_path}/out": [
            "--eval-every", 1, "--eval-data", tmp_path / "out"],
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    for script in ("rl", "align"):
        flags = ["--ckpt", policy, "--data", getattr(tiny, script), "--out", tmp_path / "out"]
        for words, more in cases.items():
            capfd.readouterr()
            assert stage(script, *flags, "--steps", 1, *more) == 2
            lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
            assert len(lines) == 1 and words in lines[0]


# --------------------------------------------------------------------------------------- to copy
ALONE = """
import torch
PIECES
rewards = torch.tensor([[1.0, 0.2, 0.2], [0.5, 0.5, 0.5]])
advantages = group_advantages(rewards)
assert advantages[1].tolist() == [0.0, 0.0, 0.0] and advantages[0, 0] > 0 > advantages[0, 1]
logp = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
mask = torch.arange(5) < torch.tensor([[5], [4], [3], [2], [1], [5]])
for algo in ALGOS:
    loss, _ = policy_loss(logp, logp.detach(), advantages.flatten(), mask, algo)
    loss.backward()
    weight = mask / mask.sum() if algo != "gspo" else mask / mask.sum(1, keepdim=True) / 6
    assert (logp.grad + advantages.flatten()[:, None] * weight).abs().max() < 1e-6
    logp.grad = None
print("copied")
"""


def test_the_loss_can_be_copied_out_with_torch_alone(tmp_path):
    """ALGOS, group_advantages and policy_loss as they stand in rl.py; with one update per rollout
    batch the gradient is minus the advantage times the weight of the token."""
    text = (ROOT / "rl.py").read_text()
    pieces = []
    for node in ast.parse(text).body:
        named = getattr(node, "name", None) or ast.unparse(getattr(node, "targets", [node])[0])
        if named in ("ALGOS", "group_advantages", "policy_loss"):
            pieces.append(ast.get_source_segment(text, node))
    script = ALONE.replace("PIECES", "\n\n".join(pieces))
    assert run_alone(tmp_path, [], script).strip() == "copied"
