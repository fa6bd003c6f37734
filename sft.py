"""Stage 1, supervised fine-tuning, and the plumbing that every stage starts from.

    L_SFT = - E_(x, y+) [ sum_t log pi(y_t | x, y_<t) ] / (target tokens of the global batch)

One epoch over the demonstrations, AdamW, lr 1e-5, cosine with 10 % warm-up, only response tokens (with the EOS) trained.
Batches are packed, not padded: each example is a row [prompt | response] of the shared-prompt machinery in rollout.py, so
no padding token is ever computed, and text-only and multi-image rows mix.

Deviations from the authors' script (LLaMA-Factory): (1) the loss is divided by the target tokens of the whole global
batch, not by a mean of per-rank means; (2) an over-long demonstration is dropped and counted, not cut; (3) the vision
tower is trained as well (a reproduction note says that theirs is frozen).

    python sft.py --ckpt Qwen/Qwen3-VL-4B-Instruct --data demos.jsonl --out sft_out/                           # 1 GPU
    torchrun --nproc_per_node=8 sft.py --ckpt Qwen/Qwen3-VL-4B-Instruct --data prism-vlm/gemini_distill --out sft_out/
"""

import argparse
import glob
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.utils import logging as hf_logging

import rollout
from rollout import LOOK, InputError, InputErrorOfAll, encode_prompt, encode_response, load_examples, pack_logprobs, pack_rows
from rollout import split_rows


# --------------------------------------------------------------------------------------------------------------- plumbing
LOGGERS = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}  # --logger -> module, imported only when asked for


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line; the exit status stays 2."""

    def error(self, message):
        raise InputError(message)


def common_flags(parser, stage):
    """The flags that every training stage has, with that stage's default for --out."""
    group = parser.add_argument_group("run")
    group.add_argument("--ckpt", required=True, help="checkpoint folder or Hub id to start from")
    group.add_argument("--out", default=f"{stage}_out", help="folder to write: checkpoint, meta.json, metrics.jsonl, state/")
    group.add_argument("--seed", type=int, default=0, help="of data order, sampling and initialisation")
    group.add_argument("--resume", action="store_true", help="continue from OUT/state")
    group.add_argument("--save-every", type=int, default=100, help="steps between saves of OUT/state; 0: at the end only")
    group.add_argument("--keep", type=int, default=1, help="states to keep: OUT/state and, before it, OUT/state.STEP")
    # not --log: torchrun takes that for an abbreviation of its own --log-dir, wherever it stands
    group.add_argument("--logger", choices=LOGGERS, default=None, help="also send the metrics there")
    data_flags(parser)
    group = parser.add_argument_group("memory")
    group.add_argument("--max-tokens", type=int, default=16384, help="tokens per forward; results do not depend on it")
    group.add_argument("--attn", choices=("auto", *rollout.ATTENTION), default="auto", help="auto: flash on CUDA, else sdpa")
    group.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None,
                       help="recompute activations in backward (default: on CUDA)")  # fmt: skip
    group = parser.add_argument_group("optimizer")
    group.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    group.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")


def data_flags(parser):
    """The flags of everything that reads examples."""
    group = parser.add_argument_group("data")
    group.add_argument("--split", default=None, help="split of a Hub data set")
    group.add_argument("--system-prompt", default=None, metavar="FILE", help="system message for rows that carry none")
    group.add_argument("--max-prompt", type=int, default=2048, help="longer prompts are dropped and counted, never cut")
    pixel_flags(group)
    group.add_argument("--bad-rows", choices=("skip", "stop"), default="skip", help="rows that cannot be used")
    group.add_argument("--max-bad", type=float, default=0.05, help="share of unusable rows that ends the run")


def pixel_flags(group):
    group.add_argument("--min-pixels", type=int, default=None, help="smaller pictures are enlarged (default: the checkpoint's)")
    group.add_argument("--max-pixels", type=int, default=None, help="larger pictures are reduced (default: the checkpoint's)")


