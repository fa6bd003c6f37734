"""Run: pytest tests/test_runtime.py         (folders, checkpoints, logs, states, runs; CPU only)"""

import argparse
import copy
import fcntl
import json
import math
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ONE, ROOT, as_flags, branch_logprobs, launch, read_jsonl, run_stage, stage
from conftest import stock_inputs, stock_logprobs, untimed, write_jsonl
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoTokenizer

import rollout
import runtime
import sft
from data import load_examples
from discriminator import load_discriminator, save_discriminator
from rows import set_attention, target_logprobs
from flags import InputError, parse_or_end


def flags_of(tiny, out, **more):
    flags = {"ckpt": tiny.base, "data": tiny.sft, "out": out, "seed": 5, "batch": 4, "lr": 1e-3}
    return as_flags({name.replace("_", "-"): value for name, value in (flags | more).items()})


def one_line(capfd):
    """The one line that was written to stderr."""
    lines = capfd.readouterr().err.splitlines()
    lines = [line for line in lines if "Warning" not in line and line[:2] != "  "]
    assert len(lines) == 1, lines
    return lines[0]


def content_of(folder):
    """{path: bytes} of all files in a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def names(paths):
    return [Path(path).name for path in paths]


# ------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("error, words", [
    (KeyError("shape"), "KeyError 'shape'"), (AssertionError(), "AssertionError"),
    (OSError("cut\nhere"), "cut"), (InputError("it is cut"), "it is cut"),
])  # fmt: skip
def test_an_error_says_what_it_is_about_and_what_it_is(error, words):
    with pytest.raises(InputError) as found, runtime.about("--ckpt x"):
        raise error
    assert str(found.value) == f"--ckpt x: {words}"


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA")])
def test_want_of_memory_is_no_fault_of_what_is_read(error):
    with pytest.raises(type(error)), runtime.about("--ckpt x"), runtime.about("weights"):
        raise error
    with pytest.raises(InputError, match="^--ckpt x: weights: what$"):
        with runtime.about("--ckpt x"), runtime.about("weights"):
            raise RuntimeError("what\nelse")


# ---------------------------------------------------------------------------------------- processes
@pytest.mark.parametrize("seed", range(20))
def test_ranks_share_work_by_length(seed):
    """Consecutive slices that cover all pieces, none empty, each off the mean by no more than the
    pieces at its ends."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 9))
    lengths = rng.integers(1, 100, int(rng.integers(size, 40))).tolist() + [1000] * (seed % 2)
    slices = [runtime.World(rank, size, None).share(lengths) for rank in range(size)]
    assert [i for part in slices for i in part] == list(range(len(lengths))) and all(slices)
    if seed % 2 == 0 and len(lengths) > 3 * size:
        sums = np.array([sum(lengths[i] for i in part) for part in slices])
        assert abs(sums - sum(lengths) / size).max() <= max(lengths)
    equal = [runtime.World(rank, size, None).share([1] * 3 * size) for rank in range(size)]
    assert equal == [range(3 * rank, 3 * rank + 3) for rank in range(size)]


