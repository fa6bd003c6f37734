"""Run: pytest tests/test_data.py     (published formats, pictures, broken rows, sources; CPU only,
files made here)"""

import base64
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    ROOT,
    launch,
    noise,
    read_jsonl,
    run_stage,
    short,
    stage,
    stock_inputs,
    untimed,
    write_jsonl,
)
from PIL import Image

import runtime
from data import (
    Example,
    Examples,
    Feed,
    File,
    array_lines,
    attempt,
    check_text,
    encode_prompt,
    encode_response,
)
from data import load_examples, load_image, look, measure_prompt, mrope_positions, to_example
import rollout
from flags import InputError, Parser, common_flags, data_flags

ROWS = 200
FLAGS = ["--max-tokens", 2000, "--max-prompt", 800]
GAME = ["--prompts", 2, "--rollouts", 2, "--max-new-tokens", 24, "--steps", 2]


# -------------------------------------------------------------------------------- published formats
def picture(rng, kind="PNG"):
    buffer = io.BytesIO()
    noise(rng, [(64, 64), (96, 32), (32, 64)][rng.integers(3)]).save(buffer, kind)
    return buffer.getvalue()


def parts(rng, tagged):
    """(question, answer, caption, trace) with or without tags, as both occur."""
    response = short(rng, str(rng.choice(["even", "odd"])))
    found = rollout.parse_response(response)
    caption, trace = response.split("</caption>")
    if tagged:
        return "How many?", found.answer, caption + "</caption>", trace
    return "How many?", found.answer, found.caption, found.think


def sharegpt(rng, i, folder, dialect):
    question, answer, _, _ = parts(rng, True)
    asked, said = "<image>" * (i % 3) + question, short(rng, answer)
    if dialect == "messages":
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    else:
        chat = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    paths = []
    for k in range(i % 3):
        paths.append(f"{dialect}_{i}_{k}.png")
        (folder / paths[-1]).write_bytes(picture(rng))
    return {dialect: chat, "images": paths}


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def make_messages(folder, rng):
    """LLaMA-Factory ShareGPT, `messages`, paths relative to a .jsonl."""
    rows = [sharegpt(rng, i, folder, "messages") for i in range(ROWS)]
    return write_jsonl(folder / "data.jsonl", rows)


def make_conversations(folder, rng):
    """LLaMA-Factory ShareGPT, `conversations`, one JSON array."""
    rows = [sharegpt(rng, i, folder, "conversations") for i in range(ROWS)]
    (folder / "dataset.json").write_text(json.dumps(rows, indent=1))
    return folder / "dataset.json"


