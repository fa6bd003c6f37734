"""What the toy runs: its data, its stages in one table, and how they are started.

A stage is the command line of a script, run as a user would, with its output in OUT/NAME and
OUT/NAME.log.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import numpy as np

from runtime import find_states, integer
from toy import checkpoint, world

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# numbers of demonstrations, of test items and of samples per item at T = 1; steps of each stage
FULL = {"demos": 20000, "items": 300, "samples": 4}
FULL |= {"sft": 1250, "ground": 128, "warmup": 20, "align": 120, "more": 64, "rl": 60}
QUICK = {"demos": 2000, "items": 40, "samples": 1}
QUICK |= {"sft": 100, "ground": 6, "warmup": 4, "align": 6, "more": 4, "rl": 5}
CURATED, RL_PROMPTS = 1024, 32  # rows of alignment; prompts of RLVR: a slice, as real sets are
CURVE = (8, 64, 512)  # rows of alignment in the curve of toy.paper
ONE_IN = 13  # of so many demonstrations one is curated (the paper: 1.26 M to 107 K)

SAMPLING = "--prompts 8 --rollouts 8 --max-new-tokens 128 --max-tokens 4096 --save-every 100"
SAMPLING += " --log-rollouts 5"
GROUND = "discriminator.py --ckpt sft --batch 16 --lr 1e-3 --steps {ground}"
ALIGN = f"align.py --ckpt sft {SAMPLING} --steps {{align}} --lr 1e-4"
ALIGN += " --disc-lr 3e-4 --warmup-disc-lr 3e-4 --warmup-steps {warmup}"
MORE = "sft.py --ckpt sft --batch 16 --steps {more}"
RL = f"rl.py {SAMPLING} --algo grpo --lr 2e-5"
LOOK = "--mismatch 1 --readout mean"
# name: script and flags. The word after --ckpt or --disc is another stage, that after --data and
# its like a data set, with a slash one that another stage wrote. SFT -> RL has the alignment's
# steps as further steps of RL: both arms see the same number of rollouts.
STAGES = {
    "sft": "sft.py --ckpt base --data sft --batch 16 --lr 2e-3 --steps {sft}",
    "ground": f"{GROUND} {LOOK} --pairs align",
    "align": f"{ALIGN} {LOOK} --data align --disc ground",
    "more": f"{MORE} --lr 5e-4 --data align",
    "sft_rl": f"{RL} --ckpt sft --data rl --steps {{game+rl}}",
    "align_rl": f"{RL} --ckpt align --data rl --steps {{rl}}",
    "more_rl": f"{RL} --ckpt more --data rl --steps {{rl}}",
}
for sizes in (FULL, QUICK):
    sizes["game"] = sizes["warmup"] + sizes["align"]
    sizes |= {"game+rl": sizes["game"] + sizes["rl"], "16*more": 16 * sizes["more"]}
    sizes |= {"4*align": 4 * sizes["align"], "10*warmup": 10 * sizes["warmup"]}


# --------------------------------------------------------------------------------------- the data
def read_jsonl(*path):
    with open(os.path.join(*path)) as file:
        return [json.loads(line) for line in file]


def write_jsonl(path, records):
    with open(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def write_examples(folder, name, count, rng, kinds, public=False, hidden=0):
    """COUNT problems as FOLDER/NAME.jsonl with their pictures -> the examples.

    public: all but one in ONE_IN of the responses are the public teacher's. hidden: so many cells
    are not drawn, though the teacher names them. The key `world` keeps the truth for the toy's own
    scores; the stages do not read it.
    """
    examples = []
    for i in range(count):
        problem = world.make_problem(rng, kinds)
        path = os.path.join("images", f"{name}_{i}.png")
        unseen = rng.permutation(len(problem["cells"]))[:hidden] if hidden else ()
        image = world.draw(problem["cells"], problem["seed"], unseen)
        image.save(os.path.join(folder, path))
        prompt = [
            {"role": "system", "content": world.SYSTEM},
            {"role": "user", "content": "<image>" + problem["question"]},
        ]
        response = world.respond(problem, rng if public and i % ONE_IN else None)
        example = {"id": f"{name}-{i}", "prompt": prompt, "images": [path], "response": response}
        examples.append({**example, "answer": problem["answer"], "world": problem})
    write_jsonl(os.path.join(folder, name + ".jsonl"), examples)
    return examples


def write_look(folder, test, rng):
    """FOLDER/look.jsonl: responses to test items, different in one thing, for the experts to score.

    The right one, captions with wrong cells (1, 2, 4 of them; all colours or shapes taken for their
    neighbours) and traces with slips, or of what another caption says.
    """
    examples = []
    for example in test[:100]:
        problem = example["world"]
        cells, right = problem["cells"], world.solve(problem, world.numbered(problem["cells"]))
        variants = {"right": (cells, right)}
        for k in (1, 2, 4):
            variants[f"{k} wrong cells"] = world.corrupt(cells, k, rng), right
        for attribute, name in enumerate(("colors", "shapes")):
            variants[f"{name} exchanged"] = world.exchange(cells, attribute), right
        wrong = world.corrupt(cells, 9, rng)
        variants["trace of another caption"] = cells, world.solve(problem, world.numbered(wrong))
        other = world.solve(problem, world.numbered(world.make_cells(rng)))
        variants["trace with slips"] = cells, world.slip(right, other, rng, 0.1)
        for name, (said, (steps, answer)) in variants.items():
            text = world.response(world.numbered(said), steps, answer)
            line = {**example, "id": f"{example['id']}/{name}", "response": text}
            examples.append(line)
    write_jsonl(os.path.join(folder, "look.jsonl"), examples)


def write_data(out, seed, sizes):
    """Data sets and the base checkpoint. Each set has its own generator: test items are unseen."""
    made, settings = os.path.join(out, "data", "made.json"), {"seed": seed, **sizes}
    if os.path.exists(made):
        with open(made) as file:
            if json.load(file) == settings:
                return
        raise SystemExit(f"toy: {out} was made with another seed or size; give another --out")
    print(f"writing data and the base checkpoint to {out}", flush=True)
    folder = os.path.join(out, "data")
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    rngs = [np.random.default_rng([seed, stream]) for stream in range(7)]
    demos = write_examples(folder, "sft", sizes["demos"], rngs[0], world.KINDS, public=True)
    write_jsonl(os.path.join(folder, "sft_curated.jsonl"), demos[::ONE_IN])
    curated = write_examples(folder, "align", CURATED, rngs[1], world.ALIGN_KINDS)
    for count in CURVE:
        write_jsonl(os.path.join(folder, f"align_{count}.jsonl"), curated[:count])
    write_examples(folder, "rl", RL_PROMPTS, rngs[2], world.RL_KINDS)
    test = write_examples(folder, "test", sizes["items"], rngs[3], world.KINDS)
    write_look(folder, test, rngs[5])
    write_examples(folder, "rl_all", 256, rngs[4], world.KINDS)
    write_examples(folder, "align_hidden", CURATED, rngs[6], world.ALIGN_KINDS, hidden=3)
    texts = []  # for the tokenizer
    for example in demos[:2000] + curated[:256]:
        turns = [turn["content"] for turn in example["prompt"]]
        texts.append("\n".join([*turns, "assistant", example["response"]]))
    checkpoint.make_checkpoint(os.path.join(out, "base"), texts, seed)
    with open(made, "w") as file:  # last of all
        json.dump(settings, file)


# ------------------------------------------------------------------------------------- the stages
def command_of(folder, stage, seed, sizes):
    """A row of the table, whose output goes to `folder` -> (folders that it reads, command line).

    Of a flag that is given twice the last counts.
    """
    script, _, words = stage.format(**sizes).partition(" --")
    flags, needs, out = {}, set(), os.path.dirname(folder)
    for word in f"--{words}".split():
        if word.startswith("--"):
            values = flags[word] = []
        else:
            values.append(word)
    for flag, values in flags.items():
        if flag in ("--ckpt", "--disc"):
            needs.update(os.path.join(out, value.partition("/")[0]) for value in values)
            flags[flag] = [os.path.join(out, value) for value in values]
        elif flag in ("--data", "--pairs", "--score", "--probe", "--responses", "--scores"):
            files = flags[flag] = []
            for name, colon, weight in (value.partition(":") for value in values):
                if "/" in name:
                    needs.add(os.path.join(out, name.partition("/")[0]))
                else:
                    name = f"data/{name}"
                files.append(os.path.join(out, name + ".jsonl") + colon + weight)
    flags |= {"--out": [folder], "--seed": [str(seed)]}
    words = [word for flag, values in flags.items() for word in (flag, *values)]
    return needs, [*script.split(), *words]


def add_tests(stages, arms, experts):
    """The stages, then those that test `arms`, and what the discriminators of the stages `experts`
    say of test items."""
    tests = f"eval.py --data test --max-new-tokens 128 --ckpt {' '.join(arms)}"
    found = {"greedy": tests, "sampled": f"{tests} --temperature 1 --samples {{samples}}"}
    for name in experts:
        ckpt = name + "/discriminator" * stages[name].startswith("align.py")
        found[f"look_{name}"] = f"discriminator.py --score look --ckpt {ckpt}"
        found[f"probe_{name}"] = f"discriminator.py --probe test --ckpt {ckpt}"
    return {**stages, **found}


def add_commands(commands, out, seed, sizes, stages):
    """What `run_stages` takes, of the stages of one seed."""
    for name, stage in stages.items():
        folder = os.path.join(out, name)
        commands[folder] = command_of(folder, stage, seed, sizes)


def minutes_of(folder, commands):
    """What a stage took with those before it, up to SFT; nan where that is not known."""
    if os.path.basename(folder) in ("base", "sft"):
        return 0.0
    before = sum(minutes_of(need, commands) for need in commands[folder][0])
    return seconds_of(folder) / 60 + before


def seconds_of(folder):
    """What a stage took, or has taken until it was broken off; nan where that is not known."""
    if not os.path.exists(f"{folder}.seconds"):
        return np.nan
    with open(f"{folder}.seconds") as file:
        return float(file.read())


def finished(folder):
    return any(os.path.exists(os.path.join(folder, f"{name}.json")) for name in ("meta", "results"))


def run_stages(commands, args):
    """Run {folder: (folders that it reads, command line)}, args.jobs at a time, each when what it
    reads is there; stop all of them when one fails or we are told to."""
    done, running, processes = {folder for folder in commands if finished(folder)}, {}, {}
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            while len(done) < len(commands):
                for folder, (needs, command) in commands.items():
                    waits = not done.issuperset(commands.keys() & needs)
                    if folder not in done | running.keys() and not waits:
                        if len(running) < args.jobs:
                            job = pool.submit(run_stage, folder, command, args, processes)
                            running[folder] = job
                wait(running.values(), return_when=FIRST_COMPLETED)
                for folder in [folder for folder, job in running.items() if job.done()]:
                    running.pop(folder).result()
                    done.add(folder)
        except BaseException:  # each stage saves its state before it ends
            for process in processes.values():
                process.terminate()
            if running:
                names = ", ".join(map(os.path.basename, running))
                print(f"toy: stopped in {names}; --resume continues", flush=True)
            raise


def run_stage(folder, command, args, processes):
    """Print the command line and run it; SystemExit where it fails."""
    earlier = 0.0  # seconds of what it goes on with
    if args.resume and os.path.exists(folder):  # what was broken off before its first state is lost
        goes_on = find_states(folder) or command[0] == "eval.py"
        command = [*command, "--resume" if goes_on else "--overwrite"]
        earlier = seconds_of(folder) if goes_on else 0.0
    launch, said, began = ["python"], "", time.time()
    if args.processes > 1 and command[0] != "-m":
        launch = ["torchrun", "--standalone", f"--nproc_per_node={args.processes}"]
    print(f"\n$ {shlex.join(launch + command)}", flush=True)
    name, log = os.path.basename(folder), f"{folder}.log"
    module = ["-m", "torch.distributed.run"] if launch[0] == "torchrun" else []
    command = [sys.executable, *module, *launch[1:], *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    if args.jobs > 1:  # a core for each
        pipes["env"] = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(log, "w") as file, subprocess.Popen(command, cwd=HERE, **pipes) as process:
        processes[folder] = process
        for line in process.stdout:
            file.write(line)
            if "error: " in line:  # the stage's one line; torchrun's own summary follows
                said = said or f": {line.strip()}"
            if worth_printing(line):
                print(f"{name}: {line}", end="", flush=True)
    seconds = time.time() - began + earlier
    with open(f"{folder}.seconds", "w") as file:  # of a broken stage too: --resume adds to it
        file.write(f"{seconds:.0f}\n")
    if process.returncode:
        status = f"failed with status {process.returncode}{said}"
        raise SystemExit(f"toy: {name} {status}; its output is in {log}")
    print(f"[{name}] {seconds:.0f} s", flush=True)


def worth_printing(line):
    """Every 20th step, and what is said of the run; not the tables and bars of each test."""
    words = line.split()
    if len(words) > 2 and words[0] == "step" and words[1].isdigit():
        return int(words[1]) % 20 == 0
    return line.startswith(("warning", "saved", "skipped"))


# --------------------------------------------------------------------------------- the command line
def stop(number, frame):
    raise SystemExit(128 + number)


def parse_args(doc, out, add_flags):
    """The flags that both commands have, and those that add_flags adds."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument("--out", default=out, help="folder for everything that is written")
    add_flags(parser.add_argument)
    parser.add_argument("--processes", type=integer(1), default=1, help="per stage, by torchrun")
    parser.add_argument("--jobs", type=integer(1), default=2, help="at a time, a thread for each")
    parser.add_argument("--quick", action="store_true", help="in minutes; the numbers mean nothing")
    parser.add_argument("--resume", action="store_true", help="continue; repeats no finished stage")
    args = parser.parse_args()
    if os.path.exists(args.out) and not args.resume:
        parser.error(f"--out {args.out} exists; pass --resume to continue it, or another folder")
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return args
