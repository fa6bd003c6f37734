"""Run: pytest tests/test_verify.py          (verification of answers; CPU only, under a minute)

The table CASES is the specification: how an answer may be written, and what it may not say.
"""

import json
import multiprocessing
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
from conftest import run_alone  # noqa: E402

from rl import reward  # noqa: E402
import verify as verify_module  # noqa: E402
from verify import timeouts, verify, with_percent  # noqa: E402

BOUND = 1.0  # seconds of CPU for one answer, whatever it is

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
# exact arithmetic: no two numbers share so many digits
2^{50} != 2^{50}-1
2^{50}-1 != 2^{50}
25! != 25!-1
0 != \frac{1}{304!}
\frac{1}{304!} == \frac{1}{304!}
\frac{1}{304!} != 0
\frac{1}{306!} != \frac{1}{304!}
10^{300} != 10^{300}+1
10^{400} != 10^{401}
10^{400} == 10^{200} \cdot 10^{200}
2^{100} == 4^{50}
2^{10} == 1024
1024 == 2^{10}
3^4 == 81
\frac{2^{205}+1}{3 \cdot 2^{206}} != \frac{1}{3 \cdot 2^{206}}
123456789^{20} != 123456789^{20}+1
\frac{7!}{5!} == 42
7!/5! == 42
(1+1/2)(1+1/3) == 2
2^{-3} == 1/8
(-2)^3 == -8
-2^2 == -4
-2^2 != 4
(-2)^2 == 4
0.1+0.2 == 0.3
1/3+1/3+1/3 == 1
1/7 == 0.142857142857142857
1/7 != 0.14
262537412640768744 != e^{\pi\sqrt{163}}
e^{\pi\sqrt{163}} != 262537412640768744
\sqrt{10^{40}+1} != 10^{20}
\sqrt{10^{98}+1} != 10^{49}
\sqrt{10^{998}+1} != 10^{499}
1+e^{-999} != 1
1+e^{-99} != 1
\sqrt{2}\sqrt{2} == 2
\sqrt{2}+10^{-60} != \sqrt{2}
2^{0.5} == \sqrt{2}
4^{1/2} == 2
8^{1/3} == 2
8^{2/3} == 4
9^{9^{9}} != 5
((2^{99})^{99})^{99} != 5
1000000! != 5
170! != 171!
0^0 != 1
0/0 != 1
1/0 != \infty
5^0 == 1
-3-4 == -7
-3-4 != 1
\sqrt{1+10^{-800}} != 1
\ln(1+10^{-800}) != 0
\log_{0} 5 != 0
# ranges, which are no differences
18-29 == 18-29
18–29 == 18-29
18 - 29 == 18-29
18 to 29 == 18-29
18-29 != -11
-11 != 18-29
18-29 != 18-30
1991-2000 != -9
20–30 == 20-30
20-30 != -10
30-20 != 10
10 != 30-20
9-4 != 5
5 != 9-4
20%-30% == 20%-30%
18-29 years == 18-29
between 18 and 29 == 18-29
2014-2015 != 2014
18 != 18-29
29 != 18-29
18, 29 != 18-29
# letters, positive where a root needs it
\sqrt{ab} == \sqrt{a}\sqrt{b}
\sqrt a\sqrt b == \sqrt{ab}
\frac{1}{\sqrt{n}} == \sqrt{1/n}
\ln a+\ln b == \ln(ab)
2\ln x == \ln x^2
\sqrt{8x^3} == 2x\sqrt{2x}
\sqrt{a+b} != \sqrt{a}+\sqrt{b}
-\sqrt{n} != \sqrt{n}
a^2-b^2 == (a+b)(a-b)
a^2-b^2 != (a-b)^2
\sin^2 x == 1-\cos^2 x
\sin 2x == 2\sin x\cos x
\sin 2x != 2\sin x
\frac{x^2-1}{x-1} == x+1
\frac{a+b}{2} == \frac{1}{2}(a+b)
\frac{a+b}{2} != a+\frac{b}{2}
x(x+1) == x^2+x
\pi r^2 == r^2\pi
\pi r^2 != 2\pi r
2\pi r h == 2\pi hr
mc^2 == c^2 m
\frac{mv^2}{2} == \frac{1}{2}mv^2
1.5x == \frac{3x}{2}
x/2 == \frac{x}{2}
x/2 == 0.5x
a+b+c == c+b+a
n(n+1)/2 == \frac{n(n+1)}{2}
\frac{n(n-1)}{2} != \frac{n(n+1)}{2}
\theta+\alpha == \alpha+\theta
e^{x+1} == e \cdot e^x
2^{n+1} == 2\cdot 2^n
2^{n+1} != 2^n+1
\log_2 x != \log_3 x
\tan x == \frac{\sin x}{\cos x}
\frac{\sqrt{a}}{\sqrt{b}} == \sqrt{\frac{a}{b}}
x_1+x_2 == x_2+x_1
x_1+x_2 != x_1-x_2
3+4i == 4i+3
3+4i != 3-4i
# formulas whose letters look like units, and equations that are not solved
\frac{1}{2} != \frac{1}{2}mv^2
1/2 != \frac{1}{2}mv^2
2\pi != 2\pi rh
2\pi != 2\pi hr
2 != 2mg
2 != 2ma
5a != 5
5A == 5
2\sqrt{3} == 2\sqrt{3} m
4\pi == 4\pi cm^2
2x = 8 != x = 4
2x = 8 != 4
x^2 = 16 != x = 4
3x < 9 != x < 3
3 > x == x < 3
x - 4 = 0 == x = 4
0.05 cm != 5%
8 square units != 8 cm
8 units == 8
0x10 != 0
5 (6) != 30
0 = 0 != 0
x=3 or y=4 != 3, 4
5 or 6 != (1) 5 (2) 6
# infinity
(1,+\infty) == (1,\infty)
(1, ∞) == (1,+\infty)
(1,-\infty) != (1,\infty)
infinity == \infty
Infinity == ∞
+\infty == \infty
positive infinity == \infty
-infinity == -\infty
negative infinity == -\infty
-\infty != \infty
not infinity != \infty
(-\infty,+\infty) == (-\infty,\infty)
(-\infty, 0)\cup(0,+\infty) == (-\infty,0) \cup (0,\infty)
# solutions and points
x_1=2, x_2=3 == x=2 or x=3
x_{1} = 2, x_{2} = 3 == 2, 3
x₁=2, x₂=3 == x = 3 or x = 2
x_1=2, x_2=3 != x=2 or x=4
(x,y)=(3,4) == (3,4)
(x, y) = (4, 3) != (3,4)
A(1,2) == (1,2)
A (1, 2) == (1,2)
A(1,2) != (2,1)
P = (1,2) == (1,2)
Point A(1, 2) == (1,2)
x=3, y=4 == (3,4)
y=4, x=3 == (3,4)
x=3 and y=4 == (3,4)
x=4, y=3 != (3,4)
x=3, y=5 != (3,4)
x=3 or y=4 != (3,4)
x = 3 != (3,4)
(1) 5; (2) 6 == 5, 6
(1) 5 (2) 6 == 5, 6
(1) 5; (2) 7 != 5, 6
(1) 6; (2) 5 != 5, 6
(1) 5 != 5, 6
a = -2 or a = 1 == a=1 \text{ or } a=-2
1 or -2 == a=1 \text{ or } a=-2
\{x=1, x=2\} != (1,2)
x=2 or x=3 != 2
x \in \{1, 2\} == {1,2}
{1,3}∪{2,4} == \{1,2,3,4\}
{1,2} != {1,2,3}
{1,2,3} != {1,2}
(1,2,3) != {1,2,3}
the points are (1,2) and (3,4) == (1,2), (3,4)
# matrices
\begin{pmatrix}1&2\\3&4\end{pmatrix} == [[1,2],[3,4]]
[[1, 2], [3, 4]] == \begin{bmatrix}1&2\\3&4\end{bmatrix}
[1 2; 3 4] == \begin{bmatrix}1&2\\3&4\end{bmatrix}
[1, 2; 3, 4] == \begin{bmatrix}1&2\\3&4\end{bmatrix}
\left[\begin{array}{cc}1 & 2 \\ 3 & 4\end{array}\right] == \begin{bmatrix}1&2\\3&4\end{bmatrix}
\left(\begin{matrix}1&2\\3&4\end{matrix}\right) == \begin{bmatrix}1&2\\3&4\end{bmatrix}
((1,2),(3,4)) == \begin{bmatrix}1&2\\3&4\end{bmatrix}
{{1,2},{3,4}} == \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix}1&2\\3&5\end{pmatrix} != [[1,2],[3,4]]
\begin{pmatrix}1&3\\2&4\end{pmatrix} != [[1,2],[3,4]]
\begin{pmatrix}1&2\end{pmatrix} != \begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}0.5\\2\end{pmatrix} == \begin{pmatrix}\frac{1}{2}\\2\end{pmatrix}
[3,4],[1,2] != \begin{bmatrix}1&2\\3&4\end{bmatrix}
# chemistry
H2O == H_2O
H₂O == \mathrm{H_2O}
\mathrm{H}_2\mathrm{O} == H2O
CO2 == CO_2
CO_2 != CO
Fe_2O_3 == Fe2O3
Fe2O3 != Fe3O2
Ca(OH)2 == Ca(OH)_2
Na^+ == Na^{+}
Na+ != Na-
NH4+ == NH_4^+
2H_2O == 2H2O
H_2O != 2H_2O
# phrases, and words that are not known to be harmless
6 \times 7 = 42 == 42
6 × 7 = 42 == 42
40 + 2 = 42 == 42
6 \times 7 = 43 != 42
6 × 8 = 42 != 42
7 × 6 = 42 = 43 != 42
\underline{42} == 42
∴ 42 == 42
∴ x = 42 == 42
\therefore 42 == 42
#### 42 == 42
**Answer:** 42 == 42
Final answer: 42 == 42
The final answer is: $\boxed{42}$ == 42
The answer is 42. == 42
So, the answer is 42 == 42
Hence the value is 42 == 42
Thus x = 42 == 42
x is equal to 42 == 42
equals 42 == 42
It equals 42. == 42
approximately 42 == 42
The total is 42 apples == 42
There are 42 apples. == 42
She has 42 apples. == 42
we get 42 == 42
We get x = 42 == 42
= 42 == 42
42. == 42
"42" == 42
(42) == 42
{42} == 42
[42] == 42
42! != 42
42% != 42
-42 != 42
4.2 != 42
42 or so != 42
nearly 42 != 42
almost 42 != 42
under 42 != 42
over 42 != 42
after 42 != 42
before 42 != 42
by 42 != 42
until 2014 != 2014
since 2014 != 2014
after 2014 != 2014
before 2014 != 2014
around 2014 == 2014
in 2014 == 2014
In the year 2014 == 2014
the year after 2014 != 2014
the year before 2014 != 2014
a multiple of 5 != 5
multiples of 5 != 5
a factor of 5 != 5
everything besides 5 != 5
everything but 5 != 5
all numbers except 5 != 5
a number other than 5 != 5
numbers starting with 5 != 5
divisible by 5 != 5
ends in 5 != 5
prime 5 != 5
5 times as many != 5
5 squared != 5
5 cubed != 5
5 factorial != 5
5 halves != 5
5 tenths != 5
5 and a half != 5
5 and a half == 5.5
5 point 5 != 5
5 choose 2 != 5
5 mod 3 != 5
5 base 6 != 5
5 dozen != 5
5 hundred != 5
5 hundred == 500
5 plus != 5
5 plus 1 != 5
plus 5 != 5
5 minus != 5
5 more != 5
5 fewer apples != 5
5 less != 5
5 short != 5
5 ago != 5
5 if n is odd != 5
5 when x = 2 != 5
5 then 6 != 5
5 followed by 6 != 5
5 to 7 != 5
5 through 7 != 5
5 out of 7 != 5
5 of 7 != 5
5 in 7 != 5
first 5 != 5
last digit 5 != 5
5th != 5
fifth != 5
one of 5 != 5
one of 5 != 1
half 5 != 5
double 5 != 5
twice 5 != 5
square root of 5 != 5
square of 5 != 5
cube of 5 != 5
log of 5 != 5
sin 5 != 5
|5 != 5
5| != 5
-(-5) == 5
+5 == 5
5- != 5
/5 != 5
^5 != 5
_5 != 5
~5 == 5
5.5.5 != 5
5,5 != 5
5..6 != 5
5...6 != 5
5–6 != 5
5/1 == 5
5=5 != 5
5=6 != 5
5 = 5 = 6 != 5
x=5, x=6 != 5
x=5; y=6 != 5
the answer isn't 5 != 5
the answer was 5 but now 6 != 5
The answer is 5, no, 6 != 5
The answer is 5. Wait, 6. != 5
The wrong answer is 5 != 5
The answer is not necessarily 5 != 5
The answer minus 1 is 5 != 5
Half of the answer is 5 != 5
Twice the answer is 5 != 5
The answer is less than 5 != 5
The answer is at most 5 != 5
the opposite of 5 != -5
minus 5 != 5
negative 5 == -5
# ratios
3 to 4 == 3:4
3:4 == 3 to 4
6 to 8 == 3:4
3 to 4 != 4:3
3 to 5 != 3:4
3:4:5 == 3 : 4 : 5
3:4:5 != 3:5:4
3 to 4 == 3/4
3 to 4 != 3
# times
3:45 p.m. == 3:45 PM
3:45pm == 3:45 PM
3:45 P.M. == 3:45 pm
3:45 a.m. != 3:45 p.m.
03:45 == 3:45
3:45 == 3:45 PM
1:15 != 3:45
3:54 != 3:45
3.45 != 3:45
12:30 == 12:30
12:00 != 1:00
3:45 and 4:00 != 3:45
# scales and units
5 million == 5000000
5 million == 5,000,000
1.2 million == 1200000
$5 million == 5000000
$5 million == $5,000,000
5 million dollars == $5,000,000
5 million people == 5000000
5 million != 5
5 billion != 5000000
5 thousand == 5000
25 degrees Celsius == 25°C
25 degrees C == 25°C
25℃ == 25°C
25 Celsius == 25°C
25 degrees Fahrenheit != 25°C
25 degrees == 25
25 degrees Fahrenheit == 25°F
5 kg == 5 kilograms
5 kilograms != 5 grams
5 mW != 5 MW
5 MΩ != 5 mΩ
5 kΩ == 5 k\Omega
5 kΩ != 5 Ω
10 N/m == 10 N/m
10 m/s == 10 meters per second
10 m s^{-1} == 10 m/s
10 m/s^2 == 10 m s^{-2}
10 m/s != 10 m/s^2
12 cm^2 == 12 square centimeters
12 cm2 == 12 cm^2
12 cm != 12 cm^2
12 sq. ft == 12 square feet
3 red apples == 3 apples
3 red apples == 3
3 red apples != 3 green apples
3 hours == 3 h
3 hrs == 3 hours
3 hours != 3 minutes
1 apple == 1
5 apples and 3 pears != 5
5 apples or pears != 5
$5 == 5
5$ == $5
€5 != $5
-$5 == -5
20% == 0.2
20% == 1/5
20% != 20
20 % == 20%
20 percent == 20%
0.2% != 0.2
100% == 1
# Chinese
答案是5 == 5
答案：5 == 5
答案为5厘米 == 5 cm
5厘米 == 5 cm
5厘米 != 5 m
5米 == 5 m
30度 == 30°
30度 == 30
5个苹果 == 5
5个 == 5
5万 == 50000
约5 == 5
大约5 == 5
所以答案是5。 == 5
不是5 != 5
不等于5 != 5
5或6 != 5
大于5 != 5
小于5 != 5
5以上 != 5
至少5 != 5
超过5 != 5
5或者6 != 5
5和6 != 5
答案不是5 != 5
除了5 != 5
3平方厘米 == 3 cm^2
5元 == 5
# intervals and inequalities
1 \le x < 3 == [1,3)
[1,3) == 1 \le x < 3
1 ≤ x ≤ 3 == [1,3]
1 < x < 3 != [1,3)
x > 2 == (2,\infty)
x ≥ 2 == [2,\infty)
x < 2 == (-\infty,2)
2 < x == (2,+\infty)
x > 2 != (-\infty,2)
x > 2 != [2,\infty)
x<1 or x>3 == (-\infty,1)\cup(3,\infty)
x<1 or x>3 != (-\infty,1)\cup[3,\infty)
0<x<12.5 == (0, 12.5)
m \geq \sqrt{2} == [\sqrt2, +\infty)
x \in [1,3) == 1 ≤ x < 3
# yes, no and text again
Yes, there is. == yes
Yes it is == yes
yes and also no != yes
not yes != yes
no, yes != yes
It is true. == true
True == true
false != true
Blue car == blue car
The car is blue == blue
blue or red != blue
navy blue != blue
blueish != blue
neither blue nor red != blue
anything but blue != blue
John Smith == john smith
Smith != John Smith
the Eiffel Tower == Eiffel Tower
It's the Eiffel Tower == Eiffel Tower
trans-2-butene == trans-2-Butene
cis-2-butene != trans-2-Butene
July 4, 1776 == July 4 1776
4 July 1776 != July 5, 1776
July 1776 != July 4, 1776
# numbers in words
twenty-one == 21
twenty one == 21
three quarters == 3/4
three-quarters == 3/4
two thirds == 2/3
one half == 1/2
a half == 1/2
half == 1/2
a third == 1/3
two and a half == 2.5
fifteen == 15
fifty != 15
twelve apples == 12
one hundred != 1
twenty != 21
seven eight != 7
two three != 23
# surds and functions
\sqrt{50} == 5\sqrt{2}
5√2 == \sqrt{50}
5 sqrt 2 == 5\sqrt{2}
\frac{\sqrt{50}}{5} == \sqrt{2}
\sqrt{50} != 5
2\sqrt{3}+1 == 1+2\sqrt{3}
\sqrt[3]{54} == 3\sqrt[3]{2}
\frac{1}{2+\sqrt{3}} == 2-\sqrt{3}
(\sqrt{5}+1)/2 == \frac{1+\sqrt5}{2}
2\pi/3 == \frac{2\pi}{3}
120° != \frac{2\pi}{3}
\cos 60° == 1/2
\cos 60^\circ == 0.5
\cos 60 != 1/2
\cos 90^\circ == 0
1+\sin \pi == 1
\sin\frac{\pi}{6} == \frac12
\tan 45^\circ == 1
\arctan 1 == \frac{\pi}{4}
\log_{10} 1000 == 3
\ln e == 1
e^2 == e \cdot e
1 - 1/e == \frac{e-1}{e}
3.14159265 == \pi
3.1416 != \pi
22/7 != \pi
5x5 == 25
5 x 5 == 25
"""
TABLE = []
for line in CASES.strip().splitlines():
    if line.startswith("# "):
        kind = line[2:]
        continue
    right = " == " in line
    TABLE.append((kind, *line.split(" == " if right else " != ", 1), right))


@pytest.mark.parametrize(
    ("kind", "prediction", "gold", "right"), TABLE, ids=lambda value: str(value)[:30]
)
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


# options, gold; answers that are right | answers that are wrong
CHOICES = [
    (
        ["10", "20", "30", "40"],
        "B",
        (
            r"B 20|20 (B)|Answer: B|(B)|The answer is B.|B: 20|B - 20|b|B, 20|option B|"
            r"Option (B)|**B**|B. 20 units|选B|答案：B|故选B|答案选B|B选项|应选 (B)|"
            r"The correct answer is B.|The correct option is (B) 20|B is correct|"
            r"B is the correct answer|20|twenty|B) 20|[B]|\boxed{B}|\text{(B)}|It is B|"
            r"I choose B|B because 20 is right|So B|The answer is option B: 20|"
            r"the answer is 20 (B)|the answer is 20, option B"
        ),
        (
            r"A|C|D|E|B or C|B, C|B and C|BC|B/C|B or maybe C|not B|B? C|(A) 20|A 20|20 (A)|"
            r"30 (B)|B 30|B. 30|B: 21|B, C, D|A or B|A, B|All|none|10 20|10 or 20|(B) or (C)|"
            r"B; C|B C|The answer is B or C|B. C|Not (B)|A not B|anything but B|Either B or C|"
            r"B but could be C|200|2|B 2|-20|20 or 30|any of them|B = C|C (B)|B (C)|"
            r"A: 10, B: 20|10, 20|答案不是B|B或C|非B"
        ),
    ),
    (
        ["the red car", "the blue car", "the green car", "none of these"],
        "C",
        (
            r"C, the green car|C. the gren car|C: the green ca|C the green car|C. The green|"
            r"(C) green car|green car|The green car.|It is the green car|C — the green car|"
            r"C) the green car, because it is fast"
        ),
        (
            r"C, the red car|C. none of these|green|car|the car|D. the green car|"
            r"B, the green car|C. the blue ca|not the green car|the green car or the blue car|"
            r"green car and red car|none of these|A the green car|C is wrong|C, not D|C or D"
        ),
    ),
    (
        ["<", ">", "=", "cannot be determined"],
        "C",
        r"C|(C)|=|$=$|C. =|(C) =|C: =|The answer is C",
        r"<|>|A|B|A. =|C. <|(C) >|≠|\neq|==>|D|=<",
    ),
    (
        ["<", ">", "=", "cannot be determined"],
        "B",
        r"B|>|$>$|\gt|B. >|(B) $>$|>.",
        r"<|=|A|≥|C. >|>=|<>|B. <",
    ),
    (
        ["A", "B", "C", "E", "Impossible to determine"],
        "D",
        r"D|(D)|Answer: D|D. E|(D) E|the answer is D",
        (
            r"E|A|B|C|the answer is E|(E)|E. Impossible to determine|D. A|D. C|"
            r"Impossible to determine"
        ),
    ),
    (
        ["A", "B", "C", "E", "Impossible to determine"],
        "E",
        (
            r"E|the answer is E|(E) Impossible to determine|Impossible to determine|"
            r"E. Impossible"
        ),
        r"D|D. E|A",
    ),
    (
        ["Yes", "No"],
        "A",
        r"A|Yes|yes.|A. Yes|Yes, it is|The answer is yes",
        r"B|No|B. Yes|A. No|Yes and no|Yes or no",
    ),
    (
        ["increases", "decreases", "stays the same"],
        "A",
        r"A|increases|A. increase|It increases|A, increases",
        r"decreases|A. decreases|B|B. increases|A or B|does not increase",
    ),
    (
        ["$2\\sqrt{3}$", "$3\\sqrt{2}$", "$\\sqrt{6}$", "No correct answer"],
        "A",
        r"\sqrt{12}|2√3|A. 2√3|A. \sqrt{12}|A",
        r"A. 3√2|3\sqrt{2}|2|\sqrt 6|A. 2|No correct answer",
    ),
    (
        ["30°", "60°", "90°", "120°"],
        "60",
        r"B|60|60°|(B) 60°|60 degrees|B. 60",
        r"A|30|B. 30|C|60 rad",
    ),
    (
        [
            "text one",
            "text two",
            "text three",
            "text four",
            "text five",
            "text six",
            "text seven",
            "text eight",
            "text nine",
            "text ten",
        ],
        "J",
        r"J|(J)|text ten|J. text ten",
        r"I|A|text one|J. text one|text|ten text|H or J",
    ),
]


@pytest.mark.parametrize(("options", "gold", "right", "wrong"), CHOICES)
def test_choices(options, gold, right, wrong):
    assert [text for text in right.split("|") if not verify(text, gold, options)] == []
    assert [text for text in wrong.split("|") if verify(text, gold, options)] == []


def test_letters_as_options():
    """Options may be letters themselves, shifted: the letter given is then the option's letter."""
    assert verify("D", "D", ["A", "B", "C", "E"]) and not verify("E", "D", ["A", "B", "C", "E"])
    assert verify("B", "B", ["B", "A"]) and not verify("A", "B", ["B", "A"])


