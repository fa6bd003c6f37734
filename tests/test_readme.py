"""Run: pytest tests/test_readme.py          (what README prints is what the code takes)"""

import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = ("sft", "align", "rl", "discriminator", "eval", "rollout")


def commands():
    """Command lines of README, in blocks that are indented or fenced, with their `\\`."""
    text = re.sub(r" *\\\n *", " ", README)
    fenced = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [*"".join(fenced).splitlines(), *re.findall(r"(?m)^    (?=\S)(.*)$", text)]
    return [line for line in lines if re.match(r"(python|torchrun)\b.*\.py ", line)]


@pytest.mark.parametrize("line", commands())
def test_the_flags_of_a_command_are_there(line, monkeypatch):
    words = shlex.split(line, comments=True)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = words[at].removesuffix(".py")
    assert name in SCRIPTS
    monkeypatch.setattr(sys, "argv", words[at:])
    importlib.import_module(name).parse_args()


def test_every_script_has_a_command():
    named = {name for line in commands() for name in re.findall(r"(\w+)\.py", line)}
    assert named == set(SCRIPTS)


def test_every_link_leads_somewhere():
    titles = re.findall(r"(?m)^#+ (.*)$", README)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists() or link[1:] in anchors, link


@pytest.mark.slow
def test_your_own_data_in_ten_minutes(tmp_path):
    """The section's script and commands as they stand: the model learns what the charts show."""
    section = README.partition("## Your own data in ten minutes")[2].partition("\n## ")[0]
    (script,) = re.findall(r"```python\n(.*?)```", section, re.S)
    (tmp_path / "charts.py").write_text(f"import sys; sys.path.append({str(ROOT)!r})\n{script}")
    lines = "set -e\n" + "".join(re.findall(r"```sh\n(.*?)```", section, re.S))
    for name in SCRIPTS:
        lines = lines.replace(f"python {name}.py", f"{sys.executable} {ROOT}/{name}.py")
    lines = lines.replace("python charts.py", f"{sys.executable} charts.py")
    ran = subprocess.run(["bash", "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads((tmp_path / "eval_out" / "results.json").read_text())["results"]
    assert all(tests["test"]["accuracy"]["mean"] > 0.5 for tests in found.values())
    assert len(found) == 3 and "answer 4: " in ran.stdout
    assert "<answer>\nblue\n</answer>\n\nanswer 1: " in ran.stdout  # chart 42
    for name in ("align_out/curves.png", "align_out/rollouts.html", "eval_out/rl_out/test.html"):
        assert (tmp_path / name).is_file()
