"""The discriminator: a mixture of two experts that scores what a response sees and how it reasons.

    D_v(x, c) perception: the caption c    D_r(x, t) reasoning: the trace t    x: prompt with images
    (2)  L_k = -E[ log sigmoid( D_k(x, y_k+) - D_k(x, y_k-) ) ],  k in {v, r}    one loss per expert

Backbone: a Qwen3-VL without lm_head. In every decoder layer the MLP becomes three copies of itself:
shared (prompt tokens), perception (caption tokens), reasoning (trace tokens); two float32 linear
heads without bias read the last token of a segment. A pack holds [prompts | captions | traces], so
routing is slicing, every token costs one MLP, D_v's loss never touches the reasoning expert nor the
other way round, and before the first step both experts equal the dense model.

Deviations from the paper and the authors' code: (1) hard routing by segment instead of a learned
top-2 router over four experts; (2) two heads instead of one; (3) all segments are read at one and
the same token (EOS), are cut by one function and use the policy's M-RoPE positions and image scale,
so that no artefact tells teacher from student; (4) heads start at zero: before it has learned
anything the discriminator rewards nothing; (5) a pair of the warm-up is one of whole responses,
where the paper counts captions and traces apart.

Warm-up on offline (teacher, student) pairs, for `align.py --disc disc_out/`, and diagnosis: D_v and
D_r of every response of a data set (of warm-up pairs the teacher's), to filter or label it.

    torchrun --nproc_per_node=8 discriminator.py --pairs warmup_pairs.jsonl \
        --ckpt Qwen/Qwen3-VL-2B-Instruct --out disc_out/
    python discriminator.py --score responses.jsonl --ckpt align_out/discriminator --out scores/
"""

import argparse
import copy
import json
import os
import time
from dataclasses import dataclass, replace
from glob import glob

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, Qwen3VLModel, Qwen3VLMoeModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from rows import IDLE, Prompt, hidden_states, pack_rows, set_attention, split_rows

try:
    from data import Feed, data_flags, encode_prompt, encode_response, load_examples, look
    from data import measure_prompt, system_prompt
    from rollout import parse_response, split_segments
    from runtime import InputError, Parser, Skips, begin, check_checkpoint
    from runtime import choose_attention, common_flags, copy_processor, cosine, end_step
    from runtime import full_weights, integer, load_tokenizer, log, make_optimizer, most, real, run
    from runtime import setup, shard, write_json, write_meta, write_rows, writing
except ModuleNotFoundError as error:
    # The model and its loss stand on rows.py and can be copied with that alone; what follows them
    # (a step's gradient, checkpoints, the script) needs the rest.
    if __name__ == "__main__" or error.name not in ("data", "rollout", "runtime"):
        raise

VARIANTS = ("moe", "dense", "text-only", "learned")
SCORES = ("d_v", "d_r", "teacher_d_v", "teacher_d_r")  # of a pair: the columns of `scores` [n, 4]


# -------------------------------------------------------------------------------------- the model
class SegmentMLP(nn.Module):
    """Three copies of a layer's dense MLP: for prompt, caption and trace tokens, in this order.

    transformers hands the keywords of a forward to a layer's attention but not to its MLP, so a
    hook on the attention passes `segment_sizes` on. It runs again when backward recomputes a layer,
    with the keywords of the forward that is recomputed: one of another pack cannot interfere."""

    def __init__(self, layer):
        super().__init__()
        self.shared = layer.mlp
        self.perception, self.reasoning = copy.deepcopy(layer.mlp), copy.deepcopy(layer.mlp)
        layer.self_attn.register_forward_pre_hook(self.take_sizes, with_kwargs=True)

    def take_sizes(self, attention, args, kwargs):
        self.sizes = kwargs.get("segment_sizes")  # tokens of the pack: [prompt, caption, trace]

    def forward(self, hidden):  # [1, T, D] -> [1, T, D]
        prompt, caption, trace = hidden.split(self.sizes, dim=1)
        parts = [self.shared(prompt), self.perception(caption), self.reasoning(trace)]
        return torch.cat(parts, dim=1)


