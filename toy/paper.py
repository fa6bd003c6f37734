"""`python -m toy.paper --seeds 0 1 2 --out paper_out`: the paper's tables with their controls.

The arms are ROWS; each is run in OUT/seedS like the stages of `python -m toy`, two at a time on two
cores, and goes on with --resume where it was broken off. Writes OUT/tables.md, OUT/results.json and
OUT/figures. Settings were chosen on items of seeds 10 to 12, which no table shows.
"""

import os
import time
from pathlib import Path

from runtime import write_json
from toy.report import arm_table, diagnosis_table, expert_table, means, verdict
from toy.report import write_curve, write_report, write_structure
from toy.stages import ALIGN, ARMS, CURVE, FULL, QUICK, STAGES, parse_args, plan, run_stages
from toy.stages import write_data

FRESH = f"{ALIGN} --warmup-steps 60 --warmup-disc-lr 1e-3"  # no grounding
BOTH = "more --data @data/sft.jsonl:1 @data/align.jsonl"  # the teachers
FOUR = "--updates-per-rollout 4 --algo"
TITLES = {1: "Table 1: alignment before RLVR", 2: "Table 2: controls and ablations",
          3: "Table 3: how many curated rows, and of which kind",
          4: "Table 4: the experts as judges of data"}
# (table, stage, row as in STAGES, arm in words or "" where it is a step on the way)
ROWS = [
    (2, "more_low", "more --lr 2e-4", "SFT on the curated rows, lr 2e-4"),
    (2, "more_high", "more --lr 1e-3", "SFT on the curated rows, lr 1e-3"),
    (2, "mixed", f"{BOTH}:1", "SFT on public and curated rows, 1 : 1"),
    (2, "mixed_3", f"{BOTH}:3", "SFT on public and curated rows, 1 : 3"),
    (2, "more_long", "more --steps {16*more}", "SFT on the curated rows, as long as the game"),
    (2, "more_align", "align --ckpt @more", "SFT -> SFT on the curated rows -> align"),
    (2, "plain", "sft_rl --data @data/align.jsonl --steps {game}", "SFT -> RL on align's prompts"),
    (2, "paper", FRESH, "align: last token, no mismatched pairs"),
    (2, "long", "align --steps {4*align}", "align: 480 steps"),
    (2, "text_ground", "ground --disc-variant text-only", ""),
    (2, "text", "align --disc @text_ground --disc-variant text-only", "align without the picture"),
    (2, "dense_ground", "ground --disc-variant dense", ""),
    (2, "dense", "align --disc @dense_ground --disc-variant dense", "align: one expert for both"),
    (2, "mean", f"{FRESH} --readout mean", "align: mean over tokens, no mismatched pairs"),
    (2, "warm", "align --warmup-steps {10*warmup}", "align: 200 warm-up steps"),
    (2, "segment", "align --credit segment", "align: segment credit"),
    (2, "segment_v", "segment --alpha 1", "align: segment credit, alpha 1: captions alone"),
    (2, "more_segment_v", "more_align --credit segment --alpha 1",
     "SFT on the curated rows -> align: segment credit, alpha 1: captions alone"),
    (2, "alpha1", "align --alpha 1", "align: alpha 1, perception alone"),
    (2, "frozen", "align --disc-lr 0", "align: discriminator frozen after warm-up"),
    (2, "alpha0", "align --alpha 0", "align: alpha 0, reasoning alone"),
    (2, "combined", "align --normalize combined", "align: combined, then normalised"),
    (2, "rl_all", "sft_rl --data @data/rl_all.jsonl", "SFT -> RL on all kinds"),
    (2, "align_rl_all", "align_rl --data @data/rl_all.jsonl", "SFT -> align -> RL on all kinds"),
    (2, "curated", "sft --data @data/sft_curated.jsonl", "SFT on curated rows alone"),
    (2, "curated_rl", "align_rl --ckpt @curated", "SFT on curated rows alone -> RL"),
    (2, "nosft", "align --ckpt @base --steps 10", "no SFT: base -> align"),
    (1, "sft_dapo", f"sft_rl {FOUR} dapo", "SFT -> RL, DAPO"),
    (1, "align_dapo", f"align_rl {FOUR} dapo", "SFT -> align -> RL, DAPO"),
    (1, "sft_gspo", f"sft_rl {FOUR} gspo", "SFT -> RL, GSPO"),
    (1, "align_gspo", f"align_rl {FOUR} gspo", "SFT -> align -> RL, GSPO"),
]
for n in CURVE:
    data = f"@data/align_{n}.jsonl"
    ROWS += [
        (3, f"ground_{n}", f"ground --pairs {data}", ""),
        (3, f"align_{n}", f"align --data {data} --disc @ground_{n}", f"align with {n} rows"),
        (3, f"more_{n}", f"more --data {data}", f"SFT with {n} rows"),
    ]
