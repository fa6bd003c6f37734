"""Tables and figures of the toy, from the files that the stages wrote.

An arm is a checkpoint on the way; it may have been made from several seeds, each in its own folder.
"""

import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data import encode_prompt, encode_response, load_examples
from eval import bootstrap, holm, interval, markdown, p_value, percent
from rollout import parse_response, split_segments
from rows import pack_logprobs, pack_rows, set_attention
from runtime import load_policy, load_tokenizer
from toy import world
from toy.stages import ARMS, CURVE, minutes_of, read_jsonl

METRICS = ["accuracy", "perception", "reasoning", "format"]
# which data of what comes after SFT have a kind of question
TOUCHED = {"color number": "game", "shape number": "game, RL", "shape parity": "RL"}
TOUCHED = {kind: TOUCHED.get(kind, "neither") for kind in world.KINDS}
GROUPS = list(dict.fromkeys(TOUCHED.values()))
# what of toy.stages.make_look each expert is to tell from the right one
LOOKS = dict.fromkeys(("1 wrong cells", "2 wrong cells", "4 wrong cells"), "perception")
LOOKS |= dict.fromkeys(("colors exchanged", "shapes exchanged"), "perception")
LOOKS |= dict.fromkeys(("trace of another caption", "trace with slips"), "reasoning")


def scored(out, data, *path):
    """The responses in a file to the prompts of a data set, lines of what eval.py or a stage wrote,
    with the toy's own exact scores, as a DataFrame; accuracy is the stage's, where it judged it."""
    problems = {line["id"]: line["world"] for line in read_jsonl(out, "data", data + ".jsonl")}
    lines = []
    for line in read_jsonl(out, *path):
        blocks = parse_response(line["response"]) if line.get("finished", True) else None
        problem = problems[line["id"]]
        scores = world.score(problem, blocks)
        # eval.py and rl.py have a format, too, in which a response that was cut can be whole
        lines.append(scores | line | {"format": scores["format"], "kind": problem["kind"]})
    return pd.DataFrame(lines)


# --------------------------------------------------------------------------------------- the table
def responses(out, run, arm):
    """Path in `out` of an arm's responses to the test items, None where it has none."""
    found = next(Path(out).glob(f"{run}_*/{arm}/test.jsonl"), None)
    return found and found.relative_to(out)


@cache  # several tables have the same arms
def measure(out, run, arm):
    """Test items of one seed -> DataFrame [items, metrics and groups of questions]: the mean over
    the samples of an item; of a group the accuracy, nan where the item is not in it."""
    items = scored(out, "test", responses(out, run, arm)).groupby("id", sort=False)
    found, touched = items[METRICS].mean(), items["kind"].first().map(TOUCHED)
    for group in GROUPS:
        found[group] = found["accuracy"].where(touched == group)
    return found


def values_of(outs, run, arm, key="accuracy"):
    return np.stack([measure(out, run, arm)[key] for out in outs])  # [seeds, items]


def means(out, arms):
    """{arm: {"greedy" or "sampled": {metric: mean}}} of one seed, of the arms that it has."""
    found = {}
    for arm in arms:
        if responses(out, "sampled", arm):
            runs = {run: measure(out, run, arm)[METRICS].mean() for run in ("greedy", "sampled")}
            found[arm] = {run: mean.to_dict() for run, mean in runs.items()}
    return found


