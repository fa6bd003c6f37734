"""`python -m toy`: SFT -> alignment -> RLVR -> evaluation on the embedded picture world.

Writes OUT/data and OUT/base, runs sft.py, align.py, rl.py (from the SFT and from the aligned
checkpoint) and eval.py under torchrun as a user would, prints each command line before it runs, and
ends with one table and OUT/report.png. What it knows about a run it reads from the files that the
run wrote.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np

from rollout import parse_response
from runtime import find_states
from toy import checkpoint, world
from toy.report import ARMS, print_table, read_jsonl, table, write_report

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# numbers of demonstrations and of test items, samples per item at T = 1; steps of each stage
FULL = {"demos": 16000, "items": 300, "samples": 4}
FULL |= {"sft": 1200, "warmup": 60, "align": 120, "rl": 60}
QUICK = {"demos": 2000, "items": 40, "samples": 2}
QUICK |= {"sft": 120, "warmup": 6, "align": 8, "rl": 6}


def write_jsonl(path, records):
    with open(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def write_examples(folder, name, count, rng, public=False, attributes=(0, 1)):
    """COUNT problems as FOLDER/NAME.jsonl with their pictures -> the examples.

    The key `world` keeps the truth for the toy's own scores; the stages do not read it.
    """
    examples = []
    for i in range(count):
        problem = world.make_problem(rng, attributes)
        path = os.path.join("images", f"{name}_{i}.png")
        world.draw(problem["cells"], problem["seed"]).save(os.path.join(folder, path))
        prompt = [
            {"role": "system", "content": world.SYSTEM},
            {"role": "user", "content": "<image>" + problem["question"]},
        ]
        response = world.respond(problem, rng if public else None)
        example = {"id": f"{name}-{i}", "prompt": prompt, "images": [path], "response": response}
        examples.append({**example, "answer": problem["answer"], "world": problem})
    write_jsonl(os.path.join(folder, name + ".jsonl"), examples)
    return examples


def write_data(out, seed, sizes):
    """Data files and the base checkpoint. Each set has its own generator: test items are unseen."""
    folder = os.path.join(out, "data")
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    rngs = [np.random.default_rng([seed, stream]) for stream in range(4)]
    demos = write_examples(folder, "sft", sizes["demos"], rngs[0], public=True)
    curated = write_examples(folder, "align", 256, rngs[1])
    write_examples(folder, "rl", 32, rngs[2], attributes=(1,))  # few prompts, and about shapes only
    write_examples(folder, "test", sizes["items"], rngs[3])
    texts = []  # for the tokenizer
    for example in demos[:2000] + curated:
        turns = [turn["content"] for turn in example["prompt"]]
        texts.append("\n".join([*turns, "assistant", example["response"]]))
    checkpoint.make_checkpoint(os.path.join(out, "base"), texts, seed)


def stages(out, seed, sizes):
    """{name: script and flags} in order; the outputs of each go to OUT/name.

    The plain RL arm gets the alignment's steps as extra steps of RL, so that both arms see the same
    number of rollouts.
    """

    def data(name):
        return ["--data", os.path.join(out, "data", name + ".jsonl")]

    def ckpt(*names):
        return ["--ckpt", *(os.path.join(out, name) for name in names)]

    warmup, align, rl = sizes["warmup"], sizes["align"], sizes["rl"]
    sampling = ["--prompts", 8, "--rollouts", 8, "--max-new-tokens", 128, "--max-tokens", 4096]
    sampling += ["--log-rollouts", 5, "--save-every", 100]
    sft_flags = [*ckpt("base"), *data("sft"), "--batch", 16, "--lr", 2e-3]
    align_flags = [*ckpt("sft"), *data("align"), *sampling, "--lr", 5e-5, "--disc-lr", 1e-3]
    rl_flags = [*data("rl"), *sampling, "--algo", "grpo", "--lr", 2e-5]
    greedy = ["eval.py", *ckpt(*ARMS), *data("test"), "--max-new-tokens", 128, "--resume"]
    commands = {
        "sft": ["sft.py", *sft_flags, "--steps", sizes["sft"]],
        "align": ["align.py", *align_flags, "--warmup-steps", warmup, "--steps", align],
        "sft_rl": ["rl.py", *ckpt("sft"), *rl_flags, "--steps", warmup + align + rl],
        "align_rl": ["rl.py", *ckpt("align"), *rl_flags, "--steps", rl],
        "eval_greedy": [*greedy],
        "eval_sampled": [*greedy, "--temperature", 1.0, "--samples", sizes["samples"]],
    }
    for name, command in commands.items():
        command += ["--out", os.path.join(out, name), "--seed", seed]
    return commands


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
    command = [sys.executable, "-m", "torch.distributed.run", *launch[1:], *command]
    os.makedirs(out, exist_ok=True)
    log = os.path.join(out, f"{name}.log")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with open(log, "w") as file, subprocess.Popen(command, cwd=HERE, **pipes) as process:
        try:
            for line in process.stdout:
                file.write(line)
                if worth_printing(line):
                    print(line, end="", flush=True)
        except (KeyboardInterrupt, SystemExit):  # the stage saves its state before we return
            process.terminate()
            process.wait()
            print(f"toy: stopped in {name}; --resume continues", flush=True)
            raise
    if process.returncode:
        status = f"failed with status {process.returncode}"
        raise SystemExit(f"toy: {name} {status}; its output is in {log}")
    print(f"[{name}] {time.time() - began:.0f} s", flush=True)


def stop(number, frame):
    raise SystemExit(128 + number)


def worth_printing(line):
    """Every 20th step; all that is not a step."""
    words = line.split()
    is_step = len(words) > 2 and words[0] == "step" and words[1].isdigit()
    return not is_step or int(words[1]) % 20 == 0


def write_pictures(out):
    """OUT/pictures.jsonl: greedy responses to the first test items, for the experts to score.

    One by the policy before and one by the policy after alignment; those with broken format, which
    the experts never see, are left out.
    """
    test, examples = read_jsonl(out, "data", "test.jsonl"), []
    for arm in ("sft", "align"):
        for generation in read_jsonl(out, "eval_greedy", arm, "test.jsonl")[:40]:
            item, response = generation["item"], generation["response"]
            images = [os.path.join("data", path) for path in test[item]["images"]]
            example = {"id": f"{arm}/{item}", "prompt": test[item]["prompt"], "images": images}
            if parse_response(response):
                examples.append({**example, "response": response})
    write_jsonl(os.path.join(out, "pictures.jsonl"), examples)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="toy_out", help="folder for everything that is written")
    add("--seed", type=int, default=0, help="of the data, the weights, the order and the sampling")
    add("--processes", type=int, default=1, help="per stage, as torchrun's --nproc_per_node")
    add("--quick", action="store_true", help="all stages in 2 minutes; the numbers mean nothing")
    add("--resume", action="store_true", help="continue a broken run; repeats no finished stage")
    args = parser.parse_args()
    if os.path.exists(args.out) and not args.resume:
        parser.error(f"--out {args.out} exists; pass --resume to continue it, or another folder")
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    sizes, out, began = QUICK if args.quick else FULL, args.out, time.time()
    if not os.path.exists(os.path.join(out, "base", "preprocessor_config.json")):
        print(f"writing data and the base checkpoint to {out}", flush=True)
        write_data(out, args.seed, sizes)
    for name, command in stages(out, args.seed, sizes).items():
        run_stage(out, name, command, args.processes, args.resume)
    write_pictures(out)
    score = ["discriminator.py", "--score", os.path.join(out, "pictures.jsonl")]
    score += ["--ckpt", os.path.join(out, "align", "discriminator")]
    score += ["--out", os.path.join(out, "scores")]
    run_stage(out, "scores", score, args.processes, args.resume)
    write_report(out, sizes)
    print()
    if args.quick:
        print("--quick: every stage ran, but too little to show anything about the method")
    print_table(table(out), out)
    minutes = (time.time() - began) / 60
    print(f"\n{out}/report.png and {out}/table.md written; {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
