"""Run: pytest tests/test_cases.py        (small inputs that users had; CPU only)

The cases lie in ../shared/cases/bugs, beside the repository: a folder each with its command, its
input, and in words what is expected; the table below says the same as a check. A command that is
one stage runs in this process, which has imported all it needs, any other in a shell.
"""

import json
import os
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl, stage
from transformers import AutoTokenizer

from toy.__main__ import QUICK, write_data

FOLDER = ROOT.parent / "shared" / "cases" / "bugs"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is not here"),
]


@dataclass
class Ran:
    """What the command of a case left."""

    status: int
    text: str  # stdout and stderr
    case: Path
    ckpt: Path
    out: Path

    def rows(self, name):
        return read_jsonl(self.out / name)

    @property
    def skipped(self):
        """{row: reason}; empty where nothing was skipped."""
        path = self.out / "skipped.jsonl"
        return {line["row"]: line["reason"] for line in read_jsonl(path)} if path.exists() else {}


# ------------------------------------------------------------------------------------------ checks
def refused(words):
    """-> check: status 2, one line, no traceback, nothing that looks like a finished run."""

    def check(ran):
        lines = [line for line in ran.text.splitlines() if ".py: error: " in line]
        assert ran.status == 2 and len(lines) == 1 and "Traceback" not in ran.text
        assert re.search(words, lines[0]) and len(lines[0]) < 800
        assert not (ran.out / "meta.json").exists()

    return check


def trains(steps=2, out="", words="", tokens=None):
    """-> check: so many steps were made with every row, of `tokens` each, and saved."""

    def check(ran):
        metrics = ran.rows(os.path.join(out, "metrics.jsonl"))
        assert ran.status == 0 and "Traceback" not in ran.text and re.search(words, ran.text)
        assert [line["step"] for line in metrics] == list(range(1, steps + 1))
        assert all((line["bad"], line["dropped"]) == (0, 0) for line in metrics)
        assert tokens is None or [line["tokens"] for line in metrics] == [tokens] * steps
        assert (ran.out / out / "meta.json").exists() and not ran.skipped

    return check


def skips(rows, dropped, bad):
    """-> check: the rows {number: words of the reason} are left out, the others train."""

    def check(ran):
        last = ran.rows("metrics.jsonl")[-1]
        assert ran.status == 0 and (last["dropped"], last["bad"]) == (dropped, bad)
        assert ran.skipped.keys() == rows.keys()
        assert all(words in ran.skipped[row] for row, words in rows.items())

    return check


def one_is_right(ran):
    """Every finished answer `1` is right, every finished `2` is wrong."""
    said = {}
    for line in ran.rows("eval/memo/data.jsonl"):
        answer = re.fullmatch(r"[^<]*.*<answer>\n(\d)\n</answer>", line["response"], re.S)
        if answer and line["format"]:
            said.setdefault(answer[1], set()).add(line["accuracy"])
    assert ran.status == 0 and said == {"1": {1.0}, "2": {0.0}}


def golds_of_all_types(ran):
    golds = [line["gold"] for line in ran.rows("base/data.jsonl")]
    assert ran.status == 0 and golds == ["3", "3.0", "True", ["2", "5"], "0"]


def base64_among_good(ran):
    """The picture is read: there is no list of skipped rows for `wc` to count."""
    assert all(line["bad"] == 0 for line in ran.rows("metrics.jsonl")) and not ran.skipped
    assert len(max(ran.text.splitlines(), key=len)) < 500


def ends_at_every_eos(ran):
    """Neither EOS stands inside a response, as one would behind the first."""
    rows = ran.rows("eos_list/data.jsonl")
    assert ran.status == 0 and any(line["finished"] for line in rows)
    assert all(line["finished"] == (line["tokens"] < 64) for line in rows if line["tokens"] < 64)
    assert not any(re.search(r"<\|(im_end|endoftext)\|>", line["response"]) for line in rows)


