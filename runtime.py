"""What a run stands on: processes, FSDP, checkpoints, states, errors and logs.

A stage writes one folder, OUT:

    lock                                   held as long as the run lives
    state.STEP/                            all that --resume needs, the newest whole one counts;
                                           each is an ordinary Hugging Face checkpoint as well
    metrics.jsonl, rollouts.jsonl, ...     the logs, one line at a time
    curves.png, rollouts.html, ...         the same to look at, redrawn with the states
    config.json, model.safetensors, ...    at the end: an ordinary Hugging Face checkpoint
    README.md                              its card
    meta.json                              last of all: the stage is finished
"""

import copy
import fcntl
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import uuid
import warnings
import zlib
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from glob import glob
from pathlib import Path
from types import MethodType

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration
from transformers.utils import logging as hf_logging

from flags import DTYPES, LOGGERS, InputError, InputErrorOfAll, flag_of, print_error
from page import read_lines, redraw, write_card

# dcp.save and dcp.load say so of every single process, also where no_dist tells them that it is one
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)

PATHS = ("ckpt", "disc", "system_prompt", "reward")  # flags for what is read: the content counts,
SOURCES = ("data", "pairs", "score", "probe", "eval_data")  # and what lies here the stage knows
# these change no number
FREE = ("steps", "save_every", "keep", "logger", "max_tokens", "slots", "log_rollouts", "attn",
        "eval_every", "eval_data", "checkpointing", "compile", "resume", "overwrite", "out")


# ------------------------------------------------------------------------------------------ errors
@contextmanager
def about(subject):
    """Reading what the user passed: an error in the block becomes the one line `subject: why`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):  # that is no fault of what is read
        raise
    except (Exception, SystemExit) as error:  # there is no end to what broken files raise
        why = str(error).partition("\n")[0]
        if not why or isinstance(error, (KeyError, SystemExit)):  # whose text is a key or a status
            why = f"{type(error).__name__} {why}".strip()
        raise InputError(f"{subject}: {why}") from error


# --------------------------------------------------------------------------------------- processes
CLOSING = ExitStack()  # what `run` has to do at the end


@dataclass
class World:
    """The processes of this run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    precision: str = "auto"  # --dtype
    mesh: DeviceMesh | None = None  # see `connect`; one float32 process on a CPU has none, nor FSDP
    identity: dict = field(default_factory=dict)  # what the run depends on, see `identity_of`
    state: str | None = None  # the one that --resume continues from
    stop: int = 0  # the signal that has come, SIGTERM or SIGINT
    due: bool = False  # a state has to be saved
    best: tuple = (None, -1.0)  # step and accuracy of the best validation, see rl.Validation
    write: Callable | None = None  # sends a line of metrics to --logger (rank 0)
    bar: tqdm | None = None  # of the steps, at a terminal (rank 0)
    began: tuple = (0, 0.0)  # step and time at which this part of the run did

    @property
    def dtype(self):
        """Of computation, and of the weights that are handed on."""
        auto = "bf16" if self.device.type == "cuda" else "float32"
        return getattr(torch, DTYPES[auto if self.precision == "auto" else self.precision])

    def share(self, lengths):
        """The consecutive pieces of work, of these lengths, that this rank does: sums about equal,
        at least one piece each where there are as many as ranks."""
        middles, cuts = np.cumsum(lengths) - np.array(lengths) / 2, [0]
        least = int(len(lengths) >= self.size)
        for rank in range(1, self.size):
            cut = int(np.searchsorted(middles, sum(lengths) * rank / self.size))
            cuts.append(min(max(cut, cuts[-1] + least), len(lengths) - least * (self.size - rank)))
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

    def on_first(self, function, *args):
        """Call a function on rank 0 -> its result on every rank; all raise its InputError."""
        result = problem = None
        try:
            result = function(*args) if self.rank == 0 else None
        except InputError as error:
            problem = str(error)
        result, problem = self.gather((result, problem))[0]
        if problem:
            raise InputErrorOfAll(problem)
        return result

    def wait(self):
        """For all ranks to arrive here."""
        if self.size > 1:
            dist.barrier()


