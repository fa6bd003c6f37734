"""Run: pytest tests/test_eval.py    (benchmarks, statistics, judge, filter; CPU only, a minute)"""

import io
import json
import os
import re
import shutil
import socket
import threading
import weakref
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from conftest import ONE, launch, noise, read_jsonl, run_stage, stage, write_jsonl

from data import Example, Examples, File, encode_prompt, load_examples
import eval as E
import rollout
from flags import InputError

SAY = "<caption>\nc\n</caption>\n<think>\nt\n</think>\n<answer>\n{}\n</answer>"


def png(size=(32, 32)):
    file = io.BytesIO()
    noise(np.random.default_rng(0), size).save(file, "png")
    return file.getvalue()


def generations(questions, say, k=1):
    """What eval.py would have written, had the policy said say(question, n, sample)."""
    rows = []
    for n in range(len(questions)):
        item, group = questions[n], []
        for s in range(k):
            row = {"item": n, "sample": s, "info": item.info, "finished": True, "tokens": 9}
            group.append(row | E.grade(SAY.format(say(item, n, s)), item))
        E.vote(group, item.options)
        rows += group
    return rows


def summary(questions, say, k=1):
    return E.summarise([generations(questions, say, k)], questions.benchmark, "data", "name").cells


def bench(tmp_path, name, rows):
    path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return E.look(*E.load_bench(f"{name}={path}"), ONE)


def own(tmp_path, rows):
    """--data as eval.py reads it."""
    files = load_examples(write_jsonl(tmp_path / "own.jsonl", rows)).files
    return E.look(E.Benchmark(), Examples(files, read=E.own), ONE)


def stored(name, rows, folder):
    """Rows that hold pictures as bytes, as parquet does."""
    benchmark = E.BENCHMARKS[name]
    return benchmark, Examples([File(rows, "file", str(folder))], read=benchmark.read)


# ----------------------------------------------------------------------- rows as they are published
def wemath_rows(two=360, three=165):
    """2 * 360 + 360 + 3 * 165 + 165 = 1740 questions over 525 problems."""
    keys = [(f"{n}", f"{steps}steps_{part}") for n, steps in enumerate([2] * two + [3] * three)
            for part in [*range(1, steps + 1), "multi"]]
    row = {"split": "testmini", "knowledge concept": "Area", "question": "How large?",
           "option": "A. 3; B. 4 cm; C. x", "answer": "B", "image_path": None, "question number": 1}
    return [row | {"ID": i, "key": key} for i, key in keys]


@pytest.mark.parametrize("right, strict, loose, accuracy", [
    (lambda key: "multi" not in key, 50, 50, 69.83), (lambda key: "multi" in key, 0, 0, 30.17),
    (lambda key: "_1" not in key, 0, 100, None),
])
def test_wemath_goldens(tmp_path, right, strict, loose, accuracy):
    questions = bench(tmp_path, "wemath", wemath_rows())
    problems = {questions[n].info["problem"] for n in range(1740)}
    assert len(questions) == 1740 and len(problems) == 525
    found = summary(questions, lambda item, n, s: "B" if right(item.info["key"]) else "C")
    assert found["scores"] == pytest.approx({"strict": strict / 100, "loose": loose / 100})
    assert accuracy is None or round(100 * found["accuracy"]["mean"], 2) == accuracy


def test_wemath_options(tmp_path):
    item = bench(tmp_path, "wemath", wemath_rows(1, 0))[0]
    assert item.options == ["3", "4 cm", "x"] and item.prompt[0]["content"].endswith(
        "A. 3; B. 4 cm; C. x"
    )
    assert E.grade(SAY.format("4 cm"), item)["accuracy"] == 1
    assert E.grade(SAY.format("3"), item)["accuracy"] == 0


def test_wemath_letters_inside_an_option(tmp_path):
    """Letters come in order: what looks like a letter before its turn belongs to the text."""
    row = wemath_rows(1, 0)[0]
    for text, options in (
        ("A. D;C. E; B. F; C. G", ["D;C. E", "F", "G"]),
        ("A. 1; B. 2;A. 3; C. 4;B. 5", ["1", "2;A. 3", "4;B. 5"]),
        ("A. on AB;B. C; D. E; C. all; D. none", ["on AB", "C; D. E", "all", "none"]),
        ("（见图）\nA．3；B．4", ["3", "4"]),
        ("None of these", []),
    ):
        assert bench(tmp_path, "wemath", [row | {"option": text}])[0].options == options


def hallusion_row(set_id, figure, question, yes, visual="1"):
    return {"category": "VD", "subcategory": "chart", "visual_input": visual, "set_id": set_id,
            "figure_id": figure, "question_id": question, "question": "Is it?",
            "gt_answer": str(int(yes)), "filename": None}


def test_hallusion_by_hand(tmp_path):
    """Two figures, three questions: set 1 has 2 x 2 rows, set 2 one; the row without a picture does
    not count."""
    rows = [
        hallusion_row("1", f, q, yes)
        for f, q, yes in (("0", "0", 1), ("0", "1", 0), ("1", "0", 0), ("1", "1", 0))
    ]
    rows += [hallusion_row("2", "0", "0", 1), hallusion_row("2", "0", "1", 1, "0")]
    questions = bench(tmp_path, "hallusion", rows)
    assert len(questions) == 5
    no, yes = (
        summary(questions, lambda *_, word=word: word)["scores"]
        for word in ("No, it is not.", "yes")
    )
    assert no == pytest.approx({"aAcc": 3 / 5, "fAcc": 1 / 3, "qAcc": 1 / 3})
    assert yes == pytest.approx({"aAcc": 2 / 5, "fAcc": 1 / 3, "qAcc": 1 / 3})


def test_hallusion_goldens(tmp_path):
    """The published aggregates of 'always no' and 'always yes' are 550 and 401 of 951 answers, 42
    and 25 of 346 figures, 91 and 21 of 455 questions. These rows have those counts; who meets whom
    in a figure is made up."""
    rows = []
    for yes, count, figures, questions in (
        (0, 550, range(42), range(91)),
        (1, 401, range(42, 67), range(91, 112)),
    ):
        figures, questions = [*figures, *range(67, 346)], [*questions, *range(112, 455)]
        rows += [
            hallusion_row("0", figures[i % len(figures)], questions[i % len(questions)], yes)
            for i in range(count)
        ]
    questions = bench(tmp_path, "hallusion", rows)
    for word, golden in (("no", (57.8339, 12.1387, 20.0)), ("yes", (42.1661, 7.2254, 4.6154))):
        scores = summary(questions, lambda *_, word=word: word)["scores"]
        assert tuple(round(100 * scores[key], 4) for key in ("aAcc", "fAcc", "qAcc")) == golden


def mmmu_row(i, **more):
    pictures = {f"image_{n}": None for n in range(1, 8)} | {
        "image_1": {"bytes": png(), "path": "1.png"}
    }
    return {"id": f"validation_Art_Theory_{i}", "question": "Which <image 1>?",
            "options": "['one', \"it's two\"]", "answer": "B",
            "question_type": "multiple-choice", **pictures, **more}