def arm_table(outs, arms, bases, commands):
    """Markdown: a line for each of `arms`, {arm: its name in words}, over the seeds in `outs`.

    Intervals at 95 % over items and seeds. p: paired permutation test over the items of all seeds
    of the accuracy at T = 1, against the arms `bases`, corrected by Holm over the table. minutes:
    from the SFT checkpoint on; `commands` as `run_stages` takes them.
    """
    ps, lines = {}, []
    for base in bases:
        for arm in arms:
            difference = values_of(outs, "sampled", arm) - values_of(outs, "sampled", base)
            if arm != base:
                ps[arm, base] = p_value(difference.ravel())
    ps = dict(zip(ps, holm(list(ps.values()))))
    for arm, name in arms.items():
        cells = [name]
        for run, key in (("greedy", "accuracy"), *(("sampled", key) for key in METRICS)):
            values = values_of(outs, run, arm, key).T
            items, ones = np.arange(len(values)), np.ones(len(values))
            cells.append(percent(interval(*bootstrap(values, items, ones, "test", arm))))
        groups = np.mean([measure(out, "sampled", arm)[GROUPS].mean() for out in outs], 0)
        minutes = pd.Series([minutes_of(os.path.join(out, arm), commands) for out in outs]).mean()
        cells += [f"{value:.1f}" for value in (*(100 * groups), minutes)]
        cells += [f"{ps[arm, base]:.3f}" if (arm, base) in ps else "" for base in bases]
        lines.append(cells)
    header = ["arm", "greedy accuracy", *METRICS, *GROUPS, "minutes"]
    return markdown([*header, *(f"p to {arms[base]}" for base in bases)], lines)


def verdict(outs):
    """Does RLVR end higher with the game before it, the paper's claim? And the game, or its
    control, SFT on the same rows? By accuracy, a sentence for T = 1 and one for greedy answers."""
    sentences = []
    for run, words in (("sampled", "at T = 1"), ("greedy", "of greedy answers")):
        said = []
        for pair in (("sft_rl", "align_rl"), ("more", "align"), ("more_rl", "align_rl")):
            base, game = (values_of(outs, run, arm).ravel() for arm in pair)
            p, wins = p_value(base - game), "the game wins"
            if p >= 0.05:
                wins = "not told apart"
            elif base.mean() > game.mean():
                wins = "the control wins" if pair[0].startswith("more") else "the game loses"
            shares = [f"{ARMS[arm]} {100 * x.mean():.1f}" for arm, x in zip(pair, (base, game))]
            said.append(f"{', '.join(shares)}: {wins} (p {p:.3f})")
        sentences.append(f"Accuracy {words}: {'; '.join(said)}.\n")
    return "\n".join(sentences)


# -------------------------------------------------------------------------------------- the experts
def above(right, wrong):
    """Share of comparisons in which what is right scores higher; a tie is a coin toss."""
    return (1 + np.sign(np.subtract(right, wrong)).mean()) / 2


def ground(out, scores):
    """{"ground_v, number": ...}: shares of test items under which the own caption scores above that
    of another picture, by what the question asks. The prompts of the game ask for a number; where
    it is `more`, they are a token shorter, where it is `parity`, four longer. And "ground_r", of
    those that ask for a number."""
    lines = pd.DataFrame(read_jsonl(out, scores, "scores.jsonl")).dropna(subset="other_perception")
    forms = {line["id"]: line["world"]["form"] for line in read_jsonl(out, "data", "test.jsonl")}
    found = {}
    for form, group in lines.groupby(lines["id"].map(forms)):
        found[f"ground_v, {form}"] = above(group["perception"], group["other_perception"])
        if form == "number":
            found["ground_r"] = above(group["reasoning"], group["other_reasoning"])
    return found


def looks(out, scores):
    """{variant: share of the test items, of kinds that the game has, of which an expert scores the
    right response higher, of those whose variant differs from it}."""
    texts = pd.DataFrame(read_jsonl(out, "data", "look.jsonl"))
    lines = pd.DataFrame(read_jsonl(out, scores, "scores.jsonl")).assign(response=texts["response"])
    lines[["item", "variant"]] = lines["id"].str.rsplit("/", n=1).to_list()
    seen = [problem["kind"] in world.ALIGN_KINDS for problem in texts["world"]]
    table, found = lines[seen].pivot(index="item", columns="variant"), {}
    for variant, expert in LOOKS.items():
        differ = table[table["response", "right"] != table["response", variant]][expert]
        found[variant] = above(differ["right"], differ[variant])
    return found


FOLLOWS = ("D_v, colors", "D_v, shapes", "D_v, length", "D_r, reasoning", "D_r, length")


