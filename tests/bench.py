"""Run: python tests/bench.py [--only a b c d e f g h i] [--device cpu|cuda] [--size toy|2b|4b]
     [--rounds 3]

One Markdown table; every row is a ratio inside one process: same weights, prompts and responses,
the results of both sides compared before the clock starts, then the sides in turn for several
rounds, and the median of their ratios.

    a  discriminator, scores + gradient of one group: against the authors' schedule (per rollout two
       scoring forwards, then four forwards with gradient, each alone with prompt and image) and
       against padded batches (a scoring pass, then a pass with gradient; sorted by length, the
       teacher once) of the batch size that is fastest here
    b  policy, log-probs + gradient of one group: against one padded batch that repeats prompt and
       image N times
    c  sampling of one group: against generate(num_return_sequences=N), the same number of tokens;
       then with ragged stops (one token in 20 ends a response), time a token
    d  peak memory of log-probs + gradient of 4 groups, vocabulary 151936: against the logits of all
       targets at once
    e  a whole alignment step of 4 groups: share of each phase; the tokens of the responses count
    f  the same step without optimizers: growth over a small base when P, R, N or the number of
       prompts doubles
    g  greedy responses to 64 prompts of P/2 to P tokens: against generate on batches padded on the
       left, of the batch size that is fastest here; the first token alone, then up to R tokens of
       which one in 20 ends a response, then up to 2 R, one in 10
    h  SFT, an epoch of 64 demonstrations of 230 to 490 tokens in batches of 16, optimizer included:
       against transformers' Trainer with batches padded on the right (needs accelerate)
    i  a whole step of RL, 4 pictures x N rollouts: processor, sampling, reward, advantage, update:
       against TRL's GRPOTrainer as it comes (prompts of 325 tokens; toy only; needs trl)

P tokens of a prompt with its image, R of a response, N responses. toy: float32, P 256, R 64, N 16.
2b, 4b: shapes of Qwen3-VL, random weights, bfloat16, activations recomputed, P 1024, R 512, N 16
(e, both optimizers: 2b fits into 80 GB, 4b needs 141 GB).

MFU (CUDA) = FLOPs of the tokens that our side computes / time / peak of the card;
FLOPs = 3 * (2 * (layer weights * tokens + vision weights * patches + head weights * targets)
             + 4 * layers * heads * dim * (query, key) pairs).
Recomputation and the attention inside the vision tower do not count.
"""

import argparse
import copy
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel  # noqa: E402

import align  # noqa: E402
import rl  # noqa: E402
import rollout  # noqa: E402
import rows as rows_module  # noqa: E402
import runtime  # noqa: E402
import sft  # noqa: E402
from data import Example, encode_prompt, mrope_positions  # noqa: E402
from rows import ATTENTION, Prompt, banned_ids, set_attention, target_logprobs  # noqa: E402
from discriminator import Discriminator, bradley_terry  # noqa: E402
from toy import checkpoint, world  # noqa: E402

ARGS = argparse.Namespace(max_tokens=16384, disc_variant="moe", score_l2=1e-3, temperature=1.0,
                          mismatch=0.0)
LOWEST = torch.finfo(torch.float32).min
VOCABULARY = 151936
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s
SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
               "deepstack_visual_indexes": [5, 11, 17]}  # fmt: skip
LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
               "deepstack_visual_indexes": [8, 16, 24]}  # fmt: skip


@dataclass
class Shape:
    """What differs between the sizes of Qwen3-VL."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    tied: bool  # embedding and head
    tower: dict


SHAPES = {
    "2b": Shape(2048, 28, 16, 6144, True, SMALL_TOWER),
    "4b": Shape(2560, 36, 32, 9728, True, SMALL_TOWER),
    "8b": Shape(4096, 36, 32, 12288, False, LARGE_TOWER),
}


# ------------------------------------------------------------------------------------------ setting
def qwen_config(size):
    """The config of a Qwen3-VL of one of SHAPES."""
    shape = SHAPES[size]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
            "mrope_interleaved": True}  # fmt: skip
    text = {"vocab_size": VOCABULARY, "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": shape.ffn,
            "rope_parameters": rope}  # fmt: skip
    vision = {**shape.tower, "out_hidden_size": shape.hidden, "num_position_embeddings": 2304}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied)


def make_toy(folder):
    """The toy's checkpoint, with random weights."""
    texts = [world.respond(world.make_problem(np.random.default_rng(i))) for i in range(200)]
    checkpoint.make_checkpoint(folder, texts)


def build_policy(size, device):
    torch.manual_seed(0)
    if size == "toy":
        with tempfile.TemporaryDirectory() as folder:
            make_toy(folder)
            return runtime.load_policy(folder).to(device)
    with torch.device(device):
        return Qwen3VLForConditionalGeneration._from_config(qwen_config(size), dtype=torch.bfloat16)


