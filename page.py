"""What a run shows to people, made from what it logs anyway.

    OUT/curves.png       metrics.jsonl as curves, healthy ranges shaded
    OUT/rollouts.html    rollouts.jsonl with its pictures: filter, sort, read
    OUT/pictures/        those pictures, reduced
    OUT/README.md        the checkpoint's card, as the Hub expects it
"""

import hashlib
import html
import json
import os
import re
import time
from collections import deque

import numpy as np

MOST = 10_000  # rollouts on a page, the newest or the first
EVERY = 30  # seconds from one drawing to the next, which takes one or two

# ------------------------------------------------------------------------------------------ curves
PANELS = (
    ("loss",), ("reward", "accuracy", "format", "eval_accuracy"), ("valid",), ("gap_v", "gap_r"),
    ("acc_v", "acc_r"), ("loss_v", "loss_r"), ("score_v", "score_r"), ("ground_v", "ground_r"),
    ("entropy",), ("kl",),
    ("drift",), ("clipped",), ("length",), ("finished",), ("grad_norm", "disc_grad_norm"),
    ("lr",), ("dropped", "bad", "skipped_steps", "reward_timeouts", "reward_errors", "graph_skips"),
    ("groups", "gen_batches"), ("seconds", "seconds_rollout", "seconds_disc"),
)  # fmt: skip
HEALTHY = {  # as README's table "What the numbers mean" says
    "valid": (0.9, 1), "acc_v": (0.5, 1), "loss_v": (0, 0.693), "ground_v": (0.8, 1),
    "drift": (0, 0.02), "clipped": (0, 0.2), "finished": (0.9, 1),
}  # fmt: skip


