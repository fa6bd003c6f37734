"""A picture world whose truth is known: a 3 x 3 grid of coloured shapes, questions, two teachers.

One cell is 32 x 32 px = one merged visual token of Qwen3-VL. A question adds two counts over one
row or column and half of the questions ask only whether the sum is even or odd: it touches a part
of what the picture shows and can be guessed. The prompts of RLVR are few and about shapes only, as
sets of verifiable problems cover a slice of what a model must see: there the answer is a poor
teacher of perception. The curated teacher describes every cell and derives every step. The public
teacher is cheap in the way that large scraped demonstration sets are: it sees coarsely (orange is
called red, a diamond a square, ...), leaves objects out, skips steps, and is sometimes wrong, each
in most of its responses or in some.
"""

import re

import numpy as np
from PIL import Image, ImageDraw

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
# how the public teacher sees
COARSE = {"orange": "red", "purple": "blue", "lime": "green", "diamond": "square"}
# what a question asks of its two terms and of one row or column
FORMS = {
    "number": "How many {} plus {} in {} {}?",
    "parity": "How many {} plus {} in {} {}, even or odd?",
}
JITTER = 15  # standard deviation of a cell's colour, per channel of 255
SYSTEM = "Describe the picture, think, answer."
# The public teacher's habits and how many of its responses have each. They are independent:
# otherwise a policy that is rewarded for one good habit switches to the writer who has them all,
# and any reward would repair everything.
HABITS = {"colors": 0.75, "shapes": 0.7, "omit": 0.3, "skip": 0.6, "wrong": 0.2}