def build(size, device):
    """(policy, discriminator): the same backbone weights, random heads."""
    policy = build_policy(size, device)
    backbone = Qwen3VLModel._from_config(copy.deepcopy(policy.config), dtype=policy.dtype)
    backbone.to(device).load_state_dict(policy.model.state_dict())
    disc = Discriminator(backbone).to(device)
    for head in disc.heads.values():
        torch.nn.init.normal_(head.weight, std=0.1)
    if size != "toy":
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    for_rows(policy)
    for_rows(backbone)
    policy.generation_config.eos_token_id = None  # every response has its full length
    return policy, disc


def make_prompt(config, length, rng):
    """A prompt of `length` tokens, three quarters of them an image of noise."""
    side, vision = isqrt(int(0.77 * length)), config.vision_config
    merge = vision.spatial_merge_size
    image = [config.image_token_id] * side**2
    ids = [config.vision_start_token_id, *image, config.vision_end_token_id]
    ids = torch.tensor(ids + rng.integers(10, 300, length - len(ids)).tolist())
    grid = torch.tensor([[1, side * merge, side * merge]])
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = rng.standard_normal(((side * merge) ** 2, patch), dtype=np.float32)
    positions = mrope_positions(ids, grid, config.image_token_id, merge)
    return Prompt(ids, positions, torch.from_numpy(pixels), grid)


