"""Stage 3, reinforcement learning with verifiable rewards (RLVR): one policy loss; GRPO, DAPO and GSPO are rows of a table.

    (5)  r = 0.8 * accuracy + 0.2 * format                     (3)  A_i = (r_i - mean r) / std r over the N rollouts of a prompt
    token level     L = -min( rho A, clip(rho, 1 - low, 1 + high) A ),   rho_t = exp(l_t - l_old_t)
    sequence level  the same with  rho = exp( mean_t (l_t - l_old_t) )                                     (GSPO, 2507.18071)

DAPO (2503.14476): clip-higher, token mean, groups whose accuracy is all 0 or all 1 are replaced by more sampling, soft
penalty for overlong responses. There is no KL and no reference model unless --kl > 0.

Deviations from the authors' scripts: (1) they do one update per rollout batch, where rho is exactly 1 and every clip is
inert; that is the default here too, and --updates-per-rollout K splits the batch into K steps, so that the algorithms
differ as their papers mean them to; (2) all means are over the global batch, whatever the ranks and micro-batches;
(3) when dynamic sampling stays short after --max-gen-batches, the step trains on what there is instead of failing.

    python rl.py --ckpt align_out/ --data prompts.jsonl --algo grpo                                            # 1 GPU
    torchrun --nproc_per_node=8 rl.py --ckpt align_out/ --algo dapo
"""

import argparse
import os
import time
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from data import Example, Feed, data_flags, encode_prompt, load_data, system_prompt
from rollout import SLOT_TOKENS, Rollout, parse_response, sample
from rows import Prompt, pack_logprobs, pack_rows, set_attention, split_rows, target_logprobs
from runtime import InputError, Parser, Skips, append_rows, begin, choose_attention, common_flags, end_step, load_policy
from runtime import integer, load_tokenizer, log, real, make_optimizer, make_sampler, most, refresh, run, save, setup, shard
from verify import verify

ALGOS = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "ratio": "token", "mean": "token", "dynamic": False, "overlong": False},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "ratio": "token", "mean": "token", "dynamic": True, "overlong": True},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "ratio": "sequence", "mean": "sequence", "dynamic": False, "overlong": False},
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- pure functions
def group_advantages(rewards):
    """(3): rewards [B, N] -> [B, N], unbiased std, eps 1e-6. A group of one or of equal rewards is exactly 0; equality is
    decided by max == min, because the float mean of equal values need not equal them."""
    if rewards.shape[1] == 1 or not len(rewards):
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(equal, 0.0, centred / (rewards.std(1, keepdim=True) + 1e-6))


def overlong_penalty(length, limit, buffer):
    """DAPO's soft penalty: 0 up to limit - buffer, then linear down to -1 at the limit."""
    return max(-1.0, min(0.0, (limit - buffer - length) / buffer)) if buffer else 0.0


def policy_loss(logp, old_logp, advantages, mask, algo, ref_logp=None, kl=0.0, tokens=None, sequences=None):
    """Clipped surrogate of one micro-batch, float32 -> (loss, {"clipped", "kl"}: shares of the global token mean).

    logp, old_logp, ref_logp [n, L]; advantages [n]; mask [n, L] bool. `tokens` and `sequences` are the counts of the whole
    global batch, over all ranks and micro-batches (default: of this call); the parts' losses then add up to the whole's.
    The optional penalty is k3 = exp(ref - l) - (ref - l) - 1 (Schulman 2020), clamped at 10.
    """
    a = ALGOS[algo]
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    tokens = mask.sum() if tokens is None else tokens
    sequences = len(mask) if sequences is None else sequences
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    if a["ratio"] == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(mask)
    ratio, advantages = log_ratio.exp(), advantages[:, None]
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


def reward(response_text, gold, options=None):
    """Response -> {"score", "accuracy", "format"}, equation (5).  Only the <answer> block of a well-formed response
    counts: an answer elsewhere, or in a broken response, earns nothing."""
    response = parse_response(response_text)
    accuracy = float(response is not None and verify(response.answer, gold, options))
    well_formed = float(response is not None)
    return {"score": 0.8 * accuracy + 0.2 * well_formed, "accuracy": accuracy, "format": well_formed}


