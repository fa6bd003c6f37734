"""Run: pytest tests/test_verify.py          (verification of answers; CPU only, under a minute)"""

import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
from rl import reward  # noqa: E402
from verify import verify  # noqa: E402

BOUND = 1.0  # seconds for one answer, whatever it is

# Each block: kind, then lines `prediction == gold` (right) or `prediction != gold` (wrong).
CASES = r"""
# choice
C == C
c == C
(C) == C
[C] == C
C) == C
C. == C
C: == C
**C** == C
$C$ == C
\boxed{C} == C
\text{C} == C
Ｃ == C
Option C == C
choice (C) == C
The answer is C == C
The correct answer is (C). == C
So the answer is C. == C
Answer: C == C
C is correct. == C
I choose D == D
The correct option is c == C
(C) 17 m == C
C. blue == C
C) 17 == C
C because angle A is 40 degrees == C
C == (C) 17
17 == (C) 17
(C) 17 == (C) 17
C. 17 == (C) 17
(C) 17 == 17
D != C
(D) 17 != (C) 17
(C) 18 != (C) 17
18 != (C) 17
C or D != C
(C) or (D) != C
C, D != C
C and D != C
CD != C
not C != C
Not (C) != C
The answer is not C != C
The answer is C or D != C
maybe C != C
(c) (d) != C
C. D != C
C. C or D != C
The answer is D. The answer is C != C
answer: D answer: C != C
answer: d answer: c != C
17 != C
С != C
False != C
A dog != A
A != A dog
# integer and decimal
7 == 7
7.0 == 7
7. == 7
007 == 7
+7 == 7
-7 == -7
−7 == -7
- 7 == -7
７ == 7
.5 == 0.5
2.50 == 2.5
12,345 == 12345
12 345 == 12345
1,234,567.5 == 1234567.5
1{,}234 == 1234
12\,345 == 12345
7 != 8
7 != -7
7 != 7.1
70 != 7
2.5 != 25
1,2 != 12
12,34 != 1234
3.14 != 3.15
0.001 != 0
7 8 != 78
three == 3
# percent
25% == 25%
25\% == 0.25
25 percent == 25%
25 per cent == 0.25
1/4 == 25%
12.5% == 1/8
25% != 25
25 != 25%
25% != 24%
# fraction, ratio, mixed number
3/4 == 0.75
6/8 == 3/4
\frac{3}{4} == 3/4
\dfrac{6}{8} == \tfrac{3}{4}
\frac34 == 0.75
-\frac{3}{4} == -0.75
\frac{-3}{4} == -0.75
¾ == 3/4
2¾ == 2.75
2 3/4 == 11/4
2\frac{3}{4} == 2.75
-2 3/4 == -2.75
3:4 == 3/4
3 : 4 == 3:4
6:8 == 3:4
0.333333 == 1/3
0.666667 == 2/3
0.33 != 1/3
0.3333 != 1/3
3/4 != 4/3
4:3 != 3:4
2 3/4 != 3/4
23/4 != 2 3/4
0.499999 != 1/2
1/0 != 1
# scientific notation and powers
2e3 == 2000
2.0E-3 == 0.002
2\times10^{3} == 2000
2 × 10³ == 2000
2*10^3 == 2e3
1.5 x 10^-3 == 0.0015
10^{2} == 100
2^5 == 32
5² == 25
2e3 != 2e4
2 × 10³ != 2 × 10⁴
5² != 52
1e-7 != 0
# unit
8 cm == 8 cm
8cm == 8 cm
8 CM == 8 cm
8 centimeters == 8 cm
8\text{ cm} == 8 cm
8~\mathrm{cm} == 8 cm
8 \mathrm{~cm}^{2} == 8 cm^2
8 cm² == 8 cm^2
8 cm2 == 8 cm²
8 square centimeters == 8 cm^2
8 sq cm == 8 cm^2
8 cubic metres == 8 m^3
8 km/h == 8 km/h
8 km per hour == 8 km/h
9.8 m/s^2 == 9.8 m/s²
8 cm long == 8 cm
8 == 8 cm
8 cm == 8
8 square units == 8
45° == 45
45^\circ == 45°
45^{\circ} == 45 degrees
45 degrees == 45°
230 ^\circ T == 230°
$15 == 15
$15 == 15 dollars
\$15 == $15
15 dollars == 15
$1,500 == 1500
4 apples == 4
4 apples == 4 apples
4 people in the room == 4
7元 == 7
2\sqrt{3} cm == 2\sqrt{3} cm
2\sqrt{12} cm == 4\sqrt{3}
4\pi cm^2 == 4\pi
8 mm != 8 cm
8 cm != 8 cm^2
8 cm^2 != 8 cm
8 m/s != 8 m
10^{10}+x != 10^{10}+x+1
8 cm^2 != 8 cm^3
80 mm != 8 cm
8 kg != 8 g
9 cm != 8 cm
45° != 45 rad
45°C != 45°F
45°C != 45°
45 °C == 45°C
4 apples != 4 oranges
$15 != €15
2\sqrt{3} cm != 2\sqrt{3} m
8 million != 8
8 squared != 8
8 dozen != 8
5x != 5
5 x != 5
# latex and unicode
$7$ == 7
\(7\) == 7
\[7\] == 7
$$7$$ == 7
\boxed{7} == 7
x = 3, so \boxed{7} == 7
\left(1,2\right) == (1,2)
\mathbf{7} == 7
**7** == 7
`7` == 7
\sqrt2 == √2
\sqrt{2} == √(2)
π == \pi
2π == 2 \pi
α+1 == \alpha + 1
30^\circ == 30º
\boxed{7} or \boxed{8} != 7
not \boxed{7} != 7
# surd and expression
\sqrt{8} == 2\sqrt{2}
\frac{1}{\sqrt{2}} == \frac{\sqrt{2}}{2}
\frac{\pi}{3} == \frac{1}{3}\pi
3π/2 == 1.5\pi
5/6 π == \frac{5\pi}{6}
1/2x != \frac{1}{2x}
1/3 * 6 == 2
\sqrt{16} == 4
\sqrt[3]{27} == 3
1.414214 == \sqrt{2}
3.14159 == \pi
(\sqrt{2}-1)^2 == 3-2\sqrt{2}
2(x+1) == 2x+2
x^2-1 == (x-1)(x+1)
x^{10} == x^2 * x^8
2ab == 2ba
\frac{a}{b} == a/b
e^{2x} == (e^x)^2
\sin 2x == 2 \sin x \cos x
\log_2 8 == 3
|x-1| == |1-x|
5! == 120
2 \cdot 3 == 6
\sqrt{2} != 2
\sqrt{8} != 2\sqrt{3}
2\pi != 2
6 != 6\pi
4\pi != 2\pi
1.41 != \sqrt{2}
3.14 != \pi
4x+1 != 4x+2
4 != 4x+1
x^2 != 2^x
x+1 != y+1
R+1 != r+1
(x+1)(x+2) != x+1
no != on
5! != 5
n! != n
f' != f
(2)(3) != 5
# equation and inequality
x = 4 == 4
4 == x = 4
x=4 == x = 4
4 = x == x=4
CD = 4 == 4
CD = 4 cm == 4 cm
\angle ABC = 40^\circ == 40
area = 12 == 12
f(2) = 7 == 7
x = 2 + 2 = 4 == 4
x ≈ 4 == 4
y = 2x - 1 == y = -1 + 2x
2x - y = 1 == y = 2x - 1
x > 3 == x>3
3 < x == x > 3
x \geq 3 == x ≥ 3
1 < x < 3 == 3 > x > 1
x ∈ (1, 3) == (1, 3)
x = 4 != y = 4
x = 5 != 4
x = 5 = 4 != 4
2x = 8 != 8
y = 2x + 1 != y = 2x - 1
x > 3 != x < 3
x > 3 != x ≥ 3
x > 3 != 3
< 4 != 4
3 < 4 != 4
x^2 + 1 = 0 != x^2 + 2 = 0
# tuple, interval, set, several answers
(2,5) == (2, 5)
( 2 ; 5 ) == (2,5)
(4/2, 5.0) == (2,5)
(\sqrt{4}, 5) == (2,5)
[2, 5) == [2,5)
(-\infty, 5] == (-∞,5]
(1,2) ∪ (3,4) == (3,4)\cup(1,2)
{2, 5} == {5, 2}
\{2, 5\} == {2,5}
(1,2), (3,4) == (1,2) and (3,4)
2, 5 == 2,5
2 and 5 == 2, 5
2, 3, and 5 == 2,3,5
1,000, 2,000 == 1000, 2000
x=2, x=5 == x=5, x=2
x = 2 or x = 5 == x=5 or x=2
x = ±3 == x=3 or x=-3
±3 == 3 or -3
1 \pm \sqrt{2} == 1-\sqrt{2}, 1+\sqrt{2}
(7) == 7
(2,5) != (5,2)
(2,5) != [2,5]
[2,5) != (2,5]
(2,5) != {2,5}
(2,5) != 25
(2,5) != (2,5,1)
2, 5 != 5, 2
2 != 2, 5
2, 5 != 2
2, 5, 7 != 2, 5
{2, 5} != {2, 6}
{2, 2} != {2, 5}
±3 != 3
(1) 6 (2) 5 != (1) 5 (2) 6
(2, 5) != (25)
# yes / no and text
YES == yes
yes. == Yes
No, it is not. == No
Yes, they are equal == yes
The answer is yes == Yes
true == True
no != Yes
Yes and no != Yes
Yes or no != Yes
Not yes != Yes
Blue == blue
the blue car == blue car
The blue car! == blue car
"blue" == blue
blue-green == blue green
It is blue. == blue
The color of the car is blue. == blue
ＢＬＵＥ == blue
café == café
北京。 == 北京
Isosceles triangle == isosceles triangle
red != blue
not blue != blue
red or blue != blue
It is not blue != blue
blue and red != blue
light blue != blue
It is red. It is blue != blue
The car is red, the car is blue != blue
Figure 35 != Figure 3.5
# hedge and sentence
The answer is 7 == 7
The answer is $7$. == 7
The final answer is \boxed{7}. == 7
There are 7 apples. == 7
There are 7 apples in the picture == 7 apples
The area of the triangle is 12 cm². == 12 cm^2
Therefore, x = 7 == 7
about 7 == 7
≈ 7 == 7
approximately 7.5 cm == 7.5 cm
The length equals 2\sqrt{3} == 2\sqrt{3}
The coordinates are (2, 5) == (2,5)
The roots are 2 and 5 == 2, 5
So CD = 7. == 7
7 because 3 + 4 is 7 == 7
The temperature is -7 degrees == -7
7 or 8 != 7
either 7 or 8 != 7
not 7 != 7
The answer is not 7 != 7
isn't 7 != 7
7, 8 != 7
6 7 8 != 7
7? != 7
maybe 7 != 7
at least 7 != 7
more than 7 != 7
7 or more != 7
between 6 and 7 != 7
7 ± 1 != 7
7-8 != 7
half of 7 != 7
7 eight nine != 7
7 and eight != 7
The area of the square is 7 == 7
The third angle is 7 == 7
The distance between A and B is 7 == 7
The area under the curve is 7 cm^2 == 7 cm^2
The price is more than 7 != 7
minus 7 != 7
The answer is 7 or 8 != 7
The answer is 8, not 7 != 7
Neither 7 nor 8 != 7
It is 7 if x is 3 != 7
log 7 != 7
x-7 != -7
# rewards that a policy could be after: each of these was accepted once, or is near to one that was
A B C D != C
A/B/C/D != C
C. Actually D != C
C; D != C
C is the wrong answer != C
C is ruled out != C
anything but C != C
C is correct == C
The answer is (B) 5 A, clockwise. == (B) 5 A, clockwise
C is the correct option == C
1 2 3 != 2
2. 3 != 2.3
2/3 != 2
x = 2 or x = 3 != 2
\boxed{3}\boxed{4} != 3
\boxed{5}6 != 5
3 \text{ or } 4 != 3
anything but 5 != 5
everything except 5 != 5
except 5 != 5
instead of 5 != 5
without 5 != 5
the reciprocal of 5 != 5
the sum of 5 != 5
5 is the wrong answer != 5
six, so 5 != 5
5 (or 6) != 5
5 (6) != 5
≠ 5 != 5
5+ != 5
5_6 != 5
5_{6} != 5
101_2 != 101
\log_{2}(8) == 3
a_1+a_2 == a_2+a_1
5' != 5
5%% != 5%
5k != 5
5M != 5
300 K == 300
5 grand != 5
5 too many != 5
5万 != 5
7元 == 7
5 cm m != 5 cm
5 N m != 5 N
12 cm in total == 12 cm
5 cm too much != 5 cm
0.\overline{3} == 1/3
0.1\overline{6} == 1/6
-0.\bar{3} == -1/3
0.\overline{3} != 0.3
0.\overline{5} != 0.5
\bar{5} != 5
\bar{A} != A
\overline{AB} == AB
\vec{v} == v
0^0 != 0
0.999999999 != 1
0.99999999999999999999 != 1
3/0 != 3
0/0 != 0
\frac{1}{0} != 1
1e999 != 1e998
1e9999999999 != 5
1e-400 != 0
inf != 5
nan != 5
1 000 != 1
1.000 != 1000
|x| != x
\sqrt{x^2} != x
x = x != x = 5
0 = 0 != x = 5
x > 5 or x < 5 != x > 5
{3, 4, 3} != {3, 4}
no idea != no
no answer != no
no way to know != no
Yes, it isn't != yes
yes, that is false != yes
yes: no != no
yes true false != yes
Yes they are equal == yes
No it isn't == no
anything but: red != red
The opposite of: red != red
I doubt it is red != red
red/blue != red
"""
TABLE = []
for line in CASES.strip().splitlines():
    if line.startswith("# "):
        kind = line[2:]
        continue
    right = " == " in line
    TABLE.append((kind, *line.split(" == " if right else " != ", 1), right))


