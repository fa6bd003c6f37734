"""Run: pytest tests/test_toy.py     (the picture world, its scores and teachers, its checkpoint)"""

import argparse
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, read_jsonl, write_jsonl
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3VLForConditionalGeneration

from rollout import Response, parse_response
from toy import checkpoint, choose, paper, report, stages, world

N = world.ROWS * world.COLUMNS


def problem_with(form):
    """A problem in which the sum is not 0, so that every edit below changes something."""
    rng = np.random.default_rng(0)
    while True:
        problem = world.make_problem(rng, [f"{rng.choice(['color', 'shape'])} {form}"])
        if problem["form"] == form and recount(problem)[0] > 1:
            return problem


def recount(problem):
    """(The sum, the true answer), from the grid alone."""
    grid = np.array(problem["cells"]).reshape(world.ROWS, world.COLUMNS, 2)
    grid = grid if problem["line"] == "row" else grid.swapaxes(0, 1)
    cells = grid[problem["number"] - 1]
    counts = [int((cells == term).sum()) for term in problem["terms"]]
    total = sum(counts)
    if problem["form"] == "number":
        return total, str(total)
    if problem["form"] == "parity":
        return total, ("even", "odd")[total % 2]
    if counts[0] == counts[1]:
        return total, "same"
    return total, problem["terms"][int(np.argmax(counts))]


def score(problem, text):
    return world.score(problem, parse_response(text))


def elsewhere(problem):
    """Index of a cell that the question does not ask for."""
    for i in range(N):
        row, column = divmod(i, world.COLUMNS)
        if (row if problem["line"] == "row" else column) + 1 != problem["number"]:
            return i


def repaint(line):
    number, _, shape = line.split()
    return f"{number} grey {shape}"


def without_halves(scores):
    """What is right of the captions as a whole, not of colours and shapes apart."""
    return {key: scores[key] for key in scores.keys() - {"colors", "shapes"}}


def put(lines, i, *new):
    """`lines` with `new` in place of line i."""
    return [*lines[:i], *new, *lines[i + 1 :]]


OTHER = {"odd": "even", "even": "odd"}
CAPTION, TRACE, ANSWER = range(3)  # of a Response
# an edit of the lines of one block (of the steps of a trace), i: a cell elsewhere; the cells and
# the steps that are lost by it; the accuracy that is left
EDITS = [
    ("nothing", TRACE, lambda lines, i: lines, 0, 0, 1),
    ("wrong answer", ANSWER, lambda lines, i: [OTHER.get(lines[0], lines[0] + "1")], 0, 1, 0),
    ("no trace", TRACE, lambda lines, i: [], 0, "all but the answer", 1),
    ("a count left out", TRACE, lambda lines, i: put(lines, 0), 0, 1, 1),
    ("a wrong count", TRACE, lambda lines, i: put(lines, 0, lines[0] + "7"), 0, 1, 1),
    ("a wrong sum", TRACE, lambda lines, i: put(lines, 2, lines[2] + "7"), 0, 1, 1),
    ("steps in another order", TRACE, lambda lines, i: lines[::-1], 0, 0, 1),
    ("more than needed", TRACE, lambda lines, i: ["let me see", *lines], 0, 0, 1),
    ("a wrong colour", CAPTION, lambda lines, i: put(lines, i, repaint(lines[i])), 1, 0, 1),
    ("a cell left out", CAPTION, lambda lines, i: put(lines, i), 1, 0, 1),
    ("a cell said twice", CAPTION, lambda lines, i: [*lines, repaint(lines[i])], 1, 0, 1),
    ("an unreadable line", CAPTION, lambda lines, i: put(lines, i, lines[i] + " ?"), 1, 0, 1),
    ("cells in another order", CAPTION, lambda lines, i: lines[::-1], 0, 0, 1),
]


