"""Run: python tests/memory.py [--model 2b 4b 8b] [--stage sft align rl] [--gpus 8] [--disc 2b]

What a run needs of memory, as a Markdown table: README's 'What fits'. Neither a GPU nor weights are
needed: the stages' own code (shard, make_sampler, sample, Discriminator, the updates, the
optimizers) runs as one of --gpus processes on fake tensors of the real shapes, which have a shape
and no content, while torch's MemTracker counts the bytes that are alive. What the code asks of a
tensor with content (a loss, a token) is 1.

Prompts have a picture. Every process has its share of the stage's default batch; of its updates one
pack of --max-tokens is computed, which finds the gradient that an earlier one has left. Attention
is the variable-length kernel in bf16, activations are recomputed, as by default on CUDA.

Not counted: the CUDA context and NCCL (1 to 2 GB), fragmentation, workspaces of kernels; on the
host Python itself and encoded pictures. GB are 1e9 bytes; a card of '80 GB' has 85.
"""

import argparse
import math
import os
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses import fake_impls, fake_tensor  # noqa: E402
from torch.distributed._tools.mem_tracker import MemTracker  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import _sharding_prop  # noqa: E402
from torch.distributed.tensor._sharding_prop import ShardingPropagator  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel  # noqa: E402

import discriminator  # noqa: E402
import rl  # noqa: E402
import rollout  # noqa: E402
import rows  # noqa: E402
import runtime  # noqa: E402
import sft  # noqa: E402
from bench import SHAPES, qwen_config  # noqa: E402
from data import mrope_positions  # noqa: E402

GB = 1e9
CPU = torch.device("cpu")


@dataclass
class Step:
    """Defaults of a stage: of a step, over all processes."""

    prompts: int
    rollouts: int  # of each prompt
    max_new_tokens: int


STAGES = {"sft": Step(128, 1, 0), "align": Step(4, 16, 6144), "rl": Step(32, 16, 8192)}


# ----------------------------------------------------------------------------------- fake tensors
class Tracker(MemTracker):
    """Counts bytes alive and their peak, of all tensors alike. torch's hooks on modules, which tell
    kinds apart, allow no second forward of a model; here what was allocated when tells them."""

    def _pre_fw_hook(self, *args):
        pass

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    def now(self):
        return self.get_tracker_snapshot().get(CPU, {}).get("Total", 0)

    def peak(self):
        """Since this tracker was last entered."""
        return self.get_tracker_snapshot("peak").get(CPU, {}).get("Total", 0)


class Known(TorchDispatchMode):
    """Fake tensors of integers keep their content where it is known from constants, so that masks
    and indices have their real lengths; torch does so for all but arange."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is not torch.ops.aten.arange:
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            real = func(*args, **{**(kwargs or {}), "device": "cpu"})
        return known(real, self.mode)


def known(real, mode):
    """A fake tensor that knows its content."""
    return mode.fake_tensor_converter.from_real_tensor(mode, real, make_constant=True)


def answer(mode, func, tensor):
    """What a fake tensor without known content is when the host asks for its value."""
    return 1


class Weights:
    """In place of a file of a checkpoint in bf16. `largest`: bytes of the largest part that is read
    at once, which is all that lies in the host's memory."""

    def __init__(self, shapes):
        self.shapes, self.largest = shapes, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def get_slice(self, name):
        return Slice(self, self.shapes[name])


@dataclass
class Slice:
    file: Weights
    shape: torch.Size

    def __getitem__(self, chosen):
        first = len(range(*chosen.indices(self.shape[0])))
        part = torch.empty(first, *self.shape[1:], dtype=torch.bfloat16, device="meta")
        self.file.largest = max(self.file.largest, part.nbytes)
        return part


class OneOf(runtime.World):
    """One of many processes, of which the others do the same as this one."""

    def sum(self, *values):
        return [float(value) * self.size for value in values]

    def gather(self, item):
        return [item] * self.size


