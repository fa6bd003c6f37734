"""The discriminator: a mixture of two experts that scores what a response sees and how it reasons.

    D_v(x, c) perception: the caption c        D_r(x, t) reasoning: the trace t        x: prompt with its images
    (2)  L_k = -E[ log sigmoid( D_k(x, y_k+) - D_k(x, y_k-) ) ],   k in {v, r}         Bradley-Terry, one loss per expert

Backbone: a Qwen3-VL without lm_head. In every decoder layer the MLP becomes three copies of itself: shared (prompt
tokens), perception (caption tokens), reasoning (trace tokens); two float32 linear heads without bias read the last token
of a segment. A pack holds [prompts | captions | traces], so routing is slicing, every token costs one MLP, D_v's loss
never touches the reasoning expert nor the other way round, and before the first step both experts equal the dense model.

Deviations from the paper and the authors' code: (1) hard routing by segment instead of a learned top-2 router over four
experts; (2) two heads instead of one; (3) all segments are read at one and the same token (EOS), are cut by one function
and use the policy's M-RoPE positions and image scale, so that no artefact tells teacher from student; (4) heads start at
zero: before it has learned anything the discriminator rewards nothing.

Warm-up on offline (teacher, student) pairs, for `align.py --disc disc_out/`, and diagnosis: D_v and D_r of every response of
a data set (of warm-up pairs the teacher's), to filter or label it.

    torchrun --nproc_per_node=8 discriminator.py --pairs warmup_pairs.jsonl --ckpt Qwen/Qwen3-VL-2B-Instruct --out disc_out/
    python discriminator.py --score responses.jsonl --ckpt align_out/discriminator --out scores/
"""

import argparse
import copy
import json
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, Qwen3VLModel, Qwen3VLMoeModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from data import Feed, data_flags, encode_prompt, encode_response, load_data, load_examples, system_prompt
from rollout import parse_response, split_segments
from rows import Prompt, hidden_states, pack_rows, set_attention, split_rows
from runtime import InputError, Parser, Skips, begin, check_checkpoint, check_loaded, choose_attention, common_flags
from runtime import copy_processor, end_step, full_weights, load_tokenizer, log, make_optimizer, most, run, setup, shard
from runtime import integer, real, write_json, write_meta, write_rows, writing

VARIANTS = ("moe", "dense", "text-only", "learned")
RELEASED_HEADS = ("v_head.1.weight", "v_head.summary.weight")  # the one head of a released discriminator, in its shards


class SegmentMLP(nn.Module):
    """Three copies of a dense MLP; `sizes` [prompt, caption, trace tokens] of the pack is one list shared by all layers."""

    def __init__(self, mlp, sizes):
        super().__init__()
        self.shared, self.perception, self.reasoning = mlp, copy.deepcopy(mlp), copy.deepcopy(mlp)
        self.sizes = sizes

    def forward(self, hidden):  # [1, T, D] -> [1, T, D]
        prompt, caption, trace = hidden.split(self.sizes, dim=1)
        return torch.cat([self.shared(prompt), self.perception(caption), self.reasoning(trace)], dim=1)


