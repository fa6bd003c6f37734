"""Stage 2, alignment: the policy plays an adversarial game against the two-expert discriminator (PRISM, arXiv 2604.28123).

    (1)  r(x, y) = alpha * D_v(x, c) + (1 - alpha) * D_r(x, t)                                                alpha = 0.5
    (2)  L_k     = -E[ log sigmoid( D_k(x, y_k+) - D_k(x, y_k-) ) ],  k in {v, r}            one loss per expert
    (3)  A_i     = ( r_i - mean_j r_j ) / std_j r_j                    over the N rollouts of one prompt
    (4)  min_theta max_phi  E[ r_phi(x, y+) - r_phi(x, y-) ]           policy by a GRPO step on A, experts by (2), 1 : 1

y+ is a teacher's text (black box: no logits), y- is sampled from the current policy. One discriminator forward per row
gives the rewards (detached, so from before its update) and carries the Bradley-Terry loss; the teacher is encoded once.

Deviations: (1) by default each expert's score is normalised in its group before they are combined, as in the authors' code
(--normalize per-expert), because only then do both signals keep their weights; --normalize combined is the paper's (3);
(2) invalid rollouts get -1.5 after the statistics were taken over the valid ones (the authors' code also puts them into
the z-score), and an all-invalid group gets nothing; (3) a floor under the group's std keeps score noise from becoming
advantage; (4) scores are clipped at +-10 for the reward only, never in the discriminator's loss.

    python align.py --ckpt sft_out/ --data curated.jsonl                                                       # 1 GPU
    torchrun --nproc_per_node=8 align.py --ckpt sft_out/                                     # the paper's settings
"""

import argparse
import os
import time

import torch

from data import Feed, data_flags, encode_prompt, encode_response, load_data, system_prompt
from discriminator import VARIANTS, Discriminator, compare_tokenizers, expert_metrics, learn_pairs, load_discriminator
from discriminator import reader, save_discriminator
from rl import accumulate_policy_gradient, log_rollouts, rollout_flags, rollout_metrics, sample_records
from rollout import parse_response, split_segments
from rows import set_attention, target_logprobs
from runtime import InputError, Parser, Skips, begin, choose_attention, common_flags, end_step, load_policy, load_tokenizer
from runtime import integer, log, real, make_optimizer, make_sampler, refresh, run, save, setup, shard


