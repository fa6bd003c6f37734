"""Tables and figures of the toy, from the files that the stages wrote.

An arm is a checkpoint on the way; it may have been made from several seeds, each in its own folder.
"""

import json
import os
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

from data import encode_prompt, encode_response, load_examples
from eval import bootstrap, holm, interval, markdown, p_value, percent
from rollout import parse_response, split_segments
from rows import pack_logprobs, pack_rows, set_attention
from runtime import load_policy, load_tokenizer
from toy import world
from toy.stages import minutes_of, read_jsonl

ARMS = {
    "sft": "SFT",
    "sft_rl": "SFT -> RL",
    "more": "SFT -> SFT on the curated rows",
    "more_rl": "SFT -> SFT on the curated rows -> RL",
    "align": "SFT -> align",
    "align_rl": "SFT -> align -> RL",
}
METRICS = ("accuracy", "perception", "reasoning", "format")
# which data of what comes after SFT have a kind of question
TOUCHED = {"color number": "game", "shape number": "game, RL", "shape parity": "RL"}
TOUCHED = {kind: TOUCHED.get(kind, "neither") for kind in world.KINDS}
LOOKS = {  # what of write_look's an expert is to tell from the right one
    "perception": ["1 wrong cells", "2 wrong cells", "4 wrong cells", "colors exchanged",
                   "shapes exchanged"],
    "reasoning": ["trace of another caption", "trace with slips"],
}


def exact_scores(problem, generation):
    """The toy's own scores of a response: a line of what eval.py writes or of a rollouts.jsonl."""
    blocks = parse_response(generation["response"]) if generation["finished"] else None
    found = world.score(problem, blocks and (blocks.caption, blocks.think, blocks.answer))
    seen = world.perceive(problem, blocks.caption if blocks else "")
    return {**found, "colors": seen["colors"], "shapes": seen["shapes"]}


# --------------------------------------------------------------------------------------- the table
@cache  # several tables have the same arms
def measure(out, run, arm):
    """{metric: [items]} over the test items of one seed, the mean over the samples of each."""
    problems = [example["world"] for example in read_jsonl(out, "data", "test.jsonl")]
    lines = read_jsonl(out, run, arm, "test.jsonl")
    scores = [exact_scores(problems[line["item"]], line) for line in lines]
    found = {key: [s[key] for s in scores] for key in METRICS}
    found["accuracy"] = [line["accuracy"] for line in lines]  # as eval.py judged it
    return {key: np.reshape(values, (len(problems), -1)).mean(1) for key, values in found.items()}


def means(out, arms):
    """{arm: {"greedy" or "sampled": {metric: mean}}} of one seed, for results.json."""
    found = {}
    for arm in arms:
        found[arm] = {}
        for run in ("greedy", "sampled"):
            values = measure(out, run, arm)
            found[arm][run] = {key: values[key].mean() for key in METRICS}
    return found


def measure_kinds(out, values):
    """values [items] of one seed -> {what touched the kind of question: mean}."""
    kinds = [TOUCHED[example["world"]["kind"]] for example in read_jsonl(out, "data", "test.jsonl")]
    groups = dict.fromkeys(TOUCHED.values())
    return {group: values[[kind == group for kind in kinds]].mean() for group in groups}


def arm_table(outs, arms, bases, commands):
    """Markdown: a line for each of `arms`, {arm: its name in words}, over the seeds in `outs`.

    Intervals at 95 % over items and seeds. p: paired permutation test over the items of all seeds
    of the accuracy at T = 1, against the arms `bases`, corrected by Holm over the table. minutes:
    from the SFT checkpoint on; `commands` as `run_stages` takes them.
    """
    found, ps, lines = {}, {}, []
    for arm in arms:
        runs = {run: [measure(out, run, arm) for out in outs] for run in ("greedy", "sampled")}
        found[arm] = runs
    for base in bases:
        for arm in arms:
            differences = []
            for one, other in zip(found[arm]["sampled"], found[base]["sampled"]):
                differences.append(one["accuracy"] - other["accuracy"])
            differences = np.concatenate(differences)
            if arm != base:
                ps[arm, base] = p_value(differences)
    ps = dict(zip(ps, holm(list(ps.values()))))
    for arm, name in arms.items():
        greedy, sampled = found[arm]["greedy"], found[arm]["sampled"]
        cells = [summary(greedy, "accuracy", arm)]
        cells += [summary(sampled, key, arm) for key in METRICS]
        kinds = [measure_kinds(out, seed["accuracy"]) for out, seed in zip(outs, sampled)]
        for group in kinds[0]:
            cells.append(f"{100 * np.mean([seed[group] for seed in kinds]):.1f}")
        minutes = [minutes_of(os.path.join(out, arm), commands) for out in outs]
        cells.append(f"{np.nanmean(minutes):.1f}")
        cells += [f"{ps[arm, base]:.3f}" if (arm, base) in ps else "" for base in bases]
        lines.append([name, *cells])
    header = ["arm", "greedy accuracy", *METRICS, *dict.fromkeys(TOUCHED.values()), "minutes"]
    return markdown([*header, *(f"p to {arms[base]}" for base in bases)], lines)


