"""What the toy runs: its data, its stages in one table, and how they are started.

A stage is the command line of a script, run as a user would, with its output in OUT/NAME and
OUT/NAME.log.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from flags import integer
from runtime import find_states, write_rows
from toy import checkpoint, world

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# numbers of demonstrations, of test items and of samples per item at T = 1; steps of each stage
FULL = {"demos": 20000, "items": 300, "samples": 4}
FULL |= {"sft": 1250, "ground": 128, "warmup": 20, "align": 120, "more": 64, "rl": 60}
QUICK = {"demos": 2000, "items": 40, "samples": 1}
QUICK |= {"sft": 100, "ground": 6, "warmup": 4, "align": 6, "more": 4, "rl": 5}
for sizes in (FULL, QUICK):
    sizes["game"] = sizes["warmup"] + sizes["align"]
    sizes |= {"game+rl": sizes["game"] + sizes["rl"], "16*more": 16 * sizes["more"]}
    sizes |= {"4*align": 4 * sizes["align"], "10*warmup": 10 * sizes["warmup"]}
CURATED, RL_PROMPTS = 1024, 32  # rows of alignment; prompts of RLVR: a slice, as real sets are
CURVE = (8, 32, 64, 128, 512)  # rows of alignment in the curve of toy.paper
ONE_IN = 13  # of so many demonstrations one is curated (the paper: 1.26 M to 107 K)

# {name: row}. A row is a script, or an earlier name whose row it goes on with, and flags; of a flag
# that is given twice the last counts. @ is the folder of all stages, with their data in @data.
SAMPLING = "--prompts 8 --rollouts 8 --max-new-tokens 128 --max-tokens 4096 --save-every 100"
SAMPLING += " --log-rollouts 5"
LOOK = "--mismatch 1 --readout mean"
ALIGN = f"align.py --ckpt @sft {SAMPLING} --steps {{align}} --lr 1e-4 --disc-lr 3e-4"
ALIGN += " --warmup-disc-lr 3e-4 --warmup-steps {warmup} --data @data/align.jsonl"
RL = f"rl.py {SAMPLING} --algo grpo --lr 2e-5 --data @data/rl.jsonl --steps"
# SFT -> RL has the alignment's steps as further steps of RL: both arms see the same number of
# rollouts
STAGES = {
    "sft": "sft.py --ckpt @base --data @data/sft.jsonl --batch 16 --lr 2e-3 --steps {sft}",
    "ground": "discriminator.py --ckpt @sft --batch 16 --lr 1e-3 --steps {ground}"
    f" {LOOK} --pairs @data/align.jsonl",
    "align": f"{ALIGN} {LOOK} --disc @ground",
    "more": "sft --ckpt @sft --data @data/align.jsonl --lr 5e-4 --steps {more}",
    "sft_rl": f"{RL} {{game+rl}} --ckpt @sft",
    "align_rl": f"{RL} {{rl}} --ckpt @align",
    "more_rl": "align_rl --ckpt @more",
}
ARMS = {  # those that are tested, in words
    "sft": "SFT",
    "sft_rl": "SFT -> RL",
    "more": "SFT -> SFT on the curated rows",
    "more_rl": "SFT -> SFT on the curated rows -> RL",
    "align": "SFT -> align",
    "align_rl": "SFT -> align -> RL",
}


# --------------------------------------------------------------------------------------- the data
def read_jsonl(*path):
    with open(os.path.join(*path)) as file:
        return [json.loads(line) for line in file]


def make_examples(folder, name, count, rng, kinds, public=False, hidden=0):
    """COUNT problems with their pictures, which are written to FOLDER/images.

    public: all but one in ONE_IN of the responses are the public teacher's. hidden: so many cells
    are not drawn, though the teacher names them. The key `world` keeps the truth for the toy's own
    scores; the stages do not read it.
    """
    examples = []
    for i in range(count):
        problem = world.make_problem(rng, kinds)
        unseen = rng.permutation(len(problem["cells"]))[:hidden] if hidden else ()
        image = world.draw(problem["cells"], problem["seed"], unseen)
        image.save(f"{folder}/images/{name}_{i}.png")
        turns = {"system": world.SYSTEM, "user": "<image>" + problem["question"]}
        prompt = [{"role": role, "content": text} for role, text in turns.items()]
        example = {"id": f"{name}-{i}", "prompt": prompt, "images": [f"images/{name}_{i}.png"]}
        example["response"] = world.respond(problem, rng if public and i % ONE_IN else None)
        examples.append({**example, "answer": problem["answer"], "world": problem})
    return examples


def make_look(test, rng):
    """Responses to test items of the kinds that the game has, different in one thing, for the
    experts to score.

    The right one, captions with wrong cells (1, 2, 4 of them; all colours or shapes taken for their
    neighbours) and traces with slips, or of what another caption says.
    """
    examples = []
    for example in [item for item in test if item["world"]["kind"] in world.ALIGN_KINDS][:100]:
        problem, cells = example["world"], example["world"]["cells"]
        right = world.solve(problem, cells)
        variants = {"right": (cells, right)}
        for k in (1, 2, 4):
            variants[f"{k} wrong cells"] = world.corrupt(cells, k, rng), right
        for attribute, name in enumerate(("colors", "shapes")):
            variants[f"{name} exchanged"] = world.exchange(cells, attribute), right
        another = world.solve(problem, world.corrupt(cells, 9, rng))
        variants["trace of another caption"] = cells, another
        slips = world.slip(right, world.solve(problem, world.make_cells(rng)), rng, 0.1)
        variants["trace with slips"] = cells, slips
        for name, variant in variants.items():
            changed = {"id": f"{example['id']}/{name}", "response": world.response(*variant)}
            examples.append(example | changed)
    return examples


def write_data(out, seed, sizes):
    """Data sets and the base checkpoint. Each set has its own generator: test items are unseen."""
    folder, settings = os.path.join(out, "data"), {"seed": seed, **sizes}
    made = Path(folder, "made.json")
    if made.exists():
        if json.loads(made.read_text()) == settings:
            return
        raise SystemExit(f"toy: {out} was made with another seed or size; give another --out")
    print(f"writing data and the base checkpoint to {out}", flush=True)
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    rngs, sets = [np.random.default_rng([seed, stream]) for stream in range(7)], {}

    def make(name, count, stream, kinds, **options):
        sets[name] = make_examples(folder, name, count, rngs[stream], kinds, **options)
        return sets[name]

    demos = make("sft", sizes["demos"], 0, world.KINDS, public=True)
    curated = make("align", CURATED, 1, world.ALIGN_KINDS)
    make("align_hidden", CURATED, 6, world.ALIGN_KINDS, hidden=3)
    make("rl", RL_PROMPTS, 2, world.RL_KINDS)
    make("rl_all", 256, 4, world.KINDS)
    sets["look"] = make_look(make("test", sizes["items"], 3, world.KINDS), rngs[5])
    sets |= {f"align_{count}": curated[:count] for count in CURVE}
    sets["sft_curated"] = demos[::ONE_IN]
    for name, examples in sets.items():
        write_rows(os.path.join(folder, name + ".jsonl"), examples)
    texts = []  # for the tokenizer
    for example in demos[:2000] + curated[:256]:
        turns = [turn["content"] for turn in example["prompt"]]
        texts.append("\n".join([*turns, "assistant", example["response"]]))
    checkpoint.make_checkpoint(os.path.join(out, "base"), texts, seed)
    made.write_text(json.dumps(settings))  # last of all


# ------------------------------------------------------------------------------------- the stages
def command_of(folder, row, seed, sizes):
    """A row whose output goes to `folder` -> (folders that it reads, command line)."""
    script, *flags = row.format(**sizes).split(" --")
    flags = {flag.split()[0]: f"--{flag}" for flag in flags}  # the last of each
    words = " ".join([script, *flags.values()]).split()
    out, needs = os.path.dirname(folder) + "/", set(re.findall(r" @(\w+)", " ".join(words)))
    words = [out + word[1:] if word.startswith("@") else word for word in words]
    return {out + name for name in needs}, [*words, "--out", folder, "--seed", str(seed)]


def plan(out, seed, sizes, rows, arms, experts):
    """What `run_stages` takes: the stages of one seed, then those that test `arms`, and what the
    discriminators of the stages `experts` say of test items."""
    found = {}
    for name, row in rows.items():
        first, _, flags = row.partition(" ")
        found[name] = f"{found[first]} {flags}" if first in found else row
    for i in range(0, len(arms), 4):  # the first are tested while others are trained
        tests = "eval.py --data @data/test.jsonl --max-new-tokens 128 --ckpt"
        tests += "".join(f" @{arm}" for arm in list(arms)[i : i + 4])
        found[f"greedy_{i}"] = tests
        found[f"sampled_{i}"] = f"{tests} --temperature 1 --samples {{samples}}"
    for name in experts:
        ckpt = f"--ckpt @{name}" + "/discriminator" * found[name].startswith("align.py")
        found[f"look_{name}"] = f"discriminator.py --score @data/look.jsonl {ckpt}"
        found[f"probe_{name}"] = f"discriminator.py --probe @data/test.jsonl {ckpt}"
    folders = {name: os.path.join(out, name) for name in found}
    return {folders[name]: command_of(folders[name], found[name], seed, sizes) for name in found}


def minutes_of(folder, commands):
    """What a stage took with all that it needs, up to SFT; nan where that is not known."""
    found, left = set(), [folder]
    while left:
        stage = left.pop()
        if stage in commands and stage not in found and os.path.basename(stage) != "sft":
            found.add(stage)
            left += commands[stage][0]
    return sum(map(seconds_of, found)) / 60


def seconds_of(folder):
    """What a stage took, or has taken until it was broken off; nan where that is not known."""
    path = Path(f"{folder}.seconds")
    return float(path.read_text()) if path.exists() else np.nan


def run_stages(commands, args):
    """Run {folder: (folders that it reads, command line)}, args.jobs at a time, each when what it
    reads is there; stop all of them when one fails or we are told to."""
    left, running, processes = {}, {}, {}
    for folder in commands:
        if not any(os.path.exists(f"{folder}/{name}.json") for name in ("meta", "results")):
            left[folder] = commands[folder]
    try:
        while left:
            for folder, (needs, command) in left.items():
                if folder not in running and len(running) < args.jobs and not left.keys() & needs:
                    running[folder] = run_stage(folder, command, args)
            time.sleep(0.1)
            for folder, stage in list(running.items()):
                processes[folder] = next(stage, None)
                if processes[folder] is None:
                    del running[folder], left[folder], processes[folder]
    finally:
        for process in processes.values():  # all of them, before one is waited for
            process.terminate()
        for stage in running.values():
            stage.close()


# what of a stage's output is printed: every 20th step, and what is said of the run
SAID = re.compile(r"step \d*[02468]0 |warning|saved|skipped")


def run_stage(folder, command, args):
    """Print the command line and run it; yields its process while it runs. SystemExit where it
    fails."""
    name, log, began = os.path.basename(folder), f"{folder}.log", time.time()
    if args.resume and os.path.exists(folder):  # what was broken off before its first state is lost
        goes_on = find_states(folder) or command[0] == "eval.py"
        command = [*command, "--resume" if goes_on else "--overwrite"]
        began -= seconds_of(folder) if goes_on else 0
    print(f"\n$ {shlex.join(['python', *command])}", flush=True)
    settings = {"cwd": HERE, "stderr": subprocess.STDOUT}
    if args.jobs > 1:  # a core for each
        settings["env"] = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(log, "w") as file, open(log) as lines:
        process = subprocess.Popen([sys.executable, *command], stdout=file, **settings)
        try:
            ended = False
            while not ended:
                yield process
                ended = process.poll() is not None  # before its last lines are read
                for line in filter(SAID.match, lines):
                    print(f"{name}: {line}", end="", flush=True)
        except BaseException:  # it saves its state before it ends
            process.terminate()
            print(f"toy: stopped in {name}; --resume continues", flush=True)
            raise
        finally:
            process.wait()
            seconds = f"{time.time() - began:.0f}"
            Path(f"{folder}.seconds").write_text(f"{seconds}\n")  # --resume adds to it
    if process.returncode:
        lines = Path(log).read_text().splitlines()
        said = [f": {line.strip()}" for line in lines if "error: " in line] or [""]
        status = f"failed with status {process.returncode}{said[0]}"
        raise SystemExit(f"toy: {name} {status}; its output is in {log}")
    print(f"[{name}] {seconds} s", flush=True)


# --------------------------------------------------------------------------------- the command line
def stop(number, frame):
    raise SystemExit(128 + number)


def parse_args(doc, out, name, **seed):
    """The flags that both commands have; name, seed: of the one in which they differ."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--out", default=out, help="folder for everything that is written")
    add(name, type=integer(0), **seed)
    add("--jobs", type=integer(1), default=2, help="at a time, a thread for each")
    add("--quick", action="store_true", help="in minutes; the numbers mean nothing")
    add("--resume", action="store_true", help="continue; repeats no finished stage")
    args = parser.parse_args()
    if os.path.exists(args.out) and not args.resume:
        parser.error(f"--out {args.out} exists; pass --resume to continue it, or another folder")
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return args