def make_group(config, sizes, prompts=1):
    """`prompts` groups: records with random responses, cut into (caption, trace) anywhere, as their
    teachers' are, and random advantages."""
    rng, records = np.random.default_rng(0), []

    def response():
        return rng.integers(10, 300, sizes.R).tolist()

    def cut(ids):
        place = int(rng.integers(sizes.R // 4, sizes.R - sizes.R // 4))
        return ids[:place], ids[place:]

    for group in range(prompts):
        prompt = make_prompt(config, sizes.P, rng)
        teacher = cut(response())
        for _ in range(sizes.N):
            drawn = rollout.Rollout(response(), [0.0] * sizes.R, True)
            segments = cut(drawn.ids), teacher
            example = Example("", [], response="")
            record = rl.Record(group, len(records), example, prompt, drawn, "", *segments)
            record.advantage = float(rng.standard_normal(dtype=np.float32))
            records.append(record)
    students = [record.segments for record in records]
    return SimpleNamespace(prompt=prompt, records=records, students=students, teacher=teacher)


def sample_group(policy, group, sizes, **settings):
    """Draw the responses of a group's records anew, as a stage's rollout does."""
    prompts = [record.prompt for record in group.records[:: sizes.N]]
    settings |= {"max_new_tokens": sizes.R, "eos_id": -1}
    drawn = rollout.sample(policy.eval(), prompts, sizes.N, **settings)
    for record, one_drawn in zip(group.records, sum(drawn, [])):
        record.rollout = one_drawn


def stocked(model, function, *args, **kwargs):
    """Call a function while the model's attention is the one that transformers chooses."""
    model.set_attn_implementation("sdpa")
    try:
        return function(*args, **kwargs)
    finally:
        for_rows(model)


def for_rows(model):
    """The attention that the stages choose."""
    return set_attention(model, "flash" if model.device.type == "cuda" else "sdpa")


def padded(prompt, segments, device):
    """Separate sequences [prompt | segment], padded on the right, prompt and image repeated."""
    tails = [torch.tensor(segment, dtype=torch.long) for segment in segments]
    sequences = [torch.cat([prompt.input_ids, tail]) for tail in tails]
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    after = prompt.next_position + torch.arange(ids.shape[1] - len(prompt.input_ids))
    positions = torch.cat([prompt.position_ids, after.expand(3, -1)], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions[:, None].expand(-1, len(ids), -1),
        "pixel_values": prompt.pixel_values.repeat(len(ids), 1),
        "image_grid_thw": prompt.image_grid_thw.repeat(len(ids), 1),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


# ---------------------------------------------------------------------------------------- measuring
def take_gradient(model):
    """The first elements of every gradient, all of which are then dropped."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return torch.cat([g.flatten()[:4096].float().cpu() for g in gradients])


def same(ours, theirs, tolerance):
    """Assert that two tensors agree; the absolute tolerance is a share of the largest value."""
    scale = float(theirs.abs().max())
    assert scale > 0
    close = torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)
    assert close, (ours - theirs).abs().max() / scale


def clock(device, *sides, rounds=3, warm=True):
    """Run the sides in turn -> per side (seconds of each round, peak bytes on CUDA)."""
    times, peaks = [[] for _ in sides], [0] * len(sides)
    for turn in range(rounds + warm):
        for i, side in enumerate(sides):
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            side()
            if device == "cuda":
                torch.cuda.synchronize()
                peaks[i] = max(peaks[i], torch.cuda.max_memory_allocated())
            if turn >= warm:
                times[i].append(time.perf_counter() - began)
    return list(zip(times, peaks))


def flops(policy, prompt, branches, head=True):
    """Of one row, forward and backward, by the formula at the top."""
    text, visual = policy.config.text_config, policy.model.visual
    targets, start = sum(map(len, branches)), len(prompt.input_ids)
    pairs = start * (start + 1) // 2
    for branch in branches:
        pairs += start * len(branch) + len(branch) * (len(branch) + 1) // 2
    layers = policy.model.language_model.layers
    linear = sum(p.numel() for p in layers.parameters()) * (start + targets)
    linear += sum(p.numel() for p in visual.parameters()) * len(prompt.pixel_values)
    linear += head * text.vocab_size * text.hidden_size * targets
    width = text.num_attention_heads * text.head_dim
    return 3 * (2 * linear + 4 * text.num_hidden_layers * width * pairs)


def ratio_row(name, what, ours, theirs, tokens, target, work=None):
    """Cells of one line; ours and theirs as `clock` gives them, tokens and FLOPs (`work`) of one
    round of our side."""
    (seconds, peak), (other, other_peak) = ours, theirs
    ratio, middle = median(b / a for a, b in zip(seconds, other)), median(seconds)
    speed, memory, mfu = f"{tokens / middle:.0f}", "", ""
    if peak:  # on CUDA
        memory = f"{peak / 2**30:.1f} / {other_peak / 2**30:.1f}"
        name_of_card = torch.cuda.get_device_name()
        card = next((flop_s for gpu, flop_s in PEAK.items() if gpu in name_of_card), None)
        mfu = f"{work / middle / card:.0%}" if card and work else ""
    times = f"{middle:.3f}", f"{median(other):.3f}"
    return [name, what, f"{ratio:.2f}", target, *times, speed, memory, mfu]


# --------------------------------------------------------------------------------- a: discriminator
def segment_scores(disc, prompt, segments, k):
    """Scores [n] by expert k of segments as separate sequences in one padded batch."""
    start, width = len(prompt.input_ids), max(map(len, segments))
    head = list(disc.heads.values())[k]
    inputs = padded(prompt, segments, head.weight.device)
    inputs["segment_sizes"] = [start, 0, width] if k else [start, width, 0]
    hidden = disc.backbone(**inputs, use_cache=False).last_hidden_state
    ends = hidden[range(len(segments)), [start + len(segment) - 1 for segment in segments]]
    return head(ends.float())[:, 0]


def pair_loss(teacher, student, count):
    loss = bradley_terry(teacher, student, torch.ones_like(student, dtype=torch.bool), count)
    return loss + ARGS.score_l2 * 0.5 * (teacher.square() + student.square()).sum() / count


def authors_schedule(disc, group):
    score, teacher = partial(segment_scores, disc, group.prompt), group.teacher
    with torch.no_grad():
        scores = [torch.cat([score([pair[k]], k) for k in (0, 1)]) for pair in group.students]
    for pair in group.students:
        loss = 0.0
        for k in (0, 1):
            loss += pair_loss(score([teacher[k]], k), score([pair[k]], k), len(group.students))
        loss.backward()
    return torch.stack(scores)


def padded_batches(disc, group, batch):
    scores, count = [], len(group.students)

    def score_all(segments, k):
        order, parts = sorted(range(len(segments)), key=lambda i: len(segments[i])), []
        for start in range(0, len(order), batch):
            part = [segments[i] for i in order[start : start + batch]]
            parts.append(segment_scores(disc, group.prompt, part, k))
        return torch.cat(parts)[np.argsort(order)]

    for k in (0, 1):
        students = [pair[k] for pair in group.students]
        with torch.no_grad():
            scores.append(score_all(students, k))
        d = score_all([group.teacher[k], *students], k)
        pair_loss(d[:1].expand(count), d[1:], count).backward()
    return torch.stack(scores, dim=1)


def bench_discriminator(setting):
    disc, sizes, one = setting.disc.train(), setting.sizes, setting.one
    group = make_group(setting.policy.config, sizes)

    def ours():
        return align.score_records(disc, group.records, None, ARGS, one)[0]

    def authors():
        return stocked(disc.backbone, authors_schedule, disc, group)

    def batches(size):
        return stocked(disc.backbone, padded_batches, disc, group, size)

    scores, gradient = ours()[:, :2], take_gradient(disc)
    for side in (authors, partial(batches, 8)):
        same(scores, side().cpu(), setting.tolerance)
        same(gradient, take_gradient(disc), setting.tolerance)
    trial = {}
    for size in (2, 4, 8, sizes.N + 1):
        [(seconds, _)] = clock(setting.device, partial(batches, size), rounds=1)
        trial[size] = min(seconds)
    size = min(trial, key=trial.get)
    sides = ours, authors, partial(batches, size)
    row, per_pair, per_batch = clock(setting.device, *sides, rounds=setting.rounds)
    disc.zero_grad(set_to_none=True)
    responses = [group.teacher, *group.students]
    branches = [segments[k] for k in (0, 1) for segments in responses]
    work = flops(setting.policy, group.prompt, branches, head=False)
    tokens = sizes.P + sum(map(len, branches))
    what = "discriminator / authors' schedule"
    yield ratio_row("a", what, row, per_pair, tokens, ">= 8", work)
    what = f"discriminator / padded batches of {size}"
    yield ratio_row("a", what, row, per_batch, tokens, ">= 2", work)


# ------------------------------------------------------------------------ b, c: policy and sampling
def padded_logprobs(policy, prompt, branches):
    """Log-probs [n, R] of branches of one length as separate sequences in one batch; logits of the
    responses only."""
    targets = torch.tensor(branches, device=policy.device)
    inputs = padded(prompt, branches, policy.device)
    keep = targets.shape[1] + 1
    logits = policy(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
    banned = torch.tensor(banned_ids(policy), device=policy.device)
    logits = logits.index_fill(-1, banned, LOWEST)
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def padded_update(policy, group):
    logp = padded_logprobs(policy, group.prompt, [record.rollout.ids for record in group.records])
    mask = torch.ones_like(logp, dtype=torch.bool)
    advantages = torch.tensor([record.advantage for record in group.records]).to(logp)
    loss, _ = rl.policy_loss(logp, logp.detach(), advantages, mask, "grpo")
    loss.backward()


def bench_policy(setting):
    policy, sizes, one = setting.policy.train(), setting.sizes, setting.one
    group = make_group(policy.config, sizes)

    def ours():
        rl.accumulate_policy_gradient(policy, group.records, "grpo", ARGS, one)

    theirs = partial(stocked, policy, padded_update, policy, group)
    ours()
    gradient = take_gradient(policy)
    theirs()
    same(gradient, take_gradient(policy), setting.tolerance)
    row, batch = clock(setting.device, ours, theirs, rounds=setting.rounds)
    policy.zero_grad(set_to_none=True)
    work = flops(policy, group.prompt, [record.rollout.ids for record in group.records])
    tokens = sizes.P + sizes.N * sizes.R
    yield ratio_row("b", "policy update / padded batch", row, batch, tokens, ">= 1.8", work)


def generate_inputs(prompts, model):
    """Prompts padded on the left, as generate wants them; it works out their positions."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for ids_row, mask_row, prompt in zip(ids, mask, prompts):
        ids_row[longest - len(prompt.input_ids) :] = prompt.input_ids
        mask_row[longest - len(prompt.input_ids) :] = 1
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts]),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in prompts]),
    }
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def ends_of(model, one_in=20):
    """Ids that end a response in the benches with ragged stops."""
    return list(range(10, model.config.text_config.vocab_size, one_in))