def short_answers_are_not_penalised(ran):
    rows = ran.rows("rollouts.jsonl")
    right = [line["reward"] for line in rows if line["accuracy"] and line["finished"]]
    assert ran.status == 0 and right and set(right) == {1.0}


def every_turn_is_trained(ran):
    """The tokens of all turns of the assistant in both rows, each with its EOS."""
    tokenizer, expected = AutoTokenizer.from_pretrained(ran.ckpt), 0
    for row in read_jsonl(ran.case / "data.jsonl"):
        for turn in row["conversations"]:
            if turn["from"] == "gpt":
                expected += len(tokenizer(turn["value"])["input_ids"]) + 1
    trains(1, tokens=expected)(ran)


def pairs_agree(ran, *policies):
    """No difference but of the kinds that README documents as a policy."""
    found = re.findall(r"^DIFF (.*?) '", ran.text, re.M)
    assert ran.status == 0 and "differences: " in ran.text and set(found) <= set(policies), found


def template_is_handed_on(ran):
    trains(1)(ran)
    templates = [AutoTokenizer.from_pretrained(ran.ckpt / ".." / "base").chat_template]
    for folder in (ran.ckpt, ran.out):
        text = (folder / "chat_template.json").read_text()
        templates.append(json.loads(text)["chat_template"])
    assert len(set(templates)) == 1


PICTURE = r"<\|vision_start\|>(<\|image_pad\|>)*<\|vision_end\|>How many red\?"  # as it is shown
SEEN = rf"user\n{PICTURE}<\|im_end\|>"
QUANTISED = {"awq": "awq", "bnb": "bitsandbytes", "fp8": "fp8", "gptq": "gptq"}
CHECKS: dict[str, Callable] = {
    "answer_dict": refused(r"data.jsonl:1: the answer must be .*, not dict"),
    "answer_tags": one_is_right,
    "answer_types": golds_of_all_types,
    "base64_among_good": base64_among_good,
    "base64_bytes_field": trains(words=SEEN),
    "base64_images": trains(words=SEEN),
    "bom_crlf": trains(words="4 of 4 rows"),
    "broken_exif": trains(),
    "chat_as_json_text": trains(1, words=SEEN),
    "ck_cut": refused("--ckpt .*/cut: model.safetensors: .*incomplete download"),
    "ck_lfs_pointer": refused("--ckpt .*/lfs_pointer: model.safetensors: .*Git LFS pointer"),
    "ck_lora": refused("--ckpt .*/lora: an adapter .*merge"),
    "ck_lora_beside": refused("--ckpt .*/lora_beside: an adapter .*merge"),
    "ck_moe": refused("--ckpt .*: a qwen3_vl_moe; a qwen3_vl is needed"),
    "ck_no_template": refused("--ckpt .*/no_template: no chat template"),
    "ck_no_template_eval": refused("--ckpt .*/no_template: no chat template"),
    "ck_not_resized": refused("--ckpt .*: the tokenizer has 428 tokens, the embedding 426 rows"),
    "ck_old_prefix": refused("--ckpt .*/old_prefix: missing keys: .*language_model.embed_tokens"),
    "ck_processor_only": trains(1, words=SEEN),
    "ck_qwen25": refused("--ckpt .*: a qwen2_5_vl; a qwen3_vl or qwen3_vl_moe is needed"),
    "ck_shard_missing": refused("--ckpt .*: model-00002-of-00002.safetensors: .*incomplete"),
    "ck_template_json": template_is_handed_on,
    "ck_tie_in_text": refused("--ckpt .*: missing keys: lm_head.weight .*tie_word_embeddings"),
    "ck_untied_no_head": refused("--ckpt .*: missing keys: lm_head.weight"),
    "ck_vllm_prefix": refused("--ckpt .*/vllm_prefix: missing keys: .*language_model.embed_tokens"),
    "ck_zero3": refused("--ckpt .*: the weight .*layers.0.mlp.up_proj.weight is empty"),
    "eos_list": ends_at_every_eos,
    "eval_resume_other_gold": refused("--resume: .*made with other data .*gold"),
    "gsm8k_gold": trains(1, words="\ngold 72, "),
    "image_over_limit": skips({2: "too long", 4: "too long"}, dropped=2, bad=0),
    "image_tag_in_answer": trains(words=rf"{SEEN}\n.*\n.*\n1 see !\[fig\]\(<image>\)"),
    "lfs_parquet": refused("train.parquet: a Git-LFS pointer"),
    "math_pairs": lambda ran: pairs_agree(ran, "percent"),
    "multi_turn": every_turn_is_trained,
    "null_images": trains(words=r"user\nHow many red\?<"),
    "odd_pictures": skips({9: "svg.png: image cannot be read"}, dropped=0, bad=1),
    "odd_sizes": skips(
        {4: "aspect ratio", 5: "aspect ratio", 7: "/empty.png"}, dropped=0, bad=3
    ),
    "oov_rl": trains(2),
    "overlong_buffer": short_answers_are_not_penalised,
    "parquet_nested": trains(out="run", words=SEEN),
    "parts_content": trains(words=SEEN),
    "parts_inline_image": trains(words=SEEN),
    "response_with_eos_text": trains(1),
    "response_with_eos_text_sft": trains(words=r"</answer><\|im_end\|><<< \(EOS id 2\)\n"),
    "resume_other_data": refused("--resume: .*made with --data 4 rows, .*, not 4 rows, "),
    "resume_other_flags": refused("--resume: .*made with --batch 2, not 4; --seed 0, not 7"),
    "same_folder": refused("--out .*/ck is, holds or lies in --ckpt .*/ck"),
    "save_to_disk": trains(1, out="run", words="4 of 4 rows"),
    "save_to_disk_dict": trains(1, out="run", words="4 of 4 rows"),
    "solution_tags": trains(1, words="\ngold 1, "),
    "tool_turns": refused("data.jsonl:1: a chat turn has tool_calls"),
    "verify_infinity": pairs_agree,
    "verify_positive_variables": pairs_agree,
    "video_row": refused("data.jsonl:1: the row has a column videos"),
} | {
    f"ck_{name}": refused(f"--ckpt .*: a quantised checkpoint .{method}. cannot be trained")
    for name, method in QUANTISED.items()
}  # fmt: skip