# one row of each published schema: benchmark, row, images, options, right answers, wrong ones
ROWS = {
    "mathvista choice": ("mathvista", {
        "pid": "1", "question": "How large?", "choices": ["3 cm", "B", "No"], "unit": None,
        "precision": None, "answer": "No", "question_type": "multi_choice", "answer_type": "text",
        "metadata": {"task": "figures"}, "image": "a.png",
    }, 1, ["3 cm", "B", "No"], ["C", "no", "(C) No"], ["A", "yes", "D"]),
    "mathvista float": ("mathvista", {
        "pid": "2", "question": "How large?", "choices": None, "unit": "$", "precision": 1.0,
        "answer": "1.3", "answer_type": "float", "decoded_image": {"bytes": png(), "path": None},
        "image": "gone.png",
    }, 1, [], ["1.3", "1.34", "$1.3"], ["1.36", "1", "13"]),
    "mathvista list": ("mathvista", {
        "pid": "3", "question": "Which?", "choices": None, "answer": "[1, 5]",
        "answer_type": "list", "image": "a.png",
    }, 1, [], ["[1,5]"], ["[5, 1]", "1"]),
    "mathverse choice": ("mathverse", {
        "sample_index": "1", "problem_index": "1", "problem_version": "Text Lite", "question": "?",
        "image": "a.png", "answer": "B",
        "query_wo": "The letter.\nQuestion: CED is ()\nChoices:\nA:40°\nB:60°\nC:120°",
    }, 1, ["40°", "60°", "120°"], ["B", "60°", "60"], ["A", "120"]),
    "mathverse vision only": ("mathverse", {
        "sample_index": "5", "problem_index": "1", "problem_version": "Vision Only", "question": "",
        "image": "a.png", "query_wo": "According to the image, give the value.", "answer": "118掳T",
        "question_type": "free-form",
    }, 1, [], ["118°T"], ["117°T"]),
    "mathvision": ("mathvision", {
        "id": "9", "question": "<image1> when it left, <image1> when it came", "answer": "B",
        "solution": None, "options": ["2h 48m", "$\\sqrt{8}$", "C", "D", "E"], "level": 3,
        "subject": "arithmetic", "image": "a.png",
    }, 1, ["2h 48m", "$\\sqrt{8}$", "C", "D", "E"], ["B", "2\\sqrt{2}"], ["A", "2h 48m"]),
    "mathvision free": ("mathvision", {
        "id": "10", "question": "How many?", "options": [], "answer": "11", "level": 1,
        "subject": "arithmetic", "image": "a.png",
    }, 1, [], ["11", "11.0"], ["12"]),
    "mmmu": ("mmmu", mmmu_row(1), 1, ["one", "it's two"], ["B", "it's two"], ["A", "one"]),
    "mmmu open": ("mmmu", mmmu_row(2, question_type="open", options="[]", answer="['8', 'ten']"), 1,
                  [], ["8", "ten"], ["9"]),
    "mmmu by letters": ("mmmu", {
        "id": "validation_Art_Theory_3", "answer": "A", "index2ans": {"A": "$6", "B": "$7"},
        "question": "?",
    }, 0, ["$6", "$7"], ["$6"], ["7"]),
    "mmmu_pro vision": ("mmmu_pro", {
        "id": "test_History_1", "image": {"bytes": png(), "path": "1.png"}, "options": "['x', 'y']",
        "answer": "A",
    }, 1, ["x", "y"], ["A"], ["B"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_published_rows(tmp_path, name):
    name, row, images, options, right, wrong = ROWS[name]
    (tmp_path / "a.png").write_bytes(png())
    questions = E.look(*stored(name, [row, row], tmp_path), ONE)
    item = questions[0]
    text = item.prompt[0]["content"]
    assert text.count("<image>") == len(item.images) == images and item.options == options
    for said in right:
        assert E.grade(SAY.format(said), item)["accuracy"] == 1, said
    for said in wrong:
        assert E.grade(SAY.format(said), item)["accuracy"] == 0, said
    gold = item.answer if isinstance(item.answer, str) else item.answer[-1]
    assert summary(questions, lambda *_: gold)["accuracy"]["mean"] == 1
    with pytest.raises(InputError, match="file:1: .* no answer"):
        E.look(*stored(name, [row | {"answer": None}], tmp_path), ONE)


def test_pictures_in_the_order_of_the_text(tmp_path):
    """A picture may be meant before its number, twice, only in an option, or nowhere."""
    pictures = {f"image_{n}": f"{n}.png" for n in (1, 2, 3, 4)}
    for path in pictures.values():
        (tmp_path / path).write_bytes(png())
    text = "Turn <image 2> into <image 1>; is <image 2> right? <image 7>"
    row = mmmu_row(1, **pictures) | {"question": text, "options": "['<image 4>', 'none']"}
    item = bench(tmp_path, "mmmu", [json.loads(json.dumps(row))])[0]
    assert [path.rpartition("/")[2] for path in item.images] == ["3.png", "2.png", "1.png", "4.png"]
    expected = (
        "<image>Turn <image> into <image>; is (image 2) right? (image 7)\n(A) <image>\n(B) none"
    )
    assert item.prompt[0]["content"] == expected


def test_mmmu_pro_is_the_mean_of_its_two_parts(tmp_path):
    """A folder with one parquet of each kind; three standard questions, two in pictures."""
    from datasets import Dataset, Features, Image, Value

    text = {key: Value("string") for key in ("id", "question", "options", "answer", "subject")}
    rows = [{"id": str(i), "question": "Which <image 1>?", "options": "['x', 'y']", "answer": "A",
             "subject": "Art",
             "image_1": {"bytes": png(), "path": None}} for i in range(3)]
    Dataset.from_list(rows, Features(text | {"image_1": Image()})).to_parquet(
        tmp_path / "standard.parquet"
    )
    rows = [
        {key: row[key] for key in ("id", "options", "answer", "subject")}
        | {"image": row["image_1"]}
        for row in rows[:2]
    ]
    del text["question"]
    Dataset.from_list(rows, Features(text | {"image": Image()})).to_parquet(
        tmp_path / "vision.parquet"
    )
    questions = E.look(*E.load_bench(f"mmmu_pro={tmp_path}"), ONE)
    assert len(questions) == 5 and isinstance(questions[0].images[0], bytes)
    found = summary(questions, lambda item, n, s: "A" if n < 1 or n == 3 else "B")
    assert found["accuracy"]["mean"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found["by"]["setting"] == {
        "standard": {"items": 3, "accuracy": pytest.approx(1 / 3)}, "vision": {"items": 2,
                                                                               "accuracy": 0.5}}


LETTERS = [f"text {letter}" for letter in "ABCDEFGHIJKL"]


def test_nested_options(tmp_path):
    """Some rows of MMMU-Pro hold the list of options inside another list, or as a text."""
    for options in ([["one", "two"]], "[['one', 'two']]", ["one", "two"], {"A": "one", "B": "two"}):
        row = mmmu_row(1, image_1=None, question="?", options=options)
        assert bench(tmp_path, "mmmu_pro", [row])[0].options == ["one", "two"]
    for options in (
        [["one"], ["two"]],
        [["one", ["two"]]],
        ["one", None],
        [str(i) for i in range(27)],
    ):
        row = mmmu_row(1, image_1=None, question="?", options=options)
        with pytest.raises(InputError, match="mmmu_pro.jsonl:1: .*at most 26 texts"):
            bench(tmp_path, "mmmu_pro", [row])


def test_more_than_ten_options(tmp_path):
    """The verifier knows the letters A to J: a right option beyond them is refused by name, as no
    response could be counted right."""
    row = mmmu_row(1, image_1=None, question="?", options=LETTERS)
    item = bench(tmp_path, "mmmu", [row | {"answer": "J"}])[0]
    assert item.prompt[0]["content"].endswith("\n(L) text L")
    for said, right in (("J", 1), ("text J", 1), ("(J) text J", 1), ("K", 0), ("text K", 0)):
        assert E.grade(SAY.format(said), item)["accuracy"] == right, said
    with pytest.raises(InputError, match="mmmu.jsonl:1: the answer 'K' of 12 options"):
        bench(tmp_path, "mmmu", [row | {"answer": "K"}])
    choices = ROWS["mathvista choice"][1] | {"choices": LETTERS, "image": None}
    assert bench(tmp_path, "mathvista", [choices | {"answer": "text J"}])[0].answer == "J"
    with pytest.raises(InputError, match="mathvista.jsonl:1: the answer 'K' of 12 options"):
        bench(tmp_path, "mathvista", [choices | {"answer": "text K"}])
    mine = {"prompt": "?", "options": LETTERS}
    assert own(tmp_path, [mine | {"answer": "text C"}])[0].answer == "text C"
    with pytest.raises(InputError, match="own.jsonl:1: the answer 'text L' of 12 options"):
        own(tmp_path, [mine | {"answer": "text L"}])


def test_a_copy_of_a_hub_folder_with_configurations(tmp_path):
    from datasets import Dataset

    row = ROWS["mathverse choice"][1] | {"image": None}
    (tmp_path / "data").mkdir()
    Dataset.from_list([row] * 3).to_parquet(tmp_path / "data" / "testmini.parquet")
    Dataset.from_list([row] * 9).to_parquet(tmp_path / "data" / "other.parquet")
    card = "---\nconfigs:\n- config_name: testmini\n  data_files:\n"
    card += "  - split: testmini\n    path: data/testmini.parquet\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert len(E.look(*E.load_bench(f"mathverse={tmp_path}"), ONE)) == 3


def test_the_split_of_a_folder(tmp_path, capsys):
    """--split is for --data: of a folder of several splits a benchmark takes its own, and says so;
    where that is missing, the cure that the message names works."""
    row = ROWS["mathvision"][1] | {"image": None}
    for folder, names in (("copy", ("test", "testmini")), ("other", ("dev", "test"))):
        (tmp_path / folder).mkdir()
        for count, name in enumerate(names, 1):
            write_jsonl(tmp_path / folder / f"{name}-0.jsonl", [row] * count)

    def rows(source):
        return len(E.look(*E.load_bench(f"mathvision={tmp_path}/{source}"), ONE))

    assert rows("copy") == 2
    assert "copy: holds test, testmini; testmini is taken" in capsys.readouterr().out
    assert rows("copy/test-0.jsonl") == 1 and rows("other/*.jsonl") == 3
    with pytest.raises(InputError, match="--bench .*other: holds dev, test; .* or name its files"):
        rows("other")
    assert rows("other/dev*") == 1 and capsys.readouterr().out == ""


def test_own_rows_are_those_of_the_test_split(tmp_path, capsys):
    """Of a folder as of a Hub id, unless --split or the difficulty filter wants others."""
    for count, name in enumerate(("test", "train", "dev"), 1):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "?", "answer": "1"}] * count)
    args = {"bench": [], "data": [str(tmp_path)], "split": None, "keep_pass_rate": None}
    found = []
    for change in ({}, {"keep_pass_rate": [0, 1]}, {"split": "dev"}):
        (test_set,) = E.load_sets(SimpleNamespace(**args | change), ONE).values()
        found.append(len(test_set))
    assert found == [1, 2, 3]
    said = capsys.readouterr().out.splitlines()
    line = f"{tmp_path}: holds dev, test, train; "
    assert said == [f"{line}test is taken", f"{line}train is taken"]


@pytest.mark.parametrize("change, words", [
    ({"level": ...}, "file.jsonl:2: .*column 'level' is missing.; found id"),
    ({"question": None}, "file.jsonl:2: not a row"),
    ({"answer": None}, "file.jsonl:2: .* no answer"),
    ({"image": "gone.png"}, "file.jsonl:2: .*gone.png does not exist"),
])
def test_bad_rows(tmp_path, change, words):
    (tmp_path / "a.png").write_bytes(png())
    good = ROWS["mathvision"][1]
    bad = {key: value for key, value in (good | change).items() if value is not ...}
    path = write_jsonl(tmp_path / "file.jsonl", [good, bad])
    with pytest.raises(InputError, match=words):
        E.look(*E.load_bench(f"mathvision={path}"), ONE)


def encoded(kind, mode="RGB", size=(60, 40)):
    file = io.BytesIO()
    noise(np.random.default_rng(0), size).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("data, words", [
    (encoded("png")[:-30], "truncated"), (encoded("jpeg")[:-300], "truncated"),
    (encoded("bmp")[:-300], "truncated"), (encoded("gif")[:40], "image"), (b"", "cannot identify"),
    (encoded("tiff", "F"), "32-bit pictures"), (encoded("png", size=(900, 3)), "200 times"),
    (encoded("png", size=(200, 100)), "20000 pixels, more than 10000|200 x 100 pixels"),
])
def test_bad_pictures(tmp_path, monkeypatch, data, words):
    monkeypatch.setattr(E.Image, "MAX_IMAGE_PIXELS", 10000)
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(data)
    rows = [{"prompt": "?", "answer": "1", "images": [name]} for name in ("a.png", "b.png")]
    with pytest.raises(InputError, match=f"own.jsonl:2: image .*b.png cannot be read: .*({words})"):
        own(tmp_path, rows)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
def test_what_can_be_decoded_is_never_refused(tmp_path, kind):
    """Also when something follows the picture, as cameras append things."""
    for data in (encoded(kind), encoded(kind) + b"more"):
        (tmp_path / "a").write_bytes(data)
        E.load_image(data)
        assert E.look_at_picture(data) == E.look_at_picture(str(tmp_path / "a"))


@pytest.mark.parametrize("row, words", [
    ({"prompt": "<image><image>?"}, "2 <image> in the text but 1 images"),
    ({"prompt": "<|image_pad|>?"}, "contains <.image_pad.>"), ({"answer": " "}, "no answer"),
    ({"answer": "\ud800"}, "no valid UTF-8"),
    ({"subject": "\ud800"}, "no valid UTF-8"), ({"options": ["\ud800"]}, "no valid UTF-8"),
])
def test_bad_own_rows(tmp_path, row, words):
    """What would end a run after the sampling, or in the middle of it."""
    (tmp_path / "a.png").write_bytes(png())
    good = {"prompt": "?", "answer": "1", "images": ["a.png"]}
    assert len(own(tmp_path, [good, good])) == 2
    with pytest.raises(InputError, match=f"own.jsonl:2: .*{words}"):
        own(tmp_path, [good, good | row])


def test_a_bad_row_is_said_before_a_model_is_loaded(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(E, "load_policy", None)
    (tmp_path / "a.png").write_bytes(encoded("jpeg")[:-300])
    rows = [{"prompt": "?", "answer": "1"}, {"prompt": "?", "answer": "1", "images": ["a.png"]}]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    assert stage("eval", "--ckpt", tiny.base, "--data", path, "--out", tmp_path / "out") == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert f"eval.py: error: {path}:2: image {tmp_path}/a.png cannot be read" in error
    assert not (tmp_path / "out").exists()


def test_a_picture_that_breaks_inside_is_said_before_a_model_is_loaded(
    tiny, tmp_path, capfd, monkeypatch
):
    """Header and end are right; the data between them are not."""
    monkeypatch.setattr(E, "load_policy", None)
    data = bytearray(encoded("png"))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (tmp_path / "a.png").write_bytes(data)
    rows = [{"prompt": "?", "answer": "1"}, {"prompt": "?", "answer": "1", "images": ["a.png"]}]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    flags = ["--data", path, "--max-new-tokens", 4, "--out", tmp_path / "out"]
    assert stage("eval", "--ckpt", tiny.base, *flags) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith(f"eval.py: error: {path}:2: image {tmp_path}/a.png cannot be read: ")
    assert error.count(path) == 1 and not (tmp_path / "out").exists()


def test_a_picture_that_is_lost_while_the_model_runs_names_file_and_row(
    tiny, tmp_path, capfd, monkeypatch
):
    look = E.look

    def look_and_lose(*args):
        found = look(*args)
        (tmp_path / "a.png").write_bytes(b"")
        return found

    monkeypatch.setattr(E, "look", look_and_lose)
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"prompt": "?", "answer": "1"}, {"prompt": "?", "answer": "1", "images": ["a.png"]}]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    flags = ["--data", path, "--max-new-tokens", 4, "--out", tmp_path / "out"]
    assert stage("eval", "--ckpt", tiny.base, *flags) == 2
    error = capfd.readouterr().err.splitlines()[-1]  # after the progress bar
    assert error.startswith(f"eval.py: error: {path}:2: image cannot be read"), error
    assert error.count(path) == 1