def setup(args, global_sizes=()):
    """Check what can be checked before anything is loaded, start torch.distributed when torchrun
    started us, take hold of OUT -> World. global_sizes: {flag: number to divide by processes}."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size % local:
        raise InputError(f"{size} processes, {local} on this node: start as many on every node")
    shares = []
    for flag, n in dict(global_sizes).items():
        if n % size:
            raise InputError(f"{flag} = {n} is not divisible by the {size} processes")
        shares.append(f"; {flag} {n}: {n // size} on each")
    check_out(args.out, {flag_of(name): getattr(args, name, None) for name in PATHS + SOURCES})
    if hasattr(args, "save_every"):
        check_run(args)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        torch.use_deterministic_algorithms(True)  # a CPU run is bitwise repeatable
    world = World(int(os.environ.get("RANK", 0)), size, device, args.dtype)
    args.dtype = next(name for name in DTYPES if getattr(torch, DTYPES[name]) == world.dtype)
    if size > 1 or device.type == "cuda" or world.dtype != torch.float32:
        world.mesh = connect(size, local, device)
    if world.rank == 0 and size > 1:
        print(f"{size} processes, mesh {list(world.mesh.shape)}{''.join(shares)}", flush=True)
    world.on_first(claim, args.out)
    return world


def connect(size, local, device):
    """Start torch.distributed -> mesh [ranks], or on several nodes [nodes, ranks of a node]:
    replicated across nodes, sharded inside."""
    # an hour: the others wait while one rank has far longer rollouts or writes a checkpoint; a rank
    # that dies ends the others at once, by torchrun
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # one process alone asks nothing of the environment, which may name some other job's address
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
    dist.init_process_group(backend, timeout=timedelta(hours=1), **alone)
    shape = (size // local, local) if 1 < local < size else (size,)
    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def check_out(out, inputs):
    """Raise InputError where OUT is a path that is read, lies in it or around it. inputs: {flag:
    path, list of paths or None}; what does not exist, such as a Hub id, is no path."""
    here = os.path.realpath(out)
    for flag, given in inputs.items():
        for path in [given] if isinstance(given, str) else given or []:
            unweighted = re.sub(r":[^:/]*$", "", path)  # --data also takes globs, and a.jsonl:0.9
            for found in filter(os.path.exists, [path, *glob(unweighted)]):
                there = os.path.realpath(found)
                if os.path.commonpath([here, there]) in (here, there):
                    why = f"is, holds or lies in {flag} {path}; give another"
                    raise InputError(f"--out {out} {why}")


def check_run(args):
    """Raise InputError for what --resume, --overwrite and --logger cannot do."""
    states = find_states(args.out)
    if args.resume and not states:
        raise InputError(f"--resume: {args.out} holds no state.STEP; start without --resume")
    names = os.listdir(args.out) if os.path.isdir(args.out) else []
    holds = {
        "a finished run": "meta.json" in names,
        "an unfinished run": states,
        "a checkpoint": "config.json" in names,
        "a README.md": "README.md" in names,
    }
    found = next((what for what, there in holds.items() if there), None)
    if found and not (args.resume or args.overwrite):
        cure = "add --resume to go on or --overwrite to lose it, or give another folder"
        raise InputError(f"--out {args.out} holds {found}: {cure}")
    if args.logger:
        try:
            importlib.import_module(LOGGERS[args.logger])
        except ImportError as error:
            cure = f"pip install {args.logger}"
            raise InputError(f"--logger {args.logger}: {error}; {cure}") from error


def claim(out):
    """Make OUT and lock it until `run` ends. InputError when another run holds it or when it cannot
    be written; a folder that is new and stays empty is taken away again."""
    new = not os.path.isdir(out)
    try:
        os.makedirs(out, exist_ok=True)
        lock = CLOSING.enter_context(open(os.path.join(out, "lock"), "a"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--out {out}: another run is at work there") from error
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from error
    if new:
        CLOSING.callback(lambda: os.listdir(out) == ["lock"] and shutil.rmtree(out))


def most(packs, world):
    """How many forwards every rank must run so that all run the same number: the most packs that
    any rank has."""
    return max(world.gather(packs))


# -------------------------------------------------------------------------------------------- FSDP
def shard(model, units, world, forward, float32=(), checkpointing=None):
    """FSDP2: each of `units` (in a stage: every decoder layer, then the vision tower), then the
    rest with the root. Computation in world.dtype, float32 master weights and reduction; on several
    nodes HSDP; one float32 CPU process stays plain. A model that was left without weights gets them
    now.

    float32: units that also compute in float32. forward: the function of the model that the stage
    calls in place of its forward; it becomes a method of the model, around which the root's
    weights are gathered. checkpointing: recompute activations in backward (None: on CUDA)."""
    if checkpointing if checkpointing is not None else world.device.type == "cuda":
        backbone = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
        backbone.activation_checkpointing_enable({"use_reentrant": False})
        model.train()  # from_pretrained leaves eval mode, in which transformers does not recompute
    if world.mesh is None:
        return model
    mixed = MixedPrecisionPolicy(world.dtype, torch.float32)
    for unit in units:
        fully_shard(unit, mesh=world.mesh, mp_policy=mixed)
    for unit in float32:
        fully_shard(unit, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh, mp_policy=mixed)
    if next(model.parameters()).is_meta:
        read_weights(model, world.device)
    setattr(model, forward.__name__, MethodType(forward, model))
    register_fsdp_forward_method(model, forward.__name__)
    return model


class LoraLinear(torch.nn.Linear):
    """W x + 2 B A x with W frozen (LoRA, arXiv 2106.09685, alpha twice the rank)."""

    def forward(self, x):
        low = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + 2 * low


def add_lora(model, rank, world):
    """Freeze a policy, in world.dtype, and give every matrix of its decoder layers A [rank, n] and
    B [m, rank], float32; before anything is made of the model. `start_lora` fills them. rank 0:
    nothing. Raises InputErrorOfAll for one that some matrix cannot have."""
    if not rank:
        return
    model.requires_grad_(False).to(world.dtype)
    layers = model.model.language_model.layers.modules()
    linears = [module for module in layers if type(module) is torch.nn.Linear]
    if rank > (highest := min(min(linear.weight.shape) for linear in linears)):
        raise InputErrorOfAll(f"--lora {rank}: the smallest matrix has rank {highest}; give less")
    for linear in linears:
        linear.__class__, device = LoraLinear, linear.weight.device
        a, b = ((rank, linear.in_features), (linear.out_features, rank))
        linear.lora_a = torch.nn.Parameter(torch.zeros(a, device=device))
        linear.lora_b = torch.nn.Parameter(torch.zeros(b, device=device))


@torch.no_grad()
def start_lora(model, seed):
    """Fill A as torch fills a matrix, alike on any number of processes; B stays 0, so that training
    starts from the checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_a"):
            whole = torch.rand(parameter.shape, generator=generator) * 2 - 1
            whole = whole.to(parameter.device) / math.sqrt(parameter.shape[1])
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.copy_(whole)


