"""Run: pytest tests      (fixtures of the suite: tiny data files, checkpoints; CPU, no network)"""

import argparse
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# a thread each: pytest.ini starts a worker for each core
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText  # noqa: E402
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration  # noqa: E402

import rollout  # noqa: E402
import runtime  # noqa: E402
import sft  # noqa: E402
import verify  # noqa: E402
from data import Example, encode_prompt, load_examples  # noqa: E402
from rows import banned_ids, pack_logprobs, pack_rows, set_attention  # noqa: E402
from toy import checkpoint  # noqa: E402

logging.disable(logging.INFO)  # every save of a state would fill a page under a failed test
torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)  # tensors here are so small that more threads only wait for each other
ONE = runtime.World(0, 1, torch.device("cpu"))  # one process
SYSTEM, COLORS = "Describe, think, answer.", ["red", "blue", "green", "lime"]
SIZES = [(96, 96), (64, 32), (32, 96)]  # of the pictures, in pixels


def short(rng, answer):
    """A well-formed response of a dozen tokens."""
    number, color = rng.integers(1, 4), rng.choice(COLORS)
    caption = f"{number} {color} {rng.choice(['circle', 'square', 'cross'])}"
    blocks = {"caption": caption, "think": answer, "answer": answer}
    return "\n".join(f"<{tag}>\n{text}\n</{tag}>" for tag, text in blocks.items())