class Discriminator(nn.Module):
    """A Qwen3-VL backbone (its attention chosen by rows.set_attention) with experts and heads.

    variant: "moe" (default), "dense" (one expert, one score for the whole response), "text-only"
    (no image, see `visible_prompt`), "learned" (a Qwen3-VL-MoE backbone as the authors released it:
    top-k routing, a load-balancing loss, one head for both segments)."""

    def __init__(self, backbone, variant="moe"):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant}: choose one of {', '.join(VARIANTS)}")
        self.backbone, self.variant = backbone, variant
        self.routers, self.routed = 0, []  # routed: their logits [T, experts] in the last forward
        two_experts = variant in ("moe", "text-only")
        for layer in backbone.language_model.layers:
            if two_experts:
                layer.mlp = SegmentMLP(layer)
            elif variant == "learned" and hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self.keep_logits)
                self.routers += 1
        size = backbone.config.text_config.hidden_size
        self.heads = nn.ModuleDict()
        for name in ("perception", "reasoning") if two_experts else ("perception",):
            self.heads[name] = nn.Linear(size, 1, bias=False, dtype=torch.float32)
            nn.init.zeros_(self.heads[name].weight)

    def keep_logits(self, router, inputs, output):
        if len(self.routed) < self.routers:  # full when backward recomputes activations
            self.routed.append(output[0])

    def scores(self, prompts, captions, traces):
        """Scores of n responses in one forward -> D_v [n], D_r [n], float32, with gradient.

        prompts: list of Prompt. captions, traces: n times (index into prompts, token ids); caption
        i and trace i are response i. Two prompts p and q, two responses to p and one to q:

            pack  [ p | q | caption 0 | caption 1 | caption 2 | trace 0 | trace 1 | trace 2 ]
            sees                p           p           q          p         p         q
            MLP   [shared | --------- perception ------------ | -------- reasoning -------- ]
            head                v           v           v          r         r         r

        A head reads the last token of a segment. "dense": caption and trace are one branch with one
        score, given twice; "learned": the backbone routes, and one head reads both segments."""
        n = len(captions)
        if self.variant == "dense":
            branches = []
            for (p, caption), (_, trace) in zip(captions, traces):
                branches.append((p, caption[:-1] + trace))  # without the caption's read-out token
        else:
            branches = captions + traces
        pack = pack_rows(prompts, branches, self.heads["perception"].weight.device)
        sizes = [pack.prompt_tokens, sum(pack.lengths[:n]), sum(pack.lengths[n:])]
        self.routed.clear()
        hidden = hidden_states(self.backbone, {**pack.inputs, "segment_sizes": sizes})
        ends = hidden[pack.ends].float()
        perception = self.heads["perception"]
        if self.variant == "dense":
            d = perception(ends)[:, 0]
            return d, d
        reasoning = perception if self.variant == "learned" else self.heads["reasoning"]
        return perception(ends[:n])[:, 0], reasoning(ends[n:])[:, 0]

    def balance(self):
        """The load-balancing loss of the last forward, with its coefficient (Switch Transformer,
        arXiv 2101.03961, equation 4): the one term that depends on how rows are packed, because it
        is a product of means. 0 without learned routing."""
        if self.variant != "learned":
            return 0.0
        text, routed = self.backbone.config.text_config, tuple(self.routed)
        loss = load_balancing_loss_func(routed, text.num_experts, text.num_experts_per_tok)
        return text.router_aux_loss_coef * loss


def visible_prompt(prompt, tokenizer, variant):
    """The prompt as the discriminator sees it: for "text-only" without pixels and image tokens."""
    if variant != "text-only":
        return prompt
    image_tokens = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    drop = torch.tensor(tokenizer.convert_tokens_to_ids(image_tokens))
    ids = prompt.input_ids[~torch.isin(prompt.input_ids, drop)]
    return Prompt(ids, torch.arange(len(ids)).expand(3, -1), None, None)