# ------------------------------------------------------------------------------------------------ shared with alignment
@dataclass
class Record:
    """One rollout on its way from sampling to the update."""

    group: int  # which prompt of the global batch
    example: Example
    prompt: Prompt
    rollout: Rollout
    text: str  # decoded, without the EOS
    index: int = 0  # place among the rollouts of all ranks
    old_logp: torch.Tensor | None = None  # [L], only with several updates per rollout batch
    ref_logp: torch.Tensor | None = None  # [L], only with --kl


def sample_records(sampler, feed, tokenizer, args, world, step):
    """Draw args.prompts prompts and sample args.n rollouts of each; a group may span ranks. Every rank samples the same
    number; their lengths are known only then, and the ranks take consecutive rollouts of about equal tokens on to the
    updates. Token ids travel; a prompt whose rollouts do is encoded anew.
    -> this rank's records in global order."""
    indices, encoded = feed.draw(args.prompts, step)
    mine = [divmod(i, args.n) for i in world.share([1] * args.prompts * args.n)]
    groups = sorted({group for group, _ in mine})
    prompts = {group: encoded.get(group) or feed.encode(feed.examples[indices[group]]) for group in groups}
    rollouts = sample(
        sampler, [prompts[g] for g in groups], args.n, max_new_tokens=args.max_new_tokens, eos_id=tokenizer.eos_token_id,
        temperature=args.temperature, seeds=[(args.seed, step, feed.position, g) for g in groups],
        samples=[[s for g, s in mine if g == group] for group in groups], slots=args.slots, max_tokens=args.max_tokens,
        compiled=world.device.type == "cuda" if args.compile is None else args.compile,
    )  # fmt: skip
    drawn = [(r, len(prompts[g].input_ids)) for g, part in zip(groups, rollouts) for r in part]
    drawn, records = sum(world.gather(drawn), []), []
    for i in world.share([len(r.ids) + prompt / args.n for r, prompt in drawn]):
        group, r = i // args.n, drawn[i][0]
        example = feed.examples[indices[group]]
        if group not in prompts:
            prompts[group] = feed.encode(example)
        text = tokenizer.decode(r.ids[:-1] if r.finished else r.ids)
        records.append(Record(group, example, prompts[group], r, text, i))
    return records


def packed(records, max_tokens):
    """Packs of at most `max_tokens`: lists of (indices into records); consecutive records of a group share their prompt."""
    groups = {}
    for i, record in enumerate(records):
        groups.setdefault(id(record.prompt), []).append(i)
    rows = [(len(records[g[0]].prompt.input_ids), [len(records[i].rollout.ids) for i in g]) for g in groups.values()]
    members = list(groups.values())
    return [[members[r][b] for r, branches in pack for b in branches] for pack in split_rows(rows, max_tokens)]


def logprobs_of(policy, records, args, world):
    """Log-probs and entropies [n, L] of the records of one pack, padded with 0, and the mask."""
    prompts = list({id(r.prompt): r.prompt for r in records}.values())
    place = {id(prompt): i for i, prompt in enumerate(prompts)}
    pack = pack_rows(prompts, [(place[id(r.prompt)], r.rollout.ids) for r in records], world.device)
    logp, entropy = pack_logprobs(policy, pack, temperature=args.temperature)
    pad = lambda flat: pad_sequence(flat.split(pack.lengths), batch_first=True)
    return pad(logp), pad(entropy), pad(torch.ones_like(logp)).bool()


@torch.no_grad()
def store_logprobs(model, records, name, args, world, spare=None):
    """One pass without gradient that stores each record's log-probs under `name` (old_logp or ref_logp)."""
    packs = packed(records, args.max_tokens)
    for i in range(most(len(packs), world)):
        members = packs[i] if i < len(packs) else []
        logp, _, _ = logprobs_of(model, [records[m] for m in members] or [spare or records[0]], args, world)
        for row, m in zip(logp, members):
            setattr(records[m], name, row[: len(records[m].rollout.ids)])


