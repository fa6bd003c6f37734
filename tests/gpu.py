"""Run: python tests/gpu.py               (the first thing to do on a machine with a GPU)
     python tests/gpu.py --emulate     (the same on the CPU, at a tiny shape)

Checks, a line each with pass or FAIL and a figure, then a step of each stage at the shape of
Qwen3-VL-2B with random weights as a Markdown table. Status 1 when a check fails, 2 without a GPU.

    attention    the variable-length kernel (flash-attn where installed, else torch's own) in bf16
                 against SDPA in float32: a pack of rows with pictures, forward and gradient
    pages        a decode step on shuffled pages, the same two
    sampling     log-probs of sampled tokens against those of a full forward of the same model
    drift        log-probs in bf16 against float32, same weights
    graphs       whether decode steps were replayed as CUDA graphs
    sft, align, rl    seconds, tokens a second, MFU, peak memory; of decoding the share of the
                 card's bandwidth that reading weights and cache once a token would take

--emulate puts an emulation in place of the kernel: it takes what the kernels take (float16 or bf16,
int32 offsets, a contiguous last dimension, head sizes that are multiples of 8 up to 256; pages of a
multiple of 256 tokens, an int32 table), refuses anything else, and computes by SDPA, sequence by
sequence. So everything runs with --attn flash and bf16; times say nothing then.
"""

import argparse
import copy
import os
import sys
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import bench  # noqa: E402
import rl  # noqa: E402
import rollout  # noqa: E402
import rows  # noqa: E402
import runtime  # noqa: E402
import sft  # noqa: E402

BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}  # bytes a second
NONE = "-"  # in the table: only a GPU could tell


# ---------------------------------------------------------------------------------- the emulation
def emulated_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, table=None, used=None):
    """rows.varlen_kernel on the CPU. Raises TypeError for what a kernel would refuse."""
    if table is not None:
        if causal or max_q != 1:  # with split keys rows would be lost
            raise TypeError("pages with causal attention, or with several queries")
        check_pages(k, v, cu_k, table, used)
        k, v = (join_pages(pool, table, used.tolist()) for pool in (k, v))
    check_kernel_inputs(q, k, v, cu_q, cu_k, max_q, max_k)
    out, groups = [], q.shape[1] // k.shape[1]
    for i in range(len(cu_q) - 1):
        queries, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        part = q[queries].transpose(0, 1).float()  # [H, Lq, D]
        key, value = (x[keys].transpose(0, 1).repeat_interleave(groups, 0).float() for x in (k, v))
        mask = None
        if causal:  # aligned bottom-right
            lq, lk = part.shape[1], key.shape[1]
            mask = torch.ones(lq, lk, dtype=torch.bool).tril(lk - lq)
        found = F.scaled_dot_product_attention(part, key, value, mask, scale=scale)
        out.append(found.transpose(0, 1).to(q.dtype))
    return torch.cat(out)


def join_pages(pool, table, used):
    """[pages, page, Hkv, D] -> [keys of all sequences, Hkv, D]"""
    sequences = [torch.cat([pool[page] for page in pages]) for pages in table.tolist()]
    return torch.cat([sequence[:n] for sequence, n in zip(sequences, used)])


def check_pages(k, v, cu_k, table, used):
    """What flash-attn's C++ asks of a paged call, and torch of `seqused_k`."""
    if k.dim() != 4 or k.shape != v.shape or k.shape[1] % 256:
        raise TypeError(f"k {list(k.shape)}: [pages, a multiple of 256 tokens, heads, size]")
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise TypeError("k, v: the last dimension is not contiguous")
    for name, tensor in (("table", table), ("used", used)):
        if tensor.dtype != torch.int32 or tensor.device != k.device or not tensor.is_contiguous():
            raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}: int32, contiguous")
    if len(table) != len(cu_k) - 1 or not (0 <= table.min() and table.max() < len(k)):
        raise TypeError(f"table {list(table.shape)} of pages up to {int(table.max())} of {len(k)}")
    # flash-attn reads the numbers of keys from cu_k, torch from used
    if not torch.equal(used, cu_k.diff()) or used.max() > table.shape[1] * k.shape[1]:
        raise TypeError(f"used {used.tolist()} does not agree with cu_k, or with the table")


