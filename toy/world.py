"""A picture world whose truth is known: a 3 x 3 grid of coloured shapes, questions about a few of its cells, two teachers
and exact scores.

One cell is 32 x 32 px = one merged visual token of Qwen3-VL. A question adds two counts, each over one row or column, and
half of the questions ask only whether the sum is even or odd: each touches few cells and can be guessed, so that the
answer alone is a poor teacher of perception.

The curated teacher describes every cell and derives every step. The public teacher is cheap in the way that large
scraped demonstration sets are: it sees coarsely (orange is called red, ...), leaves objects out, skips steps, and is
sometimes wrong.
"""

import re

from PIL import Image, ImageDraw

ROWS = COLUMNS = 3
CELL = 32
COLORS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 20),
    "blue": (30, 60, 220),
    "purple": (140, 40, 190),
    "green": (20, 150, 50),
    "lime": (140, 220, 40),
}
SHAPES = ["circle", "square", "triangle", "diamond", "cross"]
COARSE = {"orange": "red", "purple": "blue", "lime": "green", "diamond": "square"}  # how the public teacher sees
SYSTEM = "Describe the picture, think, answer."
BIAS = {"coarse": 0.7, "omit": 0.1, "skip": 0.7, "wrong": 0.2}  # rates of the public teacher's faults


def draw(cells):
    """cells: list of (colour, shape), row by row -> PIL image, 32 px a cell."""
    image = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL), "white")
    pen = ImageDraw.Draw(image)
    for i, (color, shape) in enumerate(cells):
        x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
        lo, mid, hi = 5, CELL // 2, CELL - 6
        fill = COLORS[color]
        if shape == "circle":
            pen.ellipse((x + lo, y + lo, x + hi, y + hi), fill)
        elif shape == "square":
            pen.rectangle((x + lo, y + lo, x + hi, y + hi), fill)
        elif shape == "triangle":
            pen.polygon([(x + mid, y + lo), (x + hi, y + hi), (x + lo, y + hi)], fill)
        elif shape == "diamond":
            pen.polygon([(x + mid, y + lo), (x + hi, y + mid), (x + mid, y + hi), (x + lo, y + mid)], fill)
        else:
            pen.rectangle((x + mid - 4, y + lo, x + mid + 3, y + hi), fill)
            pen.rectangle((x + lo, y + mid - 4, x + hi, y + mid + 3), fill)
    return image


def make_problem(rng):
    """rng: numpy Generator -> {"cells", "terms": two (attribute, line, number), "parity", "question", "answer"}."""
    cells = [(str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))) for _ in range(ROWS * COLUMNS)]
    terms = []
    for kind in (list(COLORS), SHAPES):  # one term about colour, one about shape
        line, number = str(rng.choice(["row", "column"])), int(rng.integers(1, 4))
        # ask mostly for something that is there: a colour or shape of the line itself two times out of three
        inside = [cells[i][kind is SHAPES] for i in line_cells(line, number)]
        terms.append((str(rng.choice(inside if rng.random() < 0.67 else kind)), line, number))
    if rng.random() < 0.5:
        terms.reverse()
    parity = bool(rng.random() < 0.5)
    (a, la, na), (b, lb, nb) = terms
    what = f"How many {a} in {la} {na} plus {b} in {lb} {nb}"
    question = f"{what}, even or odd?" if parity else f"{what}?"
    problem = {"cells": cells, "terms": terms, "parity": parity, "question": question}
    problem["answer"] = solve(problem, dict(enumerate(cells, 1)))[1]
    return problem


def line_cells(line, number):
    """Indices (from 0) of the cells of a row or column, numbered from 1."""
    if line == "row":
        return [(number - 1) * COLUMNS + i for i in range(COLUMNS)]
    return [i * COLUMNS + number - 1 for i in range(ROWS)]


def solve(problem, seen):
    """The complete trace over a description `seen` {cell number: (colour, shape)} -> (its lines, the answer)."""
    lines, counts = [], []
    for attribute, line, number in problem["terms"]:
        kind = int(attribute in SHAPES)  # 0: the question is about colour, 1: about shape
        cells = [(i + 1, seen[i + 1][kind] if i + 1 in seen else "none") for i in line_cells(line, number)]
        counts.append(sum(value == attribute for _, value in cells))
        listed = " ".join(f"{i} {value} {attribute} {'yes' if value == attribute else 'no'}" for i, value in cells)
        lines.append(f"{line} {number}: {listed} = {counts[-1]}")
    total = sum(counts)
    lines.append(f"{counts[0]} + {counts[1]} = {total}")
    if not problem["parity"]:
        return lines, str(total)
    answer = "odd" if total % 2 else "even"
    lines.append(f"{total} is {answer}")
    return lines, answer


def respond(problem, rng=None):
    """A teacher's response text: the curated one, or with `rng` the public one with its faults."""
    seen = dict(enumerate(map(tuple, problem["cells"]), 1))
    if rng is not None:
        blur = lambda word: COARSE[word] if word in COARSE and rng.random() < BIAS["coarse"] else word
        seen = {i: (blur(c), blur(s)) for i, (c, s) in seen.items() if rng.random() >= BIAS["omit"]}
    lines, answer = solve(problem, seen)
    if rng is not None:
        if rng.random() < BIAS["wrong"]:
            answer = str(rng.choice(["even", "odd"])) if problem["parity"] else str(rng.integers(0, 5))
        if rng.random() < BIAS["skip"]:
            lines = [lines[2]]  # the sum without the counts it comes from
    caption = "\n".join(f"{i} {c} {s}" for i, (c, s) in seen.items())
    body = "\n".join(lines)
    return f"<caption>\n{caption}\n</caption>\n<think>\n{body}\n</think>\n<answer>\n{answer}\n</answer>"


def read_caption(caption):
    """Caption text -> {cell number: (colour, shape)} of its well-formed lines; a cell named twice counts as unsaid."""
    seen, twice = {}, set()
    for line in caption.split("\n"):
        match = re.fullmatch(r"(\d) (\w+) (\w+)", line)
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
    lines, result = solve(problem, seen)
    said = think.split("\n")
    steps = [line in said for line in lines] + [answer == result]
    return {
        "perception": sum(seen.get(i) == cell for i, cell in truth.items()) / len(truth),
        "reasoning": sum(steps) / len(steps),
        "accuracy": float(answer == problem["answer"]),
        "format": 1.0,
    }
