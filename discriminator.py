"""The discriminator: a mixture of two experts that scores what a response sees and how it reasons.

    D_v(x, c) perception: the caption c    D_r(x, t) reasoning: the trace t    x: prompt with images
    (2)  L_k = -E[ log sigmoid( D_k(x, y_k+) - D_k(x, y_k-) ) ],  k in {v, r}    one loss per expert

Backbone: a Qwen3-VL without lm_head. In every decoder layer the MLP becomes three copies of itself:
shared (prompt tokens), perception (caption tokens), reasoning (trace tokens); two float32 linear
heads without bias read the last token of a segment. A pack holds [prompts | captions | traces], so
routing is slicing, every token costs one MLP, D_v's loss never touches the reasoning expert nor the
other way round, and before the first step both experts equal the dense model.

Does an expert look? ground_v is the share of prompts with pictures under which the teacher's
caption scores above that of the next prompt of the step with another picture; ground_r is that of
traces. Near 1 it looks; at 0.5 it reads style, however high acc_v is. Text-only must be at 0.5 in
captions, if questions say nothing of the picture (in traces not: they name what is asked).

Deviations from the paper and the authors' code: (1) hard routing by segment instead of a learned
top-2 router over four experts; (2) two heads instead of one; (3) all segments are read at one and
the same token (EOS), are cut by one function and use the policy's M-RoPE positions and image scale,
so that no artefact tells teacher from student; (4) heads start at zero: before it has learned
anything the discriminator rewards nothing; (5) a pair of the warm-up is one of whole responses,
where the paper counts captions and traces apart; (6) --mismatch W adds W times (2) for D_v
over the pairs of neighbours in a chain from the teacher's caption over mixtures to another
picture's (a mean over prompts, so that W does not depend on the number of rollouts), 0 is the
paper: what is wrong in little and in the same style shall score a little less; (7) --readout mean:
a head reads the mean over all tokens of a segment.

Warm-up on offline (teacher, student) pairs, for `align.py --disc disc_out/`; with --mismatch also
on teacher responses alone: a grounding phase. Diagnosis: D_v and D_r of every response of a data
set (of warm-up pairs the teacher's), to filter or label it; ground_v and ground_r of a data set.

    torchrun --nproc_per_node=8 discriminator.py --pairs warmup_pairs.jsonl \
        --ckpt Qwen/Qwen3-VL-2B-Instruct --out disc_out/
    python discriminator.py --pairs curated.jsonl --mismatch 1 --readout mean --ckpt sft_out/
    python discriminator.py --score responses.jsonl --ckpt align_out/discriminator --out scores/
    python discriminator.py --probe curated.jsonl --ckpt align_out/discriminator --out probe/
"""

import copy
import math
import os
import random
import re
import time
import zlib
from dataclasses import dataclass, field, replace
from operator import itemgetter


def parse_args():
    from flags import VARIANTS, Parser, check_grounding, common_flags, data_flags, grounding_flags
    from flags import integer, real

    parser = Parser(__doc__)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--pairs", nargs="+", metavar="SOURCE", help="warm-up pairs to train on")
    add("--score", nargs="+", metavar="SOURCE", help="responses to score")
    add("--probe", nargs="+", metavar="SOURCE", help="teacher responses to score, and for ground_v "
        "and ground_r those of other pictures in their place")
    parser.add_argument("--alpha", type=real(0, 1), default=0.5, help="weight of D_v in `combined`")
    add = parser.add_argument_group("warm-up").add_argument
    add("--batch", type=integer(1), default=128, help="pairs per step, in all")
    add("--steps", type=integer(0), default=None, help="steps (default: one epoch)")
    add("--lr", type=real(0, 1), default=1e-5, help="peak learning rate")
    add("--warmup", type=real(0, 1), default=0.1, help="share of steps it rises in")
    add("--disc-variant", choices=VARIANTS, default="moe", help="to build on --ckpt")
    add("--score-l2", type=real(0), default=1e-3, help="weight of squared scores")
    grounding_flags(add)
    common_flags(parser, "disc")
    data_flags(parser)
    args = parser.parse_args()
    check_grounding(args, "--batch", args.batch)
    return args