def until_end(ids, ends):
    """A sequence as generate returns it, without what follows its end."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


def bench_sampling(setting):
    policy, sizes = setting.policy.eval(), setting.sizes
    prompt = make_prompt(policy.config, sizes.P, np.random.default_rng(0))
    settings = {
        "num_return_sequences": sizes.N,
        "max_new_tokens": sizes.R,
        "do_sample": True,
        "top_k": 0,
        "pad_token_id": 0,
        "suppress_tokens": banned_ids(policy),
    }
    settings |= generate_inputs([prompt], policy)
    ours = partial(rollout.sample, policy, [prompt], sizes.N, max_new_tokens=sizes.R)
    theirs = partial(stocked, policy, policy.generate, **settings)
    drawn = ours(eos_id=-1)[0]
    out = theirs(return_dict_in_generate=True, output_scores=True)
    recorded = policy.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)

    def again(branches):
        with torch.no_grad():
            return stocked(policy, padded_logprobs, policy, prompt, branches).cpu()

    mine = torch.tensor([r.logprobs for r in drawn])
    same(mine, again([r.ids for r in drawn]), setting.tolerance)
    same(recorded.cpu(), again(out.sequences[:, sizes.P :].tolist()), setting.tolerance)
    times = clock(setting.device, partial(ours, eos_id=-1), theirs, rounds=setting.rounds)
    yield ratio_row("c", "sample / generate", *times, sizes.N * sizes.R, ">= 1.9")

    # ragged stops: every round draws other responses, what counts is the time of a token
    ends, rounds, tokens = ends_of(policy), iter(range(2 * setting.rounds + 2)), ([], [])

    def ours_ragged():
        drawn = ours(eos_id=ends, seeds=[(next(rounds),)])[0]
        tokens[0].append(sum(len(r.ids) for r in drawn))

    def theirs_ragged():
        drawn = theirs(eos_token_id=ends)[:, sizes.P :].tolist()
        tokens[1].append(sum(len(until_end(ids, ends)) for ids in drawn))

    times = clock(setting.device, ours_ragged, theirs_ragged, rounds=setting.rounds)
    each = []  # seconds for as many tokens as ours were in the middle
    for (seconds, peak), counts in zip(times, tokens):
        usual = median(tokens[0])
        each.append(([s / n * usual for s, n in zip(seconds, counts[1:])], peak))
    yield ratio_row("c", "sample / generate, ragged stops", *each, median(tokens[0]), ">= 1.5")


# ----------------------------------------------------------------------------------- d: head memory
class GivenStates:
    """A backbone that has computed its hidden states [T, D] already."""

    language_model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=ATTENTION["sdpa"]))

    def __init__(self, states):
        self.states = states

    def __call__(self, **inputs):
        return SimpleNamespace(last_hidden_state=self.states[None])


def memory_meters(device):
    """(bytes in use now, function that gives their peak from now on)"""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated

    def status(key):  # Linux; ru_maxrss would start at the peak of the parent process
        return 1024 * int(Path("/proc/self/status").read_text().split(key)[1].split()[0])

    return status("VmRSS:"), partial(status, "VmHWM:")


def head_memory(whole, tokens, hidden, device):
    """(peak growth in bytes, log-probs, gradient of the hidden states) of log-probs + gradient of
    `tokens` targets."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    head = torch.nn.Linear(hidden, VOCABULARY, bias=False, device=device, dtype=dtype)
    states = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(10, VOCABULARY - 100, (tokens,), device=device)
    config = SimpleNamespace(
        image_token_id=0, video_token_id=1, vision_start_token_id=2,
        text_config=SimpleNamespace(vocab_size=VOCABULARY),
    )  # fmt: skip
    model = SimpleNamespace(model=GivenStates(states), lm_head=head, config=config)
    source = torch.arange(tokens, device=device)
    pack = SimpleNamespace(inputs={"pixel_values": 0}, source=source, targets=targets)
    before, peak = memory_meters(device)
    if whole:
        banned = torch.tensor(banned_ids(model), device=device)
        logits = head(states).float().index_fill_(-1, banned, LOWEST)
        logp = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        del logits
    else:
        logp = target_logprobs(model, pack)[0]
    logp.mean().backward()
    return peak() - before, logp.detach().cpu().numpy(), states.grad.float().cpu().numpy()