def signals(out, arm):
    """What the scores of the game's rollouts follow: {"D_v, colors": correlation within a group}.

    Of the second half of the logged steps, with exact perception (colours and shapes apart) or
    reasoning, and with the length of the response in characters.
    """
    rollouts = scored(out, "align", arm, "rollouts.jsonl")
    late = rollouts[rollouts["step"] > rollouts["step"].median()].dropna(subset="d_v")
    late = late.assign(D_v=late["d_v"], D_r=late["d_r"], length=late["response"].str.len())
    columns = ["D_v", "D_r", "colors", "shapes", "reasoning", "length"]
    within = late[columns] - late.groupby(["step", "id"])[columns].transform("mean")
    return {key: within.corr().fillna(0).loc[tuple(key.split(", "))] for key in FOLLOWS}


def expert_table(out, experts):
    """experts: {stage that made them: in words}, for which look_ and probe_ ran -> Markdown.

    Shares of held-out pairs ranked rightly; for a game also what its rewards followed, and under
    the table which of them followed length more than the truth.
    """
    heads = [*(f"ground_v, {form}" for form in world.FORMS), "ground_r", *LOOKS, *FOLLOWS]
    lines, said = [], []
    for stage, words in experts.items():
        found = ground(out, f"probe_{stage}") | looks(out, f"look_{stage}")
        if os.path.exists(os.path.join(out, stage, "rollouts.jsonl")):
            found |= signals(out, stage)
            for d in ("D_v", "D_r"):
                *right, length = (found[key] for key in FOLLOWS if key.startswith(d))
                if abs(length) > max(right):
                    said.append(f"{d} {words} ({length:.2f} to {max(right):.2f})")
        lines.append([words, *(f"{found[key]:.2f}" if key in found else "" for key in heads)])
    table = markdown(["experts", *heads], lines)
    if said:
        table += f"\nFollow length more than what is right: {'; '.join(said)}.\n"
    return table


def likelihoods(out, count):
    """Mean log-probs under the SFT policy of COUNT demonstrations' captions and traces, [n, 2]."""
    ckpt, found = os.path.join(out, "sft"), []
    tokenizer, image_processor = load_tokenizer(ckpt)
    policy = set_attention(load_policy(ckpt), "sdpa").eval()
    examples = load_examples(os.path.join(out, "data", "sft.jsonl"))
    for i in range(count):
        prompt = encode_prompt(examples[i], tokenizer, image_processor)
        ids = encode_response(examples[i].response, tokenizer)
        caption = len(split_segments(ids, tokenizer)[0]) - 1  # its EOS is the discriminator's
        with torch.no_grad():
            logp, _ = pack_logprobs(policy, pack_rows([prompt], [(0, ids)], policy.device))
        found.append([logp[:caption].mean().item(), logp[caption:].mean().item()])
    return np.array(found)


def diagnosis_table(out, count=2000):
    """How well the faulty ones of the first demonstrations are found, by the experts' scores before
    the game (the run demos_ground) and after it (demos), by likelihood and by length, for what the
    questions ask -> Markdown."""
    demos = scored(out, "sft", "data", "sft.jsonl")[:count]
    runs = [read_jsonl(out, run, "scores.jsonl")[:count] for run in ("demos_ground", "demos")]
    before, after = map(pd.DataFrame, runs)
    logp, length, lines = likelihoods(out, len(demos)), -demos["response"].str.len(), []
    for k, (expert, fault) in enumerate((("perception", "caption"), ("reasoning", "trace"))):
        for form in world.FORMS:
            asked = demos["kind"].str.endswith(form)
            wrong = np.array(demos[expert] < 1)[asked]
            cells = [f"wrong {fault}, {form}", f"{100 * wrong.mean():.0f} %"]
            for values in (before[expert], after[expert], logp[:, k], length):
                values = np.array(values)[asked]  # area under the ROC curve: all pairs
                cells.append(f"{above(values[~wrong][:, None], values[wrong]):.2f}")
            lines.append(cells)
    judges = ["its expert before the game", "after it", "likelihood under SFT", "shortness"]
    return markdown(["fault", "share", *judges], lines)


