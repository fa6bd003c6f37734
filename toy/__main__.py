"""`python -m toy`: SFT -> alignment -> RLVR -> evaluation on the embedded picture world.

Writes OUT/data and OUT/base, runs the stages of the paper and its control (SFT on the rows that the
game has), each as a user would, prints each command line before it runs, and ends with tables and
OUT/report.png. What it knows about a run it reads from the files that the run wrote.
`python -m toy.paper` makes the paper's tables, with their ablations, over several seeds.
"""

import os
import time
from pathlib import Path

from toy.report import arm_table, expert_table, verdict, write_report
from toy.stages import ARMS, FULL, QUICK, STAGES, parse_args, plan, run_stages, write_data


def main():
    seed = {"default": 0, "help": "of data, weights, order and sampling"}
    args = parse_args(__doc__, "toy_out", "--seed", **seed)
    sizes, out, began = QUICK if args.quick else FULL, args.out, time.time()
    write_data(out, args.seed, sizes)
    commands = plan(out, args.seed, sizes, STAGES, ARMS, ["ground", "align"])
    run_stages(commands, args)
    write_report(out, sizes["game"], os.path.join(out, "report.png"))
    print()
    tables = [arm_table([out], ARMS, ["sft_rl", "more_rl"], commands)]
    if args.quick:
        print("--quick: every stage ran, but too little to show anything about the method")
    else:
        tables.append(verdict([out]))
    tables.append(expert_table(out, {"ground": "before the game", "align": "after it"}))
    Path(out, "table.md").write_text("\n".join(tables))
    print("\n".join(tables))
    minutes = (time.time() - began) / 60
    print(f"{out}/report.png and {out}/table.md written; {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