def bench_memory(setting):
    results, tokens = [], min(16384, 4 * setting.sizes.N * setting.sizes.R)
    hidden = setting.policy.config.text_config.hidden_size
    for whole in (False, True):
        # the peak of a process never falls: one for each side
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(head_memory, (whole, tokens, hidden, setting.device)))
    (ours, *values), (theirs, *others) = results
    for left, right in zip(values, others):
        same(torch.from_numpy(left), torch.from_numpy(right), setting.tolerance)
    what, ratio = f"peak of log-probs / full logits, {tokens} targets", f"{theirs / ours:.1f}"
    memory = f"{ours / 2**30:.2f} / {theirs / 2**30:.2f}"
    yield ["d", what, ratio, ">= 8", "", "", "", memory, ""]


# ----------------------------------------------------------------------------- e, f: the whole step
def step_phases(setting, sizes, prompts, learn):
    """{name: function} of an alignment step; they hand their results on in `group`."""
    policy, disc, one = setting.policy, setting.disc, setting.one
    group = make_group(policy.config, sizes, prompts)
    optimizers = {}
    if learn:
        optimizers = {model: runtime.make_optimizer(model, 1e-6, 0.01) for model in (policy, disc)}

    def step(model):
        if learn:
            runtime.Skips().step(model, optimizers[model], 1e-6, 1.0, one, 0.0)
        else:
            model.zero_grad()

    def discriminator():
        half = sizes.R // 2
        for r in group.records:
            r.segments = r.rollout.ids[:half], r.rollout.ids[half:]
        group.scores, _ = align.score_records(disc.train(), group.records, None, ARGS, one)
        step(disc)

    def update():
        d_v, d_r = group.scores[:, :2].T.reshape(2, prompts, sizes.N)
        valid = torch.ones_like(d_v, dtype=torch.bool)
        advantages = align.alignment_advantages(d_v, d_r, valid).flatten().tolist()
        for r in group.records:
            r.advantage = advantages[r.index]
        metrics = rl.accumulate_policy_gradient(policy.train(), group.records, "grpo", ARGS, one)
        # sampling and update agree on the log-probs
        assert metrics["drift"] <= setting.tolerance, metrics
        step(policy)

    return {
        "rollout": partial(sample_group, policy, group, sizes),
        "reward + discriminator update": discriminator,
        "policy update": update,
    }


