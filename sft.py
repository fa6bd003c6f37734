"""Stage 1, supervised fine-tuning.

    L_SFT = - E_(x, y+) [ sum_t log pi(y_t | x, y_<t) ] / (target tokens of the global batch)

One epoch over the demonstrations, AdamW, lr 1e-5, cosine with 10 % warm-up, only response tokens (with the EOS) trained.
Batches are packed, not padded: each example is a row [prompt | response] of the shared-prompt machinery in rows.py, so
no padding token is ever computed, and text-only and multi-image rows mix.

Deviations from the authors' script (LLaMA-Factory): (1) the loss is divided by the target tokens of the whole global
batch, not by a mean of per-rank means; (2) an over-long demonstration is dropped and counted, not cut; (3) the vision
tower is trained as well (a reproduction note says that theirs is frozen).

    python sft.py --ckpt Qwen/Qwen3-VL-4B-Instruct --data demos.jsonl --out sft_out/                           # 1 GPU
    torchrun --nproc_per_node=8 sft.py --ckpt Qwen/Qwen3-VL-4B-Instruct --data prism-vlm/gemini_distill --out sft_out/
"""

import argparse
import math
import time

from data import Feed, data_flags, encode_prompt, encode_response, load_data, system_prompt
from rows import pack_logprobs, pack_rows, set_attention, split_rows, target_logprobs
from runtime import InputError, Parser, Skips, begin, choose_attention, common_flags, cosine, end_step, load_policy
from runtime import integer, load_tokenizer, log, real, make_optimizer, most, run, save, setup, shard


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["prism-vlm/gemini_distill"], help="demonstrations: SOURCE[:WEIGHT] ...")
    parser.add_argument("--batch", type=integer(1), default=128, help="examples per step, over all processes")
    parser.add_argument("--epochs", type=real(above=0), default=1.0, help="passes over the data")
    parser.add_argument("--steps", type=integer(0), default=None, help="steps instead of --epochs")
    parser.add_argument("--lr", type=real(0, 1), default=1e-5, help="peak learning rate")
    parser.add_argument("--warmup", type=real(0, 1), default=0.1, help="share of the steps with rising learning rate")
    parser.add_argument("--max-length", type=integer(1), default=8192, help="longer demonstrations are dropped and counted")
    parser.add_argument("--truncate", action="store_true", help="cut them instead (a prompt is never cut)")
    common_flags(parser, "sft")
    data_flags(parser)
    return parser.parse_args()


def need_response(example):
    if not example.response:
        raise InputError(f"{example.id}: the row has no response to learn from (columns response, messages or teacher_*)")


def encode_demonstration(example, tokenizer, image_processor, args, system):
    """Example -> (Prompt, response ids with the EOS), or None when it is too long."""
    need_response(example)
    prompt = encode_prompt(example, tokenizer, image_processor, args.max_prompt, system)
    ids = encode_response(example.response, tokenizer)
    if prompt is None:
        return None
    room = args.max_length - len(prompt.input_ids)
    if len(ids) > room and not (args.truncate and room > 0):
        return None
    return prompt, ids[:room]


def show_example(prompt, ids, tokenizer):
    """Print one example as the model sees it; trained tokens stand between the arrows, the EOS with its id."""
    text = tokenizer.decode(prompt.input_ids).replace("<|image_pad|>" * 2, "")
    print(f"--- step 0, first example\n{text}>>>{tokenizer.decode(ids)}<<< (EOS id {ids[-1]})\n---", flush=True)


def update(policy, batch, args, world):
    """Accumulate the gradient of one global batch; batch: this rank's (Prompt, ids) pairs -> (loss, target tokens)."""
    tokens = world.sum(sum(len(ids) for _, ids in batch))[0]
    rows = [(len(prompt.input_ids), [len(ids)]) for prompt, ids in batch]
    packs = [[batch[r] for r, _ in pack] for pack in split_rows(rows, args.max_tokens)]
    loss = 0.0
    for i in range(most(len(packs), world)):
        part = packs[min(i, len(packs) - 1)]
        pack = pack_rows([prompt for prompt, _ in part], [(r, ids) for r, (_, ids) in enumerate(part)], world.device)
        share = -pack_logprobs(policy, pack)[0].sum() / tokens * (i < len(packs))
        (share * world.size).backward()  # FSDP averages over ranks, the loss is already a share of the global mean
        loss += share.item()
    return world.sum(loss)[0], tokens


def main():
    args = parse_args()
    world = setup(args, {"--batch": args.batch})
    examples = load_data(args.data, args, need_response)
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    system = system_prompt(args)
    attn = choose_attention(args.attn, world)
    policy = set_attention(load_policy(args.ckpt), attn)
    units = [*policy.model.language_model.layers, policy.model.visual]
    policy = shard(policy.to(world.device).train(), units, world, target_logprobs, checkpointing=args.checkpointing)
    optimizer = make_optimizer(policy, args.lr, args.weight_decay)
    steps = args.steps if args.steps is not None else max(1, math.ceil(len(examples) * args.epochs / args.batch))
    parts, skips = {"policy": (policy, optimizer)}, Skips()
    progress, row = begin(args, world, parts, steps, skips)
    encode = lambda example: encode_demonstration(example, tokenizer, image_processor, args, system)
    feed = Feed(examples, encode, args, world, progress)
    for step in range(progress["step"], steps):
        began = time.time()
        batch = feed.batch(args.batch, step, lambda item: len(item[0].input_ids) + len(item[1]))
        if step == 0 and world.rank == 0:
            show_example(*batch[0], tokenizer)
        # update policy
        loss, tokens = update(policy, batch, args, world)
        lr = cosine(step, steps, args.lr, args.warmup)
        norm = skips.step(policy, optimizer, lr, args.clip, world, loss)
        # log
        progress = {"step": step + 1, **feed.progress()}
        row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr, "tokens": int(tokens)}
        row |= {"dropped": feed.dropped, "bad": feed.bad, "skipped_steps": skips.total, "seconds": round(time.time() - began, 3)}
        log(world, args.out, row)
        # save
        end_step(args, world, parts, progress, step + 1 == steps, skips)
    feed.close()
    save(policy, args.out, world, "sft", args, steps, row)


if __name__ == "__main__":
    run(main)