# --------------------------------------------------------------------------------------------------------- pure functions
def masked_zscore(scores, valid, floor):
    """(score - mean) / std in each group over its valid members, unbiased std with a floor; scores, valid [B, N]. Groups
    with fewer than two valid members or with equal valid scores (to 1e-5: those of equal texts differ by rounding, which
    depends on the packing) are exactly 0, and so is every invalid member."""
    n = valid.sum(1, keepdim=True)
    mean = torch.where(valid, scores, 0.0).sum(1, keepdim=True) / n.clamp(min=1)
    centred = torch.where(valid, scores - mean, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    highest = torch.where(valid, scores, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(valid, scores, torch.inf).amin(1, keepdim=True)
    return torch.where(highest - lowest > 1e-5, centred / std.clamp(min=floor), 0.0)


def alignment_advantages(d_v, d_r, valid, alpha=0.5, normalize="per-expert", floor=0.1, penalty=1.5, clip=10.0):
    """Scores [B, N] of both experts, valid [B, N] bool -> advantages [B, N], equations (1) and (3).

    per-expert: alpha * z(D_v) + (1 - alpha) * z(D_r); combined: z(alpha * D_v + (1 - alpha) * D_r); scores clipped at
    +-clip. An invalid rollout gets -penalty; a group without any valid one gets 0: there is nothing to prefer.
    """
    d_v, d_r = d_v.clamp(-clip, clip), d_r.clamp(-clip, clip)
    if normalize == "per-expert":
        z = alpha * masked_zscore(d_v, valid, floor) + (1 - alpha) * masked_zscore(d_r, valid, floor)
    else:
        z = masked_zscore(alpha * d_v + (1 - alpha) * d_r, valid, floor)
    return torch.where(valid, z, -penalty * valid.any(1, keepdim=True))


# -------------------------------------------------------------------------------------------------------------- the game
def segment_pairs(records, tokenizer):
    """(caption_ids, trace_ids) per record, None where it is invalid: cut at the length limit or format broken."""
    return [split_segments(r.rollout.ids, tokenizer) if r.rollout.finished else None for r in records]


def score_and_learn(disc, records, pairs, teachers, tokenizer, args, world):
    """One forward per pack: scores for the rewards, and the backward of (2) with an L2 term on the scores.

    records, pairs: this rank's rollouts and their segments (None: invalid, takes no part). teachers: {group: segments}.
    -> scores [n, 4] float32 on the CPU: D_v, D_r of the rollout, then of its teacher; NaN where invalid.
    """
    groups = {}
    for i, record in enumerate(records):
        if pairs[i] is not None:
            groups.setdefault(record.group, []).append(i)
    row = lambda record, members: (
        reader(record.prompt, tokenizer, disc.variant), teachers[record.group], [pairs[i] for i in members]
    )
    rows = [row(records[members[0]], members) for members in groups.values()]
    valid = [i for members in groups.values() for i in members]
    count = max(1, world.sum(len(valid))[0])
    scores = torch.full((len(records), 4), torch.nan)
    scores[valid] = learn_pairs(disc, rows, row(records[0], []), count, args, world)
    return scores


def named_scores(scores, advantages):
    """Rows of rollouts.jsonl: what the experts said of each rollout and of its teacher (nothing of an invalid one), and the
    rollout's advantage."""
    names = ("d_v", "d_r", "teacher_d_v", "teacher_d_r")
    named = [{} if s[0].isnan() else dict(zip(names, s.tolist())) for s in scores]
    return [{**row, "advantage": a} for row, a in zip(named, advantages.tolist())]


def update_discriminator(disc, optimizer, skips, score_again, args, world):
    """One optimizer step on the gradient that scoring has left, then --disc-updates - 1 more on the same rollouts."""
    norm = skips.step(disc, optimizer, args.disc_lr, args.clip, world, 0.0)
    for _ in range(args.disc_updates - 1):
        score_again()
        norm = skips.step(disc, optimizer, args.disc_lr, args.clip, world, 0.0)
    return norm


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["prism-vlm/rl_dataset:rl_training_data_5.9k.parquet"],
                        help="prompts and teacher responses: SOURCE[:WEIGHT] ...")  # fmt: skip
    parser.add_argument("--steps", type=integer(0), default=500, help="steps of the game")
    parser.add_argument("--warmup-steps", type=integer(0), default=0, help="discriminator-only steps on fresh rollouts first")
    parser.add_argument("--lr", type=real(0, 1), default=1e-6, help="learning rate of the policy")
    group = parser.add_argument_group("discriminator")
    group.add_argument("--disc", default=None, help="its checkpoint, or that of its backbone (default: --ckpt)")
    group.add_argument("--disc-variant", choices=VARIANTS, default="moe", help="moe or an ablation")
    group.add_argument("--disc-lr", type=real(0, 1), default=1e-6, help="learning rate of the discriminator")
    group.add_argument("--disc-updates", type=integer(1), default=1, help="discriminator steps per policy step, on the same rollouts")
    group.add_argument("--score-l2", type=real(0), default=1e-3, help="weight of the squared scores in its loss")
    group = parser.add_argument_group("advantage")
    group.add_argument("--alpha", type=real(0, 1), default=0.5, help="weight of perception; 1 - alpha is that of reasoning")
    group.add_argument("--normalize", choices=("per-expert", "combined"), default="per-expert", help="before (1) or after")
    group.add_argument("--std-floor", type=real(0), default=0.1, help="smallest group std, in score units")
    group.add_argument("--invalid-penalty", type=real(0), default=1.5, help="advantage of a broken format is minus this")
    rollout_flags(parser, prompts=4, max_new_tokens=6144)
    common_flags(parser, "align")
    data_flags(parser)
    return parser.parse_args()


def need_teacher(example):
    response = parse_response(example.response or "")
    if response is None or not response.answer:  # an empty block would tell the teacher from the student
        raise InputError(f"{example.id}: the row has no teacher response of <caption>, <think> and <answer> blocks")


def encode_taught(example, tokenizer, image_processor, args, system):
    """Example -> Prompt, or None when it is too long; a row without a well-formed teacher response is of no use here."""
    need_teacher(example)
    return encode_prompt(example, tokenizer, image_processor, args.max_prompt, system)


def load_players(args, world):
    """-> {"policy": (model, optimizer), "discriminator": (model, optimizer)} and the model to sample from."""
    attn = choose_attention(args.attn, world)
    policy = set_attention(load_policy(args.ckpt), attn)
    sampler = make_sampler(policy, world)
    units = [*policy.model.language_model.layers, policy.model.visual]
    policy = shard(policy.to(world.device), units, world, target_logprobs, checkpointing=args.checkpointing)
    disc = load_discriminator(args.disc or args.ckpt, args.disc_variant, attn).to(world.device)
    units, heads = [*disc.backbone.language_model.layers, disc.backbone.visual], disc.heads.values()
    disc = shard(disc, units, world, Discriminator.scores, heads, args.checkpointing)
    optimizers = make_optimizer(policy, args.lr, args.weight_decay), make_optimizer(disc, args.disc_lr, args.weight_decay)
    return {"policy": (policy, optimizers[0]), "discriminator": (disc, optimizers[1])}, sampler


def main():
    args = parse_args()
    world = setup(args, {"--prompts x --rollouts": args.prompts * args.n})
    examples = load_data(args.data, args, need_teacher)
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    system = system_prompt(args)
    compare_tokenizers(tokenizer, args.disc)
    parts, sampler = load_players(args, world)
    (policy, optimizer), (disc, disc_optimizer) = parts.values()
    skips, disc_skips = Skips(), Skips()
    progress, row = begin(args, world, parts, args.warmup_steps + args.steps, skips, disc_skips)
    refresh(sampler, policy)
    encode = lambda example: encode_taught(example, tokenizer, image_processor, args, system)
    feed = Feed(examples, encode, args, world, progress)
    for step in range(progress["step"], args.warmup_steps + args.steps):
        began = time.time()
        # rollout
        records = sample_records(sampler, feed, tokenizer, args, world, step)
        sampled_at = time.time()
        # reward
        pairs = segment_pairs(records, tokenizer)
        teachers = {r.group: split_segments(encode_response(r.example.response, tokenizer), tokenizer) for r in records}
        scores = score_and_learn(disc, records, pairs, teachers, tokenizer, args, world)
        everyone = torch.cat(world.gather(scores))  # [B * N, 4], the same on every rank
        # advantage
        valid = ~everyone[:, 0].isnan().view(args.prompts, args.n)
        d_v, d_r = everyone[:, :2].nan_to_num().T.reshape(2, args.prompts, args.n)
        advantages = alignment_advantages(
            d_v, d_r, valid, args.alpha, args.normalize, args.std_floor, args.invalid_penalty
        )
        mine = advantages.flatten()[[r.index for r in records]]
        # update discriminator
        metrics = {"valid": valid.float().mean().item(), **expert_metrics(everyone)}
        again = lambda: score_and_learn(disc, records, pairs, teachers, tokenizer, args, world)
        disc_norm = update_discriminator(disc, disc_optimizer, disc_skips, again, args, world) if valid.any() else None
        scored_at = time.time()
        # update policy
        norm = None
        if step >= args.warmup_steps:
            metrics |= accumulate_policy_gradient(policy, records, mine, "grpo", args, world)
            if metrics["entropy"] is not None:  # otherwise no rank has anything to learn from
                norm = skips.step(policy, optimizer, args.lr, args.clip, world, metrics["loss"])
            refresh(sampler, policy)
        # log
        progress = {"step": step + 1, **feed.progress()}
        row = {"step": step + 1, **metrics, "grad_norm": norm, "disc_grad_norm": disc_norm}
        row |= rollout_metrics(records, world) | {"dropped": feed.dropped, "bad": feed.bad}
        row |= {"skipped_steps": skips.total + disc_skips.total, "seconds_rollout": round(sampled_at - began, 3)}
        row |= {"seconds_disc": round(scored_at - sampled_at, 3), "seconds": round(time.time() - began, 3)}
        log(world, args.out, row)
        log_rollouts(world, args.out, step + 1, records, named_scores(scores, mine), args.log_rollouts)
        # save
        end_step(args, world, parts, progress, step + 1 == args.warmup_steps + args.steps, skips, disc_skips)
    feed.close()
    save_discriminator(disc, os.path.join(args.out, "discriminator"), world, args.ckpt)
    save(policy, args.out, world, "align", args, progress["step"], row)


if __name__ == "__main__":
    run(main)