def noise(rng, size):
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def write_examples(folder, name, count, rng):
    """COUNT examples whose answers are chance; every fourth has no picture, every fourth has two of
    different sizes."""
    examples = []
    for i in range(count):
        images = [f"{name}_{i}_{k}.png" for k in range((1, 0, 1, 2)[i % 4])]
        for k, path in enumerate(images):
            noise(rng, SIZES[(i + k) % 3]).save(folder / path)
        answer = str(rng.choice(["even", "odd"]))
        question = f"How many {rng.choice(COLORS)} in row {rng.integers(1, 4)}?"
        turns = [("system", SYSTEM), ("user", "<image>" * len(images) + question)]
        prompt = [{"role": role, "content": content} for role, content in turns]
        example = {"prompt": prompt, "images": images}
        examples.append({**example, "response": short(rng, answer), "answer": answer})
    write_jsonl(folder / f"{name}.jsonl", examples)
    return examples


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_released(folder, base):
    """A discriminator as its authors released it.

    A Qwen3-VL-MoE of 4 experts, 2 a token, in several shards, with the head `v_head.1.weight` in
    the last one, and the expert tensors of shape (E, hidden, 2 * inter) and (E, inter, hidden).
    """
    dense = AutoConfig.from_pretrained(base).to_dict()
    text = dense["text_config"] | {"model_type": "qwen3_vl_moe_text"}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    text |= {"moe_intermediate_size": text["intermediate_size"], "mlp_only_layers": []}
    vision = dense["vision_config"] | {"model_type": "qwen3_vl_moe_vision"}
    tokens = {key: value for key, value in dense.items() if key.endswith("_token_id")}
    torch.manual_seed(3)
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tokens)
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.save_pretrained(folder, max_shard_size="300KB")
    shutil.copy(Path(base) / "tokenizer.json", folder)
    for name in ("tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(Path(base) / name, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    for name in files:
        weights = load_file(folder / name)
        for key in weights:
            if ".experts." in key:  # transformers 5 keeps the experts transposed
                weights[key] = weights[key].mT.contiguous()
        if name == files[-1]:
            weights["v_head.1.weight"] = torch.randn(1, text["hidden_size"]) * 0.1
        save_file(weights, folder / name, metadata={"format": "pt"})
    index["weight_map"]["v_head.1.weight"] = files[-1]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A world so small that tests take no time: data files, base checkpoint, tokenizer, processor,
    `model` with row attention, `stock` as transformers loads it, and encoded prompts with 0, 1 and
    3 pictures."""
    folder, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    counts = {"sft": 24, "align": 12, "rl": 12}
    rows = {name: write_examples(folder, name, n, rng) for name, n in counts.items()}
    texts = []
    for example in rows["sft"]:
        turns = [turn["content"] for turn in example["prompt"]]
        texts.append("\n".join([*turns, example["response"]]))
    base = str(folder / "base")
    checkpoint.make_checkpoint(base, texts, hidden=64, layers=2, vision_layers=1)
    tokenizer, image_processor = runtime.load_tokenizer(base)
    pictures = [noise(rng, size) for size in SIZES]
    prompts = {}
    for count in (0, 1, 3):
        turn = {"role": "user", "content": "see " + "<image> and " * count + "count"}
        example = Example("x", [turn], pictures[:count])
        prompts[count] = encode_prompt(example, tokenizer, image_processor, system_prompt=SYSTEM)
    stock = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, attn_implementation="sdpa"
    )
    return SimpleNamespace(
        folder=folder,
        examples=rows,
        base=base,
        tokenizer=tokenizer,
        image_processor=image_processor,
        prompts=prompts,
        model=set_attention(runtime.load_policy(base), "sdpa"),
        stock=stock,
        banned=banned_ids(stock),
        eos=tokenizer.eos_token_id,
        released=write_released(folder / "released", base),
        **{name: str(folder / f"{name}.jsonl") for name in rows},
    )


@pytest.fixture(scope="session")
def policy(tiny):
    """A checkpoint that knows the format and guesses the answer: most of its samples are valid,
    about half are right."""
    model, out = set_attention(runtime.load_policy(tiny.base), "sdpa"), str(tiny.folder / "policy")
    args = argparse.Namespace(max_tokens=10**6, max_prompt=512, max_length=1024, ckpt=tiny.base)
    tools = tiny.tokenizer, tiny.image_processor, "", args
    data = [sft.encode_demonstration(e, *tools)[0] for e in load_examples(tiny.sft)]
    optimizer, rng = runtime.make_optimizer(model, 3e-3, 0.0), np.random.default_rng(0)
    for _ in range(60):
        batch = [data[i] for i in rng.choice(len(data), 8, replace=False)]
        sft.accumulate_gradient(model, batch, args, ONE)
        optimizer.step()
        optimizer.zero_grad()
    runtime.save(model, out, ONE, "sft", args, 60, {})
    return out


def ids_of(rng, tiny, *lengths):
    """Random responses of the given lengths: ordinary tokens, then the EOS."""
    first, last = len(rollout.TAGS) + 10, len(tiny.tokenizer)
    return [[*rng.integers(first, last, n - 1).tolist(), tiny.eos] for n in lengths]


def stock_inputs(prompt, ids, config):
    """One sequence as transformers wants it; it works out the positions by itself from
    `mm_token_type_ids`."""
    tokens = torch.cat([prompt.input_ids, torch.tensor(ids, dtype=torch.long)])[None]
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == config.image_token_id).int(),
        "pixel_values": prompt.pixel_values,
        "image_grid_thw": prompt.image_grid_thw,
    }


def stock_logprobs(tiny, prompt, ids, model=None):
    """Log-probs [L] of one response, alone in a stock transformers model."""
    model = model or tiny.stock
    logits = model(**stock_inputs(prompt, ids, model.config)).logits[0, -len(ids) - 1 : -1]
    logits = logits.index_fill(-1, torch.tensor(tiny.banned), -torch.inf)
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def branch_logprobs(model, prompt, branches):
    """Log-probs of every token of every branch of one prompt, as one row: list of [L_i]."""
    pack = pack_rows([prompt], [(0, branch) for branch in branches], model.device)
    return list(pack_logprobs(model, pack)[0].split(pack.lengths))


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(left, right, tolerance=1e-5):
    zero, worst = torch.zeros(()), {}
    for name in left | right:
        difference = left.get(name, zero) - right.get(name, zero)
        worst[name] = difference.abs().max().item()
    assert max(worst.values()) <= tolerance, sorted(worst.items(), key=lambda item: -item[1])[:5]
    largest = max(g.abs().max() for g in left.values())
    assert largest > 100 * tolerance  # otherwise the comparison says nothing


def as_flags(given):
    """{"max-new-tokens": 8} -> ["--max-new-tokens", 8]."""
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def at_once(script, flags):
    """The flags of a run in which a game begins at once, unless they say something else."""
    plays = "align" in str(script) and "--warmup-steps" not in flags
    return [*map(str, flags), *(["--warmup-steps", "0"] if plays else [])]


def launch(script, *flags, processes=0, background=False):
    """Start a stage script as a user would: with python, or with torchrun's `processes`."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / script), *at_once(script, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if background:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def run_alone(folder, names, script, *arguments):
    """Run a script in a folder that holds nothing but copies of these files of ours, and cannot
    import any other of them -> what it printed."""
    for name in names:
        shutil.copy(ROOT / name, folder)
    (folder / "script.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "script.py", *map(str, arguments)]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def stage(name, *flags):
    """Run a stage in this process as its script would -> exit status."""
    before, sys.argv = sys.argv, [f"{name}.py", *at_once(name, flags)]
    verify.refusals = 0  # as in a new process
    try:
        runtime.run(importlib.import_module(name).main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def run_stage(name, flags, processes):
    """Run a stage that has to succeed: in this process where `processes` is None, else see
    `launch`."""
    if processes is None:
        assert stage(name, *flags) == 0
        return
    ran = launch(f"{name}.py", *flags, processes=processes)
    assert ran.returncode == 0, ran.stderr[-3000:]


def untimed(log):
    """Lines of metrics.jsonl or rollouts.jsonl without what differs from run to run."""
    kept = []
    for line in log:
        keys = [key for key in line if not key.startswith("seconds")]
        kept.append({key: line[key] for key in keys})
    return kept