def make_shards(folder, rng):
    """The same in two parquet shards with the pictures inside."""
    for shard in range(2):
        rows = []
        for i in range(ROWS // 2):
            row = sharegpt(rng, 1 + i % 2, folder, "messages")
            paths = row["images"]
            row["images"] = [{"bytes": (folder / p).read_bytes(), "path": p} for p in paths]
            rows.append(row)
        write_parquet(folder / f"train-{shard:05d}-of-00002.parquet", rows)
    return folder


def published(rng, i):
    """A row of the alignment and RLVR sets."""
    question, answer, caption, trace = parts(rng, i % 4 < 2)
    user = {"role": "user", "content": "<image>" * (1 + i % 2) + question}
    also = [answer.upper()] if i % 2 else None
    return {
        "data_source": "made",
        "prompt": [{"role": "system", "content": "Look."}, user],
        "teacher_caption": caption,
        "teacher_cot": trace,
        "answer": answer,
        "teacher_response": short(rng, answer) if i % 2 else None,
        "reward_model": {"ground_truth": answer, "style": "rule", "equivalent_answers": also},
        "extra_info": {"index": i},
        "images": [{"bytes": picture(rng), "path": None} for _ in range(1 + i % 2)],
    }


def make_published(folder, rng):
    rows = [published(rng, i) for i in range(ROWS)]
    return write_parquet(folder / "rl_training_data.parquet", rows)


def make_geometry(folder, rng):
    """geometry3k: `problem` with one <image>, `answer`."""
    rows = []
    for _ in range(ROWS):
        pictures = [{"bytes": picture(rng), "path": None}]
        rows.append({"images": pictures, "problem": "<image>Find x.", "answer": "12"})
    return write_parquet(folder / "geometry.parquet", rows)


def make_pairs(folder, rng):
    """Discriminator warm-up pairs: a picture by path, teacher and student parts, no answer."""
    rows = []
    for i in range(ROWS):
        (folder / f"pair_{i}.jpg").write_bytes(picture(rng, "JPEG"))
        (question, _, *teacher), (_, _, *student) = (parts(rng, i % 4 < 2) for _ in range(2))
        row = {"id": f"p{i}", "image": f"pair_{i}.jpg", ("question", "prompt")[i % 2]: question}
        row |= dict(zip(("teacher_caption", "teacher_cot"), teacher))
        rows.append(row | dict(zip(("student_caption", "student_cot"), student)))
    return write_jsonl(folder / "pairs.jsonl", rows)


def make_ours(folder, rng):
    """Our own rows, gzipped."""
    rows = []
    for i in range(ROWS):
        question, answer, _, _ = parts(rng, True)
        row = {"id": f"r{i}", "prompt": question, "answer": answer, "images": []}
        row["response"] = short(rng, answer)
        if i % 2:
            (folder / f"{i}.png").write_bytes(picture(rng))
            row["images"] = [f"{i}.png"]
        rows.append(row)
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder / "rows.jsonl.gz"


# format: (stages it feeds)
FORMATS = {
    make_messages: ["sft", "score"],
    make_conversations: ["sft"],
    make_shards: ["sft"],
    make_published: ["sft", "align", "rl", "score"],
    make_geometry: ["rl"],
    make_pairs: ["pairs", "score"],
    make_ours: ["sft", "align", "rl"],
}


SCRIPTS = {"pairs": "discriminator", "score": "discriminator"}
CASES = [(make, kind) for make, kinds in FORMATS.items() for kind in kinds]
LAST = {kind: make for make, kind in CASES}  # format of each kind


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """format -> its file or folder, 200 rows."""
    made = {}
    for seed, make in enumerate(FORMATS):
        made[make] = make(tmp_path_factory.mktemp(make.__name__), np.random.default_rng(seed))
    return made


@pytest.fixture(scope="session")
def disc(tiny, policy, tmp_path_factory):
    out = tmp_path_factory.mktemp("disc") / "out"
    flags = ["--ckpt", policy, "--data", tiny.align, "--disc-lr", 1e-3, *GAME, *FLAGS]
    assert stage("align", *flags, "--out", out) == 0
    return out / "discriminator"


@pytest.mark.parametrize("make, kind", CASES, ids=[f"{m.__name__[5:]}-{kind}" for m, kind in CASES])
def test_published_formats_run_through_the_command_line(
    make, kind, files, tiny, policy, disc, tmp_path
):
    """No row is bad."""
    run_format(make, kind, files, tiny, policy, disc, tmp_path / "1", None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAST)
def test_two_processes_read_what_one_reads(kind, files, tiny, policy, disc, tmp_path):
    found = [run_format(LAST[kind], kind, files, tiny, policy, disc, tmp_path / out, processes)
             for out, processes in (("1", None), ("2", 2))]  # fmt: skip
    for left, right in zip(*found):
        assert left.pop("id", None) == right.pop("id", None)
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


def run_format(make, kind, files, tiny, policy, disc, out, processes):
    """A run of a stage on a format -> what it logged or scored."""
    data = files[make]
    flags = {
        "sft": ["--ckpt", tiny.base, "--data", data, "--batch", 4, "--steps", 2],
        "align": ["--ckpt", policy, "--data", data, *GAME],
        "rl": ["--ckpt", policy, "--data", data, *GAME],
        "pairs": ["--ckpt", tiny.base, "--pairs", data, "--batch", 4, "--steps", 2, "--lr", 1e-3],
        "score": ["--ckpt", disc, "--score", data],
    }[kind] + FLAGS
    run_stage(SCRIPTS.get(kind, kind), [*flags, "--out", out], processes)
    found = untimed(read_jsonl(out / ("scores.jsonl" if kind == "score" else "metrics.jsonl")))
    assert not (out / "skipped.jsonl").exists()
    assert len(found) == (ROWS if kind == "score" else 2)
    if kind == "score":
        assert len({row["perception"] for row in found}) > 10
    return found


def test_warmed_up_discriminator_starts_the_game(tiny, policy, tmp_path, files):
    """--pairs writes what align.py takes with --disc, and --resume continues it bitwise."""
    flags = ["--ckpt", tiny.base, "--pairs", files[make_pairs], "--batch", 8, "--lr", 1e-3, *FLAGS]
    # the learning rate depends on the steps of the whole run
    flags += ["--steps", 12, "--save-every", 5, "--keep", 3]
    assert stage("discriminator", *flags, "--out", tmp_path / "whole") == 0
    assert stage("discriminator", *flags, "--out", tmp_path / "broken") == 0
    (tmp_path / "broken" / "model.safetensors").unlink()
    for state in (tmp_path / "broken").glob("state*"):
        if state.name != "state.5":
            shutil.rmtree(state)
    assert stage("discriminator", *flags, "--out", tmp_path / "broken", "--resume") == 0
    saved = [tmp_path / out / "model.safetensors" for out in ("whole", "broken")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    log = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert log[0]["gap_v"] == log[0]["gap_r"] == 0 and log[0]["acc_v"] == 0.5  # zero heads
    assert log[-1]["loss_v"] != log[0]["loss_v"] and log[-1]["grad_norm"] > 0
    game = ["--ckpt", policy, "--data", tiny.align, "--disc", tmp_path / "whole", *GAME]
    assert stage("align", *game, "--out", tmp_path / "game") == 0
    assert abs(read_jsonl(tmp_path / "game" / "metrics.jsonl")[0].get("gap_v", 1.0)) > 0


def test_released_discriminator_is_trained_on_as_it_is(tiny, policy, tmp_path):
    """The Qwen3-VL-MoE folder as --disc: one and two processes agree, the saved folder scores what
    the trained one did."""
    flags = ["--ckpt", policy, "--data", tiny.align, "--disc", tiny.released, "--disc-lr", 1e-3]
    flags += [*GAME, *FLAGS]
    assert stage("align", *flags, "--out", tmp_path / "1") == 0
    run_stage("align", [*flags, "--out", tmp_path / "2"], 2)
    one, two = (read_jsonl(tmp_path / out / "metrics.jsonl") for out in "12")
    # the balance term alone depends on the packs of a rank
    for key in ("gap_v", "gap_r", "loss_v", "disc_grad_norm"):
        assert one[0][key] == pytest.approx(two[0][key], rel=0.02, abs=1e-4) and one[0][key] != 0
    scored = [tmp_path / "a", tmp_path / "b"]
    for out, ckpt in zip(scored, (tmp_path / "1" / "discriminator", tiny.released)):
        flags = ["--score", tiny.align, "--ckpt", ckpt, "--out", out, *FLAGS]
        assert stage("discriminator", *flags) == 0
    trained, before = (read_jsonl(out / "scores.jsonl") for out in scored)
    assert len(trained) == len(before) > 0
    assert all(a["combined"] != b["combined"] for a, b in zip(trained, before))


def test_another_vocabulary_is_refused(tiny, policy, tmp_path, capsys):
    from toy import checkpoint

    other, sizes = tmp_path / "other", {"hidden": 64, "layers": 2, "vision_layers": 1}
    checkpoint.make_checkpoint(str(other), ["quite another world of words"], **sizes)
    flags = ["--ckpt", policy, "--data", tiny.align, "--disc", other, *GAME]
    assert stage("align", *flags, "--out", tmp_path / "out") == 2
    assert "tokenizer differs" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- published rows
@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__[5:])
def test_rows_become_what_they_say(make, files, tiny):
    """Every row of every format: placeholders match pictures, pictures open, responses have their
    blocks."""
    examples = load_examples(str(files[make]))
    assert len(examples) == ROWS
    different = 0
    for i, example in enumerate(examples):
        text = "".join(message["content"] for message in example.prompt)
        assert text.count("<image>") in (0, len(example.images))
        assert example.prompt[-1]["role"] == "user"
        assert all(load_image(image).mode == "RGB" for image in example.images[:1])
        if make is not make_geometry:
            assert rollout.parse_response(example.response), example.response
        if make is make_published:
            assert isinstance(example.answer, list) == bool(i % 2)
            assert i % 2 == 0 or example.answer[1:] == [example.answer[0].upper()]
            assert example.prompt[0] == {"role": "system", "content": "Look."}
        if make is make_pairs:
            assert rollout.parse_response(example.rejected)
            different += example.rejected != example.response
    assert make is not make_pairs or different > ROWS / 2


@pytest.mark.parametrize("row, answer", [
    ({"answer": 7, "reward_model": {"ground_truth": None}}, "7"),
    ({"reward_model": {"ground_truth": None, "equivalent_answers": ["2", None]}}, ["2"]),
    ({"reward_model": {"ground_truth": "2", "equivalent_answers": "II"}}, ["2", "II"]),
    ({"answer": []}, None), ({"answer": float("nan")}, None), ({"answer": [None, ""]}, None), ({"answer": 2.5}, "2.5"),
])  # fmt: skip
def test_gold_answers(row, answer):
    """What is no answer is None, so that rl.py names the row instead of rewarding nothing or
    everything."""
    assert to_example({"prompt": "x"} | row, "x").answer == answer


def test_teacher_parts_with_some_tags():
    """A trace whose answer alone is tagged; a picture beside an empty list of pictures."""
    row = {"question": "x", "teacher_caption": "seen", "teacher_cot": "so\n<answer>5</answer>"}
    example = to_example(row | {"images": [], "image": b"y"}, "x")
    assert rollout.parse_response(example.response) == rollout.Response("seen", "so", "5")
    assert example.images == [b"y"]


# ------------------------------------------------------------------------------------------ sources
def test_sources(tmp_path):
    """A file, a folder of shards, a glob, several sources; gzipped or not; an array of objects that
    is read in pieces."""
    every = [f"question {i} ü" for i in range(50)]
    nested = {"a": [[1, [2]], "]"]}
    rows = [{"prompt": text, "answer": i, "nested": nested} for i, text in enumerate(every)]
    write_jsonl(tmp_path / "a.jsonl", rows[:20])
    (tmp_path / "b.json").write_text("\n  " + json.dumps(rows[20:], indent=2, ensure_ascii=False))
    def asked(*sources):
        return [e.prompt[0]["content"] for e in load_examples(list(map(str, sources)))]
    assert asked(tmp_path) == asked(tmp_path / "*.json*") == every
    assert asked(tmp_path / "a.jsonl", tmp_path / "b.json") == every
    for chunk in (1, 7, 1000):
        with open(tmp_path / "b.json", "rb") as file, array_lines(file, chunk) as lines:
            lines.seek(0)
            assert [json.loads(line) for line in lines] == rows[20:]
    # with the mark that Windows puts there
    with gzip.open(tmp_path / "c.json.gz", "wt", encoding="utf-8-sig") as file:
        json.dump(rows, file)
    assert asked(tmp_path / "c.json.gz") == every
    (tmp_path / "clone" / "data").mkdir(parents=True)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "clone" / "data")
    assert asked(tmp_path / "clone") == every[:20]
    examples = load_examples([f"{tmp_path}/a.jsonl:0.9", f"{tmp_path}/b.json:0.1"])
    assert examples.sources == [(0, 20, 0.9), (20, 30, 0.1)] and len(examples) == 50
    assert load_examples([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.json"]).sources == ()
    assert examples.where(3) == (f"{tmp_path}/a.jsonl", 4)
    assert examples.where(21) == (f"{tmp_path}/b.json", 2)
    # blank lines count
    (tmp_path / "d.jsonl").write_text("\n\n" + json.dumps(rows[0]) + "\n\n" + "broken")
    assert load_examples(str(tmp_path / "d.jsonl")).where(0)[1] == 3
    with pytest.raises(InputError, match="d.jsonl:5: not JSON"):
        load_examples(str(tmp_path / "d.jsonl"))[1]


@pytest.mark.parametrize("content, match", [
    (b"", "empty"), (b"\n\n", "empty"), (b"[]", "empty"), (b"[{", "not JSON"), (b'[{"prompt": "x"}', "not JSON"),
    (b"PAR1 and no more", "parquet"), (b"\x1f\x8b\x08 cut", "data:"), (b"no json", ":1: not JSON"), (b"3", "JSON object"),
    (b'{"text": "x"}', "none of the columns"), (b'[{"prompt": "x"}]\n[{"prompt": "y"}]', "more after the end"),
])  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, content, match):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(InputError, match=match) as caught:
        load_examples(str(tmp_path / "data"))[0]
    assert str(tmp_path / "data") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [
    "prism-vlm/rl_dataset:rl_training_data_5.9k.parquet", "prism-vlm/gemini_distill",
])  # fmt: skip
def test_hub_ids_are_asked_for_at_the_hub(monkeypatch, source):
    """Also a file of a data set; the Hub itself is out of reach here."""
    asked = []
    def load_dataset(*args, **more):
        asked.append((args, more))
        raise OSError("no network")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match="nor a data set that the Hub gives"):
        load_examples(source, "validation")
    name, _, file = source.partition(":")
    assert asked == [((name,), {"data_files": file or None, "split": "validation"})]


