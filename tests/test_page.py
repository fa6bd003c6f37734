"""Run: pytest tests/test_page.py          (curves, pages, model cards; the page's script is tried
in a browser by hand: python tests/browser.py)"""

import json
import os
import re

import numpy as np
import page
import pytest
from conftest import ROOT, as_flags, noise, read_jsonl, stage, write_jsonl
from huggingface_hub import ModelCard
from PIL import Image

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)"> \u2028 \ud800 &lt;'


def lines_of(path):
    """What the script of a page reads."""
    holder = '<script type="application/json" id="lines">(.*)</script>\n'
    (found,) = re.findall(holder, path.read_text())
    return json.loads(found)


# ------------------------------------------------------------------------------------------ pages
def rollout(step, **more):
    line = {"step": step, "id": f"r{step}", "question": "?", "gold": "2", "images": []}
    return line | {"response": "<answer>2</answer>", "finished": True, "advantage": 0.5} | more


def test_no_text_leaves_its_place(tmp_path):
    """Whatever a model, a data set or a folder's name says, the page has its two scripts and no
    other, and its script reads what was written."""
    line = rollout(1, id=HOSTILE, question=HOSTILE, response=HOSTILE, gold=[HOSTILE, "2"])
    page.write_page(str(tmp_path / "page.html"), HOSTILE, [line], "LINES")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script") == text.count("</script") == 2 and "<img" not in text
    assert lines_of(tmp_path / "page.html") == [line]


def test_a_page_asks_for_nothing_from_outside():
    assert not re.search(r"(https?:)?//\w", page.PAGE.replace("// ", ""))
    assert "default-src 'none'" in page.PAGE and "innerHTML" not in page.PAGE


def test_the_newest_rollouts_come_first_and_no_more_than_a_page_holds(tmp_path, monkeypatch):
    lines = [rollout(step, n=n, d_v=float("nan")) for step in (1, 2, 3) for n in (0, 1)]
    write_jsonl(tmp_path / "rollouts.jsonl", lines)
    page.redraw(str(tmp_path))
    found = lines_of(tmp_path / "rollouts.html")
    order = [(3, 0), (3, 1), (2, 0), (2, 1), (1, 0), (1, 1)]
    assert [(line["step"], line["n"]) for line in found] == order
    assert {line["d_v"] for line in found} == {None}  # JavaScript reads no NaN
    monkeypatch.setattr(page, "MOST", 3)
    page.redraw(str(tmp_path))
    assert [line["step"] for line in lines_of(tmp_path / "rollouts.html")] == [3, 3, 2]
    assert "The newest 3 rollouts" in (tmp_path / "rollouts.html").read_text()


def test_a_run_that_saves_often_does_not_draw_as_often(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": step, "loss": 1.0} for step in (1, 2)])
    page.redraw(str(tmp_path), last=False)  # the first
    begun = (tmp_path / "curves.png").stat().st_mtime_ns
    page.redraw(str(tmp_path), last=False)
    assert (tmp_path / "curves.png").stat().st_mtime_ns == begun
    os.utime(tmp_path / "curves.png", (0, 0))
    page.redraw(str(tmp_path), last=False)
    assert (tmp_path / "curves.png").stat().st_mtime_ns > begun
    os.utime(tmp_path / "curves.png", (2**31, 2**31))
    page.redraw(str(tmp_path))
    assert (tmp_path / "curves.png").stat().st_mtime < 2**31


def test_what_cannot_be_drawn_is_said_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "rollouts.jsonl").mkdir()
    page.redraw(str(tmp_path))
    assert f"of {tmp_path} is not drawn: " in capsys.readouterr().out


def test_pictures_are_reduced_and_written_once(tmp_path):
    rng = np.random.default_rng(0)
    large, small = noise(rng, (2000, 500)), noise(rng, (30, 20))
    names = [page.save_picture(picture, str(tmp_path)) for picture in (large, small, large)]
    assert names[0] == names[2] and len(list((tmp_path / "pictures").iterdir())) == 2
    assert [Image.open(tmp_path / name).size for name in names[:2]] == [(640, 160), (30, 20)]


# ------------------------------------------------------------------------------------------ curves
def green(path):
    """Share of pixels that are shaded."""
    red, other, blue = np.asarray(Image.open(path).convert("RGB")).astype(int).transpose(2, 0, 1)
    return ((other > red + 5) & (other > blue + 5)).mean()


@pytest.mark.parametrize("steps", [2, 300])
def test_curves_shade_what_is_healthy(tmp_path, steps):
    """Numbers may be absent from a step, or none."""
    rng = np.random.default_rng(0)
    metrics = []
    for step in range(steps):
        valid, reward = rng.random(2)
        metrics.append({"step": step, "valid": valid, "reward": reward, "seconds": 1.0})
    del metrics[1]["valid"]
    metrics[0]["reward"] = None
    shares = []
    for keys in (("step", "reward", "seconds"), ("step", "reward", "seconds", "valid")):
        part = [{key: line[key] for key in keys if key in line} for line in metrics]
        page.draw_curves(part, str(tmp_path / "curves.png"))
        shares.append(green(tmp_path / "curves.png"))
    assert shares[0] == 0 < shares[1]