# --------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("max_tokens", [200, 1])
def test_threads_encode_and_few_prompts_are_alive_at_once(tiny, monkeypatch, max_tokens):
    """However many items there are, only those of one prefill and the few that come next are
    encoded at a time; in a pool for one rollout, where others start again and again, too. The
    rollouts are those of prompts that are all encoded before."""
    examples = Examples(load_examples(tiny.rl).files * 4, read=E.own)
    questions, limit = E.look(E.Benchmark(), examples, ONE), 9
    seen = SimpleNamespace(made=[], peak=0, begun=0)
    args = SimpleNamespace(slots=8, samples=2, temperature=1.5, max_new_tokens=limit, seed=5,
                           max_prompt=10**6, system_prompt=None, compile=False)
    settings = {"slots": 8, "temperature": 1.5, "max_new_tokens": limit, "max_tokens": max_tokens}
    tools, sample = (tiny.tokenizer, tiny.image_processor), E.sample
    prompts = [encode_prompt(questions[n], *tools) for n in range(48)]
    seeds = [(5, n) for n in range(48)]
    groups = sample(tiny.model, prompts, 2, eos_id=tiny.eos, seeds=seeds, **settings)
    expected = [(r.finished, len(r.ids), tiny.tokenizer.decode(r.content)) for r in sum(groups, [])]

    def encode(*given):
        prompt = encode_prompt(*given)
        assert threading.current_thread() is not threading.main_thread()
        seen.made.append(weakref.ref(prompt))
        seen.peak = max(seen.peak, sum(one() is not None for one in seen.made))
        return prompt

    def sample_it(*given, watch, **more):
        def watched(growing, ended):
            seen.begun = seen.begun or len(seen.made)
            watch(growing, ended)

        return sample(*given, watch=watched, **more | {"max_tokens": max_tokens})

    monkeypatch.setattr(E, "encode_prompt", encode)
    monkeypatch.setattr(E, "sample", sample_it)
    rows = E.generate(tiny.model, questions, *tools, args, ONE)
    assert [(row["finished"], row["tokens"], row["response"]) for row in rows] == expected
    pack = max(1, max_tokens // min(len(prompt.input_ids) for prompt in prompts))
    assert 1 < seen.peak <= pack + E.AHEAD and seen.begun <= 8 + E.AHEAD
    assert len(seen.made) == 48 or max_tokens == 1 and len(seen.made) > 48


# ---------------------------------------------------------------------------------------- k samples
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([1] * right + [0] * (n - right), k))
                assert E.pass_at_k(n, right, k) == pytest.approx(
                    sum(map(any, subsets)) / len(subsets)
                )


