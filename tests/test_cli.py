"""Run: pytest tests/test_cli.py     (the scripts as a user starts them: one and two processes, bad
input; CPU only)"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, as_flags, launch, read_jsonl, run_stage, stage, untimed
from safetensors.torch import load_file

import rollout

SFT = {
    "batch": 6,
    "lr": 1e-3,
    "max-tokens": 200,
    "max-prompt": 62,
}  # packs differ between ranks; some rows are dropped
DAPO = {"algo": "dapo", "overlong-buffer": 20, "max-gen-batches": 1}
ADVERSARY = {"disc-lr": 1e-3, "disc-updates": 2}
GAME = {"max-new-tokens": 24, "lr": 1e-4, "max-tokens": 200, "log-rollouts": 1}

# name: script, checkpoint, data, flags
RUNS = {
    "sft": ("sft", "base", "sft", SFT),
    "align": (
        "align",
        "policy",
        "align",
        GAME | {"prompts": 2, "rollouts": 3, "disc-lr": 1e-3, "warmup-steps": 1},
    ),
    "align, a group over both": (
        "align",
        "policy",
        "align",
        GAME | ADVERSARY | {"prompts": 1, "rollouts": 4},
    ),
    "grpo, a group over both": (
        "rl",
        "policy",
        "rl",
        GAME | {"prompts": 1, "rollouts": 4, "kl": 0.1},
    ),
    "grpo, two updates": (
        "rl",
        "policy",
        "rl",
        GAME | {"prompts": 2, "rollouts": 4, "updates-per-rollout": 2},
    ),
    "dapo": ("rl", "policy", "rl", GAME | DAPO | {"prompts": 2, "rollouts": 2}),
    "gspo": (
        "rl",
        "policy",
        "rl",
        GAME | {"algo": "gspo", "prompts": 4, "rollouts": 3, "updates-per-rollout": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_log_what_one_logs(tiny, policy, tmp_path, name):
    """Same seed, same global batch: same losses, rewards, scores, lengths, weights; under FSDP2 on
    two ranks as on one."""
    script, ckpt, data, more = RUNS[name]
    flags = {"ckpt": {"base": tiny.base, "policy": policy}[ckpt], "data": getattr(tiny, data)}
    flags = as_flags(flags | {"steps": 3, "seed": 5} | more)
    assert stage(script, *flags, "--out", tmp_path / "one") == 0
    run_stage(script, [*flags, "--out", tmp_path / "two"], 2)
    one, two = (untimed(read_jsonl(tmp_path / out / "metrics.jsonl")) for out in ("one", "two"))
    assert len(one) == len(two) >= 3
    for left, right in zip(one, two):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)
    assert any(row.get("grad_norm") for row in one)  # something was learned
    if script != "sft":
        one, two = (read_jsonl(tmp_path / out / "rollouts.jsonl") for out in ("one", "two"))
        assert [(row["id"], row["response"]) for row in one] == [
            (row["id"], row["response"]) for row in two
        ]
    for part in ("", "discriminator/") if script == "align" else ("",):
        weights = [load_file(tmp_path / out / f"{part}model.safetensors") for out in ("one", "two")]
        assert weights[0].keys() == weights[1].keys()
        assert all((weights[0][key] - weights[1][key]).abs().max() < 5e-3 for key in weights[0])


def test_two_processes_resume_what_one_began(tiny, policy, tmp_path):
    """A state is not bound to the number of processes that wrote it."""
    flags = {"ckpt": policy, "data": tiny.rl, "prompts": 2, "rollouts": 4, "kl": 0.1}
    flags = as_flags(flags | GAME)
    assert stage("rl", *flags, "--out", tmp_path / "whole", "--steps", 3) == 0
    assert stage("rl", *flags, "--out", tmp_path / "broken", "--steps", 1) == 0
    run_stage("rl", [*flags, "--out", tmp_path / "broken", "--steps", 3, "--resume"], 2)
    whole, broken = (
        untimed(read_jsonl(tmp_path / out / "metrics.jsonl")) for out in ("whole", "broken")
    )
    assert len(whole) == len(broken) == 3
    for left, right in zip(whole, broken):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


# ---------------------------------------------------------------------------------------- bad input
def jsonl(tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    return tmp_path / "data.jsonl"


def with_row(tiny, tmp_path, numbers, **columns):
    """A data file of which the rows of these numbers (from 1) have other columns; None: the column
    is missing."""
    rows = [
        dict(row, images=[str(tiny.folder / path) for path in row["images"]])
        for row in tiny.examples["sft"]
    ]
    for number in numbers:
        rows[number - 1] = {
            key: value for key, value in (rows[number - 1] | columns).items() if value is not None
        }
    return jsonl(tmp_path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def folder(tmp_path, tiny, *names):
    path = tmp_path / "ckpt"
    path.mkdir()
    for name in names:
        (path / name).write_bytes((Path(tiny.base) / name).read_bytes())
    return path


def with_cut_weights(tmp_path, tiny):
    path = folder(tmp_path, tiny, *os.listdir(tiny.base))
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000])
    return path


def a_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


def splits(tmp_path):
    """A folder as a clone of a data set leaves it."""
    for name in ("train", "test"):
        (tmp_path / "clone").mkdir(exist_ok=True)
        (tmp_path / "clone" / f"{name}.jsonl").write_bytes(FINE)
    return tmp_path / "clone"


ALL = ("sft", "align", "rl")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"
TOOLS = [{"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "x"}]
RESPONSE = "<caption>c</caption><think>t</think><answer>1</answer>"
FINE = (
    json.dumps({"prompt": "x", "response": RESPONSE, "answer": "1"}).encode() + b"\n"
)  # a row that every stage takes
EVERY = range(1, 25)
# name: stages, flag, its value from (tiny, tmp_path), words that the line must hold
BAD = {
    "no --ckpt": (ALL, "ckpt", lambda t, p: None, "--ckpt"),
    "missing --ckpt folder": (ALL, "ckpt", lambda t, p: p / "nowhere", "--ckpt .*nowhere"),
    "--ckpt is empty": (ALL, "ckpt", lambda t, p: folder(p, t), "--ckpt .*config.json"),
    "--ckpt has no weights": (ALL, "ckpt", lambda t, p: folder(p, t, "config.json", "tokenizer.json"), "--ckpt .*weights"),
    "--ckpt has no tokenizer": (ALL, "ckpt", lambda t, p: folder(p, t, "config.json", "model.safetensors"), "--ckpt "),
    "--ckpt has cut weights": (ALL, "ckpt", lambda t, p: with_cut_weights(p, t), "--ckpt "),
    "missing data": (ALL, "data", lambda t, p: p / "no.jsonl", "no.jsonl"),
    "empty data": (ALL, "data", lambda t, p: jsonl(p, b""), "data.jsonl.* empty"),
    "blank data": (ALL, "data", lambda t, p: jsonl(p, b"\n\n"), "data.jsonl.* empty"),
    "not JSON at line 3": (ALL, "data", lambda t, p: jsonl(p, FINE + b'\n{"prompt"\n'), "data.jsonl:3"),
    "no object at line 2": (ALL, "data", lambda t, p: jsonl(p, FINE + b"[1]\n"), "data.jsonl:2"),
    "bytes at line 2": (ALL, "data", lambda t, p: jsonl(p, FINE + b"\xff\xfe\n"), "data.jsonl:2"),
    "no column of a prompt": (ALL, "data", lambda t, p: jsonl(p, b'{"text": "x"}\n'), "data.jsonl:1.*prompt.*found text"),
    "row 2 has no prompt": (ALL, "data", lambda t, p: with_row(t, p, [2], prompt=None), "data.jsonl:2.*prompt"),
    "row 2 has no turns": (ALL, "data", lambda t, p: with_row(t, p, [2], prompt=["x"]), "data.jsonl:2"),
    "no responses": (["sft"], "data", lambda t, p: with_row(t, p, EVERY, response=None), "data.jsonl.* response"),
    "row 2 has no response": (["sft"], "data", lambda t, p: with_row(t, p, [2], response=None), "data.jsonl:2.* response"),
    "no teacher": (["align"], "data", lambda t, p: with_row(t, p, EVERY, response="y"), "data.jsonl.* teacher"),
    "no answers": (["rl"], "data", lambda t, p: with_row(t, p, EVERY, answer=None), "data.jsonl.* answer"),
    "row 2 has no answer": (["rl"], "data", lambda t, p: with_row(t, p, [2], answer=None), "data.jsonl:2.* answer"),
    "row 1: image missing": (ALL, "data", lambda t, p: with_row(t, p, [1], images=["gone.png"]), "data.jsonl:1.*gone.png"),
    "row 3: image missing": (ALL, "data", lambda t, p: with_row(t, p, [3], images=["gone.png"]), "data.jsonl:3.*gone.png"),
    "no images": (ALL, "data", lambda t, p: with_row(t, p, EVERY, images=["data.jsonl"] * 2), "data.jsonl:.* image"),
    "three images for two places": (
        ALL, "data", lambda t, p: with_row(t, p, EVERY, prompt="<image><image>", images=["data.jsonl"] * 3),
        "data.jsonl:.* 2 <image>.* 3 images",
    ),
    "flash attention on a CPU": (ALL, "attn", lambda t, p: "flash", "--attn flash .*CUDA"),
    "unknown --attn": (ALL, "attn", lambda t, p: "flex", "--attn.*flex.*auto"),
    "a batch of nothing": (["sft"], "batch", lambda t, p: 0, "argument --batch: 0: must be at least 1"),
    "no prompts": (["align", "rl"], "prompts", lambda t, p: 0, "argument --prompts: 0: must be at least 1"),
    "unknown --algo": (["rl"], "algo", lambda t, p: "ppo", "--algo.*ppo.*grpo.*dapo.*gspo"),
    "unknown flag": (ALL, "bacth", lambda t, p: 3, "--bacth"),
    "no number": (ALL, "lr", lambda t, p: "fast", "argument --lr: fast is no number"),
    "updates do not divide": (["rl"], "updates-per-rollout", lambda t, p: 3, "--updates-per-rollout 3 .*--prompts 2"),
    "nothing to resume": (ALL, "resume", lambda t, p: "", "--resume.*state"),
    "--out is a file": (ALL, "out", lambda t, p: a_file(p, "file", b"x"), "--out .*file"),
    "missing --system-prompt": (ALL, "system-prompt", lambda t, p: p / "gone.txt", "--system-prompt .*gone.txt"),
    "negative seed": (ALL, "seed", lambda t, p: -1, "argument --seed: -1: must be at least 0"),
    "learning rate that is no number": (ALL, "lr", lambda t, p: "nan", "argument --lr: nan is not finite"),
    "no temperature": (["align", "rl"], "temperature", lambda t, p: 0, "argument --temperature: 0: must be at least 0.001"),
    "no new tokens": (["align", "rl"], "max-new-tokens", lambda t, p: 0, "argument --max-new-tokens: 0: must be at least 1"),
    "alpha above 1": (["align"], "alpha", lambda t, p: 7, "argument --alpha: 7: must be at most 1"),
    "--kl below 0": (["rl"], "kl", lambda t, p: -1, "argument --kl: -1: must be at least 0"),
    "--kl is no number": (["rl"], "kl", lambda t, p: "nan", "argument --kl: nan is not finite"),
    "--kl without end": (["rl"], "kl", lambda t, p: "inf", "argument --kl: inf is not finite"),
    "--overlong-buffer below 0": (["rl"], "overlong-buffer", lambda t, p: -1, "argument --overlong-buffer: -1: must"),
    "--lr-warmup below 0": (["rl"], "lr-warmup", lambda t, p: -1, "argument --lr-warmup: -1: must be at least 0"),
    "--invalid-penalty below 0": (["align"], "invalid-penalty", lambda t, p: -1, "argument --invalid-penalty: -1: must"),
    "--invalid-penalty is no number": (["align"], "invalid-penalty", lambda t, p: "nan", "argument --invalid-penalty: nan"),
    "--std-floor below 0": (["align"], "std-floor", lambda t, p: -0.1, "argument --std-floor: -0.1: must be at least 0"),
    "--score-l2 below 0": (["align"], "score-l2", lambda t, p: -1, "argument --score-l2: -1: must be at least 0"),
    "--log-rollouts below 0": (["align", "rl"], "log-rollouts", lambda t, p: -1, "argument --log-rollouts: -1: must"),
    "--weight-decay below 0": (ALL, "weight-decay", lambda t, p: -1, "argument --weight-decay: -1: must be at least 0"),
    "--weight-decay without end": (ALL, "weight-decay", lambda t, p: "inf", "argument --weight-decay: inf is not finite"),
    "--weight-decay above 1": (ALL, "weight-decay", lambda t, p: 7, "argument --weight-decay: 7: must be at most 1"),
    "a learning rate above 1": (ALL, "lr", lambda t, p: "1e30", "argument --lr: 1e30: must be at most 1"),
    "--disc-lr above 1": (["align"], "disc-lr", lambda t, p: "1e30", "argument --disc-lr: 1e30: must be at most 1"),
    "--clip 0": (ALL, "clip", lambda t, p: 0, "argument --clip: 0: must be above 0"),
    "--keep 0": (ALL, "keep", lambda t, p: 0, "argument --keep: 0: must be at least 1"),
    "a seed of no integer": (ALL, "seed", lambda t, p: 0.5, "argument --seed: 0.5 is no integer"),
    "--system-prompt is a folder": (ALL, "system-prompt", lambda t, p: p, "--system-prompt .*"),
    "--overlong-buffer is the limit": (["rl"], "overlong-buffer", lambda t, p: 4, "--overlong-buffer 4 .*--max-new-tokens 4"),
    "--lr without end": (ALL, "lr", lambda t, p: "inf", "argument --lr: inf is not finite"),
    "--temperature is no number": (["align", "rl"], "temperature", lambda t, p: "nan", "argument --temperature: nan is not"),
    "--max-bad above 1": (ALL, "max-bad", lambda t, p: 2, "argument --max-bad: 2: must be at most 1"),
    "--max-prompt 0": (ALL, "max-prompt", lambda t, p: 0, "argument --max-prompt: 0: must be at least 1"),
    "--max-pixels 0": (ALL, "max-pixels", lambda t, p: 0, "argument --max-pixels: 0: must be at least 1"),
    "--max-tokens 0": (ALL, "max-tokens", lambda t, p: 0, "argument --max-tokens: 0: must be at least 1"),
    "--save-every below 0": (ALL, "save-every", lambda t, p: -1, "argument --save-every: -1: must be at least 0"),
    "--steps below 0": (ALL, "steps", lambda t, p: -1, "argument --steps: -1: must be at least 0"),
    "--epochs 0": (["sft"], "epochs", lambda t, p: 0, "argument --epochs: 0: must be above 0"),
    "--warmup above 1": (["sft"], "warmup", lambda t, p: 2, "argument --warmup: 2: must be at most 1"),
    "--max-length 0": (["sft"], "max-length", lambda t, p: 0, "argument --max-length: 0: must be at least 1"),
    "--rollouts 0": (["align", "rl"], "rollouts", lambda t, p: 0, "argument --rollouts: 0: must be at least 1"),
    "--slots 0": (["align", "rl"], "slots", lambda t, p: 0, "argument --slots: 0: must be at least 1"),
    "--disc-updates 0": (["align"], "disc-updates", lambda t, p: 0, "argument --disc-updates: 0: must be at least 1"),
    "--warmup-steps below 0": (["align"], "warmup-steps", lambda t, p: -1, "argument --warmup-steps: -1: must"),
    "--max-gen-batches 0": (["rl"], "max-gen-batches", lambda t, p: 0, "argument --max-gen-batches: 0: must"),
    "no updates": (["rl"], "updates-per-rollout", lambda t, p: 0, "argument --updates-per-rollout: 0: must be at least 1"),
    "--split of a file": (ALL, "split", lambda t, p: "test", "--split test: .*jsonl is a file"),
    "weights that are none": (ALL, "data", lambda t, p: f"{jsonl(p, FINE)}:-1", "--data .*: give every source a weight above 0"),
    "several splits": (ALL, "data", lambda t, p: splits(p), "holds test, train; choose one with --split"),
    "--system-prompt is no text": (ALL, "system-prompt", lambda t, p: a_file(p, "s.txt", b"\xff"), "--system-prompt .*s.txt"),
    "--out in --ckpt": (ALL, "out", lambda t, p: Path(t.base) / "out", "--out .*base/out is, holds or lies in --ckpt"),
    "--out around --data": (ALL, "out", lambda t, p: t.folder, "--out .* is, holds or lies in --ckpt|--data"),
    "--out in --disc": (["align"], "disc", lambda t, p: p, "--out .*out is, holds or lies in --disc"),
    "no --disc": (["align"], "disc", lambda t, p: p / "nowhere", "--disc .*nowhere: no such folder"),
    "--disc is empty": (["align"], "disc", lambda t, p: folder(p, t), "--disc .*config.json"),
    "--disc has no weights": (["align"], "disc", lambda t, p: folder(p, t, *TOKENIZER, "config.json"), "--disc .*weights"),
    "--disc has cut weights": (["align"], "disc", lambda t, p: with_cut_weights(p, t), "--disc .*model.safetensors"),
    "data are a pointer": (ALL, "data", lambda t, p: jsonl(p, LFS), "data.jsonl: a Git-LFS pointer"),
    "row 2 is a video": (ALL, "data", lambda t, p: with_row(t, p, [2], videos=["a"]), "data.jsonl:2: .*column videos"),
    "row 2 is a sound": (ALL, "data", lambda t, p: with_row(t, p, [2], audio="a"), "data.jsonl:2: .*column audio"),
    "row 2 has tools": (ALL, "data", lambda t, p: with_row(t, p, [2], prompt=TOOLS), "data.jsonl:2: .*tool_calls"),
    "row 2 has another role": (ALL, "data", lambda t, p: with_row(t, p, [2], prompt=TOOLS[1:]), "data.jsonl:2: .*role tool"),
    "row 2 is a cut chat": (ALL, "data", lambda t, p: with_row(t, p, [2], prompt='[{"role": "u'), "data.jsonl:2: .*not JSON"),
    "row 2 has a dict as answer": (ALL, "data", lambda t, p: with_row(t, p, [2], answer={"a": 1}), "data.jsonl:2: .*not dict"),
    "row 2 has half a character": (ALL, "data", lambda t, p: with_row(t, p, [2], answer="\ud800"), "data.jsonl:2: .*UTF-8"),
    "row 2 has an empty gold": (["rl"], "data", lambda t, p: with_row(t, p, [2], answer="\\boxed{ }"), "data.jsonl:2: .*answer"),
    "row 2 is no picture": (ALL, "data", lambda t, p: with_row(t, p, [2], images=["data.jsonl"]), "data.jsonl:2: .*image"),
    "row 2 is garbage": (ALL, "data", lambda t, p: with_row(t, p, [2], prompt=[{"\b" * 9999: 1}]), "data.jsonl:2: [ -~]{,400}$"),
    "every prompt too long": (ALL, "max-prompt", lambda t, p: 3, "--max-prompt"),
}  # fmt: skip
CASES = [(name, script) for name, (scripts, *_) in BAD.items() for script in scripts]


def bad_flags(tiny, tmp_path, script, name):
    flags = {"ckpt": tiny.base, "data": getattr(tiny, script), "out": tmp_path / "out", "steps": 1}
    game = {"prompts": 2, "rollouts": 2, "max-new-tokens": 4}
    flags |= {"batch": 24} if script == "sft" else game
    if name.startswith("row"):  # otherwise one bad row of 24 is skipped
        flags["bad-rows"] = "stop"
    _, flag, value, _ = BAD[name]
    flags[flag] = value(tiny, tmp_path)
    given = {name: value for name, value in flags.items() if value is not None}
    return [part for part in as_flags(given) if part != ""]


def assert_one_clear_line(script, error, words, out):
    lines = error.splitlines()
    assert len(lines) == 1 and re.match(f"{script}.py: error: .*{words}", lines[0]), error
    assert not out.is_dir()  # nothing half-written


@pytest.mark.parametrize("name, script", CASES)
def test_bad_input_is_one_clear_line(tiny, tmp_path, capfd, name, script):
    flags = bad_flags(tiny, tmp_path, script, name)
    capfd.readouterr()
    assert stage(script, *flags) == 2
    assert_one_clear_line(script, capfd.readouterr().err, BAD[name][3], tmp_path / "out")


@pytest.mark.parametrize("name, script", [
    ("not JSON at line 3", "sft"), ("--ckpt has no weights", "align"), ("unknown --algo", "rl")
])  # fmt: skip
def test_bad_input_of_a_real_script(tiny, tmp_path, name, script):
    result = launch(f"{script}.py", *bad_flags(tiny, tmp_path, script, name))
    assert result.returncode == 2 and result.stdout == ""
    assert_one_clear_line(script, result.stderr, BAD[name][3], tmp_path / "out")


@pytest.mark.parametrize("script, flags, words", [
    ("sft", ["--batch", "3"], "--batch.* 3 .*2 processes"),
    ("align", ["--prompts", "1", "--rollouts", "3"], "--prompts.* 3 .*2 processes"),
    ("rl", ["--prompts", "3", "--rollouts", "5"], "--prompts.* 15 .*2 processes"),
])  # fmt: skip
def test_a_batch_that_the_processes_do_not_divide(
    tiny, tmp_path, capfd, monkeypatch, script, flags, words
):
    """Every flag that the line names must exist."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {"ckpt": tiny.base, "data": getattr(tiny, script), "out": tmp_path / "out"}
    assert stage(script, *as_flags(given), *flags) == 2
    error = capfd.readouterr().err
    assert_one_clear_line(script, error, words, tmp_path / "out")
    stage(script, "--help")
    assert set(re.findall(r"--[a-z-]+", error)) <= set(
        re.findall(r"--[a-z-]+", capfd.readouterr().out)
    )