if __name__ == "__main__":
    from flags import parse_or_end

    parse_or_end(parse_args)  # before torch is imported, which takes seconds

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, Qwen3VLModel, Qwen3VLMoeModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from rows import IDLE, Prompt, hidden_states, pack_rows, set_attention, split_rows

try:
    from data import Feed, encode_prompt, encode_response, load_examples, look, measure_prompt
    from data import system_prompt
    from flags import READOUTS, VARIANTS, InputError
    from rollout import parse_response, parse_spans, split_segments
    from runtime import Skips, about, begin, check_checkpoint, check_weights, choose_attention
    from runtime import compare_weights, copy_processor, cosine, end_step, full_weights, identify
    from runtime import load_tokenizer, local_folder, log, make_optimizer, most, multiply_patches
    from runtime import read_json, read_weights, run, setup, shard, write_json, write_meta
    from runtime import write_rows, writing
except ModuleNotFoundError as error:
    # The model and its loss stand on rows.py and can be copied with that alone; what follows them
    # (a step's gradient, checkpoints, the script) needs the rest.
    if __name__ == "__main__" or error.name not in ("data", "flags", "rollout", "runtime"):
        raise

HEADS = {  # of each variant; where there are two, an expert for each
    "moe": ("perception", "reasoning"), "dense": ("perception",),
    "text-only": ("perception", "reasoning"), "learned": ("perception",),
}
SCORES = ("d_v", "d_r", "teacher_d_v", "teacher_d_r")  # of a pair: the columns of `scores` [n, 4]
GROUND_EVERY = 10  # warm-up steps between two measurements of ground_v that need a forward


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
    top-k routing, a load-balancing loss, one head for both segments). readout, what a head reads:
    "last" (the last token of a segment) or "mean" (of the final hidden states of all its tokens)"""

    def __init__(self, backbone, variant="moe", readout="last"):
        super().__init__()
        if variant not in HEADS:
            raise ValueError(f"variant {variant}: choose one of {', '.join(HEADS)}")
        self.backbone, self.variant, self.readout = backbone, variant, readout
        self.routers, self.routed = 0, []  # routed: their logits [T, experts] in the last forward
        two_experts = len(HEADS[variant]) == 2
        for layer in backbone.language_model.layers:
            if two_experts:
                layer.mlp = SegmentMLP(layer)
            elif variant == "learned" and hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self.keep_logits)
                self.routers += 1
        size = backbone.config.text_config.hidden_size
        self.heads = nn.ModuleDict()
        for name in HEADS[variant]:
            self.heads[name] = nn.Linear(size, 1, bias=False, dtype=torch.float32)
            nn.init.zeros_(self.heads[name].weight)

    def write_checkpoint(self, out, world, ckpt):
        """`save_discriminator`, as runtime.save_state calls it."""
        save_discriminator(self, out, world, ckpt)

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

        A segment that several responses to a prompt share is one branch. "dense": caption and trace
        are one branch with one score, given twice."""
        if self.variant == "dense":
            joined = []
            for (p, caption), (_, trace) in zip(captions, traces):
                joined.append((p, caption[:-1] + trace))  # without the caption's read-out token
            captions, traces = joined, []
        (captions, caption_of), (traces, trace_of) = distinct(captions), distinct(traces)
        n = len(captions)
        pack = pack_rows(prompts, captions + traces, self.heads["perception"].weight.device)
        sizes = [pack.prompt_tokens, sum(pack.lengths[:n]), sum(pack.lengths[n:])]
        self.routed.clear()
        hidden = hidden_states(self.backbone, {**pack.inputs, "segment_sizes": sizes})
        if self.readout == "mean":
            parts = hidden[pack.prompt_tokens :].float().split(pack.lengths)
            read = torch.stack([part.mean(0) for part in parts])
        else:
            read = hidden[pack.ends].float()
        heads = list(self.heads.values())  # two experts have one each
        d_v = heads[0](read[:n])[caption_of, 0]
        if self.variant == "dense":
            return d_v, d_v
        return d_v, heads[-1](read[n:])[trace_of, 0]

    def balance(self):
        """The load-balancing loss of the last forward, with its coefficient (Switch Transformer,
        arXiv 2101.03961, equation 4): the one term that depends on how rows are packed, because it
        is a product of means. 0 without learned routing."""
        if self.variant != "learned":
            return 0.0
        text, routed = self.backbone.config.text_config, tuple(self.routed)
        loss = load_balancing_loss_func(routed, text.num_experts, text.num_experts_per_tok)
        return text.router_aux_loss_coef * loss


