"""`python -m toy.paper --seeds 0 1 2 --out paper_out`: the paper's tables with their controls.

The arms are ROWS; each is run in OUT/seedS like the stages of `python -m toy`, two at a time on two
cores, and goes on with --resume where it was broken off. Writes OUT/tables.md, OUT/results.json and
OUT/figures. All settings were chosen on items of seed 10, which no table shows.
"""

import os
import time

from runtime import integer, write_json
from toy.report import ARMS, arm_table, diagnosis_table, expert_table, means, verdict
from toy.report import write_curve, write_report, write_structure
from toy.stages import ALIGN, CURVE, FULL, GROUND, LOOK, MORE, QUICK, RL, STAGES
from toy.stages import add_commands, add_tests, parse_args, run_stages, write_data

FRESH = "--data align --warmup-steps 60 --warmup-disc-lr 1e-3"  # no grounding, a longer warm-up
SCORE = "discriminator.py --ckpt align/discriminator"
FOUR, THEN_RL = "--updates-per-rollout 4", f"{RL} --data rl --steps {{rl}} --ckpt"
# (table, stage, arm in words or "" where it is a step on the way, flags), for the first seed alone
ROWS = [
    (2, "more_low", "SFT on the curated rows, lr 2e-4", f"{STAGES['more']} --lr 2e-4"),
    (2, "more_high", "SFT on the curated rows, lr 1e-3", f"{STAGES['more']} --lr 1e-3"),
    (2, "mixed", "SFT on public and curated rows, 1 : 1",
     f"{MORE} --lr 5e-4 --data sft:1 align:1"),
    (2, "mixed_3", "SFT on public and curated rows, 1 : 3",
     f"{MORE} --lr 5e-4 --data sft:1 align:3"),
    (2, "more_long", "SFT on the curated rows, as many minutes as the game",
     f"{STAGES['more']} --steps {{16*more}}"),
    (2, "more_align", "SFT -> SFT on the curated rows -> align", f"{STAGES['align']} --ckpt more"),
    (2, "plain", "SFT -> RL on alignment's prompts and answers",
     f"{RL} --data align --ckpt sft --steps {{game}}"),
    (2, "paper", "align: last token, no mismatched pairs", f"{ALIGN} {FRESH}"),
    (2, "long", "align: 480 steps", f"{STAGES['align']} --steps {{4*align}}"),
    (2, "text_ground", "", f"{GROUND} {LOOK} --pairs align --disc-variant text-only"),
    (2, "text", "align: experts without the picture",
     f"{STAGES['align']} --disc text_ground --disc-variant text-only"),
    (2, "dense_ground", "", f"{GROUND} {LOOK} --pairs align --disc-variant dense"),
    (2, "dense", "align: one undifferentiated expert",
     f"{STAGES['align']} --disc dense_ground --disc-variant dense"),
    (2, "mean", "align: mean over tokens, no mismatched pairs",
     f"{ALIGN} {FRESH} --readout mean"),
    (2, "warm", "align: 200 warm-up steps",
     f"{STAGES['align']} --warmup-steps {{10*warmup}}"),
    (2, "segment", "align: segment credit", f"{STAGES['align']} --credit segment"),
    (2, "segment_v", "align: segment credit, alpha 1: the trace is not trained",
     f"{STAGES['align']} --credit segment --alpha 1"),
    (2, "more_segment_v", "SFT on the curated rows -> align: segment credit, alpha 1",
     f"{STAGES['align']} --ckpt more --credit segment --alpha 1"),
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
ROWS += [
    (3, "more_8_short", "SFT with 8 rows, 8 batches", f"{MORE} --lr 5e-4 --data align_8 --steps 8"),
    # a teacher who names what cannot be seen: three cells of each picture are not drawn
    (3, "ground_hidden", "", f"{GROUND} {LOOK} --pairs align_hidden"),
    (3, "align_hidden", "align, three cells hidden",
     f"{STAGES['align']} --data align_hidden --disc ground_hidden"),
    (3, "more_hidden", "SFT, three cells hidden", f"{STAGES['more']} --data align_hidden"),
    # rejection sampling: SFT on those of a prompt's own responses that the experts rank highest
    (4, "pool", "", "eval.py --ckpt sft --data align --max-new-tokens 128 --temperature 1"
     " --samples 8"),
    (4, "pool_rows", "", "-m toy.choose --data align --responses pool/sft/align"),
    (4, "pool_scores", "", f"{SCORE} --score pool_rows/rows"),
    (4, "best_rows", "", "-m toy.choose --data pool_rows/rows --scores pool_scores/scores"
     " --keep 0.125"),
    (4, "best", "SFT on the best of 8 own responses", f"{MORE} --lr 5e-4 --data best_rows/rows"),
    # diagnosis: SFT on what is left of its demonstrations without the worst quarter
    (4, "demos", "", f"{SCORE} --score sft"),
    (4, "kept_rows", "", "-m toy.choose --data sft --scores demos/scores --keep 0.75"),
    (4, "kept", "SFT from base without the worst quarter of the demonstrations",
     f"{STAGES['sft']} --data kept_rows/rows"),
]
ALL_SEEDS = ("ground_8", "align_8", "more_8", "more_8_short", "more_segment_v")
EXPERTS = {"ground": "before the game", "align": "after the game",
           "paper": "last token, no mismatched pairs",
           "mean": "mean over tokens, no mismatched pairs",
           "dense": "one expert", "text": "without the picture"}
TITLES = {1: "Table 1: alignment before RLVR", 2: "Table 2: controls and ablations",
          3: "Table 3: how many curated rows, and of which kind",
          4: "Table 4: the experts as judges of data"}


def add_flags(add):
    add("--seeds", type=integer(0), nargs="+", default=[0, 1, 2], help="the first has all arms")


def arms_of(table, stages=()):
    """{arm: its name in words} of a table, or those of its arms that are in `stages`."""
    arms = dict(ARMS) if table == 1 else {key: ARMS[key] for key in ("sft", "more", "align")}
    for number, stage, words, _ in ROWS:
        if words and number == table and (not stages or stage in stages):
            arms[stage] = words
    return arms


def main():
    args = parse_args(__doc__, "paper_out", add_flags)
    sizes, began, commands = QUICK if args.quick else FULL, time.time(), {}
    outs = [os.path.join(args.out, f"seed{seed}") for seed in args.seeds]
    rows = {stage: flags for _, stage, _, flags in ROWS}
    named = [stage for _, stage, words, _ in ROWS if words]
    few = {stage: rows[stage] for stage in ALL_SEEDS}
    for seed, out in zip(args.seeds, outs):
        write_data(out, seed, sizes)
        arms = [*ARMS, *(stage for stage in few if stage in named)]
        add_commands(commands, out, seed, sizes, add_tests(STAGES | few, arms, ["ground", "align"]))
    stages = add_tests(STAGES | rows, [*ARMS, *named], EXPERTS)
    add_commands(commands, outs[0], args.seeds[0], sizes, stages)
    run_stages(commands, args)
    parts = [f"# Tables\n\nseeds {', '.join(map(str, args.seeds))}\n"]
    lines = arm_table(outs, ARMS, ["sft_rl", "more_rl"], commands)
    parts += ["## Main arms, all seeds\n\n" + lines, verdict(outs)]
    for table, title, bases in ((3, "Eight curated rows", ["sft", "align_8"]),
                                (2, "The game after the control", ["sft", "more"])):  # fmt: skip
        lines = arm_table(outs, arms_of(table, ALL_SEEDS), bases, commands)
        parts.append(f"## {title}, all seeds\n\n{lines}")
    for table, title in TITLES.items():
        bases = ["sft_rl", "more_rl"] if table == 1 else ["sft", "more"]
        lines = arm_table(outs[:1], arms_of(table), bases, commands)
        parts.append(f"## {title}, seed {args.seeds[0]}\n\n" + lines)
    parts.append("## The experts\n\n" + expert_table(outs[0], EXPERTS))
    parts.append("## Faulty demonstrations\n\n" + diagnosis_table(outs[0], "sft", "demos"))
    with open(os.path.join(args.out, "tables.md"), "w") as file:
        file.write("\n".join(parts))
    results = {os.path.basename(out): means(out, ARMS) for out in outs}
    results[os.path.basename(outs[0])] |= means(outs[0], named)
    write_json(os.path.join(args.out, "results.json"), results)
    figures = os.path.join(args.out, "figures")
    os.makedirs(figures, exist_ok=True)
    write_curve(outs[0], CURVE, f"{figures}/curve.png")
    write_structure(outs[0], ["sft", "sft_rl", "align", "more"], f"{figures}/structure.png")
    write_report(outs[0], sizes["game"], f"{figures}/game.png")
    print("\n".join(parts))
    print(f"{args.out}/tables.md and {figures} written; {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