@pytest.mark.parametrize("flags, words", [(["--batch", 3], "--batch = 3 is not"), (["--sede", 3], "unrecognized")])
def test_under_torchrun_the_line_appears_once(tiny, tmp_path, monkeypatch, flags, words):
    """Also where the first rank, which says it, comes last: torchrun ends all when one is gone."""
    late = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(0.5)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ["--ckpt", tiny.base, "--data", tiny.sft, "--out", tmp_path / "out", *flags]
    result = launch("sft.py", *flags, processes=2)
    assert result.returncode != 0 and result.stderr.count(f"sft.py: error: {words}") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name, script", [
    ("missing data", "rl"), ("--ckpt has cut weights", "sft"), ("no teacher", "align"), ("row 2 is a video", "rl"),
    ("--disc has no weights", "align"),
])  # fmt: skip
def test_two_processes_refuse_bad_input(tiny, tmp_path, name, script):
    """Whatever is wrong, it is said once, and no process waits for another."""
    result = launch(f"{script}.py", *bad_flags(tiny, tmp_path, script, name), processes=2)
    lines = [line for line in result.stderr.splitlines() if f"{script}.py: error: " in line]
    assert result.returncode != 0 and len(set(lines)) == 1, result.stderr[-3000:]
    assert re.match(f"{script}.py: error: .*{BAD[name][3]}", lines[0])
    assert "Traceback" not in result.stderr.partition(lines[0])[0] and not (tmp_path / "out").is_dir()


