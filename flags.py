"""The command line: the flags that scripts share, and how a mistake of the user ends one.

Imports neither torch nor anything of ours: a script parses its flags before it imports the rest,
which takes seconds, so that --help and a mistake in a flag are answered at once.
"""

import argparse
import math
import os
import sys
import time
from functools import partial

DTYPES = {"bf16": "bfloat16", "float32": "float32"}  # as torch has them
LOGGERS = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}  # imported when asked for
VARIANTS = ("moe", "dense", "text-only", "learned")  # discriminator.HEADS
READOUTS = ("last", "mean")


# ------------------------------------------------------------------------------------------- errors
class InputError(ValueError):
    """A mistake in what the user passed: one line that names the file, row or flag and the cure."""


def quote(value, limit=100):
    """A value of the user's as it may stand in a message: on one line, printable, not too long."""
    text = "".join(c if c.isprintable() else "?" for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


class InputErrorOfAll(InputError):
    """Raised by every rank alike, so that one of them says it."""


def print_error(error, alone=False):
    """A mistake of the user's in one line; of a mistake that all ranks have made, and none of them
    alone, rank 0 says it. The others wait for that: torchrun ends all when one of them is gone."""
    if alone or int(os.environ.get("RANK", 0)) == 0:
        line = quote(" ".join(str(error).split()), 1000)
        print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)


def parse_or_end(parse_args):
    """Ends a script at --help, and with exit status 2 where `parse_args` raises InputError. What it
    returns is dropped: `main` parses again, once all is imported."""
    try:
        if sys.version_info < (3, 11):  # noqa: UP036
            raise InputError(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}")
        parse_args()
    except InputError as error:
        print_error(error)
        sys.exit(2)


# ------------------------------------------------------------------------------------------- parser
class Parser(argparse.ArgumentParser):
    """argparse whose help shows a docstring as it is, and whose complaint is one line; the exit
    status stays 2."""

    def __init__(self, description):
        raw = argparse.RawDescriptionHelpFormatter
        # an abbreviation would escape the look for flags that are given twice
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False)

    def error(self, message):
        raise InputError(message)

    def parse_args(self, *args):
        """Refuses a flag for several values that is given twice: argparse would drop the first."""
        given = [word.partition("=")[0] for word in sys.argv[1:]]
        several = [action for action in self._actions if action.nargs in ("+", "*")]
        for flag in (name for action in several for name in action.option_strings):
            if given.count(flag) > 1:
                raise InputError(f"{flag} was given twice: give it once, with all its values")
        return super().parse_args(*args)


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """argparse type: a finite number of at least `low` or above `above`, and at most `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            noun = "integer" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text} is no {noun}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if value < low:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low:g}")
        if value <= above:
            raise argparse.ArgumentTypeError(f"{text}: must be above {above:g}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{text}: must be at most {high:g}")
        return value

    return parse


integer, real = partial(number, int), partial(number, float)


def flag_of(name):
    """An attribute of the parsed arguments -> its flag."""
    others = {"n": "--rollouts", "stage": "stage", "reward_function": "--reward"}
    return others.get(name, "--" + name.replace("_", "-"))


# ------------------------------------------------------------------------- flags that scripts share
def common_flags(parser, stage):
    """The flags that every training stage has, with that stage's default for --out."""
    parser.set_defaults(stage=stage)
    yes_or_no = {"action": argparse.BooleanOptionalAction, "default": None}
    group = parser.add_argument_group("run")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--ckpt", required=True, help="checkpoint folder or Hub id to start from")
    add("--out", default=f"{stage}_out", help="folder to write: states, logs, then the checkpoint")
    add("--seed", type=integer(0), default=0, help="of data order, sampling and initialisation")
    either("--resume", action="store_true", help="continue from the newest OUT/state.STEP")
    either("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--save-every", type=integer(0), default=100, help="steps between states; 0: the last only")
    add("--keep", type=integer(1), default=1, help="states to keep, the newest ones")
    # not --log: torchrun takes that for an abbreviation of its own --log-dir, wherever it stands
    add("--logger", choices=LOGGERS, default=None, help="also send the metrics there")
    add = parser.add_argument_group("memory").add_argument
    add("--max-tokens", type=integer(1), default=16384, help="per forward; changes no result")
    compute_flags(add)
    add("--checkpointing", **yes_or_no, help="recompute activations in backward (default: on CUDA)")
    add = parser.add_argument_group("optimizer").add_argument
    add("--weight-decay", type=real(0, 1), default=0.01, help="of AdamW")
    add("--clip", type=real(above=0), default=1.0, help="largest gradient norm")