def distinct(segments):
    """n times (index of prompt, token ids) -> those that differ, for each of the n which it is."""
    places = {}
    which = [places.setdefault((p, tuple(ids)), len(places)) for p, ids in segments]
    return [(p, list(ids)) for p, ids in places], which


def visible_prompt(prompt, tokenizer, variant):
    """The prompt as the discriminator sees it: for "text-only" without pixels and image tokens."""
    if variant != "text-only":
        return prompt
    image_tokens = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    drop = torch.tensor(tokenizer.convert_tokens_to_ids(image_tokens))
    ids = prompt.input_ids[~torch.isin(prompt.input_ids, drop)]
    return Prompt(ids, torch.arange(len(ids)).expand(3, -1), None, None)


# --------------------------------------------------------------------------------------- the loss
def bradley_terry(teacher, student, valid, count=None):
    """(2): mean of -log sigmoid(teacher - student) over the valid pairs, an exact 0 without any.

    All [n]; `count`: valid pairs of the whole global batch (default: of this call), so that the
    gradient does not depend on the split."""
    losses = torch.where(valid, -F.logsigmoid(teacher - student), 0.0)
    return losses.sum() / max(1, valid.sum() if count is None else count)


@dataclass
class Pairs:
    """A shared-prompt row: a prompt, a teacher's response, those of any number of students, each a
    pair with the teacher's, and a chain of teachers' that fit it less and less, each a pair with
    the one before it: mixtures of the teacher's caption and another's, with the teacher's trace, at
    the end the other response, to another picture. A response is its (caption ids, trace ids)."""

    prompt: Prompt  # as the discriminator sees it
    teacher: tuple[list[int], list[int]]
    students: list[tuple[list[int], list[int]]]
    mismatched: list[tuple[list[int], list[int]]] = field(default_factory=list)
    picture: torch.Tensor | None = None  # the prompt's pixels, seen or not, to tell pictures apart
    text: str = ""  # the teacher's response

    def branches(self):
        """Token numbers of what may be split into several packs: each student, the chain."""
        chain = [response_tokens(*self.mismatched)] if self.mismatched else []
        return [*map(response_tokens, self.students), *chain]

    def part(self, chosen):
        """The same row with these of its [*students, chain]."""
        n = len(self.students)
        students = [self.students[i] for i in chosen if i < n]
        return replace(self, students=students, mismatched=self.mismatched if n in chosen else [])


def make_pairs(prompt, text, teacher, students, tokenizer, variant):
    """A row of Pairs; text: the teacher's response, of which `teacher` are the ids."""
    seen = visible_prompt(prompt, tokenizer, variant)
    return Pairs(seen, teacher, students, picture=prompt.pixel_values, text=text)


IDLE_ROW = Pairs(IDLE, ([0], [0]), [])  # of a rank with no pack left: no pair, a loss of 0


def response_tokens(*responses):
    return sum(len(segment) for response in responses for segment in response)


def row_scores(disc, rows):
    """Scores [2 experts, responses] of all responses of a list of Pairs, in one forward: row after
    row, in each the teacher first, then the students, then the mismatched."""
    captions, traces = [], []
    for r, row in enumerate(rows):
        for caption, trace in [row.teacher, *row.students, *row.mismatched]:
            captions.append((r, caption))
            traces.append((r, trace))
    return torch.stack(disc.scores([row.prompt for row in rows], captions, traces))