# -------------------------------------------------------------------------------------------- runs
def start(command):
    """A shell command in the repository's root, with this Python -> the process when it is done."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of the checkpoints that the cases start from."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_data(str(folder), 0, QUICK)
    made = start(f"python {FOLDER}/make_ckpts.py {folder}/base {folder}")
    assert made.returncode == 0, made.stdout[-3000:]
    flags = f"--ckpt {folder}/base --data {FOLDER}/two_answers/data.jsonl --out {folder}/memo"
    made = start(f"python sft.py {flags} --steps 40 --batch 8 --lr 2e-3 --save-every 0")
    assert made.returncode == 0, made.stdout[-3000:]
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_case(checkpoints, tmp_path, capfd, name):
    case = FOLDER / name
    ckpt = checkpoints / (case / "ckpt").read_text().strip()
    out = tmp_path / "out"
    paths = {"CASE": str(case), "CKPT": str(ckpt), "OUT": str(out)}
    command = string.Template((case / "cmd").read_text()).substitute(paths)
    alone = re.fullmatch(r"python (\w+)\.py ([^|&;<>*]*)\n?", command)
    if alone:
        capfd.readouterr()
        status, text = stage(alone[1], *shlex.split(alone[2])), "".join(capfd.readouterr())
    else:
        done = start(command)
        status, text = done.returncode, done.stdout
    try:
        CHECKS[name](Ran(status, text, case, ckpt, out))
    except (AssertionError, FileNotFoundError) as error:
        expected = (case / "expect").read_text()
        pytest.fail(f"{error}\nstatus {status}\n{text[-3000:]}\nexpected: {expected}")


def test_every_case_is_checked():
    assert {path.parent.name for path in FOLDER.glob("*/cmd")} == CHECKS.keys()
