"""Stage 2, alignment: the policy plays an adversarial game against the two-expert discriminator
(PRISM, arXiv 2604.28123).

    (1)  r(x, y) = alpha * D_v(x, c) + (1 - alpha) * D_r(x, t)                           alpha = 0.5
    (2)  L_k     = -E[ log sigmoid( D_k(x, y_k+) - D_k(x, y_k-) ) ]                     k in {v, r}
    (3)  A_i     = ( r_i - mean_j r_j ) / std_j r_j               over the N rollouts of one prompt
    (4)  min_theta max_phi  E[ r_phi(x, y+) - r_phi(x, y-) ]

y+ is a teacher's text (black box: no logits), y- is sampled from the current policy. The policy
takes a GRPO step on A, each expert a step on its own loss (2), 1 : 1. One discriminator forward per
row gives the rewards (detached, so from before its update) and carries the Bradley-Terry loss; the
teacher is encoded once.

Deviations: (1) by default each expert's score is normalised in its group before they are combined,
as in the authors' code (--normalize per-expert), because only then do both signals keep their
weights; --normalize combined is the paper's (3); (2) invalid rollouts get -1.5 after the statistics
were taken over the valid ones (the authors' code also puts them into the z-score), and an
all-invalid group gets nothing; (3) a floor under the group's std keeps score noise from becoming
advantage; (4) scores are clipped at +-10 for the reward only, never in the discriminator's loss;
(5) --credit segment, off by default: the caption's tokens are rewarded by both scores, those of the
trace by D_r alone; (6) the discriminator is warmed up on fresh rollouts until both experts rank
80 % of the pairs rightly; the authors' is by 120 K stored pairs (discriminator.py --pairs).

    python align.py --ckpt sft_out/ --data curated.jsonl                                     # 1 GPU
    torchrun --nproc_per_node=8 align.py --ckpt sft_out/                      # the paper's settings
"""

import argparse
import math
import os
import time
from dataclasses import asdict, dataclass, field

from flags import VARIANTS, InputError, Parser, check_grounding, check_validation, common_flags
from flags import data_flags, grounding_flags, integer, parse_or_end, real, rollout_flags

WARMUP_STEPS = 200  # of the warm-up, at most
READY = 0.8  # share of pairs that both experts rank rightly at its end
RECENT = 5  # steps of which it is the mean


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["prism-vlm/rl_dataset:rl_training_data_5.9k.parquet"],
        help="prompts and teacher responses: SOURCE[:WEIGHT] ...")
    add("--steps", type=integer(0), default=500,
        help="steps of the game, which begin after those of the warm-up")
    add("--warmup-steps", type=integer(0), default=None, help="so many steps before it, in which "
        f"the discriminator learns alone (default: until both experts rank {READY} of the pairs "
        f"rightly, in the mean of {RECENT} steps, at most {WARMUP_STEPS})")
    add("--warmup-disc-lr", type=real(0, 1), default=1e-5,
        help="learning rate of the discriminator in them")
    add("--lr", type=real(0, 1), default=1e-6, help="learning rate of the policy")
    add = parser.add_argument_group("discriminator").add_argument
    add("--disc", default=None, help="its checkpoint, or that of its backbone (default: --ckpt)")
    add("--disc-variant", choices=VARIANTS, default="moe", help="moe or an ablation")
    add("--disc-lr", type=real(0, 1), default=1e-6, help="its learning rate")
    add("--disc-updates", type=integer(1), default=1,
        help="discriminator steps per policy step, on the same rollouts")
    add("--score-l2", type=real(0), default=1e-3, help="weight of the squared scores in its loss")
    grounding_flags(add)
    add = parser.add_argument_group("advantage").add_argument
    add("--alpha", type=real(0, 1), default=0.5,
        help="weight of perception; 1 - alpha is that of reasoning")
    add("--normalize", choices=("per-expert", "combined"), default="per-expert",
        help="before (1) or after")
    add("--credit", choices=("response", "segment"), default="response",
        help="segment: only the caption's tokens are rewarded for perception")
    add("--std-floor", type=real(0), default=0.1, help="smallest group std, in score units")
    add("--invalid-penalty", type=real(0), default=1.5,
        help="advantage of a broken format is minus this")
    rollout_flags(parser, prompts=4, max_new_tokens=6144)
    common_flags(parser, "align")
    data_flags(parser)
    args = parser.parse_args()
    check_grounding(args, "--prompts", args.prompts)
    check_validation(args)
    return args


if __name__ == "__main__":
    parse_or_end(parse_args)  # before torch is imported, which takes seconds

