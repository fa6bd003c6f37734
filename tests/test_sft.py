"""Run: pytest tests/test_sft.py          (schedule, data order, loss, save and resume, skipped steps; CPU only)"""

import argparse
import json
import math
import os
import shutil
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ONE, assert_same_grads, branch_logprobs, grads, launch, read_jsonl, stage
from conftest import stock_inputs, stock_logprobs, untimed, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import runtime
from rows import set_attention, target_logprobs
from data import Feed, load_examples, look, mixed_order, order
import rollout
import sft
from discriminator import load_discriminator
from runtime import InputError

# ---------------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("total, warmup", [(10, 0.1), (100, 0.1), (7, 0.0), (1, 0.1), (20, 0.5), (3, 1.0)])
def test_cosine(total, warmup):
    ramp = max(1, round(total * warmup))
    got = [runtime.cosine(step, total, 2.0, warmup) for step in range(total)]
    rising = [2.0 * (step + 1) / ramp for step in range(min(ramp, total))]
    falling = [1 + math.cos(math.pi * i / (total - ramp)) for i in range(total - ramp)]
    assert got == pytest.approx(rising + falling)
    assert max(got) == pytest.approx(2.0) and min(got) > 0


# -------------------------------------------------------------------------------------------------------------- data order
def take(n, count, steps, out, lost=(), position=0, seed=3, **more):
    """n rows of a file, those in `lost` cannot be decoded -> batches, the feed after them."""
    path = write_jsonl(out / "numbers.jsonl", [{"id": str(i), "prompt": "x"} for i in range(n)])
    flags = {"out": str(out), "seed": seed, "bad_rows": "skip", "max_bad": 1.0, "split": None}
    args = argparse.Namespace(**flags, resume=False, **more)
    found, batches = look(path, lambda example: (int(example.id) + 1, 1), args, ONE), []
    assert found.prompt.tolist() == list(range(1, n + 1)) and found.response.tolist() == [1] * n

    def encode(example):
        if int(example.id) in lost:
            raise ValueError("cut off")
        return f"row {example.id}"

    feed = Feed(found, encode, args, ONE, {"position": position})
    for step in range(steps):
        drawn = feed.draw(count, step)
        assert [item.encoded for item in drawn] == [f"row {item.index}" for item in drawn]
        batches.append([item.index for item in drawn])
    return batches, feed