def bench_step(setting):
    sizes = setting.sizes
    phases, tokens = step_phases(setting, sizes, 4, True), 4 * sizes.N * sizes.R
    results = clock(setting.device, *phases.values(), rounds=setting.rounds)
    whole = [sum(seconds) for seconds in zip(*(seconds for seconds, _ in results))]
    results.append((whole, max(peak for _, peak in results)))
    for name, (seconds, peak) in zip([*phases, "all"], results):
        share, middle = median(a / b for a, b in zip(seconds, whole)), median(seconds)
        times = f"{middle:.3f}", f"{median(whole):.3f}", f"{tokens / middle:.0f}"
        memory = f"{peak / 2**30:.1f}" if peak else ""
        yield ["e", f"{name} / whole alignment step", f"{share:.2f}", "", *times, memory, ""]


def bench_growth(setting):
    base = {"P": 64, "R": 16, "N": 4, "prompts": 1}
    for name in base:
        steps, tokens = [], []
        for factor in (1, 2, 4, 8):
            sizes = SimpleNamespace(**{**base, name: base[name] * factor})
            phases = step_phases(setting, sizes, sizes.prompts, False).values()
            steps.append(lambda phases=phases: [phase() for phase in phases])
            tokens.append(sizes.prompts * (sizes.P + sizes.N * sizes.R))
        times = [seconds for seconds, _ in clock(setting.device, *steps, rounds=setting.rounds)]
        ratios = [median(b / a for a, b in zip(times[0], more)) for more in times[1:]]
        growth = " ".join(f"{t / tokens[0]:.1f}" for t in tokens[1:])
        what = f"step, {name} = {base[name]} x 2, 4, 8 / base (tokens: {growth})"
        last = median(times[-1])
        seconds = f"{last:.3f}", f"{median(times[0]):.3f}", f"{tokens[-1] / last:.0f}"
        yield ["f", what, " ".join(f"{ratio:.1f}" for ratio in ratios), "", *seconds, "", ""]


# --------------------------------------------------------------------------------- g: evaluation
def bench_evaluation(setting):
    policy, sizes, rng = setting.policy.eval(), setting.sizes, np.random.default_rng(0)
    lengths = rng.integers(sizes.P // 2, sizes.P + 1, 64).tolist()
    prompts = [make_prompt(policy.config, n, rng) for n in lengths]

    def ours(limit, ends):
        drawn = rollout.sample(policy, prompts, 1, max_new_tokens=limit, eos_id=ends,
                               temperature=0, slots=64)  # fmt: skip
        return [group[0].ids for group in drawn]

    def theirs(limit, ends, batch):
        settings = {"max_new_tokens": limit, "do_sample": False, "eos_token_id": ends,
                    "pad_token_id": 0, "suppress_tokens": banned_ids(policy)}  # fmt: skip
        found = []
        for start in range(0, len(prompts), batch):
            inputs = generate_inputs(prompts[start : start + batch], policy)
            out = stocked(policy, policy.generate, **inputs, **settings)
            found += out[:, inputs["input_ids"].shape[1] :].tolist()
        return [until_end(ids, ends) for ids in found]

    for limit, one_in in ((1, 20), (sizes.R, 20), (2 * sizes.R, 10)):
        given = limit, ends_of(policy, one_in)
        answers = ours(*given)
        equal = sum(a == b for a, b in zip(answers, theirs(*given, 16)))
        assert equal >= (64 if setting.tolerance < 0.1 else 1), f"{equal} of 64 responses are equal"
        sides = [partial(theirs, *given, batch) for batch in (8, 16, 32, 64)]
        tried = [median(t) for t, _ in clock(setting.device, *sides, rounds=1, warm=False)]
        best = sides[tried.index(min(tried))]
        times = clock(setting.device, partial(ours, *given), best, rounds=setting.rounds)
        tokens = [len(ids) for ids in answers]
        what = f"sample / generate of {best.args[-1]} of 64 prompts, {min(tokens)} to {max(tokens)}"
        what += f" tokens, {sum(tokens) / 64:.0f} in the mean"
        yield ratio_row("g", what, *times, sum(tokens), ">= 1.5" if limit > 1 else "")


# ---------------------------------------------------------------------------------------- h: SFT
def sft_batch(policy, part):
    """(Prompt of 200 tokens, response ids) pairs as transformers wants them, right-padded."""
    ids = [torch.cat([prompt.input_ids, torch.tensor(tail)]) for prompt, tail in part]
    labels = [torch.cat([torch.full((200,), -100), torch.tensor(tail)]) for _, tail in part]
    mask = [torch.ones(200 + len(tail), dtype=torch.int) for _, tail in part]
    ids = pad_sequence(ids, batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "mm_token_type_ids": (ids == policy.config.image_token_id).int(),
        "pixel_values": torch.cat([prompt.pixel_values for prompt, _ in part]),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt, _ in part]),
    }


