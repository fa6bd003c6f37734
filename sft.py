"""Stage 1, supervised fine-tuning.

    L_SFT = - E_(x, y+) [ sum_t log pi(y_t | x, y_<t) ] / (target tokens of the global batch)

One epoch over the demonstrations, AdamW, lr 1e-5, cosine with 10 % warm-up, only response tokens
(with the EOS) trained. Batches are packed, not padded: each example is a row [prompt | response] of
the shared-prompt machinery in rows.py, so no padding token is ever computed, and text-only and
multi-image rows mix.

Deviations from the authors' script (LLaMA-Factory): (1) the loss is divided by the target tokens of
the whole global batch, not by a mean of per-rank means; (2) an over-long demonstration is dropped
and counted, not cut; (3) the vision tower is trained as well (a reproduction note says that theirs
is frozen, as it is here with --freeze vision).

    python sft.py --ckpt Qwen/Qwen3-VL-4B-Instruct --data demos.jsonl --out sft_out/         # 1 GPU
    torchrun --nproc_per_node=8 sft.py --ckpt Qwen/Qwen3-VL-4B-Instruct \
        --data prism-vlm/gemini_public_mmr1 prism-vlm/gemini_distill --out sft_out/
"""

import math
import time
from dataclasses import replace

from flags import InputError, Parser, common_flags, data_flags, integer, lora_flag, parse_or_end
from flags import real


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["prism-vlm/gemini_public_mmr1", "prism-vlm/gemini_distill"],
        help="demonstrations: SOURCE[:WEIGHT] ...")
    add("--batch", type=integer(1), default=128, help="examples per step, over all processes")
    add("--epochs", type=real(above=0), default=1.0, help="passes over the data")
    add("--steps", type=integer(0), default=None, help="steps instead of --epochs")
    add("--lr", type=real(0, 1), default=1e-5, help="peak learning rate")
    add("--warmup", type=real(0, 1), default=0.1, help="share of steps with rising learning rate")
    add("--max-length", type=integer(1), default=8192,
        help="longer demonstrations are dropped and counted")
    add("--truncate", action="store_true", help="cut them instead (a prompt is never cut)")
    add("--freeze", choices=("vision",), default=None,
        help="leave the vision tower with its mergers as it is")
    lora_flag(parser)
    common_flags(parser, "sft")
    data_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_or_end(parse_args)  # before torch is imported, which takes seconds

from data import Feed, encode_prompt, encode_response, look, measure_prompt, system_prompt
from rollout import parse_response
from rows import IDLE, pack_logprobs, pack_rows, set_attention, split_rows, target_logprobs
from runtime import Skips, add_lora, begin, choose_attention, cosine, end_step, identify
from runtime import load_policy, load_tokenizer, log, make_optimizer, most, run, save, setup, shard
from runtime import start_lora


# ------------------------------------------------------------------------------------- examples
def turns(example):
    """An example for each turn of the assistant: of a chat with several all are trained, each after
    what was said before it."""
    for k, message in enumerate(example.prompt):
        if message["role"] == "assistant":
            before = example.prompt[:k]
            seen = sum(turn["content"].count("<image>") for turn in before)
            images = example.images[:seen] if seen else example.images
            yield replace(example, prompt=before, images=images, response=message["content"])
    yield example


def measure_demonstration(example, tokenizer, image_processor, system, args):
    """-> (tokens of the prompt, of the response as it will be trained), summed over the turns of
    the assistant; None when one of them is too long."""
    prompts = responses = 0
    for turn in turns(example):
        if not turn.response:
            raise InputError(f"{turn.id}: the row has no response to learn from "
                             "(columns response, messages or teacher_*)")
        prompt = measure_prompt(turn, tokenizer, image_processor, system, args)
        response = len(encode_response(turn.response, tokenizer))
        if prompt is None:
            return None
        room = args.max_length - prompt[0]
        if response > room and not (args.truncate and room > 0):
            return None
        prompts, responses = prompts + prompt[0], responses + min(response, room)
    return prompts, responses


def encode_demonstration(example, tokenizer, image_processor, system, args):
    """Example -> [(Prompt, response ids with the EOS)], one for each turn of the assistant."""
    pairs = []
    for turn in turns(example):
        prompt = encode_prompt(turn, tokenizer, image_processor, None, system)
        room = args.max_length - len(prompt.input_ids)
        pairs.append((prompt, encode_response(turn.response, tokenizer)[:room]))
    return pairs


