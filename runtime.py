"""What a run stands on: processes, FSDP, checkpoints, states, flags, errors and logs.

A stage writes one folder, OUT:

    state.STEP/                            all that --resume needs; the newest counts
    metrics.jsonl, rollouts.jsonl, ...     the logs, one line at a time
    config.json, model.safetensors, ...    at the end: an ordinary Hugging Face checkpoint
    meta.json                              last of all: the stage is finished
"""

import argparse
import copy
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging


# ------------------------------------------------------------------------------------------ errors
class InputError(ValueError):
    """A mistake in what the user passed: one line that names the file, row or flag and the cure."""


class InputErrorOfAll(InputError):
    """Raised by every rank alike, so that one of them says it."""


# ------------------------------------------------------------------------------------------- flags
LOGGERS = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}  # imported when asked for


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line; the exit status stays 2."""

    def error(self, message):
        raise InputError(message)


def integer(low=None, high=None):
    """argparse type: an integer of at least `low` and at most `high`."""
    return number(int, low, high)


def real(low=None, high=None, above=None):
    """argparse type: a finite number of at least `low` or above `above`, and at most `high`."""
    return number(float, low, high, above)


def number(kind, low=None, high=None, above=None):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "integer" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text} is no {what}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low:g}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text}: must be above {above:g}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text}: must be at most {high:g}")
        return value

    return parse


def common_flags(parser, stage):
    """The flags that every training stage has, with that stage's default for --out."""
    add = parser.add_argument_group("run").add_argument
    add("--ckpt", required=True, help="checkpoint folder or Hub id to start from")
    add("--out", default=f"{stage}_out", help="folder to write: states, logs, then the checkpoint")
    add("--seed", type=integer(0), default=0, help="of data order, sampling and initialisation")
    add("--resume", action="store_true", help="continue from the newest OUT/state.STEP")
    add("--save-every", type=integer(0), default=100, help="steps between states; 0: the last only")
    add("--keep", type=integer(1), default=1, help="states to keep, the newest ones")
    # not --log: torchrun takes that for an abbreviation of its own --log-dir, wherever it stands
    add("--logger", choices=LOGGERS, default=None, help="also send the metrics there")
    add = parser.add_argument_group("memory").add_argument
    add("--max-tokens", type=integer(1), default=16384,
        help="tokens per forward; results do not depend on it")  # fmt: skip
    add("--attn", choices=("auto", "sdpa", "flash"), default="auto",
        help="auto: flash on CUDA, else sdpa")  # fmt: skip
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=None,
        help="recompute activations in backward (default: on CUDA)")  # fmt: skip
    add = parser.add_argument_group("optimizer").add_argument
    add("--weight-decay", type=real(0), default=0.01, help="of AdamW")
    add("--clip", type=real(above=0), default=1.0, help="largest gradient norm")


# --------------------------------------------------------------------------------------- processes
@dataclass
class World:
    """The processes of this run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None  # [ranks], or [nodes, ranks of a node]: see setup
    stop: bool = False  # SIGTERM has come
    write: Callable | None = None  # sends a line of metrics to --logger (rank 0)

    def share(self, lengths):
        """The consecutive pieces of work, of these lengths, that this rank does: sums about equal,
        at least one piece each."""
        middles, cuts = np.cumsum(lengths) - np.array(lengths) / 2, [0]
        for rank in range(1, self.size):
            cut = int(np.searchsorted(middles, sum(lengths) * rank / self.size))
            cuts.append(min(max(cut, cuts[-1] + 1), len(lengths) - self.size + rank))
        return range(cuts[self.rank], [*cuts, len(lengths)][self.rank + 1])

    def sum(self, *values):
        """Sums over all ranks, as floats."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, item):
        """[item of rank 0, item of rank 1, ...] on every rank."""
        if self.size == 1:
            return [item]
        items = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def wait(self):
        """For all ranks to arrive here."""
        if self.size > 1:
            dist.barrier()


