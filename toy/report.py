"""The table and the figure at the end of `python -m toy`, made from the files that the stages wrote."""

import json
import os
import textwrap

import numpy as np

from eval import bootstrap, interval, markdown, percent
from rollout import parse_response
from toy import world

ARMS = {"sft": "SFT", "sft_rl": "SFT -> RL", "align": "SFT -> align", "align_rl": "SFT -> align -> RL"}
METRICS = ("accuracy", "perception", "reasoning", "format")


def read_rows(*path):
    with open(os.path.join(*path)) as file:
        return [json.loads(line) for line in file]


def exact_scores(problem, row):
    """The toy's own scores of one generated response: a row of eval.py or of a stage's rollouts.jsonl."""
    blocks = parse_response(row["response"]) if row["finished"] else None
    return world.score(problem, (blocks.caption, blocks.think, blocks.answer) if blocks else None)


def table(out):
    """{"greedy" | "T = 1": {arm: {metric: {"mean", "low", "high"}}}} over the test items: what eval.py has measured, and the
    toy's own scores with eval.py's intervals (all samples of an item are drawn together)."""
    truth = [row["world"] for row in read_rows(out, "data", "test.jsonl")]
    result = {}
    for mode, run in (("greedy", "eval_greedy"), ("T = 1", "eval_sampled")):
        with open(os.path.join(out, run, "results.json")) as file:
            measured = json.load(file)["results"]
        for arm in ARMS:
            scores = [exact_scores(truth[row["item"]], row) for row in read_rows(out, run, arm, "test.jsonl")]
            row = {key: measured[arm]["test"][key] for key in ("accuracy", "format", "tokens")}
            for key in ("perception", "reasoning"):
                means = np.array([s[key] for s in scores]).reshape(len(truth), -1).mean(1, keepdims=True)  # [items, 1]
                row[key] = interval(*bootstrap(means, np.arange(len(truth)), np.ones(len(truth)), "test"))
            result.setdefault(mode, {})[arm] = row
    return result


def print_table(result, out):
    """The final table, on the screen and as OUT/table.md."""
    rows = [
        [mode, ARMS[arm], *(percent(row[key]) for key in METRICS), f"{row['tokens']['mean']:.1f}"]
        for mode, arms in result.items()
        for arm, row in arms.items()
    ]
    text = markdown(["decoding", "arm", *METRICS, "tokens"], rows)
    print(text, end="")
    with open(os.path.join(out, "table.md"), "w") as file:
        file.write(text)


def rollout_curves(out, arm, data):
    """Steps and mean exact scores of the rollouts a stage logged: {metric: [values]}."""
    truth = {row["id"]: row["world"] for row in read_rows(out, "data", data)}
    by_step = {}
    for row in read_rows(out, arm, "rollouts.jsonl"):
        by_step.setdefault(row["step"], []).append(exact_scores(truth[row["id"]], row))
    steps = sorted(by_step)
    return steps, {key: [np.mean([s[key] for s in by_step[step]]) for step in steps] for key in METRICS}


def smooth(values, width=9):
    """Centred running mean; shorter at the ends."""
    half = width // 2
    return [np.nanmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def write_report(out, sizes):
    """OUT/report.png: both experts over the game, exact scores of the rollouts, and pictures before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(17, 19))
    grid = figure.add_gridspec(4, 4, height_ratios=[1, 1.4, 1.4, 1.4], hspace=0.3, wspace=0.25)
    metrics = read_rows(out, "align", "metrics.jsonl")
    steps = [row["step"] for row in metrics]
    panels = [
        ("score gap, teacher - student", ("gap_v", "gap_r"), 0.0),
        ("accuracy of the discriminator", ("acc_v", "acc_r"), 0.5),
    ]
    for column, (title, keys, level) in enumerate(panels):
        axis = figure.add_subplot(grid[0, column])
        for key, label, color in zip(keys, ("perception expert", "reasoning expert"), ("tab:blue", "tab:orange")):
            axis.plot(steps, smooth([row.get(key, np.nan) for row in metrics]), label=label, color=color)
        axis.axhline(level, color="0.7", lw=0.8, ls=":")
        axis.axvline(sizes["warmup"], color="0.5", lw=0.8, ls="--")
        axis.set(title=title, xlabel="step of align.py (dashed: end of warm-up)")
        axis.legend()
    axis = figure.add_subplot(grid[0, 2])
    steps, values = rollout_curves(out, "align", "align.jsonl")
    for key in METRICS[:3]:
        axis.plot(steps, smooth(values[key], 5), label=key)
    axis.axvline(sizes["warmup"], color="0.5", lw=0.8, ls="--")
    axis.set(title="rollouts during alignment, exact scores", xlabel="step of align.py", ylim=(0, 1))
    axis.legend()
    axis = figure.add_subplot(grid[0, 3])
    for arm, style in (("sft_rl", ":"), ("align_rl", "-")):
        steps, values = rollout_curves(out, arm, "rl.jsonl")
        shift = sizes["warmup"] + sizes["align"] if arm == "align_rl" else 0
        for key, color in zip(METRICS[:3], ("tab:blue", "tab:orange", "tab:green")):
            label = f"{key}, {ARMS[arm]}"
            axis.plot(np.array(steps) + shift, smooth(values[key], 5), style, color=color, label=label)
    axis.set(title="rollouts during RLVR, exact scores", xlabel="rollout batches since SFT", ylim=(0, 1))
    axis.legend(fontsize=7)
    draw_pictures(out, figure, grid)
    figure.savefig(os.path.join(out, "report.png"), dpi=90, bbox_inches="tight")
    plt.close(figure)


def draw_pictures(out, figure, grid):
    """Three test pictures: question, then caption, trace and both experts' scores before and after alignment."""
    test = read_rows(out, "data", "test.jsonl")
    scores = {row["id"]: row for row in read_rows(out, "scores", "scores.jsonl")}
    answers = {arm: {row["item"]: row for row in read_rows(out, "eval_greedy", arm, "test.jsonl")} for arm in ("sft", "align")}
    items = [i for i in range(len(test)) if f"sft/{i}" in scores and f"align/{i}" in scores][:3]
    for line, item in enumerate(items, 1):
        columns = grid[line, :].subgridspec(1, 3, width_ratios=[1, 1.5, 1.5])
        axis = figure.add_subplot(columns[0])
        axis.imshow(world.draw(test[item]["world"]["cells"], test[item]["world"]["seed"]))
        axis.set_axis_off()
        question = textwrap.fill(test[item]["world"]["question"], 34)
        axis.set_title(f"{question}\ntrue answer: {test[item]['answer']}", fontsize=10)
        for column, (arm, when) in enumerate((("sft", "before"), ("align", "after")), 1):
            axis = figure.add_subplot(columns[column])
            axis.set_axis_off()
            row, exact = scores[f"{arm}/{item}"], exact_scores(test[item]["world"], answers[arm][item])
            axis.set_title(
                f"{when} alignment: D_v {row['perception']:.2f}, D_r {row['reasoning']:.2f}\n"
                f"perception {exact['perception']:.2f}, reasoning {exact['reasoning']:.2f}", fontsize=10,
            )  # fmt: skip
            text = answers[arm][item]["response"]
            axis.text(0, 1, text, va="top", family="monospace", fontsize=8, transform=axis.transAxes)