# ------------------------------------------------------------------------------------- the figures
@contextmanager
def figure(path, columns):
    """A row of axes, which is written to PATH at the end."""
    from matplotlib.figure import Figure  # imported here: it takes half a second

    drawn = Figure(figsize=(4.25 * columns, 3.5))
    yield drawn.subplots(1, columns)
    drawn.savefig(path, dpi=80, bbox_inches="tight")


def write_curve(outs, path):
    """PATH: accuracy and perception at T = 1 over the number of curated rows, game and SFT: a line
    for the first seed, points for those of the others that have run it."""
    with figure(path, 2) as axes:
        for axis, key in zip(axes, ("accuracy", "perception")):
            for color, (arm, words) in enumerate((("align", "game"), ("more", "SFT"))):
                for out in reversed(outs):
                    has = [n for n in CURVE if responses(out, "sampled", f"{arm}_{n}")]
                    found = [measure(out, "sampled", f"{arm}_{n}")[key].mean() for n in has]
                    axis.plot(has, found, "o", color=f"C{color}", ms=3)
                axis.plot(has, found, color=f"C{color}", label=f"{words} on n curated rows")
            before = measure(outs[0], "sampled", "sft")[key].mean()
            axis.axhline(before, color="0.5", ls=":", label="SFT")
            axis.set(title=f"{key} at T = 1", xlabel="n", xscale="log", ylim=(0, 1))
        axes[0].legend()


def write_structure(out, path):
    """PATH: words in captions and in traces of the responses to test items at T = 1, beside the
    curated teacher's; how often which number occurs."""
    writers = {"teacher": read_jsonl(out, "data", "test.jsonl")}
    for arm in ("sft", "sft_rl", "align", "more"):
        writers[ARMS[arm]] = read_jsonl(out, responses(out, "sampled", arm))
    with figure(path, 2) as axes:
        for axis, block in zip(axes, ("caption", "think")):
            for name, lines in writers.items():
                found = [parse_response(line["response"]) for line in lines]
                words = [len(getattr(blocks, block).split()) for blocks in found if blocks]
                counts = np.bincount(words, minlength=50)[:50] / len(lines)
                axis.plot(counts, label=name, ds="steps-mid")
            axis.set(title=f"words in {block}", ylabel="share of the responses", xlim=(20, 50))
        axes[1].legend(fontsize=8)


def draw(axis, table, width, style="-"):
    """The columns of a DataFrame over its index, each as a running mean."""
    for k, (name, mean) in enumerate(table.rolling(width, 1, center=True).mean().items()):
        axis.plot(mean.index, mean, style, color=f"C{k}", label=name)


def write_report(out, game, path):
    """PATH: shares of comparisons that each expert ranks rightly over the game, as align.py logs
    them; exact scores of its rollouts and of RLVR's. game: its steps."""
    log = pd.DataFrame(read_jsonl(out, "align", "metrics.jsonl")).set_index("step")
    titles = {"acc": "teacher above student", "ground": "own above another's response"}
    with figure(path, 4) as axes:
        for axis, (metric, title) in zip(axes, titles.items()):
            names = {f"{metric}_v": "perception expert", f"{metric}_r": "reasoning expert"}
            draw(axis, log.reindex(columns=list(names)).rename(columns=names), 9)
            axis.axhline(0.5, color="0.7", lw=0.8, ls=":")
            axis.set(title=title, xlabel="step of align.py", ylim=(0, 1.02))
        runs = (2, "align", "align", 0, "-"), (3, "sft_rl", "rl", 0, ":")
        for k, arm, data, before, style in (*runs, (3, "align_rl", "rl", game, "-")):
            steps = scored(out, data, arm, "rollouts.jsonl").groupby("step")[METRICS[:3]].mean()
            steps.index += before
            draw(axes[k], steps.add_suffix(f", {ARMS[arm]}"), 5, style)
        for axis, stage in zip(axes[2:], ("alignment", "RLVR")):
            title = f"rollouts during {stage}, exact scores"
            axis.set(title=title, xlabel="rollout batches since SFT", ylim=(0, 1))
        axes[0].legend()
        axes[3].legend(fontsize=7)