@pytest.mark.parametrize("sources", [
    ["a:-1", "b:1"], ["a:nan", "b:1"], ["a:0.5", "b"], ["a:0", "b:1"],
    ["missing.jsonl"], ["no*match.jsonl"],
])  # fmt: skip
def test_sources_that_make_no_sense(tmp_path, sources):
    for name in "ab":
        write_jsonl(tmp_path / name, [{"prompt": "x"}])
    with pytest.raises(InputError, match="weight|no such file"):
        load_examples([str(tmp_path / source) for source in sources])


MEMORY = """
import re, sys
from data import load_examples
examples = load_examples(sys.argv[1])
words = sum(len(examples[i].prompt[-1]["content"]) for i in range(len(examples)))
with open("/proc/self/status") as file:  # ru_maxrss is at least what the parent had at the fork
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]
print(len(examples), words, int(peak) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path, kind):
    """Every row of 1,000 and of 100,000 read, 1 kB each: at most 200 MB more at the highest point.
    """
    peak = {}
    for count in (1000, 100_000):
        path, text = tmp_path / f"{count}.{kind}", "many words " * 90
        rows = ({"prompt": f"{text} {i}", "response": "yes"} for i in range(count))
        if kind == "parquet":  # in row groups, as published ones; one of them is decoded at a time
            pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=1000)
        elif kind == "json":
            path.write_text("[" + ", ".join(map(json.dumps, rows)) + "]")  # on one line
        else:
            with (gzip.open if kind.endswith("gz") else open)(path, "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        result = subprocess.run(
            [sys.executable, "-c", MEMORY, path], cwd=ROOT, capture_output=True, text=True
        )
        found, words, peak[count] = map(int, result.stdout.split())
        assert found == count and words > 990 * count
    assert peak[100_000] - peak[1000] < 200, peak


# ----------------------------------------------------------------------------------------- pictures
def save(image, kind, **more):
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def two_colours(mode="RGB", size=(64, 32)):
    """Left half red, right half blue."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2, 0, *size))
    return image.convert(mode)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned; to be shown after a quarter turn clockwise
    return save(two_colours().rotate(90, expand=True), "JPEG", exif=exif, quality=95)