@pytest.mark.parametrize("mark", ["\u00ad", "\u200b", "\u200d", "\u200e", "\u2060", "\ufeff"])
def test_characters_that_nobody_sees(mark):
    """They neither hide an answer nor join two of them."""
    assert verify(f"{mark}5{mark}", "5") and verify(f"C{mark}", "C") and verify("7", f"7{mark}")
    assert (
        not verify(f"5{mark}6", "5")
        and not verify(f"5{mark}6", "56")
        and not verify(f"C{mark}D", "C")
    )


def readme_examples():
    """The table under 'What is counted right' -> answer, gold, options, right."""
    text = (
        (Path(__file__).parents[1] / "README.md")
        .read_text()
        .partition("**What is counted right.**")[2]
    )
    for line in re.findall(r"(?m)^\| `.*", text.partition("\nNot counted right")[0]):
        answers, gold, verdict = line.strip("| ").split(" | ")
        gold, _, option = gold.partition(", where option B is ")
        for answer in re.findall("`(.*?)`", answers):
            yield (
                answer,
                gold.strip("`"),
                ["0", option.strip("`")] if option else None,
                verdict.startswith("right"),
            )


def test_readme():
    rows = list(readme_examples())
    assert (
        len(rows) == 11 and sum(row[3] for row in rows) == 5
    )  # ten lines, one of them with two answers
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
    assert reward(text, "7") == {
        "score": pytest.approx(score),
        "accuracy": accuracy,
        "format": form,
    }


