"""`python toy/figures/stages.py` draws stages.png: the three stages and who judges what."""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BLUE, ORANGE, GREY = "#cfe2f8", "#fde3c4", "#eeeeee"
BOXES = [  # left, bottom, width, height, colour, text
    (0.0, 1.1, 2.0, 1.5, GREY, "1  sft.py\n\ndemonstrations\n(teachers' responses)"),
    (2.9, 1.1, 2.0, 1.5, GREY, "2  align.py\n\npolicy: rollouts y- = (c, t)\nto curated prompts"),
    (7.9, 1.1, 2.0, 1.5, GREY, "3  rl.py\n\nGRPO, DAPO, GSPO\non prompts with answers"),
    (2.9, 3.3, 2.0, 0.9, GREY, "teacher: y+ = (c, t)\na text, no logits"),
    (5.6, 3.0, 1.9, 0.65, BLUE, "perception expert\nD_v: picture, caption c"),
    (5.6, 2.2, 1.9, 0.65, ORANGE, "reasoning expert\nD_r: picture, trace t"),
    (7.9, 3.3, 2.0, 0.9, GREY, "verify.py: is the\nanswer right?"),
]
ARROWS = [  # from, to, text
    ((2.0, 1.85), (2.9, 1.85), ""), ((4.9, 1.4), (7.9, 1.4), "the aligned policy"),
    ((4.9, 3.75), (5.6, 3.4), ""), ((4.9, 2.3), (5.6, 2.9), ""),
    ((5.6, 2.4), (4.9, 1.8), ""), ((8.9, 3.3), (8.9, 2.6), "reward (5)"),
]  # fmt: skip

figure = plt.figure(figsize=(10, 3.6))
axis = figure.add_axes((0, 0, 1, 1), xlim=(-0.1, 10), ylim=(0.9, 4.4))
axis.axis("off")
for left, bottom, width, height, colour, text in BOXES:
    axis.add_patch(plt.Rectangle((left, bottom), width, height, fc=colour, ec="0.4"))
    axis.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9)
for start, end, text in ARROWS:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "0.3"})
    middle = (start[0] + end[0]) / 2 + 0.08, (start[1] + end[1]) / 2 + 0.07
    axis.text(*middle, text, fontsize=8, color="0.3")
axis.text(5.35, 1.95, "reward (1)", fontsize=8, color="0.3")
axis.text(5.2, 3.85, "discriminator.py, loss (2):\nthe teacher's above the policy's", fontsize=8)
figure.savefig(os.path.join(os.path.dirname(os.path.abspath(__file__)), "stages.png"), dpi=90)