@pytest.mark.parametrize(("kind", "prediction", "gold", "right"), TABLE, ids=lambda value: str(value)[:30])
def test_table(kind, prediction, gold, right):
    assert verify(prediction, gold) is right


OPTIONS = ["30°", r"$\sqrt{12}$ cm", "(C) A red car", "not enough information", "E"]


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("A", "A", True),
        ("30", "A", True),
        ("30 degrees", "A", True),
        ("The angle is 30°", "A", True),
        ("A. 30°", "A", True),
        ("(A) 45", "A", False),
        ("45", "A", False),
        ("B", "A", False),
        ("(B) 30", "A", False),
        ("A or B", "A", False),
        (r"2\sqrt{3}", "B", True),
        (r"B: 2\sqrt{3} cm", "B", True),
        (r"2\sqrt{3} m", "B", False),
        ("a red car", "C", True),
        ("red car", "C", True),
        ("C) red car", "C", True),
        ("(D) Not enough information", "D", True),
        ("E", "E", True),
        ("not enough information", "D", True),
        ("A", "30", True),
        ("B", "30", False),
        ("B", r"\sqrt{12}", True),
        ("30", "30", True),
        ("C", "red car", True),
        ("J", "A", False),
        ("A (30)", "A", True),
        ("The answer is A (30°)", "A", True),
        ("B is 30", "A", False),
        ("30 B", "A", False),
        ("The answer is B: 30", "A", False),
        ("A B C D", "A", False),
        (r"30, \sqrt{12}", "A", False),
        ("~A and B", "A", False),
    ],
)
def test_options(prediction, gold, right):
    assert verify(prediction, gold, OPTIONS) is right