ANIMATED = {"save_all": True, "append_images": [Image.new("RGB", (64, 32), "green")]}
PICTURES = {
    "png": lambda: save(two_colours(), "PNG"),
    "palette": lambda: save(two_colours("P"), "PNG"),
    "palette with a transparent colour": lambda: save(two_colours("P"), "PNG", transparency=200),
    "alpha": lambda: save(two_colours("RGBA"), "PNG"),
    "cmyk": lambda: save(two_colours("CMYK"), "TIFF"),
    "jpeg": lambda: save(two_colours(), "JPEG", quality=95),
    "exif": rotated,
    "animated gif": lambda: save(two_colours(), "GIF", **ANIMATED),
    "animated webp": lambda: save(two_colours(), "WEBP", lossless=True, **ANIMATED),
    "pil": two_colours,
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_read_as_they_look(kind):
    image = load_image(PICTURES[kind]())
    assert image.mode == "RGB" and image.size == (64, 32)
    left, right = np.array(image)[16, 8].astype(int), np.array(image)[16, 56].astype(int)
    assert np.abs(left - (255, 0, 0)).max() < 12 and np.abs(right - (0, 0, 255)).max() < 12


def test_grey_deep_and_transparent_pictures():
    def pixel(image):
        return np.array(load_image(image))[0, 0].tolist()
    assert pixel(save(Image.new("L", (32, 32), 100), "PNG")) == [100] * 3
    assert pixel(save(Image.new("1", (32, 32), 1), "PNG")) == [255] * 3
    deep = np.full((32, 32), 100 * 257, dtype=np.uint16)  # 16 bits a pixel
    for kind in ("PNG", "TIFF"):
        assert pixel(save(Image.fromarray(deep), kind)) == [100] * 3
    assert pixel(save(Image.new("RGBA", (32, 32), (9, 9, 9, 0)), "PNG")) == [255] * 3  # on white
    assert pixel(save(Image.new("LA", (32, 32), (9, 0)), "PNG")) == [255] * 3
    half = pixel(save(Image.new("RGBA", (32, 32), (0, 0, 0, 128)), "PNG"))
    assert all(abs(value - 127) <= 1 for value in half)


@pytest.mark.parametrize("count", range(9))
def test_up_to_eight_pictures(tiny, count):
    rng = np.random.default_rng(count)
    sizes = [(32 * rng.integers(1, 4), 32 * rng.integers(1, 4)) for _ in range(count)]
    turn = {"role": "user", "content": "a<image>" * count + "b"}
    example = Example("x", [turn], [noise(rng, size) for size in sizes])
    prompt = encode_prompt(example, tiny.tokenizer, tiny.image_processor)
    assert int((prompt.input_ids == tiny.banned[0]).sum()) == sum(w * h // 1024 for w, h in sizes)
    assert (prompt.image_grid_thw is None) == (count == 0)


@pytest.mark.parametrize(
    "flags, tokens", [([], 16), (["--max-pixels", 4096], 4), (["--min-pixels", 65536], 64)]
)
def test_pixel_budget(tiny, flags, tokens):
    """A picture of 128 x 128: one token for each 32 x 32 of what is left of it, or of what it
    becomes."""
    import argparse

    parser = argparse.ArgumentParser()
    data_flags(parser)
    args = parser.parse_args(list(map(str, flags)))
    tools = runtime.load_tokenizer(tiny.base, args)
    picture = noise(np.random.default_rng(0), (128, 128))
    example = Example("x", [{"role": "user", "content": "<image>"}], [picture])
    prompt = encode_prompt(example, *tools)
    assert int((prompt.input_ids == tiny.banned[0]).sum()) == tokens


# -------------------------------------------------------------------------------------- broken rows
GOOD = {
    "prompt": "How many?",
    "response": "<caption>a</caption><think>b</think><answer>c</answer>",
    "images": [],
}


def broken_rows(folder):
    """{kind: (its line, a word of the reason)}, 33 kinds; writes the files they name."""
    rng = np.random.default_rng(0)
    good = save(noise(rng, (64, 64)), "PNG")
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "cut.jpg").write_bytes(save(noise(rng, (64, 64)), "JPEG")[:300])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(save(Image.new("1", (12000, 12000)), "PNG"))
    (folder / "line.png").write_bytes(save(Image.new("RGB", (1000, 2)), "PNG"))
    (folder / "good.png").write_bytes(good)
    (folder / "folder").mkdir()
    def row(**more):
        return json.dumps(GOOD | more).encode()
    def chat(*turns):
        return row(prompt=[dict(zip(("role", "content"), turn)) for turn in turns])
    def see(path):
        return row(prompt="<image>How many?", images=[path])
    return {
        "cut line": (b'{"prompt": "How ma', "not JSON"),
        "a list": (b"[1, 2]", "JSON object"),
        "a text": (b'"prompt"', "JSON object"),
        "no text at all": (b"\xff\xfe\x00", "not JSON"),
        "nested too deep": (b"[" * 100_000, "not JSON"),
        "two objects": (row() + row(), "not JSON"),
        "no column that is known": (b'{"text": "x"}', "none of the columns"),
        "empty prompt": (row(prompt=""), "empty"),
        "no turns": (row(prompt=[]), "empty"),
        "a number as prompt": (row(prompt=3), "a text or a list"),
        "a turn without content": (row(prompt=[{"role": "user"}]), "role and content"),
        "a number as content": (chat(("user", 3)), "role and content"),
        "a role that nobody knows": (chat(("tool", "x")), "role tool"),
        "no user": (chat(("system", "x")), "no turn of the user"),
        "half a character": (b'{"prompt": "a \\ud800 b", "response": "c"}', "UTF-8"),
        "image token in the prompt": (row(prompt="<|image_pad|>"), "<|image_pad|>"),
        "image token in the response": (row(response="a <|vision_start|>"), "<|vision_start|>"),
        "no response": (row(response=None), "no response"),
        "empty response": (row(response=""), "no response"),
        "empty last turn": (chat(("user", "x"), ("assistant", "")), "no response"),
        "a number as response": (row(response=3), "must be a text"),
        "an object as answer": (row(answer={"a": 1}), "answer must be"),
        "picture is not there": (see("missing.png"), "does not exist"),
        "picture is a folder": (see("folder"), "does not exist"),
        "picture is a number": (see(7), "must be bytes, a path"),
        "picture is an empty object": (see({}), "must be bytes, a path"),
        "picture is cut": (see("cut.png"), "cannot be read"),
        "jpeg is cut": (see("cut.jpg"), "cannot be read"),
        "picture is a text file": (see("text.png"), "cannot be read"),
        "picture is an empty file": (see("empty.png"), "cannot be read"),
        "picture is a bomb": (see("bomb.png"), "12000 x 12000 pixels"),
        "picture is a line": (see("line.png"), "aspect ratio"),
        "too few pictures": (row(prompt="<image>" * 2, images=["good.png"]), "2 <image>"),
        "too many pictures": (row(prompt="<image>", images=["good.png"] * 2), "1 <image>"),
    }


@pytest.fixture(scope="session")
def dirty(tmp_path_factory):
    """2,000 good rows and 204 broken ones in random order -> (path, {line: (kind, word)} of the
    broken)."""
    folder, rng = tmp_path_factory.mktemp("dirty"), np.random.default_rng(0)
    kinds = broken_rows(folder)
    lines = []
    for i in range(2000):
        more = {"prompt": f"How many {i}?"} if i < 1980 else {"images": ["good.png"]}
        lines.append((json.dumps(GOOD | {"id": f"g{i}"} | more).encode(), None))
    for kind, (line, word) in kinds.items():
        lines += [(line, (kind, word))] * 6
    lines = [lines[i] for i in rng.permutation(len(lines))]
    first = next(i for i, (_, broken) in enumerate(lines) if broken)
    # a broken first row says nothing about the others
    lines[0], lines[first] = lines[first], lines[0]
    (folder / "dirty.jsonl").write_bytes(b"\n".join(line for line, _ in lines))
    return folder / "dirty.jsonl", {n: broken for n, (_, broken) in enumerate(lines, 1) if broken}


@pytest.mark.slow
def test_every_good_row_is_used_and_every_bad_one_is_named(dirty, tiny, tmp_path):
    path, broken = dirty
    assert len(broken) >= 200 and len({kind for kind, _ in broken.values()}) >= 25
    (tmp_path / "system.txt").write_text("x")  # our own is long
    flags = ["--ckpt", tiny.base, "--data", path, "--batch", 100, "--steps", 22]
    flags += ["--max-bad", 0.2, "--max-tokens", 8000, "--system-prompt", tmp_path / "system.txt"]
    assert stage("sft", *flags, "--out", tmp_path / "1") == 0
    result = launch("sft.py", *flags, "--out", tmp_path / "2", processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "unusable; listed in" in result.stdout
    one, two = (read_jsonl(tmp_path / out / "skipped.jsonl") for out in "12")
    assert one == two and sorted(row["row"] for row in one) == sorted(broken)
    for row in one:
        kind, word = broken[row["row"]]
        assert word in row["reason"] and "\n" not in row["reason"], (kind, row)
        assert row["file"] == str(path)
    logs = [[row["loss"] for row in read_jsonl(tmp_path / out / "metrics.jsonl")] for out in "12"]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    import sft
    from conftest import ONE

    parser = Parser("")
    common_flags(parser, "sft")
    data_flags(parser)
    parser.add_argument("--max-length", default=8192)
    parser.add_argument("--truncate", default=False)
    args = parser.parse_args(["--ckpt", "x", "--max-bad", "0.2", "--out", str(tmp_path / "feed")])
    tools = tiny.tokenizer, tiny.image_processor, "", args
    found = look(str(path), lambda example: sft.measure_demonstration(example, *tools), args, ONE)
    begun = {"step": 0, "position": 0}
    feed = Feed(found, lambda e: sft.encode_demonstration(e, *tools), args, ONE, begun)
    # one epoch, of pictures that are cut as well
    used = [item.index + 1 for item in feed.draw(len(found.usable), 0)]
    assert sorted(used) == sorted(set(range(1, 2001 + len(broken))) - set(broken))
    for i in found.usable[::50]:  # tokens are counted without decoding a picture
        [(prompt, ids)] = sft.encode_demonstration(found.examples[i], *tools)
        assert (found.prompt[i], found.response[i]) == (len(prompt.input_ids), len(ids))


def test_too_many_bad_rows_end_the_run(dirty, tiny, tmp_path, capsys):
    path, broken = dirty
    flags = ["--ckpt", tiny.base, "--data", path, "--batch", 50, "--steps", 30]
    assert stage("sft", *flags, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(words in error for words in ("--max-bad 0.05", f"{path}:", "skipped.jsonl"))
    assert stage("sft", *flags, "--out", tmp_path / "stop", "--bad-rows", "stop") == 2
    assert "--bad-rows skip" in capsys.readouterr().err and not (tmp_path / "stop").exists()


def test_skipped_rows_survive_a_resume(dirty, tiny, tmp_path):
    (tmp_path / "system.txt").write_text("x")
    flags = ["--ckpt", tiny.base, "--data", dirty[0], "--batch", 20, "--max-bad", 0.4]
    flags += ["--save-every", 2, "--system-prompt", tmp_path / "system.txt"]
    assert stage("sft", *flags, "--steps", 6, "--out", tmp_path / "whole") == 0
    assert stage("sft", *flags, "--steps", 4, "--out", tmp_path / "broken") == 0
    assert stage("sft", *flags, "--steps", 6, "--out", tmp_path / "broken", "--resume") == 0
    whole, broken = (read_jsonl(tmp_path / out / "skipped.jsonl") for out in ("whole", "broken"))
    assert whole == broken and len({(row["file"], row["row"]) for row in whole}) == len(whole) > 0


# ------------------------------------------------------------------------------- what a row means
def base64_of(data, start=""):
    return start + base64.b64encode(data).decode()


def colours_of(example):
    """The colour of the middle of each picture: r, g or b."""
    found = ""
    for image in example.images:
        pixels = np.array(load_image(image))
        found += "rgb"[int(pixels[len(pixels) // 2, pixels.shape[1] // 2].argmax())]
    return found


def plain(colour):
    return save(Image.new("RGB", (64, 32), colour), "PNG")


def ask(*content):
    """A chat of one question, its content a text or parts, and a response."""
    content = content[0] if isinstance(content[0], str) else list(content)
    response = {"role": "assistant", "content": [{"type": "text", "text": GOOD["response"]}]}
    return [{"role": "user", "content": content}, response]


def in_chat(path, key="image"):
    return {"type": "image", key: path}


QUESTION = {"type": "text", "text": "How many?"}
DATA_URL = {"url": base64_of(plain("blue"), "data:image/png;base64,")}
RED, BLUE = base64_of(plain("red")), base64_of(plain("blue"))
TURNS = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "two"}]
# name: (row, what the user says, colours of its pictures, response, answer)
MEANINGS = {
    "parts": (
        {"messages": ask(in_chat(None), QUESTION), "images": ["red.png"]},
        "<image>How many?", "r", GOOD["response"], "c",
    ),
    "parts, the picture last": (
        {"prompt": ask(QUESTION, {"type": "image"}), "image": "red.png"},
        "How many?<image>", "r", GOOD["response"], "c",
    ),
    "data URL": (
        {"messages": ask({"type": "image_url", "image_url": DATA_URL}, QUESTION)},
        "<image>How many?", "b", GOOD["response"], "c",
    ),
    "inline, the column fills the gaps": (
        {"messages": ask(in_chat("blue.png"), {"type": "image"}, in_chat("green.png", "path"),
                         {"type": "text", "text": "<image> or?"}), "images": ["red.png"] * 2},
        "<image><image><image><image> or?", "brgr", GOOD["response"], "c",
    ),
    "inline base64": (
        {"messages": ask(in_chat(RED, "base64"), in_chat("green.png", "url"), QUESTION)},
        "<image><image>How many?", "rg", GOOD["response"], "c",
    ),
    "base64": ({"prompt": "<image>?", "images": [RED]}, "<image>?", "r", None, None),
    "base64 of the web": (
        {"prompt": "?", "images": [RED.replace("+", "-").replace("/", "_")]}, "?", "r", None, None,
    ),
    "base64 on lines": (
        {"prompt": "?", "image": "\n".join(re.findall(".{1,60}", BLUE))}, "?", "b", None, None,
    ),
    "data URI": ({"prompt": "?", "image": DATA_URL["url"]}, "?", "b", None, None),
    "bytes as a text": (
        {"prompt": "?", "images": [{"bytes": RED}, {"bytes": None, "path": "blue.png"}]},
        "?", "rb", None, None,
    ),
    "solution": (
        {"problem": "?", "solution": "<answer> 1 </answer>", "image": "red.png"},
        "?", "r", None, "1",
    ),
    "query": ({"query": "?", "response": "two"}, "?", "", "two", None),
    "instruction": (
        {"instruction": "Count.", "input": "red", "output": "two"}, "Count.\nred", "", "two", None,
    ),
    "instruction alone": (
        {"instruction": "Count.", "input": "", "output": "two"}, "Count.", "", "two", None,
    ),
    "LLaVA": (
        {"image": "red.png", "conversations": [
            {"from": "human", "value": "<image>\nWhich?"},
            {"from": "gpt", "value": "So <answer>A</answer>, no: <answer> B </answer>"}]},
        "<image>\nWhich?", "r", "So <answer>A</answer>, no: <answer> B </answer>", "B",
    ),
    "chat as a text": ({"messages": json.dumps(TURNS)}, "How many?", "", "two", None),
    "chat as a text, keys turned round": (
        {"prompt": json.dumps([{"content": "How [{many?", "role": "user"}])},
        "How [{many?", "", None, None,
    ),
    "a question about a list": (
        {"prompt": '[{"a": 1}] has how many keys?'}, '[{"a": 1}] has how many keys?', "", None, None,
    ),
    "an EOS": ({"prompt": "?", "response": "two<|im_end|>\n"}, "?", "", "two", None),
    "two EOS": ({"prompt": "?", "output": "two <|im_end|><|endoftext|>"}, "?", "", "two", None),
    "null picture": ({"prompt": "?", "images": None}, "?", "", None, None),
    "null pictures": ({"prompt": "?", "images": [None, ""]}, "?", "", None, None),
    "empty picture": ({"prompt": "?", "images": "", "image": ""}, "?", "", None, None),
    "no videos": ({"prompt": "?", "videos": [], "audio": None}, "?", "", None, None),
    "no tools": ({"messages": [TURNS[0] | {"tool_calls": None}]}, "How many?", "", None, None),
}  # fmt: skip


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with red.png, green.png, blue.png, and a pointer in place of a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour, shown in (("red", "red"), ("green", "lime"), ("blue", "blue")):
        (folder / f"{colour}.png").write_bytes(plain(shown))
    (folder / "pointer.png").write_text(LFS)
    return folder


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 99\n"


@pytest.mark.parametrize("name", MEANINGS)
def test_rows_mean_what_their_owners_mean(pictures, name):
    row, text, colours, response, answer = MEANINGS[name]
    example = to_example(row, "x.jsonl:1", str(pictures))
    assert [turn["content"] for turn in example.prompt if turn["role"] == "user"] == [text]
    assert (colours_of(example), example.response) == (colours, response)
    assert example.answer == answer


@pytest.mark.parametrize("answer, gold", [
    ("<answer> 4 </answer>", "4"), ("so <answer>3</answer>, <answer>4</answer>", "4"),
    ("24 + 48 = 72.\n#### 72", "72"), ("<answer>#### 1,000</answer>", "1,000"),
    (r"it is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"), (r"\boxed{1}, no: \boxed{{x}}", "{x}"),
    (r"<answer>\boxed{3}</answer>", "3"), (r"\boxed{3", r"\boxed{3"), ("C", "C"), (" 7 ", "7"),
    ("<answer></answer>", ""), ("#### ", ""), (" ", ""), (True, "True"), (0, "0"),
    (["<answer>1</answer>", r"\boxed{2}", " "], ["1", "2"]),
])  # fmt: skip
def test_golds_are_unwrapped(answer, gold):
    for row in ({"answer": answer}, {"reward_model": {"ground_truth": answer}}):
        assert to_example({"prompt": "?"} | row, "x").answer == gold
    if isinstance(answer, str):
        assert to_example({"prompt": "?", "solution": answer}, "x").answer == gold


GARBAGE = "\x1b[31m\x00\u202e" + "x" * 100_000
# name: (row, words of the reason)
REFUSED = {
    "videos": ({"prompt": "<video>?", "videos": ["a.mp4"]}, "a column videos"),
    "a video": ({"prompt": "?", "video": "a.mp4"}, "a column video;"),
    "audio": ({"prompt": "?", "audio": {"path": "a.wav"}}, "a column audio"),
    "a video in the chat": ({"prompt": ask({"type": "video", "video": "a"})}, "neither a text nor"),
    "a list of texts": ({"prompt": ["How ", "many?"]}, "role and content"),
    "tools": ({"messages": [TURNS[0], TURNS[1] | {"tool_calls": [1]}]}, "tool_calls"),
    "tools alone": ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "tool_calls"),
    "a turn of a tool": ({"messages": [TURNS[0], {"role": "tool", "content": None}]}, "the role tool"),
    "another role": ({"messages": [{"role": "developer", "content": "x"}]}, "the role developer"),
    "broken chat": ({"prompt": '[{"role": "user", "content": "x"'}, "a text that is not JSON"),
    "chat of Python": ({"prompt": str(TURNS)}, "a text that is not JSON"),
    "pointer": ({"prompt": "?", "images": ["pointer.png"]}, "pointer.png is a Git-LFS pointer"),
    "no base64": ({"prompt": "?", "images": [RED[:-1]]}, "is no base64"),
    "a picture of no place": ({"prompt": "?", "images": [{"bytes": None}]}, "bytes, a path or a"),
    "half a character, gold": ({"prompt": "?", "answer": "a\ud800"}, "no valid UTF-8"),
    "half a character, golds": ({"prompt": "?", "answer": ["1", "\udfff"]}, "no valid UTF-8"),
    "half a character, place": ({"prompt": "?", "images": ["\ud800.png"]}, "image ?.png does"),
    "half a character, text": ({"prompt": "\ud800?"}, "no valid UTF-8"),
    "half a character, response": ({"prompt": "?", "response": "\ud800"}, "no valid UTF-8"),
} | {
    f"garbage: {name}": (row, words)
    for name, (row, words) in {
        "column": ({GARBAGE: 1}, "none of the columns"),
        "role": ({"messages": [{"role": GARBAGE, "content": "x"}]}, "the role ?[31m??xxx"),
        "turn": ({"messages": [{GARBAGE: "x"}]}, "role and content"),
        "part": ({"messages": ask({"type": GARBAGE})}, "neither a text nor a picture"),
        "picture": ({"prompt": "?", "images": [GARBAGE]}, "image ?[31m??xxx"),
        "base64": ({"prompt": "?", "images": ["QUJD" * 9999]}, "cannot be read"),
        "chat": ({"prompt": '[{"role": "user", ' + GARBAGE}, "a text that is not JSON"),
        "id": ({"prompt": "?", "id": GARBAGE, "images": [b"x"]}, ""),
    }.items()
}  # fmt: skip


def test_out_of_memory_is_no_fault_of_the_row():
    def measure(example):
        raise MemoryError

    with pytest.raises(MemoryError):
        attempt(measure, [{}], 0)


def reason_of(row, folder, tiny):
    """Why a stage would leave the row out."""
    args = SimpleNamespace(bad_rows="stop", max_prompt=10**6)

    def measure(example):
        check_text(example.response or "", "response")
        return measure_prompt(example, tiny.tokenizer, tiny.image_processor, "", args)

    return attempt(measure, Examples([File([row], "f", folder)]), 0)[1]


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_refused_by_name(pictures, tiny, name):
    row, words = REFUSED[name]
    reason = reason_of(row, str(pictures), tiny)
    assert reason and words in reason and reason.isprintable() and len(reason) <= 400, reason


def test_kinds_of_rows_through_the_command_line(pictures, tiny, tmp_path):
    """Every row of MEANINGS is used, every one of REFUSED listed: by its number, printable, short;
    half a character in an id harms no log."""
    rows = []
    for name, (row, *_) in MEANINGS.items():
        rows.append({"id": f"{name}\ud800", "response": "two", "answer": "1"} | row)
    good = len(rows)
    for row, _ in REFUSED.values():
        if b"x" not in row.get("images", []):
            rows.append({"response": "two"} | row)
    for path in pictures.iterdir():
        shutil.copy(path, tmp_path)
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    flags = ["--ckpt", tiny.base, "--data", data, "--batch", good, "--max-bad", 0.9]
    assert stage("sft", *flags, "--steps", 1, "--out", tmp_path / "sft") == 0
    (metrics,) = read_jsonl(tmp_path / "sft" / "metrics.jsonl")
    skipped = read_jsonl(tmp_path / "sft" / "skipped.jsonl")
    assert (metrics["bad"], metrics["dropped"]) == (len(rows) - good, 0)
    assert [line["row"] for line in skipped] == list(range(good + 1, len(rows) + 1))
    for line in skipped:
        assert line["file"] == data and len(line["reason"]) <= 400 and line["reason"].isprintable()
    flags = ["--ckpt", tiny.base, "--data", data, "--max-bad", 0.9, "--prompts", good, "--steps", 1]
    flags += ["--rollouts", 1, "--max-new-tokens", 1, "--log-rollouts", 1, "--max-prompt", 900]
    assert stage("rl", *flags, "--out", tmp_path / "rl") == 0
    ids = [line["id"] for line in read_jsonl(tmp_path / "rl" / "rollouts.jsonl")]
    assert sorted(ids) == sorted(f"{name}\\ud800" for name in MEANINGS)
    assert stage("rl", *flags, "--out", tmp_path / "rl", "--steps", 2, "--resume") == 0


def test_every_turn_of_the_assistant_ends_in_one_eos(tiny, tmp_path):
    """Of a chat with several all are trained, also where the file writes the EOS out."""
    said = ["one", "two red", "three"]
    turns = []
    for text in said:
        turns.append({"role": "user", "content": "How many?"})
        turns.append({"role": "assistant", "content": f"{text}<|im_end|>"})
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}])
    flags = ["--ckpt", tiny.base, "--data", data, "--batch", 1, "--steps", 1]
    assert stage("sft", *flags, "--out", tmp_path / "out") == 0
    expected = sum(len(tiny.tokenizer(text)["input_ids"]) + 1 for text in said)
    assert read_jsonl(tmp_path / "out" / "metrics.jsonl")[0]["tokens"] == expected
    example = load_examples(data)[0]
    assert [turn["content"] for turn in example.prompt[1::2]] == said[:2]


