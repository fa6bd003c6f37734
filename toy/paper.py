"""`python -m toy.paper --seeds 0 1 2 --out paper_out`: the paper's tables with their controls.

The arms are ROWS; each is run in OUT/seedS like the stages of `python -m toy`, two at a time on two
cores, and goes on with --resume where it was broken off. Writes OUT/tables.md, OUT/curve.png and
report.png in the folder of the first seed. All settings were chosen on items of seed 10, which no
table shows.
"""

import os
import time

from toy.report import ARMS, arm_table, diagnosis_table, expert_table, verdict, write_curve
from toy.report import write_report
from toy.stages import ALIGN, CURVE, FULL, GROUND, LOOK, MORE, QUICK, RL, STAGES
from toy.stages import add_commands, add_tests, parse_args, run_stages, write_data

FRESH = "--data align --warmup-steps 60 --warmup-disc-lr 1e-3"  # no grounding, a longer warm-up
FOUR, THEN_RL = "--updates-per-rollout 4", f"{RL} --data rl --steps {{rl}} --ckpt"
# (table, stage, arm in words or "" where it is a step on the way, flags), for the first seed alone
ROWS = [
    (2, "more_low", "SFT on the curated rows, lr 2e-4", f"{STAGES['more']} --lr 2e-4"),
    (2, "more_high", "SFT on the curated rows, lr 1e-3", f"{STAGES['more']} --lr 1e-3"),
    (2, "mixed", "SFT on public and curated rows, 1 : 1",
     f"{MORE} --lr 5e-4 --data sft:1 align:1"),
    (2, "plain", "SFT -> RL on alignment's prompts and answers",
     f"{RL} --data align --ckpt sft --steps {{game}}"),
    (2, "paper", "align: last token, no mismatched pairs", f"{ALIGN} {FRESH}"),
    (2, "long", "align: 480 steps", f"{STAGES['align']} --steps 480"),
    (2, "text_ground", "", f"{GROUND} {LOOK} --pairs align --disc-variant text-only"),
    (2, "text", "align: experts without the picture",
     f"{STAGES['align']} --disc text_ground --disc-variant text-only"),
    (2, "dense_ground", "", f"{GROUND} {LOOK} --pairs align --disc-variant dense"),
    (2, "dense", "align: one undifferentiated expert",
     f"{STAGES['align']} --disc dense_ground --disc-variant dense"),
    (2, "mean", "align: mean over tokens, no mismatched pairs",
     f"{ALIGN} {FRESH} --readout mean"),
    (2, "segment", "align: segment credit", f"{STAGES['align']} --credit segment"),
    (2, "alpha1", "align: alpha 1, perception alone", f"{STAGES['align']} --alpha 1"),
    (2, "frozen", "align: discriminator frozen after warm-up", f"{STAGES['align']} --disc-lr 0"),
    (2, "alpha0", "align: alpha 0, reasoning alone", f"{STAGES['align']} --alpha 0"),
    (2, "combined", "align: combined, then normalised", f"{STAGES['align']} --normalize combined"),
    (2, "rl_all", "SFT -> RL on all kinds", f"{STAGES['sft_rl']} --data rl_all"),
    (2, "align_rl_all", "SFT -> align -> RL on all kinds", f"{STAGES['align_rl']} --data rl_all"),
    (2, "curated", "SFT on curated rows alone",
     "sft.py --ckpt base --batch 16 --lr 2e-3 --steps {sft} --data sft_curated"),
    (2, "curated_rl", "SFT on curated rows alone -> RL", f"{THEN_RL} curated"),
    (2, "nosft", "no SFT: base -> align", f"{STAGES['align']} --ckpt base --steps 10"),
    (1, "sft_dapo", "SFT -> RL, DAPO", f"{STAGES['sft_rl']} {FOUR} --algo dapo"),
    (1, "align_dapo", "SFT -> align -> RL, DAPO", f"{STAGES['align_rl']} {FOUR} --algo dapo"),
    (1, "sft_gspo", "SFT -> RL, GSPO", f"{STAGES['sft_rl']} {FOUR} --algo gspo"),
    (1, "align_gspo", "SFT -> align -> RL, GSPO", f"{STAGES['align_rl']} {FOUR} --algo gspo"),
]
for n in CURVE:
    ROWS.append((3, f"ground_{n}", "", f"{GROUND} {LOOK} --pairs align_{n}"))
    ROWS.append((3, f"align_{n}", f"align with {n} rows",
                 f"{STAGES['align']} --data align_{n} --disc ground_{n}"))
    ROWS.append((3, f"more_{n}", f"SFT with {n} rows", f"{STAGES['more']} --data align_{n}"))
EXPERTS = {"ground": "before the game", "align": "after the game",
           "paper": "last token, no mismatched pairs",
           "mean": "mean over tokens, no mismatched pairs",
           "dense": "one expert", "text": "without the picture"}
TITLES = {1: "Table 1: alignment before RLVR", 2: "Table 2: controls and ablations",
          3: "Table 3: curated rows"}


def add_flags(add):
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first has all arms")


def arms_of(table):
    """{arm: its name in words} of a table."""
    arms = dict(ARMS) if table == 1 else {key: ARMS[key] for key in ("sft", "more", "align")}
    return arms | {stage: words for number, stage, words, _ in ROWS if words and number == table}


def main():
    args = parse_args(__doc__, "paper_out", add_flags)
    sizes, began, commands = QUICK if args.quick else FULL, time.time(), {}
    outs = [os.path.join(args.out, f"seed{seed}") for seed in args.seeds]
    for seed, out in zip(args.seeds, outs):
        write_data(out, seed, sizes)
        add_commands(commands, out, seed, sizes, add_tests(STAGES, ARMS, ["ground", "align"]))
    stages = STAGES | {stage: flags for _, stage, _, flags in ROWS}
    arms = [stage for _, stage, words, _ in ROWS if words]
    stages = add_tests(stages, [*ARMS, *arms], EXPERTS)
    stages["demos"] = "discriminator.py --score demos --ckpt align/discriminator"
    add_commands(commands, outs[0], args.seeds[0], sizes, stages)
    run_stages(commands, args)
    parts = [f"# Tables\n\nseeds {', '.join(map(str, args.seeds))}\n"]
    main_table = arm_table(outs, ARMS, ["sft_rl", "more_rl"], commands)
    parts.append("## Main arms, all seeds\n\n" + main_table)
    parts.append(verdict(outs))
    for table, title in TITLES.items():
        bases = ["sft_rl", "more_rl"] if table == 1 else ["sft", "more"]
        arms = arms_of(table)
        lines = arm_table(outs[:1], arms, bases, commands)
        parts.append(f"## {title}, seed {args.seeds[0]}\n\n" + lines)
    parts.append("## The experts\n\n" + expert_table(outs[0], {v: k for k, v in EXPERTS.items()}))
    parts.append("## Faulty demonstrations\n\n" + diagnosis_table(outs[0], "demos", "demos"))
    with open(os.path.join(args.out, "tables.md"), "w") as file:
        file.write("\n".join(parts))
    write_curve(outs[0], CURVE, os.path.join(args.out, "curve.png"))
    write_report(outs[0], sizes["game"])
    print("\n".join(parts))
    print(f"{args.out}/tables.md written; {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