def test_a_bad_row_on_one_rank_ends_all(tiny, tmp_path):
    """Only the rank that draws the row sees it; the others must not wait for it in a collective for
    ever."""
    data = with_row(tiny, tmp_path, [4], images=[a_file(tmp_path, "a.png", b"text")] * 2)
    flags = {"ckpt": tiny.base, "data": data, "batch": 24, "steps": 1, "out": tmp_path / "out"}
    result = launch("sft.py", *as_flags(flags | {"bad-rows": "stop"}), processes=2)
    assert result.returncode != 0 and result.stderr.count("sft.py: error: ") == 1
    assert re.search(r"sft.py: error: .*data.jsonl:4: image cannot be read", result.stderr)


# ---------------------------------------------------------------------------------------------------- the identity of a run
@pytest.fixture(scope="module")
def begun(tiny, policy, tmp_path_factory):
    """{script: flags of a run of one step that was done}"""
    runs = {}
    for script in ("align", "rl"):
        out = tmp_path_factory.mktemp(script) / "out"
        flags = {"ckpt": policy, "data": getattr(tiny, script), "prompts": 2, "rollouts": 2, "max-new-tokens": 4, "out": out}
        runs[script] = flags | {"steps": 1}
        assert stage(script, *as_flags(runs[script])) == 0
    return runs