# ------------------------------------------------------------------------- folders and their splits
def test_folders_of_save_to_disk(tiny, tmp_path, capfd):
    """One data set, or several of which --split takes one; the same rows have the same identity."""
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": f"How many {i}?", "response": "two"} for i in range(4)]
    parts = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:3])}
    parts["train"].save_to_disk(tmp_path / "one")
    DatasetDict(parts).save_to_disk(tmp_path / "two")
    Dataset.from_list(rows[:0]).save_to_disk(tmp_path / "empty")
    def asked(*source):
        return [e.prompt[0]["content"] for e in load_examples(*source)]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    DatasetDict({"dev": parts["test"]}).save_to_disk(tmp_path / "alone")
    assert asked(one) == asked(two, "train") == [row["prompt"] for row in rows]
    assert asked(two, "test") == asked(str(tmp_path / "alone"), "dev") == asked(one)[:3]
    assert capfd.readouterr().out == ""
    assert asked(two) == asked(one)  # which nobody has asked for
    assert capfd.readouterr().out == f"{two}: holds train, test; train is taken\n"
    assert load_examples(one).fingerprint() == load_examples(one).fingerprint()
    for source, split, words in [
        (one, "test", "is one data set"),
        (two, "dev", "two: holds train, test; choose one with --split"),
        (str(tmp_path / "alone"), None, "alone: holds dev; choose one with --split"),
        (str(tmp_path / "empty"), None, "empty: not a readable folder of save_to_disk"),
    ]:
        with pytest.raises(InputError, match=words):
            load_examples(source, split)
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(InputError, match="not a readable folder of save_to_disk"):
        load_examples(one)
    flags = ["--ckpt", tiny.base, "--data", two, "--split", "test", "--batch", 3, "--steps", 1]
    assert stage("sft", *flags, "--out", tmp_path / "out") == 0
    assert read_jsonl(tmp_path / "out" / "metrics.jsonl")[0]["bad"] == 0
    assert stage("sft", *flags, "--out", tmp_path / "out", "--steps", 2, "--resume") == 0


