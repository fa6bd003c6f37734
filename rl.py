"""Stage 3, reinforcement learning with verifiable rewards (RLVR): one policy loss; GRPO, DAPO and
GSPO are rows of a table.

    (5)  r = 0.8 * accuracy + 0.2 * format
    (3)  A_i = (r_i - mean r) / std r                        over the N rollouts of a prompt
    token level     L = -min( rho A, clip(rho, 1 - low, 1 + high) A ),   rho_t = exp(l_t - l_old_t)
    sequence level  the same with  rho = exp( mean_t (l_t - l_old_t) )           (GSPO, 2507.18071)

DAPO (2503.14476): clip-higher, token mean, groups whose accuracy is all 0 or all 1 are replaced by
more sampling, soft penalty for overlong responses. There is no KL and no reference model unless
--kl > 0. --reward FILE.py:FUNCTION puts a function in the place of (5).

Deviations from the authors' scripts: (1) they do one update per rollout batch, where rho is exactly
1 and every clip is inert; that is the default here too, and --updates-per-rollout K splits the
batch into K steps, so that the algorithms differ as their papers mean them to; (2) all means are
over the global batch, whatever the ranks and micro-batches; (3) when dynamic sampling stays short
after --max-gen-batches, the step trains on what there is instead of failing; (4) no dual clip, by
which verl bounds the loss of a token with A < 0 by 3 |A| (in the authors' DAPO 10 |A|): it is inert
there too; (5) 1e-6 is added to the std of a group, as by verl; TRL adds 1e-4.

    python rl.py --ckpt align_out/ --data prompts.jsonl --algo grpo                          # 1 GPU
    torchrun --nproc_per_node=8 rl.py --ckpt align_out/ --algo dapo
"""

import argparse
import importlib.util
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from flags import InputError, InputErrorOfAll, Parser, check_validation, common_flags, data_flags
from flags import integer, lora_flag, parse_or_end, quote, real, rollout_flags