def test_reward_options():
    assert (
        reward(GOOD.format("30°"), "A", OPTIONS)["accuracy"] == 1
        and reward(GOOD.format("B"), ["A", "C"], OPTIONS)["accuracy"] == 0
    )


# --------------------------------------------------------------------------------------- properties
UNITS = ["cm", "m", "kg", "s", "°", "cm^2", "m/s", "dollars", "apples"]
numbers = st.one_of(
    st.integers(-(10**9), 10**9).map(str), st.decimals(-1000, 1000, places=3).map(str)
)
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
    assert verify(f"{a * k}/{b * k}", rf"\frac{{{a}}}{{{b}}}") and verify(
        rf"\dfrac{{{a}}}{{{b}}}", f"{a * k}/{b * k}"
    )
    assert not verify(f"{a}/{b}", f"{a + 1}/{b}") and not verify(
        f"{a}/{b} or {a + 1}/{b}", f"{a}/{b}"
    )


@quick
@given(numbers, st.sampled_from(UNITS), st.sampled_from(UNITS))
def test_a_unit_flips(number, one, other):
    assert verify(f"{number} {one}", number) and verify(number, f"{number} {one}")
    assert verify(f"{number} {one}", f"{number} {other}") == (one == other)


@quick
@given(
    numbers,
    numbers,
    st.sampled_from(["()", "[]", "(]", "[)", "{}"]),
    st.sampled_from(["()", "[]", "(]", "[)", "{}"]),
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


# ----------------------------------------------------------------------- any input, in bounded time
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
    start = time.thread_time()
    right = verify(prediction, gold)
    assert isinstance(right, bool)
    assert time.thread_time() - start < BOUND, (prediction[:80], gold[:80])
    return right


def test_random_strings():
    rng = random.Random(0)
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
    "sets of sets": "{"
    + ",".join("{" + ",".join(f"{i}{j}" for j in range(9)) + "}" for i in range(12))
    + "}",
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
    "chinese": "是" * 990,
    "enumeration": r"(1) \log_2" * 90,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name):
    text = HOSTILE[name]
    for prediction, gold in [(text, r"2\sqrt{3}"), (text, "{1,2}"), ("5", text)]:
        assert not timed(prediction, gold) or name in {"spaces", "few brackets", "units"}
    assert timed(text, text)
    start = time.thread_time()
    accuracy = reward(f"<caption>c</caption><think>t</think><answer>{text}</answer>", "5")[
        "accuracy"
    ]
    assert time.thread_time() - start < BOUND
    assert not accuracy or name in {"spaces", "few brackets", "units"}