def setup(args, global_sizes=()):
    """Check what can be checked before anything is loaded, and start torch.distributed when
    torchrun started us -> World. global_sizes: {flag: number that the processes must divide}."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size % local:
        raise InputError(
            f"{size} processes, {local} of them on this node: start the same number on every node"
        )
    for flag, n in dict(global_sizes).items():
        if n < 1 or n % size:
            raise InputError(f"{flag} = {n} is not divisible by the {size} processes")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise InputError(f"--out {args.out} is a file; give a folder")
    if hasattr(args, "save_every"):
        check_run(args)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        torch.use_deterministic_algorithms(True)  # a CPU run is bitwise repeatable
    world = World(int(os.environ.get("RANK", 0)), size, device)
    if size > 1 or device.type == "cuda":
        world.mesh = connect(size, local, device)
    if world.rank == 0 and size > 1:
        shares = [f"{flag} {n}: {n // size} on each" for flag, n in dict(global_sizes).items()]
        shape = list(world.mesh.mesh.shape)
        print("; ".join([f"{size} processes, mesh {shape}", *shares]), flush=True)
    return world


def connect(size, local, device):
    """Start torch.distributed -> mesh [ranks], or on several nodes [nodes, ranks of a node]:
    replicated across nodes, sharded inside."""
    defaults = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # an hour: the others wait while one rank has far longer rollouts or writes a checkpoint; a rank
    # that dies ends the others at once, by torchrun
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    shape = (size // local, local) if 1 < local < size else (size,)
    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def most(packs, world):
    """How many forwards every rank must run so that all run the same number: the most packs that
    any rank has."""
    return max(world.gather(packs))


# -------------------------------------------------------------------------------------------- FSDP
def shard(model, units, world, forward, float32=(), checkpointing=None):
    """FSDP2: each of `units` (in a stage: every decoder layer, then the vision tower), then the
    rest with the root. bf16 compute, float32 master weights and reduction on CUDA; on several nodes
    HSDP; one CPU process stays plain.

    float32: units that also compute in float32. forward: the function of the model that the stage
    calls in place of its forward; it becomes a method of the model, around which the root's
    weights are gathered. checkpointing: recompute activations in backward (None: on CUDA)."""
    if checkpointing if checkpointing is not None else world.device.type == "cuda":
        backbone = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # from_pretrained leaves eval mode, in which transformers does not recompute
    if world.size == 1 and world.device.type == "cpu":
        return model
    mixed = MixedPrecisionPolicy()
    if world.device.type == "cuda":
        mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for unit in units:
        fully_shard(unit, mesh=world.mesh, mp_policy=mixed)
    for unit in float32:
        fully_shard(unit, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh, mp_policy=mixed)
    setattr(model, forward.__name__, MethodType(forward, model))
    register_fsdp_forward_method(model, forward.__name__)
    return model


def make_sampler(model, world):
    """The model to sample from, made before the policy is sharded: the policy itself where it stays
    whole, else a replica in the compute dtype. Sampling never runs through sharded modules: it
    would gather every layer for every token."""
    if world.size == 1 and world.device.type == "cpu":
        return model
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    return copy.deepcopy(model).to(world.device, dtype).requires_grad_(False)


@torch.no_grad()
def refresh(sampler, model):
    """Copy the policy's current weights into the replica, one parameter at a time."""
    if sampler is not model:
        for mine, theirs in zip(sampler.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs.full_tensor())


def full_weights(model):
    """{name: whole tensor on the CPU} on rank 0, {} on the others; all ranks must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


# --------------------------------------------------------------------------------------- optimizer
def make_optimizer(model, lr, weight_decay):
    """AdamW over all parameters."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay
    )


def cosine(step, total, peak, warmup):
    """Learning rate of `step` (from 0): linear to `peak` over the first `warmup` share, then half a
    cosine to 0."""
    ramp = max(1, round(total * warmup))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


class Skips:
    """Counts updates skipped for a loss or gradient that is not finite: in a row, in all, and those
    that `end_step` has named."""

    def __init__(self):
        self.row = self.total = self.named = 0

    def step(self, model, optimizer, lr, clip, world, loss):
        """Clip, check on all ranks, step -> the gradient norm before clipping, or None when the
        step was skipped."""
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        bad = world.sum(float(not (math.isfinite(norm) and math.isfinite(loss))))[0] > 0
        if not bad:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.row, self.total = (self.row + 1, self.total + 1) if bad else (0, self.total)
        return None if bad else norm