class Discriminator(nn.Module):
    """variant: "moe" (default), "dense" (one expert, one score for the whole response), "text-only" (no image), "learned" (a
    Qwen3-VL-MoE backbone as the authors released it: top-k routing, a load-balancing loss, one head for both segments)."""

    def __init__(self, backbone, variant="moe"):
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(f"--disc-variant {variant}: choose one of {', '.join(VARIANTS)}")
        self.backbone, self.variant, self.sizes, self.routed = backbone, variant, [0, 0, 0], []
        for layer in backbone.language_model.layers:
            if variant == "learned" and hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(lambda module, inputs, output: self.routed.append(output[0]))
            elif variant in ("moe", "text-only"):
                layer.mlp = SegmentMLP(layer.mlp, self.sizes)
        heads = ("perception", "reasoning") if variant in ("moe", "text-only") else ("perception",)
        size = backbone.config.text_config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(size, 1, bias=False, dtype=torch.float32) for name in heads})
        for head in self.heads.values():
            nn.init.zeros_(head.weight)

    def scores(self, prompts, captions, traces):
        """prompts: list of Prompt. captions, traces: equally long lists of (index into prompts, token ids); pair i is one
        response. -> D_v [n], D_r [n], float32, with gradient. The dense variant gives its one score twice."""
        n = len(captions)
        if self.variant == "dense":  # the whole response is one branch; the caption's own read-out token is dropped
            branches = [(p, caption[:-1] + trace) for (p, caption), (_, trace) in zip(captions, traces)]
        else:
            branches = captions + traces
        pack = pack_rows(prompts, branches, self.heads["perception"].weight.device)
        self.sizes[:] = pack.prompt_tokens, sum(pack.lengths[:n]), sum(pack.lengths[n:])
        self.routed.clear()
        ends = hidden_states(self.backbone, pack.inputs)[pack.ends].float()
        if self.variant == "dense":
            d = self.heads["perception"](ends)[:, 0]
            return d, d
        reasoning = self.heads["perception" if self.variant == "learned" else "reasoning"]
        return self.heads["perception"](ends[:n])[:, 0], reasoning(ends[n:])[:, 0]

    def balance(self):
        """The load-balancing loss of the last forward, with its coefficient (Switch Transformer, arXiv 2101.03961, equation
        4): the one term that depends on how rows are packed, because it is a product of means. 0 without learned routing."""
        if self.variant != "learned":
            return 0.0
        text = self.backbone.config.text_config
        loss = load_balancing_loss_func(tuple(self.routed), text.num_experts, text.num_experts_per_tok)
        return text.router_aux_loss_coef * loss


def bradley_terry(teacher, student, valid, count=None):
    """(2) over the valid pairs, -log sigmoid(teacher - student). All [n]; `count`: valid pairs of the whole global batch
    (default: of this call), so that the gradient does not depend on the split. Without a valid pair it is an exact 0."""
    losses = torch.where(valid, -F.logsigmoid(teacher - student), 0.0)
    return losses.sum() / max(1, valid.sum() if count is None else count)


def pair_loss(disc, rows, count, score_l2):
    """(2) for both experts over the (teacher, student) pairs of one forward, plus score_l2 / 2 times the squared scores.

    rows: list of (Prompt, teacher, [students]); a teacher or student is its (caption ids, trace ids). count: pairs of the
    whole global batch. -> loss (with a zero that reaches every score: a rank without pairs still takes part in the
    collectives), student scores [2, pairs], teacher scores [2, pairs], in the order of the rows."""
    responses = [(r, s) for r, (_, teacher, students) in enumerate(rows) for s in [teacher, *students]]
    captions, traces = ([(r, s[k]) for r, s in responses] for k in (0, 1))
    d = torch.stack(disc.scores([prompt for prompt, _, _ in rows], captions, traces))  # [2, responses]
    student, teacher, at = [], [], 0
    for _, _, students in rows:
        student += range(at + 1, at + 1 + len(students))
        teacher += [at] * len(students)
        at += 1 + len(students)
    s, t = d[:, student], d[:, teacher]
    valid = torch.ones_like(s[0], dtype=torch.bool)
    loss = sum(bradley_terry(t[k], s[k], valid, count) for k in (0, 1))
    loss = loss + score_l2 * 0.5 * (s.square() + t.square()).sum() / count + d.sum() * 0
    return loss + disc.balance() * (len(student) / count), s, t


def row_tokens(row):
    prompt, teacher, students = row
    return len(prompt.input_ids) + sum(map(len, teacher)) + sum(len(part) for student in students for part in student)


def learn_pairs(disc, rows, spare, count, args, world):
    """One forward per pack: the scores of this rank's rows (see pair_loss), and the backward of the loss. A rank that has none
    left runs the teacher of the row `spare`, so that all take part in the collectives.
    -> [pairs, 4] float32 on the CPU, in the order of the rows: D_v, D_r of the student, then of its teacher."""
    lengths = [(row_tokens((prompt, teacher, [])), [sum(map(len, student)) for student in students])
               for prompt, teacher, students in rows]  # fmt: skip
    packs, scores = list(split_rows(lengths, args.max_tokens)), [torch.empty(0, 4)]
    for p in range(most(len(packs), world)):
        part = [(*rows[r][:2], [rows[r][2][b] for b in branches]) for r, branches in packs[p]] if p < len(packs) else []
        loss, student, teacher = pair_loss(disc, part or [(*spare[:2], [])], count, args.score_l2)
        (loss * world.size).backward()  # FSDP averages over ranks, the loss is already a share of the global mean
        scores.append(torch.cat([student, teacher]).T.detach().float().cpu())
    return torch.cat(scores)