def verdict(outs):
    """Does RLVR end higher with the game before it, the paper's claim? And the game, or its
    control, SFT on the same rows? By accuracy, a sentence for T = 1 and one for greedy answers."""
    sentences = []
    for run, words in (("sampled", "at T = 1"), ("greedy", "of greedy answers")):
        said = []
        for pair in (("sft_rl", "align_rl"), ("more", "align"), ("more_rl", "align_rl")):
            found = [[measure(out, run, arm)["accuracy"] for out in outs] for arm in pair]
            base, game = np.reshape(found, (2, -1))
            p, wins = p_value(base - game), "the game wins"
            if p >= 0.05:
                wins = "not told apart"
            elif base.mean() > game.mean():
                wins = "the control wins" if pair[0].startswith("more") else "the game loses"
            shares = [f"{ARMS[arm]} {100 * x.mean():.1f}" for arm, x in zip(pair, (base, game))]
            said.append(f"{', '.join(shares)}: {wins} (p {p:.3f})")
        sentences.append(f"Accuracy {words}: {'; '.join(said)}.\n")
    return "\n".join(sentences)


def summary(seeds, key, arm):
    values = np.stack([seed[key] for seed in seeds], 1)  # [items, seeds]
    items, ones = np.arange(len(values)), np.ones(len(values))
    return percent(interval(*bootstrap(values, items, ones, "test", arm)))


# -------------------------------------------------------------------------------------- the experts
def looks(out, scores):
    """{variant: share of the test items of which an expert scores the right response higher, of
    those whose variant differs from it}."""
    by_item, shares = {}, {}
    texts = read_jsonl(out, "data", "look.jsonl")
    for line, text in zip(read_jsonl(out, scores, "scores.jsonl"), texts):
        item, _, variant = line["id"].rpartition("/")
        by_item.setdefault(item, {})[variant] = line | {"response": text["response"]}
    for expert, variants in LOOKS.items():
        for variant in variants:
            pairs = [(one["right"], one[variant]) for one in by_item.values()]
            differ = [(a, b) for a, b in pairs if a["response"] != b["response"]]
            signs = [np.sign(a[expert] - b[expert]) for a, b in differ]  # a tie is a coin toss
            shares[variant] = np.mean(signs) / 2 + 0.5
    return shares


def truth(out, data):
    """{id: what is true of it} of a data set."""
    return {line["id"]: line["world"] for line in read_jsonl(out, "data", data + ".jsonl")}


def signals(out, arm, data="align"):
    """What the scores of the game's rollouts follow: {"D_v, colors": correlation within a group}.

    Of the second half of the logged steps, with exact perception (colours and shapes apart) or
    reasoning, and with the length of the response in characters.
    """
    problems = truth(out, data)
    rollouts = read_jsonl(out, arm, "rollouts.jsonl")
    middle, groups = np.median([r["step"] for r in rollouts]), {}
    for r in rollouts:
        if r["step"] > middle and "d_v" in r:
            exact = exact_scores(problems[r["id"]], r)
            line = [r["d_v"], r["d_r"], exact["colors"], exact["shapes"], exact["reasoning"]]
            groups.setdefault((r["step"], r["id"]), []).append([*line, len(r["response"])])
    centred = np.concatenate([np.subtract(g, np.mean(g, 0)) for g in groups.values()])
    products = centred.T @ centred / len(centred)
    deviations = np.sqrt(np.diag(products))
    r = products / np.maximum(np.outer(deviations, deviations), 1e-12)
    names = ("colors", "shapes", "reasoning", "length")
    wanted = [("D_v", 0, (2, 3, 5)), ("D_r", 1, (4, 5))]
    return {f"{d}, {names[j - 2]}": r[i, j] for d, i, columns in wanted for j in columns}