def test_repeated_pieces():
    """No pattern backtracks: every piece, and every two, a thousand characters long."""
    pieces = [
        *ALPHABET,
        "是",
        "选",
        "(1) ",
        "x=",
        "cm ",
        "e^{",
        "1 000 ",
        "one ",
        r"\log_2",
        "A. ",
        "the ",
    ]
    for first in pieces:
        for second in ("", *random.Random(ascii(first)).sample(pieces, 2)):
            text = ((first + second) * 1000)[:990]
            timed(text, "5 cm")
            timed(f"5 {text}"[:990], "{1, 2}")


BOMBS = [
    *(tower * 9 + str(base) for base in (2, 9, 99) for tower in (f"{base}^", f"{base}**")),
    *(f"{base}^{{" * 25 + "9" + "}" * 25 for base in (2, 9, "e", "x", r"\pi")),
    *(
        f"{sign}{base}^{{{base}^{{{base}^{{9}}}}}}"
        for base in (3, 7, 99)
        for sign in ("", "-", "1/")
    ),
    *(f"({n}!)!" for n in (9, 99, 999, "9!")),
    *(rf"\binom{{10^{n}}}{{10^{n - 1}}}" for n in (4, 9, 99)),
    *(rf"\{name}(10^{{10^{{{n}}}}})" for name in ("sin", "ln", "exp", "tan") for n in (3, 9, 99)),
    *(rf"\{name} " * 25 + "9" for name in ("sin", "exp", "sqrt", "ln")),
    *("e^{" * n + "9" + "}" * n for n in (2, 3, 4, 9)),
    *(f"({'+'.join([text] * 40)})^{{99}}" for text in (r"\sqrt{2}", "x", r"\pi", "1/7")),
    *(
        "*".join([text] * 60)
        for text in ("99999999!", r"\sqrt{3}", "9^{99}", "(x+1)^{99}", "e^{x}")
    ),
    *(
        "{" + ",".join([text] * 11) + "}"
        for text in ("x^{x^{x}}", r"e^{e^{5}}", r"\sqrt{\sqrt{x}}")
    ),
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb):
    """Too large to compute: refused at once, from either side, unless it is the same text."""
    for prediction, gold in [(bomb, "5"), (bomb, r"2\sqrt{3}+x"), (bomb, f"{bomb}+1"), ("5", bomb)]:
        assert not timed(prediction, gold)
    assert timed(bomb, bomb)