def connect(size):
    """-> OneOf, the first of so many processes that do not exist."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    return OneOf(0, size, CPU, "bf16", mesh)


shapes_of = ShardingPropagator._propagate_tensor_meta_non_cached


def unseen(self, op_schema):
    """How DTensor finds the shape of a result, by whole tensors that take no memory anywhere."""
    with _disable_current_modes():
        return shapes_of(self, op_schema)


@contextmanager
def pretending():
    """Everything in the block is fake -> FakeTensorMode."""
    scalar = {torch.ops.aten._local_scalar_dense.default: answer}
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 10**8))
        enter(mock.patch.dict(fake_impls.op_implementations_dict, scalar))
        enter(mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen))
        enter(mock.patch.object(_sharding_prop, "_are_we_tracing", lambda: False))  # then it caches
        enter(mock.patch.object(rows, "flash_attn_varlen_func", None))  # knows no fake tensors
        rows.on_device.cache_clear()
        stack.callback(rows.on_device.cache_clear)
        enter(mode)
        enter(Known(mode))
        yield mode


# ----------------------------------------------------------------------------------------- a stage
def policy_on_meta(config):
    """What runtime.load_policy gives for a checkpoint of this config, before its weights are read.
    """
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config).eval()
    runtime.multiply_patches(model.model.visual)
    model.stored = {name: ("file", name) for name, _ in model.named_parameters()}
    return rows.set_attention(model, "flash")


def with_lora(config, rank, world):
    """A policy with adapters; its .to is not for fake tensors on meta."""
    with _disable_current_modes():
        model = policy_on_meta(config)
        runtime.add_lora(model, rank, world)
    return model


def copy_on_meta(config, rank, world):
    """A policy for make_sampler, whose copy.deepcopy and .to are not for fake tensors on meta."""
    model = with_lora(config, rank, world)
    to = model.to

    def convert(dtype):
        del model.to
        with _disable_current_modes():
            return to(dtype)

    model.to = convert
    return model


def discriminator_on_meta(config):
    """The same of discriminator.load_discriminator, whose deepcopy knows no fake tensors."""
    with _disable_current_modes(), torch.device("meta"):
        backbone = rows.set_attention(Qwen3VLModel(config).eval(), "flash")
        disc = discriminator.Discriminator(backbone, "moe", "last")
    runtime.multiply_patches(backbone.visual)
    disc.stored = {name: ("file", name) for name, _ in disc.named_parameters()}
    return disc


def fill_gradients(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def make_prompt(config, length, mode):
    """A prompt of `length` tokens, at most four fifths of them a square picture."""
    merge = config.vision_config.spatial_merge_size
    side = math.isqrt(length * 4 // 5)
    ids = [config.image_token_id] * side**2 + [7] * (length - side**2)
    patch = 2 * 3 * 16 * 16
    with _disable_current_modes():
        grid = torch.tensor([[1, side * merge, side * merge]])
        positions = mrope_positions(torch.tensor(ids), grid, config.image_token_id, merge)
        ids = torch.tensor(ids)
    pixels = torch.zeros((side * merge) ** 2, patch)
    tensors = (known(tensor, mode) for tensor in (ids, positions))
    return rows.Prompt(*tensors, pixels, known(grid, mode))


@dataclass
class Cell:
    """A column of the table: bytes by name, of a GPU unless said otherwise."""

    title: str
    bytes: dict = field(default_factory=dict)
    peaks: dict = field(default_factory=dict)  # by phase
    other: dict = field(default_factory=dict)  # host and disk


class Enough(Exception):
    """Sampling has decoded a token: no other takes more."""


class Stage:
    """The models of a stage and what it does in a step, with the bytes that each of them takes."""

    def __init__(self, args, model, stage, mode):
        self.args, self.mode, self.step = args, mode, STAGES[stage]
        self.world, self.tracker = connect(args.gpus), Tracker()
        self.cell = Cell(f"{stage} {model.upper()}")
        self.disc = self.sampler = None
        self.flags = argparse.Namespace(max_tokens=args.max_tokens, temperature=1.0, score_l2=1e-3,
                                        mismatch=0.0, n=self.step.rollouts)
        self.config = qwen_config(model)
        self.load(model, stage)
        self.prompts = [make_prompt(self.config, args.prompt, mode) for _ in range(8)]

    @contextmanager
    def phase(self, name):
        """A part of a run whose peak is a line of the table."""
        with self.tracker:
            yield
            self.cell.peaks[name] = self.tracker.peak()

    @contextmanager
    def adding(self, *names):
        """What is alive after the block and was not before."""
        before = self.tracker.now()
        yield
        self.cell.bytes[names if len(names) > 1 else names[0]] = self.tracker.now() - before

    def load(self, model, stage):
        """As the stages' main does, up to the optimizers."""
        world, disc = self.world, None
        lora = self.args.lora * (stage != "align"), world  # which has none
        policy = with_lora(self.config, *lora) if lora[0] else policy_on_meta(self.config)
        if stage == "align":
            disc = discriminator_on_meta(qwen_config(self.args.disc or model))
        shapes = {name: p.shape for name, p in policy.named_parameters()}
        shapes |= {name: p.shape for name, p in disc.named_parameters()} if disc else {}
        file = Weights(shapes)
        opened = mock.patch.object(runtime, "safe_open", lambda name, framework: file)
        with opened, self.phase("loading"):
            if stage != "sft":
                again = SimpleNamespace(deepcopy=lambda _: copy_on_meta(qwen_config(model), *lora))
                with self.adding("replica"), mock.patch.object(runtime, "copy", again):
                    self.sampler = runtime.make_sampler(policy, world)
            with self.adding("policy", "weights"):
                units = [*policy.model.language_model.layers, policy.model.visual]
                runtime.shard(policy, units, world, rows.target_logprobs, checkpointing=True)
            if disc:
                with self.adding("discriminator", "weights"):
                    units = [*disc.backbone.language_model.layers, disc.backbone.visual]
                    forward, heads = discriminator.Discriminator.scores, disc.heads.values()
                    runtime.shard(disc, units, world, forward, heads, checkpointing=True)
        self.cell.other["host, loading"] = file.largest
        self.parts = {"policy": (policy, runtime.make_optimizer(policy, 1e-6, 0.01))}
        if disc:
            self.parts["discriminator"] = disc, runtime.make_optimizer(disc, 1e-6, 0.01)
        with self.phase("first step"):
            for name, (model, optimizer) in self.parts.items():
                with self.adding(name, "moments"):
                    fill_gradients(model)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

    def ids(self):
        return [7] * self.args.response

    def update(self, name, gradient):
        """A step of a model: `gradient` leaves it, Skips.step takes it."""
        model, optimizer = self.parts[name]
        with self.phase(f"{name} update"):
            with self.adding(name, "gradient"):
                fill_gradients(model)  # as an earlier pack leaves it
            before = self.tracker.now()
            gradient(model)
            self.cell.bytes[name, "activations"] = self.tracker.peak() - before
            runtime.Skips().step(model, optimizer, 1e-6, 1.0, self.world, 1.0)

    def learn_demonstrations(self, policy):
        size = self.args.prompt + self.args.response
        count = min(self.step.prompts // self.args.gpus, self.args.max_tokens // size)
        pairs = [(self.prompts[i % 8], self.ids()) for i in range(max(1, count))]
        sft.accumulate_gradient(policy, pairs, self.flags, self.world)

    def records(self):
        """Of this process, those that fill a pack."""
        room = max(1, (self.args.max_tokens - self.args.prompt) // self.args.response)
        share = self.step.prompts * self.step.rollouts // self.args.gpus
        records = []
        for i in range(min(share, room)):
            ids = self.ids()
            drawn = rollout.Rollout(ids, [0.0] * len(ids), True)
            prompt = self.prompts[i // self.step.rollouts]
            cut = ids[: len(ids) // 4], ids[len(ids) // 4 :]
            record = rl.Record(i // self.step.rollouts, i, None, prompt, drawn, "", cut)
            record.advantage = 1.0
            records.append(record)
        return records

    def learn_rollouts(self, policy):
        rl.accumulate_policy_gradient(policy, self.records(), "grpo", self.flags, self.world)

    def learn_pairs(self, disc):
        """Students differ in a token, as equal segments would be one branch."""
        students = []
        for i, record in enumerate(self.records()):
            caption, trace = record.segments
            students.append(([i, *caption[1:]], [i, *trace[1:]]))
        caption, trace = record.segments
        row = discriminator.Pairs(self.prompts[0], (caption, trace), students)
        discriminator.score_and_backward(disc, [row], self.flags, self.world)

    def sample(self):
        """Up to the second token: refresh, prefill, slots and a decode step."""
        policy, step = self.parts["policy"][0], self.step
        share = step.prompts * step.rollouts // self.args.gpus
        samples = [range(min(step.rollouts, share - at)) for at in range(0, share, step.rollouts)]
        prompts = [self.prompts[i % 8] for i in range(len(samples))]
        with self.phase("rollout"):
            runtime.refresh(self.sampler, policy)
            before, choose, held = self.tracker.now(), rollout.choose, []

            def watch(*args):
                if held:
                    raise Enough
                held.append(self.tracker.now() - before)
                return choose(*args)

            with mock.patch.object(rollout, "choose", watch):
                try:
                    rollout.sample(
                        self.sampler, prompts, step.rollouts, samples=samples, eos_id=2,
                        max_new_tokens=step.max_new_tokens, max_tokens=self.args.max_tokens,
                        slots=self.args.slots,
                    )  # fmt: skip
                except Enough:
                    self.cell.bytes["KV"] = held[0]

    def save(self):
        """The state on disk, and what the first process holds of a whole checkpoint in the end."""
        disk = whole = 0
        for name, (model, optimizer) in self.parts.items():
            tensors = list(model.parameters())
            for state in optimizer.state.values():
                tensors += state.values()
            disk += sum(t.numel() * t.element_size() for t in tensors)
            with self.tracker:
                before = self.tracker.now()
                weights = runtime.full_weights(model)
                if name == "policy":
                    weights = {key: t.to(self.world.dtype) for key, t in weights.items()}
                whole = max(whole, self.tracker.peak() - before)
                if name == "policy" and model.config.tie_word_embeddings:
                    weights.pop("lm_head.weight")
                # a state is a checkpoint as well
                disk += sum(t.numel() * t.element_size() for t in weights.values())
                del weights
        self.cell.other |= {"host, saving": whole, "state": disk}


def measure(args, model, stage):
    """-> Cell of a model in a stage."""
    with pretending() as mode:
        found = Stage(args, model, stage, mode)
        if stage == "sft":
            found.update("policy", found.learn_demonstrations)
        else:
            found.sample()
        if stage == "align":
            found.update("discriminator", found.learn_pairs)
        if stage != "sft":
            found.update("policy", found.learn_rollouts)
        found.save()
    return found.cell


def parse_args():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["4b", "8b"])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--disc", choices=SHAPES, default=None, help="default: as --model")
    parser.add_argument("--prompt", type=int, default=1280, help="tokens, with a picture")
    parser.add_argument("--response", type=int, default=2048, help="tokens")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="of sft and rl")
    return parser.parse_args()


LINES = {  # of the table: what a Cell knows by which name
    "policy, float32 (--lora: bf16)": ("policy", "weights"),
    "policy, moments of AdamW": ("policy", "moments"),
    "policy, gradient in its update": ("policy", "gradient"),
    "discriminator, float32": ("discriminator", "weights"),
    "discriminator, moments of AdamW": ("discriminator", "moments"),
    "discriminator, gradient in its update": ("discriminator", "gradient"),
    "replica to sample from, bf16": "replica",
    "KV cache and prompts in sampling": "KV",
    "activations and gathered layers, policy": ("policy", "activations"),
    "the same, discriminator": ("discriminator", "activations"),
}


def table(cells):
    """Lines of Markdown."""
    rows = [["GB per GPU", *(cell.title for cell in cells)], ["---"] * (len(cells) + 1)]

    def add(title, values):
        shown = ["-" if value is None else f"{value / GB:.1f}" for value in values]
        rows.append([title, *shown])

    for title, name in LINES.items():
        add(title, [cell.bytes.get(name) for cell in cells])
    for phase in ("loading", "rollout", "discriminator update", "policy update"):
        add(f"peak, {phase}", [cell.peaks.get(phase) for cell in cells])
    peaks = [max(cell.peaks.values()) for cell in cells]
    add("**peak**", peaks)
    rows.append(["fits 80 GB", *("yes" if peak <= 80 * GB else "no" for peak in peaks)])
    add("host, each process while loading", [cell.other["host, loading"] for cell in cells])
    add("host, first process while saving", [cell.other["host, saving"] for cell in cells])
    add("state on disk", [cell.other["state"] for cell in cells])
    return ["| " + " | ".join(row) + " |" for row in rows]


def main():
    args, cells = parse_args(), []
    for stage in args.stage:
        for model in args.model:
            began = time.time()
            cells.append(measure(args, model, stage))
            took = time.time() - began
            print(f"{cells[-1].title}: {took:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(table(cells)))


if __name__ == "__main__":
    main()
