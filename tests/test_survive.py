"""Run: pytest tests/test_survive.py     (1 = 2 = 4 processes, two nodes, kills, preemption, full
disks, hangs, memory,
golden losses, loggers; CPU only)

GOLDEN=write pytest tests/test_survive.py -k golden          writes tests/golden anew
"""

import fcntl
import io
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ONE, ROOT, SYSTEM, as_flags, noise, read_jsonl, stage, untimed, write_jsonl
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import runtime
from data import Example, encode_prompt, encode_response, order
from rows import set_attention
import sft

pytestmark = pytest.mark.slow
LIMIT = 120  # seconds for two processes on a busy machine; a hang would last an hour
GAME = {"prompts": 2, "rollouts": 4, "max-new-tokens": 24, "log-rollouts": 1}


# ---------------------------------------------------------------------------------------- processes
def flags_of(tiny, policy, out, script, **more):
    flags = {"ckpt": tiny.base if script == "sft" else policy, "data": getattr(tiny, script)}
    flags |= {"batch": 4, "lr": 1e-3} if script == "sft" else GAME | {"lr": 1e-4}
    flags |= {"disc-lr": 1e-3, "warmup-steps": 0} if script == "align" else {}
    flags |= {"out": out, "seed": 5} | {key.replace("_", "-"): more[key] for key in more}
    return [*map(str, as_flags(flags))]


def start(log, script, flags, processes=0, torchrun=("--standalone",), **environment):
    """A stage script as a user starts it, in a session of its own, its output in the file `log`."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={processes}"]
    environment = {key: str(value) for key, value in environment.items()}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with open(log, "w") as file:
        return subprocess.Popen([*command, str(ROOT / f"{script}.py"), *flags], env=environment,
                                stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def end(process, log, limit=180):
    """-> (exit status, output); a process that is not done in `limit` seconds is killed and fails
    the test."""
    try:
        return process.wait(limit), Path(log).read_text()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after {limit} s:\n{Path(log).read_text()[-3000:]}")


def ranks(tmp_path, script, flags, processes=2, limit=180, **environment):
    log = tmp_path / "log"
    return end(start(log, script, flags, processes, **environment), log, limit)


def two_nodes(tmp_path, script, flags):
    """Two torchrun agents with two processes each, as on two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    nodes = [
        start(tmp_path / f"log{i}", script, flags, 2, [*where, f"--node_rank={i}"]) for i in (0, 1)
    ]
    ends = [end(node, tmp_path / f"log{i}") for i, node in enumerate(nodes)]
    return max(status for status, _ in ends), ends[0][1]


def newest(out):
    """The step of the newest state in a folder, None where there is none."""
    return next((runtime.step_of(state) for state in runtime.find_states(out)), None)


def moments(out, work):
    """{parameter: Adam's running mean of its gradients} of a state: every gradient of the run has
    left its mark."""
    dcp_to_torch_save(runtime.find_states(out)[0], work)
    states = torch.load(work, weights_only=False)
    return {f"{part}.{name}": entry["exp_avg"] for part, state in states.items()
            for name, entry in state["optimizer"]["state"].items()}  # fmt: skip


# ------------------------------------------------------------------------------ 1 = 2 = 4 processes
SAME = {
    "sft": ("sft", {"batch": 8, "lr": 1e-5, "max-prompt": 62}),  # some rows are dropped
    "align": ("align", {"lr": 1e-6, "disc-lr": 1e-5, "warmup-steps": 1, "disc-updates": 2, "steps": 4}),
    "align, one prompt": ("align", {"lr": 1e-6, "disc-lr": 1e-5, "prompts": 1, "rollouts": 8}),
    "rl": ("rl", {"lr": 1e-6, "kl": 0.1, "updates-per-rollout": 2}),
    "dapo, one prompt": ("rl", {"lr": 1e-6, "algo": "dapo", "prompts": 1, "rollouts": 8, "overlong-buffer": 20,
                                 "max-gen-batches": 2}),
}  # fmt: skip