@pytest.mark.parametrize("names, split, expected", [
    (["train.jsonl", "test.jsonl"], "test", [1]), (["train.jsonl", "test.jsonl"], "train", [0]),
    (["train/0.jsonl", "test/0.jsonl"], "test", [1]),
    (["train-00000-of-2.jsonl", "train-00001-of-2.jsonl", "val_0.jsonl"], "train", [0, 1]),
    (["a.jsonl", "b.jsonl"], None, [0, 1]), (["more.jsonl", "train-0.jsonl"], None, [0, 1]),
    (["a_hard.jsonl", "b.jsonl"], "hard", [0]),
    (["train.jsonl", "test.jsonl"], None, "holds test, train; choose one with --split"),
    (["train.jsonl", "testing.jsonl"], "test", "--split test: no file of"),
])  # fmt: skip
def test_the_split_of_a_folder(tmp_path, names, split, expected):
    """By the names of its files: rows of a test set are never trained on because nobody asked."""
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"prompt": str(i)}])
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            load_examples(str(tmp_path), split)
    else:
        found = [int(e.prompt[0]["content"]) for e in load_examples(str(tmp_path), split)]
        assert found == expected


def test_a_file_has_no_split(tiny):
    with pytest.raises(InputError, match="--split test: .*sft.jsonl is a file, it has no splits"):
        load_examples(tiny.sft, "test")


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.json.gz"])
def test_a_pointer_in_place_of_the_data(tmp_path, name):
    (tmp_path / name).write_text(LFS)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(InputError, match=f"{name}: a Git-LFS pointer.*git lfs pull"):
            load_examples(str(source))