def test_letters_as_options():
    """Options may be letters themselves, shifted: the letter given is then the option's letter."""
    assert verify("D", "D", ["A", "B", "C", "E"]) and not verify("E", "D", ["A", "B", "C", "E"])
    assert verify("B", "B", ["B", "A"]) and not verify("A", "B", ["B", "A"])


@pytest.mark.parametrize("mark", ["\u00ad", "\u200b", "\u200d", "\u200e", "\u2060", "\ufeff"])
def test_characters_that_nobody_sees(mark):
    """They neither hide an answer nor join two of them."""
    assert verify(f"{mark}5{mark}", "5") and verify(f"C{mark}", "C") and verify("7", f"7{mark}")
    assert not verify(f"5{mark}6", "5") and not verify(f"5{mark}6", "56") and not verify(f"C{mark}D", "C")


def readme_examples():
    """The table under 'What is counted right' -> answer, gold, options, right."""
    text = (Path(__file__).parents[1] / "README.md").read_text().partition("**What is counted right.**")[2]
    for line in re.findall(r"(?m)^\| `.*", text.partition("\nNot counted right")[0]):
        answers, gold, verdict = line.strip("| ").split(" | ")
        gold, _, option = gold.partition(", where option B is ")
        for answer in re.findall("`(.*?)`", answers):
            yield answer, gold.strip("`"), ["0", option.strip("`")] if option else None, verdict.startswith("right")