# ------------------------------------------------------------------------------------- checkpoints
def check_checkpoint(path, kinds=("qwen3_vl", "qwen3_vl_moe")):
    """Look at a checkpoint, of a policy, discriminator or replica, before it is loaded. Raises
    InputError unless it is a folder with a Qwen3-VL of one of these `kinds`, not quantised, without
    an adapter, with whole weights in safetensors, or could be a Hub id (owner/name)."""
    local = os.path.isdir(path)
    if not local and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise InputError(f"--ckpt {path}: no such folder")
    if local and any(name.startswith("adapter_") for name in os.listdir(path)):
        raise InputError(f"--ckpt {path}: an adapter (adapter_*) is not read: merge or remove it")
    try:
        config = read_json(cached_file(path, "config.json") or os.path.join(path, "config.json"))
        kind, quantised = config.get("model_type"), config.get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        if not local:
            return  # from_pretrained knows better what is wrong with a Hub id
        raise InputError(f"--ckpt {path}: config.json: {str(error).splitlines()[0]}") from error
    if kind not in kinds:
        raise InputError(f"--ckpt {path}: a {kind}; a {' or '.join(kinds)} is needed")
    if quantised:
        method = quantised.get("quant_method")
        raise InputError(f"--ckpt {path}: a quantised checkpoint ({method}) cannot be trained")
    if local:
        check_weights(path)


def check_weights(path):
    """Raise InputError unless all weights of a folder are there, in safetensors, whole."""
    names = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    try:
        index = read_json(os.path.join(path, "model.safetensors.index.json"))
        names = sorted(set(index["weight_map"].values()))
    except FileNotFoundError:
        pass
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--ckpt {path}: model.safetensors.index.json: {error}") from error
    if not names or not all(str(name).endswith(".safetensors") for name in names):
        raise InputError(f"--ckpt {path}: the folder has no weights, or other than *.safetensors")
    for name in names:
        try:
            with safe_open(os.path.join(path, name), framework="pt") as file:
                empty = [key for key in file.keys() if 0 in file.get_slice(key).get_shape()]
        except (OSError, SafetensorError) as error:
            what = "an incomplete download or a Git LFS pointer?"
            raise InputError(f"--ckpt {path}: {name}: {error} ({what})") from error
        if empty:
            raise InputError(f"--ckpt {path}: {name}: the weight {empty[0]} is empty")


def load_tokenizer(path, args=None):
    """(tokenizer, Pillow image processor) of a checkpoint. args: the flags of a stage that encodes
    prompts, for --min-pixels and --max-pixels; it needs a chat template."""
    check_checkpoint(path)
    code = {"trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **code)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", **code)
        rows = AutoConfig.from_pretrained(path, **code).get_text_config().vocab_size
        older = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if tokenizer.chat_template is None and older:
            tokenizer.chat_template = read_json(older)["chat_template"]
    except Exception as error:  # tokenizers raises it as it is
        what = f"tokenizer or image processor: {str(error).splitlines()[0]}"
        raise InputError(f"--ckpt {path}: {what}") from error
    if (n := len(tokenizer)) > rows:
        raise InputError(f"--ckpt {path}: the tokenizer has {n} tokens, the embedding {rows} rows")
    if args and tokenizer.chat_template is None:
        raise InputError(f"--ckpt {path}: no chat template (chat_template.jinja) for the tokenizer")
    # the processor's names; it means pixels of the whole picture
    for edge, flag in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if args and getattr(args, flag) is not None:
            processor.size[edge] = getattr(args, flag)
    if processor.size["shortest_edge"] > processor.size["longest_edge"]:
        raise InputError(f"--min-pixels is above --max-pixels: {dict(processor.size)}")
    return tokenizer, processor


def eos_ids(tokenizer, ckpt):
    """The ids that end a response: the tokenizer's EOS, which is the one that is trained, then the
    others of generation_config.json."""
    try:
        more = GenerationConfig.from_pretrained(ckpt).eos_token_id
    except OSError:
        more = None
    more = more if isinstance(more, list) else [more]
    return [tokenizer.eos_token_id, *(i for i in more if i not in (None, tokenizer.eos_token_id))]