# --------------------------------------------------------------------------------------- the loss
@dataclass
class Pairs:
    """A shared-prompt row: a prompt, a teacher's response and those of any number of students, each
    of which makes a pair with the teacher's. A response is its (caption ids, trace ids)."""

    prompt: Prompt  # as the discriminator sees it
    teacher: tuple[list[int], list[int]]
    students: list[tuple[list[int], list[int]]]

    def part(self, chosen):
        """The same row with these of its students."""
        return replace(self, students=[self.students[i] for i in chosen])


IDLE_ROW = Pairs(IDLE, ([0], [0]), [])  # of a rank with no pack left: no pair, a loss of 0


def response_tokens(response):
    return sum(len(segment) for segment in response)


def bradley_terry(teacher, student, valid, count=None):
    """(2): mean of -log sigmoid(teacher - student) over the valid pairs, an exact 0 without any.

    All [n]; `count`: valid pairs of the whole global batch (default: of this call), so that the
    gradient does not depend on the split."""
    losses = torch.where(valid, -F.logsigmoid(teacher - student), 0.0)
    return losses.sum() / max(1, valid.sum() if count is None else count)


def row_scores(disc, rows):
    """Scores [2 experts, responses] of all responses of a list of Pairs, in one forward: row after
    row, in each the teacher first."""
    captions, traces = [], []
    for r, row in enumerate(rows):
        for caption, trace in [row.teacher, *row.students]:
            captions.append((r, caption))
            traces.append((r, trace))
    return torch.stack(disc.scores([row.prompt for row in rows], captions, traces))


def pair_loss(disc, rows, count, score_l2):
    """(2) for both experts over the pairs of a list of Pairs, in one forward, plus score_l2 / 2
    times the squared scores. count: pairs of the whole global batch.

    -> loss, scores [pairs, 4] with the columns SCORES, row after row. Without a pair the loss is a
    0 that still reaches every score: a rank without pairs takes part in the collectives."""
    d = row_scores(disc, rows)
    student, teacher, at = [], [], 0  # where in d the two responses of each pair are
    for row in rows:
        student += range(at + 1, at + 1 + len(row.students))
        teacher += [at] * len(row.students)
        at += 1 + len(row.students)
    s, t = d[:, student], d[:, teacher]  # [2, pairs]
    valid = torch.ones_like(s[0], dtype=torch.bool)
    loss = sum(bradley_terry(t[k], s[k], valid, count) for k in (0, 1))
    loss = loss + score_l2 * 0.5 * (s.square() + t.square()).sum() / count + d.sum() * 0
    return loss + disc.balance() * (len(student) / count), torch.cat([s, t]).T


def expert_metrics(scores):
    """Per expert over all pairs of the step, scores [n, 4] with the columns SCORES (NaN: no pair):
    gap = mean(teacher - student), acc = share of pairs ranked rightly (0.5 is the equilibrium, not
    a failure), loss (2), score = mean over the students. Empty when no rollout was valid."""
    metrics, scores = {}, scores[~scores[:, 0].isnan()]
    if not len(scores):
        return metrics
    d_v, d_r, teacher_d_v, teacher_d_r = scores.unbind(1)
    for name, teacher, student in (("v", teacher_d_v, d_v), ("r", teacher_d_r, d_r)):
        gap = teacher - student
        # a tie (the same text, up to rounding) is a coin toss
        right = torch.where(gap.abs() < 1e-5, 0.5, (gap > 0).float())
        loss = bradley_terry(teacher, student, torch.ones_like(gap, dtype=torch.bool))
        metrics |= {f"gap_{name}": gap.mean().item(), f"acc_{name}": right.mean().item()}
        metrics |= {f"loss_{name}": loss.item(), f"score_{name}": student.mean().item()}
    return metrics