def show_example(prompt, ids, tokenizer):
    """Print one example as the model sees it; trained tokens stand between the arrows."""
    text = tokenizer.decode(prompt.input_ids).replace("<|image_pad|>" * 2, "")
    response = f">>>{tokenizer.decode(ids)}<<< (EOS id {ids[-1]})"
    print(f"--- step 0, first example\n{text}{response}\n---", flush=True)


def warn_of_format(found, system):
    """Print a warning where the prompts ask for three blocks and the responses have none."""
    first = [found.examples[i] for i in found.usable[:100]]
    asked = [e for e in first if "<caption>" in (system or "") + e.prompt[0]["content"]]
    without = [e for e in asked if parse_response(e.response) is None]
    if len(without) > len(asked) / 2:
        print(f"warning: {len(without)} of the first {len(asked)} responses lack the blocks "
              "<caption>, <think>, <answer> that their prompts ask for; the first is "
              f"{without[0].id}", flush=True)


# --------------------------------------------------------------------------------------- update
def accumulate_gradient(policy, batch, args, world):
    """Backward of L_SFT over one global batch; batch: this rank's (Prompt, ids) pairs -> (loss,
    target tokens). Every rank runs the same number of forwards, the last of them perhaps idle."""
    tokens = world.sum(sum(len(ids) for _, ids in batch))[0]
    rows = [(len(prompt.input_ids), [len(ids)]) for prompt, ids in batch]
    packs, loss = [], 0.0
    for pack in split_rows(rows, args.max_tokens):
        packs.append([batch[r] for r, _ in pack])
    for i in range(most(len(packs), world)):
        part = packs[i] if i < len(packs) else [(IDLE, [0])]
        prompts = [prompt for prompt, _ in part]
        branches = [(r, ids) for r, (_, ids) in enumerate(part)]
        pack = pack_rows(prompts, branches, world.device)  # the images are encoded in its forward
        logp, _ = pack_logprobs(policy, pack, entropies=False)
        share = -logp.sum() / tokens * (i < len(packs))
        (share * world.size).backward()  # FSDP averages over ranks, the share is of the global mean
        loss += share.item()
    return world.sum(loss)[0], tokens


# ----------------------------------------------------------------------------------------- main
def main():
    args = parse_args()
    world = setup(args, {"--batch": args.batch})
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    tools = tokenizer, image_processor, system_prompt(args), args
    found = look(args.data, lambda example: measure_demonstration(example, *tools), args, world)
    steps = args.steps
    if steps is None:
        steps = max(1, math.ceil(len(found.usable) * args.epochs / args.batch))

    identify(args, world, found.identity)  # a --resume of another run ends here

    attn = choose_attention(args.attn, world)
    policy = set_attention(load_policy(args.ckpt, world=world), attn).train()
    if args.freeze:
        policy.model.visual.requires_grad_(False)  # a unit of its own, in which all are alike
    add_lora(policy, args.lora, world)
    units = [*policy.model.language_model.layers, policy.model.visual]  # then the rest, as the root
    policy = shard(policy, units, world, target_logprobs, checkpointing=args.checkpointing)
    start_lora(policy, args.seed)
    optimizer = make_optimizer(policy, args.lr, args.weight_decay)
    parts, skips = {"policy": (policy, optimizer)}, Skips()
    progress, metrics = begin(args, world, parts, steps, skips)
    feed = Feed(found, lambda example: encode_demonstration(example, *tools), args, world, progress)
    feed.plan(steps, args.batch)
    if world.rank == 0:
        warn_of_format(found, tools[2])

    for step in range(progress["step"], steps):
        began = time.time()
        # data
        batch = sum(feed.batch(args.batch, step), [])  # of (Prompt, response ids)
        if step == 0 and world.rank == 0 and batch:
            show_example(*batch[0], tokenizer)
        # update policy
        loss, tokens = accumulate_gradient(policy, batch, args, world)
        lr = cosine(step, steps, args.lr, args.warmup)
        norm = skips.step(policy, optimizer, lr, args.clip, world, loss)
        # log
        progress = {"step": step + 1, **feed.progress()}
        metrics = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr,
                   "tokens": int(tokens), **feed.counts, "skipped_steps": skips.total,
                   "seconds": round(time.time() - began, 3)}
        log(world, args.out, metrics)
        # save
        end_step(args, world, parts, progress, step + 1 == steps, skips)
    feed.close()
    save(policy, args.out, world, "sft", args, steps, metrics)


if __name__ == "__main__":
    run(main)
