"""Run: python tests/grade.py FILE...          (the verifier on graded answers; one summary a file)

A file holds one JSON object a line: id, response (the whole text of a rollout), gold, options (or
null) and accuracy, the right verdict (0 or 1).  A false acceptance is what a policy would be paid
for, a false rejection a signal that is lost; both are listed.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from rl import reward  # noqa: E402


def grade(path):
    """Prints how often the reward's accuracy is right, the faults, and the time (of CPU)."""
    faults, slowest, total = {"false accept": [], "false reject": []}, (0.0, ""), 0.0
    answers = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for answer in answers:
        start = time.process_time()
        said = reward(answer["response"], answer["gold"], answer.get("options"))["accuracy"]
        seconds = time.process_time() - start
        total, slowest = total + seconds, max(slowest, (seconds, answer["id"]))
        if said != answer["accuracy"]:
            faults["false accept" if said else "false reject"].append(answer)
    right = len(answers) - sum(map(len, faults.values()))
    counts = ", ".join(f"{len(found)} {name}" for name, found in faults.items())
    print(
        f"{path}: {right} of {len(answers)} right ({right / len(answers):.1%}), {counts}, "
        f"slowest {1000 * slowest[0]:.0f} ms ({slowest[1]}), {len(answers) / total:.0f} a second"
    )
    for name, found in faults.items():
        for answer in found:
            said = answer["response"].rpartition("<answer>")[2].removesuffix("</answer>").strip()
            options = answer.get("options") or ""
            print(f"  {name} {answer['id']}: {said[:70]!r} for {answer['gold']!r}", options)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        grade(name)