# ------------------------------------------------------------------------------- a step's gradient
def score_and_backward(disc, rows, count, args, world):
    """The scores of this rank's rows (list of Pairs), detached, for the rewards, and by the same
    forward the gradient of `pair_loss`, left in the parameters' .grad for the discriminator's step.
    No parameter changes here.

    One forward per pack of at most args.max_tokens tokens, equally many on every rank; count: pairs
    of all ranks. -> scores [pairs, 4] float32 on the CPU, columns SCORES, row after row."""
    lengths = []
    for row in rows:
        # every pack of a row repeats its prompt and its teacher
        fixed = len(row.prompt.input_ids) + response_tokens(row.teacher)
        lengths.append((fixed, [response_tokens(student) for student in row.students]))
    packs, scores = list(split_rows(lengths, args.max_tokens)), [torch.empty(0, len(SCORES))]
    for p in range(most(len(packs), world)):
        part = [rows[r].part(chosen) for r, chosen in packs[p]] if p < len(packs) else [IDLE_ROW]
        loss, part_scores = pair_loss(disc, part, count, args.score_l2)
        # FSDP averages over ranks, the loss is already a share of the global mean
        (loss * world.size).backward()
        scores.append(part_scores.detach().float().cpu())
    return torch.cat(scores)


# ------------------------------------------------------------------------------------ checkpoints
BACKBONES = {"qwen3_vl": Qwen3VLModel, "qwen3_vl_moe": Qwen3VLMoeModel}  # by model_type
RELEASED_HEADS = ("v_head.1.weight", "v_head.summary.weight")  # in the shards of a released one


def load_discriminator(path, variant="moe", attn="sdpa"):
    """A discriminator in float32: from a folder that `save_discriminator` wrote, fresh on the
    backbone of any Qwen3-VL checkpoint, or the released Qwen3-VL-MoE discriminator with its head
    (then the variant is "learned"). variant None: the one that it was trained as. Raises InputError
    when the checkpoint is none of these, another variant, or broken."""
    check_checkpoint(path)
    try:
        return read_discriminator(path, variant, attn)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"discriminator {path}: {reason}") from error