@pytest.mark.parametrize("seed", range(20))
def test_ranks_share_work_by_length(seed):
    """Consecutive slices that cover all pieces, none empty, each off the mean by no more than the pieces at its ends."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 9))
    lengths = rng.integers(1, 100, int(rng.integers(size, 40))).tolist() + [1000] * (seed % 2)
    slices = [runtime.World(rank, size, None).share(lengths) for rank in range(size)]
    assert [i for part in slices for i in part] == list(range(len(lengths))) and all(slices)
    if seed % 2 == 0 and len(lengths) > 3 * size:
        assert all(abs(sum(lengths[i] for i in part) - sum(lengths) / size) <= max(lengths) for part in slices)
    equal = [runtime.World(rank, size, None).share([1] * 3 * size) for rank in range(size)]
    assert equal == [range(3 * rank, 3 * rank + 3) for rank in range(size)]


def test_draw_covers_every_row_once_an_epoch(tmp_path):
    batches, feed = take(12, 5, 12, tmp_path)  # five epochs, batches that cross their borders
    flat = [i for batch in batches for i in batch]
    epochs = [flat[at : at + 12] for at in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and len(set(map(tuple, epochs))) == 5
    assert feed.progress() == {"position": 60, "lost": []} and feed.bad == feed.dropped == 0
    assert take(12, 5, 12, tmp_path)[0] == batches
    assert take(12, 5, 12, tmp_path, seed=4)[0] != batches
    assert take(12, 5, 2, tmp_path, position=25)[0] == batches[5:7]  # as after --resume


def test_a_picture_that_cannot_be_decoded_leaves_its_batch(tmp_path):
    """It is counted and named once, however many epochs; the other batches stay as they were."""
    whole, _ = take(12, 4, 6, tmp_path)
    batches, feed = take(12, 4, 6, tmp_path, lost=(2, 7))
    assert batches == [[i for i in batch if i not in (2, 7)] for batch in whole]
    assert feed.bad == 2 and feed.progress() == {"position": 24, "lost": [2, 7]}
    skipped = read_jsonl(tmp_path / "skipped.jsonl")
    assert sorted(line["row"] for line in skipped) == [3, 8] and all("cut off" in line["reason"] for line in skipped)
    steps = [next(s for s, batch in enumerate(whole, 1) if line["row"] - 1 in batch) for line in skipped]
    assert steps == [line["step"] for line in skipped]


def test_nothing_that_can_be_decoded_ends_the_run(tmp_path):
    with pytest.raises(InputError, match="12 of 12 rows cannot be used"):
        take(12, 4, 6, tmp_path, lost=range(12))


def test_sources_are_drawn_by_weight(tmp_path):
    """Whatever their sizes; each source in epochs of its own, and from any position as from the start."""
    whole = list(islice(mixed_order([(0, 40, 3.0), (40, 7, 1.0)], 0, 5), 4000))
    small = [i for i in whole if i >= 40]
    assert 0.22 < len(small) / 4000 < 0.28 and len(whole) == 4000
    for part, n, first in ((small, 7, 40), ([i for i in whole if i < 40], 40, 0)):
        assert part == [first + i for i in islice(order(n, 0, 5), len(part))]
    for start in (1, 1023, 1024, 2500):
        assert list(islice(mixed_order([(0, 40, 3.0), (40, 7, 1.0)], start, 5), 50)) == whole[start : start + 50]


# -------------------------------------------------------------------------------------------------------------------- loss
def demonstrations(tiny, count):
    args = argparse.Namespace(max_prompt=512, max_length=1024)
    examples = load_examples(tiny.sft)
    return [sft.encode_demonstration(examples[i], tiny.tokenizer, tiny.image_processor, "", args) for i in range(count)]


def test_loss_is_the_token_mean_whatever_the_split(tiny):
    batch = demonstrations(tiny, 6)
    assert all(ids[-1] == tiny.eos for _, ids in batch)  # the EOS is trained
    tiny.stock.zero_grad()
    total = sum(len(ids) for _, ids in batch)
    expected = -sum(stock_logprobs(tiny, prompt, ids).sum() for prompt, ids in batch) / total
    expected.backward()
    for max_tokens in (10**6, 200, 1):
        tiny.model.zero_grad()
        loss, tokens = sft.accumulate_gradient(tiny.model, batch, argparse.Namespace(max_tokens=max_tokens), ONE)
        assert tokens == total and loss == pytest.approx(expected.item(), abs=1e-5)
        assert_same_grads(grads(tiny.model), grads(tiny.stock))


def test_long_demonstrations_are_dropped_or_cut_when_asked(tiny):
    example = load_examples(tiny.sft)[0]
    flags = lambda limit, cut: argparse.Namespace(max_prompt=512, max_length=limit, truncate=cut)
    tools = tiny.tokenizer, tiny.image_processor
    encode = lambda limit, cut=False: sft.encode_demonstration(example, *tools, "", flags(limit, cut))
    prompt, ids = encode(1024)
    fits = len(prompt.input_ids) + len(ids)
    assert encode(fits)[1] == encode(fits, True)[1] == ids
    assert encode(fits - 1) is None and encode(fits - 1, True)[1] == ids[:-1]
    assert encode(len(prompt.input_ids) + 1, True)[1] == ids[:1] and encode(len(prompt.input_ids), True) is None


@pytest.mark.parametrize("load", [runtime.load_policy, load_discriminator])
def test_checkpointing_recomputes_activations(tiny, load):
    """from_pretrained leaves a model in eval mode, in which transformers silently keeps all activations."""
    runs = {}
    for checkpointing in (False, True):
        model = runtime.shard(load(tiny.base), [], ONE, target_logprobs, checkpointing=checkpointing)
        backbone, calls = getattr(model, "backbone", None) or model.model, []
        backbone.language_model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
        if hasattr(model, "heads"):
            d_v, d_r = model.scores([tiny.prompts[1]], [(0, [20, tiny.eos])], [(0, [21, tiny.eos])])
            (d_v.sum() + d_r.sum()).backward()
        else:
            set_attention(model, "sdpa")
            branch_logprobs(model, tiny.prompts[1], [[20, tiny.eos]])[0].sum().backward()
        runs[checkpointing] = len(calls)
    assert runs == {False: 1, True: 2}


def test_checkpointing_leaves_sampling_alone(tiny):
    """Under checkpointing transformers drops the cache of a model in train mode; sampling needs it."""
    model = runtime.shard(set_attention(runtime.load_policy(tiny.base), "sdpa"), [], ONE, target_logprobs, checkpointing=True)
    draw = lambda model: [r.ids for r in rollout.sample(model, [tiny.prompts[1]], 3, max_new_tokens=6, eos_id=tiny.eos)[0]]
    assert draw(model.train()) == draw(tiny.model)
    assert model.training  # and what follows is recomputed as before


# ---------------------------------------------------------------------------------------------------------- save and resume
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
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, before(**inputs).logits)
        assert not torch.allclose(again(**inputs).logits, tiny.stock(**inputs).logits)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["stage"], meta["step"], meta["parent"], meta["metrics"]) == ("sft", 7, tiny.base, {"loss": 1.5})
    assert meta["args"]["lr"] == 1e-5
    tokenizer, image_processor = runtime.load_tokenizer(str(tmp_path))
    assert tokenizer.get_vocab() == tiny.tokenizer.get_vocab() and tokenizer.chat_template == tiny.tokenizer.chat_template
    assert image_processor.to_dict() == tiny.image_processor.to_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_checkpoints_with_tied_and_untied_heads(tiny, tmp_path, tied):
    """Read from several shards, written, read again in bfloat16 as other tools do, with the parent's processor files."""
    stock = AutoModelForImageTextToText.from_pretrained(tiny.base, dtype=torch.float32, attn_implementation="sdpa")
    if not tied:
        stock.config.tie_word_embeddings = stock.config.text_config.tie_word_embeddings = False
        stock.lm_head.weight = torch.nn.Parameter(torch.randn(stock.lm_head.weight.shape) * 0.1)
    parent, out = tmp_path / "parent", tmp_path / "out"
    stock.save_pretrained(parent, max_shard_size="200KB")
    assert len(list(parent.glob("*.safetensors"))) > 1
    processor = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja")
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
    assert half.dtype == torch.bfloat16 and (stock_logprobs(tiny, prompt, ids, half) - expected).abs().max() < 0.2
    again = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, attn_implementation="sdpa")
    assert torch.equal(stock_logprobs(tiny, prompt, ids, again), expected)