def run(main):
    """Run a stage; a mistake of the user ends it with one line and exit status 2 instead of a traceback."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    status = 0
    try:
        main()
    except InputError as error:
        status = 2
        if int(os.environ.get("RANK", 0)) == 0 or dist.is_initialized() and not isinstance(error, InputErrorOfAll):
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
    except SystemExit as end:
        status = end.code or 0
    except (Exception, dcp.CheckpointException):  # the latter is no Exception
        status = 1
        traceback.print_exc()
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=status)  # os._exit below would leave its last rows behind
    # Not sys.exit: FSDP's caches keep gloo's worker threads alive, and one of them that frees its last tensor while the
    # interpreter shuts down aborts the process (pytorch/pytorch#179291). After an error the other ranks may hang in a
    # collective, and so would an orderly end; torchrun stops them once this process is gone.
    if dist.is_initialized():
        if status == 0:
            dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(status)


@dataclass
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None  # [ranks], or [nodes, ranks of a node]: replicated across nodes, sharded inside
    stop: bool = False  # SIGTERM has come
    write: Callable | None = None  # sends a row of metrics to --logger (rank 0)

    def share(self, lengths):
        """The consecutive pieces of work, of these lengths, that this rank does: sums about equal, at least one piece each."""
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


def setup(args, global_sizes=()):
    """Start torch.distributed when torchrun started us; check the flags given as global sizes against the ranks."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size % local:
        raise InputError(f"{size} processes, {local} of them on this node: start the same number on every node")
    for flag, n in dict(global_sizes).items():
        if n < 1 or n % size:
            raise InputError(f"{flag} = {n} is not divisible by the {size} processes")
    check_ranges(args)
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise InputError(f"--out {args.out} is a file; give a folder")
    if hasattr(args, "save_every"):
        check_run(args)
    system_prompt(args)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        torch.use_deterministic_algorithms(True)  # a CPU run is bitwise repeatable
    mesh, rank = None, int(os.environ.get("RANK", 0))
    if size > 1 or device.type == "cuda":
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
        # an hour: the others wait while one rank has far longer rollouts or writes a checkpoint; a rank that dies ends
        # the others at once, by torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
        shape = (size // local, local) if 1 < local < size else (size,)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        if rank == 0 and size > 1:
            shares = [f"{flag} {n}: {n // size} on each" for flag, n in dict(global_sizes).items()]
            print("; ".join([f"{size} processes, mesh {list(shape)}", *shares]), flush=True)
    return World(rank, size, device, mesh)


RANGES = {  # flag: smallest, largest value
    "seed": (0, None), "steps": (0, None), "batch": (1, None), "prompts": (1, None), "n": (1, None), "warmup_steps": (0, None),
    "epochs": (1e-9, None), "max_tokens": (1, None), "max_prompt": (1, None), "max_length": (1, None), "slots": (1, None),
    "max_new_tokens": (1, None), "lr": (0, None), "disc_lr": (0, None), "temperature": (1e-3, None), "alpha": (0, 1),
    "max_bad": (0, 1), "warmup": (0, 1), "clip": (1e-9, None), "min_pixels": (1, None), "max_pixels": (1, None),
    "disc_updates": (1, None), "updates_per_rollout": (1, None), "max_gen_batches": (1, None), "save_every": (0, None),
}  # fmt: skip


def check_ranges(args):
    """Raise InputError for a flag that is out of its range; NaN and infinity always are."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not (low <= value <= (math.inf if high is None else high) and math.isfinite(value)):
            flag = "--rollouts" if name == "n" else "--" + name.replace("_", "-")
            raise InputError(f"{flag} {value:g}: must be at least {low:g}" + (f" and at most {high:g}" if high else ""))


def check_run(args):
    """Raise InputError for what --resume, --keep and --logger cannot do, before anything is loaded."""
    state = find_state(args.out)
    if args.resume and state is None:
        raise InputError(f"--resume: {args.out}/state does not exist; start without --resume")
    if state and not args.resume and not os.path.exists(os.path.join(args.out, "meta.json")):
        raise InputError(f"--out {args.out} holds an unfinished run: add --resume, give another folder, or delete {state}")
    if args.keep < 1:
        raise InputError(f"--keep {args.keep}: at least one state has to stay")
    if args.logger:
        try:
            importlib.import_module(LOGGERS[args.logger])
        except ImportError as error:
            raise InputError(f"--logger {args.logger}: {error}; pip install {args.logger}") from error


def check_checkpoint(path):
    """Raise InputError unless `path` is a folder with a config and weights (anything else is taken as a Hub id)."""
    if not os.path.isdir(path):
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):  # owner/name; any other form of path has to exist
            raise InputError(f"--ckpt {path}: no such folder")
        return
    if not os.path.exists(os.path.join(path, "config.json")):
        raise InputError(f"--ckpt {path}: the folder has no config.json")
    if not any(name.endswith(".safetensors") for name in os.listdir(path)):
        raise InputError(f"--ckpt {path}: the folder has no weights (*.safetensors)")
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index) as file:
            try:
                names = set(json.load(file)["weight_map"].values())
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise InputError(f"--ckpt {path}: model.safetensors.index.json cannot be read ({error})") from error
        if not all(str(name).endswith(".safetensors") for name in names):
            raise InputError(f"--ckpt {path}: the index names weights that are no .safetensors files")


def load_tokenizer(path, args=None):
    """(tokenizer, Pillow image processor) of a checkpoint; args: the flags --min-pixels and --max-pixels."""
    check_checkpoint(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--ckpt {path}: {str(error).splitlines()[0]}") from error
    for edge, pixels in (("shortest_edge", args and args.min_pixels), ("longest_edge", args and args.max_pixels)):
        if pixels is not None:  # the processor's names; it means pixels of the whole picture
            image_processor.size[edge] = pixels
    if image_processor.size["shortest_edge"] > image_processor.size["longest_edge"]:
        raise InputError(f"--min-pixels is above --max-pixels: {dict(image_processor.size)}")
    return tokenizer, image_processor


def load_policy(path, dtype=torch.float32, attn="sdpa"):
    """The policy of a checkpoint, float32 master weights by default; missing or unexpected weights are an error."""
    check_checkpoint(path)
    try:
        model, info = Qwen3VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation="rows", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"--ckpt {path}: {str(error).splitlines()[0]}") from error
    check_loaded(path, info)
    rollout.set_attention(model.model, attn)
    return model


def check_loaded(path, info):
    """Weights that were missing would have been drawn at random."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise InputError(f"--ckpt {path}: {kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:5]))}")