def sft_trainer(setting, pairs, batch, folder):
    from transformers import PrinterCallback, Trainer, TrainingArguments

    options = TrainingArguments(
        folder, per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=1e-6,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", logging_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, use_cpu=setting.device == "cpu", bf16=False,
    )  # fmt: skip
    collate = partial(sft_batch, setting.policy)
    trainer = Trainer(setting.policy, options, train_dataset=pairs, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    return trainer


def bench_sft(setting):
    try:
        import accelerate  # noqa: F401
    except ImportError:
        yield ["h", "SFT / transformers' Trainer", "accelerate is missing", *[""] * 6]
        return
    policy, rng, batch, pairs = setting.policy.train(), np.random.default_rng(0), 16, []
    for length in rng.integers(30, 291, 64):
        response = rng.integers(10, 300, length).tolist()
        pairs.append((make_prompt(policy.config, 200, rng), response))
    args, one, skips = argparse.Namespace(max_tokens=16384), setting.one, runtime.Skips()
    optimizer = runtime.make_optimizer(policy, 1e-6, 0.0)

    def ours():
        for start in range(0, len(pairs), batch):
            loss, _ = sft.accumulate_gradient(policy, pairs[start : start + batch], args, one)
            skips.step(policy, optimizer, 1e-6, 1.0, one, loss)

    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_trainer(setting, pairs, batch, folder)
        sft.accumulate_gradient(policy, pairs[:batch], args, one)
        gradient = take_gradient(policy)
        count = sum(len(tail) for _, tail in pairs[:batch])
        inputs = trainer._prepare_inputs(sft_batch(policy, pairs[:batch]))

        def backward():
            trainer.compute_loss(policy, inputs, num_items_in_batch=count).backward()

        banned = torch.tensor(banned_ids(policy), device=policy.device)  # only in this comparison
        hook = policy.lm_head.register_forward_hook(
            lambda module, given, logits: logits.index_fill(-1, banned, LOWEST)
        )
        stocked(policy, backward)
        hook.remove()
        same(gradient, take_gradient(policy), setting.tolerance)
        theirs = partial(stocked, policy, trainer.train)
        mine, padded_batch = clock(setting.device, ours, theirs, rounds=setting.rounds)
    policy.zero_grad(set_to_none=True)
    tokens = sum(200 + len(tail) for _, tail in pairs)
    yield ratio_row("h", "SFT / transformers' Trainer", mine, padded_batch, tokens, ">= 1.5")


# ---------------------------------------------------------------------------------------- i: RL
def word_reward(completions, **kwargs):
    """TRL's form of a reward."""
    return [len(str(words)) % 7 / 7 for words in completions]


def their_trainer(setting, folder, rows, steps):
    """A GRPOTrainer of the checkpoint; its processor is Qwen3-VL's without the one for videos,
    which needs torchvision."""
    from datasets import Dataset
    from transformers import PrinterCallback, Qwen3VLProcessor
    from trl import GRPOConfig, GRPOTrainer

    class Processor(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, *given):
            pass

    policy = runtime.load_policy(folder)
    tokenizer, image_processor = runtime.load_tokenizer(folder)
    processor = Processor(image_processor, tokenizer, None, chat_template=tokenizer.chat_template)
    unwanted = [policy.config.image_token_id, tokenizer.eos_token_id]
    config = GRPOConfig(
        f"{folder}/trl", per_device_train_batch_size=4 * setting.sizes.N, steps_per_generation=1,
        num_generations=setting.sizes.N, max_completion_length=setting.sizes.R, top_k=0,
        generation_kwargs={"suppress_tokens": unwanted}, loss_type="grpo", learning_rate=1e-6,
        lr_scheduler_type="constant", gradient_checkpointing=False, max_steps=steps,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [row["prompt"] for row in rows],
                              "image": [row["image"] for row in rows]})  # fmt: skip
    trainer = GRPOTrainer(policy, word_reward, config, data, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    return trainer


def their_records(trainer):
    """The rollouts of TRL's last step, with its advantages, as records of ours."""
    batch, config = trainer._buffered_inputs[0], trainer.model.config
    merge = config.vision_config.spatial_merge_size
    pixels = batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist())
    records = []
    for i, ids in enumerate(batch["prompt_ids"]):
        grid = batch["image_grid_thw"][i : i + 1]
        positions = mrope_positions(ids, grid, config.image_token_id, merge)
        tokens = batch["completion_ids"][i].tolist()
        drawn = rollout.Rollout(tokens, [0.0] * len(tokens), True)
        prompt = Prompt(ids, positions, pixels[i], grid)
        records.append(rl.Record(i, i, None, prompt, drawn, ""))
        records[-1].advantage = batch["advantages"][i].item()
    return records


