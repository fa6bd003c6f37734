"""A picture world whose truth is known: a 3 x 3 grid of coloured shapes, questions, two teachers.

One cell is 32 x 32 px = one merged visual token of Qwen3-VL. A question is about two words in one
row or column: how many cells they describe, whether that is even or odd, or which is the more
frequent. The curated teacher describes every cell and derives every step. The public teacher is
wrong in most of its responses, but not in a style of its own: it takes colours and shapes for their
neighbours in both directions, misplaces, invents, slips in a step; its words, pairs of words and
lengths are the curated teacher's. To tell the two apart one must look at the picture.

Alignment has curated responses to questions of two kinds, RLVR the answers to two, one of them the
same: a kind may be trained by both, by one, or by nobody after SFT.
"""

import re

import numpy as np
from PIL import Image, ImageDraw

from rollout import Response

ROWS, COLUMNS, CELL = 3, 3, 32
COLORS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 20),
    "blue": (30, 60, 220),
    "purple": (140, 40, 190),
    "green": (20, 150, 50),
    "lime": (140, 220, 40),
}
SHAPES = ["circle", "square", "diamond", "triangle", "cross"]
WORDS = list(COLORS), SHAPES  # what can be said of a cell: its colour, its shape
# what a question asks of its two terms and of one row or column
FORMS = {
    "number": "How many {} plus {} in {} {}?",
    "parity": "How many {} plus {} in {} {}, even or odd?",
    "more": "More {} or {} in {} {}?",
}
# Kinds of questions; those that are in the data of alignment and of RLVR. SFT has all of them: the
# others are what nobody touches after it.
KINDS = [f"{attribute} {form}" for form in FORMS for attribute in ("color", "shape")]
ALIGN_KINDS = ["color number", "shape number"]
RL_KINDS = ["shape number", "shape parity"]
JITTER = 15  # standard deviation of a cell's colour, per channel of 255
SYSTEM = "Describe the picture, think, answer."
# The public teacher's faults and how many of its responses have each, independently: otherwise a
# policy that is rewarded for one good habit switches to the writer who has them all, and any reward
# would repair everything. What it takes for what, in both directions; how many traces have slips.
FAULTS = {"colors": 0.75, "shapes": 0.7, "misplace": 0.3, "invent": 0.3}
SLIPS = 0.6
TAKEN_FOR = {"red": "orange", "blue": "purple", "green": "lime", "square": "diamond"}
TAKEN_FOR |= {other: word for word, other in TAKEN_FOR.items()}


def draw(cells, seed=0, hidden=()):
    """cells: list of (colour, shape), grid row by grid row -> PIL image, 32 px a cell; those with
    an index in `hidden` are left out.

    Places, sizes and colours vary with `seed`, the colours so much that neighbours like red and
    orange cannot always be told apart: nobody reads this world perfectly.
    """
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL), "white")
    pen = ImageDraw.Draw(image)
    for i, (color, shape) in enumerate(cells):
        r = int(rng.integers(10, 13))  # half the width
        middle = np.array([i % COLUMNS, i // COLUMNS]) * CELL + CELL // 2
        x, y = (middle + rng.integers(-1, 2, 2)).tolist()
        fill = np.clip(COLORS[color] + rng.normal(0, JITTER, 3), 0, 255)
        fill = tuple(fill.astype(int).tolist())
        if i in hidden:
            continue
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill)
        elif shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill)
        elif shape == "triangle":
            pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill)
        elif shape == "diamond":
            pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill)
        else:
            pen.rectangle((x - 3, y - r, x + 3, y + r), fill)
            pen.rectangle((x - r, y - 3, x + r, y + 3), fill)
    return image


def make_cells(rng):
    """The cells of a picture, independent and uniform over colours and shapes."""
    return [(str(rng.choice(WORDS[0])), str(rng.choice(WORDS[1]))) for _ in range(ROWS * COLUMNS)]


def make_problem(rng, kinds=tuple(KINDS)):
    """A picture, a question of one of `kinds` about it and the true answer, as a dict that JSON can
    hold: {"cells", "line", "number", "terms", "form", "kind", "question", "seed" (of `draw`),
    "answer"}."""
    cells = make_cells(rng)
    line = str(rng.choice(["row", "column"]))
    number = int(rng.integers(1, (ROWS if line == "row" else COLUMNS) + 1))
    kind = str(rng.choice(kinds))
    attribute, form = kind.split()
    # terms that depend on the picture would be a tell: who misperceives it finds fewer of them
    terms = rng.choice(WORDS[attribute == "shape"], 2, replace=False).tolist()
    problem = {"cells": cells, "line": line, "number": number, "terms": terms, "form": form}
    problem |= {"kind": kind, "question": FORMS[form].format(*terms, line, number)}
    problem["seed"] = int(rng.integers(2**31))
    return {**problem, "answer": solve(problem, cells)[1]}