# ---------------------------------------------------------------------------------------- real rows
def test_text_only_and_many_pictures_mix_in_one_batch(tiny, tmp_path):
    """The loss of a mixed batch is that of its rows alone, weighted by their target tokens."""
    rng, rows = np.random.default_rng(0), []
    for i, count in enumerate((0, 1, 0, 8, 2)):
        paths = []
        for k in range(count):
            paths.append(f"{i}_{k}.png")
            noise(rng, (64, 32)).save(tmp_path / paths[-1])
        row = {"prompt": "<image>" * count + f"How many {i}?", "images": paths}
        rows.append(row | {"response": short(rng, "even" * (i + 1))})
    flags = ["--ckpt", tiny.base, "--steps", 1, *FLAGS]
    losses, tokens = [], []
    for name, part in (("all", rows), *((str(i), [row]) for i, row in enumerate(rows))):
        data = write_jsonl(tmp_path / f"{name}.jsonl", part)
        here = ["--data", data, "--batch", len(part), "--out", tmp_path / name]
        assert stage("sft", *flags, *here) == 0
        (row,) = read_jsonl(tmp_path / name / "metrics.jsonl")
        losses.append(row["loss"])
        tokens.append(row["tokens"])
    assert tokens[0] == sum(tokens[1:])
    assert losses[0] == pytest.approx(np.dot(losses[1:], tokens[1:]) / tokens[0], rel=1e-5)