def load_policy(path, dtype=torch.float32):
    """The policy of a checkpoint, float32 master weights by default; missing or unexpected weights
    are an error."""
    check_checkpoint(path, ("qwen3_vl",))
    vocabulary = len(load_tokenizer(path)[0])
    try:
        model, info = Qwen3VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"--ckpt {path}: {str(error).splitlines()[0]}") from error
    check_loaded(path, info)
    model.usable_vocabulary = vocabulary  # for rows.py: the embedding may have more rows
    return model


def check_loaded(path, info):
    """Weights that were missing would have been drawn at random."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(map(str, sorted(info[kind])[:5]))
            names += " (is tie_word_embeddings right?)" if names == "lm_head.weight" else ""
            raise InputError(f"--ckpt {path}: {kind.replace('_', ' ')}: {names}")


def choose_attention(name, world):
    """--attn -> sdpa or flash, said once at the start."""
    on_cuda = world.device.type == "cuda"
    if name == "flash" and not on_cuda:
        raise InputError("--attn flash needs a CUDA device; use --attn sdpa")
    name = ("flash" if on_cuda else "sdpa") if name == "auto" else name
    if world.rank == 0:
        print(f"attention: {name}", flush=True)
    return name


def save(model, out, world, stage, args, step, metrics):
    """Write OUT as an ordinary checkpoint that from_pretrained loads: weights in the compute dtype,
    the tokenizer and processor files of the parent, and, last of all, meta.json, whose presence
    says that the stage is finished."""
    weights = full_weights(model)
    if world.rank == 0:
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        if model.config.tie_word_embeddings:  # sharded or converted copies share no memory any more
            weights.pop("lm_head.weight", None)
        model.config.dtype = dtype
        with writing(out):
            model.save_pretrained(out, state_dict=weights)
            copy_processor(args.ckpt, out)
            write_meta(out, stage, args, step, metrics)
        print(f"saved {out}", flush=True)
    world.wait()


def copy_processor(ckpt, out):
    """Copy tokenizer, chat template and preprocessor files as they are; from a Hub id they are
    saved anew."""
    if not os.path.isdir(ckpt):
        for part in load_tokenizer(ckpt):
            part.save_pretrained(out)
        return
    others = ("model", "pytorch_model", "config", "generation_config", "meta", "metrics")
    for name in os.listdir(ckpt):
        stem, kind = name.split(".")[0], os.path.splitext(name)[1]
        if kind in (".json", ".txt", ".jinja", ".model") and stem not in others:
            shutil.copy(os.path.join(ckpt, name), out)


def write_meta(out, stage, args, step, metrics):
    """meta.json: where the checkpoint comes from."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    meta = {"stage": stage, "args": vars(args), "step": step, "parent": args.ckpt}
    meta |= {"git_commit": git.stdout.strip() or None, "metrics": metrics}
    write_json(os.path.join(out, "meta.json"), meta)


def write_json(path, value):
    """Under a temporary name, then renamed: a file that exists is complete."""
    with open(path + ".tmp", "w") as file:
        json.dump(value, file, indent=1)
    os.replace(path + ".tmp", path)


def read_json(path):
    with open(path) as file:
        return json.load(file)


@contextmanager
def writing(path):
    """A full disk or another write error in the block becomes one line that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, dcp.CheckpointException) as error:
        cause = error
        if isinstance(error, dcp.CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free / 1e9
        raise InputError(
            f"{path} cannot be written, {free:.1f} GB are free: {str(cause).splitlines()[0]}"
        ) from error


# -------------------------------------------------------------------------------------------- logs
def log(world, out, metrics):
    """One line on rank 0 and the same keys in OUT/metrics.jsonl; a metric without a value in this
    step is left out."""
    if world.rank:
        return
    metrics = {key: value for key, value in metrics.items() if value is not None}
    append_rows(os.path.join(out, "metrics.jsonl"), [metrics])
    if world.write:
        world.write(metrics)
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
    print("  ".join(shown), flush=True)


def append_rows(path, rows):
    """Lines of JSON at the end of a log, on the disk before the state of their step is."""
    os.makedirs(os.path.dirname(path), exist_ok=True)  # a run that fails earlier leaves no folder
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def write_rows(path, rows):
    """Lines of JSON under a temporary name, then renamed: a file that exists is complete."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def start_log(world, out, step):
    """Begin metrics.jsonl, or after --resume drop the lines of steps that will be repeated -> the
    last metrics that stay, or {}."""
    rows = []
    if world.rank == 0:
        names = ("rollouts.jsonl", "skipped.jsonl", "metrics.jsonl")
        for path in filter(os.path.exists, (os.path.join(out, name) for name in names)):
            with open(path, encoding="utf-8") as file:  # a killed run may leave half a line
                rows = [json.loads(line) for line in file if line.endswith("\n")]
            rows = [row for row in rows if row["step"] <= step]
            write_rows(path, rows)
    world.wait()
    return rows[-1] if rows else {}