def choose_attention(name, world):
    """--attn -> sdpa, flash or flex, said once at the start."""
    on_cuda = world.device.type == "cuda"
    if name in ("flash", "flex") and not on_cuda:
        raise InputError(f"--attn {name} needs a CUDA device; use --attn sdpa")
    name = ("flash" if on_cuda else "sdpa") if name == "auto" else name
    if world.rank == 0:
        print(f"attention: {name}", flush=True)
    return name


def system_prompt(args):
    if args.system_prompt is None:
        return rollout.SYSTEM_PROMPT
    try:
        with open(args.system_prompt, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError) as error:
        raise InputError(f"--system-prompt {args.system_prompt}: {getattr(error, 'strerror', None) or error}") from error


def shard(model, world, checkpointing=None):
    """FSDP2: every decoder layer, then the vision tower as one unit, then the rest with the root; bf16 compute and
    float32 master weights and reduction on CUDA; on several nodes HSDP. One CPU process stays plain. Heads of a
    discriminator stay float32."""
    backbone = getattr(model, "backbone", None) or model.model
    if checkpointing if checkpointing is not None else world.device.type == "cuda":
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers recomputes in train mode only, and from_pretrained leaves eval mode
    if world.size == 1 and world.device.type == "cpu":
        return model
    mesh = world.mesh
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if world.device.type == "cuda" else MixedPrecisionPolicy()
    for layer in backbone.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(backbone.visual, mesh=mesh, mp_policy=mixed)
    if hasattr(model, "heads"):
        for head in model.heads.values():  # a ModuleDict has no forward whose hooks could gather its weights
            fully_shard(head, mesh=mesh)
    else:
        model.target_logprobs = MethodType(rollout.target_logprobs, model)
    fully_shard(model, mesh=mesh, mp_policy=mixed)
    # the stages call these instead of forward; registering them runs the root's gather around them
    register_fsdp_forward_method(model, "scores" if hasattr(model, "heads") else "target_logprobs")
    return model


def make_sampler(model, world, ckpt, attn):
    """The model to sample from: the policy itself when it is whole, else an unsharded replica in the compute dtype.
    Sampling never runs through sharded modules: it would gather every layer for every token."""
    if not hasattr(model, "unshard"):
        return model
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    return load_policy(ckpt, dtype, attn).to(world.device).requires_grad_(False)


@torch.no_grad()
def refresh(sampler, model):
    """Copy the policy's current weights into the replica, one parameter at a time."""
    if sampler is not model:
        for mine, theirs in zip(sampler.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs.full_tensor())


def make_optimizer(model, lr, weight_decay):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)


class Skips:
    """Counts updates skipped for a loss or gradient that is not finite: in a row, in all, and those `end_step` has named."""

    def __init__(self):
        self.row = self.total = self.named = 0

    def step(self, model, optimizer, lr, clip, world, loss):
        """Clip, check on all ranks, step. Returns the gradient norm before clipping, or None when the step was skipped."""
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