def solve(problem, cells):
    """The complete trace over a description `cells`, as of `read_caption` -> (its steps, the
    answer). A cell begins a line here as in the caption: it is the same token there, so that a look
    at the caption is easy to learn."""
    steps, counts, grid = [], [], np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    asked = (grid if problem["line"] == "row" else grid.T)[problem["number"] - 1]
    for term in problem["terms"]:
        words = [cells[i][term in SHAPES] for i in asked]
        lines = [f"{problem['line']} {problem['number']}:"]
        for i, word in zip(asked, words):
            lines.append(f"{i + 1} {word} {term} {'yes' if word == term else 'no'}")
        counts.append(words.count(term))
        steps.append("\n".join(lines) + f" = {counts[-1]}")
    a, b = counts
    if problem["form"] == "more":
        answer = "same" if a == b else problem["terms"][int(b > a)]
        return [*steps, f"{a} to {b} is {answer}"], answer
    answer = str(a + b)
    steps.append(f"{a} + {b} = {answer}")
    if problem["form"] == "parity":
        total, answer = answer, ("even", "odd")[(a + b) % 2]
        steps.append(f"{total} is {answer}")
    return steps, answer


def respond(problem, rng=None):
    """Response text of the curated teacher or, with `rng`, of the public one.

    A public response is as long as a curated one and has each word, and each pair of neighbouring
    words, as often in the mean: every fault is what would be right for some other picture. To find
    it one must look, or check a step against caption and earlier steps.
    """
    cells = problem["cells"] if rng is None else misperceive(problem["cells"], rng)
    solution = solve(problem, cells)
    if rng is not None and rng.random() < SLIPS:
        solution = slip(solution, solve(problem, make_cells(rng)), rng)
    return response(cells, solution)


def response(cells, solution):
    steps, answer = solution
    lines = [f"{i} {color} {shape}" for i, (color, shape) in enumerate(cells, 1)]
    blocks = {"caption": "\n".join(lines), "think": "\n".join(steps), "answer": answer}
    return "\n".join(f"<{tag}>\n{text}\n</{tag}>" for tag, text in blocks.items())


def misperceive(cells, rng):
    """What the public teacher takes the cells for.

    Cells that are independent and uniform, as `make_cells` draws them, stay so.
    """
    seen = [list(cell) for cell in cells]
    has = {habit: rng.random() < rate for habit, rate in FAULTS.items()}
    if has["misplace"]:
        i, j = rng.choice(len(seen), 2, replace=False)
        seen[i], seen[j] = seen[j], seen[i]
    for cell, invented in zip(seen, make_cells(rng)):
        if has["invent"] and rng.random() < 0.25:
            cell[:] = invented
    for attribute, habit in enumerate(("colors", "shapes")):
        if has[habit]:
            seen = exchange(seen, attribute)
    return seen


def exchange(cells, attribute):
    """The cells with every colour (attribute 0) or shape (1) taken for its neighbour."""
    cells = [list(cell) for cell in cells]
    for cell in cells:
        cell[attribute] = TAKEN_FOR.get(cell[attribute], cell[attribute])
    return cells


def slip(mine, other, rng, rate=0.2):
    """A trace of which each word, at that rate, is the one that another picture's trace has there.

    mine, other: (steps, answer) to the same question -> (steps, answer), the two counts as one
    step. From the second count to the answer all is exchanged together or not at all: there changed
    words stand side by side, and a pair of them that no picture has would be a tell.
    """
    (steps, answer), (other_steps, other_answer) = mine, other
    words = re.split(r"(\s)", "\n".join(steps[:2]))
    other_words = re.split(r"(\s)", "\n".join(other_steps[:2]))
    mixed = [b if rng.random() < rate else a for a, b in zip(words, other_words)]
    mixed[-1] = words[-1]
    if rng.random() < rate:
        mixed[-1], steps, answer = other_words[-1], other_steps, other_answer
    return ["".join(mixed), *steps[2:]], answer


def corrupt(cells, k, rng):
    """The cells with k of them wrong in one attribute, each other word being equally likely. As
    with `misperceive`, no word becomes rarer."""
    cells = [list(cell) for cell in cells]
    for i in rng.choice(len(cells), k, replace=False):
        attribute = rng.choice((0, 1))
        wrong = [word for word in WORDS[attribute] if word != cells[i][attribute]]
        cells[i][attribute] = str(rng.choice(wrong))
    return cells


# -------------------------------------------------------------------------------------- the scores
UNSAID = ("none", "none")


def read_caption(caption):
    """Caption -> cells as `draw` takes them, UNSAID where it has no well-formed line for the cell,
    or more than one."""
    said = {}
    for number, color, shape in re.findall(r"^(\d+) (\w+) (\w+)$", caption, re.M):
        said[int(number)] = UNSAID if int(number) in said else (color, shape)
    return [said.get(i, UNSAID) for i in range(1, ROWS * COLUMNS + 1)]


def score(problem, blocks):
    """Exact scores in [0, 1] of one response.

    blocks: rollout.Response, or None when the format is broken: then all are 0 ->
    perception, colors, shapes  shares of the cells described rightly, in both, in colour, in shape
    reasoning   share of the steps (two counts, the sum, the parity, the answer) that the trace has
                and that follow from its own caption, right or wrong as that caption is; a step that
                is left out counts as wrong
    accuracy    the final answer is the true one
    format      the response has the three blocks
    """
    said = blocks or Response("", "", "")
    cells = read_caption(said.caption)
    steps, answer = solve(problem, cells)
    found = [f"\n{step}\n" in f"\n{said.think}\n" for step in steps]
    right = np.array(cells) == np.array(problem["cells"])  # [cells, 2]
    scores = {"perception": right.all(1).mean(), "colors": right[:, 0].mean()}
    scores |= {"shapes": right[:, 1].mean(), "reasoning": np.mean([*found, said.answer == answer])}
    scores |= {"accuracy": said.answer == problem["answer"], "format": blocks is not None}
    return {key: float(value) for key, value in scores.items()}
