"""Tables and figures of the toy, from the files that the stages wrote.

An arm is a checkpoint on the way; it may have been made from several seeds, each in its own folder.
"""

import os
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

from data import encode_prompt, encode_response, load_examples
from eval import bootstrap, holm, interval, markdown, p_value, percent
from rollout import parse_response, split_segments
from rows import pack_logprobs, pack_rows, set_attention
from runtime import load_policy, load_tokenizer, read_json
from toy import world
from toy.stages import ARMS, CURVE, minutes_of, read_jsonl

METRICS = ("accuracy", "perception", "reasoning", "format")
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
    with the toy's own exact scores; the accuracy is the stage's, where it judged it."""
    problems = {line["id"]: line["world"] for line in read_jsonl(out, "data", data + ".jsonl")}
    lines = []
    for line in read_jsonl(out, *path):
        blocks = parse_response(line["response"]) if line.get("finished", True) else None
        problem = problems[line["id"]]
        scores = world.score(problem, blocks)
        # eval.py and rl.py have a format, too, in which a response that was cut can be whole
        lines.append(scores | line | {"format": scores["format"], "kind": problem["kind"]})
    return lines


# --------------------------------------------------------------------------------------- the table
@cache  # several tables have the same arms
def measure(out, run, arm):
    """{metric, or group of questions for the accuracy in it: [items]} over the test items of one
    seed, the mean over the samples of each; nan for an item that is not in the group."""
    lines = scored(out, "test", run, arm, "test.jsonl")
    items = len({line["id"] for line in lines})
    found = {}
    for key in METRICS:
        found[key] = np.reshape([line[key] for line in lines], (items, -1)).mean(1)
    touched = np.array([TOUCHED[line["kind"]] for line in lines[:: len(lines) // items]])
    for group in GROUPS:
        found[group] = np.where(touched == group, found["accuracy"], np.nan)
    return found


def values_of(outs, run, arm, key="accuracy"):
    return np.stack([measure(out, run, arm)[key] for out in outs])  # [seeds, items]


def means(out, arms):
    """{arm: {"greedy" or "sampled": {metric: mean}}} of one seed, for results.json."""
    found = {arm: {} for arm in arms}
    for arm in arms:
        for run in ("greedy", "sampled"):
            found[arm][run] = {key: measure(out, run, arm)[key].mean() for key in METRICS}
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
        for group in GROUPS:
            shares = np.nanmean(values_of(outs, "sampled", arm, group), 1)
            cells.append(f"{100 * shares.mean():.1f}")
        minutes = [minutes_of(os.path.join(out, arm), commands) for out in outs]
        cells.append(f"{np.nanmean(minutes):.1f}")
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


def looks(out, scores):
    """{variant: share of the test items of which an expert scores the right response higher, of
    those whose variant differs from it}."""
    texts, found = read_jsonl(out, "data", "look.jsonl"), {}
    for line, text in zip(read_jsonl(out, scores, "scores.jsonl"), texts):
        variant = line["id"].rpartition("/")[2]
        found.setdefault(variant, []).append(line | {"response": text["response"]})
    for variant, expert in LOOKS.items():
        pairs = zip(found["right"], found[variant])
        differ = [(a[expert], b[expert]) for a, b in pairs if a["response"] != b["response"]]
        found[variant] = above(*np.reshape(differ, (-1, 2)).T)
    return {variant: found[variant] for variant in LOOKS}


FOLLOWS = ("D_v, colors", "D_v, shapes", "D_v, length", "D_r, reasoning", "D_r, length")


def signals(out, arm):
    """What the scores of the game's rollouts follow: {"D_v, colors": correlation within a group}.

    Of the second half of the logged steps, with exact perception (colours and shapes apart) or
    reasoning, and with the length of the response in characters.
    """
    rollouts, groups = scored(out, "align", arm, "rollouts.jsonl"), {}
    middle = np.median([rollout["step"] for rollout in rollouts])
    for r in rollouts:
        if r["step"] > middle and "d_v" in r:
            line = [r["d_v"], r["d_r"], r["colors"], r["shapes"], r["reasoning"]]
            groups.setdefault((r["step"], r["id"]), []).append([*line, len(r["response"])])
    centred = np.concatenate([np.subtract(g, np.mean(g, 0)) for g in groups.values()])
    centred /= np.maximum(centred.std(0), 1e-6)
    column = dict(zip(("D_v", "D_r", "colors", "shapes", "reasoning", "length"), centred.T))
    pairs = {key: key.split(", ") for key in FOLLOWS}
    return {key: np.mean(column[d] * column[truth]) for key, (d, truth) in pairs.items()}


def expert_table(out, experts):
    """experts: {stage that made them: in words}, for which look_ and probe_ ran -> Markdown.

    Shares of held-out pairs ranked rightly; for a game also what its rewards followed, and under
    the table which of them followed length more than the truth.
    """
    heads, lines, said = ["ground_v", "ground_r", *LOOKS, *FOLLOWS], [], []
    for stage, words in experts.items():
        probe = read_json(os.path.join(out, f"probe_{stage}", "results.json"))
        found = {key: probe[key]["share"] for key in ("ground_v", "ground_r")}
        found |= looks(out, f"look_{stage}")
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
    ckpt = os.path.join(out, "sft")
    tokenizer, image_processor = load_tokenizer(ckpt)
    policy, found = set_attention(load_policy(ckpt), "sdpa").eval(), []
    examples = load_examples(os.path.join(out, "data", "sft.jsonl"))
    for i in range(count):
        example = examples[i]
        prompt = encode_prompt(example, tokenizer, image_processor)
        ids = encode_response(example.response, tokenizer)
        caption = len(split_segments(ids, tokenizer)[0]) - 1  # its EOS is the discriminator's
        with torch.no_grad():
            logp, _ = pack_logprobs(policy, pack_rows([prompt], [(0, ids)], policy.device))
        found.append([logp[:caption].mean().item(), logp[caption:].mean().item()])
    return np.array(found)


def diagnosis_table(out, count=2000):
    """How well the faulty ones of the first demonstrations are found, by the experts' scores of the
    run `demos`, by likelihood and by length -> Markdown."""
    demos = scored(out, "sft", "data", "sft.jsonl")[:count]
    judged = read_jsonl(out, "demos", "scores.jsonl")[:count]
    logp, length = likelihoods(out, len(demos)), [-len(demo["response"]) for demo in demos]
    lines = []
    for k, (expert, fault) in enumerate((("perception", "caption"), ("reasoning", "trace"))):
        wrong = np.array([demo[expert] < 1 for demo in demos])
        cells = [f"wrong {fault}", f"{100 * wrong.mean():.0f} %"]
        for values in ([line[expert] for line in judged], logp[:, k], length):
            right = np.array(values)[~wrong][:, None]  # area under the ROC curve: all pairs
            cells.append(f"{above(right, np.array(values)[wrong]):.2f}")
        lines.append(cells)
    return markdown(["fault", "share", "its expert", "likelihood under SFT", "shortness"], lines)


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
                    has = [n for n in CURVE if os.path.exists(f"{out}/sampled/{arm}_{n}")]
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
    responses = {"teacher": read_jsonl(out, "data", "test.jsonl")}
    for arm in ("sft", "sft_rl", "align", "more"):
        responses[ARMS[arm]] = read_jsonl(out, "sampled", arm, "test.jsonl")
    with figure(path, 2) as axes:
        for axis, block in zip(axes, ("caption", "think")):
            for name, lines in responses.items():
                found = [parse_response(line["response"]) for line in lines]
                words = [len(getattr(blocks, block).split()) for blocks in found if blocks]
                counts = np.bincount(words, minlength=50)[:50] / len(lines)
                axis.plot(counts, label=name, ds="steps-mid")
            axis.set(title=f"words in {block}", ylabel="share of the responses", xlim=(20, 50))
        axes[1].legend(fontsize=8)


def smooth(values, width):
    """Centred running mean; shorter at the ends; masked where nothing was measured."""
    padded = np.pad(np.array(values, float), width // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    return np.ma.masked_invalid(windows).mean(1)


def write_report(out, game, path):
    """PATH: shares of comparisons that each expert ranks rightly over the game, as align.py logs
    them; exact scores of its rollouts and of RLVR's. game: its steps."""
    log = read_jsonl(out, "align", "metrics.jsonl")
    with figure(path, 4) as axes:
        titles = {"acc": "teacher above student", "ground": "own above another's response"}
        for axis, (metric, title) in zip(axes, titles.items()):
            for key, expert in (("v", "perception expert"), ("r", "reasoning expert")):
                values = [metrics.get(f"{metric}_{key}", np.nan) for metrics in log]
                axis.plot(range(1, len(log) + 1), smooth(values, 9), label=expert)
            axis.axhline(0.5, color="0.7", lw=0.8, ls=":")
            axis.set(title=title, xlabel="step of align.py", ylim=(0, 1.02))
        draw_rollouts(out, axes[2], "align", "align", 0, "-")
        draw_rollouts(out, axes[3], "sft_rl", "rl", 0, ":")
        draw_rollouts(out, axes[3], "align_rl", "rl", game, "-")
        for axis, stage in zip(axes[2:], ("alignment", "RLVR")):
            title = f"rollouts during {stage}, exact scores"
            axis.set(title=title, xlabel="rollout batches since SFT", ylim=(0, 1))
        axes[0].legend()
        axes[3].legend(fontsize=7)


def draw_rollouts(out, axis, arm, data, begin, style):
    """Means of each logged step. begin: rollout batches between SFT and the first one."""
    by_step, keys = {}, METRICS[:3]
    for rollout in scored(out, data, arm, "rollouts.jsonl"):
        by_step.setdefault(rollout["step"], []).append([rollout[key] for key in keys])
    means = np.array([np.mean(found, 0) for found in by_step.values()])  # [steps, metrics]
    for k, key in enumerate(keys):
        x, label = np.add(list(by_step), begin), f"{key}, {ARMS[arm]}"
        axis.plot(x, smooth(means[:, k], 5), style, color=f"C{k}", label=label)