BESIDE = """
    after before until since almost nearly beyond excluding minus plus times twice half
    double under over above below within past modulo approaching not without besides except
    like unlike opposite multiples~of a~multiple~of factors~of the~square~of the~root~of
    one~less~than greater~than a~number~near anything~like other~than everything~but one~of
    any~of numbers~ending~in the~next~after the~sum~of the~inverse~of the~complement~of
    two~times the~double~of
""".split()
BEHIND = """
    squared cubed factorial halves tenths dozen hundred thousand million percent more fewer
    less short too~many times~that at~most at~least or~so or~more and~up plus minus
    and~a~half if~true if~not else when~odd unless~even but~no maybe perhaps? is~wrong
    is~not~it is~false was~wrong ago later through~9 to~9 out~of~9 and~9 or~9 versus~9 mod~9
    base~9 choose~2 of~9 then~9 9 ± - + / ^ ! _ | =6 >4 <6 ≠6 e1 x %% ?
""".split()
BETWEEN = (
    "{a} {b}@{a},{b}@{a};{b}@{a}/{b}@{a}|{b}@{a} & {b}@{a}\n{b}@{{{a}, {b}}}@[{a}, {b}]@({a}, {b})"
)
REFUSED = [
    *(f"{word.replace('~', ' ')} 7" for word in BESIDE),
    *(f"The answer is {word.replace('~', ' ')} 7" for word in BESIDE),
    *(f"7 {word.replace('~', ' ')}" for word in BEHIND),
    *(text.format(a=a, b=b) for text in BETWEEN.split("@") for a, b in ((7, 8), (6, 7))),
    *(
        rf"{name} 7"
        for name in (r"\sin", r"\ln", r"\sqrt", r"\log", r"\overline", r"\neg", r"\exp")
    ),
]