def expert_table(out, experts):
    """experts: {stage that made them: in words}, for which look_ and probe_ ran -> Markdown.

    Shares of held-out pairs ranked rightly; for a game also what its rewards followed, and under
    the table which of them followed length more than the truth.
    """
    heads = [variant for variants in LOOKS.values() for variant in variants]
    follows = ["D_v, colors", "D_v, shapes", "D_v, length", "D_r, reasoning", "D_r, length"]
    lines, said = [], []
    for stage, words in experts.items():
        with open(os.path.join(out, f"probe_{stage}", "results.json")) as file:
            probe = json.load(file)
        shares = looks(out, f"look_{stage}")
        cells = [probe[key]["share"] for key in ("ground_v", "ground_r")]
        cells += [shares[head] for head in heads]
        if os.path.exists(os.path.join(out, stage, "rollouts.jsonl")):
            found = signals(out, stage)
            cells += [found[key] for key in follows]
            for d, right in (("D_v", max(found["D_v, colors"], found["D_v, shapes"])),
                             ("D_r", found["D_r, reasoning"])):  # fmt: skip
                if abs(length := found[f"{d}, length"]) > right:
                    said.append(f"{d} {words} ({length:.2f} to {right:.2f})")
        cells += [None] * (len(heads) + len(follows) + 2 - len(cells))
        lines.append([words, *("" if cell is None else f"{cell:.2f}" for cell in cells)])
    table = markdown(["experts", "ground_v", "ground_r", *heads, *follows], lines)
    if said:
        table += f"\nFollow length more than what is right: {'; '.join(said)}.\n"
    return table


def likelihoods(out, data, count):
    """Mean log-probs under the SFT policy of COUNT demonstrations' captions and traces, [n, 2]."""
    ckpt = os.path.join(out, "sft")
    tokenizer, image_processor = load_tokenizer(ckpt)
    policy, found = set_attention(load_policy(ckpt), "sdpa").eval(), []
    examples = load_examples([os.path.join(out, "data", data + ".jsonl")])
    for i in range(count):
        example = examples[i]
        prompt = encode_prompt(example, tokenizer, image_processor, None, None)
        ids = encode_response(example.response, tokenizer)
        caption = len(split_segments(ids, tokenizer)[0]) - 1  # its EOS is the discriminator's
        with torch.no_grad():
            logp, _ = pack_logprobs(policy, pack_rows([prompt], [(0, ids)], policy.device))
        found.append([logp[:caption].mean().item(), logp[caption:].mean().item()])
    return np.array(found)


def area(scores, wrong):
    """Area under the ROC curve: chance that a wrong one scores lower than a right one."""
    right, wrong = np.asarray(scores)[~wrong], np.asarray(scores)[wrong]
    below = np.sign(right[:, None] - wrong).mean()
    return (1 + below) / 2


def diagnosis_table(out, data, scores, count=2000):
    """How well the faulty ones of the first demonstrations DATA are found, by the experts' scores
    of the run SCORES, by likelihood and by length -> Markdown."""
    demos = read_jsonl(out, "data", data + ".jsonl")[:count]
    scored = read_jsonl(out, scores, "scores.jsonl")[: len(demos)]
    exact = [exact_scores(d["world"], {**d, "finished": True}) for d in demos]
    logp, length = likelihoods(out, data, len(demos)), [-len(d["response"]) for d in demos]
    lines = []
    for k, (expert, fault) in enumerate((("perception", "caption"), ("reasoning", "trace"))):
        wrong = np.array([e[expert] < 1 for e in exact])
        found = [[line[expert] for line in scored], logp[:, k], length]
        cells = [f"{area(values, wrong):.2f}" for values in found]
        lines.append([f"wrong {fault}", f"{100 * wrong.mean():.0f} %", *cells])
    return markdown(["fault", "share", "its expert", "likelihood under SFT", "shortness"], lines)