def test_readme():
    rows = list(readme_examples())
    assert len(rows) == 11 and sum(row[3] for row in rows) == 5  # ten lines, one of them with two answers
    for answer, gold, options, right in rows:
        assert verify(answer, gold, options) is right, (answer, gold)


def test_several_golds():
    assert verify("MgS", ["$M_2X_2$", "MgS"]) and verify(r"\sqrt{8}", ["3", r"2\sqrt{2}"])
    assert not verify("5", ["6", "7"]) and not verify("5", [])


def test_empty_is_never_right():
    assert (
        not verify("", "")
        and not verify(" \n", " \n")
        and not verify("", "5")
        and not verify("5", "")
        and not verify(".", "5")
    )


GOOD = "<caption>a circle</caption>\n<think>3 + 4</think>\n<answer>{}</answer>"


@pytest.mark.parametrize(
    ("text", "score", "accuracy", "form"),
    [
        (GOOD.format("7"), 1.0, 1, 1),
        (GOOD.format("\n7.0\n"), 1.0, 1, 1),
        (GOOD.format("8"), 0.2, 0, 1),
        (GOOD.format(""), 0.2, 0, 1),
        ("<caption></caption><think></think><answer>7</answer>", 1.0, 1, 1),
        ("7", 0, 0, 0),
        ("", 0, 0, 0),
        (GOOD.format("7") + " ok", 0, 0, 0),
        ("so " + GOOD.format("7"), 0, 0, 0),
        (GOOD.format("7").replace("<answer>", ""), 0, 0, 0),
        (GOOD.format("7") * 2, 0, 0, 0),
        ("<think>t</think><caption>c</caption><answer>7</answer>", 0, 0, 0),
        ("<caption><answer>7</answer></caption><think>t</think><answer>8</answer>", 0, 0, 0),
        ("<caption>c</caption><think><answer>7</answer></think><answer>8</answer>", 0, 0, 0),
        ("<caption>c</caption><think>t</think><answer>8</answer><answer>7</answer>", 0, 0, 0),
    ],
)
def test_reward(text, score, accuracy, form):
    assert reward(text, "7") == {"score": pytest.approx(score), "accuracy": accuracy, "format": form}