def read_discriminator(path, variant, attn):
    """`load_discriminator`, whose errors do not name the folder yet."""
    stored = stored_variant(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if config.model_type not in BACKBONES:
        raise ValueError(f"a {config.model_type}, not a Qwen3-VL")
    kind = BACKBONES[config.model_type]
    trained_as = "learned" if kind is Qwen3VLMoeModel else stored
    if variant is None or (trained_as, variant) == ("learned", "moe"):  # moe: the flag's default
        variant = trained_as or "learned"
    if trained_as not in (None, variant):
        raise ValueError(f"trained as {trained_as}; pass --disc-variant {trained_as}")
    if variant == "learned" and kind is not Qwen3VLMoeModel:
        raise ValueError("neither a folder that align.py wrote nor a Qwen3-VL-MoE checkpoint")
    backbone = kind(config) if stored else load_backbone(path, kind)
    disc = Discriminator(set_attention(backbone, attn), variant)
    if stored:
        load_stored(disc, path)
    elif variant == "learned":
        load_released_head(disc.heads["perception"], path)
    return disc


def stored_variant(path):
    """The variant of a folder that `save_discriminator` wrote, None for any other checkpoint."""
    settings = os.path.join(path, "discriminator.json")
    if not os.path.isfile(settings):
        return None
    with open(settings, encoding="utf-8") as file:
        stored = json.load(file)
    variant = stored.get("variant") if isinstance(stored, dict) else None
    if variant not in VARIANTS:
        raise ValueError(f"discriminator.json: no variant that is one of {', '.join(VARIANTS)}")
    return variant


def load_backbone(path, kind):
    """The backbone of a checkpoint that is no stored discriminator."""
    backbone, info = kind.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    heads = {"lm_head.weight", *(RELEASED_HEADS if kind is Qwen3VLMoeModel else ())}
    refuse_weights({*info["missing_keys"], *info["unexpected_keys"]} - heads)
    return backbone


def load_stored(disc, path):
    """Backbone and heads as `save_discriminator` wrote them."""
    weights = load_file(os.path.join(path, "model.safetensors"))
    found = {name: tensor.shape for name, tensor in weights.items()}
    wanted = {name: tensor.shape for name, tensor in disc.state_dict().items()}
    refuse_weights({name for name in found | wanted if found.get(name) != wanted.get(name)})
    disc.load_state_dict({name: tensor.float() for name, tensor in weights.items()})


def refuse_weights(wrong):
    if wrong:
        names = ", ".join(sorted(wrong)[:5])
        raise ValueError(f"weights missing, unknown or of another size: {names}")


def load_released_head(head, path):
    """The one head [1, hidden], from the shards (never from value_head.pt, which is a pickle)."""
    folder, found = path, []
    if not os.path.isdir(path):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(path, allow_patterns="*.safetensors")
    for file in sorted(glob("*.safetensors", root_dir=folder)):
        with safe_open(os.path.join(folder, file), framework="pt") as weights:
            names = set(RELEASED_HEADS) & set(weights.keys())
            found += [weights.get_tensor(name) for name in names]
    if not found or found[0].numel() != head.weight.numel():
        names, size = " or ".join(RELEASED_HEADS), head.weight.numel()
        raise ValueError(f"no head: no {names} of {size} numbers in its *.safetensors")
    head.weight.data.copy_(found[0].float().view(1, -1))


def compare_tokenizers(tokenizer, path):
    """InputError unless `path`, the flag --disc, has the policy's vocabulary: the rollouts' ids go
    into the discriminator as they are."""
    if path is not None and load_tokenizer(path)[0].get_vocab() != tokenizer.get_vocab():
        hint = "its tokenizer differs from that of --ckpt; both must have the same vocabulary"
        raise InputError(f"--disc {path}: {hint}")


def save_discriminator(disc, out, world, ckpt):
    """Write OUT: float32 weights of backbone and heads, config.json, discriminator.json and the
    tokenizer and processor files of `ckpt`; all ranks must call it."""
    weights = full_weights(disc)
    if world.rank == 0:
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        with writing(out):
            os.makedirs(out, exist_ok=True)
            disc.backbone.config.save_pretrained(out)
            copy_processor(ckpt, out)
            save_file(weights, os.path.join(out, "model.safetensors"))
            write_json(os.path.join(out, "discriminator.json"), {"variant": disc.variant})


# ---------------------------------------------------------------------------------------- warm-up
def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pairs", nargs="+", metavar="SOURCE", help="warm-up pairs to train on")
    what.add_argument("--score", nargs="+", metavar="SOURCE", help="responses to score")
    parser.add_argument("--alpha", type=real(0, 1), default=0.5, help="weight of D_v in `combined`")
    group = parser.add_argument_group("warm-up")
    group.add_argument("--batch", type=integer(1), default=128, help="pairs per step, in all")
    group.add_argument("--steps", type=integer(0), default=None, help="steps (default: one epoch)")
    group.add_argument("--lr", type=real(0, 1), default=1e-5, help="peak learning rate")
    group.add_argument("--warmup", type=real(0, 1), default=0.1, help="share of steps it rises in")
    group.add_argument("--disc-variant", choices=VARIANTS, default="moe", help="to build on --ckpt")
    group.add_argument("--score-l2", type=real(0), default=1e-3, help="weight of squared scores")
    common_flags(parser, "disc")
    data_flags(parser)
    return parser.parse_args()


def need_pair(example):
    """InputError unless both responses are well-formed, and both or neither with an answer:
    otherwise that alone would tell them apart."""
    teacher, student = (parse_response(text or "") for text in (example.response, example.rejected))
    for who, response in (("teacher", teacher), ("student", student)):
        if response is None:
            hint = f"no well-formed {who} response (columns {who}_caption and {who}_cot)"
            raise InputError(f"{example.id}: {hint}")
    if bool(teacher.answer) != bool(student.answer):
        raise InputError(f"{example.id}: of teacher_cot and student_cot only one has an answer")


def measure_pair(example, tokenizer, image_processor, system, args):
    """-> (tokens of the prompt, of both responses), or None: too long."""
    need_pair(example)
    prompt = measure_prompt(example, tokenizer, image_processor, system, args)
    if prompt is None:
        return None
    responses = [encode_response(text, tokenizer) for text in (example.response, example.rejected)]
    return prompt[0], response_tokens(responses)


def encode_pair(example, tokenizer, image_processor, system, args):
    """Example with a teacher's and a student's response -> Pairs, or None when it is too long."""
    teacher = split_segments(encode_response(example.response, tokenizer), tokenizer)
    student = split_segments(encode_response(example.rejected, tokenizer), tokenizer)
    prompt = encode_prompt(example, tokenizer, image_processor, args.max_prompt, system)
    if prompt is None:
        return None
    return Pairs(visible_prompt(prompt, tokenizer, args.disc_variant), teacher, [student])


def warm_up(args, world):
    """Train a discriminator on offline (teacher, student) pairs and write it to --out, as align.py
    takes it with --disc. AdamW, cosine with a warm-up, one epoch, as in the paper."""
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    attn, system = choose_attention(args.attn, world), system_prompt(args)
    tools = tokenizer, image_processor, system, args
    found = look(args.pairs, lambda example: measure_pair(example, *tools), args, world)
    disc = load_discriminator(args.ckpt, args.disc_variant, attn).to(world.device)
    args.disc_variant = disc.variant
    units, heads = [*disc.backbone.language_model.layers, disc.backbone.visual], disc.heads.values()
    disc = shard(disc, units, world, Discriminator.scores, heads, args.checkpointing)
    optimizer = make_optimizer(disc, args.lr, args.weight_decay)
    steps = args.steps
    if steps is None:
        steps = max(1, len(found.usable) // args.batch)
    parts, skips = {"discriminator": (disc, optimizer)}, Skips()
    progress, metrics = begin(args, world, parts, steps, skips, identity=found.identity)
    feed = Feed(found, lambda example: encode_pair(example, *tools), args, world, progress)
    feed.plan(steps, args.batch)
    for step in range(progress["step"], steps):
        began = time.time()
        # data
        rows = feed.batch(args.batch, step)
        # update discriminator
        count = world.sum(len(rows))[0]
        scores = score_and_backward(disc, rows, count, args, world)  # leaves the gradient
        lr = cosine(step, steps, args.lr, args.warmup)
        norm = skips.step(disc, optimizer, lr, args.clip, world, 0.0)
        # log
        progress = {"step": step + 1, **feed.progress()}
        metrics = {"step": step + 1, **expert_metrics(torch.cat(world.gather(scores)))}
        metrics |= {"grad_norm": norm, "lr": lr, **feed.counts}
        metrics |= {"skipped_steps": skips.total, "seconds": round(time.time() - began, 3)}
        log(world, args.out, metrics)
        # save
        end_step(args, world, parts, progress, step + 1 == steps, skips)
    feed.close()
    save_discriminator(disc, args.out, world, args.ckpt)
    if world.rank == 0:
        write_meta(args.out, "pairs", args, progress["step"], metrics)
        print(f"saved {args.out}", flush=True)


# ---------------------------------------------------------------------------------------- scoring
@torch.no_grad()
def score_examples(disc, examples, indices, tokenizer, image_processor, args):
    """A few examples, packed -> for each its line of scores.jsonl: {"id", "perception",
    "reasoning", "combined"}. The scores are None, and `reason` says why, for a response without the
    three blocks, an over-long prompt and an example that cannot be read."""
    system, lines, usable = system_prompt(args), [], []
    for i in indices:
        line = {"id": "{}:{}".format(*examples.where(i))}
        line |= {"perception": None, "reasoning": None, "combined": None}
        lines.append(line)
        try:
            example = examples[i]
            line["id"] = example.id
            prompt = encode_prompt(example, tokenizer, image_processor, args.max_prompt, system)
            response = split_segments(encode_response(example.response, tokenizer), tokenizer)
        except Exception as error:  # as in data.attempt: no example ends a long run
            if args.bad_rows == "stop":
                raise
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            line["reason"] = f"{kind}{error}"
            continue
        if prompt is None:
            line["reason"] = "the prompt is too long"
        elif response is None:
            line["reason"] = "the response has not the three blocks"
        else:  # one response, in the teacher's place
            row = Pairs(visible_prompt(prompt, tokenizer, disc.variant), response, [])
            usable.append((line, row))
    lengths = [(len(row.prompt.input_ids), [response_tokens(row.teacher)]) for _, row in usable]
    for pack in split_rows(lengths, args.max_tokens):
        part = [usable[r] for r, _ in pack]
        scores = row_scores(disc, [row for _, row in part])  # [2, responses]
        for (line, _), (d_v, d_r) in zip(part, scores.T.tolist()):
            combined = args.alpha * d_v + (1 - args.alpha) * d_r
            line |= {"perception": d_v, "reasoning": d_r, "combined": combined}
    return lines


def score(args, world):
    """Score every response of a data set, and report."""
    examples = load_examples(args.score, args.split)
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    disc = load_discriminator(args.ckpt, None, choose_attention(args.attn, world))
    disc = disc.to(world.device).eval()
    mine, lines = range(world.rank, len(examples), world.size), []
    for start in tqdm(range(0, len(mine), 64), disable=world.rank > 0):
        part = mine[start : start + 64]
        lines += score_examples(disc, examples, part, tokenizer, image_processor, args)
    gathered = world.gather(lines)
    lines = [gathered[i % world.size][i // world.size] for i in range(len(examples))]
    if all(line["combined"] is None for line in lines):
        first = "{id}: {reason}".format(**lines[0])
        raise InputError(f"--score: no response can be scored; the first, {first}")
    if world.rank == 0:
        report(lines, examples, args.out)


def report(lines, examples, out):
    """Write OUT/scores.jsonl and OUT/results.json, print the distribution and the worst 20 with
    their prompts."""
    write_rows(os.path.join(out, "scores.jsonl"), lines)
    scored = [i for i, line in enumerate(lines) if line["combined"] is not None]
    print(f"{len(scored)} of {len(lines)} responses scored; scores.jsonl says why others are not")
    quantiles = {}
    for key in ("perception", "reasoning", "combined"):
        values = np.quantile([lines[i][key] for i in scored], [0, 0.05, 0.5, 0.95, 1]).tolist()
        quantiles[key] = dict(zip(("min", "5%", "50%", "95%", "max"), values))
        cells = [f"{name} {value:.3f}" for name, value in quantiles[key].items()]
        print(f"{key:>10}  " + "  ".join(cells))
    print("lowest combined scores")
    for i in sorted(scored, key=lambda i: lines[i]["combined"])[:20]:
        numbers = [f"{lines[i][key]:8.3f}" for key in ("combined", "perception", "reasoning")]
        question = examples[i].prompt[-1]["content"].replace("\n", " ")[:80]
        print("  ".join(["", *numbers, lines[i]["id"], question]))
    results = {"scored": len(scored), "rows": len(lines), "quantiles": quantiles}
    write_json(os.path.join(out, "results.json"), results)


def main():
    args = parse_args()
    if args.pairs:
        warm_up(args, setup(args, {"--batch": args.batch}))
    else:
        score(args, setup(args))


if __name__ == "__main__":
    run(main)
