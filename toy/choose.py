"""Rows by the experts' judgement, for toy.paper: a stage like the others, on one process.

    --data FILE --responses FILE     the rows of FILE, once for each response that eval.py sampled
    --data FILE --scores FILE        the rows that discriminator.py --score ranks highest: a share
                                     --keep of the responses to each prompt, or, with one to each,
                                     of each kind of question; --alpha: weight of D_v

Writes OUT/rows.jsonl.
"""

import argparse
import os

import numpy as np

from flags import real
from rollout import parse_response
from runtime import write_json, write_rows
from toy.stages import read_jsonl


def with_responses(examples, generations):
    """Each example once for each of its valid responses, with the id EXAMPLE/NUMBER."""
    rows = []
    for n, line in enumerate(generations):
        if line["finished"] and parse_response(line["response"]):
            example = examples[line["item"]]
            rows.append({**example, "id": f"{example['id']}/{n}", "response": line["response"]})
    return rows


def best(examples, scores, share, alpha):
    """Of each prompt's responses, or of each kind of question where a prompt has one, the share
    with the highest alpha D_v + (1 - alpha) D_r, each standardised over these, as in the game. What
    prompts of different lengths get is not compared: an expert has a bias for each."""
    groups, by_id, rows = {}, {example["id"]: example for example in examples}, []
    for line in scores:
        if line["combined"] is not None:
            prompt, kind = line["id"].rpartition("/")[0], by_id[line["id"]]["world"]["kind"]
            groups.setdefault((prompt, kind), []).append(line)
    for lines in groups.values():
        d = np.array([[line["perception"], line["reasoning"]] for line in lines])
        z = (d - d.mean(0)) / np.maximum(d.std(0), 0.1) @ [alpha, 1 - alpha]
        keep = np.argsort(-z)[: max(1, round(share * len(lines)))]
        rows += [by_id[lines[i]["id"]] for i in sorted(keep)]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--responses")
    what.add_argument("--scores")
    parser.add_argument("--keep", type=real(0, 1), default=1.0)
    parser.add_argument("--alpha", type=real(0, 1), default=0.5)
    args, _ = parser.parse_known_args()  # --resume, --overwrite: it begins anew
    rows = read_jsonl(args.data)
    if args.responses:
        rows = with_responses(rows, read_jsonl(args.responses))
    else:
        rows = best(rows, read_jsonl(args.scores), args.keep, args.alpha)
    folder = os.path.relpath(os.path.dirname(args.data), args.out)
    for row in rows:  # pictures stay where they are
        row["images"] = [os.path.join(folder, path) for path in row["images"]]
    write_rows(os.path.join(args.out, "rows.jsonl"), rows)
    write_json(os.path.join(args.out, "meta.json"), {"stage": "choose", "rows": len(rows)})


if __name__ == "__main__":
    main()