def test_reward_options():
    assert (
        reward(GOOD.format("30°"), "A", OPTIONS)["accuracy"] == 1
        and reward(GOOD.format("B"), ["A", "C"], OPTIONS)["accuracy"] == 0
    )


# ------------------------------------------------------------------------------------------------------- properties
UNITS = ["cm", "m", "kg", "s", "°", "cm^2", "m/s", "dollars", "apples"]
numbers = st.one_of(st.integers(-(10**9), 10**9).map(str), st.decimals(-1000, 1000, places=3).map(str))
quick = settings(max_examples=200, deadline=None)


@quick
@given(st.text(min_size=1).filter(str.strip))
def test_reflexive(text):
    assert verify(text, text)


@quick
@given(numbers, numbers)
def test_numbers_are_exact_and_symmetric(a, b):
    assert verify(a, b) == verify(b, a) == (float(a) == float(b))
    assert verify(f"${a}$", a) and verify(f"The answer is {a}.", a) and verify(f"x = {a}", a)


@quick
@given(st.integers(-999, 999), st.integers(1, 99), st.integers(1, 9))
def test_fractions(a, b, k):
    assert verify(f"{a * k}/{b * k}", rf"\frac{{{a}}}{{{b}}}") and verify(rf"\dfrac{{{a}}}{{{b}}}", f"{a * k}/{b * k}")
    assert not verify(f"{a}/{b}", f"{a + 1}/{b}") and not verify(f"{a}/{b} or {a + 1}/{b}", f"{a}/{b}")