import numpy as np
import torch

from data import encode_response, look, measure_prompt, system_prompt
from discriminator import SCORES, Discriminator, add_mismatched, compare_tokenizers
from discriminator import expert_metrics, load_discriminator, make_pairs, save_discriminator
from discriminator import score_and_backward
from rl import Validation, Warn, gather_table, log_rollouts, prompt_feed, rollout_metrics
from rl import sample_records, show_first, update_policy
from rollout import parse_response, split_segments
from rows import set_attention, target_logprobs
from runtime import Skips, begin, choose_attention, end_step, identify, load_policy
from runtime import load_tokenizer, log, make_optimizer, make_sampler, read_json, refresh, run, save
from runtime import setup, shard

NOTHING_VALID = (
    "no rollout was valid, finished and with the three blocks: is --ckpt trained on them, is "
    "--max-new-tokens too small?"
)


# ------------------------------------------------------------------------------- pure functions
def masked_zscore(scores, valid, floor):
    """(score - mean) / std in each group over its valid members, unbiased std with a floor; scores,
    valid [B, N]. Groups with fewer than two valid members or with equal valid scores (to 1e-5:
    those of equal texts differ by rounding, which depends on the packing) are exactly 0, and so is
    every invalid member."""
    n = valid.sum(1, keepdim=True)
    mean = torch.where(valid, scores, 0.0).sum(1, keepdim=True) / n.clamp(min=1)
    centred = torch.where(valid, scores - mean, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    highest = torch.where(valid, scores, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(valid, scores, torch.inf).amin(1, keepdim=True)
    return torch.where(highest - lowest > 1e-5, centred / std.clamp(min=floor), 0.0)


def alignment_advantages(d_v, d_r, valid, alpha=0.5, normalize="per-expert", floor=0.1,
                         penalty=1.5, clip=10.0):
    """Scores [B, N] of both experts, valid [B, N] bool -> advantages [B, N], equations (1) and (3).

    per-expert: alpha * z(D_v) + (1 - alpha) * z(D_r); combined: z(alpha * D_v + (1 - alpha) * D_r);
    scores clipped at +-clip. An invalid rollout gets -penalty; a group without any valid one gets
    0: there is nothing to prefer.
    """
    d_v, d_r = d_v.clamp(-clip, clip), d_r.clamp(-clip, clip)
    if normalize == "per-expert":
        z_v, z_r = masked_zscore(d_v, valid, floor), masked_zscore(d_r, valid, floor)
        z = alpha * z_v + (1 - alpha) * z_r
    else:
        z = masked_zscore(alpha * d_v + (1 - alpha) * d_r, valid, floor)
    return torch.where(valid, z, -penalty * valid.any(1, keepdim=True))


# ------------------------------------------------------------------------------------- the game
def cut_segments(records, tokenizer):
    """Caption and trace of each rollout (None: cut at the length limit or format broken, it takes
    no part) and of its teacher's response."""
    teachers = {}
    for r in records:
        if r.rollout.finished:
            r.segments = split_segments(r.rollout.content, tokenizer)  # whichever EOS it ends in
        if r.group not in teachers:
            ids = encode_response(r.example.response, tokenizer)
            teachers[r.group] = split_segments(ids, tokenizer)
        r.teacher = teachers[r.group]


def score_records(disc, records, tokenizer, args, world, step=0):
    """What both experts say of each rollout and of its teacher, [n, 4] float32, NaN where invalid.
    One forward per pack, whose backward leaves the discriminator's gradient: (2) with an L2 term.

    Also, of all ranks and each group with a valid rollout, what they say of a teacher's response to
    another picture and of its own teacher's, [m, 4]: with --mismatch always, otherwise, as it costs
    a forward, every --log-rollouts steps (`step` counts from 1)."""
    rows = {}
    valid = torch.tensor([r.segments is not None for r in records], dtype=torch.bool)
    for r in (r for r in records if r.segments is not None):  # group by group, as the scores are
        if r.group not in rows:
            texts = r.example.response, r.teacher, []
            rows[r.group] = make_pairs(r.prompt, *texts, tokenizer, disc.variant)
        rows[r.group].students.append(r.segments)
    if args.mismatch > 0 or step and args.log_rollouts and step % args.log_rollouts == 0:
        add_mismatched(rows, world, tokenizer, chain=args.mismatch > 0)
    scores = torch.full((len(records), 4), math.nan)
    scores[valid], mismatched = score_and_backward(disc, list(rows.values()), args, world)
    return scores, torch.cat(world.gather(mismatched))


def give_scores(records, scores, args, world):
    """Scores [n, 4] of this rank's records into the records -> [B, N, 4] of all ranks."""
    for r, line in zip(records, scores.tolist()):
        r.scores = dict(zip(SCORES, line)) if r.segments is not None else {}
    return gather_table(records, scores.tolist(), args, world).float()


def give_advantages(records, scores, args):
    """(1) and (3): scores [B, N, 4] of all ranks, NaN if invalid -> each record's advantage; with
    --credit segment the trace of a valid one has its own, without D_v, which never saw it."""
    valid = ~scores[..., 0].isnan()
    d_v, d_r = scores[..., 0].nan_to_num(), scores[..., 1].nan_to_num()
    settings = valid, args.alpha, args.normalize, args.std_floor, args.invalid_penalty
    advantages = alignment_advantages(d_v, d_r, *settings).flatten().tolist()
    for r in records:
        r.advantage = advantages[r.index]
    if args.credit == "segment":
        of_traces = alignment_advantages(torch.zeros_like(d_v), d_r, *settings).flatten().tolist()
        for r in records:
            if r.segments is not None:
                r.trace_advantage = of_traces[r.index]


def update_discriminator(disc, optimizer, skips, lr, records, tokenizer, args, world):
    """A step on the gradient that scoring has left, then --disc-updates - 1 more on the same
    rollouts -> gradient norm of the last."""
    norm = skips.step(disc, optimizer, lr, args.clip, world, 0.0)
    for _ in range(args.disc_updates - 1):
        score_records(disc, records, tokenizer, args, world)
        norm = skips.step(disc, optimizer, lr, args.clip, world, 0.0)
    return norm


def grpo(args):
    """The flags with which rl.py's step of the policy is the game's."""
    return argparse.Namespace(**vars(args), algo="grpo", updates_per_rollout=1, kl=0.0, lr_warmup=0)


# ---------------------------------------------------------------------------------- the warm-up
@dataclass
class WarmUp:
    """The steps before the game, in which the discriminator learns alone: the reward of an expert
    that has learned nothing is noise. What is counted is the same on every rank, and a state keeps
    it for --resume."""

    steps: int  # that it takes; as long as it may end early, at most
    early: bool  # it ends once the experts are ready
    shares: list = field(default_factory=list)  # [acc_v, acc_r] of up to RECENT steps

    def total(self, args):
        """Steps of the whole run; as long as the warm-up may end early, at most."""
        return self.steps + args.steps

    def lr(self, step, args):
        """Learning rate of the discriminator."""
        return args.warmup_disc_lr if step < self.steps else args.disc_lr

    def watch(self, step, shares, world):
        """Note what share of the pairs of `step`, one of the warm-up, the experts have told apart,
        see `told_apart`, end it if that is enough, and say at its end whether it is."""
        if shares:  # some rollout was valid
            self.shares = [*self.shares[1 - RECENT :], shares]
        v, r = np.mean(self.shares or [[0.0, 0.0]], axis=0)
        ready = min(v, r) >= READY
        if self.early and ready and len(self.shares) == RECENT:
            self.steps = step + 1
        if step + 1 == self.steps and world.rank == 0:
            said = f"{self.steps} steps of warm-up, acc_v {v:.2f}, acc_r {r:.2f} in the last ones"
            if not ready:
                cure = "give a --disc that is warmed up, a higher --warmup-disc-lr or more steps"
                said = f"warning: {said}, not {READY}: it will reward noise; {cure}"
            print(said, flush=True)


def told_apart(experts, records, args, world):
    """Share of pairs that each expert ranks rightly among those whose texts differ; 1 where none
    do: a policy that has learned its teacher by heart leaves nothing to learn. None without pairs.
    """
    if not experts:
        return None
    valid = [r for r in records if r.segments is not None]
    captions = sum(r.segments[0] == r.teacher[0] for r in valid)
    traces = sum(r.segments[1] == r.teacher[1] for r in valid)
    if args.disc_variant == "dense":  # one score for both
        captions = traces = sum(r.segments == r.teacher for r in valid)
    *equal, n = world.sum(captions, traces, len(valid))
    shares = []
    for name, same in zip("vr", equal):
        right = n * experts[f"acc_{name}"] - same / 2  # a tie counts as half
        shares.append(float(right / (n - same)) if n > same else 1.0)
    return shares


def start_warm_up(args, world):
    """The WarmUp of --warmup-steps, or the one that --resume continues."""
    if world.state:
        progress = read_json(os.path.join(world.state, "progress.json"))
        return WarmUp(**progress["warm_up"])
    if args.warmup_steps is None:
        return WarmUp(WARMUP_STEPS, early=True)
    return WarmUp(args.warmup_steps, early=False)


# ------------------------------------------------------------------------------------ the stage
def measure_taught(example, *tools):
    """`measure_prompt`; an example without a well-formed teacher response is of no use here."""
    response = parse_response(example.response or "")
    if response is None or not response.answer:  # an empty block would tell teacher from student
        raise InputError(f"{example.id}: the row has no teacher response of <caption>, <think> "
                         "and <answer> blocks")
    return measure_prompt(example, *tools)


def load_players(args, attn, world):
    """-> policy, the model to sample from, discriminator; none of them sharded yet."""
    policy = set_attention(load_policy(args.ckpt, world=world), attn)
    sampler = make_sampler(policy, world)
    disc = load_discriminator(args.disc or args.ckpt, args.disc_variant, attn, args.readout, world)
    return policy, sampler, disc


def main():
    args = parse_args()
    world = setup(args, {"--prompts x --rollouts": args.prompts * args.n})
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    compare_tokenizers(tokenizer, args.disc)
    tools = tokenizer, image_processor, system_prompt(args), args
    found = look(args.data, lambda example: measure_taught(example, *tools), args, world)
    validate = Validation(tools, world)
    identify(args, world, found.identity)  # a --resume of another run ends here
    policy, sampler, disc = load_players(args, choose_attention(args.attn, world), world)
    shard(policy, [*policy.model.language_model.layers, policy.model.visual], world,
          target_logprobs, checkpointing=args.checkpointing)  # the rest is the root
    shard(disc, [*disc.backbone.language_model.layers, disc.backbone.visual], world,
          Discriminator.scores, disc.heads.values(), args.checkpointing)
    optimizer = make_optimizer(policy, args.lr, args.weight_decay)
    disc_optimizer = make_optimizer(disc, args.disc_lr, args.weight_decay)
    parts = {"policy": (policy, optimizer), "discriminator": (disc, disc_optimizer)}
    skips, disc_skips, warn, warm_up = Skips(), Skips(), Warn(world), start_warm_up(args, world)
    progress, metrics = begin(args, world, parts, warm_up.total(args), skips, disc_skips)
    feed = prompt_feed(found, *tools, world, progress, warm_up.total(args))
    while (step := progress["step"]) < warm_up.total(args):
        began = time.time()
        # rollout
        refresh(sampler, policy)  # they come from the newest weights
        records = sample_records(sampler, feed, tokenizer, args, world, step)
        sampled_at = time.time()
        # reward
        cut_segments(records, tokenizer)
        mine, mismatched = score_records(disc, records, tokenizer, args, world, step + 1)
        scores = give_scores(records, mine, args, world)  # [B, N, 4] of all ranks
        show_first(world, step, records, tokenizer)
        # advantage
        give_advantages(records, scores, args)
        # update discriminator
        experts = expert_metrics(scores.flatten(0, 1), mismatched)  # {}: no rollout was valid
        play = disc, disc_optimizer, disc_skips, warm_up.lr(step, args), records
        disc_norm = update_discriminator(*play, tokenizer, args, world) if experts else None
        scored_at, update = time.time(), {}
        # update policy
        if step >= warm_up.steps:
            update = update_policy(policy, None, optimizer, records, skips, step, grpo(args), world)
        else:
            warm_up.watch(step, told_apart(experts, records, args, world), world)
        # log
        progress = {"step": step + 1, **feed.progress(), "warm_up": asdict(warm_up)}
        metrics = {"step": step + 1, "valid": (~scores[..., 0].isnan()).float().mean().item(),
                   **experts, **update, **rollout_metrics(records, world, args), **feed.counts,
                   **validate(sampler, policy, step + 1),
                   "disc_grad_norm": disc_norm, "skipped_steps": skips.total + disc_skips.total,
                   "seconds_rollout": round(sampled_at - began, 3),
                   "seconds_disc": round(scored_at - sampled_at, 3),
                   "seconds": round(time.time() - began, 3)}
        log(world, args.out, metrics)
        log_rollouts(world, args.out, step + 1, records, args.log_rollouts)
        warn(metrics["valid"] == 0, NOTHING_VALID, records)
        # save
        end_step(args, world, parts, progress, step + 1 == warm_up.total(args), skips, disc_skips)
    feed.close()
    save_discriminator(disc, os.path.join(args.out, "discriminator"), world, args.ckpt)
    save(policy, args.out, world, "align", args, progress["step"], metrics)


if __name__ == "__main__":
    run(main)