def pair_loss(disc, rows, counts, score_l2, mismatch=0.0):
    """(2) for both experts over the pairs of a list of Pairs, in one forward, plus score_l2 / 2
    times the squared scores: the mean over pairs with students, plus `mismatch` times that over the
    pairs of the chains, for D_v alone. counts: of both kinds, pairs of the whole global batch.

    -> loss, scores [pairs, 4] with the columns SCORES of the students, row after row, and [m, 4] of
    the ends of the chains. Without a pair the loss is a 0 that still reaches every score: a rank
    without pairs takes part in the collectives."""
    d, at = row_scores(disc, rows), 0
    students, chains, ends = [], [], []  # pairs (better, worse): where they are in d
    for row in rows:
        teacher, first = at, at + 1 + len(row.students)
        at = first + len(row.mismatched)
        chain = [teacher, *range(first, at)]
        students += [(teacher, student) for student in range(teacher + 1, first)]
        chains += zip(chain, chain[1:])
        if row.mismatched:
            ends.append((teacher, chain[-1]))
    loss = d.sum() * 0
    kinds = zip((students, chains), counts, (1.0, mismatch), ((0, 1), (0,)))
    for pairs, count, weight, experts in kinds:
        worse, better = scores_of(d, pairs).split(2, 1)
        valid = torch.ones(len(pairs), dtype=torch.bool, device=d.device)
        preference = sum(bradley_terry(better[:, k], worse[:, k], valid, count) for k in experts)
        size = score_l2 * 0.5 * (worse.square() + better.square()).sum() / max(1, count)
        loss = loss + weight * (preference + size)
    share = len(students + chains) / max(1, sum(counts))
    return loss + disc.balance() * share, scores_of(d, students), scores_of(d, ends)


def scores_of(d, pairs):
    """Scores d [2, responses], n places (better, worse) in it -> [n, 4] with the columns SCORES."""
    better, worse = torch.tensor(pairs, dtype=torch.long, device=d.device).view(-1, 2).T
    return torch.cat([d[:, worse], d[:, better]]).T


def ranked_rightly(scores):
    """scores [n, 4] with the columns SCORES -> [n, 2]: of each expert, whether the teacher's is the
    higher one; a tie (the same text, up to rounding) is a coin toss, 0.5."""
    gap = scores[:, 2:] - scores[:, :2]
    return torch.where(gap.abs() < 1e-5, 0.5, (gap > 0).float())


def expert_metrics(scores, mismatched):
    """Per expert over all pairs of the step, scores [n, 4] with the columns SCORES (NaN: no pair):
    gap = mean(teacher - student), acc = share of pairs ranked rightly (0.5 is the equilibrium, not
    a failure), loss (2), score = mean over the students; none of them when no rollout was valid.
    ground = the share of `mismatched` [m, 4] ranked rightly (near 1 for an expert that looks, 0.5:
    it reads style), absent where m = 0: fewer than two pictures, or a step without measurement."""
    metrics, scores = {}, scores[~scores[:, 0].isnan()]
    for k, name in enumerate("vr" if len(scores) else ""):
        student, teacher = scores[:, k], scores[:, k + 2]
        gap, right = teacher - student, ranked_rightly(scores)[:, k]
        loss = bradley_terry(teacher, student, torch.ones_like(gap, dtype=torch.bool))
        metrics |= {f"gap_{name}": gap.mean().item(), f"acc_{name}": right.mean().item()}
        metrics |= {f"loss_{name}": loss.item(), f"score_{name}": student.mean().item()}
    if len(mismatched):
        metrics |= zip(("ground_v", "ground_r"), ranked_rightly(mismatched).mean(0).tolist())
    return metrics


# ------------------------------------------------------------------------------- a step's gradient
def score_and_backward(disc, rows, args, world):
    """The scores of this rank's rows (list of Pairs), detached, for the rewards, and by the same
    forward the gradient of `pair_loss`, left in the parameters' .grad for the discriminator's step.
    No parameter changes here.

    -> scores of the pairs with students [pairs, 4] and of the ends of chains [m, 4], float32 on the
    CPU, columns SCORES, row after row. With --mismatch 0 the latter have a forward of their own
    without gradient: in the others' pack they would change how the others' sums are rounded."""
    kinds = [len(row.students) for row in rows], [len(row.mismatched) for row in rows]
    counts = world.sum(*map(sum, kinds))
    if args.mismatch > 0 or not counts[1]:
        return score_packs(disc, rows, counts, args, world)
    with torch.no_grad():
        alone = [replace(row, students=[]) for row in rows]
        _, mismatched = score_packs(disc, alone, counts, args, world)
    rows = [replace(row, mismatched=[]) for row in rows]
    scores, _ = score_packs(disc, rows, (counts[0], 0), args, world)
    return scores, mismatched