HIDDEN = "@data/align_hidden.jsonl"  # a teacher who names what cannot be seen: three cells of nine
ROWS += [
    (3, "more_8_short", "more_8 --steps 8", "SFT with 8 rows, 8 batches"),
    (3, "ground_hidden", f"ground --pairs {HIDDEN}", ""),
    (3, "align_hidden", f"align --data {HIDDEN} --disc @ground_hidden", "align, 3 cells hidden"),
    (3, "more_hidden", f"more --data {HIDDEN}", "SFT, 3 cells hidden"),
    # diagnosis: SFT without the quarter of its demonstrations that the experts like least; on the
    # tenth that the perception expert likes best, about as many as are curated; on the other's
    (4, "demos", "discriminator.py --ckpt @align/discriminator --score @data/sft.jsonl", ""),
    (4, "demos_ground", "demos --ckpt @ground", ""),
    (4, "rest", "-m toy.choose --data @data/sft.jsonl --scores @demos/scores.jsonl"
     " --keep 0.75", ""),
    (4, "kept", "sft --data @rest/rows.jsonl", "SFT without the worst quarter of its rows"),
    (4, "tenth", "rest --keep 0.1 --alpha 1", ""),
    (4, "seen", "sft --data @tenth/rows.jsonl", "SFT on the tenth with the highest D_v"),
    (4, "seen_more", "more --ckpt @seen", "SFT on the tenth by D_v -> SFT on the curated rows"),
    (4, "tenth_g", "tenth --scores @demos_ground/scores.jsonl", ""),
    (4, "seen_g", "sft --data @tenth_g/rows.jsonl", "SFT on the tenth by D_v before the game"),
    (4, "seen_g_more", "more --ckpt @seen_g",
     "SFT on the tenth by D_v before the game -> SFT on the curated rows"),
    (4, "tenth_r", "rest --keep 0.1 --alpha 0", ""),
    (4, "blind", "sft --data @tenth_r/rows.jsonl", "SFT on the tenth with the highest D_r"),
    (4, "blind_more", "more --ckpt @blind", "SFT on the tenth by D_r -> SFT on the curated rows"),
    (4, "more_seen", "more --data @tenth/rows.jsonl", "SFT -> SFT on the tenth by D_v"),
    # rejection sampling: SFT on those of a prompt's own responses that the experts rank highest
    (4, "pool", "eval.py --ckpt @sft --data @data/align.jsonl --max-new-tokens 128 --temperature 1"
     " --samples 8", ""),
    (4, "own", "-m toy.choose --data @data/align.jsonl --responses @pool/sft/align.jsonl", ""),
    (4, "judged", "demos --score @own/rows.jsonl", ""),
    (4, "best_rows", "rest --data @own/rows.jsonl --scores @judged/scores.jsonl --keep 0.125", ""),
    (4, "best", "more --data @best_rows/rows.jsonl", "SFT on the best of 8 own responses"),
    (4, "best_v_rows", "best_rows --alpha 1", ""),
    (4, "best_v", "more --data @best_v_rows/rows.jsonl", "SFT on the best of 8 by D_v"),
]
# what all seeds have; they go on with no row that the others lack
ALL_SEEDS = [f"{stage}_{n}" for n in (8, 32, 128) for stage in ("ground", "align", "more")]
ALL_SEEDS += ["more_8_short", "more_align", "more_segment_v", "demos", "rest", "tenth", "seen"]
ALL_SEEDS += ["seen_more", "tenth_r", "blind", "blind_more", "more_seen", "demos_ground"]
ALL_SEEDS += ["tenth_g", "seen_g", "seen_g_more"]
EXPERTS = {"ground": "before the game", "align": "after the game",
           "paper": "last token, no mismatched pairs",
           "mean": "mean over tokens, no mismatched pairs",
           "dense": "one expert", "text": "without the picture"}