def draw(cells, seed=0):
    """cells: list of (colour, shape), grid row by grid row -> PIL image, 32 px a cell.

    Places, sizes and colours vary with `seed`, the colours so much that neighbours like red and
    orange cannot always be told apart: nobody reads this world perfectly.
    """
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL), "white")
    pen = ImageDraw.Draw(image)
    for i, (color, shape) in enumerate(cells):
        r = int(rng.integers(10, 13))  # half the width
        corner = np.array([i % COLUMNS, i // COLUMNS]) * CELL
        x, y = (int(v) + CELL // 2 for v in corner + rng.integers(-1, 2, 2))
        noise = rng.normal(0, JITTER, 3)
        fill = tuple(int(v) for v in np.clip(np.array(COLORS[color]) + noise, 0, 255))
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


def make_problem(rng, attributes=(0, 1)):
    """A picture, a question about it and the true answer, as a dict that JSON can hold.

    rng: numpy Generator; attributes: what each of the two terms may be about, 0 colour, 1 shape ->
    {"cells", "line", "number", "terms", "form", "question", "seed" (of `draw`), "answer"}
    """
    cells = make_cells(rng)
    line = str(rng.choice(["row", "column"]))
    number = int(rng.integers(1, (ROWS if line == "row" else COLUMNS) + 1))
    terms = []
    for attribute in rng.choice(attributes, 2):
        every = [word for word in WORDS[attribute] if word not in terms]
        there = [cells[i][attribute] for i in line_cells(line, number)]
        there = [word for word in there if word not in terms] or every
        # two times out of three a term asks about something that is there
        terms.append(str(rng.choice(there if rng.random() < 0.67 else every)))
    form = "parity" if rng.random() < 0.5 else "number"
    problem = {"cells": cells, "line": line, "number": number, "terms": terms, "form": form}
    problem["question"] = FORMS[form].format(*terms, line, number)
    problem["seed"] = int(rng.integers(2**31))
    problem["answer"] = solve(problem, numbered(cells))[1]
    return problem


def numbered(cells):
    """{cell number, from 1: (colour, shape)}; JSON gives lists of two."""
    return {i: tuple(cell) for i, cell in enumerate(cells, 1)}


def line_cells(line, number):
    """Indices (from 0) of the cells of a row or column of the grid, numbered from 1."""
    if line == "row":
        return [(number - 1) * COLUMNS + i for i in range(COLUMNS)]
    return [i * COLUMNS + number - 1 for i in range(ROWS)]


def solve(problem, seen):
    """The complete trace over a description `seen` -> (its steps, the answer).

    seen: {cell number: (colour, shape)}, not necessarily of all cells. A cell begins a line here as
    in the caption: it is the same token there, which makes a look at the caption easy to learn.
    """
    steps, counts = [], []
    for term in problem["terms"]:
        attribute, listed, count = int(term in SHAPES), [], 0
        for i in line_cells(problem["line"], problem["number"]):
            value = seen[i + 1][attribute] if i + 1 in seen else "none"
            listed.append(f"{i + 1} {value} {term} {'yes' if value == term else 'no'}")
            count += value == term
        lines = [f"{problem['line']} {problem['number']}:", *listed]
        steps.append("\n".join(lines) + f" = {count}")
        counts.append(count)
    total = sum(counts)
    steps.append(f"{counts[0]} + {counts[1]} = {total}")
    if problem["form"] == "number":
        return steps, str(total)
    answer = "odd" if total % 2 else "even"
    steps.append(f"{total} is {answer}")
    return steps, answer


def respond(problem, rng=None):
    """A teacher's response text: the curated one, or with `rng` the public one with its faults."""
    seen = numbered(problem["cells"])
    has = {habit: rng is not None and rng.random() < rate for habit, rate in HABITS.items()}
    if has["colors"]:
        seen = {i: (COARSE.get(color, color), shape) for i, (color, shape) in seen.items()}
    if has["shapes"]:
        seen = {i: (color, COARSE.get(shape, shape)) for i, (color, shape) in seen.items()}
    if has["omit"]:
        seen = {i: cell for i, cell in seen.items() if rng.random() > 0.25}
    steps, answer = solve(problem, seen)
    if has["wrong"]:
        parity = problem["form"] == "parity"
        answer = str(rng.choice(["even", "odd"]) if parity else rng.integers(0, 5))
    if has["skip"]:
        steps = [steps[2]]  # the sum without the counts it comes from
    return response(seen, steps, answer)


def response(seen, steps, answer):
    caption = "\n".join(f"{i} {color} {shape}" for i, (color, shape) in seen.items())
    blocks = {"caption": caption, "think": "\n".join(steps), "answer": answer}
    return "\n".join(f"<{tag}>\n{text}\n</{tag}>" for tag, text in blocks.items())


def read_caption(caption):
    """Caption -> {cell number: (colour, shape)} of its well-formed lines.

    A cell named twice counts as unsaid.
    """
    seen, twice = {}, set()
    for line in caption.split("\n"):
        match = re.fullmatch(r"(\d+) (\w+) (\w+)", line)  # number, colour, shape
        if match:
            i = int(match[1])
            if i in seen:
                twice.add(i)
            seen[i] = (match[2], match[3])
    return {i: cell for i, cell in seen.items() if i not in twice}


def score(problem, blocks):
    """Exact scores in [0, 1] of one response.

    blocks: (caption, think, answer) or None when the format is broken ->
    perception  share of cells described rightly, colour and shape
    reasoning   share of the steps (two counts, the sum, the parity, the answer) that the trace has
                and that follow from its own caption, right or wrong as that caption is; a step that
                is left out counts as wrong
    accuracy    the final answer is the true one
    format      the response has the three blocks
    """
    if blocks is None:
        return {"perception": 0.0, "reasoning": 0.0, "accuracy": 0.0, "format": 0.0}
    caption, think, answer = blocks
    seen, truth = read_caption(caption), numbered(problem["cells"])
    steps, result = solve(problem, seen)
    found = [f"\n{step}\n" in f"\n{think}\n" for step in steps] + [answer == result]
    return {
        "perception": sum(seen.get(i) == cell for i, cell in truth.items()) / len(truth),
        "reasoning": sum(found) / len(found),
        "accuracy": float(answer == problem["answer"]),
        "format": 1.0,
    }