def merge_lora(weights):
    """{name: tensor} of a model with adapters -> of one without them: W + 2 B A."""
    for name in [name for name in weights if name.endswith("lora_a")]:
        a, b = weights.pop(name), weights.pop(name[:-1] + "b")
        name = name.replace("lora_a", "weight")
        weights[name] = weights[name].float() + 2 * b @ a


def make_sampler(model, world):
    """The model to sample from, made before the policy is sharded: the policy itself where it stays
    whole, else a replica in the compute dtype, whose weights `refresh` fills. Sampling never runs
    through sharded modules: it would gather every layer for every token."""
    if world.mesh is None:
        return model
    sampler = copy.deepcopy(model).to(world.dtype)
    materialize(sampler, world.device)
    return sampler.requires_grad_(False)


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
    """AdamW over all parameters that are trained; fused: one pass over them instead of a dozen."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr, weight_decay=weight_decay, fused=True)


def cosine(step, total, peak, warmup):
    """Learning rate of `step` (from 0): linear to `peak` over the first `warmup` share, then half a
    cosine to 0."""
    ramp = max(1, round(total * warmup))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


@dataclass
class Skips:
    """Counts updates skipped for a loss or gradient that is not finite."""

    row: int = 0  # in a row
    total: int = 0
    named: int = 0  # those that `end_step` has told of

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


def all_finite(parts, world):
    """Whether all weights and moments of {name: (model, optimizer)} are, on all ranks."""
    tensors = [p for model, _ in parts.values() for p in model.parameters()]
    states = [state for _, optimizer in parts.values() for state in optimizer.state.values()]
    tensors += [value for state in states for value in state.values()]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return not world.sum(sum(not t.isfinite().all() for t in tensors))[0]


# ------------------------------------------------------------------------------------- checkpoints
SETTINGS = (".json", ".jinja", ".txt", ".model")  # what a checkpoint has beside its weights
FILES = (".safetensors", *SETTINGS)


def local_folder(path, kinds=FILES):
    """The folder of a checkpoint; of a Hub id files of these kinds are downloaded."""
    if os.path.isdir(path):
        return path
    with about("neither a folder nor a checkpoint that the Hub gives"):
        return snapshot_download(path, allow_patterns=[f"*{kind}" for kind in kinds])


def check_checkpoint(path, kinds=("qwen3_vl", "qwen3_vl_moe"), flag="--ckpt"):
    """Look at a checkpoint, of a policy, discriminator or replica, before it is loaded. Raises
    InputError unless it is a folder with a Qwen3-VL of one of these `kinds`, not quantised, without
    an adapter, with whole weights in safetensors -> the folder; of a Hub id (owner/name) that of
    its settings, which alone are downloaded to look at them."""
    local = os.path.isdir(path)
    if not local and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise InputError(f"{flag} {path}: no such folder")
    with about(f"{flag} {path}"):
        folder = local_folder(path, SETTINGS)
        names, states = os.listdir(folder), find_states(folder)
        if any(name.startswith("adapter_") for name in names):
            raise ValueError("an adapter (adapter_*) is not read: merge or remove it")
        if states and "config.json" not in names:
            inner = os.path.join(states[0], "discriminator")
            state = inner if flag == "--disc" and os.path.isdir(inner) else states[0]
            raise ValueError(f"an unfinished run: give one of its states, such as {state}")
        with about("config.json"):
            config = read_json(os.path.join(folder, "config.json"))
            kind, quantised = config.get("model_type"), config.get("quantization_config")
        if kind not in kinds:
            raise ValueError(f"a {kind}; a {' or '.join(kinds)} is needed")
        if quantised:
            method = quantised.get("quant_method")
            raise ValueError(f"a quantised checkpoint ({method}) cannot be trained")
        if local:
            check_weights(folder)
    return folder


def check_weights(path):
    """-> {weight: (its file, its shape)} of a folder. Raises ValueError unless all that it should
    hold is there, in safetensors, whole."""
    names = glob("model.safetensors", root_dir=path)
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        with about("model.safetensors.index.json"):
            names = {str(name) for name in read_json(index)["weight_map"].values()}
    if not names or not all(name.endswith(".safetensors") for name in names):
        raise ValueError("no weights: neither model.safetensors nor an index of *.safetensors")
    found = {}
    for name in sorted(names):
        with about(f"{name}: an incomplete download or a Git LFS pointer"):
            with safe_open(file := os.path.join(path, name), framework="pt") as weights:
                shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}
        for key, shape in shapes.items():
            if 0 in shape:
                raise ValueError(f"{name}: the weight {key} is empty")
            found[key] = (file, shape)
    return found


def load_tokenizer(path, args=None, flag="--ckpt"):
    """(tokenizer, Pillow image processor) of a checkpoint, the value of `flag`. args: the flags of
    a stage that encodes prompts, for --min-pixels and --max-pixels; it needs a chat template."""
    folder, code = check_checkpoint(path, flag=flag), {"trust_remote_code": False}
    with about(f"{flag} {path}"):
        with about("tokenizer or image processor"):
            tokenizer = AutoTokenizer.from_pretrained(folder, **code)
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **code)
            rows = AutoConfig.from_pretrained(folder, **code).get_text_config().vocab_size
            older = os.path.join(folder, "chat_template.json")
            if tokenizer.chat_template is None and os.path.exists(older):
                tokenizer.chat_template = read_json(older)["chat_template"]
        if (n := len(tokenizer)) > rows:
            raise ValueError(f"the tokenizer has {n} tokens, the embedding {rows} rows")
        if args and tokenizer.chat_template is None:
            raise ValueError("no chat template (chat_template.jinja) for the tokenizer")
    # the processor's names; it means pixels of the whole picture
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if args and getattr(args, name) is not None:
            processor.size[edge] = getattr(args, name)
    if processor.size["shortest_edge"] > processor.size["longest_edge"]:
        raise InputError(f"--min-pixels is above --max-pixels: {dict(processor.size)}")
    return tokenizer, processor


def eos_ids(tokenizer, model):
    """The ids that end a response: the tokenizer's EOS, which is the one that is trained, then the
    others of the checkpoint's generation_config.json."""
    more = model.generation_config.eos_token_id
    more = more if isinstance(more, list) else [more]
    return [tokenizer.eos_token_id, *(i for i in more if i not in (None, tokenizer.eos_token_id))]