def load_data(sources, args, check=lambda example: None):
    """load_examples, and a look at the first rows of every source, with --bad-rows stop at all of them: a wrong file is an error
    now, not after a model was loaded. check(example) raises InputError for a row that lacks what the stage needs."""
    try:
        examples = load_examples(sources, args.split)
    except InputError as error:
        raise InputErrorOfAll(str(error)) from error
    for first, count, _ in examples.sources:
        look, bad = count if args.bad_rows == "stop" else min(LOOK, count), 0
        for i in range(first, first + look):
            try:
                check(examples[i])
            except InputError as error:
                bad += 1
                if args.bad_rows == "stop":
                    raise InputErrorOfAll(f"{error} (--bad-rows skip leaves such rows out)") from error
                if bad > allowed(look, count, args):
                    raise too_many(bad, look, args, error) from error
    return examples


def allowed(seen, rows, args):
    """How many of `seen` rows may be bad: the share --max-bad, and before all rows were seen three standard deviations more, so
    that a set with fewer bad rows does not end a run by chance."""
    share = args.max_bad * seen
    return share if seen >= rows else share + 3 * math.sqrt(share)


def too_many(bad, seen, args, last):
    why = f"{bad} of {seen} rows looked at cannot be used, more than --max-bad {args.max_bad:g}"
    return InputErrorOfAll(f"{last} ({why}; with a higher one they are skipped and listed in {args.out}/skipped.jsonl)")


def order(n, start, seed):
    """Endless indices of a data set of n rows from global position `start`: a new permutation every epoch."""
    epoch, at = divmod(start, n)
    while True:
        for i in np.random.default_rng([seed, epoch]).permutation(n)[at:]:
            yield int(i)
        epoch, at = epoch + 1, 0


def mixed_order(sources, start, seed, block=1024):
    """The same for weighted sources [(first row, rows, weight)]: every position draws a source, which gives its next row."""
    firsts, sizes, weights = zip(*sources)
    shares = np.cumsum(weights)[:-1] / sum(weights)
    choose = lambda b: np.searchsorted(shares, np.random.default_rng([seed, b, 1]).random(block), side="right")
    b, at = divmod(start, block)
    past = np.concatenate([choose(i) for i in range(b)] + [choose(b)[:at]])
    orders = [order(n, int((past == s).sum()), seed) for s, n in enumerate(sizes)]
    while True:
        for s in choose(b)[at:]:
            yield firsts[s] + next(orders[s])
        b, at = b + 1, 0