def draw_curves(metrics, path):
    """Draw lines of metrics.jsonl, a panel for each group of numbers that they hold, the range in
    which the first is healthy in green; of a long run also the running mean."""
    from matplotlib.figure import Figure  # imported here: it takes half a second

    logged = {key for line in metrics for key in line}
    panels = []
    for panel in PANELS:
        if here := [key for key in panel if key in logged]:
            panels.append(here)
    rows, columns = -(-len(panels) // 4), min(4, len(panels))
    figure = Figure(figsize=(4 * columns, 2.4 * rows), dpi=80)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    figure.subplots_adjust(0.04, 0.06, 0.99, 0.98, 0.2, 0.25)
    for axis, panel in zip(axes, panels):
        for key in panel:
            points = np.array([(line["step"], line[key]) for line in metrics if key in line], float)
            few = len(points) < 40
            (curve,) = axis.plot(*points.T, marker="." * few, label=key, alpha=1 if few else 0.3)
            if not few:
                width = len(points) // 20
                mean = np.convolve(points[:, 1], np.full(width, 1 / width), "valid")
                axis.plot(points[width - 1 :, 0], mean, color=curve.get_color())
        if panel[0] in HEALTHY:
            axis.axhspan(*HEALTHY[panel[0]], color="green", alpha=0.1, lw=0)
        axis.legend(fontsize=8, labelcolor="linecolor", handlelength=0, framealpha=0.6)
        axis.tick_params(labelsize=8)
        axis.locator_params("x", integer=True, nbins=6)
        axis.locator_params("y", nbins=4)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.savefig(path + ".tmp", format="png")
    os.replace(path + ".tmp", path)


# -------------------------------------------------------------------------------------- the page
PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body { font: 15px/1.45 sans-serif; margin: 0 auto; padding: 1em; max-width: 72em; color: #222 }
header { position: sticky; top: 0; background: #fff; padding: .6em 0 }
header label { white-space: nowrap } input { width: 6em }
#sign, #high, #text { margin-right: 1.5em }
article { display: flex; gap: 1.2em; border-top: 1px solid #ccc; padding: 1em 0 }
figure { flex: 0 0 15em; margin: 0 } img { width: 100%; min-height: 4em; background: #eee }
article > div { min-width: 0 } p, pre { margin: .2em 0 .6em; overflow-wrap: anywhere }
pre { font: inherit; white-space: pre-wrap } .question { font-weight: bold }
.numbers { color: #666 }
.caption { color: #0b57d0 } .think { color: #8a4b00 } .answer { color: #137333; font-weight: bold }
</style></head><body><h1>TITLE</h1>
<p>NOTE <span class="caption">caption</span> · <span class="think">trace</span> ·
<span class="answer">answer</span> · black: outside the three blocks</p>
<header><label>sort by <select id="key"><option value="">order written</option></select></label>
<select id="sign" aria-label="order"><option value="1">rising</option>
<option value="-1">falling</option></select>
<label>only <select id="only"><option value="">all</option></select></label>
<label>from <input id="low" type="number" step="any"></label>
<label>to <input id="high" type="number" step="any"></label>
<label>with the text <input id="text" type="search"></label><output id="count"></output></header>
<main></main><button id="more">more</button>
<script type="application/json" id="lines">LINES</script>
<script>
"use strict";
const $ = id => document.getElementById(id), lines = JSON.parse($("lines").textContent);
const isNumber = value => typeof value === "number" || typeof value === "boolean";
const keys = [...new Set(lines.flatMap(line => Object.keys(line).filter(k => isNumber(line[k]))))];
for (const key of keys) for (const id of ["key", "only"]) $(id).add(new Option(key));
const texts = lines.map(line => `${line.id}\n${line.question}\n${line.response}`.toLowerCase());
let shown = [], count = 0;

function element(tag, kind, text) {  // textContent: what a model says is text, never HTML
  const made = document.createElement(tag);
  made.className = kind;
  made.textContent = text;
  return made;
}
function coloured(response) {
  const made = element("pre", "", "");
  let block = "";
  for (const part of response.split(/(<\/?(?:caption|think|answer)>)/)) {
    if (/^<\w+>$/.test(part)) block = part.slice(1, -1);
    made.append(element("span", block, part));
    if (/^<\/\w+>$/.test(part)) block = "";
  }
  return made;
}
function article(line) {
  const made = element("article", "", ""), words = element("div", "", "");
  const pictures = element("figure", "", "");
  for (const path of line.images || []) {
    const picture = new Image();
    picture.loading = "lazy";  // before src
    picture.src = path;
    pictures.append(picture);
  }
  const numbers = keys.filter(key => isNumber(line[key]))
    .map(key => `${key} ${Math.round(1000 * line[key]) / 1000}`);
  const question = line.question.replaceAll("<image>", "").trim();
  words.append(element("p", "question", question), coloured(line.response),
    element("p", "gold", `gold: ${[line.gold ?? "none"].flat().join(" or ")}`),
    element("p", "numbers", [line.id, ...numbers].join(" · ")));
  made.append(pictures, words);
  return made;
}
function more() {
  const next = shown.slice(count, count + 50);
  document.querySelector("main").append(...next.map(i => article(lines[i])));
  count += next.length;
  $("more").hidden = count >= shown.length;
}
function update() {
  const key = $("key").value, only = $("only").value, text = $("text").value.toLowerCase();
  const low = $("low").value === "" ? -Infinity : Number($("low").value);
  const high = $("high").value === "" ? Infinity : Number($("high").value);
  const inside = line => isNumber(line[only]) && line[only] >= low && line[only] <= high;
  // a line without the number comes last, either way
  const place = line => isNumber(line[key]) ? Number($("sign").value) * line[key] : Infinity;
  shown = [...lines.keys()].filter(i => (!only || inside(lines[i])) && texts[i].includes(text));
  if (key) shown.sort((i, j) => place(lines[i]) - place(lines[j]) || i - j);
  $("count").textContent = `${shown.length} of ${lines.length}`;
  document.querySelector("main").replaceChildren();
  count = 0;
  more();
}
for (const event of ["input", "change"]) document.addEventListener(event, update);
$("more").addEventListener("click", more);
new IntersectionObserver(seen => seen.at(-1).isIntersecting && more()).observe($("more"));
update();
</script></body></html>
"""


def write_page(path, title, lines, note=""):
    """A page without outside resources. lines: dicts with id, question, response, gold, images
    (paths from the page) and numbers; all of them can be sorted by and filtered."""
    # in JSON a < stands in texts alone; so none of them can end the script
    found = json.dumps(lines).replace("<", r"\u003c")
    parts = {"TITLE": html.escape(title), "NOTE": html.escape(note), "LINES": found}
    text = re.sub("TITLE|NOTE|LINES", lambda match: parts[match[0]], PAGE)
    with open(path + ".tmp", "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def save_picture(picture, folder):
    """A PIL picture -> its path from `folder`, pictures/CHECKSUM.jpg, with at most 640 pixels a
    side; one that is there is not written again."""
    small = picture.copy()
    small.thumbnail((640, 640))
    checksum = hashlib.sha1(repr(small.size).encode() + small.tobytes()).hexdigest()[:16]
    name = f"pictures/{checksum}.jpg"
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        mine = f"{path}.{os.getpid()}"  # another rank may write it, too
        small.save(mine, "JPEG", quality=90, subsampling=0)
        os.replace(mine, path)
    return name


def save_pictures(pictures, folder):
    """PIL pictures, which may be read only now -> their paths from `folder`; where one cannot be
    read or written that is said, and there is none: it ends no run of days."""
    try:
        return [save_picture(picture, folder) for picture in pictures]
    except Exception as error:
        print(f"warning: a picture for {folder} is not written: {error}", flush=True)
        return []


def read_lines(path, most=None):
    """The last so many lines of JSON, [] where there is no such file; NaN and infinity, which
    JavaScript's JSON does not know, as None."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line, parse_constant=lambda _: None) for line in deque(file, most)]


def redraw(out, last=True):
    """`draw`, whose failure is said and ends no run of days; not yet, but for the `last` time, if
    it was done a moment ago."""
    curves = os.path.join(out, "curves.png")
    if not last and os.path.exists(curves) and time.time() - os.path.getmtime(curves) < EVERY:
        return
    try:
        draw(out)
    except Exception as error:  # such as a full disk
        print(f"warning: curves.png or rollouts.html of {out} is not drawn: {error}", flush=True)


def draw(out):
    """OUT/curves.png, from two steps on, and, where there are rollouts, OUT/rollouts.html."""
    metrics = read_lines(os.path.join(out, "metrics.jsonl"))
    if len(metrics) > 1:
        draw_curves(metrics, os.path.join(out, "curves.png"))
    lines = read_lines(os.path.join(out, "rollouts.jsonl"), MOST)
    if lines:
        name = os.path.basename(os.path.abspath(out))
        newest = sorted(lines, key=lambda line: -line["step"])
        note = f"The newest {MOST} rollouts." if len(lines) == MOST else ""
        write_page(os.path.join(out, "rollouts.html"), f"Rollouts of {name}", newest, note)


# ------------------------------------------------------------------------------------- model card
CARD = """---
{front}
---

# {name}

Step {step} of stage `{stage}` of [PRISM](https://arxiv.org/abs/2604.28123) (supervised fine-tuning,
adversarial alignment, reinforcement learning with verifiable rewards). {loads}

- parent: `{parent}`
- data: {data}
- commit of the code: {commit}

The licence above is that of the parent's card, or unknown; the terms of the data count as well.

## Metrics of the last step

{metrics}

## Settings

{settings}
"""
LOADS = {True: "A discriminator: `align.py --disc` loads it.",
         False: "`Qwen3VLForConditionalGeneration.from_pretrained` loads it."}  # fmt: skip


def write_card(out, meta):
    """OUT/README.md, with the columns that the Hub reads, from what meta.json holds. Licence and
    base_model go from parent to child; nobody is assumed to have given a licence."""
    args, parent, discriminator = meta["args"], meta["parent"], bool(meta["args"].get("pairs"))
    sources = args.get("data") or args.get("pairs") or []
    run = args.get("out", out)  # a state has its run's name
    # what a user has written into the card of OUT stays
    before = front_matter(parent) | front_matter(run)
    front = {
        "license": before.get("license", "unknown"),
        "base_model": parent if is_hub_id(parent) else before.get("base_model"),
        "datasets": [re.sub(":.*", "", source) for source in sources if is_hub_id(source)],
        "library_name": None if discriminator else "transformers",
        "pipeline_tag": None if discriminator else "image-text-to-text",
        "tags": ["prism", meta["stage"]],
    }
    # JSON is YAML
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value]
    text = CARD.format(
        front="\n".join(lines), name=plain(os.path.basename(os.path.abspath(run))),
        step=meta["step"], stage=meta["stage"], loads=LOADS[discriminator], parent=plain(parent),
        data=", ".join(f"`{plain(source)}`" for source in sources) or "none",
        commit=meta["git_commit"] or "unknown", metrics=table("metric", meta["metrics"]),
        settings=table("setting", args),
    )  # fmt: skip
    with open(os.path.join(out, "README.md"), "w", encoding="utf-8", errors="replace") as file:
        file.write(text)


def is_hub_id(name):
    """Not a local path, with or without a weight."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(:.*)?", name)
    return bool(found) and not os.path.exists(found[1]) and not os.path.exists(name)


def front_matter(folder):
    """{key: value} of the card that `write_card` has left in a folder, {} without one."""
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        found = re.findall(r"^(license|base_model): *([^\n]+)$", file.read(10_000), re.M)
    return {key: value.strip().strip("\"'") for key, value in found}


def plain(value):
    """A value as one line that Markdown takes for no more than a text."""
    return " ".join(str(value).split()).replace("|", r"\|").replace("`", "'")


def table(name, values):
    lines = [f"| {name} | value |", "| --- | --- |"]
    lines += [f"| {plain(key)} | `{plain(value)}` |" for key, value in values.items()
              if value is not None]  # fmt: skip
    return "\n".join(lines)