def test_state_restores_model_and_optimizer(tiny, tmp_path):
    model = changed_model(tiny)
    optimizer = runtime.make_optimizer(model, 1e-3, 0.01)
    batch = demonstrations(tiny, 2)

    def step(model, optimizer):
        sft.accumulate_gradient(model, batch, argparse.Namespace(max_tokens=10**6), ONE)
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    runtime.save_state(str(tmp_path), ONE, {"policy": (model, optimizer)}, {"step": 1, "position": 2})
    fresh = set_attention(runtime.load_policy(tiny.base), "sdpa")
    fresh_optimizer = runtime.make_optimizer(fresh, 1e-3, 0.01)
    assert runtime.resume(str(tmp_path), ONE, {"policy": (fresh, fresh_optimizer)}) == {"step": 1, "position": 2}
    step(model, optimizer)
    step(fresh, fresh_optimizer)
    for left, right in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(left, right)
    assert os.listdir(tmp_path) == ["state"]  # nothing of the writing is left


def test_a_killed_run_resumes_bitwise(tiny, tmp_path):
    flags = ["--ckpt", tiny.base, "--data", tiny.sft, "--batch", 8, "--steps", 6, "--save-every", 2, "--lr", 1e-3]
    assert stage("sft", *flags, "--out", tmp_path / "whole") == 0
    process = launch("sft.py", *flags, "--out", tmp_path / "killed", background=True)
    while not (tmp_path / "killed" / "state").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "meta.json").exists()  # it was killed before it had finished
    assert stage("sft", *flags, "--out", tmp_path / "killed", "--resume") == 0
    whole, killed = (untimed(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in ("whole", "killed"))
    assert whole == killed and [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0] | weights[1])


def test_resume_drops_the_log_of_steps_that_are_repeated(tmp_path):
    for step in range(1, 6):
        runtime.log(ONE, str(tmp_path), {"step": step, "loss": 0.5, "grad_norm": None})
    runtime.start_log(ONE, str(tmp_path), 3)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": step, "loss": 0.5} for step in (1, 2, 3)]
    runtime.start_log(ONE, str(tmp_path), 0)
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


# ------------------------------------------------------------------------------------------------------------ skipped steps
def test_steps_that_are_not_finite_are_skipped():
    model = torch.nn.Linear(2, 1)
    optimizer, skips = runtime.make_optimizer(model, 0.1, 0.0), runtime.Skips()

    def step(scale, loss=0.0):
        before = model.weight.detach().clone()
        (model(torch.ones(1, 2)) * scale).sum().backward()
        norm = skips.step(model, optimizer, 0.1, 1.0, ONE, loss)
        assert all(p.grad is None for p in model.parameters())
        return norm, torch.equal(before, model.weight)

    assert step(2.0) == (pytest.approx(math.sqrt(12)), False)  # the norm before clipping; a step was made
    assert step(math.nan) == (None, True)
    assert step(math.inf) == (None, True)
    assert step(2.0)[1] is False  # two in a row, then a good one: the count starts again
    assert step(2.0, loss=math.nan) == (None, True)
    assert step(math.nan) == (None, True)
    assert step(math.nan) == (None, True)
    assert (skips.row, skips.total) == (3, 5) and all(p.isfinite().all() for p in model.parameters())


# -------------------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("name, message", [
    ("Qwen/Qwen3-VL-4B-Instruct", None), ("prism-vlm/Qwen3-VL-2B.x_y", None), ("nowhere", "no such folder"),
    ("nowhere/", "no such folder"), ("./a/b", "no such folder"), ("a/b/c", "no such folder"), ("/no/where", "no such folder"),
    ("../nowhere", "no such folder"), ("a/", "no such folder"),
])  # fmt: skip
def test_folders_and_hub_ids(name, message):
    """owner/name is a Hub id unless there is such a folder; anything else has to be a folder."""
    if message is None:
        runtime.check_checkpoint(name)
    else:
        with pytest.raises(InputError, match=f"--ckpt .*{message}"):
            runtime.check_checkpoint(name)


@pytest.mark.parametrize("load", [runtime.load_policy, load_discriminator])
def test_a_missing_weight_is_an_error(tiny, tmp_path, load):
    """Otherwise transformers initialises it at random and training goes on."""
    broken = Path(shutil.copytree(tiny.base, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    key = next(k for k in weights if k.endswith("layers.1.mlp.up_proj.weight"))
    save_file({k: w for k, w in weights.items() if k != key}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight"):
        load(str(broken))