def expert_metrics(scores):
    """Per expert over all valid pairs of the step: gap = mean(teacher - student), acc = share of pairs ranked rightly
    (0.5 is the equilibrium, not a failure), loss (2). Absent when no rollout was valid."""
    scores = scores[~scores[:, 0].isnan()]
    out = {}
    if len(scores):
        for k, name in enumerate(("v", "r")):
            student, teacher = scores[:, k], scores[:, k + 2]
            gap = teacher - student
            acc = torch.where(gap.abs() < 1e-5, 0.5, (gap > 0).float())  # a tie (the same text, up to rounding) is a coin toss
            out |= {f"gap_{name}": gap.mean().item(), f"acc_{name}": acc.mean().item()}
            out |= {f"loss_{name}": bradley_terry(teacher, student, torch.ones_like(gap, dtype=torch.bool)).item()}
            out |= {f"score_{name}": student.mean().item()}
    return out


def without_images(prompt, tokenizer):
    """The same prompt as a text-only reader sees it: image tokens and their markers removed."""
    drop = torch.tensor(tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]))
    ids = prompt.input_ids[~torch.isin(prompt.input_ids, drop)]
    return Prompt(ids, torch.arange(len(ids)).expand(3, -1), None, None)


def reader(prompt, tokenizer, variant):
    """The prompt as the discriminator sees it."""
    return without_images(prompt, tokenizer) if variant == "text-only" else prompt


def stored_variant(path):
    """The variant of a folder that `save_discriminator` wrote, else None."""
    settings = os.path.join(path, "discriminator.json")
    if not os.path.isfile(settings):
        return None
    with open(settings) as file:
        return json.load(file)["variant"]


def load_discriminator(path, variant="moe", attn="sdpa"):
    """From a folder written by `save_discriminator`, fresh on the backbone of any Qwen3-VL checkpoint, or the released
    Qwen3-VL-MoE discriminator with its head (then the variant is "learned")."""
    check_checkpoint(path)
    stored = stored_variant(path)
    if stored not in (None, variant) and (stored, variant) != ("learned", "moe"):
        raise InputError(f"--disc {path} was trained as {stored}; pass --disc-variant {stored}")
    try:
        routed = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type == "qwen3_vl_moe"
        if variant == "learned" and not routed:
            raise InputError(f"{path} is no discriminator: neither a folder that align.py wrote nor a Qwen3-VL-MoE checkpoint")
        if routed and variant not in ("moe", "learned"):
            raise InputError(f"--disc {path} is a Qwen3-VL-MoE: it has one variant, learned, not {variant}")
        variant, kind = ("learned", Qwen3VLMoeModel) if routed else (variant, Qwen3VLModel)
        if stored:
            backbone = kind(kind.config_class.from_pretrained(path))
        else:
            backbone, info = kind.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            known = {"lm_head.weight", *(RELEASED_HEADS if routed else ())}
            check_loaded(path, {**info, "unexpected_keys": set(info["unexpected_keys"]) - known})
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"--disc {path}: {str(error).splitlines()[0]}") from error
    set_attention(backbone, attn)
    model = Discriminator(backbone, variant)
    if stored:
        weights = load_file(os.path.join(path, "model.safetensors"))
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    elif routed:
        model.heads["perception"].weight.data.copy_(released_head(path))
    return model


def released_head(path):
    """The head [1, hidden] of a released discriminator, from its shards (never from value_head.pt, which is a pickle)."""
    if not os.path.isdir(path):
        from huggingface_hub import snapshot_download

        path = snapshot_download(path, allow_patterns="*.safetensors")
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(path, name), framework="pt") as shard:
                for key in set(RELEASED_HEADS) & set(shard.keys()):
                    return shard.get_tensor(key).float().view(1, -1)
    raise InputError(f"--disc {path}: no head: none of {', '.join(RELEASED_HEADS)} is in its *.safetensors")


def compare_tokenizers(tokenizer, path):
    """The rollouts' ids go into the discriminator as they are: InputError unless `path` has the policy's vocabulary."""
    if path is not None and load_tokenizer(path)[0].get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--disc {path}: its tokenizer differs from that of --ckpt; both must have the same vocabulary")