@pytest.mark.parametrize("out, path, refused", [
    ("ck", "ck", True), ("ck/out", "ck", True), (".", "ck", True), ("link", "ck", True),
    ("ck2", "ck", False), ("out", "ck", False), ("a.jsonl", "a.jsonl", True),
    (".", "a.jsonl", True), ("a.jsonl", "*.jsonl", True), ("a.jsonl", "a.jsonl:0.9", True),
    (".", "*.jsonl:0.5", True), ("out", "*.jsonl:0.5", False), ("out", "owner/name:f.jsonl", False),
    ("out", "a.jsonl", False), ("ck", "Qwen/Qwen3-VL-4B-Instruct", False), ("gone", "gone", False),
])  # fmt: skip
def test_out_lies_apart_from_what_is_read(tmp_path, monkeypatch, out, path, refused):
    """Written over it would be lost; a folder around OUT would be read with OUT in it."""
    (tmp_path / "ck").mkdir()
    (tmp_path / "link").symlink_to("ck")
    (tmp_path / "a.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    for given in (path, ["other", path], str(tmp_path / path)):
        try:
            runtime.check_out(out, {"--disc": None, "--data": given})
        except InputError as error:
            assert refused and f"--out {out} " in str(error) and "--data" in str(error)
        else:
            assert not refused


@pytest.mark.parametrize("flag", ["ckpt", "data"])
def test_a_run_in_the_folder_of_what_it_reads_is_refused(tiny, tmp_path, capfd, flag):
    folder = shutil.copytree(tiny.base, tmp_path / "ck")
    data = shutil.copy(tiny.sft, folder)
    before = content_of(folder)
    read = {"ckpt": folder, "data": data}[flag]
    assert stage("sft", *flags_of(tiny, folder, **{flag: read})) == 2
    assert one_line(capfd).startswith(f"sft.py: error: --out {folder} ")
    assert content_of(folder) == before


def test_a_folder_belongs_to_one_run(tiny, tmp_path, capfd):
    flags = flags_of(tiny, tmp_path / "out", steps=1)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another run does
        assert stage("sft", *flags) == 2
    assert "out: another run is at work there" in one_line(capfd)
    assert os.listdir(tmp_path / "out") == ["lock"]
    assert stage("sft", *flags) == 0  # the lock does not outlive its holder


@pytest.mark.parametrize("out", ["/proc/prism", "file", "file/out"])
def test_a_folder_that_cannot_be_written(tiny, tmp_path, capfd, out):
    (tmp_path / "file").write_text("x")
    assert stage("sft", *flags_of(tiny, tmp_path / out)) == 2
    assert re.match("sft.py: error: --out .* cannot be written: ", one_line(capfd))


def test_old_python_is_one_line(capfd, monkeypatch):
    """Said before anything is imported that an old one may lack."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "version_info", (3, 10, 4))
        parse_or_end(sft.parse_args)
    assert end.value.code == 2 and "Python 3.11 or later is needed" in one_line(capfd)


# --------------------------------------------------------------------------------------------- FSDP
@pytest.mark.parametrize("load", [runtime.load_policy, load_discriminator])
def test_checkpointing_recomputes_activations(tiny, load):
    """from_pretrained leaves a model in eval mode, in which transformers silently keeps all
    activations."""
    runs = {}
    for checkpointing in (False, True):
        recompute = {"checkpointing": checkpointing}
        model = runtime.shard(load(tiny.base), [], ONE, target_logprobs, **recompute)
        backbone, calls = getattr(model, "backbone", None) or model.model, []
        norm = backbone.language_model.layers[0].input_layernorm
        norm.register_forward_hook(lambda *_: calls.append(1))
        if hasattr(model, "heads"):
            d_v, d_r = model.scores([tiny.prompts[1]], [(0, [20, tiny.eos])], [(0, [21, tiny.eos])])
            (d_v.sum() + d_r.sum()).backward()
        else:
            set_attention(model, "sdpa")
            branch_logprobs(model, tiny.prompts[1], [[20, tiny.eos]])[0].sum().backward()
        runs[checkpointing] = len(calls)
    assert runs == {False: 1, True: 2}


def test_checkpointing_leaves_sampling_alone(tiny):
    """Under checkpointing transformers drops the cache of a model in train mode; sampling needs
    it."""
    model = set_attention(runtime.load_policy(tiny.base), "sdpa")
    runtime.shard(model, [], ONE, target_logprobs, checkpointing=True)

    def draw(model):
        settings = {"max_new_tokens": 6, "eos_id": tiny.eos}
        return [r.ids for r in rollout.sample(model, [tiny.prompts[1]], 3, **settings)[0]]

    assert draw(model.train()) == draw(tiny.model)
    assert model.training  # and what follows is recomputed as before


# ---------------------------------------------------------------------------------------- optimizer
@pytest.mark.parametrize(
    "total, warmup", [(10, 0.1), (100, 0.1), (7, 0.0), (1, 0.1), (20, 0.5), (3, 1.0)]
)
def test_cosine(total, warmup):
    ramp = max(1, round(total * warmup))
    got = [runtime.cosine(step, total, 2.0, warmup) for step in range(total)]
    rising = [2.0 * (step + 1) / ramp for step in range(min(ramp, total))]
    falling = [1 + math.cos(math.pi * i / (total - ramp)) for i in range(total - ramp)]
    assert got == pytest.approx(rising + falling)
    assert max(got) == pytest.approx(2.0) and min(got) > 0


def test_the_optimizer_is_adamw():
    """Decoupled weight decay (Loshchilov & Hutter, 1711.05101, algorithm 2), in float64."""
    rng, lr, decay = np.random.default_rng(0), 0.01, 0.1
    weight = rng.standard_normal(50)
    parameter = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float32))
    model = torch.nn.ParameterList([parameter])
    optimizer, m, v = runtime.make_optimizer(model, lr, decay), 0, 0
    for t in range(1, 6):
        gradient = rng.standard_normal(50)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        adam = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        weight = weight - lr * decay * weight - lr * adam
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    assert np.abs(parameter.detach().numpy() - weight).max() < 1e-6


def test_steps_that_are_not_finite_are_skipped():
    model = torch.nn.Linear(2, 1)
    optimizer, skips = runtime.make_optimizer(model, 0.1, 0.0), runtime.Skips()

    def step(scale, loss=0.0):
        before = model.weight.detach().clone()
        (model(torch.ones(1, 2)) * scale).sum().backward()
        norm = skips.step(model, optimizer, 0.1, 1.0, ONE, loss)
        assert all(p.grad is None for p in model.parameters())
        return norm, torch.equal(before, model.weight)

    # the norm before clipping; a step was made
    assert step(2.0) == (pytest.approx(math.sqrt(12)), False)
    assert step(math.nan) == (None, True)
    assert step(math.inf) == (None, True)
    assert step(2.0)[1] is False  # two in a row, then a good one: the count starts again
    assert step(2.0, loss=math.nan) == (None, True)
    assert step(math.nan) == (None, True)
    assert step(math.nan) == (None, True)
    assert (skips.row, skips.total) == (3, 5)
    assert all(p.isfinite().all() for p in model.parameters())


def test_weights_that_are_not_finite_are_no_checkpoint(tiny, tmp_path, capfd, monkeypatch):
    """An update of a finite gradient may still overflow."""
    step = runtime.Skips.step

    def overflow(skips, model, *more):
        norm = step(skips, model, *more)
        if (tmp_path / "out" / "metrics.jsonl").exists():  # the second update
            model.model.language_model.norm.weight.data[0] = math.inf
        return norm

    monkeypatch.setattr(runtime.Skips, "step", overflow)
    assert stage("sft", *flags_of(tiny, tmp_path / "out", steps=2, save_every=1)) == 2
    assert "step 2: weights or moments are not finite: lower --lr" in one_line(capfd)
    assert names(runtime.find_states(tmp_path / "out")) == ["state.1"]
    assert names(runtime.find_states(tmp_path / "out" / "bad")) == ["state.2"]
    assert not {"meta.json", "config.json", "model.safetensors"} & set(os.listdir(tmp_path / "out"))


def test_moments_that_are_not_finite_are_found():
    model = torch.nn.Linear(2, 1)
    optimizer = runtime.make_optimizer(model, 0.1, 0.0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert runtime.all_finite({"policy": (model, optimizer)}, ONE)
    optimizer.state[model.weight]["exp_avg_sq"][0, 0] = math.inf
    assert not runtime.all_finite({"policy": (model, optimizer)}, ONE)


# -------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("name, message", [
    ("Qwen/Qwen3-VL-4B-Instruct", "neither a folder nor a checkpoint that the Hub gives: "),
    ("prism-vlm/Qwen3-VL-2B.x_y", "neither a folder nor a checkpoint that the Hub gives: "),
    ("nowhere", "no such folder"), ("nowhere/", "no such folder"), ("./a/b", "no such folder"),
    ("a/b/c", "no such folder"), ("/no/where", "no such folder"),
    ("../nowhere", "no such folder"), ("a/", "no such folder"),
])  # fmt: skip
def test_folders_and_hub_ids(name, message):
    """owner/name is a Hub id, here out of reach, unless there is such a folder; anything else has
    to be a folder."""
    with pytest.raises(InputError, match=f"--ckpt {name}: {message}"):
        runtime.check_checkpoint(name)


def test_a_hub_id_is_the_folder_that_is_downloaded(tiny, tmp_path, monkeypatch):
    """With a cache as the Hub leaves it in place of the Hub: what is trained and written is the
    same, the files of tokenizer and processor to the byte."""
    cached, commit = tmp_path / "models--owner--tiny.1_b", "0" * 40
    folder = Path(shutil.copytree(tiny.base, cached / "snapshots" / commit))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    contents = []
    for out, ckpt in (("hub", "owner/tiny.1_b"), ("local", tiny.base)):
        assert stage("sft", *flags_of(tiny, tmp_path / out, ckpt=ckpt, steps=1)) == 0
        contents.append(content_of(tmp_path / out))
    names = {name for name in contents[1] if name.endswith((".json", ".jinja", ".safetensors"))}
    names = {name for name in names if Path(name).name not in OWN_TO_A_RUN}
    assert len(names) == 2 * 7 and names <= contents[0].keys()
    assert all(contents[0][name] == contents[1][name] for name in names)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="--ckpt owner/tiny.1_b: no weights"):
        runtime.load_policy("owner/tiny.1_b")


@pytest.mark.parametrize("load", [runtime.load_policy, load_discriminator])
def test_a_missing_weight_is_an_error(tiny, tmp_path, load):
    """Otherwise transformers initialises it at random and training goes on."""
    broken = Path(shutil.copytree(tiny.base, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(k for k in weights if k.endswith("layers.1.mlp.up_proj.weight")))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight"):
        load(str(broken))


@pytest.mark.parametrize("change, words", [
    ({"model.visual.extra": torch.ones(1)}, "unexpected keys: model.visual.extra"),
    ({"model.visual.pos_embed.weight": torch.ones(3, 5)}, "mismatched keys: model.visual.pos_emb"),
])  # fmt: skip
def test_other_weights_than_those_of_the_model_are_an_error(tiny, tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        runtime.load_policy(variant(tiny, tmp_path, weights=change))


def test_a_tied_head_may_be_stored_if_it_is_the_same(tiny, tmp_path):
    stored = load_file(Path(tiny.base) / "model.safetensors")
    head = stored["model.language_model.embed_tokens.weight"]
    model = runtime.load_policy(variant(tiny, tmp_path, weights={"lm_head.weight": head.clone()}))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, head)
    other = variant(tiny, tmp_path, "other", weights={"lm_head.weight": head + 1})
    with pytest.raises(InputError, match="lm_head.weight is tied to model.*and differs"):
        runtime.load_policy(other)


def test_a_policy_has_the_weights_that_transformers_reads(tiny):
    """And the frequencies of its rotary embeddings, which are not stored, its tied head and its
    settings for generation."""
    model, stock = runtime.load_policy(tiny.base), tiny.stock
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(model, kind)()), dict(getattr(stock, kind)())
        assert mine.keys() == theirs.keys() and len(mine) > 3
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_patches_can_be_multiplied(tiny):
    """In place of a convolution whose kernel is as large as its stride, here in float64; also in a
    copy of the model."""
    conv = copy.deepcopy(tiny.stock.model.visual).double()
    product = copy.deepcopy(runtime.load_policy(tiny.base).model.visual)
    assert conv.state_dict().keys() == product.state_dict().keys()
    pixels, near = tiny.prompts[3].pixel_values, partial(pytest.approx, rel=1e-6, abs=3e-6)
    found, expected = product.patch_embed(pixels), conv.patch_embed(pixels.double())
    assert found.flatten().tolist() == near(expected.flatten().tolist())
    found.square().mean().backward(), expected.square().mean().backward()
    for mine, theirs in zip(product.patch_embed.parameters(), conv.patch_embed.parameters()):
        assert theirs.grad.any()
        assert mine.grad.flatten().tolist() == near(theirs.grad.flatten().tolist())


def test_a_sampler_in_bfloat16_keeps_its_positions(tiny):
    """Its weights are rounded, the frequencies of its rotary embeddings are not: at 1000 tokens
    that would turn some of them by a radian."""
    world = argparse.Namespace(mesh="some", dtype=torch.bfloat16, device=torch.device("cpu"))
    sampler = runtime.make_sampler(runtime.load_policy(tiny.base, world=world), world)
    with torch.no_grad():
        for mine, theirs in zip(sampler.parameters(), tiny.stock.parameters(), strict=True):
            assert mine.dtype == torch.bfloat16 and not mine.requires_grad
            mine.copy_(theirs)
    for mine, theirs in zip(sampler.buffers(), tiny.stock.buffers(), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == torch.float32
    half = AutoModelForImageTextToText.from_pretrained(tiny.base, dtype=torch.bfloat16)
    runtime.multiply_patches(half.model.visual)
    for model in (half, sampler):
        model.set_attn_implementation("sdpa")
    inputs = stock_inputs(tiny.prompts[3], [20, 21, 22], half.config)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        assert torch.equal(sampler(**inputs).logits, half(**inputs).logits)


SMALL = {"prompts": 2, "rollouts": 4, "max-new-tokens": 24, "steps": 2}
HALF = {  # script, flags, and what is near what float32 gives: a log and a key
    "sft": ("sft", {"batch": 4, "steps": 2}, ("metrics.jsonl", "loss")),
    "align": ("align", SMALL | {"disc": "DISC", "disc-lr": 1e-3, "warmup-steps": 1}, None),
    "rl": ("rl", SMALL | {"updates-per-rollout": 2, "kl": 0.1}, None),
    "pairs": ("discriminator", {"batch": 4, "steps": 2, "mismatch": 1, "max-bad": 0.5},
              ("metrics.jsonl", "grad_norm")),
    "score": ("discriminator", {"ckpt": "DISC"}, ("scores.jsonl", "perception")),
    "eval": ("eval", {"max-new-tokens": 8}, None),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_every_stage_computes_in_bfloat16(tiny, policy, tmp_path, name):
    """On two processes. A checkpoint has that dtype too, and the numbers are near those of float32,
    but not the same."""
    script, flags, near = HALF[name]
    disc = load_discriminator(policy)
    for head in disc.heads.values():
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    save_discriminator(disc, str(tmp_path / "disc"), ONE, policy)
    flags = {"ckpt": policy, name if name in ("pairs", "score") else "data": tiny.align} | flags
    flags = [tmp_path / "disc" if part == "DISC" else part for part in as_flags(flags)]
    half = tmp_path / "half"
    run_stage(script, [*flags, "--out", half, "--dtype", "bf16"], 2)
    if name in ("sft", "align", "rl"):
        weights = load_file(half / "model.safetensors").values()
        assert {weight.dtype for weight in weights} == {torch.bfloat16}
    if name in ("align", "rl"):  # the replica that samples computes as the policy does
        assert read_jsonl(half / "metrics.jsonl")[-1]["drift"] < 0.1
    if near:
        assert stage(script, *flags, "--out", tmp_path / "whole") == 0
        file, key = near
        half, whole = read_jsonl(half / file), read_jsonl(tmp_path / "whole" / file)
        half, whole = ([line.get(key) or 0.0 for line in lines] for lines in (half, whole))
        assert half == pytest.approx(whole, rel=0.1, abs=0.05) and half != whole and any(whole)


SHARDS = """
import os, sys
import torch
sys.path.insert(0, {root!r})
import runtime
from discriminator import Discriminator, load_discriminator
from rows import target_logprobs

read, get = [], runtime.safe_open
class Noted:
    def __init__(self, *args, **more):
        self.file = get(*args, **more).__enter__()
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def __getattr__(self, name):
        return getattr(self.file, name)
    def get_slice(self, name):
        part = self.file.get_slice(name)
        class Slice:
            def get_shape(self):
                return part.get_shape()
            def __getitem__(self, rows):
                found = part[rows]
                read.append(found.numel())
                return found
        return Slice()
runtime.safe_open = Noted
world = runtime.World(int(os.environ["RANK"]), 2, torch.device("cpu"))
world.mesh = runtime.connect(2, 2, world.device)
def check(model, units, forward, float32=()):
    assert all(p.is_meta for p in model.parameters()) and not read
    runtime.shard(model, units, world, forward, float32)
    local = {{name: p.to_local().numel() for name, p in model.named_parameters()}}
    assert sum(read) == sum(local[name] for name in model.stored)
    read.clear()
    return sum(local.values()), sum(p.numel() for p in model.parameters())

def equal(model, whole):
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(getattr(mine, "full_tensor", mine.clone)(), theirs), name
    read.clear()

policy = runtime.load_policy({base!r}, world=world)
sampler = runtime.make_sampler(policy, world)
units = [*policy.model.language_model.layers, policy.model.visual]
held = [check(policy, units, target_logprobs)]
runtime.refresh(sampler, policy)
equal(sampler, runtime.load_policy({base!r}))
assert policy.lm_head.weight is policy.get_input_embeddings().weight
for path, variant in {discriminators!r}:
    disc = load_discriminator(path, variant, world=world)
    units = [*disc.backbone.language_model.layers, disc.backbone.visual]
    held.append(check(disc, units, Discriminator.scores, disc.heads.values()))
    equal(disc, load_discriminator(path, variant))
os.write(1, f"held {{held}}\\n".encode())  # in one piece: both write to one pipe
os._exit(0)
"""


def test_every_rank_reads_its_shards_alone(tiny, tmp_path):
    """Neither holds a whole policy or discriminator at any time, together they hold what one
    process does."""
    script, stored = tmp_path / "shards.py", str(tmp_path / "disc")
    save_discriminator(load_discriminator(tiny.base, "text-only"), stored, ONE, tiny.base)
    discriminators = [(tiny.base, "moe"), (tiny.base, "dense"), (tiny.released, "learned")]
    discriminators += [(stored, "text-only")]
    words = {"root": str(ROOT), "base": tiny.base, "discriminators": discriminators}
    script.write_text(SHARDS.format(**words))
    result = launch(script, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.removeprefix("held ") for line in result.stdout.splitlines() if "held" in line]
    held = np.array([json.loads(line.replace("(", "[").replace(")", "]")) for line in lines])
    assert held.shape == (2, 5, 2)  # ranks, models, (held, whole)
    assert (held[:, :, 0].sum(0) == held[0, :, 1]).all()


def variant(tiny, tmp_path, name="ck", settings=None, weights=None, **files):
    """A copy of the tiny checkpoint with other settings in config.json, other weights, and other
    files (None: it is gone)."""
    folder = Path(shutil.copytree(tiny.base, tmp_path / name))
    config = json.loads((folder / "config.json").read_text()) | (settings or {})
    (folder / "config.json").write_text(json.dumps(config))
    if weights:
        stored = load_file(folder / "model.safetensors")
        save_file(stored | weights, folder / "model.safetensors", {"format": "pt"})
    for file, content in files.items():
        path = folder / file.replace("__", ".")
        path.unlink() if content is None else path.write_text(content)
    return str(folder)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4844720\n"
INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
UP = "model.language_model.layers.0.mlp.up_proj.weight"
CHECKPOINTS = {  # name: what is other in it, words of the line
    "text only": ({"settings": {"model_type": "qwen2"}}, "a qwen2; a qwen3_vl"),
    "Qwen2.5-VL": ({"settings": {"model_type": "qwen2_5_vl"}}, "a qwen2_5_vl; a qwen3_vl"),
    "mixture": ({"settings": {"model_type": "qwen3_vl_moe"}}, "a qwen3_vl_moe; a qwen3_vl is"),
    "no type": ({"settings": {"model_type": None}}, "a None; a qwen3_vl"),
    "no object": ({"config__json": "[]"}, "config.json"),
    "broken config": ({"config__json": "{"}, "config.json"),
    "an adapter alone": ({"config__json": None, "adapter_config__json": "{}"}, "an adapter"),
    "an adapter beside": ({"adapter_config__json": "{}"}, "an adapter"),
    "adapter weights": ({"adapter_model__safetensors": "x"}, "an adapter"),
    "a pointer": ({"model__safetensors": POINTER}, "model.safetensors: .*Git LFS pointer"),
    "a shard is missing": ({"model__safetensors__index__json": INDEX}, "model-2.safetensors: "),
    "broken index": ({"model__safetensors__index__json": "[]"}, "model.safetensors.index.json"),
    "no weights": ({"model__safetensors": None}, "no weights"),
    "an empty weight": ({"weights": {UP: torch.zeros(0)}}, f"the weight {UP} is empty"),
    "no template": ({"chat_template__jinja": None}, "no chat template"),
    "broken template": (
        {"chat_template__jinja": None, "chat_template__json": "{}"}, "chat_template"
    ),
} | {
    name: ({"settings": {"quantization_config": {"quant_method": name}}}, f"quantised .*{name}")
    for name in ("bitsandbytes", "fp8", "awq", "gptq")
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_looked_at_before_it_is_loaded(tiny, tmp_path, capfd, name):
    other, words = CHECKPOINTS[name]
    flags = flags_of(tiny, tmp_path / "out", ckpt=variant(tiny, tmp_path, **other), steps=1)
    assert stage("sft", *flags) == 2
    assert re.match(f"sft.py: error: --ckpt .*/ck: .*{words}", one_line(capfd))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [3, 9, 5000])
def test_a_cut_file_of_weights_is_named(tiny, tmp_path, cut):
    folder = Path(variant(tiny, tmp_path))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:cut])
    for load in (runtime.load_tokenizer, runtime.load_policy, load_discriminator):
        with pytest.raises(InputError, match="model.safetensors: .*incomplete download"):
            load(str(folder))


def test_a_tokenizer_beyond_the_embedding_is_named(tiny, tmp_path):
    folder = variant(tiny, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<box>", "</box>"])
    tokenizer.save_pretrained(folder)
    n = len(tiny.tokenizer)
    with pytest.raises(InputError, match=f"has {n + 2} tokens, the embedding {n} rows"):
        runtime.load_tokenizer(folder)


def test_the_model_knows_how_many_tokens_there_are(tiny, tmp_path):
    """The embedding of Qwen3-VL has more rows than its tokenizer has tokens."""
    key = "model.language_model.embed_tokens.weight"
    padded = torch.cat([load_file(Path(tiny.base) / "model.safetensors")[key], torch.ones(30, 64)])
    text = json.loads((Path(tiny.base) / "config.json").read_text())["text_config"]
    settings = {"text_config": text | {"vocab_size": len(padded)}}
    folder = variant(tiny, tmp_path, weights={key: padded}, settings=settings)
    model = runtime.load_policy(folder)
    assert len(model.lm_head.weight) == len(tiny.tokenizer) + 30
    assert model.usable_vocabulary == len(tiny.tokenizer)
    assert runtime.make_sampler(model, ONE).usable_vocabulary == len(tiny.tokenizer)


def test_a_chat_template_in_its_older_place_is_read_and_handed_on(tiny, tmp_path):
    template = json.dumps({"chat_template": tiny.tokenizer.chat_template})
    older = {"chat_template__jinja": None, "chat_template__json": template}
    folder = variant(tiny, tmp_path, **older)
    assert stage("sft", *flags_of(tiny, tmp_path / "out", ckpt=folder, steps=1)) == 0
    for path in (folder, str(tmp_path / "out")):
        tokenizer, _ = runtime.load_tokenizer(path)
        assert tokenizer.chat_template == tiny.tokenizer.chat_template


@pytest.mark.parametrize("given, expected", [
    (None, []), ("gone", []), ("own", []), (0, [0]), ([0, "own"], [0]), (["own", 0, 5], [0, 5])
])  # fmt: skip
def test_every_eos_of_the_generation_config_ends_a_response(tiny, tmp_path, given, expected):
    """The tokenizer's own, which is the one that is trained, comes first."""
    own, folder = tiny.eos, variant(tiny, tmp_path)
    ids = [own if i == "own" else i for i in (given if isinstance(given, list) else [given])]
    ids = ids if isinstance(given, list) else ids[0]
    (Path(folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    if given == "gone":
        (Path(folder) / "generation_config.json").unlink()
    assert runtime.eos_ids(tiny.tokenizer, runtime.load_policy(folder)) == [own, *expected]


def test_weights_are_written_with_the_mode_of_any_file(tiny, tmp_path):
    before = os.umask(0o027)
    try:
        flags = {"ckpt": tiny.base, "data": tiny.align, "out": tmp_path / "out", "steps": 1}
        flags |= {"prompts": 1, "rollouts": 2, "max-new-tokens": 4}
        assert stage("align", *as_flags(flags)) == 0
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", tmp_path / "out" / "discriminator"):
        files = [path for path in folder.iterdir() if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def changed_model(tiny):
    model = set_attention(runtime.load_policy(tiny.base), "sdpa")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def test_saved_checkpoint_gives_bitwise_equal_logits(tiny, tmp_path):
    model, args = changed_model(tiny), argparse.Namespace(ckpt=tiny.base, lr=1e-5)
    runtime.save(model, str(tmp_path), ONE, "sft", args, 7, {"loss": 1.5})
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    inputs = stock_inputs(tiny.prompts[3], [20, 21, 22], model.config)
    before = changed_model(tiny)
    before.set_attn_implementation("sdpa")
    runtime.multiply_patches(again.model.visual)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, before(**inputs).logits)
        assert not torch.allclose(again(**inputs).logits, tiny.stock(**inputs).logits)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["stage"], meta["step"], meta["parent"]) == ("sft", 7, tiny.base)
    assert meta["metrics"] == {"loss": 1.5} and meta["args"]["lr"] == 1e-5
    tokenizer, image_processor = runtime.load_tokenizer(str(tmp_path))
    assert tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    assert tokenizer.chat_template == tiny.tokenizer.chat_template
    assert image_processor.to_dict() == tiny.image_processor.to_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_checkpoints_with_tied_and_untied_heads(tiny, tmp_path, tied):
    """Read from several shards, written, read again in bfloat16 as other tools do, with the files
    of the parent's processor."""
    plain = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    stock = AutoModelForImageTextToText.from_pretrained(tiny.base, **plain)
    if not tied:
        stock.config.tie_word_embeddings = stock.config.text_config.tie_word_embeddings = False
        stock.lm_head.weight = torch.nn.Parameter(torch.randn(stock.lm_head.weight.shape) * 0.1)
    parent, out = tmp_path / "parent", tmp_path / "out"
    stock.save_pretrained(parent, max_shard_size="200KB")
    assert len(list(parent.glob("*.safetensors"))) > 1
    processor = ["tokenizer.json", "tokenizer_config.json"]
    processor += ["preprocessor_config.json", "chat_template.jinja"]
    for name in processor:
        shutil.copy(Path(tiny.base) / name, parent)
    policy = set_attention(runtime.load_policy(str(parent)), "sdpa")
    assert (policy.lm_head.weight is policy.model.get_input_embeddings().weight) == tied
    prompt, ids = tiny.prompts[1], [20, 21, tiny.eos]
    expected = stock_logprobs(tiny, prompt, ids, stock)
    assert (branch_logprobs(policy, prompt, [ids])[0] - expected).abs().max() <= 1e-5
    runtime.save(policy, str(out), ONE, "sft", argparse.Namespace(ckpt=str(parent)), 1, {})
    assert all((out / name).read_bytes() == (parent / name).read_bytes() for name in processor)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny.tokenizer.get_vocab()
    half = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert (stock_logprobs(tiny, prompt, ids, half) - expected).abs().max() < 0.2
    again = AutoModelForImageTextToText.from_pretrained(out, **plain)
    assert torch.equal(stock_logprobs(tiny, prompt, ids, again), expected)


class Trap:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def poisoned(tiny, tmp_path, kind):
    """-> (a checkpoint folder that tries to run code, the file that the code would write)."""
    folder, sprung = Path(shutil.copytree(tiny.base, tmp_path / "stranger")), tmp_path / "sprung"
    if kind in ("bin", "index"):
        weights = folder / "model.safetensors"
        name = "pytorch_model.bin" if kind == "bin" else "weights.bin"
        if kind == "index":  # an index may name any file
            keys = load_file(weights)
            index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, name)}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.rename(folder / "other.safetensors")
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
        return folder, sprung
    (folder / "evil.py").write_text(f"open({str(sprung)!r}, 'w')\nclass Evil: pass\n")
    kinds = ["Config", "Model", "ModelForImageTextToText", "ImageProcessor"]
    auto_map = {f"Auto{name}": "evil.Evil" for name in kinds}
    auto_map["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        settings = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
        if kind == "unknown class":
            settings |= {"model_type": "evil", "tokenizer_class": "Evil"}
            settings |= {"image_processor_type": "Evil"}
        (folder / name).write_text(json.dumps(settings))
    return folder, sprung


@pytest.mark.parametrize("kind", ["bin", "index", "auto_map", "unknown class"])
def test_a_checkpoint_from_a_stranger_executes_nothing(tiny, tmp_path, kind):
    """Weights come from safetensors or not at all; code in the folder is not read."""
    folder, sprung = poisoned(tiny, tmp_path, kind)
    for load in (runtime.load_tokenizer, runtime.load_policy, load_discriminator):
        try:
            load(str(folder))
        except InputError as error:
            assert kind != "auto_map" and str(folder) in str(error)
        else:
            assert kind in ("auto_map", "unknown class") or load is runtime.load_tokenizer
    assert not sprung.exists()


def same_weights(left, right):
    """Whether two files of safetensors have equal names, types and bits."""
    left, right = load_file(left), load_file(right)
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.mark.parametrize("processes, dtype", [
    (None, "float32"), pytest.param(2, "float32", marks=pytest.mark.slow),
    pytest.param(2, "bf16", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_state_is_the_checkpoint_that_the_run_would_have_saved(
    tiny, policy, tmp_path, processes, dtype
):
    """Policy and discriminator, bitwise, with config, tokenizer and processor, for any tool; a run
    from one is a run from the other, and saving states changes no run."""

    def run(out, *flags):
        flags = [*game, "--dtype", dtype, "--out", out, *flags]
        run_stage("align", flags, processes)
        return untimed(read_jsonl(out / "metrics.jsonl"))

    game = ["--data", tiny.align, "--prompts", 2, "--rollouts", 2, "--max-new-tokens", 24]
    game += ["--lr", 1e-3, "--disc-lr", 1e-3, "--steps", 2]
    whole = tmp_path / "whole"
    log = run(whole, "--ckpt", policy, "--save-every", 1, "--keep", 2)
    assert run(tmp_path / "rarely", "--ckpt", policy, "--save-every", 0) == log
    for part in (".", "discriminator"):
        kept, state = content_of(whole / part), content_of(whole / "state.2" / part)
        names = {path.name for path in (whole / part).iterdir()}
        names = {name for name in names & kept.keys() if name.endswith((".json", ".jinja"))}
        names = names - {"meta.json"} | {"model.safetensors"}
        assert len(names) == 7
        assert all(kept[name] == state[name] for name in names)
        before = whole / "state.1" / part / "model.safetensors"
        assert not same_weights(before, whole / part / "model.safetensors")
    kind = {"float32": torch.float32, "bf16": torch.bfloat16}[dtype]
    half = AutoModelForImageTextToText.from_pretrained(whole / "state.2", dtype="auto")
    assert half.dtype == kind
    found = []
    for number, ckpt in enumerate((whole, whole / "state.2")):
        out = tmp_path / str(number)
        found.append(run(out, "--ckpt", ckpt, "--disc", ckpt / "discriminator"))
    assert found[0] == found[1]
    assert same_weights(tmp_path / "0" / "model.safetensors", tmp_path / "1" / "model.safetensors")
    states = [tmp_path / name / "state.2" for name in "01"]
    first, second = (runtime.read_json(state / "progress.json")["identity"] for state in states)
    assert first | {"out": second["out"]} == second


def test_a_state_has_a_card(tiny, tmp_path):
    """Licence and base model go from a state to what starts from it."""
    parent = Path(shutil.copytree(tiny.base, tmp_path / "parent"))
    (parent / "README.md").write_text("---\nlicense: mit\nbase_model: owner/name\n---\n")
    assert stage("sft", *flags_of(tiny, tmp_path / "one", ckpt=parent, steps=1)) == 0
    state = tmp_path / "one" / "state.1"
    assert stage("sft", *flags_of(tiny, tmp_path / "two", ckpt=state, steps=1)) == 0
    cards = [(folder / "README.md").read_text() for folder in (state, tmp_path / "two")]
    for card in cards:
        assert 'license: "mit"\nbase_model: "owner/name"\n' in card
    loss = read_jsonl(tmp_path / "one" / "metrics.jsonl")[0]["loss"]
    assert "# one\n\nStep 1 of stage `sft`" in cards[0] and f"| loss | `{loss}` |" in cards[0]


def test_an_edited_card_and_linked_folders_are_no_harm(tiny, tmp_path, capfd):
    """The state is whole; a licence set in OUT goes on to later states. --overwrite removes a link,
    not what it leads to."""
    flags = flags_of(tiny, tmp_path / "out", steps=2, save_every=1, keep=2)
    assert stage("sft", *flags) == 0
    for card in (tmp_path / "out" / "README.md", tmp_path / "out" / "state.2" / "README.md"):
        card.write_text(card.read_text().replace('"unknown"', "apache-2.0"))
    capfd.readouterr()
    assert stage("sft", *flags, "--steps", 3, "--resume") == 0
    assert "damaged" not in capfd.readouterr().out
    for card in (tmp_path / "out" / "README.md", tmp_path / "out" / "state.3" / "README.md"):
        assert 'license: "apache-2.0"' in card.read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    for name in ("pictures", "bad"):
        (tmp_path / "out" / name).symlink_to(elsewhere)
    assert stage("sft", *flags, "--overwrite") == 0
    assert (elsewhere / "kept").exists() and not (tmp_path / "out" / "bad").exists()


def test_a_state_of_the_warm_up_is_a_discriminator(tiny, policy, tmp_path):
    """The one that the run would have saved, for align.py --disc."""
    pair = {"question": "How many?", "teacher_caption": "1 red", "teacher_cot": "<think>a</think>"}
    pair |= {"student_caption": "2 red", "student_cot": "<think>b</think>", "answer": "odd"}
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair] * 4)
    flags = ["--pairs", pairs, "--ckpt", tiny.base, "--batch", 2, "--save-every", 1, "--lr", 1e-3]
    assert stage("discriminator", *flags, "--out", tmp_path / "disc") == 0
    whole, state = tmp_path / "disc", tmp_path / "disc" / "state.2"
    assert same_weights(whole / "model.safetensors", state / "model.safetensors")
    assert runtime.fingerprint(str(whole)) == runtime.fingerprint(str(state))
    game = ["--data", tiny.align, "--prompts", 1, "--rollouts", 2, "--max-new-tokens", 8]
    flags = ["--ckpt", policy, "--disc", state, "--out", tmp_path / "out", "--steps", 1, *game]
    assert stage("align", *flags) == 0


def test_every_script_takes_a_state(tiny, tmp_path, capfd):
    """eval.py and rollout.py say of a state what they say of the checkpoint; eval.py --resume knows
    it by its content. A folder of an unfinished run names its states."""
    whole = tmp_path / "whole"
    assert stage("sft", *flags_of(tiny, whole, steps=3)) == 0
    flags = ["--max-new-tokens", 8, "--prompt", "How many?"]
    said = []
    for ckpt in (whole, whole / "state.3"):
        capfd.readouterr()
        assert stage("rollout", "--ckpt", ckpt, *flags) == 0
        said.append(capfd.readouterr().out)
    assert said[0] == said[1]
    flags = ["--data", tiny.rl, "--max-new-tokens", 8, "--out", tmp_path / "eval"]
    assert stage("eval", "--ckpt", whole, whole / "state.3", *flags) == 0
    kept = [read_jsonl(path) for path in sorted((tmp_path / "eval").glob("*/rl.jsonl"))]
    assert len(kept) == 2 and kept[0] == kept[1]
    assert stage("eval", "--ckpt", whole, whole / "state.3", *flags, "--resume") == 0
    for name in ("config.json", "meta.json"):
        (whole / name).unlink()
    capfd.readouterr()
    assert stage("sft", *flags_of(tiny, tmp_path / "out", ckpt=whole)) == 2
    assert f"an unfinished run: give one of its states, such as {whole}/state.3" in one_line(capfd)


def test_the_discriminator_of_a_game_lies_inside(tiny, policy, tmp_path, capfd, monkeypatch):
    """What a game wrote is a policy, and as a backbone, with fresh experts, would do in silence."""
    monkeypatch.chdir(tmp_path)
    game = ["--data", tiny.align, "--prompts", 1, "--rollouts", 2, "--max-new-tokens", 8]
    assert stage("align", "--ckpt", policy, "--out", "whole", *game, "--steps", 1) == 0
    flags = ["--ckpt", policy, "--out", "out", *game, "--steps", 1, "--disc"]
    for path in ("whole", "whole/state.1"):
        capfd.readouterr()
        assert stage("align", *flags, path) == 2
        assert one_line(capfd).endswith(f"the policy, its discriminator is {path}/discriminator")
    shutil.rmtree("whole/discriminator")
    Path("whole/config.json").unlink()
    assert stage("align", *flags, "whole") == 2
    assert one_line(capfd).endswith("one of its states, such as whole/state.1/discriminator")
    assert stage("align", *flags, "whole/state.1/discriminator") == 0


OWN_TO_A_RUN = ("meta.json", "progress.json", "manifest.json")


@pytest.mark.parametrize("script", ["sft", "align"])
def test_a_parent_may_go_while_its_child_runs(tiny, policy, tmp_path, monkeypatch, script):
    """A run removes its older states, also one from which another run has started: what that one
    writes is what it writes otherwise."""
    import align

    sizes = {"sft": ["--batch", 4], "align": ["--prompts", 2, "--rollouts", 2]}[script]
    flags = ["--data", getattr(tiny, script), *sizes, "--steps", 2, "--save-every", 1, "--keep", 2]
    flags += ["--max-new-tokens", 8] if script == "align" else []
    assert stage(script, "--ckpt", policy, "--out", tmp_path / "whole", *flags) == 0
    parent = shutil.copytree(policy, tmp_path / "parent")

    def log(world, *given):
        shutil.rmtree(parent, ignore_errors=True)
        runtime.log(world, *given)

    monkeypatch.setattr({"sft": sft, "align": align}[script], "log", log)
    assert stage(script, "--ckpt", parent, "--out", tmp_path / "out", *flags) == 0
    assert not parent.exists()
    for file in (tmp_path / "whole").rglob("*"):
        if file.suffix in (".json", ".jinja", ".safetensors") and file.name not in OWN_TO_A_RUN:
            other = tmp_path / "out" / file.relative_to(tmp_path / "whole")
            assert other.read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("part", ["policy", "discriminator"])
def test_a_damaged_state_is_no_checkpoint(tiny, policy, tmp_path, capfd, monkeypatch, part):
    """Weights that are cut or gone are named by every script, those with other bytes by the scripts
    that look at all of them before they load them; nothing is written. A state without its shards
    is still a checkpoint."""
    monkeypatch.chdir(tmp_path)
    game = ["--data", tiny.align, "--prompts", 1, "--rollouts", 2, "--max-new-tokens", 8]
    assert stage("align", "--ckpt", policy, "--out", "whole", *game, "--steps", 1) == 0
    state = Path("whole") / "state.1"
    next(state.glob("*.distcp")).unlink()
    disc = state / "discriminator"
    file = (state if part == "policy" else disc) / "model.safetensors"
    whole, out = file.read_bytes(), tmp_path / "out"
    scripts = {
        "align": ["--ckpt", state, "--disc", disc, "--out", out, *game, "--steps", 1],
        "rollout": ["--ckpt", state, "--disc", disc, "--prompt", "x", "--max-new-tokens", 4],
    }
    if part == "policy":
        scripts["eval"] = ["--ckpt", state, "--data", tiny.rl, "--out", out]
    middle = len(whole) // 2
    changed = whole[:middle] + bytes(999) + whole[middle + 999 :]
    for content in (whole[:-1], None, changed):
        file.unlink() if content is None else file.write_bytes(content)
        for name in scripts:
            if name == "rollout" and content == changed:
                continue
            capfd.readouterr()
            assert stage(name, *scripts[name]) == 2
            line = one_line(capfd)
            assert f"{file.parent}: " in line and "weights" in line or file.name in line
            assert ("the state is damaged" in line) == (content == changed) and not out.exists()
    file.write_bytes(whole)
    manifest = (state / "manifest.json").read_text()
    (state / "manifest.json").write_text(manifest[:300])
    assert stage("align", *scripts["align"]) == 2
    assert f"{state}: the state is damaged (manifest.json): " in one_line(capfd).replace(
        f"{disc}: ", f"{state}: ")  # whichever is looked at first
    (state / "manifest.json").write_text(manifest)
    assert stage("align", *scripts["align"]) == stage("rollout", *scripts["rollout"]) == 0


@pytest.mark.parametrize("foreign", ["[1, 2]", '{"config.json": "sha256"}', "{"])
def test_a_manifest_of_somebody_else_says_nothing(tiny, tmp_path, foreign):
    """Other tools write files of that name, too."""
    ckpt = shutil.copytree(tiny.base, tmp_path / "ckpt")
    before = runtime.fingerprint(str(ckpt))
    (ckpt / "manifest.json").write_text(foreign)
    assert runtime.fingerprint(str(ckpt)) == before


# --------------------------------------------------------------------------------------------- logs
LOGGING = replace(ONE, bar=tqdm(total=5, disable=True))


def test_a_terminal_gets_a_bar_and_a_file_lines(tiny, tmp_path, capfd):
    """Both say how much is left."""
    flags = ["--ckpt", tiny.base, "--data", tiny.sft, "--batch", 2, "--steps", 3]
    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 120))
    command = [sys.executable, ROOT / "sft.py", *flags, "--out", tmp_path / "bar"]
    ran = subprocess.run(map(str, command), stdout=subprocess.PIPE, stderr=side, text=True)
    os.close(side)
    shown = b""
    with suppress(OSError):  # the other side is closed
        while part := os.read(terminal, 2**16):
            shown += part
    os.close(terminal)
    shown = shown.decode()
    assert re.search(r"3/3 \[\d\d:\d\d<00:00, .*loss=\d", shown) and "step 3" not in ran.stdout
    assert stage("sft", *flags, "--out", tmp_path / "lines") == 0
    found = re.findall(r"^step (\d)  loss .*  (\d\d:\d\d) left$", capfd.readouterr().out, re.M)
    assert [step for step, _ in found] == ["1", "2", "3"] and found[-1][1] == "00:00"