def open_logger(args, step):
    """-> a function that sends metrics to --logger; steps after `step` are written anew."""
    os.makedirs(args.out, exist_ok=True)
    module = importlib.import_module(LOGGERS[args.logger])
    if args.logger == "tensorboard":
        folder = os.path.join(args.out, "tensorboard")
        writer = module.SummaryWriter(folder, purge_step=step + 1)

        def write(metrics):
            for key, value in metrics.items():
                writer.add_scalar(key, value, metrics["step"])
            writer.flush()

        return write
    path = os.path.join(args.out, "wandb_id")
    if step == 0 or not os.path.exists(path):
        with open(path, "w") as file:
            file.write(uuid.uuid4().hex)
    with open(path) as file:
        name = file.read()
    run = module.init(project="prism", id=name, resume="allow", dir=args.out, config=vars(args))
    return lambda metrics: run.log(metrics, step=metrics["step"])


# ------------------------------------------------------------------------------------------ states
def find_states(out):
    """The states OUT/state.STEP, newest first."""
    names = os.listdir(out) if os.path.isdir(out) else []
    steps = [int(name[6:]) for name in names if re.fullmatch(r"state\.\d+", name)]
    return [os.path.join(out, f"state.{step}") for step in sorted(steps, reverse=True)]


def save_state(out, world, parts, progress, keep=1):
    """Write OUT/state.STEP: everything that a run needs to continue, under a temporary name and
    then renamed; the newest `keep` states stay. parts: {name: (model, optimizer)}; progress:
    JSON-able counters. Sampling needs no generator state: its random numbers depend on (seed, step,
    prompt, sample). Raises InputError when the disk is full."""
    new, path = os.path.join(out, "state.new"), os.path.join(out, f"state.{progress['step']}")
    if world.rank == 0:
        shutil.rmtree(new, ignore_errors=True)
    world.wait()
    states = state_dicts(parts)
    with writing(new):
        dcp.save(states, checkpoint_id=new, no_dist=world.size == 1)
        if world.rank == 0:
            write_json(os.path.join(new, "progress.json"), progress)
    if world.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(new, path)
        for old in find_states(out)[keep:]:
            shutil.rmtree(old)
    world.wait()


def read_progress(state):
    """The counters of a state."""
    with open(os.path.join(state, "progress.json")) as file:
        return json.load(file)


def state_dicts(parts):
    """What is saved of {name: (model, optimizer)}."""
    pairs = {name: get_state_dict(*pair) for name, pair in parts.items()}
    return {name: {"model": pair[0], "optimizer": pair[1]} for name, pair in pairs.items()}


