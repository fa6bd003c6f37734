"""Run: pytest tests/test_tools.py      (tests/memory.py and tests/gpu.py, without a GPU)"""

import argparse
import os
import subprocess
import sys

import bench
import memory
import pytest
import torch
from conftest import ROOT
from transformers import Qwen3VLForConditionalGeneration

import runtime


def run_tool(name, *flags):
    command = [sys.executable, str(ROOT / "tests" / name), *flags]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True)


def real_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_memory_of_weights_and_moments(monkeypatch):
    """What the tracker sees of one process equals the bytes of a model that is really built and
    has really taken a step; buffers of the rotary embeddings lie beside the weights."""
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
             "deepstack_visual_indexes": [0]}  # fmt: skip
    monkeypatch.setitem(bench.SHAPES, "2b", bench.Shape(64, 2, 8, 96, True, tower))
    args = argparse.Namespace(
        gpus=1, disc=None, prompt=40, response=16, max_tokens=256, slots=4, lora=0
    )
    cell = memory.measure(args, "2b", "rl")
    torch.distributed.destroy_process_group()
    model = Qwen3VLForConditionalGeneration(memory.qwen_config("2b"))
    weights = real_bytes(model.parameters())
    assert cell.bytes["policy", "weights"] == weights + real_bytes(model.buffers())
    optimizer = runtime.make_optimizer(model, 1e-6, 0.01)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert cell.bytes["policy", "moments"] == real_bytes(moments)
    assert cell.bytes["policy", "gradient"] == weights
    in_bf16 = weights // 2  # the checkpoint that a state is, too
    assert cell.other["state"] == weights + real_bytes(moments) + in_bf16
    replica = weights // 2 + real_bytes(model.buffers())
    assert cell.bytes["replica"] == replica
    assert cell.bytes["KV"] > 0 and cell.bytes["policy", "activations"] > 0


def test_gpu_without_one():
    ran = run_tool("gpu.py")
    assert ran.returncode == 2 and len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_gpu_emulated():
    ran = run_tool("gpu.py", "--emulate")
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    lines = ran.stdout.splitlines()
    checks = [line for line in lines if line.startswith(("pass", "FAIL", "----"))]
    assert [line[:4] for line in checks].count("pass") == len(checks) - 1  # but for the graphs
    assert sum(line.startswith("| ") for line in lines) == 8  # a head and seven phases