def assert_close(left, right, tolerance=1e-5):
    """Rows with the same texts, and numbers that differ by rounding."""
    for row, other in zip(left, right, strict=True):
        texts = {key: value for key, value in row.items() if isinstance(value, str | list)}
        assert texts == {key: other[key] for key in texts}
        numbers = [{key: r[key] for key in r if key not in texts} for r in (row, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", SAME)
def test_any_number_of_processes_gives_the_same(tiny, policy, tmp_path, name):
    """Five steps on 1, 2, 4 and (2 nodes x 2) processes, with other micro-batches each: losses,
    metrics, rollouts, advantages and gradients. On four processes a group spans two ranks, or all
    of them."""
    script, more = SAME[name]
    def flags(out, tokens):
        settings = {"steps": 5, "max-tokens": tokens} | more
        return flags_of(tiny, policy, tmp_path / out, script, **settings)
    assert stage(script, *flags("1", 16384)) == 0
    runs = {
        "2": lambda: ranks(tmp_path, script, flags("2", 300)),
        "4": lambda: ranks(tmp_path, script, flags("4", 1), 4),
    }
    if "one prompt" in name:
        del runs["2"]
    if name == "align":
        runs["nodes"] = lambda: two_nodes(tmp_path, script, flags("nodes", 200))
    first = untimed(read_jsonl(tmp_path / "1" / "metrics.jsonl"))
    expected = moments(tmp_path / "1", tmp_path / "1.pt")
    assert len(first) == 5 and any(row.get("grad_norm") for row in first)
    for out, run in runs.items():
        status, text = run()
        assert status == 0, text[-3000:]
        size, mesh = (4, "[2, 2]") if out == "nodes" else (int(out), f"[{out}]")
        said = re.findall(r"^(\d) processes, mesh (.*); --.*: (\d) on each$", text, re.M)
        assert said == [(str(size), mesh, str(8 // size))]
        assert_close(first, untimed(read_jsonl(tmp_path / out / "metrics.jsonl")))
        if script != "sft":
            rollouts = [read_jsonl(tmp_path / name / "rollouts.jsonl") for name in ("1", out)]
            assert_close(*rollouts)
        got = moments(tmp_path / out, tmp_path / f"{out}.pt")
        assert got.keys() == expected.keys()
        assert max((got[key] - expected[key]).abs().max() for key in got) <= 1e-5
        assert max(g.abs().max() for g in expected.values()) > 1e-3


# -------------------------------------------------------------------------------------------- kills
STRIKE = '''
"""Started by Python itself in every process of a test. Watches the main thread of rank STRIKE_RANK about once a millisecond,
lets it pass through the function STRIKE_IN STRIKE_PASS times, and strikes when it has seen it there STRIKE_AFTER times more."""
import ctypes, os, signal, sys, threading, time

class Broken(Exception):
    pass

def strike():
    main, inside = threading.main_thread().ident, False
    file, name = os.environ["STRIKE_IN"].split(":")
    passes, after = int(os.environ["STRIKE_PASS"]), int(os.environ["STRIKE_AFTER"])
    while after:
        time.sleep(0.0005)
        frame = sys._current_frames().get(main)
        while frame and not (frame.f_code.co_name == name and frame.f_code.co_filename.endswith(file)):
            frame = frame.f_back
        passes -= inside and frame is None
        inside = frame is not None
        after -= inside and passes <= 0
    if os.environ["STRIKE_WITH"] == "Broken":
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(Broken))
    else:
        os.kill(os.getpid(), getattr(signal, os.environ["STRIKE_WITH"]))

if os.environ.get("RANK", "0") == os.environ.get("STRIKE_RANK"):
    threading.Thread(target=strike, daemon=True).start()
'''
PHASES = {
    "sampling": "rollout.py:sample",
    "backward": "_tensor.py:backward",
    "saving": "runtime.py:save_state",
}


@pytest.fixture(scope="module")
def striker(tmp_path_factory):
    """-> environment(phase, passes, after, rank, strike) that makes a process strike itself."""
    folder = tmp_path_factory.mktemp("striker")
    (folder / "sitecustomize.py").write_text(STRIKE)
    return lambda phase, passes=0, after=1, rank=0, strike="SIGKILL": {
        "PYTHONPATH": folder, "STRIKE_IN": PHASES[phase], "STRIKE_PASS": passes, "STRIKE_AFTER": after, "STRIKE_RANK": rank,
        "STRIKE_WITH": strike,
    }  # fmt: skip


def assert_same_run(left, right, script):
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        rows = [untimed(read_jsonl(out / name)) for out in (left, right)]
        assert rows[0] == rows[1] and len(rows[0]) > 4, name
    for part in ("", "discriminator/") if script == "align" else ("",):
        weights = [load_file(out / f"{part}model.safetensors") for out in (left, right)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0] | weights[1])


@pytest.mark.parametrize("script", ["align", "rl"])
def test_a_run_killed_three_times_equals_an_unbroken_one(tiny, policy, tmp_path, striker, script):
    """Bitwise: every loss, reward, rollout and weight, also of the steps that were done twice."""
    steps, rng, found = 30, np.random.default_rng(7), []
    def flags(out):
        return flags_of(tiny, policy, tmp_path / out, script, steps=steps, save_every=2)
    assert stage(script, *flags("whole")) == 0
    for phase in PHASES:
        passes, after = int(rng.integers(3)) + (phase == "sampling"), int(rng.integers(1, 40))
        resumed, strike = ["--resume"] * any(found), striker(phase, passes, after)
        process = start(tmp_path / "log", script, flags("killed") + resumed, **strike)
        status, text = end(process, tmp_path / "log")
        assert status == -signal.SIGKILL, text[-3000:]
        found.append(newest(tmp_path / "killed"))
    known = [step for step in found if step]
    # a killed save leaves the state before it
    assert known == sorted(known) and 0 < known[-1] < steps
    assert stage(script, *flags("killed"), "--resume") == 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert_same_run(whole, killed, script)
    assert sorted(os.listdir(whole)) == sorted(os.listdir(killed))  # and nothing else is left


def test_two_processes_of_which_one_is_killed(tiny, policy, tmp_path, striker):
    """The other one ends as well, and soon; the resumed run is bitwise the unbroken one."""
    def flags(out):
        return flags_of(tiny, policy, tmp_path / out, "align", steps=12, save_every=2)
    status, text = ranks(tmp_path, "align", flags("whole"))
    assert status == 0, text[-3000:]
    for phase, passes, after, rank in [
        ("sampling", 3, 5, 0),
        ("saving", 1, 20, 1),
        ("backward", 2, 7, 1),
        ("saving", 1, 10, 0),
    ]:
        resumed = ["--resume"] * (newest(tmp_path / "killed") is not None)
        strike = striker(phase, passes, after, rank)
        status, text = ranks(tmp_path, "align", flags("killed") + resumed, limit=90, **strike)
        assert status not in (0, 2), text[-3000:]
    status, text = ranks(tmp_path, "align", flags("killed") + ["--resume"])
    assert status == 0 and "resumed after step" in text, text[-3000:]
    assert_same_run(tmp_path / "whole", tmp_path / "killed", "align")


@pytest.mark.parametrize("strike, ends_with", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_preempted_run_saves_and_continues(tiny, policy, tmp_path, striker, strike, ends_with):
    """SIGTERM, or Ctrl-C, in the middle of a step: the step is finished and saved, the status is
    143 or 130."""
    def flags(out):
        return flags_of(tiny, policy, tmp_path / out, "rl", steps=6, save_every=0)
    assert stage("rl", *flags("whole")) == 0
    for out, resumed in (("told", []), ("told", ["--resume"])):
        environment = striker("sampling", passes=1, strike=strike)
        process = start(tmp_path / "log", "rl", flags(out) + resumed, **environment)
        status, text = end(process, tmp_path / "log")
        step = len(read_jsonl(tmp_path / out / "metrics.jsonl"))
        assert status == ends_with, text[-3000:]
        assert f"{strike}: the state of step {step} is saved" in text
        assert newest(tmp_path / out) == step < 6 and "Traceback" not in text
    assert stage("rl", *flags("told"), "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "told", "rl")


def test_two_processes_of_which_one_is_told_to_stop(tiny, policy, tmp_path, striker):
    """They agree on the step; one process goes on from there, with the same numbers."""
    def flags(out):
        settings = {"steps": 5, "save_every": 0, "lr": 1e-6, "disc_lr": 1e-5}
        return flags_of(tiny, policy, tmp_path / out, "align", **settings)
    assert stage("align", *flags("whole")) == 0
    environment = striker("sampling", rank=1, strike="SIGTERM")
    status, text = ranks(tmp_path, "align", flags("told"), **environment)
    assert status != 0 and "exitcode  : 143" in text, text[-3000:]
    assert text.count("SIGTERM: the state of step 1 is saved") == 1
    assert newest(tmp_path / "told") == 1
    log = tmp_path / "log"
    status, text = end(start(log, "align", flags("told") + ["--resume"]), log)
    assert status == 0, text[-3000:]
    assert "resumed after step 1, saved by 2 processes: same data, same random numbers" in text
    logs = [untimed(read_jsonl(tmp_path / out / "metrics.jsonl")) for out in ("whole", "told")]
    assert_close(*logs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_the_signal_on(tiny, policy, tmp_path, number):
    log, out = tmp_path / "log", tmp_path / "out"
    process = start(log, "rl", flags_of(tiny, policy, out, "rl", steps=10**6, save_every=0), 2)
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)  # as a scheduler does, to torchrun alone
    status, text = end(process, log, 60)
    step, name = len(read_jsonl(out / "metrics.jsonl")), number.name
    assert status != 0, text[-3000:]
    assert text.count(f"{name}: the state of step {step} is saved") == 1
    assert newest(out) == step


# ----------------------------------------------------------------------------- two processes refuse
def refusal(tmp_path, flags):
    """Two processes that must end: the one line that they write."""
    status, text = ranks(tmp_path, "sft", flags, limit=LIMIT)
    lines = [line for line in text.splitlines() if line.startswith("sft.py: error: ")]
    assert status not in (0, None) and len(lines) == 1, text[-3000:]
    assert "Traceback (most" not in text.partition(lines[0])[0], text[-3000:]
    return lines[0]


def test_two_processes_refuse_alike(tiny, tmp_path):
    """A locked folder, another run's state, damaged states; of two states the damaged one is passed
    over."""
    out = tmp_path / "out"
    def flags(**more):
        return flags_of(tiny, None, out, "sft", **{"steps": 2, "save_every": 1, "keep": 2} | more)
    out.mkdir()
    with open(out / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is at work there" in refusal(tmp_path, flags())
    status, text = ranks(tmp_path, "sft", flags())
    assert status == 0, text[-3000:]
    assert "made with --seed 5, not 6" in refusal(tmp_path, flags(seed=6) + ["--resume"])
    assert "holds a finished run" in refusal(tmp_path, flags())
    shard = out / "state.2" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-4096] + bytes(4096))
    status, text = ranks(tmp_path, "sft", flags(steps=3) + ["--resume"])
    assert status == 0, text[-3000:]
    assert text.count(f"state.2 is damaged (__1_0.distcp): going back to {out}/state.1") == 1
    for state in runtime.find_states(out):
        os.remove(Path(state) / "__0_0.distcp")
    assert "no whole state is left" in refusal(tmp_path, flags(steps=3) + ["--resume"])


# ------------------------------------------------------------------------------------- write errors
@pytest.mark.parametrize("processes", [0, 2])
def test_a_full_disk_leaves_the_last_good_state(tiny, tmp_path, processes):
    """No file may grow beyond 64 KiB: the log goes on, the state cannot be written."""
    def flags(out, steps):
        return flags_of(tiny, None, tmp_path / out, "sft", steps=steps, save_every=2)
    assert stage("sft", *flags("whole", 4)) == 0
    assert stage("sft", *flags("full", 2)) == 0
    log = tmp_path / "log"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # inherited by the process that starts now
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        process = start(log, "sft", [*flags("full", 4), "--resume"], processes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    status, text = end(process, log)
    assert status == (1 if processes else 2), text[-3000:]
    assert "Traceback" not in text.partition("sft.py: error:")[0], text[-3000:]
    assert re.search(r"/full/state.new cannot be written, [0-9.]+ GB are free: ", text)
    assert newest(tmp_path / "full") == 2
    if not processes:
        assert stage("sft", *flags("full", 4), "--resume") == 0
        logs = [untimed(read_jsonl(tmp_path / out / "metrics.jsonl")) for out in ("whole", "full")]
        assert logs[0] == logs[1]


# ----------------------------------------------------------------------------------------- no hangs
def question(text, images=(), response=None):
    turns = [("system", SYSTEM), ("user", "<image>" * len(images) + text)]
    prompt = [{"role": role, "content": content} for role, content in turns]
    answer = "<caption>\n1 red circle\n</caption>\n<think>\nodd\n</think>\n<answer>\nodd\n</answer>"
    row = {"prompt": prompt, "images": list(images)}
    return row | {"response": response or answer, "answer": "odd"}


def by_rank(rows, seed=5):
    """The rows in the order that gives them to the ranks as listed, in the first epoch."""
    out = [None] * len(rows)
    for row, i in zip(rows, order(len(rows), seed)):
        out[i] = row
    return out


@pytest.fixture(scope="module")
def lopsided(tiny):
    """A checkpoint that answers `short` in the format and `long` with a word without end."""
    model = set_attention(runtime.load_policy(tiny.base), "sdpa")
    out, args = str(tiny.folder / "lopsided"), SimpleNamespace(max_tokens=10**6, ckpt=tiny.base)
    def encode(text):
        example = Example("x", question(text)["prompt"])
        return encode_prompt(example, tiny.tokenizer, tiny.image_processor)
    short = encode_response(question("short")["response"], tiny.tokenizer)
    word = encode_response("red", tiny.tokenizer)[:1]
    batch = [(encode("short"), short), (encode("long"), word * 200)]
    optimizer = runtime.make_optimizer(model, 3e-3, 0.0)
    for _ in range(60):
        sft.accumulate_gradient(model, batch, args, ONE)
        optimizer.step()
        optimizer.zero_grad()
    runtime.save(model, out, ONE, "sft", args, 60, {})
    return out


def game_on_two(tiny, ckpt, tmp_path, script, rows, **more):
    """Two steps on two processes -> (rows of metrics.jsonl, of rollouts.jsonl)."""
    out, data = tmp_path / script, write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = flags_of(tiny, ckpt, out, script, data=data, steps=2, **more)
    status, text = ranks(tmp_path, script, flags, limit=LIMIT)
    assert status == 0, text[-3000:]
    return read_jsonl(out / "metrics.jsonl"), read_jsonl(out / "rollouts.jsonl")


@pytest.mark.parametrize("script", ["sft", "align"])
def test_one_rank_holds_text_only_rows(tiny, policy, tmp_path, script):
    noise(np.random.default_rng(0), (64, 64)).save(tmp_path / "a.png")
    rows = [question("one", ["a.png"]), question("two", ["a.png"])]
    rows += [question("three"), question("four")]
    rows = by_rank(rows if script == "sft" else rows[1:3])  # a batch of four, or two prompts
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = flags_of(tiny, policy, tmp_path / "out", script, data=data, steps=2)
    status, text = ranks(tmp_path, script, flags, limit=LIMIT)
    assert status == 0, text[-3000:]
    learned = {"sft": "grad_norm", "align": "disc_grad_norm"}[script]
    assert all(row[learned] > 0 for row in read_jsonl(tmp_path / "out" / "metrics.jsonl"))


@pytest.mark.parametrize("script", ["align", "rl"])
def test_every_rollout_is_invalid(tiny, tmp_path, script):
    log, _ = game_on_two(tiny, tiny.base, tmp_path, script, [question("one"), question("two")])
    share = "valid" if script == "align" else "format"
    assert all(row[share] == 0 and "grad_norm" not in row for row in log)


def test_dynamic_sampling_keeps_nothing(tiny, tmp_path):
    rows, settings = [question("one"), question("two")], {"algo": "dapo", "max_gen_batches": 2}
    log, rows = game_on_two(tiny, tiny.base, tmp_path, "rl", rows, **settings)
    assert [(row["groups"], row["gen_batches"]) for row in log] == [(0, 2)] * 2 and rows == []


def test_several_updates_in_a_step_that_teaches_nothing(tiny, tmp_path):
    """Only the pass without a gradient runs then; it leaves the weights gathered, and the sampler's
    copy of them failed ('Parameter' object has no attribute 'full_tensor')."""
    for out, more in (("out", {"kl": 0.1}), ("plain", {})):
        settings = {"steps": 2, "updates_per_rollout": 2} | more
        flags = flags_of(tiny, tiny.base, tmp_path / out, "rl", **settings)
        status, text = ranks(tmp_path, "rl", flags, limit=LIMIT)
        assert status == 0, text[-3000:]
    assert "loss" not in read_jsonl(tmp_path / "plain" / "metrics.jsonl")[0]


@pytest.mark.parametrize("script", ["align", "rl"])
def test_rollouts_of_one_rank_are_far_longer(tiny, lopsided, tmp_path, script):
    """One rank samples, and with --kl trains, long after the other. In alignment all its rollouts
    are invalid, and all of the other one's valid."""
    more = {"max_new_tokens": 200, "max_tokens": 300, "temperature": 0.3}
    more |= {"kl": 0.1} if script == "rl" else {}
    rows = [question("long"), question("short")]
    log, rows = game_on_two(tiny, lopsided, tmp_path, script, rows, **more)
    lengths = [[row["finished"] for row in rows if row["step"] == step] for step in (1, 2)]
    assert all(sorted(step) == [False] * 4 + [True] * 4 for step in lengths)
    assert all(row["length"] > 100 for row in log)


def test_all_rows_of_one_rank_are_skipped(tiny, tmp_path):
    """Too long ones: the second half of each batch, which is the share of the second process."""
    rows = [question(f"{i}", response="red " * 300 if i % 4 > 1 else None) for i in range(12)]
    data = write_jsonl(tmp_path / "rows.jsonl", by_rank(rows))
    flags = flags_of(tiny, None, tmp_path / "out", "sft", data=data, steps=2, max_length=200)
    status, text = ranks(tmp_path, "sft", flags, limit=LIMIT)
    assert status == 0, text[-3000:]
    assert [row["dropped"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")][0] >= 2


@pytest.mark.parametrize("script", ["sft", "align", "rl"])
def test_a_picture_that_is_cut_leaves_its_batch_on_every_rank(tiny, policy, tmp_path, script):
    """Its header is fine, so the look lets it pass. The others are used as if nothing was, and one
    process and two do the same."""
    picture = io.BytesIO()
    noise(np.random.default_rng(0), (96, 96)).save(picture, "PNG")
    (tmp_path / "cut.png").write_bytes(picture.getvalue()[:2000])
    rows = []
    for i in range(4):
        rows.append(question(f"how many {i}?", [str(tmp_path / "cut.png")] if i == 2 else []))
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    logs = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = flags_of(tiny, policy, out, script, data=data, steps=4, max_bad=1)
        status, text = ranks(tmp_path, script, flags, processes=processes, limit=LIMIT)
        assert status == 0, text[-3000:]
        [skipped] = read_jsonl(out / "skipped.jsonl")
        assert skipped["row"] == 3 and "cannot be read" in skipped["reason"]
        logs.append(untimed(read_jsonl(out / "metrics.jsonl")))
        assert [metrics["bad"] for metrics in logs[-1]][-1] == 1
    assert_close(*logs, 1e-4)


def test_a_rank_that_raises_ends_the_others(tiny, policy, tmp_path, striker):
    """Within a minute, and what is read first is its own traceback."""
    began = time.time()
    flags = flags_of(tiny, policy, tmp_path / "out", "align", steps=10**6)
    environment = striker("backward", passes=3, rank=1, strike="Broken")
    status, text = ranks(tmp_path, "align", flags, limit=LIMIT, **environment)
    log = tmp_path / "out" / "metrics.jsonl"
    raised_at = log.stat().st_mtime if log.exists() else began
    assert time.time() - raised_at < 60
    first = text.partition("Traceback")[2].partition("Traceback")[0]
    assert status != 0 and "sitecustomize.Broken" in first and "align.py" in first, text[-3000:]


# ------------------------------------------------------------------------------------------- memory
def test_memory_does_not_grow(tiny, policy, tmp_path):
    """Resident memory of step 100 is within 5 % of that of step 20."""
    flags, seen = flags_of(tiny, policy, tmp_path / "out", "align", steps=102, save_every=10), {}
    process = start(tmp_path / "log", "align", flags)
    while process.poll() is None:
        time.sleep(0.02)
        log = tmp_path / "out" / "metrics.jsonl"
        step = log.read_text().count("\n") if log.exists() else 0
        if step in (20, 100) and step not in seen:
            pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
            seen[step] = int(pages) * os.sysconf("SC_PAGESIZE") / 2**20
    assert process.returncode == 0
    print(f"resident memory at step 20 and 100 in MiB: {seen[20]:.1f} {seen[100]:.1f}")
    assert abs(seen[100] / seen[20] - 1) < 0.05, seen


# ------------------------------------------------------------------------------------ golden losses
@pytest.mark.parametrize("script", ["sft", "align", "rl"])
def test_golden_losses(tiny, policy, tmp_path, script):
    """Ten steps of each stage as tests/golden has them, at full precision. One machine repeats them
    bitwise; another CPU rounds sums differently, which ten steps amplify: to 2e-4 where all vector
    instructions were switched off."""
    golden = ROOT / "tests" / "golden" / f"{script}.jsonl"
    assert stage(script, *flags_of(tiny, policy, tmp_path, script, steps=10)) == 0
    rows = untimed(read_jsonl(tmp_path / "metrics.jsonl"))
    if os.environ.get("GOLDEN") == "write":
        write_jsonl(golden, rows)
    assert_close(read_jsonl(golden), rows, 1e-3)


# ------------------------------------------------------------------------------------------ loggers
WANDB = '''
"""Records what it is asked to do."""
import json, os

def note(**what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")

def init(project, id, resume, dir, config):
    note(call="init", id=id, steps=config["steps"])
    return type("Run", (), {"log": staticmethod(lambda row, step: note(call="log", step=step, loss=row["loss"]))})

def finish(exit_code):
    note(call="finish", status=exit_code)
'''


def test_wandb_is_told_every_step_once_more_after_resume(tiny, tmp_path):
    """Through torchrun, whose own parser reads the flags of the script first."""
    (tmp_path / "wandb.py").write_text(WANDB)
    environment = {"PYTHONPATH": tmp_path, "NOTES": tmp_path / "notes"}
    for steps, resumed in ((2, []), (3, ["--resume"])):
        settings = {"steps": steps, "logger": "wandb", "keep": 2}
        flags = flags_of(tiny, None, tmp_path / "out", "sft", **settings) + resumed
        status, text = ranks(tmp_path, "sft", flags, 1, **environment)
        assert status == 0, text[-3000:]
    notes, log = read_jsonl(tmp_path / "notes"), read_jsonl(tmp_path / "out" / "metrics.jsonl")
    calls = " ".join(note["call"] for note in notes)
    assert calls == "init log log finish init log finish"
    assert notes[0]["id"] == notes[4]["id"] and (notes[0]["steps"], notes[4]["steps"]) == (2, 3)
    told = [(note["step"], note["loss"]) for note in notes if note["call"] == "log"]
    assert told == [(row["step"], row["loss"]) for row in log]
    assert {note["status"] for note in notes if note["call"] == "finish"} == {0}


@pytest.mark.parametrize("logger, package", [("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_a_logger_that_is_not_installed(tiny, tmp_path, logger, package):
    (tmp_path / package).mkdir()
    why = f"No module named {package}"
    (tmp_path / package / "__init__.py").write_text(f"raise ImportError({why!r})")
    flags, log = flags_of(tiny, None, tmp_path / "out", "sft", logger=logger), tmp_path / "log"
    status, text = end(start(log, "sft", flags, PYTHONPATH=tmp_path), log)
    assert status == 2
    assert text == f"sft.py: error: --logger {logger}: {why}; pip install {logger}\n"


def test_without_the_flag_no_logger_is_imported(tiny, tmp_path):
    code = "import sys, sft, align, rl; print([m for m in ('wandb', 'tensorboard') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