def bench_rl(setting):
    try:
        import accelerate  # noqa: F401
        import trl  # noqa: F401
    except ImportError:
        yield ["i", "RL step / TRL", "trl or accelerate is missing", *[""] * 6]
        return
    sizes, one, steps = setting.sizes, setting.one, 3
    question, rows, examples = "what is to be seen? " * 8, [], []
    with tempfile.TemporaryDirectory() as folder:
        make_toy(folder)
        policy, tools = for_rows(runtime.load_policy(folder)), runtime.load_tokenizer(folder)
        for i in range(4):
            cells = world.make_problem(np.random.default_rng(i))["cells"]
            file, image = f"{folder}/{i}.png", world.draw(cells, i).resize((448, 448))
            image.save(file)
            rows.append({"prompt": [{"role": "user", "content": question}], "image": image})
            prompt = [{"role": "user", "content": f"<image>{question}"}]
            examples.append(Example(str(i), prompt, images=[file]))
        optimizer, skips = runtime.make_optimizer(policy, 1e-6, 0.0), runtime.Skips()

        def step():
            prompts = [encode_prompt(e, *tools, None, None) for e in examples]
            drawn = rollout.sample(policy, prompts, sizes.N, max_new_tokens=sizes.R, eos_id=-1)
            records = []
            for group, (prompt, part) in enumerate(zip(prompts, drawn)):
                for r in part:
                    text, place = tools[0].decode(r.ids), len(records)
                    records.append(rl.Record(group, place, examples[group], prompt, r, text))
            rewards = torch.tensor(word_reward([r.text for r in records]))
            advantages = rl.group_advantages(rewards.view(-1, sizes.N)).flatten().tolist()
            for r, advantage in zip(records, advantages):
                r.advantage = advantage
            metrics = rl.accumulate_policy_gradient(policy, records, "grpo", ARGS, one)
            skips.step(policy, optimizer, 1e-6, 1.0, one, metrics["loss"])

        def ours():
            for _ in range(steps):
                step()

        trainer = their_trainer(setting, folder, rows, steps)
        trainer.train()
        policy.load_state_dict(trainer.model.state_dict())
        trainer.compute_loss(trainer.model, dict(trainer._buffered_inputs[0])).backward()
        with mock.patch.object(rows_module, "masked_logits", lambda head, hidden, *_: head(hidden)):
            # TRL bans no ids here
            rl.accumulate_policy_gradient(policy, their_records(trainer), "grpo", ARGS, one)
        same(take_gradient(policy), take_gradient(trainer.model), setting.tolerance)
        results = clock(setting.device, ours, trainer.train, rounds=setting.rounds)
    tokens = steps * 4 * sizes.N * sizes.R
    yield ratio_row("i", "RL step / TRL", *results, tokens, ">= 2")


BENCHES = {
    "a": bench_discriminator,
    "b": bench_policy,
    "c": bench_sampling,
    "d": bench_memory,
    "e": bench_step,
    "f": bench_growth,
    "g": bench_evaluation,
    "h": bench_sft,
    "i": bench_rl,
}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(BENCHES), default=list(BENCHES), help="what to measure"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--size", choices=("toy", "2b", "4b"), default="toy", help="of the model")
    parser.add_argument("--rounds", type=int, default=3, help="of each bench; the median counts")
    return parser.parse_args()


def main():
    args, began = parse_args(), time.perf_counter()
    toy = args.size == "toy"
    runtime.hf_logging.disable_progress_bar()
    policy, disc = build(args.size, args.device)
    P, R, N = (256, 64, 16) if toy else (1024, 512, 16)
    setting = SimpleNamespace(
        policy=policy, disc=disc, device=args.device, rounds=args.rounds,
        sizes=SimpleNamespace(P=P, R=R, N=N), one=runtime.World(0, 1, torch.device(args.device)),
        tolerance=1e-4 if toy else 0.1,
    )  # fmt: skip
    where = f"{torch.get_num_threads()} threads"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{args.size} on {args.device}, {where}; P {P}, R {R}, N {N}; ", end="")
    print(f"medians of {args.rounds} rounds\n")
    print("| | ours / baseline | ratio | target | ours, s | baseline, s | ours, tokens/s ", end="")
    print("| peak GiB, ours / baseline | MFU |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in args.only:
        for line in BENCHES[name](setting):
            print(f"| {' | '.join(line)} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