@quick
@given(numbers, st.sampled_from(UNITS), st.sampled_from(UNITS))
def test_a_unit_flips(number, one, other):
    assert verify(f"{number} {one}", number) and verify(number, f"{number} {one}")
    assert verify(f"{number} {one}", f"{number} {other}") == (one == other)


@quick
@given(
    numbers, numbers, st.sampled_from(["()", "[]", "(]", "[)", "{}"]), st.sampled_from(["()", "[]", "(]", "[)", "{}"])
)
def test_a_bracket_flips(a, b, one, other):
    assert verify(f"{one[0]}{a},{b}{one[1]}", f"{other[0]}{a}, {b}{other[1]}") == (one == other)
    assert verify(f"{{{a},{b}}}", f"{{{b},{a}}}")
    assert verify(f"({a},{b})", f"({b},{a})") == (float(a) == float(b))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 9), st.sampled_from([r"\sqrt{3}", r"\pi", "x", "ab"]))
def test_expressions(a, b, surd):
    assert verify(f"{a * b}{surd}", rf"{a} \cdot {b}{surd}") and not verify(f"{a}{surd}", f"{a}")
    assert verify(rf"\frac{{{a}{surd}}}{{{b}}}", f"({a}/{b}){surd}") == verify(
        f"({a}/{b}){surd}", rf"\frac{{{a}{surd}}}{{{b}}}"
    )


# ------------------------------------------------------------------------------------- any input, in bounded time
ALPHABET = [
    *"0123456789 .,;:+-*/^_=<>(){}[]|!%$°\\'\"xyzABC\n",
    *"±√π½²∪≤∞é红Б\x00\ud800",
    " or ",
    " and ",
    "\\frac{",
    "\\sqrt",
    "\\boxed{",
    "\\pi",
    "\\text{",
    "**",
    " is ",
    "not ",
    "answer",
    " cm",
    "<answer>",
    "</answer>",
    "e9",
    "1,000",
]


def timed(prediction, gold):
    start = time.monotonic()
    right = verify(prediction, gold)
    assert isinstance(right, bool)
    assert time.monotonic() - start < BOUND, (prediction[:80], gold[:80])
    return right