def load_policy(path, dtype=torch.float32, world=None):
    """The policy of a checkpoint, float32 master weights by default. In a `world` that shards it
    is left on the meta device, without weights: `shard` reads them. Weights that are missing,
    unknown or of another size are an error."""
    check_checkpoint(path, ("qwen3_vl",))
    with about(f"--ckpt {path}"):
        folder = local_folder(path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = Qwen3VLForConditionalGeneration(config).to(dtype).eval()
        multiply_patches(model.model.visual)
        if os.path.exists(os.path.join(folder, "generation_config.json")):
            model.generation_config = GenerationConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # for rows.py: the embedding may have more rows than the tokenizer has tokens
        model.usable_vocabulary = len(tokenizer)
        model.stored = compare_weights(model, check_weights(folder))
        if world is None or world.mesh is None:
            read_weights(model, "cpu")
    return model


def multiply_patches(visual):
    """Compute the patch embedding of a vision tower as the matrix product that it is, its kernel
    being as large as its stride: a Conv3d takes 10 times as long on a CPU (of 1024 patches to 1024
    units, forward and backward; in bf16 100 times), and on some versions of cuDNN. Weights and
    their names stay."""

    def forward(embed, pixels):  # [patches, C * 2 * 16 * 16] -> [patches, hidden size]
        weight = embed.proj.weight  # [hidden size, C, 2, 16, 16]
        return F.linear(pixels.to(weight.dtype), weight.flatten(1), embed.proj.bias)

    visual.patch_embed.forward = MethodType(forward, visual.patch_embed)


def compare_weights(model, found, names=None, unused=()):
    """Raise ValueError unless the weights found, see `check_weights`, are those of the model ->
    {parameter: (file, its weight there)}, of which one of an [E, n, m] may be [E, m, n]. names:
    {parameter: its weight} where that has another name; several may have the same, and one without
    any will be 0. unused: weights that nothing is made of."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}  # of tied ones the first
    names = {name: name for name in shapes} if names is None else names
    tied = getattr(model, "all_tied_weights_keys", {})
    stored, other = {}, set()
    for name, weight in names.items():
        if weight in found:
            (file, shape), own = found[weight], shapes[name]
            stored[name] = file, weight
            if shape != own and (len(own) != 3 or shape != [own[0], own[2], own[1]]):
                other.add(weight)
    missing = set(names.values()) - found.keys()
    unknown = found.keys() - {*names.values(), *tied, *unused}
    for kind, weights in (("missing", missing), ("unexpected", unknown), ("mismatched", other)):
        if weights:
            text = ", ".join(sorted(weights)[:5])
            text += " (is tie_word_embeddings right?)" if text == "lm_head.weight" else ""
            raise ValueError(f"{kind} keys: {text}")
    for name, source in tied.items():
        if name in found:  # stored as well
            files = [safe_open(found[key][0], framework="pt") for key in (name, source)]
            if not torch.equal(files[0].get_tensor(name), files[1].get_tensor(source)):
                raise ValueError(f"{name} is tied to {source} and differs from it in the files")
    return stored


def materialize(model, device):
    """Give a model around a Qwen3-VL on the meta device memory on `device`, and what is computed,
    not stored."""
    model.to_empty(device=device)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    for module in model.modules():
        for name, _ in [*module.named_buffers(recurse=False)]:  # frequencies of rotary embeddings
            setattr(module, name, getattr(type(module)(module.config), name).to(device))


@torch.no_grad()
def read_weights(model, device):
    """Read the weights of a model on the meta device, whose `stored` says where they are, see
    `compare_weights`; of a sharded one the shards of this rank alone."""
    materialize(model, device)
    files = {file for file, _ in model.stored.values()}
    opened = {file: safe_open(file, framework="pt") for file in files}
    for name, parameter in model.named_parameters():
        local, first = parameter, 0
        if isinstance(parameter, DTensor):
            # FSDP2 shards the first dimension, as torch.chunk does
            local, mesh = parameter.to_local(), parameter.device_mesh
            each = math.ceil(len(parameter) / mesh.size(-1))
            first = mesh.get_coordinate()[-1] * each
        if name not in model.stored:
            local.zero_()
        elif len(local):  # the last ranks may hold nothing
            file, weight = model.stored[name]
            rows = opened[file].get_slice(weight)[first : first + len(local)]
            local.copy_(rows if rows.shape == local.shape else rows.mT)


def choose_attention(name, world):
    """--attn -> sdpa or flash, said once at the start."""
    fits = world.device.type == "cuda" and world.dtype == torch.bfloat16
    if name == "auto":
        name = "flash" if fits else "sdpa"
    if name == "flash" and not fits:
        raise InputError("--attn flash needs bf16 on a CUDA device; use --attn sdpa")
    if world.rank == 0:
        print(f"attention: {name}", flush=True)
    return name


def save(model, out, world, stage, args, step, metrics):
    """Write OUT as an ordinary checkpoint, and, last of all, meta.json, whose presence says that
    the stage is finished."""
    write_checkpoint(model, out, world, args.ckpt)
    if world.rank == 0:
        with writing(out):
            write_meta(out, stage, args, step, metrics)
        print(f"saved {out}", flush=True)
    world.wait()


def write_checkpoint(model, out, world, ckpt):
    """Write what from_pretrained loads: weights in the compute dtype, the tokenizer and processor
    files of `ckpt`, the parent. All ranks must call it."""
    weights = full_weights(model)
    if world.rank == 0:
        merge_lora(weights)
        weights = {name: tensor.to(world.dtype) for name, tensor in weights.items()}
        if model.config.tie_word_embeddings:  # sharded or converted copies share no memory any more
            weights.pop("lm_head.weight", None)
        with writing(out):
            model.save_pretrained(out, state_dict=weights)
            model.config.dtype = world.dtype  # save_pretrained has written that of the masters
            model.config.save_pretrained(out)
            copy_processor(ckpt, out)


@cache
def processor_files(ckpt):
    """{name: content} of tokenizer, chat template and preprocessor files. `begin` reads them: a
    parent that is a state of a run at work may be gone when this one saves."""
    others = ("model", "pytorch_model", "config", "generation_config", "meta", "metrics",
              "progress", "manifest")
    found = {}
    for file in Path(local_folder(ckpt, SETTINGS)).iterdir():
        if file.suffix in SETTINGS and file.name.split(".")[0] not in others:
            found[file.name] = file.read_bytes()
    return found


def copy_processor(ckpt, out):
    """Write tokenizer, chat template and preprocessor files as they are."""
    for name, content in processor_files(ckpt).items():
        Path(out, name).write_bytes(content)


def write_meta(out, stage, args, step, metrics):
    """README.md and meta.json: where the checkpoint comes from."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    meta = {"stage": stage, "args": vars(args), "step": step, "parent": args.ckpt}
    meta |= {"git_commit": git.stdout.strip() or None, "metrics": metrics}
    write_card(out, meta)
    write_json(os.path.join(out, "meta.json"), meta)


def write_json(path, value):
    """Under a temporary name, then renamed: a file that exists is complete."""
    Path(path + ".tmp").write_text(json.dumps(value, indent=1))
    os.replace(path + ".tmp", path)


def read_json(path):
    return json.loads(Path(path).read_text())


@contextmanager
def writing(path):
    """A full disk or another write error in the block becomes one line that names `path`; weights
    written there get the mode of any new file (safetensors gives them to their owner alone)."""
    try:
        yield
        os.umask(umask := os.umask(0))
        for name in glob("*.safetensors", root_dir=path):
            os.chmod(os.path.join(path, name), 0o666 & ~umask)
    except (OSError, RuntimeError, SafetensorError, dcp.CheckpointException) as error:
        cause = error
        if isinstance(error, dcp.CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        cause = str(cause).splitlines()[0]
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free / 1e9
        raise InputError(f"{path} cannot be written, {free:.1f} GB are free: {cause}") from error


# -------------------------------------------------------------------------------------------- logs
BAR = ("loss", "reward", "accuracy", "valid", "acc_v", "acc_r")  # what a bar shows, at most three


def log(world, out, metrics):
    """A line of OUT/metrics.jsonl on rank 0, without the metrics that have no value in this step;
    the same and the time left is printed, or at a terminal a bar with what matters most."""
    if world.rank:
        return
    metrics = {key: value for key, value in metrics.items() if value is not None}
    append_rows(os.path.join(out, "metrics.jsonl"), [metrics])
    if world.write:
        world.write(metrics)
    numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in metrics.items()}
    if not world.bar.disable:
        world.bar.set_postfix([(k, numbers[k]) for k in BAR if k in numbers][:3], refresh=False)
        world.bar.update(metrics["step"] - world.bar.n)
        return
    first, began = world.began
    pace = (time.time() - began) / (metrics["step"] - first)
    left = tqdm.format_interval(pace * (world.bar.total - metrics["step"]))
    print("  ".join(f"{k} {v}" for k, v in numbers.items()), f" {left} left", flush=True)


def append_rows(path, rows):
    """Lines of JSON at the end of a log, on the disk before the state of their step is."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def write_rows(path, rows):
    """Lines of JSON under a temporary name, then renamed: a file that exists is complete."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # half a surrogate pair becomes \udXXX, which is how JSON writes it
    with open(path + ".tmp", "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def cut_logs(out, step):
    """After --resume drop from the logs the lines of steps that will be repeated -> the last
    metrics that stay, or {}."""
    lines = []
    names = ("rollouts.jsonl", "skipped.jsonl", "metrics.jsonl")
    for path in filter(os.path.exists, (os.path.join(out, name) for name in names)):
        with open(path, encoding="utf-8") as file, about(f"--resume: {path} is damaged"):
            # a killed run may leave half a line
            lines = [json.loads(line) for line in file if line.endswith("\n")]
        lines = [line for line in lines if line["step"] <= step]
        write_rows(path, lines)
    return lines[-1] if lines else {}


def open_logger(args, step):
    """-> a function that sends metrics to --logger; steps after `step` are written anew."""
    module = importlib.import_module(LOGGERS[args.logger])
    if args.logger == "tensorboard":
        writer = module.SummaryWriter(os.path.join(args.out, "tensorboard"), purge_step=step + 1)
        CLOSING.callback(writer.close)
        add = writer.add_scalar
        return lambda metrics: [add(key, metrics[key], metrics["step"]) for key in metrics]
    kept = Path(args.out, "wandb_id")
    if step == 0 or not kept.exists():
        kept.write_text(uuid.uuid4().hex)
    where = {"project": "prism", "id": kept.read_text(), "dir": args.out}
    run = module.init(**where, resume="allow", config=vars(args))
    return lambda metrics: run.log(metrics, step=metrics["step"])


# ------------------------------------------------------------------------------------------ states
def find_states(out):
    """The states OUT/state.STEP, newest first."""
    names = os.listdir(out) if os.path.isdir(out) else []
    names = [name for name in names if re.fullmatch(r"state\.[0-9]+", name)]
    return [os.path.join(out, name) for name in sorted(names, key=step_of, reverse=True)]


def step_of(state):
    return int(state.rpartition(".")[2])


def save_state(out, world, parts, progress, args=None):
    """Write OUT/state.STEP: everything that a run needs to continue, under a temporary name and
    then renamed. parts: {name: (model, optimizer)}; progress: JSON-able counters. Sampling needs no
    generator state: its random numbers depend on (seed, step, prompt, sample). manifest.json holds
    the checksums of all but the card. InputError when the disk is full.

    args: the flags of the stage. Then the state is a checkpoint, too, of its first part, and holds
    one of each other part in a folder."""
    new, path = os.path.join(out, "state.new"), os.path.join(out, f"state.{progress['step']}")
    if world.rank == 0:
        shutil.rmtree(new, ignore_errors=True)
    world.wait()
    states = state_dicts(parts)
    with writing(new):
        dcp.save(states, checkpoint_id=new, no_dist=world.size == 1)
        for name, (model, _) in parts.items() if args else ():
            folder = new if name == next(iter(parts)) else os.path.join(new, name)
            if isinstance(model, PreTrainedModel):
                write_checkpoint(model, folder, world, args.ckpt)
            else:  # a discriminator
                model.write_checkpoint(folder, world, args.ckpt)
        if world.rank == 0:
            write_json(os.path.join(new, "progress.json"), progress)
        names = [str(path.relative_to(new)) for path in Path(new).rglob("*") if path.is_file()]
        files = checksums(new, sorted(world.gather(names)[0]), world)
        if world.rank == 0:
            write_json(os.path.join(new, "manifest.json"), files)
        if args and world.rank == 0:  # no part of the state: a card is there to be edited
            (metrics,) = read_lines(os.path.join(out, "metrics.jsonl"), 1)
            write_meta(new, args.stage, args, progress["step"], metrics)
    world.wait()  # `writing` is done with the folder on every rank
    if world.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(new, path)
    world.wait()


def checksum(path):
    """[bytes, crc32] of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


def checksums(folder, names, world):
    """{file: checksum, None where it cannot be read}; every rank reads a share."""
    mine = {}
    for name in names[world.rank :: world.size]:
        try:
            mine[name] = checksum(os.path.join(folder, name))
        except OSError:
            mine[name] = None
    return {name: found for part in world.gather(mine) for name, found in part.items()}


def read_manifest(path):
    """{file: checksum} of the state that a folder is or, as state.9/discriminator, lies in; {} of
    any other folder, which may have a manifest.json of somebody else's."""
    path = os.path.abspath(path)
    for state in (path, os.path.dirname(path)):
        manifest = os.path.join(state, "manifest.json")
        if os.path.isfile(manifest) and os.path.isfile(os.path.join(state, "progress.json")):
            with about(f"{path}: the state is damaged (manifest.json)"):
                found = read_json(manifest)
                return {os.path.join(state, name): content for name, content in found.items()}
    return {}


def whole_state(out, world):
    """The newest state of which every file is what was saved; the newer ones are named. Raises
    InputErrorOfAll when there is none."""
    damaged = []
    for state in find_states(out):
        try:
            manifest = read_json(os.path.join(state, "manifest.json"))
        except (OSError, ValueError):
            manifest = {}
        manifest = world.gather(manifest)[0]
        found = checksums(state, sorted(manifest), world)
        wrong = [name for name in manifest if found[name] != manifest[name]]
        if manifest and not wrong:
            if damaged and world.rank == 0:
                print(f"{'; '.join(damaged)}: going back to {state}", flush=True)
            return state
        damaged.append(f"{state} is damaged ({(wrong or ['manifest.json'])[0]})")
    raise InputErrorOfAll(f"--resume: {'; '.join(damaged)}: no whole state is left, start anew")


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
        print_error(error, alone)
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:  # before `begin`: nothing is there to save
        status = 128 + signal.SIGINT
        if int(os.environ.get("RANK", 0)) == 0:
            script = os.path.basename(sys.argv[0])
            print(f"{script}: interrupted before the first step", file=sys.stderr, flush=True)
    except (Exception, dcp.CheckpointException):  # the latter is no Exception
        status = 1
        traceback.print_exc()
    CLOSING.close()
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
    sys.exit(status)


def fingerprint(path):
    """Of a file or of the files of a checkpoint, the same wherever they lie: names, sizes, all
    content. Raises InputError for a damaged state."""
    paths = [path]
    if os.path.isdir(path):
        others = ("meta.json", "progress.json", "manifest.json")
        names = (name for name in sorted(os.listdir(path)) if name.endswith(FILES))
        paths = [os.path.join(path, name) for name in names if name not in others]
    found = [(os.path.relpath(p, path), checksum(p)) for p in paths]
    manifest = read_manifest(path)
    for file, (_, content) in zip(paths, found):
        if content != manifest.get(os.path.abspath(file), content):
            raise InputError(f"{path}: the state is damaged ({os.path.basename(file)})")
    return f"content {zlib.crc32(repr(found).encode()):08x}"


def identity_of(args, data):
    """What the numbers of a run depend on, and --steps: {name of a flag: value}, the content in
    place of a path, which is read once even if two flags name it. data: {"data": fingerprint}."""
    found = {name: value for name, value in vars(args).items() if name not in SOURCES}
    paths = {name: found[name] for name in PATHS if found.get(name)}
    contents = {path: fingerprint(path) for path in set(paths.values()) if os.path.exists(path)}
    found |= {name: contents.get(path, path) for name, path in paths.items()}
    return json.loads(json.dumps(found | data))


def identify(args, world, data):
    """Find out what this run depends on, see `identity_of`, and with --resume the newest whole
    state, before a model is loaded. Raises InputErrorOfAll, naming what differs, when another run
    has made that state."""
    world.identity = mine = world.on_first(identity_of, args, data)
    if not args.resume:
        return
    world.state = whole_state(args.out, world)
    saved = read_json(os.path.join(world.state, "progress.json"))["identity"]
    names = sorted((saved | mine).keys() - set(FREE))
    differ = [name for name in names if saved.get(name) != mine.get(name)]
    if "stage" in differ:  # then everything does
        differ = ["stage"]
    if differ:
        parts = [f"{flag_of(name)} {saved.get(name)}, not {mine.get(name)}" for name in differ]
        raise InputErrorOfAll(
            f"--resume: the state was made with {'; '.join(parts)}; only "
            f"{' '.join(map(flag_of, FREE))}, the number of processes and the place of files may "
            "differ"
        )


def begin(args, world, parts, steps, *skips):
    """With --resume load the newest whole state; clear OUT of what lies beyond it, or of another
    run; open the logs; from now on SIGTERM and Ctrl-C end the run after the step. -> (progress:
    counters of the run, the last line of metrics.jsonl or {})."""
    progress, metrics = {"step": 0, "position": 0}, {}
    if world.state:
        progress = resume(args, world, parts, steps, skips)
    elif not all_finite(parts, world):
        raise InputErrorOfAll(f"--ckpt {args.ckpt}: weights are not finite")
    step = progress["step"]
    world.began = step, time.time()
    if world.rank == 0:
        processor_files.cache_clear()
        processor_files(args.ckpt)
        if world.state:
            metrics = cut_logs(args.out, step)
        clear(args, step)
        if args.logger:
            world.write = open_logger(args, step)
        world.bar = tqdm(total=steps, initial=step, unit="step", disable=None)
        CLOSING.callback(world.bar.close)
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.signal(number, lambda number, _: setattr(world, "stop", number))
        CLOSING.callback(signal.signal, number, before)
    return progress, metrics


def clear(args, step):
    """Remove from OUT what would pass for this run's: what lies beyond the step, of another run the
    logs, with --overwrite its checkpoint, too."""
    kinds = ["meta.json", "bad"]  # it is not finished any more
    if not args.resume:
        kinds += ["metrics.jsonl", "rollouts.jsonl", "skipped.jsonl", "rollouts.html", "curves.png"]
    if args.overwrite and not args.resume:
        kinds += ["README.md", "config.json", "model*.safetensors*", "pictures", "discriminator"]
    found = [state for state in find_states(args.out) if step_of(state) > step]
    for kind in kinds:
        found += Path(args.out).glob(kind)
    for path in found:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def resume(args, world, parts, steps, skips):
    """Load the state that `identify` has found -> progress. Changes nothing when it refuses."""
    progress = read_json(os.path.join(world.state, "progress.json"))
    step, processes = progress["step"], progress.pop("processes")
    before, now = progress.pop("identity").get("steps"), world.identity["steps"]
    if step > steps:
        raise InputErrorOfAll(f"--resume: {step} steps are done already, --steps makes it {steps}")
    world.best = tuple(progress.pop("best", world.best))  # none in states of before there was one
    load_state(world.state, world, parts)
    for mine, (row, total) in zip(skips, progress.pop("skips")):
        mine.row, mine.total, mine.named = row, total, total
    if world.rank == 0:
        other = f", saved by {processes} processes: same data, same random numbers, other rounding"
        other = f"{other} of sums" if processes != world.size else ""
        print(f"resumed after step {step}{other}", flush=True)
        if before != now and hasattr(args, "warmup"):  # of `cosine`, which falls to 0 in all steps
            curve = f"from here on the learning rate follows the cosine of {steps} steps"
            print(f"--steps was {before}, is {now}: {curve}", flush=True)
    return progress


def end_step(args, world, parts, progress, last, *skips):
    """Save the state when it is due, and when the run has to end: after SIGTERM or Ctrl-C on any
    rank (status 143, 130), and when it has become useless, which leaves OUT/bad/state.STEP to look
    at. While updates are being skipped nothing is saved: the states of OUT are from before. The
    --keep newest states stay, and the best one."""
    step, row = progress["step"], max(s.row for s in skips)
    for s in skips:
        if s.total > s.named and world.rank == 0:
            print(f"step {step}: update skipped, loss or gradient was not finite", flush=True)
        s.named = s.total
    progress = progress | {"skips": [(s.row, s.total) for s in skips], "processes": world.size}
    progress |= {"identity": world.identity, "best": world.best}
    stop = max(world.gather(world.stop))  # on any rank: all have to agree on the step
    if last or stop or args.save_every and step % args.save_every == 0:
        world.due = True
    due = world.due and (last or not row)
    why = None
    if row >= 3:
        why = f"loss or gradient was not finite in 3 updates in a row, the last in step {step}"
    elif due and not all_finite(parts, world):
        why = f"step {step}: weights or moments are not finite"
    if why:
        save_state(os.path.join(args.out, "bad"), world, parts, progress)
        raise InputErrorOfAll(
            f"{why}: lower --lr or look at the rows; weights and optimizers are in "
            f"{args.out}/bad/state.{step}, the states in {args.out} are untouched"
        )
    if due:
        save_state(args.out, world, parts, progress, args)
        world.due = False
        if world.rank == 0:
            for state in find_states(args.out)[args.keep :]:
                if step_of(state) != world.best[0]:
                    shutil.rmtree(state)
            redraw(args.out, last)
    if stop and due and not last:
        if world.rank == 0:
            name = signal.Signals(stop).name
            print(f"{name}: the state of step {step} is saved, --resume continues", flush=True)
        raise SystemExit(128 + stop)