def accumulate_policy_gradient(policy, records, advantages, algo, args, world, kl=0.0, spare=None):
    """Backward of `policy_loss` over all micro-batches -> metrics of the global batch.

    Rollouts with advantage 0 have loss and gradient exactly 0 (unless there is a KL term): they count in the means but are
    not computed. Every rank runs the same number of forwards; one without work repeats a rollout with weight 0.
    """
    tokens, sequences = world.sum(sum(len(r.rollout.ids) for r in records), len(records))
    chosen = [i for i, a in enumerate(advantages.tolist()) if a != 0 or kl > 0]
    work, weights = [records[i] for i in chosen], advantages[chosen]
    packs = packed(work, args.max_tokens)
    sums = {"loss": 0.0, "entropy": 0.0, "drift": 0.0, "clipped": 0.0, "kl": 0.0, "trained": 0.0}
    for i in range(most(len(packs), world)):
        real = i < len(packs)
        part = [work[m] for m in packs[i]] if real else [spare or records[0]]
        logp, entropy, mask = logprobs_of(policy, part, args, world)
        if not real:
            (logp.sum() * 0).backward()
            continue
        pad = lambda rows: pad_sequence(rows, batch_first=True).to(logp.device)
        old = logp.detach() if part[0].old_logp is None else pad([r.old_logp for r in part])
        ref = pad([r.ref_logp for r in part]) if kl > 0 else None
        part_advantages = weights[packs[i]].to(logp)
        loss, metrics = policy_loss(logp, old, part_advantages, mask, algo, ref, kl, tokens, sequences)
        (loss * world.size).backward()  # FSDP averages over ranks, the loss is already a share of the global mean
        sampled = pad([torch.tensor(r.rollout.logprobs) for r in part])
        sums["loss"] += loss.item()
        sums["entropy"] += entropy.sum().item()
        sums["drift"] += ((logp.detach() - sampled).abs() * mask).sum().item()
        sums["trained"] += mask.sum().item()
        for name, value in metrics.items():
            sums[name] += value
    total = dict(zip(sums, world.sum(*sums.values())))
    trained = total.pop("trained")
    means = {name: total.pop(name) / trained if trained else None for name in ("entropy", "drift")}
    if not kl:
        total.pop("kl")
    return {**total, **means}


def rollout_metrics(records, world):
    """Length, share finished; both over the rollouts of all ranks."""
    lengths = sum(len(r.rollout.ids) for r in records)
    length, finished, n = world.sum(lengths, sum(r.rollout.finished for r in records), len(records))
    return {"length": length / n, "finished": finished / n} if n else {}


def log_rollouts(world, out, step, records, scores, every):
    """Append this step's rollouts with their scores to OUT/rollouts.jsonl (rank 0, every `every` steps; 0: never)."""
    if not every or step % every:
        return
    rows = [{"step": step, "id": r.example.id, "response": r.text, "finished": r.rollout.finished, **s}
            for r, s in zip(records, scores)]  # fmt: skip
    rows = [row for part in world.gather(rows) for row in part]
    if world.rank == 0:
        append_rows(os.path.join(out, "rollouts.jsonl"), rows)


def rollout_flags(parser, prompts, max_new_tokens):
    group = parser.add_argument_group("rollouts")
    group.add_argument("--prompts", type=integer(1), default=prompts, help="prompts per step, over all processes")
    group.add_argument("--rollouts", dest="n", type=integer(1), default=16, help="rollouts per prompt")
    group.add_argument("--temperature", type=real(1e-3), default=1.0, help="of sampling and of the log-probs trained on")
    group.add_argument("--max-new-tokens", type=integer(1), default=max_new_tokens, help="length limit of a response")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                       help="torch.compile the decode step (default: on CUDA)")  # fmt: skip
    group.add_argument("--slots", type=integer(1), default=256, help="rows decoded at a time on each process; fewer where they "
                       f"would cache more than {SLOT_TOKENS} x --max-tokens tokens")  # fmt: skip
    group.add_argument("--log-rollouts", type=integer(0), default=10, help="steps between entries in rollouts.jsonl; 0: never")