def check_kernel_inputs(q, k, v, cu_q, cu_k, max_q, max_k):
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in (torch.float16, torch.bfloat16) or tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {tensor.dtype}: float16 or bfloat16, all the same")
        if tensor.stride(-1) != 1:
            raise TypeError(f"{name}: the last dimension is not contiguous")
        if tensor.dim() != 3 or tensor.shape[-1] % 8 or tensor.shape[-1] > 256:
            raise TypeError(f"{name} {list(tensor.shape)}: [tokens, heads, at most 256, by 8]")
    if k.shape != v.shape or q.shape[1] % k.shape[1]:
        raise TypeError(f"heads of q {q.shape[1]}, of k {list(k.shape)}, of v {list(v.shape)}")
    for name, cu, tensor, longest in (("q", cu_q, q, max_q), ("k", cu_k, k, max_k)):
        if cu.dtype != torch.int32 or cu.device != q.device or not cu.is_contiguous():
            raise TypeError(f"cu_{name} is {cu.dtype} on {cu.device}: int32, beside q, contiguous")
        lengths = cu.diff()
        if cu[0] != 0 or cu[-1] != len(tensor) or not (lengths >= 0).all():
            raise TypeError(f"cu_{name} does not tile {len(tensor)} tokens")
        if not isinstance(longest, int) or lengths.max() > longest:
            raise TypeError(f"max_{name} {longest!r} is below {int(lengths.max())}")


# -------------------------------------------------------------------------------------- the checks
class Report:
    """Prints a line for each check; remembers whether one failed."""

    def __init__(self):
        self.failed = False

    def __call__(self, name, figure, passed):
        self.failed |= not passed
        print(f"{'pass' if passed else 'FAIL'}  {name}: {figure}", flush=True)

    def unknown(self, name, why):
        """What cannot be told here is neither."""
        print(f"----  {name}: not measured, {why}", flush=True)


def relative(found, expected):
    """Largest difference as a share of the largest value."""
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


def check_attention(report, setting):
    """Random queries and keys on the layout of a pack with two prompts with pictures and four
    branches, causal: heads that share keys, as in the language model, and heads that do not."""
    prompts = [setting.prompt, setting.prompt]
    branches = [(0, [7] * 40), (1, [7] * 9), (0, [7]), (1, [7] * 33)]
    layout = rows.pack_rows(prompts, branches, setting.device).inputs["layout"]
    tokens = int(layout.length.sum())
    module = SimpleNamespace(is_causal=True)
    for dim, heads, keys in ((128, 16, 8), (64, 4, 4)):
        inputs, found = attention_inputs(tokens, heads, keys, dim, setting.device), []
        for dtype, function in ((torch.float32, rows.sdpa_rows), (torch.bfloat16, rows.flash_rows)):
            leaves = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in inputs]
            out = function(module, *leaves, None, scaling=dim**-0.5, layout=layout)[0]
            weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
            (out.float() * weight).sum().backward()
            found.append([out.detach(), *(leaf.grad for leaf in leaves)])
        errors = [relative(b, a) for a, b in zip(*found)]
        shown = "forward {:.1e}, gradient of q {:.1e}, k {:.1e}, v {:.1e}".format(*errors)
        name = f"attention, {heads} heads of {dim}, {keys} of keys"
        report(name, f"{shown} (at most 2e-2)", max(errors) < 2e-2)


def attention_inputs(tokens, heads, keys, dim, device):
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, n, tokens, dim) for n in (heads, keys, keys)]
    return [torch.randn(size, generator=generator).to(device) for size in sizes]


@torch.no_grad()
def check_pages_of_slots(report, setting):
    """A query each of three slots, whose pages lie anywhere in a pool; two share their first."""
    heads, keys, dim, page = 16, 8, 128, rows.PAGE[rows.ATTENTION["flash"]]
    generator = torch.Generator().manual_seed(0)
    sizes = (3, heads, 1, dim), (1, 6, page, 2 * keys, dim)
    q, pool = (torch.randn(size, generator=generator).to(setting.device) for size in sizes)
    table = torch.tensor([[4, 2], [4, 5], [1, 0]], dtype=torch.int32, device=setting.device)
    before = torch.tensor([page + 40, 2 * page - 1, 0], device=setting.device)
    module, found = SimpleNamespace(layer_idx=0, is_causal=True), []
    for dtype, function in ((torch.float32, rows.sdpa_rows), (torch.bfloat16, rows.flash_rows)):
        query, kv = (x.to(torch.bfloat16).to(dtype) for x in (q, pool))
        paged = rows.Paged(kv, table, before)
        found.append(function(module, query, None, None, None, scaling=dim**-0.5, paged=paged)[0])
    error = relative(found[1], found[0])
    name = f"pages of {page}, {heads} heads of {dim}, {keys} of keys"
    report(name, f"{error:.1e} (at most 2e-2)", error < 2e-2)