# ------------------------------------------------------------------------------------- the figures
@contextmanager
def figure(path, columns):
    """A row of axes, which is written to PATH at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, columns, figsize=(4.25 * columns, 3.5))
    yield axes
    drawn.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(drawn)


def write_curve(out, sizes, path):
    """PATH: accuracy and perception at T = 1 over the number of curated rows, game and SFT."""
    with figure(path, 2) as axes:
        for axis, key in zip(axes, ("accuracy", "perception")):
            for arm, words in (("align", "game"), ("more", "SFT")):
                values = [measure(out, "sampled", f"{arm}_{n}")[key].mean() for n in sizes]
                axis.plot(sizes, values, "o-", label=f"{words} on n curated rows")
            before = measure(out, "sampled", "sft")[key].mean()
            axis.axhline(before, color="0.5", ls=":", label="SFT")
            axis.set(title=f"{key} at T = 1", xlabel="n", xscale="log", ylim=(0, 1))
        axes[0].legend()


def write_structure(out, arms, path):
    """PATH: words in captions and in traces of the arms' responses to test items at T = 1, beside
    the curated teacher's; how often which number occurs."""
    lines = {"teacher": read_jsonl(out, "data", "test.jsonl")}
    lines |= {ARMS[arm]: read_jsonl(out, "sampled", arm, "test.jsonl") for arm in arms}
    with figure(path, 2) as axes:
        for axis, block in zip(axes, ("caption", "think")):
            for name, responses in lines.items():
                found = [parse_response(line["response"]) for line in responses]
                words = [len(getattr(blocks, block).split()) for blocks in found if blocks]
                counts = np.bincount(words, minlength=50)[:50] / len(responses)
                axis.plot(counts, label=name, ds="steps-mid")
            axis.set(title=f"words in {block}", ylabel="share of the responses", xlim=(20, 50))
        axes[1].legend(fontsize=8)


def write_report(out, align_steps, path):
    """PATH: the experts over the game, exact scores of its rollouts and of RLVR's."""
    both = {"sft_rl": ("rl", 0, ":"), "align_rl": ("rl", align_steps, "-")}
    with figure(path, 4) as axes:
        draw_experts(out, axes[0], "acc", "teacher above student")
        draw_experts(out, axes[1], "ground", "own above another's response")
        draw_curves(out, axes[2], {"align": ("align", 0, "-")}, "alignment")
        draw_curves(out, axes[3], both, "RLVR")
        axes[0].legend()
        axes[3].legend(fontsize=7)


def rollout_curves(out, arm, data):
    """Exact scores of the rollouts that a stage logged -> steps, {metric: mean of each step}."""
    problems, by_step = truth(out, data), {}
    for rollout in read_jsonl(out, arm, "rollouts.jsonl"):
        scores = exact_scores(problems[rollout["id"]], rollout)
        by_step.setdefault(rollout["step"], []).append([scores[key] for key in METRICS])
    steps = sorted(by_step)
    means = [np.mean(by_step[step], 0) for step in steps]  # [steps, metrics]
    return steps, dict(zip(METRICS, np.transpose(means)))


def smooth(values, width=9):
    """Centred running mean; shorter at the ends; nan where nothing was measured."""
    values, half = np.array(values, float), width // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [np.nanmean(part) if not np.isnan(part).all() else np.nan for part in parts]


def draw_experts(out, axis, metric, title):
    """Shares of comparisons that each expert ranks rightly, as align.py logs them."""
    log = read_jsonl(out, "align", "metrics.jsonl")
    for expert, color in (("perception", "tab:blue"), ("reasoning", "tab:orange")):
        values = [metrics.get(f"{metric}_{expert[0].replace('p', 'v')}", np.nan) for metrics in log]
        axis.plot(range(1, len(log) + 1), smooth(values), label=f"{expert} expert", color=color)
    axis.axhline(0.5, color="0.7", lw=0.8, ls=":")
    axis.set(title=title, xlabel="step of align.py", ylim=(0, 1.02))


def draw_curves(out, axis, arms, stage):
    """arms: {arm: (data set, rollout batches between SFT and its first step, line style)}."""
    for arm, (data, begin, style) in arms.items():
        steps, means = rollout_curves(out, arm, data)
        for key, color in zip(METRICS, ("tab:blue", "tab:orange", "tab:green")):
            label = f"{key}, {ARMS[arm]}"
            axis.plot(np.add(steps, begin), smooth(means[key], 5), style, color=color, label=label)
    title = f"rollouts during {stage}, exact scores"
    axis.set(title=title, xlabel="rollout batches since SFT", ylim=(0, 1))
