"""The table and the figure at the end of `python -m toy`, from the files that the stages wrote."""

import json
import os
import textwrap

import numpy as np

from eval import bootstrap, interval, markdown, percent
from rollout import parse_response
from toy import world

ARMS = {
    "sft": "SFT",
    "sft_rl": "SFT -> RL",
    "align": "SFT -> align",
    "align_rl": "SFT -> align -> RL",
}
METRICS = ("accuracy", "perception", "reasoning", "format")


def read_jsonl(*path):
    with open(os.path.join(*path)) as file:
        return [json.loads(line) for line in file]


def exact_scores(problem, generation):
    """The toy's own scores of a response: a line of what eval.py writes or of a rollouts.jsonl."""
    blocks = parse_response(generation["response"]) if generation["finished"] else None
    return world.score(problem, blocks and (blocks.caption, blocks.think, blocks.answer))


def table(out):
    """{"greedy" | "T = 1": {arm: {metric: {"mean", "low", "high"}}}} over the test items.

    What eval.py has measured, and the toy's own scores with eval.py's intervals (all samples of an
    item are drawn together).
    """
    problems = [example["world"] for example in read_jsonl(out, "data", "test.jsonl")]
    items, ones = np.arange(len(problems)), np.ones(len(problems))
    result = {}
    for mode, run in (("greedy", "eval_greedy"), ("T = 1", "eval_sampled")):
        with open(os.path.join(out, run, "results.json")) as file:
            measured = json.load(file)["results"]
        for arm in ARMS:
            generations = read_jsonl(out, run, arm, "test.jsonl")
            scores = [exact_scores(problems[g["item"]], g) for g in generations]
            cells = {key: measured[arm]["test"][key] for key in ("accuracy", "format", "tokens")}
            for key in ("perception", "reasoning"):
                samples = np.array([s[key] for s in scores]).reshape(len(problems), -1)
                means = samples.mean(1, keepdims=True)  # [items, 1]
                cells[key] = interval(*bootstrap(means, items, ones, "test"))
            result.setdefault(mode, {})[arm] = cells
    return result


def print_table(result, out):
    """The final table, on the screen and as OUT/table.md."""
    lines = []
    for mode, arms in result.items():
        for arm, cells in arms.items():
            shares = [percent(cells[key]) for key in METRICS]
            lines.append([mode, ARMS[arm], *shares, f"{cells['tokens']['mean']:.1f}"])
    text = markdown(["decoding", "arm", *METRICS, "tokens"], lines)
    print(text, end="")
    with open(os.path.join(out, "table.md"), "w") as file:
        file.write(text)


def rollout_curves(out, arm, data):
    """Exact scores of the rollouts that a stage logged -> steps, {metric: mean of each step}."""
    problems = {example["id"]: example["world"] for example in read_jsonl(out, "data", data)}
    by_step = {}
    for rollout in read_jsonl(out, arm, "rollouts.jsonl"):
        scores = exact_scores(problems[rollout["id"]], rollout)
        by_step.setdefault(rollout["step"], []).append([scores[key] for key in METRICS])
    steps = sorted(by_step)
    means = [np.mean(by_step[step], 0) for step in steps]  # [steps, metrics]
    return steps, dict(zip(METRICS, np.transpose(means)))