def test_random_strings():
    rng = random.Random(0)
    verify(r"\sqrt{4}", "2")  # starts the symbolic process, which is not timed
    golds = ["5", "(B) 40", r"2\sqrt{3}", "x = 5", "3,4", "{1, 2}", "5 cm", "yes", "red car", "x>5"]
    for i in range(10_000):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(1, 16)))
        timed(text, golds[i % 10])
        if i % 10 == 0:
            timed(golds[i // 10 % 10], text)


HOSTILE = {
    "tower": "9^" * 20 + "9",
    "python tower": "**".join("9" * 20),
    "braces tower": "9^{" * 30 + "9" + "}" * 30,
    "factorials": "99999!!!!",
    "factorial tower": "((9!)!)!",
    "exponent": "1e999999999",
    "overflow": "1.2345678e999+x",
    "binomial": r"\binom{10^9}{10^8}",
    "digits": "9" * 100_000,
    "short digits": "9" * 990,
    "decimal": "0." + "3" * 100_000,
    "power of power": "(2^{999})^{999999}",
    "big power": "123456789^{999}",
    "brackets": "(" * 50_000 + ")" * 50_000,
    "few brackets": "(" * 480 + "5" + ")" * 480,
    "nested lists": "(1," * 300 + "2" + ")" * 50,
    "nested sets": "{1,{2,{3,{" * 60,
    "open": "(" * 1000,
    "braces": "{" * 999,
    "fracs": r"\frac{1}{" * 99 + "2" + "}" * 99,
    "roots": r"\sqrt{" * 150 + "2" + "}" * 150,
    "wide set": "{" + "1," * 480 + "2}",
    "sets of sets": "{" + ",".join("{" + ",".join(f"{i}{j}" for j in range(9)) + "}" for i in range(12)) + "}",
    "surds": "{" + ",".join(rf"\sqrt{{{i}}}" for i in range(90)) + "}",
    "sum": "+".join("x" * 490),
    "minus": "-" * 999 + "5",
    "tags": "<answer>" * 12_500,
    "closed tags": "<answer></answer>" * 6000,
    "spaces": " " * 99_999 + "5",
    "dollars": "$" * 999,
    "boxes": r"\boxed{" * 140,
    "stars": "*" * 999,
    "is": "is " * 330,
    "answer is": "the answer is " * 70,
    "or": "1 or " * 199,
    "choices": "A. " * 333,
    "choice": "(A) " * 249,
    "words": "word " * 20_000,
    "commas": "," * 999,
    "relations": "x<" * 499,
    "equals": "x=" * 499,
    "signs": "±" * 999,
    "superscripts": "²" * 999,
    "units": "5" + " cm/s" * 190,
    "backslash": "\\" * 999,
    "frac": r"\frac" * 199,
    "code": "__import__('os').system('exit')",
    "lambda": "().__class__.__base__",
    "null": "\x00" * 999,
    "surrogate": "\ud800" * 9,
    "nfkc": "ﷺ" * 999,
    "letters": "ab" * 450,
    "text": r"\text{" * 160,
    "spaced digits": "1 2 " * 249,
    "thousands": "1,234" * 199,
    "percent": "5" + "%" * 990,
    "carets": "^" * 999,
    "pipes": "|x" * 490,
    "ratio": "1:" * 490,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name):
    verify(r"\sqrt{4}", "2")
    text = HOSTILE[name]
    for prediction, gold in [(text, r"2\sqrt{3}"), (text, "{1,2}"), ("5", text)]:
        assert not timed(prediction, gold) or name in {"spaces", "few brackets", "units"}
    assert timed(text, text)
    start = time.monotonic()
    accuracy = reward(f"<caption>c</caption><think>t</think><answer>{text}</answer>", "5")["accuracy"]
    assert time.monotonic() - start < BOUND
    assert not accuracy or name in {"spaces", "few brackets", "units"}


def test_threads():
    """math-verify's own time limits need signals, which fail outside the main thread."""
    verify(r"\sqrt{4}", "2")
    wrong, work = (
        [],
        [(r"\sqrt{18}", r"3\sqrt{2}", True), (r"\sqrt{18}", r"2\sqrt{3}", False), ("9^{9^{9^{9}}}", "x", False)],
    )

    def run(offset):
        for prediction, gold, right in work[offset % 3 :] + work[: offset % 3]:
            if timed(f"{offset}+{prediction}", f"{offset}+{gold}") is not right:
                wrong.append((offset, prediction, gold))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FRESH = r"""
import signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from verify import verify
def state():
    handlers = [signal.getsignal(s) for s in signal.valid_signals()]
    return handlers, signal.getitimer(signal.ITIMER_REAL), sys.getrecursionlimit()
before = state()
assert verify("1,234.50", "1234.5") and verify("(1/2, 3)", "(0.5,3)") and threading.active_count() == 1
result = []
threads = [threading.Thread(target=lambda: result.append(verify(r"\sqrt{8}", r"2\sqrt{2}"))) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
assert result == [True] * 4, result           # the start of the process is no time-out
assert not verify("9^9^9^9", "5+x") and verify(r"\sqrt{18}", r"3\sqrt{2}")     # and it survives a job that hangs
assert "latex2sympy2_extended" not in sys.modules
assert before == state()
"""


def test_fresh_process():
    """The first symbolic answer waits for sympy; this process never imports the parser, nor sets a signal handler."""
    subprocess.run([sys.executable, "-c", FRESH, str(Path(__file__).parents[1])], check=True, timeout=120)