@pytest.mark.parametrize("script, flag, value, words", [
    ("rl", "algo", "gspo", "--algo grpo, not gspo"), ("rl", "temperature", 0.5, "--temperature 1.0, not 0.5"),
    ("rl", "rollouts", 4, "--rollouts 2, not 4"), ("rl", "prompts", 4, "--prompts 2, not 4"),
    ("rl", "kl", 0.1, "--kl 0.0, not 0.1"), ("rl", "updates-per-rollout", 2, "--updates-per-rollout 1, not 2"),
    ("rl", "max-new-tokens", 8, "--max-new-tokens 4, not 8"), ("rl", "lr-warmup", 3, "--lr-warmup 0, not 3"),
    ("rl", "data", "ALIGN", "--data .*, not "), ("rl", "ckpt", "BASE", "--ckpt .*, not "),
    ("rl", "max-prompt", 900, "--max-prompt 2048, not 900"), ("rl", "max-pixels", 4096, "--max-pixels None, not 4096"),
    ("align", "alpha", 0.1, "--alpha 0.5, not 0.1"), ("align", "normalize", "combined", "--normalize per-expert, not"),
    ("align", "disc-lr", 0.1, "--disc-lr 1e-06, not 0.1"), ("align", "disc", "BASE", "--disc None, not content "),
    ("align", "warmup-steps", 1, "--warmup-steps 0, not 1"), ("align", "std-floor", 1, "--std-floor 0.1, not 1.0"),
    ("align", "invalid-penalty", 0, "--invalid-penalty 1.5, not 0.0"), ("align", "score-l2", 0, "--score-l2 0.001, not 0.0"),
])  # fmt: skip
def test_resume_of_another_run_names_what_differs(tiny, begun, capfd, script, flag, value, words):
    flags = begun[script] | {"steps": 2, flag: {"ALIGN": tiny.align, "BASE": tiny.base}.get(value, value)}
    out = begun[script]["out"]
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capfd.readouterr()
    assert stage(script, *as_flags(flags), "--resume") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(f"{script}.py: error: --resume: the state was made with {words}", line) and "may differ" in line
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