def test_metrics_of_samples(tmp_path):
    """Of 4 samples: 1/2 and 0.5 are the same vote; of equals the first wins; an item without any
    answer is lost."""
    rows = [{"prompt": "?", "answer": "1/2", "level": i % 2} for i in range(4)]
    questions = own(tmp_path, rows)
    said = [["1/2", "3", "0.5", "4"], ["7", "0.5", "7.0", "1/2"], ["3", "3", "3", "0.5"], [""] * 4]
    found = summary(questions, lambda item, n, s: said[n][s], 4)
    values = {
        key: cell["mean"]
        for key, cell in found.items()
        if isinstance(cell, dict) and "mean" in cell
    }
    assert values == pytest.approx({
        "accuracy": 5 / 16, "format": 1, "tokens": 9, "truncated": 0, "too_long": 0,
        "majority@4": 1 / 4,
        "pass@1": 5 / 16, "pass@2": (5 / 6 + 5 / 6 + 1 / 2) / 4, "pass@4": 3 / 4})
    assert found["by"]["level"] == {
        "0": {"items": 2, "accuracy": 3 / 8},
        "1": {"items": 2, "accuracy": 1 / 4},
    }


# --------------------------------------------------------------------------------------- statistics
def test_p_values_are_uniform_under_the_null_and_small_under_a_difference():
    """Kolmogorov-Smirnov by hand: 300 p-values of differences without an effect stay within
    1.63 / sqrt(300) (1 %)."""
    rng = np.random.default_rng(0)
    differences = rng.normal(0, 1, (300, 25)) * rng.uniform(0.5, 2, 25)
    p = np.sort([E.p_value(d, i) for i, d in enumerate(differences)])
    steps = np.arange(301) / 300
    assert max(np.abs(p - steps[1:]).max(), np.abs(p - steps[:-1]).max()) < 1.63 / np.sqrt(300)
    assert 0.02 < np.mean(p < 0.05) < 0.085
    planted = [E.p_value(d, i) for i, d in enumerate(differences[:30] + 1.5)]
    assert np.mean(np.array(planted) < 0.05) > 0.9
    right = rng.random((2, 400)) < 0.5  # verdicts are 0 or 1: the test is exact or on the safe side
    assert E.p_value(right[0] * 0.0) == 1
    assert E.p_value(np.sort(right[0]) * 1.0 - np.sort(right[1])) > 1e-4


def test_permutation_equals_enumeration():
    d = np.array([1.0, -2.0, 3.0, 0.0, 5.0, -0.5])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    exact = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12)
    assert E.p_value(d) == pytest.approx(exact, abs=0.015)


def width(values, families=None):
    values = np.asarray(values, float).reshape(len(values), -1)
    families = np.arange(len(values)) if families is None else families
    cell = E.interval(*E.bootstrap(values, families, np.ones(len(values))))
    return cell["high"] - cell["low"], cell["mean"]


def test_bootstrap():
    """As wide as theory says; four copies of an item are no more evidence than one; seeds that
    differ make it wider."""
    rng = np.random.default_rng(1)
    values = (rng.random(300) < 0.4).astype(float)
    plain, mean = width(values)
    assert mean == pytest.approx(values.mean()) and plain == pytest.approx(
        2 * 1.96 * values.std() / np.sqrt(300), rel=0.08
    )
    copies, families = np.repeat(values, 4), np.repeat(np.arange(300), 4)
    assert width(copies, families)[0] == pytest.approx(plain, rel=0.05)
    assert width(copies)[0] < 0.6 * plain
    seeds = values[:, None] + np.array([-0.2, 0.0, 0.2])
    assert width(np.repeat(values[:, None], 3, 1))[0] == pytest.approx(plain, rel=0.05)
    theory = 2 * 1.96 * np.sqrt(values.var() / 300 + np.var([-0.2, 0, 0.2]) / 3)
    assert width(seeds)[0] == pytest.approx(theory, rel=0.1) and width(seeds)[0] > 2 * plain


def test_unequal_families_keep_the_mean():
    values, families = np.array([1.0, 1, 1, 0, 0]), np.array([0, 0, 0, 1, 2])
    assert width(values, families)[1] == 0.6


@pytest.mark.parametrize("right, n", [(1, 100), (0, 100), (1, 3), (0.5, 40)])
def test_wilson(right, n):
    """Where all families agree a bootstrap has no width. The limits are those shares x from which
    the observed one lies 1.96 standard errors away: |p - x| = 1.96 sqrt(x (1 - x) / n)."""
    values = np.full(n, float(right))
    families = np.arange(n)
    if right == 0.5:  # one right and one wrong in each family of two
        values, families = np.tile([0.0, 1.0], n), np.repeat(families, 2)
    cell = E.interval(*E.bootstrap(values[:, None], families, np.ones(len(values)), "data", "name"))
    assert cell["mean"] == right
    for x in (cell["low"], cell["high"]):
        assert abs(right - x) == pytest.approx(1.96 * np.sqrt(x * (1 - x) / n), rel=0.01, abs=1e-7)
        assert 0 <= x <= 1
    assert cell["high"] - cell["low"] > 1 / n
    assert (cell["high"] > 1 - 1e-9) == (right == 1) and (cell["low"] < 1e-9) == (right == 0)