def test_two_hundred_answers_that_hint_at_seven():
    """By rule: a word or mark beside the number, or another number; none of them says 7."""
    assert len(set(REFUSED)) >= 170
    assert [text for text in REFUSED if verify(text, "7") or verify(text, "$7$", None)] == []


def test_two_letters_are_no_choice():
    joints = [
        " or ",
        " and ",
        ", ",
        "/",
        " ",
        "",
        "; ",
        " & ",
        "|",
        " / ",
        ". ",
        ") ",
        ": ",
        " but ",
        "和",
        "或",
    ]
    texts = [
        f"{lead}{a}{joint}{b}"
        for joint in joints
        for a, b in ("BC", "CB")
        for lead in ("", "Answer: ")
    ]
    assert [text for text in texts if verify(text, "B", ["10", "20", "30", "40"])] == []


# ------------------------------------------------------------- the same verdicts whatever else runs
def verdicts(cases):
    return [verify(prediction, gold) for _, prediction, gold, _ in cases]


def forget():
    for cached in (verify_module.values, verify_module.tokenize, verify_module.parse_quantity):
        cached.cache_clear()
    verify_module.clean.cache_clear()


def test_threads_and_load():
    """One thread alone and eight threads beside four busy processes agree on every answer."""
    cases = TABLE + [("bomb", bomb, "5", False) for bomb in BOMBS]
    forget()
    alone, found = verdicts(cases), {}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        forget()
        order = {n: cases[n * 97 % len(cases) :] + cases[: n * 97 % len(cases)] for n in range(8)}
        work = [
            threading.Thread(target=lambda n=n: found.update({n: verdicts(order[n])}))
            for n in order
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    right = {case: verdict for case, verdict in zip(cases, alone)}
    differences = [
        case for n in order for case, said in zip(order[n], found[n]) if said != right[case]
    ]
    assert len(found) == 8 and differences == []


def test_forked_workers():
    """A worker that is forked while other threads verify gives the same verdicts."""
    cases = TABLE[::7]
    expected, stop = verdicts(cases), threading.Event()
    forget()
    thread = threading.Thread(target=lambda: [verdicts(cases) for _ in iter(stop.is_set, True)])
    thread.start()
    try:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(verdicts, [cases] * 4) == [expected] * 4
    finally:
        stop.set()
        thread.join()


FRESH = r"""
import signal, sys, threading
sys.path.insert(0, sys.argv[1])
from verify import verify
def state():
    handlers = [signal.getsignal(s) for s in signal.valid_signals()]
    return handlers, signal.getitimer(signal.ITIMER_REAL), sys.getrecursionlimit()
before = state()
assert verify("1,234.50", "1234.5") and verify("(1/2, 3)", "(0.5,3)")
assert verify(r"\sqrt{8}", r"2\sqrt{2}") and not verify("9^{9^{9^{9}}}", "5+x")
assert not {"torch", "sympy", "latex2sympy2_extended"} & set(sys.modules)
assert before == state() and threading.active_count() == 1
"""


def test_fresh_process():
    """No torch, no sympy, no signal handlers, no threads."""
    subprocess.run(
        [sys.executable, "-c", FRESH, str(Path(__file__).parents[1])], check=True, timeout=120
    )


def test_verify_alone_in_an_empty_folder(tmp_path):
    """Copied without any other file of ours it needs mpmath and nothing else."""
    script = """
import sys
from verify import verify
assert verify(r"x = \\frac{1}{2}", "0.5") and verify("(B)", "B", ["1", "2"])
assert verify(r"\\sqrt{8}", r"2\\sqrt{2}") and not verify("3 or 4", "3")
found = {name.partition(".")[0] for name in sys.modules}
print(sorted(found & {"torch", "transformers", "sympy", "numpy", "mpmath", "runtime", "data"}))
"""
    assert run_alone(tmp_path, ["verify.py"], script).strip() == "['mpmath']"


@pytest.mark.parametrize(
    "prediction, gold, right",
    [("72", "72_8", True), ("72_8", "72_8", True), ("72_{8}", "72_8", True), ("72_7", "72_8", False),
     ("73", "72_8", False), ("72", "72", True), ("72_8", "72", False),
     ("A, C", "AC", True), ("A and C", "AC", True), ("AC", "AC", True), ("A,C,D", "ACD", True),
     ("A", "AC", False), ("A, B", "AC", False), ("A or C", "AC", False), ("C", "AC", False),
     ("A, B, C", "AC", False), ("A, C", "CA", False)],
)  # fmt: skip
def test_a_base_and_several_letters(prediction, gold, right):
    """A gold with its base may be said without it; letters in order are several choices."""
    assert verify(prediction, gold) == right


@pytest.mark.parametrize(
    "question, said, gold, right",
    [("What per cent is red?", "62%", "62", True), ("What is the percentage?", "62", "62%", True),
     ("How many % are red?", "62 %", 62, True), ("What percent?", "0.62", "62", True),
     ("What percent?", "63%", "62", False), ("How many are red?", "62%", "62", False),
     ("How many are red?", "62", "62%", False), ("What percent?", "red%", "red", False)],
)  # fmt: skip
def test_per_cent_where_the_question_speaks_of_it(question, said, gold, right):
    assert verify(said, with_percent(gold, question)) == right


def test_timeouts_are_counted():
    before = timeouts()
    assert not verify("9^{9^{9}}+1", "9^{9^{9}}+2") and timeouts() > before
    before = timeouts()
    assert verify("2^{10}", "1024") and timeouts() == before


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (3, ["3", "3.0", "three"], ["4", "", "None"]),
        (2.5, ["2.5", "5/2"], ["2", "25"]),
        (1e-7, ["1e-7", "0.0000001"], ["0", "1e-8"]),
        (0, ["0", "-0"], ["1", "no", "None", "false", ""]),
        (True, ["true", "Yes", "yes, it is"], ["false", "no", "1"]),
        (False, ["False", "no"], ["true", "0", ""]),
        (None, [], ["None", "", "null", "0"]),
        (float("nan"), [], ["nan", "0", ""]),
        ([None, 4, "5"], ["4", "5"], ["None", "45", "4, 5"]),
        ([], [], ["", "5"]),
        ({"a": 1}, [], ["1", "{'a': 1}"]),
    ],
)
def test_golds_of_any_type(gold, right, wrong):
    assert all(verify(text, gold) for text in right) and not any(
        verify(text, gold) for text in wrong
    )
    assert not verify(None, gold) and not verify(5.0, gold)


