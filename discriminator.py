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

Diagnosis: D_v and D_r of every response of a data set, to filter or label it.

    python discriminator.py --score responses.jsonl --ckpt align_out/discriminator --out scores/
"""

import argparse
import copy
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import Qwen3VLModel

from rollout import InputError, encode_prompt, encode_response, hidden_states, load_examples, pack_rows
from rollout import set_attention, split_rows, split_segments, without_images
from sft import Parser, check_checkpoint, check_loaded, copy_processor, full_weights, load_tokenizer, run, setup, system_prompt
from sft import write_json, write_rows, writing

VARIANTS = ("moe", "dense", "text-only")


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
    """variant: "moe" (default), "dense" (one expert, one score for the whole response), "text-only" (no image)."""

    def __init__(self, backbone, variant="moe"):
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(f"--disc-variant {variant}: choose one of {', '.join(VARIANTS)}")
        self.backbone, self.variant, self.sizes = backbone, variant, [0, 0, 0]
        if variant != "dense":
            for layer in backbone.language_model.layers:
                layer.mlp = SegmentMLP(layer.mlp, self.sizes)
        heads = ("perception",) if variant == "dense" else ("perception", "reasoning")
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
        ends = hidden_states(self.backbone, pack.inputs)[pack.ends].float()
        if self.variant == "dense":
            d = self.heads["perception"](ends)[:, 0]
            return d, d
        return self.heads["perception"](ends[:n])[:, 0], self.heads["reasoning"](ends[n:])[:, 0]


def bradley_terry(teacher, student, valid, count=None):
    """(2) over the valid pairs, -log sigmoid(teacher - student). All [n]; `count`: valid pairs of the whole global batch
    (default: of this call), so that the gradient does not depend on the split. Without a valid pair it is an exact 0."""
    losses = torch.where(valid, -F.logsigmoid(teacher - student), 0.0)
    return losses.sum() / max(1, valid.sum() if count is None else count)


def reader(prompt, tokenizer, variant):
    """The prompt as the discriminator sees it."""
    return without_images(prompt, tokenizer) if variant == "text-only" else prompt


def load_discriminator(path, variant="moe", attn="sdpa"):
    """From a folder written by `save_discriminator`, or fresh on the backbone of any Qwen3-VL checkpoint."""
    check_checkpoint(path)
    settings = os.path.join(path, "discriminator.json")
    saved = os.path.isfile(settings)
    if saved:
        with open(settings) as file:
            stored = json.load(file)["variant"]
        if stored != variant:
            raise InputError(f"--disc {path} was trained as {stored}; pass --disc-variant {stored}")
        backbone = Qwen3VLModel(Qwen3VLModel.config_class.from_pretrained(path, attn_implementation="rows"))
    else:
        try:
            backbone, info = Qwen3VLModel.from_pretrained(
                path, dtype=torch.float32, attn_implementation="rows", use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"--disc {path}: {str(error).splitlines()[0]}") from error
        check_loaded(path, {**info, "unexpected_keys": set(info["unexpected_keys"]) - {"lm_head.weight"}})
    set_attention(backbone, attn)
    model = Discriminator(backbone, variant)
    if saved:
        weights = load_file(os.path.join(path, "model.safetensors"))
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


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


# ---------------------------------------------------------------------------------------------------------------- scoring
def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="a discriminator folder, e.g. align_out/discriminator")
    parser.add_argument("--score", required=True, metavar="FILE", help="data set with responses, any format of load_examples")
    parser.add_argument("--split", default=None, help="split of a Hub data set")
    parser.add_argument("--out", default="score_out", help="folder for scores.jsonl and results.json")
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of perception in the combined score")
    parser.add_argument("--max-tokens", type=int, default=16384, help="tokens per forward")
    parser.add_argument("--max-prompt", type=int, default=2048, help="longer prompts get no scores")
    parser.add_argument("--system-prompt", default=None, metavar="FILE", help="system message for rows that carry none")
    return parser.parse_args()


@torch.no_grad()
def score_examples(model, examples, tokenizer, image_processor, args):
    """-> [{"id", "perception", "reasoning", "combined"}] of a few examples, packed; scores are None for a response without
    the three blocks and for an over-long prompt."""
    system, usable = system_prompt(args), []
    rows = [{"id": example.id, "perception": None, "reasoning": None, "combined": None} for example in examples]
    for row, example in zip(rows, examples):
        prompt = encode_prompt(example, tokenizer, image_processor, args.max_prompt, system)
        segments = split_segments(encode_response(example.response, tokenizer), tokenizer)
        if prompt is not None and segments is not None:
            usable.append((row, reader(prompt, tokenizer, model.variant), segments))
    for pack in split_rows([(len(p.input_ids), [sum(map(len, s))]) for _, p, s in usable], args.max_tokens):
        part = [usable[r] for r, _ in pack]
        captions, traces = ([(i, s[k]) for i, (_, _, s) in enumerate(part)] for k in (0, 1))
        scores = torch.stack(model.scores([p for _, p, _ in part], captions, traces), dim=1).tolist()
        for (row, _, _), (d_v, d_r) in zip(part, scores):
            row |= {"perception": d_v, "reasoning": d_r, "combined": args.alpha * d_v + (1 - args.alpha) * d_r}
    return rows


def main():
    args = parse_args()
    world = setup(args)
    examples = load_examples(args.score, args.split)
    if not any(examples[i].response for i in range(len(examples))):
        raise InputError(f"{args.score}: the rows have no response to score (column response, messages or teacher_*)")
    tokenizer, image_processor = load_tokenizer(args.ckpt)
    if not os.path.isfile(os.path.join(args.ckpt, "discriminator.json")):
        raise InputError(f"--ckpt {args.ckpt} is not a discriminator folder; give align_out/discriminator")
    with open(os.path.join(args.ckpt, "discriminator.json")) as file:
        variant = json.load(file)["variant"]
    model, rows = load_discriminator(args.ckpt, variant).to(world.device).eval(), []
    mine = range(world.rank, len(examples), world.size)
    for start in tqdm(range(0, len(mine), 64), disable=world.rank > 0):
        part = [examples[i] for i in mine[start : start + 64]]
        rows += score_examples(model, part, tokenizer, image_processor, args)
    gathered = world.gather(rows)
    rows = [gathered[i % world.size][i // world.size] for i in range(len(examples))]
    if world.rank == 0:
        report(rows, examples, args.out)


def report(rows, examples, out):
    """Write OUT/scores.jsonl and OUT/results.json, print the distribution and the worst 20 with their prompts."""
    write_rows(os.path.join(out, "scores.jsonl"), rows)
    scored = [(row, i) for i, row in enumerate(rows) if row["combined"] is not None]
    print(f"{len(scored)} of {len(rows)} responses scored; the others are malformed or their prompt is too long")
    quantiles = {}
    for key in ("perception", "reasoning", "combined") if scored else ():
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