# ------------------------------------------------------------------------------------------------- runs that cannot work
WORKLESS = {  # name: script, checkpoint, change of every row, flags, words of the warning
    "no format": ("rl", "base", {}, {}, "no response had the three blocks: is --ckpt trained on them"),
    "no right answer": ("rl", "policy", {"answer": "17"}, {"max-new-tokens": 40}, "no answer was right: .*the gold in the form"),
    "equal rewards": ("rl", "base", {}, {}, "all rewards in each group were equal"),
    "none valid": ("align", "base", {}, {}, "no rollout was valid, .*is --max-new-tokens too small"),
}


@pytest.mark.parametrize("name", WORKLESS)
def test_a_run_that_cannot_work_says_so_once(tiny, policy, tmp_path, capfd, name):
    """After ten steps: what is wrong, the likely cause, and a response; the first example is shown with its gold."""
    script, ckpt, change, more, words = WORKLESS[name]
    data = with_row(tiny, tmp_path, EVERY, **change)
    flags = {"ckpt": {"base": tiny.base, "policy": policy}[ckpt], "data": data, "steps": 12, "prompts": 1, "rollouts": 2}
    flags |= {"max-new-tokens": 4, "save-every": 0, "out": tmp_path / "out"} | more
    assert stage(script, *as_flags(flags)) == 0
    text = capfd.readouterr().out
    assert len(re.findall(f"^warning: 10 steps in a row {words}.*; a response: .+$", text, re.M)) == 1
    step = text.index("step 10 ")
    assert step < text.index("warning: ") < text.index("step 11 ")
    assert re.search(r"--- step 0, first rollout\n(.*\n)+gold (even|odd|17), ", text)