@pytest.mark.parametrize("form", ["number", "parity", "more"])
@pytest.mark.parametrize("edit", EDITS, ids=[edit[0] for edit in EDITS])
def test_scores_are_exact(edit, form):
    _, block, change, cells, steps, accuracy = edit
    problem, count = problem_with(form), {"number": 4, "parity": 5, "more": 4}[form]
    parts = astuple(parse_response(world.respond(problem)))
    # a step begins at a line break, but not at one before a cell, which belongs to the step
    lines = re.split(r"\n(?!\d \w+ \w+ (?:yes|no))", parts[block])
    parts = put(parts, block, "\n".join(change(lines, elsewhere(problem))))
    steps = count - 1 if steps == "all but the answer" else steps
    expected = {"perception": 1 - cells / N, "reasoning": 1 - steps / count}
    expected |= {"accuracy": accuracy, "format": 1}
    assert without_halves(world.score(problem, Response(*parts))) == pytest.approx(expected)


GRID = [("red", "circle"), ("red", "square"), *[("lime", "cross")] * (N - 2)]
HAND = {"cells": GRID, "line": "row", "number": 1, "terms": ["red", "circle"]}
HAND |= {"form": "number", "question": "?", "answer": "3"}
REST = range(3, world.COLUMNS + 1)
RED = "row 1:\n1 red red yes\n2 red red yes"
RED += "".join(f"\n{i} lime red no" for i in REST) + " = 2"
CIRCLE = "row 1:\n1 circle circle yes\n2 square circle no"
CIRCLE += "".join(f"\n{i} cross circle no" for i in REST) + " = 1"


def test_reasoning_is_judged_by_its_own_caption():
    """Right steps from a wrong caption count, right results that do not follow from it do not."""
    caption = "\n".join(f"{i} {color} {shape}" for i, (color, shape) in enumerate(GRID, 1))
    trace = f"{RED}\n{CIRCLE}\n2 + 1 = 3"
    assert set(world.score(HAND, Response(caption, trace, "3")).values()) == {1.0}
    wrong = caption.replace("2 red square", "2 blue square")
    follows = f"{RED.replace('2 red red yes', '2 blue red no')[:-1]}1\n{CIRCLE}\n1 + 1 = 2"
    expected = {"perception": 1 - 1 / N, "reasoning": 1, "accuracy": 0, "format": 1}
    expected |= {"colors": 1 - 1 / N, "shapes": 1}
    assert world.score(HAND, Response(wrong, follows, "2")) == pytest.approx(expected)
    expected |= {"reasoning": 1 / 4, "accuracy": 1}
    assert world.score(HAND, Response(wrong, trace, "3")) == pytest.approx(expected)


def test_broken_format_scores_nothing():
    found = world.score(HAND, None)
    assert found.keys() == {*report.METRICS, "colors", "shapes"} and set(found.values()) == {0.0}


def test_the_curated_teacher_is_perfect_and_the_public_one_is_not():
    rng = np.random.default_rng(0)
    problems = [world.make_problem(rng) for _ in range(300)]
    assert {problem["kind"] for problem in problems} == set(world.KINDS)
    for problem in problems:
        assert set(score(problem, world.respond(problem)).values()) == {1.0}
        assert problem["answer"] == recount(problem)[1]
    public = [score(problem, world.respond(problem, rng)) for problem in problems]
    for key in ("perception", "reasoning", "accuracy"):
        assert 0.1 < np.mean([s[key] for s in public]) < 0.9, key
    assert np.mean([s["format"] for s in public]) == 1


# ---------------------------------------------------------------- the world without a tell of style
def captions(texts):
    return [parse_response(text).caption for text in texts]


