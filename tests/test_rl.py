"""Run: pytest tests/test_rl.py   (advantages, policy loss, normalisation, dynamic sampling; CPU)"""

import argparse
import ast
import math
import shutil

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
    stage,
    stock_logprobs,
    untimed,
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