def test_wilson_is_for_shares_that_all_agree(tmp_path):
    """100 of 100 is 96.3 to 100 %, in the mean over test sets and in differences, too; a number of
    tokens is no share; with one miss the bootstrap speaks."""
    questions = own(tmp_path, [{"prompt": "?", "answer": "1"}] * 100)
    rows = [generations(questions, lambda *_: "1")]
    summaries = {}
    for name in ("one", "two"):
        tests = {data: E.summarise(rows, questions.benchmark, data, name) for data in "ab"}
        summaries[name] = tests | {"mean": E.average(list(tests.values()))}
    cells = summaries["one"]["a"].cells
    assert E.percent(cells["accuracy"]) == E.percent(cells["format"]) == "100.0 [96.3, 100.0]"
    assert E.percent(cells["truncated"]) == "0.0 [0.0, 3.7]"
    assert (cells["tokens"]["low"], cells["tokens"]["high"]) == (9, 9)
    assert 0.97 < summaries["one"]["mean"].cells["accuracy"]["low"] < 0.99
    for cell in E.compare(summaries):
        assert (
            cell["mean"] == 0
            and cell["p"] == 1
            and -0.06 < cell["low"] < -0.01 < 0.01 < cell["high"]
        )
    missed = [generations(questions, lambda item, n, s: str(min(n, 1)))]
    cell = E.summarise(missed, questions.benchmark, "a", "one").cells["accuracy"]
    assert (cell["mean"], cell["low"], cell["high"]) == (0.99, 0.97, 1)


def test_holm():
    assert E.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert E.holm([0.9, 0.8]) == [1, 1] and E.holm([]) == []