def test_readme_explains_every_curve_and_every_number_has_one():
    table = (ROOT / "README.md").read_text().partition("## What the numbers mean")[2]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    explained = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
    drawn = {key for panel in page.PANELS for key in panel}
    assert drawn == explained and set(page.HEALTHY) <= {panel[0] for panel in page.PANELS}


# --------------------------------------------------------------------------------------- a run
def test_a_run_leaves_its_curves_its_rollouts_and_its_card(tiny, policy, tmp_path):
    flags = {"ckpt": policy, "data": tiny.rl, "out": tmp_path / "rl", "prompts": 4, "rollouts": 2}
    flags |= {"max-new-tokens": 24, "steps": 3, "log-rollouts": 1, "save-every": 2}
    assert stage("rl", *as_flags(flags)) == 0
    lines = read_jsonl(tmp_path / "rl" / "rollouts.jsonl")
    shown = lines_of(tmp_path / "rl" / "rollouts.html")
    assert sorted(shown, key=lambda line: line["step"]) == lines and len(lines) == 24
    by_id = {}
    for number, example in enumerate(tiny.examples["rl"], 1):
        by_id[f"{tiny.rl}:{number}"] = example
    for line in lines:
        example = by_id[line["id"]]
        assert line["question"] == example["prompt"][-1]["content"]
        assert line["gold"] == example["answer"]
        assert len(line["images"]) == len(example["images"])
        for name, original in zip(line["images"], example["images"]):
            shown, meant = Image.open(tmp_path / "rl" / name), Image.open(tiny.folder / original)
            assert shown.size == meant.size
    assert any(line["images"] for line in lines)
    assert Image.open(tmp_path / "rl" / "curves.png").width > 1000
    card = ModelCard.load(tmp_path / "rl" / "README.md")
    assert card.data.license == "unknown" and card.data.tags == ["prism", "rl"]
    assert "| max_new_tokens | `24` |" in card.text and f"- parent: `{policy}`" in card.text
    accuracy = read_jsonl(tmp_path / "rl" / "metrics.jsonl")[-1]["accuracy"]
    assert f"| accuracy | `{accuracy}` |" in card.text


def test_a_card_inherits_and_names_what_lies_on_the_hub(tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\nlicense of x\n")
    meta = {"stage": "sft", "step": 7, "git_commit": None, "parent": str(parent)}
    meta |= {"metrics": {"loss": 0.5, "x": None}}
    meta["args"] = {"data": ["prism-vlm/a:b.parquet:0.5", str(tmp_path)], "lr": None}
    meta["args"]["system_prompt"] = "a|b\n# c"
    page.write_card(str(tmp_path), meta)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and card.data.datasets == ["prism-vlm/a"]
    assert card.data.base_model is None and card.data.pipeline_tag == "image-text-to-text"
    assert "| system_prompt | `a\\|b # c` |" in card.text and "`lr`" not in card.text
    page.write_card(str(tmp_path), meta | {"parent": "Qwen/Qwen3-VL-4B-Instruct"})
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "Qwen/Qwen3-VL-4B-Instruct"
    child = tmp_path / "child"
    child.mkdir()
    page.write_card(str(child), meta | {"parent": str(tmp_path)})  # of Qwen's, two stages on
    assert ModelCard.load(child / "README.md").data.base_model == "Qwen/Qwen3-VL-4B-Instruct"


def test_what_a_user_writes_into_the_card_stays(tmp_path, monkeypatch):
    """The licence, when the run goes on; a local file is no data set of the Hub."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows").write_text("")
    here = os.path.relpath(tmp_path / "a" / "rows", tmp_path)
    assert page.is_hub_id("owner/name:file.parquet") and page.is_hub_id("owner/name:0.5")
    monkeypatch.chdir(tmp_path)
    assert not page.is_hub_id(f"{here}:0.9") and not page.is_hub_id(here)
    meta = {"stage": "sft", "args": {"data": ["owner/name"]}, "step": 1, "parent": "x"}
    meta |= {"git_commit": None, "metrics": {}}
    page.write_card(str(tmp_path), meta)
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace('license: "unknown"', 'license: "mit"'))
    page.write_card(str(tmp_path), meta)
    assert 'license: "mit"' in card.read_text()


def test_a_picture_that_cannot_be_kept_ends_nothing(tmp_path, capsys):
    (tmp_path / "pictures").write_text("")
    assert page.save_pictures([noise(np.random.default_rng(0), (8, 8))], str(tmp_path)) == []
    assert "warning: a picture" in capsys.readouterr().out