def compute_flags(add):
    """How a model is computed; eval.py has them too."""
    add("--attn", choices=("auto", "sdpa", "flash"), default="auto", help="auto: flash for bf16 on "
        "CUDA")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of computation and of weights "
        "that are handed on; auto: bf16 on CUDA")


def lora_flag(parser):
    parser.add_argument("--lora", type=integer(0), default=0, metavar="RANK",
                        help="train adapters of this rank on the matrices of the decoder layers, "
                        "all else frozen; they want ten times the --lr; what is saved is merged")


def data_flags(parser):
    """The flags of everything that reads examples."""
    group = parser.add_argument_group("data")
    group.add_argument("--split", default=None, help="split of a Hub data set or of a folder")
    group.add_argument("--system-prompt", default=None, metavar="FILE",
                       help="system message for rows that carry none")
    group.add_argument("--max-prompt", type=integer(1), default=2048,
                       help="longer prompts are dropped and counted, never cut")
    pixel_flags(group)
    group.add_argument("--bad-rows", choices=("skip", "stop"), default="skip",
                       help="rows that cannot be used; stop decodes every picture first")
    group.add_argument("--max-bad", type=real(0, 1), default=0.05,
                       help="share of unusable rows that ends the run")


def pixel_flags(group):
    group.add_argument("--min-pixels", type=integer(1), default=None,
                       help="smaller pictures are enlarged (default: the checkpoint's)")
    group.add_argument("--max-pixels", type=integer(1), default=None,
                       help="larger pictures are reduced (default: the checkpoint's)")


def compile_flag(add):
    add("--compile", action="store_true",
        help="torch.compile the decode step; on CUDA: graphs, not run yet")


def rollout_flags(parser, prompts, max_new_tokens):
    """Of the game and of RLVR: how both sample, and `Validation`."""
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts", type=integer(1), default=prompts, help="prompts per step, over all processes")
    add("--rollouts", dest="n", type=integer(1), default=16, help="rollouts per prompt")
    add("--temperature", type=real(1e-3), default=1.0,
        help="of sampling and of the log-probs trained on")
    add("--max-new-tokens", type=integer(1), default=max_new_tokens, help="limit of a response")
    compile_flag(add)
    add("--slots", type=integer(1), default=256, help="rollouts decoded at a time on each process; "
        "fewer where their tokens would be more than 8 x --max-tokens")  # rollout.SLOT_TOKENS
    add("--log-rollouts", type=integer(0), default=10,
        help="steps between entries in rollouts.jsonl; 0: never")
    add = parser.add_argument_group("validation").add_argument
    add("--eval-every", type=integer(0), default=0,
        help="steps between greedy accuracies on --eval-data; 0: never")
    add("--eval-data", nargs="+", default=None, help="prompts and answers")


def check_validation(args):
    if bool(args.eval_every) != bool(args.eval_data):
        raise InputError("--eval-every and --eval-data need each other")


def grounding_flags(add):
    add("--readout", choices=READOUTS, default=None,
        help="what a head reads of a segment (default: as stored; last)")
    add("--mismatch", type=real(0), default=0.0, metavar="W",
        help="weight of pairs with another picture's teacher response; 0: the paper")


def check_grounding(args, flag, prompts):
    """InputError where a step has no second picture for --mismatch; flag: that of its prompts."""
    if args.mismatch > 0 and prompts < 2:
        raise InputError(f"--mismatch needs two prompts a step: {flag} {prompts}")
