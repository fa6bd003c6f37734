"""`python -m toy`: SFT -> alignment -> RLVR -> evaluation on the embedded picture world.

Writes OUT/data and OUT/base, runs the stages of the paper and its control (SFT on the rows that the
game has), each as a user would, prints each command line before it runs, and ends with tables and
OUT/report.png. What it knows about a run it reads from the files that the run wrote.
`python -m toy.paper` makes the paper's tables, with their ablations, over several seeds.
"""

import os
import time

from runtime import integer
from toy.report import ARMS, arm_table, expert_table, verdict, write_report
from toy.stages import FULL, QUICK, STAGES, add_commands, add_tests, parse_args, run_stages
from toy.stages import write_data


def add_flags(add):
    add("--seed", type=integer(0), default=0, help="of data, weights, order and sampling")


def main():
    args = parse_args(__doc__, "toy_out", add_flags)
    sizes, out, began = QUICK if args.quick else FULL, args.out, time.time()
    write_data(out, args.seed, sizes)
    commands = {}
    add_commands(commands, out, args.seed, sizes, add_tests(STAGES, ARMS, ["ground", "align"]))
    run_stages(commands, args)
    write_report(out, sizes["game"], os.path.join(out, "report.png"))
    print()
    if args.quick:
        print("--quick: every stage ran, but too little to show anything about the method")
    tables = [arm_table([out], ARMS, ["sft_rl", "more_rl"], commands)]
    tables += [] if args.quick else [verdict([out])]
    tables.append(expert_table(out, {"ground": "before the game", "align": "after it"}))
    with open(os.path.join(out, "table.md"), "w") as file:
        file.write("\n".join(tables))
    print("\n".join(tables))
    minutes = (time.time() - began) / 60
    print(f"{out}/report.png and {out}/table.md written; {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