def smooth(values, width=9):
    """Centred running mean; shorter at the ends."""
    half = width // 2
    return [np.nanmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def write_report(out, sizes):
    """OUT/report.png: the experts over the game, scores of rollouts, pictures before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(17, 19))
    heights = [1, 1.4, 1.4, 1.4]
    grid = figure.add_gridspec(4, 4, height_ratios=heights, hspace=0.3, wspace=0.25)
    draw_experts(out, figure.add_subplot(grid[0, 0]), "gap", sizes["warmup"])
    draw_experts(out, figure.add_subplot(grid[0, 1]), "acc", sizes["warmup"])
    draw_alignment(out, figure.add_subplot(grid[0, 2]), sizes["warmup"])
    draw_rl(out, figure.add_subplot(grid[0, 3]), sizes["warmup"] + sizes["align"])
    draw_pictures(out, figure, grid)
    figure.savefig(os.path.join(out, "report.png"), dpi=90, bbox_inches="tight")
    plt.close(figure)


def draw_experts(out, axis, metric, warmup):
    """What align.py logs of both experts: "gap" (of the scores) or "acc" (of the comparisons)."""
    log = read_jsonl(out, "align", "metrics.jsonl")
    steps = [metrics["step"] for metrics in log]
    for expert, color in (("perception", "tab:blue"), ("reasoning", "tab:orange")):
        key = f"{metric}_{'v' if expert == 'perception' else 'r'}"
        values = [metrics.get(key, np.nan) for metrics in log]
        axis.plot(steps, smooth(values), label=f"{expert} expert", color=color)
    if metric == "gap":
        chance, title = 0.0, "score gap, teacher - student"
    else:
        chance, title = 0.5, "accuracy of the discriminator"
    axis.axhline(chance, color="0.7", lw=0.8, ls=":")
    axis.axvline(warmup, color="0.5", lw=0.8, ls="--")
    axis.set(title=title, xlabel="step of align.py (dashed: end of warm-up)")
    axis.legend()


def draw_alignment(out, axis, warmup):
    steps, means = rollout_curves(out, "align", "align.jsonl")
    for key in METRICS[:3]:
        axis.plot(steps, smooth(means[key], 5), label=key)
    axis.axvline(warmup, color="0.5", lw=0.8, ls="--")
    title = "rollouts during alignment, exact scores"
    axis.set(title=title, xlabel="step of align.py", ylim=(0, 1))
    axis.legend()


def draw_rl(out, axis, align_steps):
    """Both arms with RL, over the rollout batches since SFT."""
    for arm, style, begin in (("sft_rl", ":", 0), ("align_rl", "-", align_steps)):
        steps, means = rollout_curves(out, arm, "rl.jsonl")
        for key, color in zip(METRICS, ("tab:blue", "tab:orange", "tab:green")):
            label = f"{key}, {ARMS[arm]}"
            axis.plot(np.add(steps, begin), smooth(means[key], 5), style, color=color, label=label)
    title = "rollouts during RLVR, exact scores"
    axis.set(title=title, xlabel="rollout batches since SFT", ylim=(0, 1))
    axis.legend(fontsize=7)


def draw_pictures(out, figure, grid):
    """Three test pictures with the question, and what is said of each before and after alignment.

    Above each response the scores of both experts and the exact ones.
    """
    test = read_jsonl(out, "data", "test.jsonl")
    scores = {line["id"]: line for line in read_jsonl(out, "scores", "scores.jsonl")}
    generations = {}
    for arm in ("sft", "align"):
        for generation in read_jsonl(out, "eval_greedy", arm, "test.jsonl"):
            generations[f"{arm}/{generation['item']}"] = generation
    scored = [i for i in range(len(test)) if f"sft/{i}" in scores and f"align/{i}" in scores]
    for line, item in enumerate(scored[:3], 1):
        problem = test[item]["world"]
        places = grid[line, :].subgridspec(1, 3, width_ratios=[1, 1.5, 1.5])
        axis = figure.add_subplot(places[0])
        axis.imshow(world.draw(problem["cells"], problem["seed"]))
        axis.set_axis_off()
        question = textwrap.fill(problem["question"], 34)
        axis.set_title(f"{question}\ntrue answer: {test[item]['answer']}", fontsize=10)
        for place, arm, when in ((places[1], "sft", "before"), (places[2], "align", "after")):
            axis = figure.add_subplot(place)
            axis.set_axis_off()
            key = f"{arm}/{item}"
            expert, exact = scores[key], exact_scores(problem, generations[key])
            axis.set_title(
                f"{when} alignment: D_v {expert['perception']:.2f}, D_r {expert['reasoning']:.2f}\n"
                f"perception {exact['perception']:.2f}, reasoning {exact['reasoning']:.2f}",
                fontsize=10,
            )
            text, font = generations[key]["response"], {"family": "monospace", "fontsize": 8}
            axis.text(0, 1, text, va="top", transform=axis.transAxes, **font)