# -------------------------------------------------------------------------- rows of real benchmarks
def check_options(gold, options):
    """The right option is accepted by letter and text, every other one is refused by both."""
    letters = "ABCDEFGHIJ"[: len(options)]
    texts = dict(zip(letters, options))
    for letter, text in texts.items():
        said = [letter, f"({letter})", f"{letter}. {text}", f"The answer is ({letter}) {text}."]
        said += [text] if text not in letters else []  # an option E among D's texts is the letter E
        for answer in said:
            assert verify(answer, gold, options) is (letter == gold), (answer, gold, options)
        if letter != gold and text != texts[gold]:
            assert not verify(f"{gold}. {text}", gold, options), (gold, text)


MADE_UP = [
    ("B", ["$6", "$7", "$8", "$9"]),
    ("A", ["9.75kips compression", "5.75kips compression", "7.75kips compression"]),
    ("C", [r"$\pi$", r"$1.5 \pi$", r"$2 \pi$", r"$3 \pi$", "Not enough data"]),
    ("D", ["A", "B", "C", "E", "Impossible to determine"]),
    ("E", [r"$a>0$", r"$b<0$", r"$a+b+c<0$", r"$b^{2}>4 a c$", r"$c<0$"]),
    ("B", ["... only be 3.", "... be 3 or 4.", "... be 4 or 5.", "... only be 5."]),
    (
        "A",
        ["Unemployment remained the same.", "Unemployment decreased.", "Unemployment increased."],
    ),
    ("B", ["1 and 5", "1 and 3", "2 and 4", "6 and 7", "7 and 8"]),
    ("C", [r"$36 \mathrm{~cm}^{2}$", r"$45 \mathrm{~cm}^{2}$", r"$54 \mathrm{~cm}^{2}$"]),
    ("D", ["$3,5,4,2,1$", "$3,4,5,1,2$", "$3,2,1,4,5$", "$3,1,2,4,5$"]),
    ("A", ["<", ">", "=", "cannot be determined"]),
    ("C", ["<", ">", "=", "cannot be determined"]),
    ("C", ["Zero", "5 A, counterclockwise", "5 A, clockwise", "20 A, counterclockwise"]),
    ("D", ["2h 48m", "2h 59m", "3h 39m", "3h 41m", "3h 49m"]),
]


@pytest.mark.parametrize(("gold", "options"), MADE_UP)
def test_rows_with_options(gold, options):
    check_options(gold, options)


REAL = Path(__file__).parents[2] / "shared" / "real_rows"


@pytest.mark.skipif(
    not REAL.is_dir(), reason="needs ../shared/real_rows: rows of the published benchmarks"
)
def test_real_rows():
    """Every row accepts its gold and refuses every other option, or the gold of any other row."""
    count = 0
    for file in sorted(REAL.rglob("*.jsonl")):
        free = []
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            gold = row["answer"] if "answer" in row else ("no", "yes")[int(row["gt_answer"])]
            options = row.get("options") or list((row.get("index2ans") or {}).values())
            options = options or re.findall(r"(?m)^([A-J]):(.*)", row.get("query_wo", ""))
            options = [text if isinstance(text, str) else text[1] for text in options]
            count += 1
            if options:
                check_options(gold, options)
            else:
                free.append(gold)
        for gold in free:
            first = gold[0] if isinstance(gold, list) else gold
            assert verify(first, gold) and verify(f"The answer is {first}.", gold), gold
            others = [other for other in free if isinstance(other, str) and other != gold]
            assert [other for other in others if verify(other, gold)] == [], gold
    assert count > 150