def arms_of(table, stages):
    """{arm: its name in words} of a table, of its rows those that are in `stages`."""
    arms = dict(ARMS) if table == 1 else {key: ARMS[key] for key in ("sft", "more", "align")}
    rows = [row for row in ROWS if row[0] == table and row[1] in stages]
    return arms | {stage: words for _, stage, _, words in rows if words}


def main():
    seeds = {"nargs": "+", "default": [0, 1, 2], "help": "the first has all arms"}
    args = parse_args(__doc__, "paper_out", "--seeds", **seeds)
    sizes, began, commands = QUICK if args.quick else FULL, time.time(), {}
    outs = [os.path.join(args.out, f"seed{seed}") for seed in args.seeds]
    rows = {stage: row for _, stage, row, _ in ROWS}
    few = {stage: rows[stage] for stage in ALL_SEEDS}
    arms = ARMS | {stage: words for _, stage, _, words in ROWS if words}
    for seed, out in zip(args.seeds, outs):
        write_data(out, seed, sizes)
        tested = [*ARMS, *(arm for arm in few if arm in arms)]
        commands |= plan(out, seed, sizes, STAGES | few, tested, ["ground", "align"])
    commands |= plan(outs[0], args.seeds[0], sizes, STAGES | rows, arms, EXPERTS)
    run_stages(commands, args)
    rl, sft, first = ["sft_rl", "more_rl"], ["sft", "more"], f"seed {args.seeds[0]}"
    tables = [
        ("Main arms, all seeds", outs, ARMS, rl),
        ("Few curated rows, all seeds", outs, arms_of(3, few), ["sft", "align_8"]),
        ("The game after the control, all seeds", outs, arms_of(2, few), sft),
        ("The experts as judges of demonstrations, all seeds", outs, arms_of(4, few), sft),
    ]
    for table, title in TITLES.items():
        bases = rl if table == 1 else sft
        tables.append((f"{title}, {first}", outs[:1], arms_of(table, rows), bases))
    parts = [f"# Tables\n\nseeds {', '.join(map(str, args.seeds))}\n"]
    parts += [f"## {title}\n\n{arm_table(*table, commands)}" for title, *table in tables]
    parts.insert(2, verdict(outs))
    for out in outs:
        experts = EXPERTS if out == outs[0] else {key: EXPERTS[key] for key in ("ground", "align")}
        seed = os.path.basename(out)
        parts.append(f"## The experts, {seed}\n\n{expert_table(out, experts)}")
        parts.append(f"## Faulty demonstrations, {seed}\n\n{diagnosis_table(out)}")
    Path(args.out, "tables.md").write_text("\n".join(parts))
    results = {os.path.basename(out): means(out, arms) for out in outs}
    write_json(f"{args.out}/results.json", results)
    figures = os.path.join(args.out, "figures")
    os.makedirs(figures, exist_ok=True)
    write_curve(outs, f"{figures}/curve.png")
    write_structure(outs[0], f"{figures}/structure.png")
    write_report(outs[0], sizes["game"], f"{figures}/game.png")
    print("\n".join(parts))
    print(f"{args.out}/tables.md and {figures} written; {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
