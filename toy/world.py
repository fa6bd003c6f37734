"""A picture world whose truth is known: a 3 x 3 grid of coloured shapes, questions about one row or column, two teachers and
exact scores.

One cell is 32 x 32 px = one merged visual token of Qwen3-VL. A question adds two counts over one line and half of the
questions ask only whether the sum is even or odd: it touches a part of what the picture shows and can be guessed. The
prompts of RLVR are few and about shapes only, as sets of verifiable problems cover a slice of what a model must see: there
the answer is a poor teacher of perception. The curated teacher describes every cell and derives every step. The
public teacher is cheap in the way that large scraped demonstration sets are: it sees coarsely (orange is called red, a
diamond a square, ...), leaves objects out, skips steps, and is sometimes wrong, each in most of its responses or in some.
"""

import re

import numpy as np
from PIL import Image, ImageDraw

ROWS, COLUMNS, CELL = 3, 3, 32
COLORS = {
    "red": (220, 30, 30), "orange": (255, 140, 20), "blue": (30, 60, 220),
    "purple": (140, 40, 190), "green": (20, 150, 50), "lime": (140, 220, 40),
}  # fmt: skip
SHAPES = ["circle", "square", "diamond", "triangle", "cross"]
COARSE = {"orange": "red", "purple": "blue", "lime": "green", "diamond": "square"}  # how the public teacher sees
JITTER = 15  # standard deviation of a cell's colour, per channel of 255
SYSTEM = "Describe the picture, think, answer."
# The public teacher's habits and how many of its responses have each. They are independent: otherwise a policy that is
# rewarded for one good habit switches to the writer who has them all, and any reward would repair everything.
HABITS = {"colors": 0.75, "shapes": 0.7, "omit": 0.3, "skip": 0.6, "wrong": 0.2}