def load_state(state, world, parts):
    """Load what save_state wrote into models and optimizers, with any number of processes. The
    index of a torch.distributed.checkpoint is a pickle: a state is for the run that wrote it; what
    is passed on is the checkpoint."""
    states = state_dicts(parts)
    dcp.load(states, checkpoint_id=state, no_dist=world.size == 1)
    for name, (model, optimizer) in parts.items():
        weights, moments = states[name]["model"], states[name]["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


# ------------------------------------------------------------------------------------------- a run
def run(main):
    """Run a stage; a mistake of the user ends it with one line and exit status 2 instead of a
    traceback."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    status = 0
    try:
        main()
    except InputError as error:
        status = 2
        alone = dist.is_initialized() and not isinstance(error, InputErrorOfAll)
        if alone or int(os.environ.get("RANK", 0)) == 0:
            script = os.path.basename(sys.argv[0])
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
    except SystemExit as end:
        status = end.code or 0
    except (Exception, dcp.CheckpointException):  # the latter is no Exception
        status = 1
        traceback.print_exc()
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=status)  # os._exit below would leave its last rows
    # Not sys.exit: FSDP's caches keep gloo's worker threads alive, and one of them that frees its
    # last tensor while the interpreter shuts down aborts the process (pytorch/pytorch#179291).
    # After an error the other ranks may hang in a collective, and so would an orderly end; torchrun
    # stops them once this process is gone.
    if dist.is_initialized():
        if status == 0:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(status)


def check_run(args):
    """Raise InputError for what --resume and --logger cannot do, before anything is loaded."""
    states = find_states(args.out)
    if args.resume and not states:
        raise InputError(f"--resume: {args.out} holds no state.STEP; start without --resume")
    if states and not args.resume and not os.path.exists(os.path.join(args.out, "meta.json")):
        raise InputError(
            f"--out {args.out} holds an unfinished run: add --resume, give another folder, or "
            f"delete {states[0]}"
        )
    if args.logger:
        try:
            importlib.import_module(LOGGERS[args.logger])
        except ImportError as error:
            raise InputError(
                f"--logger {args.logger}: {error}; pip install {args.logger}"
            ) from error


def begin(args, world, parts, steps, *skips):
    """With --resume load the newest state, else clear OUT of a finished run; open the logs; from
    now on SIGTERM ends the run after the step -> (progress: counters of the run, the last line of
    metrics.jsonl or {})."""
    progress = {"step": 0, "position": 0, "dropped": 0}
    if args.resume:
        state = find_states(args.out)[0]
        progress = read_progress(state)
        if progress["step"] > steps:
            done = progress["step"]
            raise InputErrorOfAll(f"--resume: {done} steps are done, --steps makes it {steps}")
        load_state(state, world, parts)
        processes = progress.pop("processes")
        for mine, (mine.row, mine.total) in zip(skips, progress.pop("skips")):
            mine.named = mine.total
        if world.rank == 0:
            other = f", saved by {processes} processes: same data, same random numbers, other "
            other = f"{other}rounding of sums" if processes != world.size else ""
            print(f"resumed after step {progress['step']}{other}", flush=True)
    world.wait()  # no rank still reads
    if world.rank == 0:
        stale = [] if args.resume else [*find_states(args.out), os.path.join(args.out, "bad")]
        for path in [*stale, os.path.join(args.out, "state.new")]:
            shutil.rmtree(path, ignore_errors=True)
        if os.path.exists(os.path.join(args.out, "meta.json")):
            os.remove(os.path.join(args.out, "meta.json"))  # not finished any more
    metrics = start_log(world, args.out, progress["step"])
    if args.logger and world.rank == 0:
        world.write = open_logger(args, progress["step"])
    signal.signal(signal.SIGTERM, lambda *_: setattr(world, "stop", True))
    return progress, metrics


def end_step(args, world, parts, progress, last, *skips):
    """Save the state when it is due, and when the run has to end: after SIGTERM on any rank (status
    143), and after three updates in a row that were not finite, which leave OUT/bad/state.STEP to
    look at and the states of OUT as they are."""
    step = progress["step"]
    for s in skips:
        if s.total > s.named and world.rank == 0:
            print(f"step {step}: update skipped, loss or gradient was not finite", flush=True)
        s.named = s.total
    progress = progress | {"skips": [(s.row, s.total) for s in skips], "processes": world.size}
    if max(s.row for s in skips) >= 3:
        save_state(os.path.join(args.out, "bad"), world, parts, progress)
        raise InputErrorOfAll(
            f"loss or gradient was not finite in 3 updates in a row, the last in step {step}: lower"
            f" --lr or look at the rows; weights and optimizers are in {args.out}/bad/state.{step},"
            f" the states in {args.out} are untouched"
        )
    stop = world.sum(world.stop)[0] > 0  # on any rank: all have to agree on the step
    if last or stop or args.save_every and step % args.save_every == 0:
        save_state(args.out, world, parts, progress, args.keep)
    if stop and not last:
        if world.rank == 0:
            print(f"SIGTERM: the state of step {step} is saved, --resume continues", flush=True)
        raise SystemExit(128 + signal.SIGTERM)