def score_packs(disc, rows, counts, args, world):
    """`score_and_backward`, of no_grad without backward: one forward per pack of at most
    args.max_tokens tokens, equally many on every rank. counts: see `pair_loss`."""
    lengths, none = [], torch.empty(0, len(SCORES))
    for row in rows:
        # every pack of a row repeats its prompt and its teacher
        fixed = len(row.prompt.input_ids) + response_tokens(row.teacher)
        lengths.append((fixed, row.branches()))
    packs, found = list(split_rows(lengths, args.max_tokens)), [(none, none)]
    for p in range(most(len(packs), world)):
        part = [rows[r].part(chosen) for r, chosen in packs[p]] if p < len(packs) else [IDLE_ROW]
        loss, *scores = pair_loss(disc, part, counts, args.score_l2, args.mismatch)
        if torch.is_grad_enabled():
            # FSDP averages over ranks, the loss is already a share of the global mean
            (loss * world.size).backward()
        found.append([kind.detach().float().cpu() for kind in scores])
    return tuple(torch.cat(kind) for kind in zip(*found))


# ------------------------------------------------ another picture's caption: --mismatch, ground_v
MIXTURES = (0.15, 0.3, 0.6)  # shares of a caption's words that are another's
LINES = re.compile(r"[^\n]*?(?:[.!?](?=\s)\s*|\n)|[^\n]+$")  # or sentences
SPACES = re.compile(r"(\s+)")


def add_mismatched(rows, world, tokenizer, chain=False):
    """Give each row with a picture the teacher's response to the next one, in the order of the
    global batch and in a cycle, that has another picture, with `chain` after a mixture for each of
    MIXTURES; nothing where all pictures are the same.

    rows: {place in the global batch: Pairs} of this rank, changed in place. A prompt whose rollouts
    span ranks is a row on each of them; the first has its mismatched response, so that it counts
    once and nothing depends on the number of ranks. In a cycle each response is right once and
    wrong once: what style alone says of them cancels, and lowers no loss (-log sigmoid is convex).
    """
    mine, batch = {}, {}
    for place, row in rows.items():
        if row.picture is not None:
            mine[place] = (world.rank, zlib.crc32(row.picture.numpy()), row.text)
    for part in world.gather(mine):
        batch = part | batch  # the first rank's stays
    places = sorted(batch)
    for i, place in enumerate(places):
        rank, picture, text = batch[place]
        others = (batch[other] for other in places[i + 1 :] + places[:i])
        other = next((text for _, pixels, text in others if pixels != picture), None)
        if rank == world.rank and other is not None:
            seed = zlib.crc32((text + other).encode())  # what is wrong at one rate is at the next
            mixed = [mix(text, other, rate, random.Random(seed)) for rate in MIXTURES if chain]
            for response in (*mixed, other):
                ids = encode_response(response, tokenizer)
                rows[place].mismatched.append(split_segments(ids, tokenizer))


def mix(mine, other, rate, rng):
    """Response text `mine`, in whose caption, at that rate, a word is the one that another
    teacher's caption has in its place: the third word of the second line for the third word there.
    Of lines, or sentences, with other numbers of words the whole is exchanged. So it is wrong in
    little, in the teacher's own style, and no truth is needed. rng: random.Random, of which as many
    numbers are drawn at every rate."""
    (_, begin), (end, _) = parse_spans(mine)[:2]  # the tags around the caption
    (_, other_begin), (other_end, _) = parse_spans(other)[:2]
    mixed = LINES.findall(mine[begin:end])
    new_lines = LINES.findall(other[other_begin:other_end])
    for i, (line, new_line) in enumerate(zip(mixed, new_lines)):
        words, new_words = SPACES.split(line), SPACES.split(new_line)
        if len(words) == len(new_words):
            pairs = zip(words, new_words)  # what stands between words stays
            chosen = [b if rng.random() < rate and a.strip() else a for a, b in pairs]
            mixed[i] = "".join(chosen)
        elif rng.random() < rate:
            mixed[i] = new_line
    return mine[:begin] + "".join(mixed) + mine[end:]


# ------------------------------------------------------------------------------------ checkpoints
BACKBONES = {"qwen3_vl": Qwen3VLModel, "qwen3_vl_moe": Qwen3VLMoeModel}  # by model_type
RELEASED_HEADS = ("v_head.1.weight", "v_head.summary.weight")  # in the shards of a released one