class Feed:
    """The next usable examples of a data set, in an order that depends on the seed alone and is the same on every rank.

    encode(example) -> anything, or None for a row that is too long; an exception makes the row unusable. The ranks encode a
    share of the candidates each, in threads and one batch ahead, and tell each other which were usable. What is not is
    replaced by the next row and written to OUT/skipped.jsonl; too many unusable rows (--max-bad) end the run.
    """

    def __init__(self, examples, encode, args, world, progress):
        self.examples, self.encode, self.args, self.world = examples, encode, args, world
        self.position, self.dropped, self.bad = (progress.get(key, 0) for key in ("position", "dropped", "bad"))
        if progress.get("rows", len(examples)) != len(examples):
            raise InputErrorOfAll(f"--resume: --data has {len(examples)} rows, but {progress['rows']} when the state was saved")
        self.pool, self.ahead = ThreadPoolExecutor(4), {}
        self.path = os.path.join(args.out, "skipped.jsonl")
        self.new, self.written = [], set()  # (file, row): after the first epoch a row is counted again, but not written again
        if os.path.exists(self.path):
            with open(self.path) as file:
                self.written = {(row["file"], row["row"]) for row in map(json.loads, file)}

    def progress(self):
        return {"position": self.position, "dropped": self.dropped, "bad": self.bad, "rows": len(self.examples)}

    def try_encode(self, i):
        """-> (encoded or None, why it cannot be used or None, whether that is the row's fault)."""
        try:
            encoded = self.encode(self.examples[i])
        except Exception as error:  # whatever is wrong with a row, it must not end a run of days
            return None, str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}", True
        return encoded, None if encoded is not None else "too long for --max-prompt or --max-length", False

    def mine(self, candidates):
        """The places in a list of candidates that this rank encodes."""
        return [c for c in range(len(candidates)) if c * self.world.size // len(candidates) == self.world.rank]

    def draw(self, count, step):
        """-> (indices of the next `count` usable examples, {place among them: encoded} for those encoded on this rank)."""
        indices, encoded, lost = [], {}, 0  # lost: in a row
        if self.examples.weighted:
            upcoming = mixed_order(self.examples.sources, self.position, self.args.seed)
        else:
            upcoming = order(len(self.examples), self.position, self.args.seed)
        while len(indices) < count:
            candidates = [next(upcoming) for _ in range(count - len(indices))]
            jobs = {c: self.ahead.pop(candidates[c], None) or self.pool.submit(self.try_encode, candidates[c])
                    for c in self.mine(candidates)}  # fmt: skip
            results = {c: job.result() for c, job in jobs.items()}
            verdicts = self.world.gather({c: result[1:] for c, result in results.items()})
            verdicts = {c: verdict for part in verdicts for c, verdict in part.items()}
            self.position += len(candidates)
            for c, i in enumerate(candidates):
                reason, fault = verdicts[c]
                if reason is None:
                    if c in results:
                        encoded[len(indices)] = results[c][0]
                    indices.append(i)
                    lost = 0
                else:
                    lost += 1
                    self.skip(i, reason, fault, step)
            if lost >= 2 * len(self.examples):  # two epochs; between two uses of a row lie fewer
                raise InputErrorOfAll(f"--data: no row can be used; the last: {reason}")
        self.write()
        upcoming = [next(upcoming) for _ in range(count)]
        self.ahead = {upcoming[c]: self.pool.submit(self.try_encode, upcoming[c]) for c in self.mine(upcoming)}
        return indices, encoded

    def batch(self, count, step, length):
        """This rank's share, about equal in tokens, of the next `count` usable examples, encoded; length(encoded) -> tokens."""
        indices, encoded = self.draw(count, step)
        known = self.world.gather({i: length(item) for i, item in encoded.items()})
        lengths = {i: n for part in known for i, n in part.items()}
        mine = self.world.share([lengths[i] for i in range(count)])
        return [encoded.get(i) or self.encode(self.examples[indices[i]]) for i in mine]

    def skip(self, i, reason, fault, step):
        """Count and write down a row that cannot be used; InputError when that ends the run."""
        file, row = self.examples.where(i)
        where, reason = f"{file}:{row}", " ".join(reason.removeprefix(f"{file}:{row}: ").split())
        self.dropped += not fault
        self.bad += fault
        if fault and self.args.bad_rows == "stop":
            raise InputErrorOfAll(f"{where}: {reason} (--bad-rows skip leaves such rows out)")
        if (file, row) not in self.written:
            self.new.append({"step": step + 1, "file": file, "row": row, "reason": reason})
            self.written.add((file, row))
        if self.bad > allowed(max(self.position, min(LOOK, len(self.examples))), len(self.examples), self.args):
            if os.path.isdir(self.args.out):  # a run that fails before its first step leaves nothing behind
                self.write()
            raise too_many(self.bad, self.position, self.args, f"{where}: {reason}")

    def write(self):
        """Append the new rows to OUT/skipped.jsonl."""
        if self.world.rank == 0 and self.new:
            os.makedirs(self.args.out, exist_ok=True)
            with open(self.path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.new)
        self.new = []

    def close(self):
        """Print the totals."""
        self.pool.shutdown(cancel_futures=True)
        if self.world.rank == 0 and self.dropped + self.bad:
            print(f"rows: {self.position} seen, {self.dropped} too long, {self.bad} unusable; listed in {self.path}", flush=True)


def log(world, out, row):
    """One line on rank 0 and the same keys in OUT/metrics.jsonl; a metric without a value in this step is left out."""
    if world.rank:
        return
    row = {k: v for k, v in row.items() if v is not None}
    append_rows(os.path.join(out, "metrics.jsonl"), [row])
    if world.write:
        world.write(row)
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def append_rows(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)  # only now: a run that fails before its first step leaves nothing behind
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())  # not later than the state of this step


def start_log(world, out, step):
    """Begin metrics.jsonl, or after --resume drop the rows of steps that will be repeated -> the last row that stays."""
    rows = []
    if world.rank == 0:
        names = ("rollouts.jsonl", "skipped.jsonl", "metrics.jsonl")
        for path in filter(os.path.exists, (os.path.join(out, name) for name in names)):
            with open(path) as file:
                rows = [json.loads(line) for line in file if line.endswith("\n")]  # a killed run may leave half a line
            rows = [row for row in rows if row["step"] <= step]
            write_rows(path, rows)
    if world.size > 1:
        dist.barrier()
    return rows[-1] if rows else {}