# ------------------------------------------------------------------------------------------ prompts
@pytest.mark.parametrize("count", [0, 1, 3])
def test_positions_equal_those_of_transformers(tiny, count):
    prompt = tiny.prompts[count]
    inputs = stock_inputs(prompt, [], tiny.stock.config)
    ids, kinds, mask = (inputs[k] for k in ("input_ids", "mm_token_type_ids", "attention_mask"))
    grid = prompt.image_grid_thw
    expected, _ = tiny.stock.model.get_rope_index(ids, kinds, grid, attention_mask=mask)
    assert torch.equal(prompt.position_ids, expected[:, 0])
    assert kinds.sum() == (0, 9, None, 9 + 2 + 3)[count]


def test_positions_of_a_hand_made_picture():
    ids = torch.tensor([5, 9, 9, 9, 9, 9, 9, 7])  # 9: an image of 2 x 3 merged tokens
    got = mrope_positions(ids, torch.tensor([[1, 4, 6]]), 9, 2)
    temporal, height, width = got.tolist()
    assert temporal == [0, 1, 1, 1, 1, 1, 1, 4]
    assert height == [0, 1, 1, 1, 2, 2, 2, 4]
    assert width == [0, 1, 2, 3, 1, 2, 3, 4]


def test_long_prompts_are_dropped_and_never_cut(tiny):
    example = Example("x", [{"role": "user", "content": "one two three"}])
    length = len(encode_prompt(example, tiny.tokenizer, tiny.image_processor).input_ids)
    assert encode_prompt(example, tiny.tokenizer, tiny.image_processor, length) is not None
    assert encode_prompt(example, tiny.tokenizer, tiny.image_processor, length - 1) is None


def test_placeholders_and_pictures_must_agree(tiny):
    picture = tiny.folder / tiny.examples["rl"][0]["images"][0]
    turn = {"role": "user", "content": "<image><image> same?"}
    example = Example("row 7", [turn], [str(picture)])
    with pytest.raises(InputError, match="row 7: 2 <image> in the text but 1 images"):
        encode_prompt(example, tiny.tokenizer, tiny.image_processor)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"])
def test_a_literal_vision_token_in_a_text_is_refused(tiny, token):
    """It would be taken for a picture that is not there."""
    with pytest.raises(InputError, match="the text contains"):
        encode_response(f"a {token} b", tiny.tokenizer)
    example = Example("row 7", [{"role": "user", "content": f"what is {token}?"}])
    with pytest.raises(InputError, match="row 7: the text contains"):
        encode_prompt(example, tiny.tokenizer, tiny.image_processor)