@pytest.mark.parametrize("response, count", [("yes", 1), (RESPONSE, 0)])
def test_demonstrations_that_are_not_what_the_prompt_asks_for(tiny, tmp_path, capfd, response, count):
    system = [{"role": "system", "content": "Write <caption>, <think> and <answer>."}, {"role": "user", "content": "?"}]
    data = with_row(tiny, tmp_path, EVERY, prompt=system, images=[], response=response)
    assert stage("sft", "--ckpt", tiny.base, "--data", data, "--batch", 2, "--steps", 1, "--out", tmp_path / "out") == 0
    text = capfd.readouterr().out
    assert text.count("warning: 24 of the first 24 responses lack the blocks") == count
    assert text.find("warning") < text.index("step 1 ") and ("data.jsonl:1" in text) == count


DEFAULTS = {  # the published settings
    "sft": {"lr": 1e-5, "epochs": 1.0, "warmup": 0.1, "steps": None},
    "align": {"steps": 500, "prompts": 4, "n": 16, "temperature": 1.0, "lr": 1e-6, "disc_lr": 1e-6, "disc_updates": 1,
              "warmup_steps": None, "warmup_disc_lr": 1e-5,
              "alpha": 0.5, "normalize": "per-expert", "invalid_penalty": 1.5, "score_l2": 1e-3},
    "rl": {"steps": 1500, "prompts": 32, "n": 16, "algo": "grpo", "updates_per_rollout": 1, "kl": 0.0, "max_gen_batches": 10},
}  # fmt: skip