# --------------------------------------------------------------------------------------------------------------------- RL
def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["prism-vlm/rl_dataset:rl_training_data_filtered_2k.parquet"],
                        help="prompts and answers: SOURCE[:WEIGHT] ...")  # fmt: skip
    parser.add_argument("--algo", choices=list(ALGOS), default="grpo", help="row of the table of algorithms")
    parser.add_argument("--steps", type=integer(0), default=1500, help="rollout batches")
    parser.add_argument("--lr", type=real(0, 1), default=1e-6, help="learning rate")
    parser.add_argument("--lr-warmup", type=integer(0), default=0, help="steps with rising learning rate")
    parser.add_argument("--updates-per-rollout", type=integer(1), default=1, metavar="K", help="optimizer steps per rollout batch")
    parser.add_argument("--max-gen-batches", type=integer(1), default=10, help="rounds of dynamic sampling per step (dapo)")
    parser.add_argument("--overlong-buffer", type=integer(0), default=4096, help="tokens before the limit that are penalised (dapo)")
    parser.add_argument("--kl", type=real(0), default=0.0, help="coefficient of the k3 penalty towards --ckpt; 0: none")
    rollout_flags(parser, prompts=32, max_new_tokens=8192)
    common_flags(parser, "rl")
    data_flags(parser)
    return parser.parse_args()


def need_answer(example):
    if not example.answer:
        raise InputError(f"{example.id}: the row has no answer to verify against (column answer or reward_model)")


def encode_problem(example, tokenizer, image_processor, args, system):
    """Example -> Prompt, or None when it is too long; a row without an answer is of no use here."""
    need_answer(example)
    return encode_prompt(example, tokenizer, image_processor, args.max_prompt, system)


def collect(sampler, feed, tokenizer, args, world, step):
    """The step's groups: sampled, judged, and under dynamic sampling replaced while all their rollouts agree.

    -> (records, scores: list of dict, rewards [B, N] of all ranks, mine: indices of this rank's records in it,
    counters, a spare record). Groups in which every rollout is right or every one is wrong teach nothing and leave the batch."""
    a = ALGOS[args.algo]
    kept, all_rewards, counters, groups = [], [], {"gen_batches": 0}, 0
    while True:
        records = sample_records(sampler, feed, tokenizer, args, world, step)
        scores = [reward(r.text, r.example.answer) for r in records]
        for r, s in zip(records, scores):
            length = len(r.rollout.ids)
            s["reward"] = s["score"] + overlong_penalty(length, args.max_new_tokens, args.overlong_buffer) * a["overlong"]
        table = [row for part in world.gather([(s["reward"], s["accuracy"]) for s in scores]) for row in part]
        rewards, accuracy = torch.tensor(table, dtype=torch.float64).view(args.prompts, args.n, 2).unbind(-1)
        use = [g for g in range(args.prompts) if not a["dynamic"] or 0 < accuracy[g].mean() < 1][: args.prompts - groups]
        place = {g: groups + i for i, g in enumerate(use)}
        for r, s in zip(records, scores):
            if r.group in place:
                r.group = place[r.group]
                kept.append((r, s, (r.group, r.index % args.n)))
        all_rewards.append(rewards[use])
        groups += len(use)
        counters["gen_batches"] += 1
        counters.setdefault("accuracy", accuracy.mean().item())  # of the first, unfiltered round
        if not a["dynamic"] or groups == args.prompts or counters["gen_batches"] == args.max_gen_batches:
            break
    counters["groups"] = groups
    spare = records[0]
    records, scores, mine = (list(part) for part in zip(*kept)) if kept else ([], [], [])
    return records, scores, torch.cat(all_rewards), mine, counters, spare