def save_discriminator(model, out, world, ckpt):
    """Write OUT: float32 weights of backbone and heads, config.json, discriminator.json and the tokenizer and processor
    files of `ckpt`; all ranks must call it."""
    weights = full_weights(model)
    if world.rank == 0:
        with writing(out):
            os.makedirs(out, exist_ok=True)
            model.backbone.config.save_pretrained(out)
            copy_processor(ckpt, out)
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, os.path.join(out, "model.safetensors"))
            write_json(os.path.join(out, "discriminator.json"), {"variant": model.variant})


# ---------------------------------------------------------------------------------------------------------------- warm-up
def need_pair(example):
    """Both responses well-formed, and both or neither with an answer: otherwise that alone would tell them apart."""
    found = [parse_response(text or "") for text in (example.response, example.rejected)]
    for who, response in zip(("teacher", "student"), found):
        if response is None:
            raise InputError(f"{example.id}: the row has no well-formed {who} response (columns {who}_caption and {who}_cot)")
    if bool(found[0].answer) != bool(found[1].answer):
        raise InputError(f"{example.id}: of teacher_cot and student_cot only one has an answer")


def encode_pair(example, tokenizer, image_processor, args, system):
    """Example with a teacher's and a student's response -> (Prompt, teacher, [student]), or None when it is too long."""
    need_pair(example)
    segments = [split_segments(encode_response(text, tokenizer), tokenizer) for text in (example.response, example.rejected)]
    prompt = encode_prompt(example, tokenizer, image_processor, args.max_prompt, system)
    return prompt and (reader(prompt, tokenizer, args.disc_variant), segments[0], segments[1:])