@pytest.mark.parametrize("script", ALL)
def test_only_the_checkpoint_has_to_be_given(monkeypatch, capsys, script):
    """--ckpt alone runs the paper's settings, and --help gives the command line."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--ckpt", "x"])
    args = vars(importlib.import_module(script).parse_args())
    assert {key: args[key] for key in DEFAULTS[script]} == DEFAULTS[script]
    assert args["data"][0].startswith("prism-vlm/") and args["out"] == f"{script}_out"
    assert stage(script, "--help") == 0
    text = capsys.readouterr().out
    assert f"torchrun --nproc_per_node=8 {script}.py" in text


def test_help_has_the_slots_that_sampling_has(capsys):
    assert stage("rl", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"tokens would be more than {rollout.SLOT_TOKENS} x --max-tokens" in text


@pytest.mark.parametrize("script", [*ALL, "discriminator", "eval", "rollout"])
def test_flags_are_answered_before_the_heavy_imports(tmp_path, script):
    """--help and mistakes, where torch, transformers and numpy cannot even be imported."""
    for name in ("torch", "transformers", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} is imported')")
    given = ["--ckpt", "x", *(["--pairs", "y"] if script == "discriminator" else [])]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    processes = []
    for flags in (["--help"], [*given, "--sed", "3"], [*given, "--seed", "-1"]):
        command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [(*process.communicate(), process.returncode) for process in processes]
    (text, error, status), *mistakes = said
    first = (ROOT / f"{script}.py").read_text().removeprefix('"""').partition("\n")[0]
    assert (error, status) == ("", 0) and first in text.splitlines() and "--seed" in text
    lines = [f"{script}.py: error: unrecognized arguments: --sed 3\n", f"{script}.py: error: argument --seed: -1: must be at least 0\n"]
    assert mistakes == [("", line, 2) for line in lines]


def test_one_stage_hands_over_to_the_next(tiny, policy, tmp_path):
    """sft -> align -> rl by folders alone; each records where it came from."""
    game, parent = {"prompts": 1, "rollouts": 2, "max-new-tokens": 16}, policy
    for script, sizes in (("sft", {"batch": 2}), ("align", game), ("rl", game)):
        out = str(tmp_path / script)
        flags = {"ckpt": parent, "data": getattr(tiny, script), "out": out, "steps": 1}
        assert stage(script, *as_flags(flags | sizes)) == 0
        meta = json.loads((tmp_path / script / "meta.json").read_text())
        found = meta["stage"], meta["step"], meta["parent"], meta["args"]["ckpt"]
        assert found == (script, 1, parent, parent)
        logged = read_jsonl(tmp_path / script / "metrics.jsonl")[-1]
        assert {key: value for key, value in meta["metrics"].items() if value is not None} == logged
        parent = out