ALGOS = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "ratio": "token", "mean": "token",
             "dynamic": False, "overlong": False},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "ratio": "token", "mean": "token",
             "dynamic": True, "overlong": True},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "ratio": "sequence", "mean": "sequence",
             "dynamic": False, "overlong": False},
}
REWARD_SECONDS = 10  # for a call of one's own reward


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["prism-vlm/rl_dataset:rl_training_data_filtered_2k.parquet"],
        help="prompts and answers: SOURCE[:WEIGHT] ...")
    add("--algo", choices=list(ALGOS), default="grpo", help="row of the table of algorithms")
    add("--steps", type=integer(0), default=1500, help="rollout batches")
    add("--lr", type=real(0, 1), default=1e-6, help="learning rate")
    add("--lr-warmup", type=integer(0), default=0, help="steps with rising learning rate")
    add("--updates-per-rollout", type=integer(1), default=1, metavar="K",
        help="optimizer steps per rollout batch")
    add("--max-gen-batches", type=integer(1), default=10,
        help="rounds of dynamic sampling per step (dapo)")
    add("--overlong-buffer", type=integer(0), default=None, help="tokens before the limit that are "
        "penalised (dapo; default: half of --max-new-tokens, at most 4096)")
    add("--reward", metavar="FILE.py:FUNCTION", default=None, help="own reward in place of (5): "
        "FUNCTION(response, answer, row) gives a number; answer and row (a dict) are those of "
        f"--data; a call that fails or takes {REWARD_SECONDS} s is worth 0 and counted")
    add("--kl", type=real(0), default=0.0,
        help="coefficient of the k3 penalty towards --ckpt; 0: none")
    lora_flag(parser)
    rollout_flags(parser, prompts=32, max_new_tokens=8192)
    common_flags(parser, "rl")
    data_flags(parser)
    args = parser.parse_args()
    check_validation(args)
    args.reward_function = None
    if args.reward is not None:  # a file of which the content counts, and a name
        given = args.reward
        args.reward, _, args.reward_function = given.rpartition(":")
        if not (args.reward.endswith(".py") and os.path.isfile(args.reward)):
            raise InputError(f"--reward {given}: a FILE.py:FUNCTION that is there is needed")
    if args.prompts % args.updates_per_rollout:
        raise InputError(f"--updates-per-rollout {args.updates_per_rollout} does not divide "
                         f"--prompts {args.prompts}")
    if args.overlong_buffer is None:
        args.overlong_buffer = min(4096, args.max_new_tokens // 2)
    if args.overlong_buffer >= args.max_new_tokens:
        raise InputError(f"--overlong-buffer {args.overlong_buffer} must be below --max-new-tokens "
                         f"{args.max_new_tokens}: every response would be penalised")
    return args


if __name__ == "__main__":
    parse_or_end(parse_args)  # before torch is imported, which takes seconds

import torch
from torch.nn.utils.rnn import pad_sequence

from data import Example, Examples, Feed, attempt_all, encode_prompt, load_image, look
from data import measure_prompt, open_source, system_prompt
from page import save_pictures
from rollout import Rollout, parse_response, sample
from rows import IDLE, Prompt, pack_logprobs, pack_rows, set_attention, split_rows, target_logprobs
from runtime import Skips, about, add_lora, append_rows, begin, choose_attention, end_step, eos_ids
from runtime import identify, load_policy, load_tokenizer, log, make_optimizer, make_sampler, most
from runtime import refresh, run, save, setup, shard, start_lora
from verify import timeouts, verify, with_percent


# ------------------------------------------------------------------------------- pure functions
def reward(response_text, gold, options=None):
    """(5): response -> {"score", "accuracy", "format"}. Only the <answer> block of a well-formed
    response counts: an answer elsewhere, or in a broken response, earns nothing."""
    response = parse_response(response_text)
    accuracy = float(response is not None and verify(response.answer, gold, options))
    well_formed = float(response is not None)
    score = 0.8 * accuracy + 0.2 * well_formed
    return {"score": score, "accuracy": accuracy, "format": well_formed}


def overlong_penalty(length, limit, buffer):
    """DAPO's soft penalty: 0 up to limit - buffer, then linear down to -1 at the limit."""
    return max(-1.0, min(0.0, (limit - buffer - length) / buffer)) if buffer else 0.0


def group_advantages(rewards):
    """(3): rewards [B, N] -> [B, N], unbiased std, eps 1e-6. A group of one or of equal rewards is
    exactly 0; equality is decided by max == min, because the float mean of equal values need not
    equal them."""
    if rewards.shape[1] == 1 or not len(rewards):
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(equal, 0.0, centred / (rewards.std(1, keepdim=True) + 1e-6))


def policy_loss(logp, old_logp, advantages, mask, algo, ref_logp=None, kl=0.0, tokens=None,
                sequences=None):
    """Clipped surrogate of one micro-batch, float32 -> (loss, {"clipped", "kl"}: shares of the
    global token mean).

    logp, old_logp, ref_logp [n, L]; advantages [n] or [n, L]; mask [n, L], bool or integers.
    `tokens` and `sequences` are the counts of the whole global batch, over all ranks and
    micro-batches (default: of this call); the parts' losses then add up to the whole's. Two prompts
    A and B with three rollouts:

        mask  A1  1 1 1 1 .     token mean:     every 1 weighs 1 / 8       (tokens = 8)
              A2  1 . . . .     sequence mean:  a 1 of A1 weighs 1 / 4 / 3, that of A2 1 / 3,
              B1  1 1 1 . .                     one of B1 1 / 3 / 3        (sequences = 3)

    The optional penalty is k3 = exp(ref - l) - (ref - l) - 1 (Schulman 2020), clamped at 10.
    """
    a, mask = ALGOS[algo], mask.bool()
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    tokens = mask.sum() if tokens is None else tokens
    sequences = len(mask) if sequences is None else sequences
    log_ratio = torch.where(mask, logp - old_logp, 0.0)  # [n, L]
    if a["ratio"] == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(mask)
    ratio, advantages = log_ratio.exp(), advantages.view(len(mask), -1)
    clipped = ratio.clamp(1 - a["clip_low"], 1 + a["clip_high"])
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    metrics = {"clipped": ((losses > -ratio * advantages) & mask).sum().item() / tokens}
    if kl > 0:
        gap = torch.where(mask, ref_logp - logp, 0.0)
        k3 = (gap.exp() - gap - 1).clamp(max=10.0)
        metrics["kl"] = (k3 * mask).sum().item() / tokens
        losses = losses + kl * k3
    weights = mask / tokens if a["mean"] == "token" else mask / lengths / sequences
    return (losses * weights).sum(), metrics


# ------------------------------------------------------------------------- shared with alignment
@dataclass
class Record:
    """One rollout on its way from sampling to the update, and all that is known of it."""

    group: int  # which prompt of the global batch
    index: int  # place among the rollouts of all ranks: group * N + number of the sample
    example: Example
    prompt: Prompt
    rollout: Rollout
    text: str  # decoded, without the EOS
    segments: tuple | None = None  # (caption_ids, trace_ids); None: the format is broken
    teacher: tuple | None = None  # the same of the teacher's response, in alignment
    scores: dict = field(default_factory=dict)  # what was said of it, as rollouts.jsonl has it
    reward: float = 0.0
    advantage: float = 0.0
    trace_advantage: float | None = None  # of the tokens of the trace, where it is another one
    old_logp: torch.Tensor | None = None  # [L], only with several updates per rollout batch
    ref_logp: torch.Tensor | None = None  # [L], only with --kl

    def token_advantages(self):
        """[L] float32."""
        advantages = torch.full((len(self.rollout.ids),), self.advantage)
        if self.trace_advantage is not None:
            trace = len(self.segments[0]) - 1  # the caption's EOS is not in the rollout
            advantages[trace:] = self.trace_advantage
        return advantages


def sampled_here(count, args, world):
    """The (place of a prompt in the global batch, number of the sample) that this rank samples: of
    all count * N the same number on every rank, so that a group may span ranks."""
    return [divmod(i, args.n) for i in world.share([1] * count * args.n)]


def prompt_feed(found, tokenizer, image_processor, system, args, world, progress, steps):
    """A Feed of prompts for so many steps; each rank encodes those that it will sample from."""

    def encode(example):
        return encode_prompt(example, tokenizer, image_processor, args.max_prompt, system)

    def need(indices):
        return sorted({place for place, _ in sampled_here(len(indices), args, world)})

    feed = Feed(found, encode, args, world, progress, need)
    feed.plan(steps, args.prompts)
    return feed


def sample_records(sampler, feed, tokenizer, args, world, step):
    """Draw args.prompts prompts and sample args.n rollouts of each -> this rank's records.

    Every rank samples the same number; their lengths are known only then, and the ranks take
    consecutive rollouts of about equal tokens on to the updates. Token ids travel; a prompt whose
    rollouts do is encoded anew.
    """
    batch = {item.place: item for item in feed.draw(args.prompts, step)}
    numbers = {}  # place -> the samples of it that are drawn here
    for place, number in sampled_here(args.prompts, args, world):
        if place in batch:
            numbers.setdefault(place, []).append(number)
    prompts = {place: batch[place].encoded for place in numbers}
    rollouts = sample(
        sampler, list(prompts.values()), args.n, max_new_tokens=args.max_new_tokens,
        eos_id=eos_ids(tokenizer, sampler), temperature=args.temperature,
        seeds=[(args.seed, step, feed.position, place) for place in prompts],
        samples=list(numbers.values()), slots=args.slots, max_tokens=args.max_tokens,
        compiled=args.compile,
    )
    drawn = []
    for prompt, part in zip(prompts.values(), rollouts):
        drawn += [(rollout, len(prompt.input_ids) / args.n) for rollout in part]
    drawn = sum(world.gather(drawn), [])  # of all ranks, in global order
    places, records = list(batch), []
    for index in world.share([len(rollout.ids) + prompt for rollout, prompt in drawn]):
        group, rollout = index // args.n, drawn[index][0]
        place = places[group]
        example = feed.examples[batch[place].index]
        if place not in prompts:
            prompts[place] = feed.encode(example)
        text = tokenizer.decode(rollout.content)
        records.append(Record(group, index, example, prompts[place], rollout, text))
    return records


def gather_table(records, values, args, world):
    """values: a list of numbers for each record -> [B, N, numbers] float64 over all ranks."""
    mine = {record.index: line for record, line in zip(records, values)}
    table = {}
    for part in world.gather(mine):
        table |= part
    lines = [table[index] for index in sorted(table)] or torch.zeros(0, 1)
    lines = torch.as_tensor(lines, dtype=torch.float64)
    return lines.view(len(lines) // args.n, args.n, lines.shape[1])


def packed(records, args, world):
    """Packs of at most args.max_tokens, lists of records, of which those of one prompt share it; as
    many on every rank, so the last ones may be empty."""
    rows, packs = {}, []  # a row: the records of one prompt
    for record in records:
        rows.setdefault(id(record.prompt), []).append(record)
    rows, lengths = list(rows.values()), []
    for row in rows:
        lengths.append((len(row[0].prompt.input_ids), [len(r.rollout.ids) for r in row]))
    for pack in split_rows(lengths, args.max_tokens):
        packs.append([rows[r][b] for r, branches in pack for b in branches])
    return packs + [[]] * (most(len(packs), world) - len(packs))


def pad(parts):
    """list of [L_i] -> [n, L], padded with 0."""
    return pad_sequence(list(parts), batch_first=True)


def logprobs_of(policy, records, args, world, entropies=True):
    """Log-probs and entropies [n, L] (see target_logprobs) of the records of one pack, padded with
    0. Of no records: those of IDLE, so that a rank without work takes part in the collectives."""
    prompts = list({id(r.prompt): r.prompt for r in records}.values()) or [IDLE]
    place = {id(prompt): i for i, prompt in enumerate(prompts)}
    branches = [(place[id(r.prompt)], r.rollout.ids) for r in records] or [(0, [0])]
    pack = pack_rows(prompts, branches, world.device)  # images are encoded once, in its forward
    settings = {"temperature": args.temperature, "entropies": entropies}
    logp, entropy = pack_logprobs(policy, pack, **settings)
    if entropies:
        entropy = pad(entropy.split(pack.lengths))
    return pad(logp.split(pack.lengths)), entropy


@torch.no_grad()
def store_logprobs(model, records, name, args, world):
    """One pass without gradient that stores each record's log-probs under `name` (old_logp or
    ref_logp)."""
    for part in packed(records, args, world):
        logp, _ = logprobs_of(model, part, args, world, entropies=False)
        for line, record in zip(logp, part):
            setattr(record, name, line[: len(record.rollout.ids)])
    if hasattr(model, "reshard"):  # without a backward FSDP leaves the root's weights gathered
        model.reshard()


def accumulate_policy_gradient(policy, records, algo, args, world, kl=0.0):
    """Backward of `policy_loss` over all micro-batches -> metrics of the global batch, {} where
    nothing was trained.

    Rollouts with advantage 0 have loss and gradient exactly 0 (unless there is a KL term): they
    count in the means but are not computed. Every rank runs the same number of forwards.
    """
    tokens, sequences = world.sum(sum(len(r.rollout.ids) for r in records), len(records))
    learned = [r for r in records if r.advantage or r.trace_advantage or kl > 0]
    names = ["loss", "clipped", "entropy", "drift", "trained"] + ["kl"] * (kl > 0)
    sums = dict.fromkeys(names, 0.0)
    for part in packed(learned, args, world):
        logp, entropy = logprobs_of(policy, part, args, world)
        if not part:
            (logp.sum() * 0).backward()
            continue
        old = logp.detach() if part[0].old_logp is None else pad(r.old_logp for r in part)
        ref = pad(r.ref_logp for r in part) if kl > 0 else None
        advantages = pad(r.token_advantages() for r in part).to(logp)
        mask = pad(torch.ones(len(r.rollout.ids)) for r in part).to(logp)
        loss, metrics = policy_loss(logp, old, advantages, mask, algo, ref, kl, tokens, sequences)
        (loss * world.size).backward()  # FSDP averages over ranks, the loss is of the global mean
        sampled = pad(torch.tensor(r.rollout.logprobs) for r in part).to(logp)
        sums["loss"] += loss.item()
        sums["entropy"] += entropy.sum().item()
        sums["drift"] += ((logp.detach() - sampled).abs() * mask).sum().item()
        sums["trained"] += mask.sum().item()
        for name, value in metrics.items():
            sums[name] += value
    total = dict(zip(names, world.sum(*sums.values())))
    trained = total.pop("trained")
    for name in ("entropy", "drift"):  # means per token
        total[name] /= max(1, trained)
    return total if trained else {}


def rollout_metrics(records, world, args):
    """Length, share finished; both over the rollouts of all ranks. With --compile also how many
    compilations of this process got no CUDA graph; there torch says why."""
    lengths = sum(len(r.rollout.ids) for r in records)
    finished = sum(r.rollout.finished for r in records)
    length, finished, n = world.sum(lengths, finished, len(records))
    metrics = {"length": length / n, "finished": finished / n} if n else {}
    if args.compile:
        metrics["graph_skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return metrics


def log_rollouts(world, out, step, records, every):
    """Append the rollouts of `step` (from 1) with what was said of them to OUT/rollouts.jsonl (rank
    0, every `every` steps; 0: never); their pictures go to OUT/pictures."""
    if not every or step % every:
        return
    pictures, lines = {}, []
    for r in records:
        if r.group not in pictures:
            pictures[r.group] = save_pictures(map(load_image, r.example.images), out)
        lines.append({"step": step, "id": r.example.id, "question": r.example.prompt[-1]["content"],
                      "gold": r.example.answer, "images": pictures[r.group], "response": r.text,
                      "finished": r.rollout.finished, **r.scores, "advantage": r.advantage})
    lines = sum(world.gather(lines), [])
    if world.rank == 0:
        append_rows(os.path.join(out, "rollouts.jsonl"), lines)


def show_first(world, step, records, tokenizer):
    """Print the first rollout of a run with its prompt, its gold and what was said of it."""
    if step or world.rank or not records:
        return
    record = records[0]
    prompt = tokenizer.decode(record.prompt.input_ids).replace("<|image_pad|>" * 2, "")
    ids = record.rollout.ids
    rollout = f">>>{tokenizer.decode(ids)}<<< (last id {ids[-1]})"
    gold = f"gold {record.example.answer}, {record.scores}"
    print(f"--- step 0, first rollout\n{prompt}{rollout}\n{gold}\n---", flush=True)


class Warn:
    """Says, once, what has been wrong in `after` steps in a row (on rank 0)."""

    def __init__(self, world, after=10):
        self.world, self.after, self.seen = world, after, {}

    def __call__(self, wrong, what, records):
        self.seen[what] = self.seen.get(what, 0) + 1 if wrong else 0
        if self.seen[what] == self.after and self.world.rank == 0:
            shown = quote(records[0].text, 300) if records else "none"
            print(f"warning: {self.after} steps in a row {what}; a response: {shown}", flush=True)


def warn_of_nothing(warn, metrics, records):
    """Say why a run of rl.py may be learning nothing."""
    warn(metrics["format"] == 0, "no response had the three blocks: is --ckpt trained on them, "
         "is --max-new-tokens too small?", records)
    warn(metrics["accuracy"] == 0, "no answer was right: are they too hard, is the gold in the "
         "form of the answers?", records)
    warn(metrics.get("entropy") is None, "all rewards in each group were equal: prompts that are "
         "always or never solved teach nothing", records)


# -------------------------------------------------------------------- validation, in alignment, too
class Validation:
    """Greedy accuracy on --eval-data, every --eval-every steps. It changes no number of the run;
    where it is the highest so far, the state is saved, and stays.

    All rows are looked at, and their pictures decoded, before a model is loaded. Raises
    InputErrorOfAll for one that cannot be used: leaving it out would change the score."""

    def __init__(self, tools, world):
        self.tools, self.world, args = tools, world, tools[-1]
        if not args.eval_every:
            return
        # every row needs an answer, whatever gives the rewards, and pictures that can be decoded
        strict = argparse.Namespace(**vars(args) | {"reward": None, "bad_rows": "stop"})

        def measure(example):
            return measure_problem(example, *tools[:-1], strict)

        try:
            files = [open_source(source, None, "test") for source in args.eval_data]
            self.examples = Examples(sum(files, []))
            for i, _, why in sum(attempt_all(measure, self.examples, world), []):
                if why:
                    raise InputError("{}:{}: ".format(*self.examples.where(i)) + why)
        except InputError as error:
            raise InputErrorOfAll(f"--eval-data: {error}") from error

    def __call__(self, sampler, policy, step):
        """{"eval_accuracy": share of right answers} after a step (from 1) that is due, else {}."""
        tokenizer, image_processor, system, args = self.tools
        if not args.eval_every or step % args.eval_every:
            return {}
        refresh(sampler, policy)
        right, mine = 0, self.world.share([1] * len(self.examples))
        for start in range(0, len(mine), args.slots):  # so many prompts are kept encoded at a time
            examples = [self.examples[i] for i in mine[start : start + args.slots]]
            settings = tokenizer, image_processor, None, system
            prompts = [encode_prompt(example, *settings) for example in examples]
            rollouts = sample(
                sampler, prompts, 1, max_new_tokens=args.max_new_tokens, temperature=0.0,
                eos_id=eos_ids(tokenizer, sampler), slots=args.slots, max_tokens=args.max_tokens,
                compiled=args.compile,
            )
            for example, (rollout,) in zip(examples, rollouts):
                text = tokenizer.decode(rollout.content)
                right += reward_of(text, example)["accuracy"]
        accuracy = self.world.sum(right)[0] / len(self.examples)
        if accuracy > self.world.best[1]:
            self.world.best, self.world.due = (step, accuracy), True
        return {"eval_accuracy": accuracy}


# ---------------------------------------------------------------------------- a reward of one's own
class OwnReward:
    """The function of --reward, called with a response as it was sampled, without the EOS, the gold
    answer (None where there is none) and the row of the data set. What is no finite number, raises
    or takes too long is worth 0 and counted; its clock makes that depend on the machine."""

    def __init__(self, args):
        self.name = f"--reward {args.reward}:{args.reward_function}"
        self.calls, self.errors, self.first = 0, 0, None
        with about(self.name):
            sys.path.append(os.path.dirname(os.path.abspath(args.reward)))  # as of any script
            spec = importlib.util.spec_from_file_location("own_reward", args.reward)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.function = getattr(module, args.reward_function)
            if not callable(self.function):
                raise TypeError(f"{args.reward_function} is no function")

    def __call__(self, record):
        self.calls += 1
        try:
            value = self.call(record.text, record.example.answer, record.example.row)
            if math.isfinite(value):
                return value
            problem = f"{value} is no finite number"
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # Ctrl-C itself raises nothing
            problem = f"{type(error).__name__}: {error}"
        self.errors += 1
        if self.errors == 1:
            self.first = f"{self.name}: {record.example.id}: {problem}"
            print(f"warning: {quote(self.first, 300)}; it is worth 0", flush=True)
        return 0.0

    def call(self, *given):
        def stop(*_):
            raise TimeoutError(f"no reward within {REWARD_SECONDS} s")

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, REWARD_SECONDS)
        try:
            return float(self.function(*given))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def count(self, world):
        """Calls that have failed so far, on all ranks. Raises InputErrorOfAll where none has not:
        there is nothing to learn from."""
        calls, errors = world.sum(self.calls, self.errors)
        if errors == calls > 0:
            first = next(filter(None, world.gather(self.first)))
            raise InputErrorOfAll(f"{first} (as all {int(calls)} calls of the first step)")
        return int(errors)


# ------------------------------------------------------------------------------------------- RL
def measure_problem(example, *tools):
    """`measure_prompt`, and a row without an answer is of no use, but to a reward of one's own."""
    if not example.answer and not tools[-1].reward:
        raise InputError(f"{example.id}: the row has no answer to verify against "
                         "(column answer or reward_model)")
    return measure_prompt(example, *tools)


def reward_of(text, example):
    """(5) for a response to an example."""
    golds = with_percent(example.answer, example.prompt[-1]["content"])
    return reward(text, golds, example.options)


def give_rewards(records, own, args):
    """(5) or, where it is given, one's own reward for each record, with DAPO's soft penalty for
    overlong responses."""
    for r in records:
        r.scores = reward_of(r.text, r.example)
        if own:
            r.scores["score"] = own(r)
        if not r.example.answer:
            r.scores.pop("accuracy")
        r.reward = r.scores["score"]
        if ALGOS[args.algo]["overlong"]:
            length = len(r.rollout.ids)
            r.reward += overlong_penalty(length, args.max_new_tokens, args.overlong_buffer)
        r.scores["reward"] = r.reward


def keep_informative(records, draw, own, args, world):
    """DAPO's dynamic sampling: groups in which every rollout is right or every one is wrong, or all
    have the same reward of one's own, teach nothing and leave the batch, and draw() gives as many
    rollouts again, until the batch is full. The other algorithms keep what they have. -> (this
    rank's records, metrics of all ranks)"""
    dynamic = ALGOS[args.algo]["dynamic"]
    kept, groups, metrics = [], 0, {"gen_batches": 0}
    while True:
        scores = [[r.scores.get("accuracy", math.nan), r.scores["score"]] for r in records]
        table = gather_table(records, scores, args, world)  # [B, N, 2]
        accuracy, score = table[..., 0], table[..., -1]
        mean = accuracy.nanmean().item()  # of the first, unfiltered round
        metrics.setdefault("accuracy", None if math.isnan(mean) else mean)
        told = score if own else accuracy
        differ = (told.amax(1) > told.amin(1)).tolist()  # [B]
        use = [g for g, informative in enumerate(differ) if informative or not dynamic]
        renumbered = {g: groups + i for i, g in enumerate(use[: args.prompts - groups])}
        for r in records:
            if r.group in renumbered:
                number = r.index % args.n
                r.group = renumbered[r.group]
                r.index = r.group * args.n + number
                kept.append(r)
        groups += len(renumbered)
        metrics["gen_batches"] += 1
        full = groups == args.prompts or metrics["gen_batches"] == args.max_gen_batches
        if full or not dynamic:
            return kept, {**metrics, "groups": groups}
        records = draw()
        give_rewards(records, own, args)


def reward_metrics(records, world):
    """Means over the records of all ranks that are trained on."""
    reward = sum(r.scores["reward"] for r in records)
    well_formed = sum(r.scores["format"] for r in records)
    reward, well_formed, n = world.sum(reward, well_formed, len(records))
    return {"reward": reward / n if n else None, "format": well_formed / n if n else None}


def reward_counts(own, before, world):
    """So far, with those `before` --resume: comparisons that the verifier refused as too large, and
    failed calls of one's own reward."""
    counts = {"reward_timeouts": int(world.sum(timeouts())[0])}
    counts |= {"reward_errors": own.count(world)} if own else {}
    return {name: count + before.get(name, 0) for name, count in counts.items()}


def update_policy(policy, reference, optimizer, records, skips, step, args, world):
    """K optimizer steps, each over the records of a K-th of the prompts -> mean metrics and the
    last gradient norm, {} where no rank has anything to learn from."""
    k = args.updates_per_rollout
    if k > 1:
        store_logprobs(policy, records, "old_logp", args, world)
    if args.kl > 0:
        store_logprobs(reference, records, "ref_logp", args, world)
    lr = args.lr * min(1.0, (step + 1) / max(1, args.lr_warmup))
    made = []
    for u in range(k):
        part = [r for r in records if r.group * k // args.prompts == u]
        metrics = accumulate_policy_gradient(policy, part, args.algo, args, world, args.kl)
        if metrics:
            norm = skips.step(policy, optimizer, lr, args.clip, world, metrics["loss"])
            made.append(metrics)
    if not made:
        return {}
    columns = zip(*(metrics.values() for metrics in made))
    return dict(zip(made[0], map(fmean, columns))) | {"grad_norm": norm}


def main():
    args = parse_args()
    own = OwnReward(args) if args.reward else None
    world = setup(args, {"--prompts x --rollouts": args.prompts * args.n})
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    system, attn = system_prompt(args), choose_attention(args.attn, world)
    tools = tokenizer, image_processor, system, args
    found = look(args.data, lambda example: measure_problem(example, *tools), args, world)
    validate = Validation(tools, world)
    identify(args, world, found.identity)  # a --resume of another run ends here
    policy = set_attention(load_policy(args.ckpt, world=world), attn)
    add_lora(policy, args.lora, world)
    sampler, reference = make_sampler(policy, world), None
    units = [*policy.model.language_model.layers, policy.model.visual]  # the rest is the root
    shard(policy, units, world, target_logprobs, checkpointing=args.checkpointing)
    start_lora(policy, args.seed)
    if args.kl > 0:
        reference = set_attention(load_policy(args.ckpt, world=world), attn)
        units = [*reference.model.language_model.layers, reference.model.visual]
        shard(reference, units, world, target_logprobs)
    optimizer = make_optimizer(policy, args.lr, args.weight_decay)
    parts, skips = {"policy": (policy, optimizer)}, Skips()
    progress, metrics = begin(args, world, parts, args.steps, skips)
    feed = prompt_feed(found, *tools, world, progress, args.steps)
    warn, before = Warn(world), progress.get("counts", {})

    for step in range(progress["step"], args.steps):
        began = time.time()
        # rollout
        refresh(sampler, policy)  # they come from the newest weights
        draw = partial(sample_records, sampler, feed, tokenizer, args, world, step)
        sampled = draw()
        # reward
        give_rewards(sampled, own, args)
        records, metrics = keep_informative(sampled, draw, own, args, world)
        counts = reward_counts(own, before, world)
        sampled_at = time.time()
        show_first(world, step, sampled, tokenizer)
        # advantage
        rewards = gather_table(records, [[r.reward] for r in records], args, world)[..., 0]
        advantages = group_advantages(rewards).flatten().tolist()  # the same on every rank
        for r in records:
            r.advantage = advantages[r.index]
        # update policy
        update = update_policy(policy, reference, optimizer, records, skips, step, args, world)
        # log
        progress = {"step": step + 1, **feed.progress(), "counts": counts}
        metrics = {"step": step + 1, **reward_metrics(records, world), **metrics, **counts,
                   **update, **rollout_metrics(records, world, args), **feed.counts,
                   **validate(sampler, policy, step + 1), "skipped_steps": skips.total,
                   "seconds_rollout": round(sampled_at - began, 3),
                   "seconds": round(time.time() - began, 3)}
        log(world, args.out, metrics)
        log_rollouts(world, args.out, step + 1, records, args.log_rollouts)
        warn_of_nothing(warn, metrics, sampled)
        # save
        end_step(args, world, parts, progress, step + 1 == args.steps, skips)
    feed.close()
    save(policy, args.out, world, "rl", args, args.steps, metrics)


if __name__ == "__main__":
    run(main)