def warm_up(args, world):
    """Train a discriminator on offline (teacher, student) pairs and write it to --out, as align.py takes it with --disc."""
    examples = load_data(args.pairs, args, need_pair)
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    attn, system = choose_attention(args.attn, world), system_prompt(args)
    disc = load_discriminator(args.ckpt, args.disc_variant, attn).to(world.device)
    args.disc_variant = disc.variant
    units, heads = [*disc.backbone.language_model.layers, disc.backbone.visual], disc.heads.values()
    disc = shard(disc, units, world, Discriminator.scores, heads, args.checkpointing)
    optimizer = make_optimizer(disc, args.lr, args.weight_decay)
    steps = args.steps if args.steps is not None else max(1, len(examples) // args.batch)
    parts, skips = {"discriminator": (disc, optimizer)}, Skips()
    progress, row = begin(args, world, parts, steps, skips)
    encode = lambda example: encode_pair(example, tokenizer, image_processor, args, system)
    feed = Feed(examples, encode, args, world, progress)
    for step in range(progress["step"], steps):
        began = time.time()
        batch = feed.batch(args.batch, step, row_tokens)
        scores = torch.cat(world.gather(learn_pairs(disc, batch, batch[0], args.batch, args, world)))
        norm = skips.step(disc, optimizer, args.lr, args.clip, world, 0.0)
        row = {"step": step + 1, **expert_metrics(scores), "grad_norm": norm, "dropped": feed.dropped, "bad": feed.bad}
        row |= {"skipped_steps": skips.total, "seconds": round(time.time() - began, 3)}
        log(world, args.out, row)
        progress = {"step": step + 1, **feed.progress()}
        end_step(args, world, parts, progress, step + 1 == steps, skips)
    feed.close()
    save_discriminator(disc, args.out, world, args.ckpt)
    if world.rank == 0:
        write_meta(args.out, "pairs", args, progress["step"], row)
        print(f"saved {args.out}", flush=True)


# ---------------------------------------------------------------------------------------------------------------- scoring
def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pairs", nargs="+", metavar="SOURCE", help="warm-up pairs to train on, any format of load_examples")
    what.add_argument("--score", nargs="+", metavar="SOURCE", help="responses to score, any format of load_examples")
    parser.add_argument("--alpha", type=real(0, 1), default=0.5, help="weight of perception in the combined score")
    group = parser.add_argument_group("warm-up")
    group.add_argument("--batch", type=integer(1), default=64, help="pairs per step, over all processes")
    group.add_argument("--steps", type=integer(0), default=None, help="steps (default: one pass over the pairs)")
    group.add_argument("--lr", type=real(0, 1), default=1e-6, help="learning rate")
    group.add_argument("--disc-variant", choices=VARIANTS, default="moe", help="what to build on --ckpt")
    group.add_argument("--score-l2", type=real(0), default=1e-3, help="weight of the squared scores in the loss")
    common_flags(parser, "disc")
    data_flags(parser)
    return parser.parse_args()


@torch.no_grad()
def score_examples(model, examples, indices, tokenizer, image_processor, args):
    """-> [{"id", "perception", "reasoning", "combined"}] of a few examples, packed; the scores are None, and `reason` says
    why, for a response without the three blocks, an over-long prompt and a row that cannot be read."""
    system, usable, rows = system_prompt(args), [], []
    for i in indices:
        rows.append({"id": "{}:{}".format(*examples.where(i)), "perception": None, "reasoning": None, "combined": None})
        try:
            example = examples[i]
            rows[-1]["id"] = example.id
            prompt = encode_prompt(example, tokenizer, image_processor, args.max_prompt, system)
            segments = split_segments(encode_response(example.response, tokenizer), tokenizer)
        except Exception as error:  # as in data.Feed: no row ends a long run
            if args.bad_rows == "stop":
                raise
            rows[-1]["reason"] = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            continue
        if prompt is None or segments is None:
            rows[-1]["reason"] = "the prompt is too long" if prompt is None else "the response has not the three blocks"
            continue
        usable.append((rows[-1], reader(prompt, tokenizer, model.variant), segments))
    for pack in split_rows([(len(p.input_ids), [sum(map(len, s))]) for _, p, s in usable], args.max_tokens):
        part = [usable[r] for r, _ in pack]
        captions, traces = ([(i, s[k]) for i, (_, _, s) in enumerate(part)] for k in (0, 1))
        scores = torch.stack(model.scores([p for _, p, _ in part], captions, traces), dim=1).tolist()
        for (row, _, _), (d_v, d_r) in zip(part, scores):
            row |= {"perception": d_v, "reasoning": d_r, "combined": args.alpha * d_v + (1 - args.alpha) * d_r}
    return rows


def main():
    args = parse_args()
    world = setup(args, {"--batch": args.batch} if args.pairs else {})
    if args.pairs:
        return warm_up(args, world)
    examples = load_examples(args.score, args.split)
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    model = load_discriminator(args.ckpt, stored_variant(args.ckpt) or "learned", choose_attention(args.attn, world))
    model, rows = model.to(world.device).eval(), []
    mine = range(world.rank, len(examples), world.size)
    for start in tqdm(range(0, len(mine), 64), disable=world.rank > 0):
        rows += score_examples(model, examples, mine[start : start + 64], tokenizer, image_processor, args)
    gathered = world.gather(rows)
    rows = [gathered[i % world.size][i // world.size] for i in range(len(examples))]
    if all(row["combined"] is None for row in rows):
        raise InputError(f"--score: no response can be scored; the first, {rows[0]['id']}: {rows[0]['reason']}")
    if world.rank == 0:
        report(rows, examples, args.out)


def report(rows, examples, out):
    """Write OUT/scores.jsonl and OUT/results.json, print the distribution and the worst 20 with their prompts."""
    write_rows(os.path.join(out, "scores.jsonl"), rows)
    scored = [(row, i) for i, row in enumerate(rows) if row["combined"] is not None]
    print(f"{len(scored)} of {len(rows)} responses scored; scores.jsonl says why the others are not")
    quantiles = {}
    for key in ("perception", "reasoning", "combined"):
        values = np.array([row[key] for row, _ in scored])
        quantiles[key] = dict(zip(("min", "5%", "50%", "95%", "max"), np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).tolist()))
        print(f"{key:>10}  " + "  ".join(f"{name} {value:.3f}" for name, value in quantiles[key].items()))
    print("lowest combined scores")
    for row, i in sorted(scored, key=lambda pair: pair[0]["combined"])[:20]:
        question = examples[i].prompt[-1]["content"].replace("\n", " ")[:80]
        print(f"  {row['combined']:8.3f}  {row['perception']:8.3f}  {row['reasoning']:8.3f}  {row['id']}  {question}")
    write_json(os.path.join(out, "results.json"), {"scored": len(scored), "rows": len(rows), "quantiles": quantiles})


if __name__ == "__main__":
    run(main)
