"""`python -m toy`: SFT -> alignment -> RLVR -> evaluation on the embedded picture world, started as a user would start it.

Writes OUT/data and OUT/base, runs sft.py, align.py, rl.py (from the SFT and from the aligned checkpoint) and eval.py under
torchrun, prints each command line before it runs, and ends with one table and OUT/report.png. What it knows about a run it
reads from the files that the run wrote.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time

import numpy as np

from rollout import parse_response
from runtime import find_states
from toy import checkpoint, world
from toy.report import ARMS, print_table, read_rows, table, write_report

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FULL = {"sft_rows": 16000, "sft": 1200, "warmup": 60, "align": 120, "rl": 60, "items": 300, "samples": 4}
QUICK = {"sft_rows": 2000, "sft": 120, "warmup": 6, "align": 8, "rl": 6, "items": 40, "samples": 2}


def write_rows(folder, name, count, rng, public=False, kinds=(0, 1)):
    """COUNT problems as FOLDER/NAME.jsonl with their pictures; `world` keeps the truth for the toy's own scores."""
    rows = []
    for i in range(count):
        problem = world.make_problem(rng, kinds)
        path = os.path.join("images", f"{name}_{i}.png")
        world.draw(problem["cells"], problem["seed"]).save(os.path.join(folder, path))
        rows.append({
            "id": f"{name}-{i}",
            "prompt": [{"role": "system", "content": world.SYSTEM}, {"role": "user", "content": "<image>" + problem["question"]}],
            "images": [path],
            "response": world.respond(problem, rng if public else None),
            "answer": problem["answer"],
            "world": problem,
        })  # fmt: skip
    with open(os.path.join(folder, name + ".jsonl"), "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def write_data(out, seed, sizes):
    """Data files and the base checkpoint. Pictures of the sets never share a generator, so test items are unseen."""
    folder = os.path.join(out, "data")
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    generator = lambda stream: np.random.default_rng([seed, stream])
    demos = write_rows(folder, "sft", sizes["sft_rows"], generator(0), public=True)
    curated = write_rows(folder, "align", 256, generator(1))
    write_rows(folder, "rl", 32, generator(2), kinds=(1,))  # few prompts, and about shapes only
    write_rows(folder, "test", sizes["items"], generator(3))
    texts = ["\n".join([*(m["content"] for m in row["prompt"]), "assistant", row["response"]]) for row in demos[:2000] + curated]
    checkpoint.make_checkpoint(os.path.join(out, "base"), texts, seed)


def stages(out, seed, sizes):
    """[(name, script and flags)] in order; the plain RL arm gets the alignment's steps as extra steps of RL, so that both
    arms see the same number of rollouts."""
    at = lambda *parts: os.path.join(out, *parts)
    sampling = ["--prompts", 8, "--rollouts", 8, "--max-new-tokens", 128, "--max-tokens", 4096]
    sampling += ["--seed", seed, "--save-every", 100]
    data, extra = at("data", "rl.jsonl"), sizes["warmup"] + sizes["align"]
    rl = ["--algo", "grpo", "--lr", 2e-5, "--log-rollouts", 5, *sampling, "--data", data]
    last = [at(arm) for arm in ARMS]
    judge = ["eval.py", "--ckpt", *last, "--data", at("data", "test.jsonl"), "--max-new-tokens", 128, "--seed", seed, "--resume"]
    return [
        ("sft", ["sft.py", "--ckpt", at("base"), "--data", at("data", "sft.jsonl"), "--out", at("sft"), "--batch", 16,
                 "--steps", sizes["sft"], "--lr", 2e-3, "--seed", seed]),
        ("align", ["align.py", "--ckpt", at("sft"), "--data", at("data", "align.jsonl"), "--out", at("align"), "--warmup-steps",
                   sizes["warmup"], "--steps", sizes["align"], "--lr", 5e-5, "--disc-lr", 1e-3, "--log-rollouts", 5, *sampling]),
        ("sft_rl", ["rl.py", "--ckpt", at("sft"), "--out", at("sft_rl"), "--steps", sizes["rl"] + extra, *rl]),
        ("align_rl", ["rl.py", "--ckpt", at("align"), "--out", at("align_rl"), "--steps", sizes["rl"], *rl]),
        ("eval_greedy", [*judge, "--out", at("eval_greedy")]),
        ("eval_sampled", [*judge, "--out", at("eval_sampled"), "--temperature", 1.0, "--samples", sizes["samples"]]),
    ]  # fmt: skip


def finished(out, name):
    marker = "results.json" if name.startswith(("eval", "scores")) else "meta.json"
    return os.path.exists(os.path.join(out, name, marker))


def run_stage(out, name, command, processes, resume):
    """Print the command line, run it, stop everything when it fails."""
    if finished(out, name):
        print(f"[{name}] finished before", flush=True)
        return
    command = [str(part) for part in command]
    if resume and find_states(os.path.join(out, name)):
        command.append("--resume")
    launch = ["torchrun", "--standalone", f"--nproc_per_node={processes}"]
    print(f"\n$ {shlex.join(launch + command)}", flush=True)
    began = time.time()
    module = [sys.executable, "-m", "torch.distributed.run", *launch[1:]]
    os.makedirs(out, exist_ok=True)
    log = os.path.join(out, f"{name}.log")
    with open(log, "w") as file:
        process = subprocess.Popen(module + command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            file.write(line)
            if worth_printing(line):
                print(line, end="", flush=True)
    if process.wait():
        raise SystemExit(f"toy: {name} failed with status {process.returncode}; its output is in {log}")
    print(f"[{name}] {time.time() - began:.0f} s", flush=True)


def worth_printing(line):
    """Every 20th step; all that is not a step."""
    words = line.split()
    return not (len(words) > 2 and words[0] == "step" and words[1].isdigit() and int(words[1]) % 20)


def write_pictures(out):
    """OUT/pictures.jsonl: greedy responses to the first test items before and after alignment, for the experts to score."""
    test, rows = read_rows(out, "data", "test.jsonl"), []
    for arm in ("sft", "align"):
        for generation in read_rows(out, "eval_greedy", arm, "test.jsonl")[:40]:
            problem = test[generation["item"]]
            images = [os.path.join("data", path) for path in problem["images"]]
            row = {"id": f"{arm}/{generation['item']}", "prompt": problem["prompt"], "images": images}
            if parse_response(generation["response"]):
                rows.append({**row, "response": generation["response"]})
    with open(os.path.join(out, "pictures.jsonl"), "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="toy_out", help="folder for everything that is written")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the weights, the order and the sampling")
    parser.add_argument("--processes", type=int, default=1, help="processes per stage, as torchrun's --nproc_per_node")
    parser.add_argument("--quick", action="store_true", help="every stage in 2 minutes; the numbers mean nothing")
    parser.add_argument("--resume", action="store_true", help="continue a broken run; finished stages are not repeated")
    args = parser.parse_args()
    if os.path.exists(args.out) and not args.resume:
        parser.error(f"--out {args.out} exists; pass --resume to continue it, or another folder")
    sizes, out, began = QUICK if args.quick else FULL, args.out, time.time()
    if not os.path.exists(os.path.join(out, "base", "preprocessor_config.json")):
        print(f"writing data and the base checkpoint to {out}", flush=True)
        write_data(out, args.seed, sizes)
    for name, command in stages(out, args.seed, sizes):
        run_stage(out, name, command, args.processes, args.resume)
    write_pictures(out)
    score = ["discriminator.py", "--score", os.path.join(out, "pictures.jsonl"), "--out", os.path.join(out, "scores")]
    run_stage(out, "scores", [*score, "--ckpt", os.path.join(out, "align", "discriminator")], args.processes, args.resume)
    write_report(out, sizes)
    print()
    if args.quick:
        print("--quick: every stage ran, but so little that these numbers show nothing about the method")
    print_table(table(out), out)
    print(f"\n{out}/report.png and {out}/table.md written; {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