# -------------------------------------------------------------------------------------------- judge
@pytest.fixture
def server(monkeypatch):
    """A judge on the loopback: yes to 'a dozen', no verdict on 'mumble', fails first on 'again' and
    always on 'broken'."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            seen.append(
                SimpleNamespace(
                    text=text,
                    path=self.path,
                    key=self.headers["Authorization"],
                    model=body["model"],
                )
            )
            tries = sum(one.text == text for one in seen)
            asked = text + body["model"]
            bad = "broken" in asked or "again" in text and tries == 1
            self.send_response(401 if body["model"] == "denied" else 500 if bad else 200)
            self.end_headers()
            word = "Yes." if "a dozen" in text or "again" in text else "no"
            word = "Perhaps." if "mumble" in asked else word
            self.wfile.write(json.dumps({"choices": [{"message": {"content": word}}]}).encode())

        def log_message(self, *args):
            pass

    found = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setattr(E, "JUDGE_WAITS", (0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    yield SimpleNamespace(url=f"http://127.0.0.1:{found.server_port}/v1", seen=seen)
    found.shutdown()
    found.server_close()


def test_judge(tmp_path, server):
    """It is asked only about what is neither right nor plainly wrong, once; without a verdict a row
    stays wrong."""
    said = [
        "12",
        "13",
        "B",
        "no",
        "",
        "a dozen",
        "some eggs",
        "mumble mumble",
        "again and again",
        "broken record",
        "a dozen",
    ]
    rows = [{"prompt": "How many eggs?", "answer": "12"} for _ in said]
    questions = own(tmp_path, rows)
    args = SimpleNamespace(judge=server.url, judge_model="m", folder=str(tmp_path / "out"))
    rows = E.judge(generations(questions, lambda item, n, s: said[n]), questions, args, ONE)
    assert [row["accuracy"] for row in rows] == [1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1]
    assert [row.get("judged", "closed") for row in rows] == ["closed"] * 5 + [
        True,
        False,
        None,
        True,
        None,
        True,
    ]
    assert {(one.path, one.key, one.model) for one in server.seen} == {
        ("/v1/chat/completions", "Bearer secret", "m")
    }
    assert not any("\n13\n" in one.text for one in server.seen)
    before = len(server.seen)
    again = E.judge(
        generations(questions, lambda item, n, s: said[n]), questions, args, ONE
    )  # from OUT/judge.jsonl
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]
    assert all("mumble" in one.text or "broken" in one.text for one in server.seen[before:])
    found = E.summarise([rows], questions.benchmark, "own", "x").cells
    assert found["judge"] == {"responses": 11, "open": 6, "decided": 4, "right": 3}


def test_judge_that_is_not_there(tmp_path, monkeypatch):
    """Connection refused, and a server that accepts and never answers."""
    monkeypatch.setattr(E, "JUDGE_WAITS", (0, 0))
    monkeypatch.setattr(E, "JUDGE_SECONDS", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    silent = socket.create_server(("127.0.0.1", 0))
    for port, cause in ((silent.getsockname()[1], "timed out"), (9, "Connection refused")):
        args = SimpleNamespace(judge=f"http://127.0.0.1:{port}", judge_model="m")
        with pytest.raises(InputError, match=f"--judge: .*127.0.0.1:{port}.*{cause}"):
            E.ask("?", args)
    silent.close()


def test_a_judge_without_a_verdict_is_said_before_the_sampling(
    tiny, tmp_path, capfd, server, monkeypatch
):
    """No server, one that fails, and one whose replies are no verdict: a line that names address
    and cause, instead of a table of answers that nobody has judged."""
    monkeypatch.setattr(E, "load_policy", None)
    monkeypatch.setattr(E, "JUDGE_SECONDS", 0.5)
    silent = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
    path = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "?", "answer": "1"}])
    for url, model, words in (
        ("http://127.0.0.1:9", "m", "http://127.0.0.1:9/chat/completions .*Connection refused"),
        (address, "m", f"{address}/chat/completions .*timed out"),
        (server.url, "broken", f"{server.url}/chat/completions .*HTTPError: HTTP Error 500"),
        (server.url, "denied", f"{server.url}/chat/completions .*HTTPError: HTTP Error 401"),
        (server.url, "mumble", f"{server.url}/chat/completions .neither yes nor no: Perhaps"),
    ):
        flags = ["--data", path, "--judge", url, "--judge-model", model, "--out", tmp_path / "out"]
        assert stage("eval", "--ckpt", tiny.base, *flags) == 2
        (error,) = capfd.readouterr().err.splitlines()
        assert E.re.search(f"eval.py: error: --judge: no verdict from {words}", error), error
        assert not (tmp_path / "out").exists()
    tries = [sum(one.model == model for one in server.seen) for model in ("broken", "denied")]
    assert tries == [2, 1]  # a wrong key will not mend
    silent.close()


# ----------------------------------------------------------------------------------------- identity
ROW = {"prompt": "<image>How?", "answer": "1", "options": ["1", "2"], "images": ["a.png"]}


@pytest.fixture
def kept(tmp_path):
    """OUT with the complete generations of a checkpoint on own.jsonl; plan() is what --resume
    asks."""
    data, weights = tmp_path / "own.jsonl", tmp_path / "ckpt"
    (tmp_path / "a.png").write_bytes(png())
    write_jsonl(data, [ROW, ROW])
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(3_000_000))
    flags = {"seed": 0, "samples": 1, "temperature": 0.0, "max_new_tokens": 8, "max_prompt": 99}
    flags |= {"min_pixels": None, "max_pixels": None, "system_prompt": None, "resume": True}
    flags["dtype"] = "auto"
    args = SimpleNamespace(folder=str(tmp_path / "out"), **flags)

    def plan(data=data, weights=weights, **changed):
        test_set = E.look(
            E.Benchmark(), Examples(load_examples(str(data)).files, read=E.own), ONE
        )
        changed = SimpleNamespace(**{**vars(args), **changed})
        return E.plan({str(weights): "ckpt"}, {"own": test_set}, changed)[0], test_set

    job, test_set = plan()
    assert not job.kept
    E.write_generations(job, generations(test_set, lambda *_: "1"))
    assert plan()[0].kept
    return SimpleNamespace(plan=plan, data=data, weights=weights, folder=tmp_path)


@pytest.mark.parametrize("change, words", [
    ({"answer": "2"}, "gold answers"), ({"answer": ["1", "2"]}, "gold answers"),
    ({"options": ["1", "3"]}, "options"), ({"prompt": "<image>How many?"}, "questions"),
    ({"id": "y"}, "questions"), ({"level": 3}, "questions"), ({"images": ["b.png"]}, "pictures"),
])
def test_resume_notices_another_test_set(kept, change, words):
    (kept.folder / "b.png").write_bytes(png((32, 33)))
    write_jsonl(kept.data, [ROW, ROW | change])
    with pytest.raises(InputError, match=rf"own.jsonl .* was made with other data .*\({words}\)"):
        kept.plan()
    write_jsonl(kept.data, [ROW, ROW])
    assert kept.plan()[0].kept


def test_resume_notices_rows_flags_and_damage(kept):
    for flag, value in (
        ("seed", 1),
        ("temperature", 0.5),
        ("max_new_tokens", 9),
        ("max_pixels", 9),
    ):
        name = "--" + flag.replace("_", "-")
        with pytest.raises(InputError, match=rf"other data or flags \({name}\)"):
            kept.plan(**{flag: value})
    prompt = kept.folder / "system.txt"
    prompt.write_text("Think.")
    with pytest.raises(InputError, match=r"\(--system-prompt\)"):
        kept.plan(system_prompt=str(prompt))
    write_jsonl(kept.data, [ROW] * 3)
    with pytest.raises(InputError, match=r"\(gold answers, number of responses, options, pict"):
        kept.plan()
    write_jsonl(kept.data, [ROW, ROW])
    file = kept.folder / "out" / "ckpt" / "own.jsonl"
    whole = file.read_text()
    file.write_text(whole.splitlines()[0])
    with pytest.raises(InputError, match=r"\(number of responses\)"):
        kept.plan()
    file.write_text(whole)
    file.with_suffix(".json").unlink()
    with pytest.raises(InputError, match="No such file"):
        kept.plan()


def test_resume_notices_other_weights_and_takes_a_copy(kept):
    """One number of a thousand is enough, and a step of training changes more; times and places are
    nothing."""
    other = kept.folder / "other"
    shutil.copytree(kept.weights, other)
    os.utime(other / "model.safetensors", (0, 0))
    moved = kept.folder / "moved"
    moved.mkdir()
    (moved / "a.png").write_bytes(png())
    assert kept.plan(data=write_jsonl(moved / "renamed.jsonl", [ROW, ROW]), weights=other)[0].kept
    (other / "meta.json").write_text("when it was made")
    assert kept.plan(weights=other)[0].kept
    data = np.frombuffer((other / "model.safetensors").read_bytes(), np.uint8).copy()
    data[len(data) // 2 :][np.random.default_rng(1).random(len(data) // 2) < 1e-3] ^= 1
    (other / "model.safetensors").write_bytes(data.tobytes())
    with pytest.raises(InputError, match=r"\(--ckpt\)"):
        kept.plan(weights=other)


# ------------------------------------------------------------------------------------------- report
def test_names_break_neither_table_nor_figure(tmp_path):
    """A pipe is a column, two dollars are mathematics, a newline ends a line, half a surrogate no
    file takes."""
    names = ["a|b", "$x^{", "$\\frac$", "two\nlines", "half \ud800"]
    questions = own(
        tmp_path, [{"prompt": "?", "answer": "1", "level": name[:5]} for name in names[:4]]
    )
    rows = generations(questions, lambda item, n, s: str(n))
    runs = {name: {data: rows for data in names} for name in names}
    args = SimpleNamespace(folder=str(tmp_path))
    E.report(runs, {name: [name] for name in names}, dict.fromkeys(names, questions), args, 7)
    table = (tmp_path / "table.md").read_text()
    assert "a\\|b" in table and "\\$x^{" in table and "two lines" in table and "half ?" in table
    bars = {line.replace("\\|", "").count("|") for line in table.splitlines() if line[:1] == "|"}
    assert bars == {8, 11, 10}  # columns and 1: 1 + 5 + mean; the details; 4 + 5 of the breakdown
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text())["reward_timeouts"] == 7


# ------------------------------------------------------------------------------------------ scripts
@pytest.fixture(scope="module")
def compared(tiny, policy, tmp_path_factory):
    """base against two seeds of a trained policy, on an own file and on a copy of a benchmark. At
    temperature 1 one of hundreds of rare tokens may change with the rounding of another batch, that
    is of another number of processes; at 0.5 none weighs."""
    out = tmp_path_factory.mktemp("compared")
    (out / "a.png").write_bytes(png())
    rows = [ROWS["mathvision"][1] | {"id": str(i), "level": i % 3} for i in range(4)]
    path = write_jsonl(out / "vision.jsonl", rows)
    other = out / "other"
    other.symlink_to(policy)
    flags = ["--ckpt", tiny.base, f"trained={policy},{other}", "--data", tiny.rl, "--bench",
             f"mathvision={path}",
             "--max-new-tokens", 24, "--samples", 3, "--temperature", 0.5, "--max-prompt", 2000,
             "--seed", 1]
    assert stage("eval", *flags, "--out", out / "one") == 0
    return SimpleNamespace(out=out, flags=flags)


def test_comparison(compared):
    """The report repeats what can be counted in the generations."""
    out = compared.out / "one"
    found = json.loads((out / "results.json").read_text())
    rows = {name: read_jsonl(out / name / "rl.jsonl") for name in ("base", "policy", "other")}
    accuracy = {name: np.mean([row["accuracy"] for row in part]) for name, part in rows.items()}
    keys = {"item", "id", "sample", "response", "finished", "tokens", "accuracy", "format"}
    assert all(len(part) == 36 and set(part[0]) >= keys for part in rows.values())
    assert accuracy["policy"] == accuracy["other"] > accuracy["base"] + 0.2
    assert found["results"]["base"]["rl"]["accuracy"]["mean"] == pytest.approx(accuracy["base"])
    heads = found["results"]["trained"]
    assert heads["rl"]["format"]["mean"] == pytest.approx(
        np.mean([row["format"] for row in rows["policy"]])
    )
    assert set(heads["mathvision"]["by"]) == {"subject", "level"} and list(heads) == [
        "mathvision",
        "rl",
    ]
    assert found["mean"]["trained"]["mean"] == pytest.approx(
        np.mean([s["accuracy"]["mean"] for s in heads.values()])
    )
    cells = {cell["data"]: cell for cell in found["differences"]}
    assert set(cells) == {"rl", "mathvision", "mean"}
    assert cells["rl"]["mean"] == pytest.approx(accuracy["policy"] - accuracy["base"])
    assert cells["rl"]["p"] < 0.05 and cells["rl"]["low"] > 0
    assert all(cell["p_holm"] >= cell["p"] for cell in cells.values())
    assert found["reward_timeouts"] == 0
    table = (out / "table.md").read_text()
    assert table.count("over two seeds is not to be trusted") == 1
    assert "\ntrained: an interval over two seeds is not to be trusted.\n" in table
    assert "| trained |" in table and "majority@3" in table
    assert "| mathvision | level | 2 | 1 |" in table
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_generations_has_the_wrong_ones_first(compared):
    out = compared.out / "one"
    text = (out / "policy" / "rl.html").read_text()
    lines = json.loads(re.findall('id="lines">(.*)</script>', text)[0])
    made = read_jsonl(out / "policy" / "rl.jsonl")
    assert sorted((line["id"], line["sample"], line["response"]) for line in lines) == sorted(
        (row["id"], row["sample"], row["response"]) for row in made
    )
    accuracy = [line["accuracy"] for line in lines]
    assert accuracy == sorted(accuracy) and set(accuracy) == {0.0, 1.0}
    assert all("How many" in line["question"] and line["gold"] for line in lines)
    pictures = {name for line in lines for name in line["images"]}
    assert pictures and all((out / "policy" / name).is_file() for name in pictures)


def test_resume_repeats_only_what_is_missing(compared, capfd, monkeypatch):
    out = compared.out / "one"
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    gone = out / "base" / "mathvision.jsonl"
    gone.unlink()
    calls, generate = [], E.generate
    monkeypatch.setattr(E, "generate", lambda *args: calls.append(1) or generate(*args))
    assert stage("eval", *compared.flags, "--out", out, "--resume") == 0
    assert len(calls) == 1 and {path: path.read_bytes() for path in out.rglob("*.jsonl")} == before
    monkeypatch.setattr(E, "timeouts", lambda: 3)
    assert stage("eval", *compared.flags, "--out", out, "--resume") == 0 and len(calls) == 1
    assert json.loads((out / "results.json").read_text())["reward_timeouts"] == 3
    capfd.readouterr()
    assert stage("eval", *compared.flags, "--seed", 2, "--out", out, "--resume") == 2
    assert "was made with other data or flags (--seed)" in capfd.readouterr().err


def test_help_names_the_benchmarks():
    assert E.BENCHMARK_NAMES == (*E.BENCHMARKS,)


def test_compiled_steps_say_the_same(compared, monkeypatch):
    """With --compile, here without a compiler."""
    steps = []

    def step(*inputs):
        steps.append(1)
        return rollout.decode_step(*inputs)

    monkeypatch.setattr(rollout, "compiled_decode_step", lambda: step)
    flags = [*compared.flags, "--out", compared.out / "compiled", "--compile"]
    assert stage("eval", *flags) == 0 and steps
    for path in (compared.out / "one").rglob("*.jsonl"):
        other = compared.out / "compiled" / path.relative_to(compared.out / "one")
        assert other.read_bytes() == path.read_bytes()


def test_two_processes_write_what_one_writes(compared):
    run_stage("eval", [*compared.flags, "--out", compared.out / "two"], 2)
    for path in (compared.out / "one").rglob("*.jsonl"):
        assert (
            compared.out / "two" / path.relative_to(compared.out / "one")
        ).read_bytes() == path.read_bytes()


def test_two_processes_refuse_together(compared, tmp_path):
    """The first of two bad rows, and a --resume that only one process looks at: one line, and
    nobody waits for the others."""
    (tmp_path / "a.png").write_bytes(png()[:-40])
    rows = [{"prompt": "?", "answer": "1"}, {"prompt": "?", "answer": "1", "images": ["a.png"]}]
    path = write_jsonl(tmp_path / "own.jsonl", [*rows, rows[1]])  # each process has a bad row
    out = compared.out / "one"
    for flags, words in (
        (["--data", path], f"{path}:2: image {tmp_path}/a.png cannot be read"),
        (["--seed", 3, "--out", out, "--resume"], "was made with other data or flags (--seed)"),
    ):
        begun = compared.flags
        if "--data" in flags:
            at = begun.index("--data")
            begun = begun[:at] + begun[at + 2 :]
        flags = [*begun, "--out", tmp_path / "out", *flags]
        result = launch("eval.py", *flags, processes=2)
        errors = [line for line in result.stderr.splitlines() if "eval.py: error:" in line]
        assert result.returncode and len(errors) == 1 and words in errors[0], result.stderr[-3000:]
    assert not (tmp_path / "out").exists()


def test_difficulty_filter(tiny, policy, tmp_path, capfd):
    """The rows that are kept carry their rate, load as training data, and see the same pictures."""
    out = tmp_path / "deep" / "rl_data.jsonl"
    flags = [
        "--ckpt",
        policy,
        "--data",
        tiny.rl,
        "--samples",
        6,
        "--max-new-tokens",
        24,
        "--keep-pass-rate",
        0.2,
        0.8,
    ]
    assert stage("eval", *flags, "--out", out) == 0
    said = capfd.readouterr().out
    generated = read_jsonl(tmp_path / "deep" / "rl_data_eval" / "policy" / "rl.jsonl")
    rates = np.array([row["accuracy"] for row in generated]).reshape(-1, 6).mean(1)
    inside = [i for i, rate in enumerate(rates) if 0.2 <= rate <= 0.8]
    kept = read_jsonl(out)
    assert inside and len(kept) == len(inside)
    assert [row["pass_rate"] for row in kept] == [rates[i] for i in inside]
    assert f"kept {len(inside)} of 12 rows, dropped {sum(rates < 0.2)} too hard" in said
    assert f"{sum(rates > 0.8)} too easy" in said
    before, after = load_examples(tiny.rl), load_examples(str(out))
    for n, i in enumerate(inside):
        assert (after[n].prompt, after[n].answer) == (before[i].prompt, before[i].answer)
        pictures = [
            [E.Image.open(path).tobytes() for path in examples.images]
            for examples in (before[i], after[n])
        ]
        assert pictures[0] == pictures[1] and all(
            not path.startswith("/") for path in kept[n].get("images", [])
        )
    flags = [*flags[:-2], 0.999, 1, "--out", tmp_path / "none.jsonl", "--max-prompt", 3]
    assert stage("eval", *flags) == 2
    error = capfd.readouterr().err
    assert "kept 0 of 12 rows, dropped 12 too hard" in error and "12 of them longer" in error
    assert not (tmp_path / "none.jsonl").exists()


def test_difficulty_filter_of_parquet(tiny, policy, tmp_path):
    """Pictures inside the file get files of their own."""
    from datasets import Dataset, Features, Image, List, Value

    features = Features(
        {"problem": Value("string"), "answer": Value("string"), "images": List(Image())}
    )
    rows = [
        {"problem": "<image>How many?", "answer": "1", "images": [{"bytes": png(), "path": None}]}
    ]
    Dataset.from_list(rows, features).to_parquet(tmp_path / "data.parquet")
    flags = [
        "--ckpt",
        policy,
        "--data",
        tmp_path / "data.parquet",
        "--samples",
        2,
        "--max-new-tokens",
        4,
    ]
    assert stage("eval", *flags, "--keep-pass-rate", 0, 1, "--out", tmp_path / "kept.jsonl") == 0
    (example,) = load_examples(str(tmp_path / "kept.jsonl"))
    assert open(example.images[0], "rb").read() == png() and example.answer == "1"


def test_difficulty_filter_of_columns_that_json_cannot_hold(tmp_path, capsys):
    """Known after the sampling only: they are left out, with their names, the rows are not."""
    rows = [{"problem": f"{i} or 1?", "answer": "1", "day": date(2026, 1, 1)} for i in range(2)]
    rows[1]["thumb"] = b"png"
    table = pyarrow.Table.from_pylist([{"thumb": None} | row for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "own.parquet")
    files = load_examples(str(tmp_path / "own.parquet")).files
    questions = E.look(E.Benchmark(), Examples(files, read=E.own), ONE)
    out = str(tmp_path / "kept.jsonl")
    args = SimpleNamespace(keep_pass_rate=(0, 1), out=out, folder=str(tmp_path / "more"))
    E.keep_rows({"own": generations(questions, lambda *_: "1")}, {"own": questions}, args)
    assert "kept 2 of 2" in (said := capsys.readouterr().out)
    assert "that JSON cannot hold: day, thumb" in said
    columns = [{"problem": row["problem"], "answer": "1", "pass_rate": 1.0} for row in rows]
    assert read_jsonl(out) == columns


def test_a_folder_with_an_equals_sign_is_no_name(tmp_path):
    (tmp_path / "lr=1").mkdir()
    ckpts, folders = E.checkpoints([f"{tmp_path}/lr=1", f"two={tmp_path}/a,{tmp_path}/b"])
    assert ckpts == {"lr=1": [f"{tmp_path}/lr=1"], "two": [f"{tmp_path}/a", f"{tmp_path}/b"]}
    assert list(folders) == [f"{tmp_path}/{name}" for name in ("lr=1", "a", "b")]


def test_difficulty_filter_of_pictures_in_the_chat(tmp_path):
    """They are kept once, and found from the folder of --out."""
    (tmp_path / "a.png").write_bytes(png())
    turn = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How many?"}]
    chat = [{"role": "user", "content": turn}, {"role": "assistant", "content": "2"}]
    questions = own(tmp_path, [{"messages": chat, "answer": "1", "level": 3}])
    out = str(tmp_path / "deep" / "kept.jsonl")
    args = SimpleNamespace(keep_pass_rate=(0, 1), out=out, folder=str(tmp_path / "deep" / "more"))
    E.keep_rows({"own": generations(questions, lambda *_: "1")}, {"own": questions}, args)
    (before,), (after,) = load_examples(str(tmp_path / "own.jsonl")), load_examples(out)
    for name in ("prompt", "answer", "response"):
        assert getattr(after, name) == getattr(before, name)
    (image,) = after.images
    assert open(image, "rb").read() == png()
    assert (after.row["level"], after.row["pass_rate"]) == (3, 1)


@pytest.mark.parametrize("flags, words", [
    (["--data", "FILE", "--out", "FILE"], "--data FILE"),
    (["--data", "FILE", "--out", "."], "--ckpt ck"),
    (["--data", "rows", "--out", "rows/out"], "--data rows"),
    (["--data", "rows/*.jsonl", "--out", "rows"], "--data rows/*.jsonl"),
    (["--bench", "mathvision=FILE", "--out", "rows"], "--bench FILE"),
    (["--data", "FILE", "--out", "ck"], "--ckpt ck"),
    (["--data", "FILE", "--out", "ck/out"], "--ckpt ck"),
    (["--data", "FILE", "--out", "FILE", "--keep-pass-rate", 0, 1], "--data FILE"),
    (["--data", "rows", "--out", "rows/b.jsonl", "--keep-pass-rate", 0, 1], "--data rows"),
    (["--data", "FILE", "--ckpt", "b=ck,rows_eval", "--out", "rows_eval"], "--ckpt rows_eval"),
    (["--data", "FILE", "--ckpt", "rows_eval", "--out", "rows.jsonl", "--keep-pass-rate", 0, 1],
     "--ckpt rows_eval"),
])
def test_nothing_that_is_read_is_written_over(tiny, tmp_path, capfd, monkeypatch, flags, words):
    """Test set, checkpoint and OUT are each other's neighbours, not each other."""
    monkeypatch.chdir(tmp_path)
    for name in ("ck", "rows_eval"):
        shutil.copytree(tiny.base, name)
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "a.jsonl", [{"prompt": "?", "answer": "1"}])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    flags = [str(flag).replace("FILE", "rows/a.jsonl") for flag in flags]
    ckpt = [] if "--ckpt" in flags else ["--ckpt", "ck"]
    assert stage("eval", *ckpt, *flags) == 2
    error = capfd.readouterr().err
    words = f"is, holds or lies in {words.replace('FILE', 'rows/a.jsonl')}; give another"
    assert error.startswith("eval.py: error: --out ") and error.endswith(f"{words}\n"), error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("flags, words", [
    ([], "--bench or --data"),
    (["--bench", "imagenet"], "--bench imagenet: unknown; there are mathvista"),
    (["--bench", "mmmu=nowhere"], "--bench mmmu=nowhere: .*nowhere: no such file"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--data", "DATA", "--samples", 2, "--temperature", 0], "--samples > 1 needs --temperature"),
    (["--data", "DATA", "--judge", "localhost"], "--judge localhost"),
    (["--data", "DATA", "DATA"], "the same name"),
    (["--data", "DATA", "--keep-pass-rate", 0.2, 0.8], "--keep-pass-rate .*--out FILE.jsonl"),
    (["--data", "DATA", "--keep-pass-rate", 0.8, 0.2, "--out", "OUT.jsonl"], "LOW <= HIGH"),
    (["--data", "DATA", "--ckpt", "BASE", "BASE"], "given twice"),
    (["--data", "ROWS"], "rows.jsonl:2: .* no answer"),
    (["--data", "DATA", "--slots", 0], "--slots"),
    (["--data", "DATA", "--temperature", "nan"], "--temperature: nan is not finite"),
    (["--data", "DATA", "--temperature", -1], "--temperature: -1: must be at least 0"),
    (["--data", "DATA", "--samples", 0], "--samples: 0: must be at least 1"),
    (["--data", "DATA", "--samples", 2.5], "--samples: 2.5 is no integer"),
    (["--data", "DATA", "--max-new-tokens", 10**9],
     "--max-new-tokens: 1000000000: must be at most"),
    (["--data", "DATA", "--max-prompt", 0], "--max-prompt: 0: must be at least 1"),
    (["--data", "DATA", "--seed", -1], "--seed: -1: must be at least 0"),
    (["--data", "DATA", "--keep-pass-rate", "nan", 1], "--keep-pass-rate: nan is not finite"),
    (["--data", "DATA", "--keep-pass-rate", 0, 2], "--keep-pass-rate: 2: must be at most 1"),
    (["--data", "DATA", "--system-prompt", "nowhere.txt"], "--system-prompt nowhere.txt"),
])
def test_bad_flags(tiny, tmp_path, capfd, flags, words):
    rows = [{"prompt": "?", "answer": "3"}, {"prompt": "?"}]
    names = {"DATA": tiny.rl, "BASE": tiny.base, "OUT.jsonl": tmp_path / "out.jsonl"}
    names["ROWS"] = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = [names.get(flag, flag) for flag in flags]
    assert stage("eval", "--ckpt", tiny.base, "--out", tmp_path / "out", *flags) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and E.re.search(f"eval.py: error: .*{words}", error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "question, accuracy, left_open",
    [("What per cent is red?", 1.0, False), ("How many are red?", 0.0, True)],
)  # fmt: skip
def test_per_cent_is_right_where_it_is_asked_for_and_else_open(question, accuracy, left_open):
    """As in a tenth of ChartQA's rows: the gold is 62, the answer 62%."""
    text = "<caption>a</caption><think>b</think><answer>62%</answer>"
    verdict = E.grade(text, Example("x", [{"role": "user", "content": question}], answer="62"))
    assert (verdict["accuracy"], verdict.get("open", False)) == (accuracy, left_open)


def test_a_checkpoint_named_by_dots_keeps_to_its_folder(tmp_path, monkeypatch):
    (tmp_path / "run" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "sub")
    assert E.short_names([".."]) == {"..": "run"} and E.short_names(["."]) == {".": "sub"}
    assert set(E.short_names(["..", "../../run"]).values()) & {"..", "."} == set()


def test_generations_are_not_replaced_without_a_word(tiny, tmp_path, capfd):
    flags = ["--ckpt", tiny.base, "--data", tiny.rl, "--max-new-tokens", 2, "--out", tmp_path]
    assert stage("eval", *flags) == 0
    before = (tmp_path / "base" / "rl.jsonl").stat().st_mtime_ns
    assert stage("eval", *flags, "--seed", 1) == 2 and "--overwrite" in capfd.readouterr().err
    assert (tmp_path / "base" / "rl.jsonl").stat().st_mtime_ns == before
    assert stage("eval", *flags, "--seed", 1, "--overwrite") == 0
    assert (tmp_path / "base" / "rl.jsonl").stat().st_mtime_ns > before
