"""Run: python tests/grade.py FILE...     (the verifier on graded answers; prints one line a file)

A file holds one JSON object a line: response (the whole text of a rollout), gold, options (or null)
and accuracy, the right verdict (0 or 1).  A false acceptance is what a policy would be paid for; a
false rejection is a signal lost.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from rl import reward  # noqa: E402


def grade(path, show):
    """Prints how often the reward's accuracy is right, and the CPU time of the slowest answer."""
    false_accept, false_reject, slowest, total = [], [], (0.0, ""), 0.0
    answers = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for answer in answers:
        start = time.process_time()
        said = reward(answer["response"], answer["gold"], answer.get("options"))["accuracy"]
        seconds = time.process_time() - start
        total += seconds
        slowest = max(slowest, (seconds, answer["id"]))
        if said != answer["accuracy"]:
            (false_accept if said else false_reject).append(answer)
    wrong = len(false_accept) + len(false_reject)
    print(
        f"{path}: {len(answers) - wrong} of {len(answers)} right ({1 - wrong / len(answers):.1%}), "
        f"{len(false_accept)} false accept, {len(false_reject)} false reject, "
        f"slowest {slowest[0] * 1000:.0f} ms ({slowest[1]}), "
        f"{len(answers) / total:.0f} a second of CPU"
    )
    for name, faults in (("false accept", false_accept), ("false reject", false_reject)):
        for answer in faults if show else []:
            said = answer["response"].rpartition("<answer>")[2].removesuffix("</answer>").strip()
            print(
                f"  {name} {answer['id']}: {said[:70]!r} for {answer['gold']!r}",
                answer.get("options") or "",
            )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        grade(name, show=True)