def load_discriminator(path, variant="moe", attn="sdpa", readout=None, world=None,
                       dtype=torch.float32):
    """A discriminator, by default in float32: from a folder that `save_discriminator` wrote, fresh
    on the backbone of any Qwen3-VL checkpoint, or the released Qwen3-VL-MoE discriminator with its
    head (then the variant is "learned"). variant, readout None: what it was trained with, of a
    fresh one "last". In a `world` that shards it is left on the meta device, without weights:
    runtime.shard reads them. Raises InputError when the checkpoint is none of these, another
    variant, or broken."""
    check_checkpoint(path)
    with about(f"discriminator {path}"):
        folder = local_folder(path)
        stored = stored_settings(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = BACKBONES[config.model_type]
        trained_as = "learned" if kind is Qwen3VLMoeModel else stored.get("variant")
        if variant is None or (trained_as, variant) == ("learned", "moe"):  # the flag's default
            variant = trained_as or "learned"
        if trained_as not in (None, variant):
            raise ValueError(f"trained as {trained_as}; pass --disc-variant {trained_as}")
        if variant == "learned" and kind is not Qwen3VLMoeModel:
            raise ValueError("neither a folder that align.py wrote nor a Qwen3-VL-MoE checkpoint")
        fresh = readout or "last"
        read_as = stored.get("readout", "last" if trained_as else fresh)
        if readout not in (None, read_as):
            raise ValueError(f"trained with --readout {read_as}, not {readout}")
        with torch.device("meta"):
            backbone = set_attention(kind(config).to(dtype).eval(), attn)
            disc = Discriminator(backbone, variant, read_as)
        multiply_patches(backbone.visual)
        found = check_weights(folder)
        names, unused = None, ()
        if not stored:
            names, unused = weights_of_another(disc, found), ("lm_head.weight", *RELEASED_HEADS)
        disc.stored = compare_weights(disc, found, names, unused)
        if world is None or world.mesh is None:
            read_weights(disc, "cpu")
    return disc


def stored_settings(path):
    """What `save_discriminator` wrote of variant and readout, {} for any other checkpoint."""
    settings = os.path.join(path, "discriminator.json")
    if not os.path.isfile(settings):
        return {}
    stored = read_json(settings)
    stored = {"readout": "last"} | (stored if isinstance(stored, dict) else {})
    for name, known in (("variant", VARIANTS), ("readout", READOUTS)):
        if stored.get(name) not in known:
            raise ValueError(f"discriminator.json: no {name} that is one of {', '.join(known)}")
    return stored


def weights_of_another(disc, found):
    """{parameter: weight that it is read from} in a checkpoint with the weights `found` that is no
    stored discriminator: the three copies of an MLP from one, the head from that of a released one
    (never from its value_head.pt, which is a pickle); without one heads are 0."""
    names = {}
    for name, _ in disc.named_parameters():
        if name.startswith("backbone."):
            weight = re.sub(r"\.mlp\.(shared|perception|reasoning)\.", ".mlp.", name)
            names[name] = weight.replace("backbone.", "model.", 1)
    if disc.variant == "learned":
        head = next((head for head in RELEASED_HEADS if head in found), RELEASED_HEADS[0])
        names["heads.perception.weight"] = head
    return names


def compare_tokenizers(tokenizer, path):
    """InputError unless `path`, the flag --disc, has the policy's vocabulary: the rollouts' ids go
    into the discriminator as they are. InputError, too, for what align.py wrote as a whole, or a
    state of it: as a backbone it would have fresh experts."""
    if path is not None:
        if os.path.isdir(inner := os.path.join(path, "discriminator")):
            raise InputError(f"--disc {path}: that is the policy, its discriminator is {inner}")
        other, _ = load_tokenizer(path, flag="--disc")
        if other.get_vocab() != tokenizer.get_vocab():
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
            settings = {"variant": disc.variant, "readout": disc.readout}
            write_json(os.path.join(out, "discriminator.json"), settings)


# ---------------------------------------------------------------------------------------- warm-up
def measure_pair(example, tokenizer, image_processor, system, args):
    """-> (tokens of the prompt, of its responses), or None: too long. Raises InputError unless both
    responses are well-formed, and both or neither with an answer: otherwise that alone would tell
    them apart. With --mismatch a teacher's is enough that has a picture."""
    texts = {"teacher": example.response, "student": example.rejected}
    if args.mismatch > 0 and example.images and example.rejected is None:
        texts.pop("student")
    responses = {who: parse_response(text or "") for who, text in texts.items()}
    for who, response in responses.items():
        if response is None:
            hint = f"no well-formed {who} response (columns {who}_caption and {who}_cot)"
            raise InputError(f"{example.id}: {hint}")
    if len({bool(response.answer) for response in responses.values()}) > 1:
        raise InputError(f"{example.id}: of teacher_cot and student_cot only one has an answer")
    prompt = measure_prompt(example, tokenizer, image_processor, system, args)
    tokens = sum(len(encode_response(text, tokenizer)) for text in texts.values())
    return prompt and (prompt[0], tokens)


def encode_pair(example, tokenizer, image_processor, system, args):
    """Example with a teacher's and maybe a student's response, which `measure_pair` has let pass ->
    Pairs."""
    prompt = encode_prompt(example, tokenizer, image_processor, None, system)
    texts = filter(None, (example.response, example.rejected))
    ids = [encode_response(text, tokenizer) for text in texts]
    teacher, *students = [split_segments(response, tokenizer) for response in ids]
    return make_pairs(prompt, example.response, teacher, students, tokenizer, args.disc_variant)


def warm_up(args, world):
    """Train a discriminator on offline (teacher, student) pairs, with --mismatch also on teacher
    responses alone, and write it to --out, as align.py takes it with --disc. AdamW, cosine with a
    warm-up, one epoch, as in the paper."""
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    attn, system = choose_attention(args.attn, world), system_prompt(args)
    tools = tokenizer, image_processor, system, args
    found = look(args.pairs, lambda example: measure_pair(example, *tools), args, world)
    identify(args, world, found.identity)  # a --resume of another run ends here
    disc = load_discriminator(args.ckpt, args.disc_variant, attn, args.readout, world)
    args.disc_variant, args.readout = disc.variant, disc.readout
    units, heads = [*disc.backbone.language_model.layers, disc.backbone.visual], disc.heads.values()
    disc = shard(disc, units, world, Discriminator.scores, heads, args.checkpointing)
    optimizer = make_optimizer(disc, args.lr, args.weight_decay)
    steps = args.steps
    if steps is None:
        steps = max(1, len(found.usable) // args.batch)
    parts, skips = {"discriminator": (disc, optimizer)}, Skips()
    progress, metrics = begin(args, world, parts, steps, skips)
    feed = Feed(found, lambda example: encode_pair(example, *tools), args, world, progress)
    feed.plan(steps, args.batch)
    for step in range(progress["step"], steps):
        began = time.time()
        # data
        drawn = feed.draw(args.batch, step)
        rows = {item.place: item.encoded for item in drawn if item.encoded is not None}
        if args.mismatch > 0 or (step + 1) % GROUND_EVERY == 0:
            add_mismatched(rows, world, tokenizer, chain=args.mismatch > 0)
        # update discriminator
        scores = score_and_backward(disc, list(rows.values()), args, world)  # leaves the gradient
        experts = expert_metrics(*(torch.cat(kind) for kind in zip(*world.gather(scores))))
        lr, norm = cosine(step, steps, args.lr, args.warmup), None
        if experts:  # otherwise all pictures of the step are the same
            norm = skips.step(disc, optimizer, lr, args.clip, world, 0.0)
        # log
        progress = {"step": step + 1, **feed.progress()}
        metrics = {"step": step + 1, **experts, "grad_norm": norm, "lr": lr, **feed.counts}
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
def score_examples(disc, examples, indices, tokenizer, image_processor, args, world):
    """A few examples, packed -> {index: line of scores.jsonl}: {"id", "perception", "reasoning",
    "combined"}, for --probe with the scores "other_perception" and "other_reasoning" of another
    one's response. The scores are None, and `reason` says why, for a response without the three
    blocks, an over-long prompt and an example that cannot be read."""
    system, lines, rows = system_prompt(args), {}, {}
    for i in indices:
        line = {"id": "{}:{}".format(*examples.where(i))}
        line |= {"perception": None, "reasoning": None, "combined": None}
        lines[i] = line
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
            text = example.response
            rows[i] = make_pairs(prompt, text, response, [], tokenizer, disc.variant)
    if args.probe:  # among these: a rank has them all
        add_mismatched(dict(enumerate(rows.values())), replace(world, rank=0, size=1), tokenizer)
    lengths, usable = [], list(rows)
    for row in rows.values():  # the two responses as one branch, which is not split
        lengths.append((len(row.prompt.input_ids), [response_tokens(row.teacher, *row.mismatched)]))
    for pack in split_rows(lengths, args.max_tokens):
        part = [usable[r] for r, _ in pack]
        scores = iter(row_scores(disc, [rows[i] for i in part]).T.tolist())
        for i in part:
            d_v, d_r = next(scores)
            combined = args.alpha * d_v + (1 - args.alpha) * d_r
            lines[i] |= {"perception": d_v, "reasoning": d_r, "combined": combined}
            if rows[i].mismatched:
                lines[i] |= zip(("other_perception", "other_reasoning"), next(scores))
    return lines


def score(args, world):
    """Score every response of a data set, with --probe also in another one's place, and report."""
    examples = load_examples(args.score or args.probe, args.split)
    tools = load_tokenizer(args.ckpt, args)
    attn, lines = choose_attention(args.attn, world), {}
    disc = load_discriminator(args.ckpt, None, attn, dtype=world.dtype).to(world.device).eval()
    order = np.arange(len(examples))
    if args.probe:  # neighbours in the order are pairs
        order = np.random.default_rng(args.seed).permutation(order)
    blocks = np.array_split(order, math.ceil(len(order) / 64))  # on any number of ranks the same
    for block in tqdm(blocks[world.rank :: world.size], disable=world.rank > 0):
        lines |= score_examples(disc, examples, block.tolist(), *tools, args, world)
    for part in world.gather(lines):
        lines |= part
    lines = [lines[i] for i in range(len(examples))]
    if all(line["combined"] is None for line in lines):
        first = "{id}: {reason}".format(**lines[0])
        raise InputError(f"no response can be scored; the first, {first}")
    if args.probe and not any("other_perception" in line for line in lines):
        raise InputError("--probe: no two pictures with a response differ")
    if world.rank == 0:
        report(lines, args.out)


def report(lines, out):
    """Write OUT/scores.jsonl and OUT/results.json, print the distributions and ground_v, ground_r
    of the pairs, if there are any."""
    write_rows(os.path.join(out, "scores.jsonl"), lines)
    scored = [line for line in lines if line["combined"] is not None]
    print(f"{len(scored)} of {len(lines)} responses scored; scores.jsonl says why others are not")
    results = {"scored": len(scored), "rows": len(lines), "quantiles": {}}
    for key in ("perception", "reasoning", "combined"):
        values = np.quantile([line[key] for line in scored], [0, 0.05, 0.5, 0.95, 1]).tolist()
        results["quantiles"][key] = dict(zip(("min", "5%", "50%", "95%", "max"), values))
        cells = [f"{name} {value:.3f}" for name, value in results["quantiles"][key].items()]
        print(f"{key:>10}  " + "  ".join(cells))
    scores = itemgetter("other_perception", "other_reasoning", "perception", "reasoning")
    pairs = [scores(line) for line in scored if "other_perception" in line]
    right = ranked_rightly(torch.tensor(pairs).view(-1, len(SCORES)))
    for name, column in zip(("ground_v", "ground_r"), right.T if pairs else ()):
        share, (low, high) = column.mean().item(), wilson(column.sum().item(), len(column))
        results[name] = {"share": share, "low": low, "high": high, "pairs": len(column)}
        print(f"{name:>10}  {share:.3f} ({low:.3f} to {high:.3f}) of {len(column)} pairs")
    write_json(os.path.join(out, "results.json"), results)


def wilson(right, n, z=1.96):
    """95 % score interval of a share of n (Wilson 1927)."""
    middle, half = right + z**2 / 2, z * math.sqrt(right * (n - right) / n + z**2 / 4)
    return (middle - half) / (n + z**2), (middle + half) / (n + z**2)


def main():
    args = parse_args()
    if args.pairs:
        warm_up(args, setup(args, {"--batch": args.batch}))
    else:
        score(args, setup(args))


if __name__ == "__main__":
    run(main)