@torch.no_grad()
def check_model(report, setting):
    """The whole model: pictures through the tower, then log-probs."""
    policy, prompt = setting.policy, setting.prompt
    ids = [setting.records[i].rollout.ids for i in range(3)]
    pack = rows.pack_rows([prompt], [(0, branch) for branch in ids], setting.device)
    low = rows.target_logprobs(policy, pack)[0]
    exact = rows.set_attention(copy.deepcopy(policy).float(), "sdpa")
    high = rows.target_logprobs(exact, pack)[0]
    drift = (low - high).abs()
    shown = f"mean {drift.mean():.1e}, largest {drift.max():.1e} nats"
    report("drift, bf16 with the kernel against float32 with SDPA", f"{shown} (mean at most 5e-2)",
           drift.mean().item() < 5e-2)
    drawn = rollout.sample(policy, [prompt], 4, max_new_tokens=24, eos_id=-1)[0]
    pack = rows.pack_rows([prompt], [(0, r.ids) for r in drawn], setting.device)
    again = rows.target_logprobs(policy, pack)[0]
    said = torch.tensor([p for r in drawn for p in r.logprobs], device=again.device)
    gap = (again - said).abs().mean().item()
    report("sampling, log-probs against a full forward", f"mean {gap:.1e} nats (at most 5e-2)",
           gap < 5e-2)


def check_graphs(report, setting):
    """Counts the replays of CUDA graphs while a compiled sampler works that is warm."""
    if setting.device != "cuda":
        report.unknown("graphs", "no GPU")
        return
    settings = {"max_new_tokens": 24, "eos_id": -1, "compiled": True}
    rollout.sample(setting.policy, [setting.prompt], 4, **settings)
    graph = torch.cuda.CUDAGraph
    with mock.patch.object(graph, "replay", autospec=True, side_effect=graph.replay) as replay:
        rollout.sample(setting.policy, [setting.prompt], 4, **settings)
    count = replay.call_count
    report("graphs", f"{count} of 23 decode steps were replayed as a CUDA graph", count > 0)


# --------------------------------------------------------------------------------------- the steps
def sft_phases(setting):
    policy, sizes = setting.policy, setting.sizes
    optimizer = runtime.make_optimizer(policy, 1e-6, 0.01)
    pairs = [(r.prompt, r.rollout.ids) for r in setting.records]

    def update():
        sft.accumulate_gradient(policy.train(), pairs, bench.ARGS, setting.one)
        runtime.Skips().step(policy, optimizer, 1e-6, 1.0, setting.one, 0.0)

    work = len(pairs) * bench.flops(policy, setting.prompt, [[7] * sizes.R])
    return {"sft, update": (update, len(pairs) * (sizes.P + sizes.R), work)}


def align_phases(setting):
    """The three phases of bench.py; FLOPs of the discriminator are those of its forward and
    backward over both segments of every rollout and of the teacher's response."""
    policy, sizes, groups = setting.policy, setting.sizes, setting.groups
    phases = bench.step_phases(setting, sizes, groups, True)
    responses = [[7] * sizes.R] * sizes.N
    tokens = groups * (sizes.P + sizes.N * sizes.R)
    works = (
        None,
        groups * bench.flops(policy, setting.prompt, [*responses, [7] * sizes.R], head=False),
        groups * bench.flops(policy, setting.prompt, responses),
    )
    counts = groups * sizes.N * sizes.R, tokens + groups * sizes.R, tokens
    lines = zip(phases.items(), counts, works)
    return {f"align, {name}": (run, count, work) for (name, run), count, work in lines}