def main():
    args = parse_args()
    world = setup(args, {"--prompts x --rollouts": args.prompts * args.n})
    if args.prompts % args.updates_per_rollout:
        raise InputError(f"--updates-per-rollout {args.updates_per_rollout} does not divide --prompts {args.prompts}")
    examples = load_data(args.data, args, need_answer)
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    system = system_prompt(args)
    attn = choose_attention(args.attn, world)
    policy = set_attention(load_policy(args.ckpt), attn)
    sampler = make_sampler(policy, world)
    units = [*policy.model.language_model.layers, policy.model.visual]
    policy = shard(policy.to(world.device), units, world, target_logprobs, checkpointing=args.checkpointing)
    optimizer = make_optimizer(policy, args.lr, args.weight_decay)
    reference = None
    if args.kl > 0:
        reference = set_attention(load_policy(args.ckpt), attn).to(world.device)
        units = [*reference.model.language_model.layers, reference.model.visual]
        reference = shard(reference, units, world, target_logprobs)
    parts, skips = {"policy": (policy, optimizer)}, Skips()
    progress, row = begin(args, world, parts, args.steps, skips)
    refresh(sampler, policy)
    encode = lambda example: encode_problem(example, tokenizer, image_processor, args, system)
    feed = Feed(examples, encode, args, world, progress)
    for step in range(progress["step"], args.steps):
        began = time.time()
        # rollout
        # reward
        records, scores, rewards, mine, counters, spare = collect(sampler, feed, tokenizer, args, world, step)
        # advantage
        table = group_advantages(rewards).float()  # [B, N]
        advantages = torch.stack([table[m] for m in mine]) if mine else torch.zeros(0)
        scores = [{**s, "advantage": a} for s, a in zip(scores, advantages.tolist())]
        # update policy
        sampled_at = time.time()
        metrics, norm = update_policy(policy, reference, optimizer, records, advantages, spare, skips, step, args, world)
        refresh(sampler, policy)
        # log
        progress = {"step": step + 1, **feed.progress()}
        n = world.sum(len(scores))[0]
        mean = lambda key: world.sum(sum(s[key] for s in scores))[0] / n if n else None
        row = {"step": step + 1, "reward": mean("reward"), "format": mean("format"), **counters, **metrics, "grad_norm": norm}
        row |= rollout_metrics(records, world) | {"dropped": feed.dropped, "bad": feed.bad, "skipped_steps": skips.total}
        row |= {"seconds_rollout": round(sampled_at - began, 3), "seconds": round(time.time() - began, 3)}
        log(world, args.out, row)
        log_rollouts(world, args.out, step + 1, records, scores, args.log_rollouts)
        # save
        end_step(args, world, parts, progress, step + 1 == args.steps, skips)
    feed.close()
    save(policy, args.out, world, "rl", args, args.steps, row)


def update_policy(policy, reference, optimizer, records, advantages, spare, skips, step, args, world):
    """K optimizer steps, each over the records of a K-th of the prompts -> (mean metrics, last gradient norm)."""
    k = args.updates_per_rollout
    if k > 1:
        store_logprobs(policy, records, "old_logp", args, world, spare)
    if args.kl > 0:
        store_logprobs(reference, records, "ref_logp", args, world, spare)
    lr = args.lr * min(1.0, (step + 1) / max(1, args.lr_warmup))
    rows, norm = [], None
    for u in range(k):
        here = [i for i, r in enumerate(records) if r.group * k // args.prompts == u]
        part = [records[i] for i in here]
        metrics = accumulate_policy_gradient(policy, part, advantages[here], args.algo, args, world, args.kl, spare)
        if metrics["entropy"] is not None:  # otherwise no rank has anything to learn from
            norm = skips.step(policy, optimizer, lr, args.clip, world, metrics["loss"])
            rows.append(metrics)
    return {key: sum(m[key] for m in rows) / len(rows) for key in rows[0]} if rows else {}, norm


if __name__ == "__main__":
    run(main)