def draw(cells, seed=0):
    """cells: list of (colour, shape), row by row -> PIL image, 32 px a cell. Places, sizes and colours vary with `seed`,
    the colours so much that neighbours like red and orange cannot always be told apart: nobody reads this world perfectly."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL), "white")
    pen = ImageDraw.Draw(image)
    for i, (color, shape) in enumerate(cells):
        radius = int(rng.integers(10, 13))
        x, y = (int(v) + CELL // 2 for v in np.array([i % COLUMNS, i // COLUMNS]) * CELL + rng.integers(-1, 2, 2))
        fill = tuple(int(v) for v in np.clip(np.array(COLORS[color]) + rng.normal(0, JITTER, 3), 0, 255))
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            pen.ellipse(box, fill)
        elif shape == "square":
            pen.rectangle(box, fill)
        elif shape == "triangle":
            pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill)
        elif shape == "diamond":
            pen.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill)
        else:
            pen.rectangle((x - 3, y - radius, x + 3, y + radius), fill)
            pen.rectangle((x - radius, y - 3, x + radius, y + 3), fill)
    return image


def make_problem(rng, kinds=(0, 1)):
    """rng: numpy Generator; kinds: what the two terms may be about, 0 colour, 1 shape -> {"cells", "line", "number",
    "terms": two attributes, "parity", "question", "seed", "answer"}."""
    cells = [(str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))) for _ in range(ROWS * COLUMNS)]
    line = str(rng.choice(["row", "column"]))
    number = int(rng.integers(1, (ROWS if line == "row" else COLUMNS) + 1))
    terms = []
    for kind in rng.choice(kinds, 2):  # two times out of three a term asks about something that is there
        inside = [cells[i][kind] for i in line_cells(line, number)]
        every = [word for word in (list(COLORS), SHAPES)[kind] if word not in terms]
        inside = [word for word in inside if word not in terms] or every
        terms.append(str(rng.choice(inside if rng.random() < 0.67 else every)))
    parity = bool(rng.random() < 0.5)
    what = f"How many {terms[0]} plus {terms[1]} in {line} {number}"
    question = f"{what}, even or odd?" if parity else f"{what}?"
    problem = {"cells": cells, "line": line, "number": number, "terms": terms, "parity": parity, "question": question}
    problem["seed"] = int(rng.integers(2**31))
    problem["answer"] = solve(problem, dict(enumerate(cells, 1)))[1]
    return problem


def line_cells(line, number):
    """Indices (from 0) of the cells of a row or column, numbered from 1."""
    if line == "row":
        return [(number - 1) * COLUMNS + i for i in range(COLUMNS)]
    return [i * COLUMNS + number - 1 for i in range(ROWS)]


def solve(problem, seen):
    """The complete trace over a description `seen` {cell number: (colour, shape)} -> (its steps, the answer). A cell begins
    a line here as in the caption: it is the same token there, which makes a look at the caption easy to learn."""
    steps, counts = [], []
    for attribute in problem["terms"]:
        kind = int(attribute in SHAPES)  # 0: the term is about colour, 1: about shape
        numbers = [i + 1 for i in line_cells(problem["line"], problem["number"])]
        cells = [(i, seen[i][kind] if i in seen else "none") for i in numbers]
        counts.append(sum(value == attribute for _, value in cells))
        listed = "\n".join(f"{i} {value} {attribute} {'yes' if value == attribute else 'no'}" for i, value in cells)
        steps.append(f"{problem['line']} {problem['number']}:\n{listed} = {counts[-1]}")
    total = sum(counts)
    steps.append(f"{counts[0]} + {counts[1]} = {total}")
    if not problem["parity"]:
        return steps, str(total)
    answer = "odd" if total % 2 else "even"
    steps.append(f"{total} is {answer}")
    return steps, answer


def respond(problem, rng=None):
    """A teacher's response text: the curated one, or with `rng` the public one with its faults."""
    seen = dict(enumerate(map(tuple, problem["cells"]), 1))
    has = {habit: rng is not None and rng.random() < rate for habit, rate in HABITS.items()}
    if has["colors"]:
        seen = {i: (COARSE.get(c, c), s) for i, (c, s) in seen.items()}
    if has["shapes"]:
        seen = {i: (c, COARSE.get(s, s)) for i, (c, s) in seen.items()}
    if has["omit"]:
        seen = {i: cell for i, cell in seen.items() if rng.random() > 0.25}
    steps, answer = solve(problem, seen)
    if has["wrong"]:
        answer = str(rng.choice(["even", "odd"])) if problem["parity"] else str(rng.integers(0, 5))
    if has["skip"]:
        steps = [steps[2]]  # the sum without the counts it comes from
    caption = "\n".join(f"{i} {c} {s}" for i, (c, s) in seen.items())
    body = "\n".join(steps)
    return f"<caption>\n{caption}\n</caption>\n<think>\n{body}\n</think>\n<answer>\n{answer}\n</answer>"


def read_caption(caption):
    """Caption text -> {cell number: (colour, shape)} of its well-formed lines; a cell named twice counts as unsaid."""
    seen, twice = {}, set()
    for line in caption.split("\n"):
        match = re.fullmatch(r"(\d+) (\w+) (\w+)", line)
        if match:
            i = int(match[1])
            twice |= {i} & set(seen)
            seen[i] = (match[2], match[3])
    return {i: cell for i, cell in seen.items() if i not in twice}


def score(problem, blocks):
    """Exact scores in [0, 1] of one response; `blocks`: (caption, think, answer) or None when the format is broken.

    perception  share of cells described rightly, colour and shape
    reasoning   share of the steps (two counts, the sum, the parity, the answer) that the trace has and that follow from
                its own caption, right or wrong as that caption is; a step that is left out counts as wrong
    accuracy    the final answer is the true one
    format      the response has the three blocks
    """
    if blocks is None:
        return {"perception": 0.0, "reasoning": 0.0, "accuracy": 0.0, "format": 0.0}
    caption, think, answer = blocks
    seen = read_caption(caption)
    truth = dict(enumerate(map(tuple, problem["cells"]), 1))  # tuples: JSON gives lists
    steps, result = solve(problem, seen)
    steps = [f"\n{step}\n" in f"\n{think}\n" for step in steps] + [answer == result]
    return {
        "perception": sum(seen.get(i) == cell for i, cell in truth.items()) / len(truth),
        "reasoning": sum(steps) / len(steps),
        "accuracy": float(answer == problem["answer"]),
        "format": 1.0,
    }