def rl_phases(setting):
    policy, sizes, groups = setting.policy, setting.sizes, setting.groups
    group = bench.make_group(policy.config, sizes, groups)
    optimizer = runtime.make_optimizer(policy, 1e-6, 0.01)

    def update():
        records = group.records
        rl.accumulate_policy_gradient(policy.train(), records, "grpo", bench.ARGS, setting.one)
        runtime.Skips().step(policy, optimizer, 1e-6, 1.0, setting.one, 0.0)

    work = groups * bench.flops(policy, setting.prompt, [[7] * sizes.R] * sizes.N)
    tokens = groups * sizes.N * sizes.R
    sample = partial(bench.sample_group, policy, group, sizes)
    lines = {
        "rl, rollout": (sample, tokens, None),
        "rl, rollout, every token read": (partial(sample, read_every=1), tokens, None),
    }
    return lines | {"rl, policy update": (update, tokens + groups * sizes.P, work)}


def bytes_read(setting):
    """What decoding must read at least: all weights of the language model and the head for every
    token of a slot, and the cache so far of every rollout."""
    text, sizes = setting.policy.config.text_config, setting.sizes
    read = [*setting.policy.model.language_model.layers.parameters()]
    read += setting.policy.lm_head.parameters()
    weights = sum(p.numel() * p.element_size() for p in read)
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2
    cache = setting.groups * sizes.N * (sizes.P + sizes.R / 2) * token
    return sizes.R * (weights + cache)


def rate(amount, seconds, peaks):
    """amount a second as a share of what the card can, of a table {name: peak}."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for card, value in peaks.items() if card in name), None)
    return f"{amount / seconds / peak:.0%}" if amount and peak else NONE


def measure_steps(setting):
    """Yields cells of the table, one line a phase."""
    for phases in (sft_phases, align_phases, rl_phases):
        made = phases(setting)
        runs = [run for run, _, _ in made.values()]
        clocked = bench.clock(setting.device, *runs, rounds=setting.rounds)
        for (name, (_, tokens, work)), (times, peak) in zip(made.items(), clocked):
            seconds = median(times)
            read = bytes_read(setting) if "rollout" in name else None
            memory = f"{peak / 2**30:.1f}" if peak else NONE
            cells = [name, f"{seconds:.2f}", f"{tokens / seconds:.0f}"]
            cells += [rate(work, seconds, bench.PEAK), memory, rate(read, seconds, BANDWIDTH)]
            yield cells
        made.clear()


def make_setting(emulate):
    """Policy and discriminator in bf16, as bench.py makes them, and what they are to do."""
    device = "cpu" if emulate else "cuda"
    policy, disc = bench.build("toy" if emulate else "2b", device)
    P, R, N, groups, rounds = (64, 16, 4, 2, 1) if emulate else (1024, 512, 16, 4, 3)
    policy.bfloat16()
    disc.backbone.bfloat16()
    for model in (policy, disc.backbone):
        rows.set_attention(model, "flash")
    sizes = SimpleNamespace(P=P, R=R, N=N)
    records = bench.make_group(policy.config, sizes).records
    one = runtime.World(0, 1, torch.device(device))
    return SimpleNamespace(
        policy=policy, disc=disc, device=device, sizes=sizes, groups=groups, rounds=rounds,
        records=records, prompt=records[0].prompt, one=one, tolerance=0.1,
    )  # fmt: skip


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--emulate", action="store_true", help="on the CPU, at a tiny shape")
    args = parser.parse_args()
    if not args.emulate and not torch.cuda.is_available():
        print("gpu.py: no GPU here; --emulate runs the checks on the CPU", file=sys.stderr)
        return 2
    runtime.hf_logging.disable_progress_bar()
    kernel = emulated_kernel if args.emulate else rows.varlen_kernel
    with mock.patch.object(rows, "varlen_kernel", kernel):
        setting, report = make_setting(args.emulate), Report()
        for check in (check_attention, check_pages_of_slots, check_model, check_graphs):
            check(report, setting)
        lines = list(measure_steps(setting))
    report("steps of sft, align and rl", f"{len(lines)} phases", len(lines) == 7)
    card = "CPU, emulated: times say nothing" if args.emulate else torch.cuda.get_device_name()
    sizes = setting.sizes
    print(f"\n{card}; P {sizes.P}, R {sizes.R}, N {sizes.N}; weights and optimizer in bf16\n")
    print("| phase | seconds | tokens/s | MFU | peak GiB | share of bandwidth |")
    print("|---|---|---|---|---|---|")
    for cells in lines:
        print(f"| {' | '.join(cells)} |")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