def test_resume_drops_the_log_of_steps_that_are_repeated(tmp_path):
    for step in range(1, 6):
        runtime.log(LOGGING, str(tmp_path), {"step": step, "loss": 0.5, "grad_norm": None})
    runtime.cut_logs(str(tmp_path), 3)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": step, "loss": 0.5} for step in (1, 2, 3)
    ]
    runtime.cut_logs(str(tmp_path), 0)
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_half_a_line_in_the_log_is_dropped(tmp_path):
    for step in (1, 2, 3):
        runtime.log(LOGGING, str(tmp_path), {"step": step, "loss": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert runtime.cut_logs(str(tmp_path), 2) == {"step": 2, "loss": 0.5}
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_half_a_surrogate_does_not_break_a_log(tmp_path):
    rows = [{"step": 1, "text": "\ud83d \u00e9 \U0001f600"}]
    runtime.write_rows(str(tmp_path / "rollouts.jsonl"), rows)
    assert read_jsonl(tmp_path / "rollouts.jsonl") == rows
    assert "\u00e9 \U0001f600" in (tmp_path / "rollouts.jsonl").read_text()
    runtime.append_rows(str(tmp_path / "rollouts.jsonl"), rows)
    runtime.cut_logs(str(tmp_path), 1)
    assert read_jsonl(tmp_path / "rollouts.jsonl") == rows * 2


# ------------------------------------------------------------------------------------------- states
def test_state_restores_model_and_optimizer(tiny, tmp_path):
    model = changed_model(tiny)
    optimizer = runtime.make_optimizer(model, 1e-3, 0.01)
    flags = argparse.Namespace(max_prompt=512, max_length=1024)
    tools, examples = (tiny.tokenizer, tiny.image_processor), load_examples(tiny.sft)
    batch = [sft.encode_demonstration(examples[i], *tools, "", flags)[0] for i in range(2)]

    def step(model, optimizer):
        sft.accumulate_gradient(model, batch, argparse.Namespace(max_tokens=10**6), ONE)
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    progress = {"step": 1, "position": 2}
    runtime.save_state(str(tmp_path), ONE, {"policy": (model, optimizer)}, progress)
    fresh = set_attention(runtime.load_policy(tiny.base), "sdpa")
    fresh_optimizer = runtime.make_optimizer(fresh, 1e-3, 0.01)
    (state,) = runtime.find_states(tmp_path)
    assert runtime.read_json(Path(state) / "progress.json") == progress
    runtime.load_state(state, ONE, {"policy": (fresh, fresh_optimizer)})
    step(model, optimizer)
    step(fresh, fresh_optimizer)
    for left, right in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(left, right)
    assert os.listdir(tmp_path) == ["state.1"]  # nothing of the writing is left


def test_keep(tiny, tmp_path):
    """--keep 2: the newest state and the one before it; one goes back by deleting the newer."""

    def flags(steps):
        return flags_of(tiny, tmp_path / "out", steps=steps, save_every=1, keep=2)

    assert stage("sft", *flags(4)) == 0
    states = (tmp_path / "out").glob("state*")
    steps = {path.name: runtime.read_json(path / "progress.json")["step"] for path in states}
    assert steps == {"state.4": 4, "state.3": 3}
    whole = untimed(read_jsonl(tmp_path / "out" / "metrics.jsonl"))
    shutil.rmtree(tmp_path / "out" / "state.4")
    assert stage("sft", *flags(4), "--resume") == 0
    assert untimed(read_jsonl(tmp_path / "out" / "metrics.jsonl")) == whole
    assert stage("sft", *flags(1), "--overwrite") == 0  # takes the states of the other run away
    assert [path.name for path in (tmp_path / "out").glob("state*")] == ["state.1"]
    assert stage("sft", *flags_of(tiny, tmp_path / "out", keep=0)) == 2


def test_only_whole_states_are_found(tmp_path):
    """Newest first, by number and not by letters; what a killed save or a person left there is
    none."""
    assert runtime.find_states(tmp_path / "nowhere") == []
    others = ["state.new", "state.12.old", "state.bak", "state", "metrics.jsonl", "state.x1"]
    for name in ("state.9", "state.100", *others):
        (tmp_path / name).mkdir()
    assert [Path(path).name for path in runtime.find_states(tmp_path)] == ["state.100", "state.9"]


def corrupt(state, rng):
    """Zero a block of a file of a state, cut the file, or take it away -> what was done."""
    path = state / str(rng.choice(sorted(os.listdir(state))))
    content, kind = path.read_bytes(), str(rng.choice(["zeroed", "cut", "gone"]))
    at = int(rng.integers(len(content)))
    if kind == "zeroed":
        block = min(int(rng.choice([1, 16, 4096])), len(content) - at)
        path.write_bytes(content[:at] + bytes(block) + content[at + block :])
    elif kind == "cut":
        path.write_bytes(content[:at])
    else:
        path.unlink()
    return path.name, kind, content != (path.read_bytes() if path.exists() else None)


def test_a_damaged_state_never_changes_the_result(tiny, tmp_path, capfd):
    """20 random corruptions of the newest state: it is named, the one before is taken, and the run
    ends where an unbroken one does, bitwise."""
    rng, seen = np.random.default_rng(0), set()
    flags = flags_of(tiny, tmp_path / "run", save_every=1, keep=2)
    assert stage("sft", *flags, "--steps", 2) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "begun")
    assert stage("sft", *flags, "--steps", 3, "--resume") == 0
    expected = load_file(tmp_path / "run" / "model.safetensors")
    log = untimed(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    for _ in range(20):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "begun", tmp_path / "run")
        name, kind, changed = corrupt(tmp_path / "run" / "state.2", rng)
        seen.add((name, kind))
        capfd.readouterr()
        assert stage("sft", *flags, "--steps", 3, "--resume") == 0, (name, kind)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        damage = f"state.2 is damaged ({name}): going back to {tmp_path}/run/state.1\n"
        changed = changed and name not in ("README.md", "meta.json")  # which anybody may edit
        assert (damage in captured.out) == changed, (name, kind)
        assert names(runtime.find_states(tmp_path / "run")) == ["state.3", "state.2"]
        assert untimed(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == log
        weights = load_file(tmp_path / "run" / "model.safetensors")
        assert all(torch.equal(weights[key], expected[key]) for key in weights | expected)
    assert len(seen) > 6 and len({kind for _, kind in seen}) == 3


def test_without_a_whole_state_the_run_ends_in_one_line(tiny, tmp_path, capfd):
    flags = flags_of(tiny, tmp_path / "out", steps=2, save_every=1, keep=2)
    assert stage("sft", *flags) == 0
    (tmp_path / "out" / "state.2" / ".metadata").unlink()
    (tmp_path / "out" / "state.1" / "manifest.json").write_text("{}")
    before = content_of(tmp_path / "out")
    capfd.readouterr()
    assert stage("sft", *flags, "--resume") == 2
    words = r"state.2 is damaged \(.metadata\); .*state.1 is damaged \(manifest.json\): no whole"
    assert re.search(f"{words} state", one_line(capfd)) and content_of(tmp_path / "out") == before


def test_a_killed_run_resumes_bitwise(tiny, tmp_path):
    def flags(out):
        return flags_of(tiny, tmp_path / out, batch=8, steps=6, save_every=2)

    assert stage("sft", *flags("whole")) == 0
    process = launch("sft.py", *flags("killed"), background=True)
    while not runtime.find_states(tmp_path / "killed") and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "meta.json").exists()  # it was killed before it had finished
    assert stage("sft", *flags("killed"), "--resume") == 0
    outs = [tmp_path / name for name in ("whole", "killed")]
    whole, killed = (untimed(read_jsonl(out / "metrics.jsonl")) for out in outs)
    assert whole == killed and [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    assert same_weights(*(out / "model.safetensors" for out in outs))


def test_saving_and_loading_a_state_is_silent(tiny, tmp_path):
    flags = flags_of(tiny, tmp_path / "out")
    assert stage("sft", *flags, "--steps", 1) == 0
    result = launch("sft.py", *flags, "--steps", 2, "--resume")
    assert (result.returncode, result.stderr) == (0, "")


# -------------------------------------------------------------------------------------------- a run
def test_an_unfinished_run_is_not_overwritten(tiny, tmp_path, capfd):
    flags = flags_of(tiny, tmp_path / "out", steps=2)
    assert stage("sft", *flags) == 0
    (tmp_path / "out" / "meta.json").unlink()  # as if killed just before
    log = (tmp_path / "out" / "metrics.jsonl").read_text()
    capfd.readouterr()
    assert stage("sft", *flags) == 2
    assert "holds an unfinished run: add --resume" in capfd.readouterr().err
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == log
    # nothing is left to do but to write the checkpoint
    assert stage("sft", *flags, "--resume") == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["metrics"] == read_jsonl(tmp_path / "out" / "metrics.jsonl")[-1]


def test_a_finished_run_is_not_wiped_without_a_word(tiny, tmp_path, capfd):
    flags = flags_of(tiny, tmp_path / "out", steps=1)
    assert stage("sft", *flags) == 0
    before = content_of(tmp_path / "out")
    capfd.readouterr()
    assert stage("sft", *flags) == 2
    assert "holds a finished run: add --resume" in one_line(capfd)
    assert content_of(tmp_path / "out") == before
    folder = shutil.copytree(tiny.base, tmp_path / "base")  # somebody's checkpoint, made elsewhere
    assert stage("sft", *flags_of(tiny, folder, steps=1)) == 2
    assert "base holds a checkpoint: add" in one_line(capfd)
    assert content_of(folder) == content_of(tiny.base)
    assert stage("sft", *flags, "--overwrite", "--resume") == 2
    assert "--resume" in one_line(capfd)
    assert stage("sft", *flags, "--overwrite") == 0


def test_a_content_has_the_same_fingerprint_wherever_it_lies(tiny, tmp_path):
    first = runtime.fingerprint(tiny.base)
    folder = Path(shutil.copytree(tiny.base, tmp_path / "moved"))
    for name in ("meta.json", "metrics.jsonl", "state.3"):
        (folder / name).write_text("x")
    assert runtime.fingerprint(str(folder)) == first
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b" ")
        assert runtime.fingerprint(str(folder)) != first, name
        (folder / name).write_bytes(content)
    assert runtime.fingerprint(str(folder)) == first
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text("{}\n")
    shutil.copy(one, two)
    assert runtime.fingerprint(str(one)) == runtime.fingerprint(str(two)) != first


def test_a_change_in_the_middle_of_a_large_file_changes_its_fingerprint(tmp_path):
    content = bytearray(5 << 20)
    (tmp_path / "a").write_bytes(content)
    before = runtime.fingerprint(str(tmp_path / "a"))
    content[len(content) // 2] = 1
    (tmp_path / "a").write_bytes(content)
    assert runtime.fingerprint(str(tmp_path / "a")) != before


def test_the_content_of_a_run_is_read_once(tiny, policy, tmp_path, monkeypatch):
    """Whatever its flags name: the checkpoint, here that of the discriminator too, and the data."""
    read, checksum = [], runtime.checksum
    monkeypatch.setattr(runtime, "checksum", lambda path: read.append(path) or checksum(path))
    flags = {"ckpt": policy, "disc": policy, "data": tiny.align, "out": tmp_path / "out"}
    flags |= {"prompts": 1, "rollouts": 2, "max-new-tokens": 4, "steps": 1}
    assert stage("align", *as_flags(flags)) == 0
    inputs = [path for path in read if not path.startswith(str(tmp_path / "out"))]
    assert len(inputs) == len(set(inputs))
    assert {tiny.align, f"{policy}/model.safetensors", f"{policy}/config.json"} <= set(inputs)


OTHER = {  # what differs from the run that made the state: flags, words of the line
    "seed": ({"seed": 6}, "--seed 5, not 6"),
    "batch": ({"batch": 8}, "--batch 4, not 8"),
    "learning rate": ({"lr": 1e-4}, "--lr 0.001, not 0.0001"),
    "two of them": ({"lr": 1e-4, "clip": 2}, "--clip 1.0, not 2.0; --lr 0.001, not 0.0001"),
    "length": ({"max_length": 99}, "--max-length 8192, not 99"),
    "weight decay": ({"weight_decay": 0}, "--weight-decay 0.01, not 0.0"),
}


def begun(tiny, tmp_path):
    """-> flags of a run of two steps that was done, and the content of its folder."""
    flags = {"ckpt": shutil.copytree(tiny.base, tmp_path / "ck"), "save_every": 1, "steps": 2}
    assert stage("sft", *flags_of(tiny, tmp_path / "out", **flags)) == 0
    return flags, content_of(tmp_path / "out")


@pytest.mark.parametrize("name", [*OTHER, "checkpoint", "data", "system prompt"])
def test_resume_of_another_run_is_refused_and_changes_nothing(
    tiny, tmp_path, capfd, monkeypatch, name
):
    flags, before = begun(tiny, tmp_path)
    more, words = OTHER.get(name, ({}, ""))
    if name == "checkpoint":
        tensors = load_file(tmp_path / "ck" / "model.safetensors")
        tensors["model.visual.pos_embed.weight"][0, 0] += 1
        save_file(tensors, tmp_path / "ck" / "model.safetensors", {"format": "pt"})
        words = "--ckpt .*content .*, not .*content "
    elif name == "data":
        more, words = {"data": tiny.align}, "--data .*content .*, not .*content "
    elif name == "system prompt":
        (tmp_path / "system.txt").write_text("Think.")
        more, words = {"system_prompt": tmp_path / "system.txt"}, "--system-prompt "
    capfd.readouterr()
    monkeypatch.setattr(sft, "load_policy", None)  # it is refused before a model is loaded
    more = flags | more | {"steps": 4}
    assert stage("sft", *flags_of(tiny, tmp_path / "out", **more), "--resume") == 2
    line = one_line(capfd)
    assert re.search(f"--resume: the state was made with {words}.* --max-tokens .*may differ", line)
    assert content_of(tmp_path / "out") == before


def test_what_changes_no_number_may_differ(tiny, tmp_path):
    """More steps, other saves, another place of folder, checkpoint and data of equal content."""
    flags, _ = begun(tiny, tmp_path)
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "ck").rename(tmp_path / "base")
    folder = shutil.copytree(tiny.folder, tmp_path / "data")
    more = {"ckpt": tmp_path / "base", "data": Path(folder) / "sft.jsonl", "max_tokens": 99}
    more |= {"keep": 2, "save_every": 3, "attn": "sdpa", "steps": 4}
    assert stage("sft", *flags_of(tiny, tmp_path / "moved", **flags | more), "--resume") == 0
    assert len(read_jsonl(tmp_path / "moved" / "metrics.jsonl")) == 4


@pytest.mark.parametrize("steps, words", [(2, ""), (4, "--steps was 2, is 4: .*cosine of 4 steps")])
def test_other_steps_say_what_they_do_to_the_learning_rate(tiny, tmp_path, capfd, steps, words):
    flags, _ = begun(tiny, tmp_path)
    capfd.readouterr()
    more = flags | {"steps": steps}
    assert stage("sft", *flags_of(tiny, tmp_path / "out", **more), "--resume") == 0
    said = [line for line in capfd.readouterr().out.splitlines() if "cosine" in line]
    assert len(said) == (steps != 2) and all(re.match(words, line) for line in said)
    lrs = [row["lr"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")]
    assert lrs[2:] == [runtime.cosine(step, steps, 1e-3, 0.1) for step in range(2, steps)]


def test_a_stage_does_not_resume_another(tiny, policy, tmp_path, capfd):
    small = ["--prompts", 1, "--rollouts", 2, "--max-new-tokens", 4, "--steps", 1, "--ckpt", policy]
    assert stage("align", *small, "--data", tiny.align, "--out", tmp_path) == 0
    before = content_of(tmp_path)
    capfd.readouterr()
    assert stage("rl", *small, "--data", tiny.rl, "--out", tmp_path, "--resume") == 2
    assert "--resume: the state was made with stage align, not rl" in one_line(capfd)
    assert content_of(tmp_path) == before


def explode(monkeypatch, *steps):
    """The loss of these calls of sft.accumulate_gradient is not finite."""
    update, calls = sft.accumulate_gradient, []

    def broken(*args):
        calls.append(1)
        loss, tokens = update(*args)
        return (math.nan if len(calls) in steps else loss), tokens

    monkeypatch.setattr(sft, "accumulate_gradient", broken)


def test_a_state_is_left_when_nothing_is_finite(tiny, tmp_path, capfd, monkeypatch):
    """Three updates are tried on every rank, then one clear line. No state is saved while updates
    are skipped: the newest is from before the first of them."""
    flags = flags_of(tiny, tmp_path / "out", steps=9, save_every=2, keep=9)
    explode(monkeypatch, 4, 5, 6)
    assert stage("sft", *flags) == 2
    captured, out = capfd.readouterr(), tmp_path / "out"
    assert captured.err.count("not finite in 3 updates in a row, the last in step 6") == 1
    assert len(captured.err.splitlines()) == 1
    named = re.findall(r"step (\d): update skipped", captured.out)
    assert named == ["4", "5", "6"]
    skipped = [row["skipped_steps"] for row in read_jsonl(out / "metrics.jsonl")]
    assert skipped == [0, 0, 0, 1, 2, 3]

    def skips(state):
        return runtime.read_json(out / state / "progress.json")["skips"]

    assert names(runtime.find_states(out)) == ["state.2"]
    assert skips("state.2") == [[0, 0]] and skips("bad/state.6") == [[3, 3]]
    monkeypatch.undo()
    explode(monkeypatch, 2, 3, 6)  # steps 4, 5 and 8: what was due in step 4 is saved after step 6
    assert stage("sft", *flags, "--resume") == 0
    assert names(runtime.find_states(out)) == ["state.9", "state.6", "state.2"]
    assert skips("state.9") == [[0, 3]] and not (out / "bad").exists()


# ------------------------------------------------------------------------------------------ folders
def test_overwrite_leaves_nothing_of_the_run_before(tiny, tmp_path, capfd):
    """Its rollouts, pictures, bad rows and discriminator would pass for the new run's. Without it
    a folder with a README of somebody's is refused."""
    out = tmp_path / "out"
    flags = ["--ckpt", tiny.base, "--data", tiny.sft, "--batch", 4, "--steps", 1, "--out", out]
    out.mkdir()
    (out / "README.md").write_text("my own words")
    (out / "mine.jsonl").write_text("")
    assert stage("sft", *flags) == 2 and "holds a README.md" in capfd.readouterr().err
    for name in ("rollouts.jsonl", "skipped.jsonl"):
        (out / name).write_text('{"step": 0}\n')
    for name in ("curves.png", "rollouts.html"):
        (out / name).write_text("old")
    for name in ("pictures", "discriminator"):
        (out / name).mkdir()
    assert stage("sft", *flags, "--overwrite") == 0
    left = {path.name for path in out.iterdir()}
    gone = {"rollouts.jsonl", "skipped.jsonl", "curves.png", "rollouts.html", "pictures"}
    assert not left & (gone | {"discriminator"}) and "mine.jsonl" in left
    assert "my own words" not in (out / "README.md").read_text()


def test_a_damaged_log_is_named_and_nothing_is_lost(tiny, tmp_path, capfd):
    out = tmp_path / "out"
    flags = ["--ckpt", tiny.base, "--data", tiny.sft, "--batch", 4, "--out", out]
    assert stage("sft", *flags, "--steps", 1) == 0
    log = out / "metrics.jsonl"
    log.write_text("garbage\n" + log.read_text())
    before = content_of(out)
    assert stage("sft", *flags, "--steps", 2, "--resume") == 2
    assert "metrics.jsonl is damaged" in capfd.readouterr().err and content_of(out) == before
    assert stage("sft", *flags, "--steps", 1, "--overwrite") == 0


def test_a_flag_for_several_values_is_given_once(tiny, tmp_path, capfd):
    flags = ["--ckpt", tiny.base, "--data", tiny.sft, "--data", tiny.sft, "--out", tmp_path / "o"]
    assert stage("sft", *flags) == 2 and "--data was given twice" in capfd.readouterr().err