def full_weights(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def git_commit():
    here = os.path.dirname(os.path.abspath(__file__))
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or None


def save(model, out, world, stage, args, step, metrics):
    """Write OUT as an ordinary checkpoint that from_pretrained loads: weights in the compute dtype, the tokenizer and
    processor files of the parent, and, last of all, meta.json, whose presence says that the stage is finished."""
    weights = full_weights(model)
    if world.rank == 0:
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # the embedding; sharded or converted copies no longer share its memory
        model.config.dtype = dtype
        with writing(out):
            model.save_pretrained(out, state_dict=weights)
            copy_processor(args.ckpt, out)
            write_meta(out, stage, args, step, metrics)
        print(f"saved {out}", flush=True)
    if world.size > 1:
        dist.barrier()


def write_meta(out, stage, args, step, metrics):
    meta = {"stage": stage, "args": vars(args), "step": step, "git_commit": git_commit(), "parent": args.ckpt}
    write_json(os.path.join(out, "meta.json"), {**meta, "metrics": metrics})


def copy_processor(ckpt, out):
    """Copy tokenizer, chat template and preprocessor files as they are; from a Hub id they are saved anew."""
    if not os.path.isdir(ckpt):
        for part in load_tokenizer(ckpt):
            part.save_pretrained(out)
        return
    weights = ("model", "pytorch_model", "config", "generation_config", "meta", "metrics")
    for name in os.listdir(ckpt):
        if name.endswith((".json", ".txt", ".jinja", ".model")) and name.split(".")[0] not in weights:
            shutil.copy(os.path.join(ckpt, name), out)


def write_json(path, value):
    with open(path + ".tmp", "w") as file:
        json.dump(value, file, indent=1)
    os.replace(path + ".tmp", path)


def write_rows(path, rows):
    """JSONL under a temporary name, then renamed: a file that exists is complete."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def save_state(out, world, parts, progress, keep=1):
    """Everything that a run needs to continue. parts: {name: (model, optimizer)}; progress: JSON-able counters. Sampling
    needs no generator state: its random numbers depend on (seed, step, prompt, sample). Written aside, then renamed; of
    earlier states the newest `keep` - 1 stay as OUT/state.STEP. Raises InputError when the disk is full."""
    new, path = os.path.join(out, "state.new"), os.path.join(out, "state")
    if world.rank == 0:
        remove_state(new)
    if world.size > 1:
        dist.barrier()
    states = state_dicts(parts)
    with writing(new):
        dcp.save(states, checkpoint_id=new, no_dist=world.size == 1)
        if world.rank == 0:
            write_json(os.path.join(new, "progress.json"), progress)
    if world.rank == 0:
        if os.path.exists(os.path.join(path, "progress.json")):
            earlier = f"{path}.{read_progress(path)['step']}"
            remove_state(earlier)
            os.replace(path, earlier)
        remove_state(path)
        os.replace(new, path)
        for name in earlier_states(out)[keep - 1 :]:
            remove_state(os.path.join(out, name))
    if world.size > 1:
        dist.barrier()


@contextmanager
def writing(path):
    """A full disk or another write error in the block becomes one line that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, dcp.CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free / 1e9
        raise InputError(f"{path} cannot be written, {free:.1f} GB are free: {str(cause).splitlines()[0]}") from error


def remove_state(path):
    """If there is one. First its progress.json: half a state does not count as one."""
    if os.path.exists(os.path.join(path, "progress.json")):
        os.remove(os.path.join(path, "progress.json"))
    shutil.rmtree(path, ignore_errors=True)


def earlier_states(out):
    """Their names, state.STEP, newest first."""
    return sorted(glob.glob("state.[0-9]*", root_dir=out), key=lambda name: -int(name[6:]))


def find_state(out):
    """The newest complete state: progress.json is written last, and a run killed between save_state's two renames leaves
    its state under one of the other names. None when there is none."""
    paths = [os.path.join(out, name) for name in ("state", "state.new", *earlier_states(out))]
    return next((path for path in paths if os.path.exists(os.path.join(path, "progress.json"))), None)


def read_progress(path):
    with open(os.path.join(path, "progress.json")) as file:
        return json.load(file)


def state_dicts(parts):
    return {
        name: {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        for name, (model, optimizer) in parts.items()
    }


def resume(out, world, parts):
    """Load what save_state wrote into models and optimizers (any number of processes) -> progress. The index of a
    torch.distributed.checkpoint is a pickle: a state is for the run that wrote it; what is passed on is the checkpoint."""
    path = find_state(out)
    states = state_dicts(parts)
    dcp.load(states, checkpoint_id=path, no_dist=world.size == 1)
    for name, (model, optimizer) in parts.items():
        set_model_state_dict(model, states[name]["model"])
        set_optimizer_state_dict(model, optimizer, states[name]["optimizer"])
    return read_progress(path)


def begin(args, world, parts, steps, *skips):
    """With --resume load the newest state, else clear OUT of a finished run; open the logs; from now on SIGTERM ends the run
    after the step. -> (progress: counters of the run, the last row of metrics.jsonl or {})."""
    progress = {"step": 0, "position": 0, "dropped": 0}
    if args.resume:
        progress = resume(args.out, world, parts)
        processes = progress.pop("processes")
        if progress["step"] > steps:
            raise InputErrorOfAll(f"--resume: the run has done {progress['step']} steps already, --steps makes it {steps}")
        for mine, (mine.row, mine.total) in zip(skips, progress.pop("skips")):
            mine.named = mine.total
        if world.rank == 0:
            other = f", saved by {processes} processes: same data, same random numbers, other rounding of sums"
            print(f"resumed after step {progress['step']}{other if processes != world.size else ''}", flush=True)
    elif world.rank == 0:
        for name in ("state", "state.new", *earlier_states(args.out), "bad"):
            remove_state(os.path.join(args.out, name))
    if world.rank == 0 and os.path.exists(os.path.join(args.out, "meta.json")):
        os.remove(os.path.join(args.out, "meta.json"))  # not finished any more
    row = start_log(world, args.out, progress["step"])
    if args.logger and world.rank == 0:
        world.write = open_logger(args, progress["step"])
    signal.signal(signal.SIGTERM, lambda *_: setattr(world, "stop", True))
    return progress, row


def open_logger(args, step):
    """-> a function that sends a row of metrics to --logger; steps after `step` are written anew."""
    os.makedirs(args.out, exist_ok=True)
    module = importlib.import_module(LOGGERS[args.logger])
    if args.logger == "tensorboard":
        writer = module.SummaryWriter(os.path.join(args.out, "tensorboard"), purge_step=step + 1)
        return lambda row: [writer.add_scalar(key, value, row["step"]) for key, value in row.items()] and writer.flush()
    path = os.path.join(args.out, "wandb_id")
    if step == 0:
        with open(path, "w") as file:
            file.write(uuid.uuid4().hex)
    with open(path) as file:
        run = module.init(project="prism", id=file.read(), resume="allow", dir=args.out, config=vars(args))
    return lambda row: run.log(row, step=row["step"])


def end_step(args, world, parts, progress, last, *skips):
    """Save the state when it is due, and when the run has to end: after SIGTERM on any rank (status 143), and after three
    updates in a row that were not finite, which leave OUT/bad/state to look at and OUT/state as it is."""
    step = progress["step"]
    for s in skips:
        if s.total > s.named and world.rank == 0:
            print(f"step {step}: update skipped, loss or gradient was not finite", flush=True)
        s.named = s.total
    progress = progress | {"skips": [(s.row, s.total) for s in skips], "processes": world.size}
    if max(s.row for s in skips) >= 3:
        save_state(os.path.join(args.out, "bad"), world, parts, progress)
        raise InputErrorOfAll(
            f"loss or gradient was not finite in 3 updates in a row, the last in step {step}: lower --lr or look at the rows; "
            f"weights and optimizers are in {args.out}/bad/state, {args.out}/state is untouched"
        )
    stop = world.sum(world.stop)[0] > 0  # on any rank: all have to agree on the step
    if last or stop or args.save_every and step % args.save_every == 0:
        save_state(args.out, world, parts, progress, args.keep)
    if stop and not last:
        if world.rank == 0:
            print(f"SIGTERM: the state of step {step} is saved, --resume continues", flush=True)
        raise SystemExit(128 + signal.SIGTERM)


def cosine(step, total, peak, warmup):
    """Learning rate of `step` (from 0): linear to `peak` over the first `warmup` share, then half a cosine to 0."""
    ramp = max(1, round(total * warmup))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


def most(packs, world):
    """How many forwards every rank must run so that all run the same number: the most packs that any rank has."""
    return max(world.gather(packs))


# -------------------------------------------------------------------------------------------------------------------- SFT
def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["prism-vlm/gemini_distill"], help="demonstrations: SOURCE[:WEIGHT] ...")
    parser.add_argument("--batch", type=int, default=128, help="examples per step, over all processes")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the data")
    parser.add_argument("--steps", type=int, default=None, help="steps instead of --epochs")
    parser.add_argument("--lr", type=float, default=1e-5, help="peak learning rate")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps with rising learning rate")
    parser.add_argument("--max-length", type=int, default=8192, help="longer demonstrations are dropped and counted")
    parser.add_argument("--truncate", action="store_true", help="cut them instead (a prompt is never cut)")
    common_flags(parser, "sft")
    return parser.parse_args()


def need_response(example):
    if not example.response:
        raise InputError(f"{example.id}: the row has no response to learn from (columns response, messages or teacher_*)")


def encode_demonstration(example, tokenizer, image_processor, args, system):
    """Example -> (Prompt, response ids with the EOS), or None when it is too long."""
    need_response(example)
    prompt = encode_prompt(example, tokenizer, image_processor, args.max_prompt, system)
    ids = encode_response(example.response, tokenizer)
    if prompt is None:
        return None
    room = args.max_length - len(prompt.input_ids)
    if len(ids) > room and not (args.truncate and room > 0):
        return None
    return prompt, ids[:room]


def show_example(prompt, ids, tokenizer):
    """Print one example as the model sees it; trained tokens stand between the arrows, the EOS with its id."""
    text = tokenizer.decode(prompt.input_ids).replace("<|image_pad|>" * 2, "")
    print(f"--- step 0, first example\n{text}>>>{tokenizer.decode(ids)}<<< (EOS id {ids[-1]})\n---", flush=True)


def update(policy, batch, args, world):
    """Accumulate the gradient of one global batch; batch: this rank's (Prompt, ids) pairs -> (loss, target tokens)."""
    tokens = world.sum(sum(len(ids) for _, ids in batch))[0]
    rows = [(len(prompt.input_ids), [len(ids)]) for prompt, ids in batch]
    packs = [[batch[r] for r, _ in pack] for pack in split_rows(rows, args.max_tokens)]
    loss = 0.0
    for i in range(most(len(packs), world)):
        part = packs[min(i, len(packs) - 1)]
        pack = pack_rows([prompt for prompt, _ in part], [(r, ids) for r, (_, ids) in enumerate(part)], world.device)
        share = -pack_logprobs(policy, pack)[0].sum() / tokens * (i < len(packs))
        (share * world.size).backward()  # FSDP averages over ranks, the loss is already a share of the global mean
        loss += share.item()
    return world.sum(loss)[0], tokens


def main():
    args = parse_args()
    world = setup(args, {"--batch": args.batch})
    examples = load_data(args.data, args, need_response)
    tokenizer, image_processor = load_tokenizer(args.ckpt, args)
    system = system_prompt(args)
    attn = choose_attention(args.attn, world)
    policy = shard(load_policy(args.ckpt, attn=attn).to(world.device).train(), world, args.checkpointing)
    optimizer = make_optimizer(policy, args.lr, args.weight_decay)
    steps = args.steps if args.steps is not None else max(1, math.ceil(len(examples) * args.epochs / args.batch))
    parts, skips = {"policy": (policy, optimizer)}, Skips()
    progress, row = begin(args, world, parts, steps, skips)
    encode = lambda example: encode_demonstration(example, tokenizer, image_processor, args, system)
    feed = Feed(examples, encode, args, world, progress)
    for step in range(progress["step"], steps):
        began = time.time()
        batch = feed.batch(args.batch, step, lambda item: len(item[0].input_ids) + len(item[1]))
        if step == 0 and world.rank == 0:
            show_example(*batch[0], tokenizer)
        # update policy
        loss, tokens = update(policy, batch, args, world)
        lr = cosine(step, steps, args.lr, args.warmup)
        norm = skips.step(policy, optimizer, lr, args.clip, world, loss)
        # log
        progress = {"step": step + 1, **feed.progress()}
        row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr, "tokens": int(tokens)}
        row |= {"dropped": feed.dropped, "bad": feed.bad, "skipped_steps": skips.total, "seconds": round(time.time() - began, 3)}
        log(world, args.out, row)
        # save
        end_step(args, world, parts, progress, step + 1 == steps, skips)
    feed.close()
    save(policy, args.out, world, "sft", args, steps, row)


if __name__ == "__main__":
    run(main)