def told_apart(curated, public, held_out=500):
    """Accuracy of a logistic regression on held-out texts, of which it reads the counts of words,
    the counts of pairs of neighbouring words and the number of lines."""
    bags = []
    for text in curated + public:
        words = text.split()
        bags.append(Counter(words + list(zip(words, words[1:]))))
        bags[-1]["lines"] = text.count("\n")
    column = {word: i for i, word in enumerate(set().union(*bags))}
    x = torch.zeros(len(bags), len(column))
    for i, bag in enumerate(bags):
        x[i, [column[word] for word in bag]] = torch.tensor(list(bag.values())).float()
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    y = torch.tensor([0.0] * len(curated) + [1.0] * len(public))
    test = torch.zeros(len(bags), dtype=torch.bool)
    test[len(curated) - held_out : len(curated)] = test[-held_out:] = True
    model = torch.nn.Linear(len(column), 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = model(x[~test])[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[~test])
        (loss + 1e-3 * model.weight.square().sum()).backward()
        return loss

    optimizer.step(closure)
    return ((model(x[test])[:, 0] > 0) == (y[test] > 0)).float().mean().item()


def test_words_do_not_tell_the_public_teacher_from_the_curated_one():
    """2,000 texts of each to learn from, 500 of each held out."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    problems = [world.make_problem(rng, world.KINDS) for _ in range(5000)]
    curated = [world.respond(problem) for problem in problems[:2500]]
    public = [world.respond(problem, rng) for problem in problems[2500:]]
    assert told_apart(captions(curated), captions(public)) <= 0.55
    assert told_apart(curated, public) <= 0.55
    coarse = [text.replace("orange", "red") for text in public]  # a style of its own is told
    assert told_apart(captions(curated), captions(coarse)) > 0.8
    assert told_apart(curated, coarse) > 0.8


def test_the_public_teacher_is_wrong_at_the_same_length():
    """In lines, words and tokens; every caption names every cell once."""
    rng = np.random.default_rng(1)
    problems = [world.make_problem(rng, world.KINDS) for _ in range(600)]
    curated = [world.respond(problem) for problem in problems]
    public = [world.respond(problem, rng) for problem in problems]
    tokenizer = checkpoint.make_tokenizer(curated + public)
    for one, other in zip(curated, public):
        assert one.count("\n") == other.count("\n") and len(one.split()) == len(other.split())
        assert len(tokenizer(one)["input_ids"]) == len(tokenizer(other)["input_ids"])
        caption = parse_response(other).caption
        assert [int(line.split()[0]) for line in caption.split("\n")] == list(range(1, N + 1))
        assert world.UNSAID not in world.read_caption(caption)
    scores = [score(problem, text) for problem, text in zip(problems, public)]
    for key in ("perception", "reasoning", "accuracy"):
        assert 0.1 < np.mean([s[key] for s in scores]) < 0.9, key


def test_the_public_teacher_takes_each_word_for_its_neighbour_and_back():
    """The most frequent mistake for each word is the word that is taken for it."""
    rng = np.random.default_rng(2)
    said = {word: Counter() for word in (*world.COLORS, *world.SHAPES)}
    for _ in range(500):
        cells = world.make_cells(rng)
        for right, seen in zip(cells, world.misperceive(cells, rng)):
            for word, name in zip(right, seen):
                said[word][name] += word != name
    pairs = [("red", "orange"), ("blue", "purple"), ("green", "lime"), ("square", "diamond")]
    for one, other in pairs:
        for word, taken_for in ((one, other), (other, one)):
            assert said[word].most_common(1)[0][0] == taken_for
    assert all(sum(counts.values()) > 50 for counts in said.values())  # misplaced, invented


def test_a_slip_is_in_the_trace_and_not_in_the_caption():
    """Without other faults perception is right, and each step is wrong in some of the responses."""
    rng = np.random.default_rng(3)
    missing = Counter()
    for _ in range(400):
        problem = world.make_problem(rng, ["color parity"])
        right = world.solve(problem, problem["cells"])
        other = world.solve(problem, world.make_cells(rng))
        steps, answer = world.slip(right, other, rng)
        trace = "\n".join(steps)
        for i, step in enumerate(right[0]):
            missing[i] += f"\n{step}\n" not in f"\n{trace}\n"
        missing["answer"] += answer != right[1]
        sources = ["\n".join(right[0]).split(), "\n".join(other[0]).split()]
        assert all(word in choice for word, *choice in zip(trace.split(), *sources, strict=True))
    assert all(0.1 < missing[key] / 400 < 0.9 for key in (0, 1, 2))
    assert missing["answer"] > 20


@pytest.mark.parametrize("kind", world.KINDS)
def test_kinds_of_questions(kind):
    """The curated teacher is right in each; every word of its attribute is asked for."""
    rng = np.random.default_rng(4)
    words = {"color": list(world.COLORS), "shape": world.SHAPES}[kind.split()[0]]
    asked = Counter()
    for _ in range(300):
        problem = world.make_problem(rng, [kind])
        assert problem["kind"] == kind and problem["form"] == kind.split()[1]
        assert len(set(problem["terms"])) == 2
        assert problem["answer"] == recount(problem)[1]
        assert set(score(problem, world.respond(problem)).values()) == {1.0}
        asked.update(problem["terms"])
    assert sorted(asked) == sorted(words) and min(asked.values()) > 0.6 * 600 / len(words)
    assert {*world.ALIGN_KINDS, *world.RL_KINDS} < set(world.KINDS)


@pytest.mark.parametrize("k", [1, 2, 4, N])
def test_corrupted_captions_have_k_wrong_cells_and_the_same_words(k):
    rng = np.random.default_rng(5)
    words = Counter()
    for _ in range(300):
        problem = world.make_problem(rng, world.KINDS)
        wrong = world.corrupt(problem["cells"], k, rng)
        found = score(problem, world.response(wrong, ([], "")))
        assert found["perception"] == pytest.approx(1 - k / N)
        assert (1 - found["colors"]) + (1 - found["shapes"]) == pytest.approx(k / N)
        words.update(word for cell in wrong for word in cell)
    for kind in (list(world.COLORS), world.SHAPES):
        share = 1 / len(kind)
        error = np.sqrt(share * (1 - share) / (300 * N))
        assert all(abs(words[word] / (300 * N) - share) < 4 * error for word in kind)


def test_colours_and_shapes_are_scored_apart():
    caption = "1 red circle\n2 blue square\n3 lime circle\n3 lime cross\n4 lime cross\n5 red square"
    found = world.score(HAND, Response(caption, "", ""))
    # 1 and 4 are right, of 2 the shape; 3 is said twice
    found = {key: found[key] for key in ("colors", "shapes", "perception")}
    assert found == pytest.approx({"colors": 2 / N, "shapes": 3 / N, "perception": 2 / N})


# ----------------------------------------------------------------------------- pictures, checkpoint
def test_problems_and_pictures_depend_on_the_generator_only():
    first, again, other = (world.make_problem(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other
    picture = world.draw(first["cells"], first["seed"])
    assert picture.size == (world.COLUMNS * 32, world.ROWS * 32)
    assert picture.tobytes() == world.draw(again["cells"], again["seed"]).tobytes()
    assert picture.tobytes() != world.draw(other["cells"], other["seed"]).tobytes()


def test_each_cell_is_drawn_in_its_own_place():
    """Changing one cell changes the pixels of that cell and no others."""
    problem = world.make_problem(np.random.default_rng(3))
    before = np.array(world.draw(problem["cells"], problem["seed"])).astype(int)
    for i, (color, shape) in enumerate(problem["cells"]):
        cells = list(problem["cells"])
        cells[i] = ("green" if color != "green" else "red", shape)
        changed = (np.array(world.draw(cells, problem["seed"])) != before).any(-1)
        row, column = divmod(i, world.COLUMNS)
        cell = np.zeros(changed.shape, dtype=bool)
        cell[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = True
        assert changed[cell].sum() > 50 and not changed[~cell].any()


def test_checkpoint_is_an_ordinary_one(tmp_path):
    """Loads with the Auto classes, is the same for the same seed, has Qwen's tokens, and reads the
    world's texts whole."""
    rng = np.random.default_rng(0)
    texts = [world.respond(world.make_problem(rng)) for _ in range(40)]
    models, small = {}, {"hidden": 64, "layers": 1, "vision_layers": 1}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        checkpoint.make_checkpoint(str(tmp_path / name), texts, seed, **small)
        models[name] = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        assert isinstance(models[name], Qwen3VLForConditionalGeneration)
    one, same, other = (list(model.parameters()) for model in models.values())
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert not all(torch.equal(a, b) for a, b in zip(one, other))
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path / "one"), models["one"].config
    assert tokenizer.eos_token == "<|im_end|>"
    assert models["one"].generation_config.eos_token_id == tokenizer.eos_token_id
    ids = {"<|image_pad|>": config.image_token_id, "<|vision_start|>": config.vision_start_token_id}
    for token, number in ids.items():
        assert tokenizer.convert_tokens_to_ids(token) == number
        assert tokenizer(token)["input_ids"] == [number]
    for text in [*texts, "äß 中文 🙂\n\t x"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turns = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def write_run(out, problems, arms, rng):
    """What the stages of a run leave: {arm: share of right responses}; 4 samples of an item."""
    (out / "data").mkdir(parents=True)
    items = [{"id": f"test-{i}", "world": problem} for i, problem in enumerate(problems)]
    write_jsonl(out / "data" / "test.jsonl", items)
    for arm, share in arms.items():
        for run in ("greedy", "sampled"):
            (out / f"{run}_0" / arm).mkdir(parents=True)
            generations = []
            for i, problem in enumerate(problems):
                right = rng.random() < share
                line = {"id": f"test-{i}", "response": world.respond(problem) if right else ""}
                generations += [line | {"finished": True, "accuracy": float(right)}] * 4
            write_jsonl(out / f"{run}_0" / arm / "test.jsonl", generations)


def test_the_table_comes_out_of_what_eval_wrote(tmp_path):
    """Means, intervals that keep the samples of an item together, kinds of questions apart, paired
    tests of which Holm corrects all."""
    rng, seeds = np.random.default_rng(0), [tmp_path / "seed0", tmp_path / "seed1"]
    problems, arms = [world.make_problem(rng) for _ in range(60)], {"sft": 0.5, "align": 0.9}
    for out in seeds:
        write_run(out, problems, arms, rng)
    words = {"sft": "SFT", "align": "SFT -> align"}
    commands = {}
    for i, out in enumerate(seeds):
        commands[str(out / "align")] = {str(out / name) for name in ("sft", "ground")}, []
        commands[str(out / "ground")] = {str(out / "sft")}, []
        (out / "align.seconds").write_text(f"{60 * (i + 1)}")
        (out / "ground.seconds").write_text("30")
    table = report.arm_table(list(map(str, seeds)), words, ["sft"], commands)
    header, _, *lines = table.splitlines()
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    found = {}
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        found[cells[0]] = dict(zip(columns, cells))
    right = []
    for out in seeds:
        lines = read_jsonl(out / "sampled_0" / "align" / "test.jsonl")
        right.append([line["accuracy"] for line in lines[::4]])
    cells, mean = found["SFT -> align"], np.mean(right)
    low, high = map(float, re.search(r"\[(.*), (.*)\]", cells["perception"]).groups())
    assert all(cells[key].startswith(f"{100 * mean:.1f} [") for key in report.METRICS)
    assert high - low < 100 * 4 * 1.96 * np.sqrt(mean * (1 - mean) / 120)  # of items and seeds
    assert high - low > 100 * 1.5 * 1.96 * np.sqrt(mean * (1 - mean) / 120)  # not of 480 samples
    touched = [report.TOUCHED[problem["kind"]] for problem in problems]
    for group in set(touched):
        of_group = np.mean([np.array(one)[[t == group for t in touched]].mean() for one in right])
        assert cells[group] == f"{100 * of_group:.1f}"
    assert cells["minutes"] == "2.0" and found["SFT"]["minutes"] == "0.0"  # 1.5 and 2.5
    assert float(cells["p to SFT"]) < 0.01 and found["SFT"]["p to SFT"] == ""


def test_who_wins_is_said_of_the_claim_and_of_the_control(tmp_path):
    """90 % to 50 % of 60 items are told apart, equal shares are not, either way round."""
    arms = {"sft": 0.5, "sft_rl": 0.5, "align": 0.9, "align_rl": 0.9, "more": 0.9, "more_rl": 0.5}
    problems = [world.make_problem(np.random.default_rng(i)) for i in range(60)]
    write_run(tmp_path / "seed0", problems, arms, np.random.default_rng(1))
    sampled, _, greedy = report.verdict([str(tmp_path / "seed0")]).splitlines()
    assert sampled.startswith("Accuracy at T = 1: SFT -> RL ")
    assert greedy.startswith("Accuracy of greedy answers: SFT -> RL ")
    for line in (sampled, greedy):
        claim, control, control_rl = line.split("; ")
        assert ": the game wins (p 0.00" in claim and ": the game wins" in control_rl
        assert ": not told apart (p " in control


def test_what_an_expert_tells_apart_counts_no_equal_texts(tmp_path):
    """A trace in which no slip fell is the right one: it says nothing. Nor does an item of a kind
    that the game has not."""
    look, scores = [], []
    for i in range(5):
        for variant in ("right", *report.LOOKS):
            same = variant == "right" or variant == "trace with slips" and i < 3
            look.append({"id": f"t-{i}/{variant}", "response": "right" if same else variant})
            look[-1]["world"] = {"kind": "color number" if i < 4 else "color more"}
            score = float(same != (i == 4) or i == 0)  # of item 0 it says the same of all
            scores.append({"id": look[-1]["id"], "perception": score, "reasoning": score})
    (tmp_path / "data").mkdir()
    (tmp_path / "scores").mkdir()
    write_jsonl(tmp_path / "data" / "look.jsonl", look)
    write_jsonl(tmp_path / "scores" / "scores.jsonl", scores)
    shares = report.looks(str(tmp_path), "scores")
    assert shares.pop("trace with slips") == 1.0
    assert set(shares.values()) == {0.875}  # 3 of 4, and a tie


def test_ground_is_told_apart_by_what_is_asked(tmp_path):
    asked, lines = ["number", "number", "parity", "more"], []
    for i, right in enumerate((1.0, 1.0, 0.0, 0.5)):
        scores = {"perception": right, "other_perception": 0.5}
        scores |= {"reasoning": 0.5, "other_reasoning": right}
        lines.append({"id": f"t-{i}", **scores})
    lines.append({"id": "t-0", "perception": 0.0, "reasoning": 0.0})  # all other pictures are equal
    for folder in ("data", "probe"):
        (tmp_path / folder).mkdir()
    items = [{"id": f"t-{i}", "world": {"form": form}} for i, form in enumerate(asked)]
    write_jsonl(tmp_path / "data" / "test.jsonl", items)
    write_jsonl(tmp_path / "probe" / "scores.jsonl", lines)
    found = report.ground(str(tmp_path), "probe")
    shares = {"ground_v, number": 1, "ground_v, parity": 0, "ground_v, more": 0.5, "ground_r": 0}
    assert found == shares


def test_what_the_scores_of_rollouts_follow(tmp_path):
    """Correlations within a group, of the later steps; what differs between groups does not count.
    D_v is here the share of right colours plus an offset of the prompt, D_r is the length."""
    rng, lines, examples = np.random.default_rng(0), [], []
    for i in range(20):
        problem = world.make_problem(rng)
        examples.append({"id": str(i), "world": problem})
        for step in (1, 2, 3):
            for _ in range(8):
                text = world.respond(problem, rng)
                colors = score(problem, text)["colors"]
                line = {"step": step, "id": str(i), "response": text, "finished": True}
                lines.append(line | {"d_v": colors + i if step > 2 else 0.0, "d_r": len(text)})
    (tmp_path / "data").mkdir()
    (tmp_path / "align").mkdir()
    write_jsonl(tmp_path / "data" / "align.jsonl", examples)
    write_jsonl(tmp_path / "align" / "rollouts.jsonl", lines)
    found = report.signals(str(tmp_path), "align")
    assert found["D_v, colors"] == pytest.approx(1) and found["D_r, length"] == pytest.approx(1)
    assert abs(found["D_v, shapes"]) < 0.4 and abs(found["D_r, reasoning"]) < 0.4
    told = {"perception": 0.0, "reasoning": 0.0, "other_perception": 0.0, "other_reasoning": 0.0}
    told["world"] = {"kind": "color number", "form": "number"}
    look = [{"id": f"0/{v}", "response": v, **told} for v in ("right", *report.LOOKS)]
    for folder in ("look_align", "probe_align"):
        (tmp_path / folder).mkdir()
    for path in ("data/look.jsonl", "look_align/scores.jsonl"):
        write_jsonl(tmp_path / path, look)
    for path in ("data/test.jsonl", "probe_align/scores.jsonl"):
        write_jsonl(tmp_path / path, [{"id": "0", **told}])
    said = report.expert_table(str(tmp_path), {"align": "here"}).splitlines()[-1]
    length, right = found["D_r, length"], found["D_r, reasoning"]
    assert said == f"Follow length more than what is right: D_r here ({length:.2f} to {right:.2f})."


ROWS = {**stages.STAGES, **{stage: row for _, stage, row, _ in paper.ROWS}}
COMMANDS = stages.plan("out", 3, stages.FULL, ROWS, report.ARMS, paper.EXPERTS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_table_is_a_command_line(name):
    """Its script knows every flag, and what it reads is a stage or a data set."""
    needs, (script, *flags) = COMMANDS[f"out/{name}"]
    assert {Path(folder).name for folder in needs} <= {*ROWS, "base", "data"}
    if script == "-m":
        script = flags.pop(0).replace(".", "/") + ".py"
    else:
        assert flags.count("--ckpt") == 1
    assert "{" not in " ".join(flags)
    known = (ROOT / script).read_text() + (ROOT / "flags.py").read_text()
    assert all(f'"{flag}"' in known for flag in flags if flag.startswith("--"))


def test_what_all_seeds_have_does_not_go_on_with_a_row_that_they_lack():
    rows = {stage: ROWS[stage] for stage in paper.ALL_SEEDS}
    few = stages.plan("out", 3, stages.FULL, stages.STAGES | rows, report.ARMS, ["align"])
    assert all(few[f"out/{stage}"] == COMMANDS[f"out/{stage}"] for stage in rows)


def test_of_a_flag_given_twice_the_last_counts():
    data = "@data/sft.jsonl:1 @best/rows.jsonl"
    rows = {"one": f"sft.py --ckpt @base --lr 1 --data {data} --steps {{sft}}"}
    rows["more"] = "one --lr 2 --data @data/align.jsonl:3 @best/rows.jsonl"
    needs, command = stages.plan("out", 3, {"sft": 7, "samples": 1}, rows, [], [])["out/more"]
    expected = "sft.py --ckpt out/base --lr 2 --data out/data/align.jsonl:3 "
    expected += "out/best/rows.jsonl --steps 7 --out out/more --seed 3"
    assert needs == {"out/base", "out/data", "out/best"} and " ".join(command) == expected


def test_rows_are_chosen_by_the_experts(tmp_path):
    """Own responses that are whole; the best of each prompt's by the mean of standardised scores;
    with one response to a prompt the best share of each kind of question."""
    texts = [world.response([("red", "cross")], ([f"step {i}"], "1")) for i in range(4)]
    kind = {"world": {"kind": "color number"}}
    examples = [{"id": name, "images": ["images/a.png"], **kind} for name in ("a-1", "a-2")]
    said = [(0, texts[0]), (0, "broken"), (0, texts[1]), (1, texts[2]), (1, texts[3])]
    lines = [{"item": item, "response": text, "finished": True} for item, text in said]
    lines.insert(1, {**lines[0], "finished": False})
    rows = choose.with_responses(examples, lines)
    assert [row["id"] for row in rows] == ["a-1/0", "a-1/3", "a-2/4", "a-2/5"]
    assert [row["response"] for row in rows] == texts
    scores = []
    for row, d_v, d_r in zip(rows, (100, 101, 5, 5), (0.5, 0.5, 1.2, 1)):
        scores.append({"id": row["id"], "perception": d_v, "reasoning": d_r, "combined": 0})
    chosen = choose.best(rows, scores, 0.5, 0.5)
    assert [row["id"] for row in chosen] == ["a-1/3", "a-2/4"]
    assert [row["id"] for row in choose.best(rows, scores, 0.5, 0)] == ["a-1/0", "a-2/4"]
    unread = [*scores[:2], {"id": "a-2/4", "combined": None}]
    assert choose.best(rows, unread, 0.5, 0.5) == chosen[:1]
    scores[3] |= {"perception": 1, "reasoning": 1.2}  # of the perception scores the std is 50
    alone = [{**score, "id": str(i)} for i, score in enumerate(scores)]
    alone[2]["reasoning"] = 1
    examples = [{"id": str(i), **kind} for i in range(4)]
    kept = choose.best(examples, alone, 0.75, 0.5)
    assert [row["id"] for row in kept] == ["0", "1", "3"]
    examples[2]["world"] = {"kind": "shape more"}  # the worst of all, but the only one of its kind
    kept = choose.best(examples, alone, 0.34, 1)
    assert [row["id"] for row in kept] == ["1", "2"]


def test_the_data_of_another_seed_are_not_gone_on_with(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "made.json").write_text(json.dumps({"seed": 0, **stages.QUICK}))
    stages.write_data(str(tmp_path), 0, stages.QUICK)
    with pytest.raises(SystemExit, match="made with another seed"):
        stages.write_data(str(tmp_path), 1, stages.QUICK)


STAGE = """import os, sys, time
begun = time.time()
out, words, other = sys.argv[1:]
os.mkdir(out)
while other and not os.path.exists(other):  # runs beside this one
    time.sleep(0.05)
open(f"{out}/meta.json", "w").write(f"{begun} {time.time()} {os.environ['OMP_NUM_THREADS']}")
print(words)"""


def test_stages_run_when_what_they_read_is_there(tmp_path, capsys, monkeypatch):
    """Two at a time, a thread each. Of what they print only some lines are shown; what has run does
    not run again."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folders = {name: str(tmp_path / name) for name in "abcde"}
    needs = {"a": "", "b": "a", "c": "a", "d": "a", "e": "bc"}
    commands = {}
    for name, folder in folders.items():
        said = f"saved {name}" if name == "c" else name
        reads = {folders[other] for other in needs[name]} | {"elsewhere"}
        beside = {"b": folders["c"], "c": folders["b"]}.get(name, "")
        commands[folder] = reads, ["-c", STAGE, folder, said, beside]
    args = argparse.Namespace(jobs=2, resume=False)
    stages.run_stages(commands, args)
    begun, ended, threads = {}, {}, {}
    for name, folder in folders.items():
        found = Path(folder, "meta.json").read_text().split()
        begun[name], ended[name], threads[name] = map(float, found)
    assert all(begun[name] >= ended[other] for name in needs for other in needs[name])
    assert begun["d"] >= min(ended["b"], ended["c"]) and set(threads.values()) == {1}
    printed = capsys.readouterr().out
    assert "c: saved c\n" in printed and "b: b" not in printed
    assert all(float(Path(f"{folder}.seconds").read_text()) >= 0 for folder in folders.values())
    stages.run_stages(commands, args)
    assert capsys.readouterr().out == ""


def test_a_stage_that_fails_ends_the_others(tmp_path, capsys):
    fails = "import time; time.sleep(0.5); print('sft.py: error: no such row'); raise SystemExit(2)"
    lasts = f"import time; time.sleep(60); open({str(tmp_path / 'ended')!r}, 'w')"
    commands = {str(tmp_path / "long"): (set(), ["-c", lasts])}
    commands[str(tmp_path / "bad")] = set(), ["-c", fails]
    with pytest.raises(SystemExit, match="bad failed with status 2: sft.py: error: no such row; "):
        stages.run_stages(commands, argparse.Namespace(jobs=2, resume=False))
    assert "stopped in long" in capsys.readouterr().out and not (tmp_path / "ended").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_the_toy_ends_its_stages(tmp_path, number):
    """The stage saves its state first, and --resume goes on with it."""
    command = [sys.executable, "-m", "toy", "--quick", "--out", tmp_path / "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        for line in process.stdout:
            if line.startswith("sft: step 20 "):
                process.send_signal(number)
                break
        rest = process.stdout.read()
        assert process.wait() == 128 + number and "toy: stopped in sft" in rest
    processes = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in processes
    assert list((tmp_path / "out" / "sft").glob("state.*"))
    assert float((tmp_path / "out" / "sft.seconds").read_text()) > 0  # --resume adds to it
