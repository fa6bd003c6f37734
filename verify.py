r"""Is an answer right?  verify(prediction, gold, options); imports nothing of ours, can be copied.

A wrong acceptance is a reward hack that the policy will find, a wrong rejection is a lost signal:
strict about what an answer says, lenient about how it is written.  A word beside the answer that
is not known to be harmless means no.  The steps, in order, one section each:

    words       what may stand beside an answer, and what makes it another; names of units
    clean       any text -> one notation: unicode, LaTeX mark-up, spacing, spoken numbers, Chinese
    expression  sums, powers, roots, functions: computed exactly, or with so many digits that no
                other number of this length has them
    statement   one item: a range, a time, an equation or inequality, a quantity with its unit
    content     points, intervals, sets, matrices, solutions -> their items
    answer      the same words; yes or no; the same content; a sentence that says one thing
    choice      with options a clear letter decides, else the option's text stands for it

What is accepted, as a grammar ([] is optional, * repeated, | or):

    answer     [lead] content [judgement]           'So the answer is 5.'  'B is correct'  '答案是5'
    choice     letter [mark text] | text (letter)   'B'  '(B) 40'  'B: 40'  'C, the car'  '20 (B)'
    content    [name =] (item | [open] item [, item]* [close])   '(x, y) = (3, 4)'  'x_1=2, x_2=3'
    item       range | relation | quantity | content      '18-29'  '1 <= x < 3', which is [1, 3)
    relation   sum [operator sum]*                        'y = 2x + 1'  '6 * 7 = 42'
    quantity   [currency] sum [scale] [unit]              '$5 million'  '3 red apples'  '20%' is 1/5
    sum        [-] product [(+ | -) product]*
    product    power [[* | / | :] power]*                 from the left: 1/2x is (1/2)x
    power      atom [^ atom | ! | °]*
    atom       number | letter[_index] | (sum) | |sum| | \frac ab | \sqrt[n]a | \binom nk
               | function [^n] power*                     \sin 2x \cos x is (\sin 2x)(\cos x)

Letters are numbers: expressions are equal if they agree at all of six fixed points at which both
are real, two at least.  At the last two all letters are positive, as lengths are: that admits
\sqrt{ab} = \sqrt a \sqrt b and \ln x^2 = 2 \ln x, of which one side is not real elsewhere, but not
\sqrt{x^2} = x.  A decimal stands for another value from six significant digits on; 1e-9 is not 0.
An interval may be written as a point (1, 3), so 1 < x < 3 is that too.  Nothing is converted.

No clock runs: numbers beyond 8192 bits (1e250 where roots are taken), long irrational expressions
and deep nesting are refused.  So a verdict depends on no load, thread or process; `timeouts` counts
the refusals.  Unlike the authors' verifier: units, brackets and the whole expression count.
"""

import math
import operator
import re
import unicodedata
import zlib
from difflib import get_close_matches
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from mpmath.ctx_mp import MPContext

MAX_CHARS, MAX_SET = 1000, 12  # longer answers are compared as text, larger sets in order
MAX_BITS, MAX_DEPTH = 8192, 30  # of a numerator or denominator; of brackets in each other
LETTERS = "ABCDEFGHIJ"  # of options
YES_NO = {"yes": True, "true": True, "no": False, "false": False}


# ------------------------------------------------------------------------------------------- words
def one_of(words):
    """'more less' -> a pattern for one of these words, in any case; ~ in a word is a space."""
    return rf"(?i:\b(?:{'|'.join(words.split())})\b)".replace("~", " ")


ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMERALS = dict(zip(ONES + TENS, [*range(20), *range(20, 100, 10)]))
SPOKEN = rf"(?:{'|'.join(TENS)})(?:[- ](?:{'|'.join(ONES[1:10])}))?|{'|'.join(ONES)}"
PARTS = "half third quarter fifth sixth seventh eighth ninth tenth".split()  # 1/2, 1/3, ..
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "亿": 8}
HEDGE = re.compile(  # says two things, nothing, or the opposite
    r"[?±不非没無无未除或以余多几超至百千十左]|(?i:\w+n't\b)|"
    + one_of(r"""or n?either nor maybe perhaps possibly probably might could unsure not no never
    cannot wrong incorrect false but except exclud\w+ instead rather without unless unlikely hardly
    doubt\w* impossible opposite other~than far~from such~as beside besides if else versus vs any
    anything everything everyone all every none some guess one~of""")
)
CHANGES = """hal(?:f|ves) twice double triple minus plus times than less fewer more multiples?
    divisors? factors? reciprocal inverse negation before after until remainder"""
SUBJECT = re.compile(one_of(CHANGES))  # 'Half of the answer is 5'
CHANGE = re.compile(  # beside a number they make it another; 'the area under the third curve is 5'
    one_of(CHANGES + r""" least most under over above below within exceed\w* too squared? cubed?
    factorial roots? log negative double\w* triple\w* thirds? quarters? dozens? grand hundreds?
    (?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths? thousands? [mbtr]+illions? divided
    multipl\w+ complement supplement sum product difference till since past almost nearly between
    short off out and point modulo base power through minimum maximum ago later earlier pairs? """
    + " ".join(NUMERALS))
)  # fmt: skip
LEADS = [re.compile(  # 'The answer is', 'So the length of AB equals', 'Answer:'; last, first
    rf"(?s).*{lazy}(?:"
    + one_of("""is are was were be equals?(?:~to)? has have had shows? contains? choose select pick
    get gets gives? got find found obtain becomes? measures? takes? needs? costs? counted? so thus
    hence therefore (?:answer|option|choice)(?:~is)?""")
    + r"|(?<=[a-z]{2}):)[\s:,]*"
) for lazy in ("", "?")]  # fmt: skip
LABEL = re.compile(  # 'Year 2014', 'in 2014', 'a total of 5'
    r"(?i)(?:(?:in|on|at) )?(?:(?:the )?(?:year|point) |a total of |"
    r"(?:total|exactly|only|just|precisely|it|they|it's) )?"
)
JUDGEMENT = re.compile(  # 'B is the correct answer'
    r"(?i)\s+(?:is|are) (?:(?:the )?(?:(?:correct|right|final|best) )?(?:answer|option|choice|one)"
    r"|correct|right)$"
)
UNITS = """mm millimeter millimetre 毫米;cm centimeter centimetre 厘米;dm decimeter decimetre 分米;
    m meter metre 米;km kilometer kilometre 千米 公里;μm micrometer;nm nanometer;in inch inches;
    ft foot feet;yd yard;mi mile;mg milligram;g gram 克;kg kilogram 千克 公斤;t ton tonne 吨;
    lb pound lbs;oz ounce;ms millisecond;s sec second 秒;min minute 分钟;h hr hour 小时;day 天;
    week 周;month 月;yr year 年;ml milliliter millilitre 毫升;l liter litre 升;gal gallon;
    ° deg degree 度;rad radian;°c celsius 摄氏度;°f fahrenheit;k kelvin;hz hertz;khz;megahz;ghz;
    n newton;kn;j joule;kj;megaj;w watt;kw kilowatt;mw;megaw megawatt;kwh;v volt;kv;mv;a amp ampere;
    ma;ω ohm;kω;megaω;pa pascal;kpa;megapa;mol mole;cal calorie;kcal;mph;% percent pct percentage;
    $ dollar usd;unit;€ euro eur;£ gbp;¥ yuan 元 rmb;¢ cent"""
ALIAS = {name + s: row.split()[0] for row in UNITS.split(";") for name in row.split()
         for s in ("", "s")[: len(name)]} | {"": ""}  # fmt: skip


# ------------------------------------------------------------------------------------------- clean
GREEK = "alpha beta gamma delta theta lambda pi rho sigma tau phi omega".split()
CHARACTERS = str.maketrans(
    dict(zip("−–—⁄÷∶×·⋅∙≈∈’‘“”。、⟨⟩掳", "---//:****==''\"\".,()°"))
    | {"∞": r"\infty ", "∠": "angle ", "△": "triangle ", "√": r"\sqrt ", "∴": " ", "或": " or "}
    | {"和": " and "}
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", " ")  # not seen: no letter
    | {unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('bd', 'd')}"): f"\\{name} "
       for name in GREEK}
)  # fmt: skip
COMMANDS = r"""times * cdot * div / ** ^ approx = sim = in = == = <= ≤ le ≤ leq ≤ leqslant ≤ >= ≥
    ge ≥ geq ≥ geqslant ≥ ne ≠ neq ≠ lt < gt > cup ∪ pm ± circ ° degree ° dfrac \frac tfrac \frac
    cfrac \frac Omega Ω mu μ emptyset ∅ varnothing ∅ lbrace { rbrace } langle ( rangle ) vert |
    lvert | rvert | colon :""".split()
COMMANDS = dict(zip(COMMANDS[::2], COMMANDS[1::2])) | {"angle": "angle ", "triangle": "triangle "}
COMMANDS |= dict.fromkeys("left right quad qquad displaystyle therefore because".split(), " ")


def repeating(match):
    """0.1\\overline{6}: whole '0', start '1', period '6' -> its fraction (16 - 1) / 90 in LaTeX."""
    whole, start, period = match.groups()
    numerator = int(whole + start + period) - int(whole + start or 0)
    return rf"\frac{{{numerator}}}{{{10 ** len(start + period) - 10 ** len(start)}}}"


def matrix(match):
    """The inside of a LaTeX matrix, or '1 2; 3 4' -> '[[1, 2],[3, 4]]'."""
    rows = [row.strip() for row in re.split(r"\\\\|;", match[1] or match[2]) if row.strip()]
    between = r"\s*&\s*" if match[1] else r"\s*,\s*|\s+"
    return "[" + ",".join(f"[{', '.join(re.split(between, row))}]" for row in rows) + "]"


def part(match):
    """'3 quarters' -> '3/4', 'a third' -> '1/3', '2 and a half' -> '(2+1/2)', 'half' -> '1/2'."""
    whole, count, name = match.groups()
    size = PARTS.index(name.lower()) + 2 if name else 2
    return f"({whole}+1/{size})" if whole else f"{count or 1}/{size}"


REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    # matrices: an environment of LaTeX, or '[1 2; 3 4]'
    (r"(?s)(?:\\left\s*[(\[]\s*)?\\begin\s*\{(?:[pbB]?matrix|smallmatrix|array)\}"
     r"(?:\{[lcr| ]*\})?(.*?)\\end\s*\{\w+\}(?:\s*\\right\s*[)\]])?"
     r"|^\[\s*((?:[^\s;,\[\]()]+[ ,]+)+[^\s;,\[\]()]+\s*;[^\[\]()]*)\]$", matrix),
    # math mode and spaces; bold, quoted, a heading or the mark of a final answer
    (r"(?<!\\)\$(.*?)(?<!\\)\$|\\[\[\]()!]|\\[,;: ]|[~\s]+", r" \1 "),
    (r"(?<![\w)])\*\*(?=\S)(.+?)\*\*(?![\w(])|^['`](.*)['`]$", r"\1\2"),
    (r"^(?:#+ +|(?i:final answer) +(?=[^\s:]))", ""),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}", repeating),
    # fonts and words inside of formulas; \overline over two letters, over one it is a complement
    (r"\\(?:text\w*|math\w+|operatorname|mbox|underline|emph|boldsymbol|bm)\s*\{([^{}]*)\}",
     r" \1 "),
    (r"\\(?:vec|hat|(?:overline|bar)(?=\s*\{[A-Za-z]{2}))\s*\{([A-Za-z][^{}]*)\}", r" \1 "),
    (r"\\([%${}&#|])|\{(,)\}", r"\1\2"),
    (r"\\([A-Za-z]+)|[<>=]=|\*\*", lambda match: COMMANDS.get(match[1] or match[0], match[0])),
    (r"\s+", " "),
    # degrees, of a temperature, or of a true bearing
    (r"\s*\^\s*\{?\s*°\s*\}?|\s+°", "°"), (r"°\s*T(?![A-Za-z])", "°"),
    (r"(?i)(?:°| ?\bdegrees?) ?(c(?:elsius)?|f(?:ahrenheit)?)\b", lambda match: f"°{match[1][0]}"),
    # infinity has no sign but minus; functions without their backslash
    (r"(?i)(?<![\\a-z])(?:positive )?infinity(?![a-z])", r"\\infty "),
    (r"(?i)\bnegative (?=\\infty|[\d\\])", "-"), (r"(?<![\w)}\]])\+\s*(?=\\infty)", ""),
    (r"(?<![\\A-Za-z])(sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|log|ln|exp|pi)(?![A-Za-z])",
     r"\\\1 "),
    # arguments without braces; x between digits is a multiplication; '1 234' is a number
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"(\\sqrt|\^)\s*\(([^()]*)\)", r"\1{\2}"),
    (r"\s*([\^_])\s*(?:(-?\d+|[A-Za-z])|\{([^{}]*)\})", r"\1{\2\3}"),
    (r"(?<=\d)(?<!\b0)\s*x\s*(?=\d)", "*"),
    (r"(?<![\d.,])(?<!\d )\d{1,3}(?: \d{3})+(?![\d/]| \d)",
     lambda match: match[0].replace(" ", "")),
    # '03:45 p.m.' -> '3:45 pm'
    (r"(?i)(?<=\d)\s*([ap])\.?m\b\.?", lambda match: f" {match[1].lower()}m"),
    (r"^0(?=\d:\d\d)", ""),
    # Chinese before an answer: '面积是', then '所以答案是', '应选', '约', no denial; then behind it
    (r"^(?:(?![不非没无未除或大小超多少])[一-龥]){1,8}(?:是|为|等于)(?=[-\dA-Za-z(\[{\\$])", ""),
    (r"^(?:所以|因此|因而|故|则|本题|最终|最后|正确|答案|应该?|选择|选项?|结果|的|是|为|等于|约|"
     r"大约|共|一共|总共|有|[:,\s])+(?=[-\dA-Za-z(\[{\\$])", ""),
    (r"(?<=[A-J])\s*选?项(?:是?正确的?|对)?$", ""),
    # spoken numbers, at the start only: 'six, so 5' says six
    (rf"(?i)^(?:{SPOKEN})\b(?!-[^hqtfsen])",
     lambda match: str(sum(NUMERALS[word] for word in re.split("[- ]", match[0].lower())))),
    (rf"(?i)^(?:(\d+) and (?:an?|1) |(?:(\d+)|an?|one)[ -])({'|'.join(PARTS)})s?$|^half$", part),
    # what says nothing: 'about 5', '5 because ..'
    (r"(?i)\b(?:approximately|approx\.?|about|around|roughly) (?=[-\d$\\.])", ""),
    (r"(?i)\b(?:because|since)\b.*", ""),
]]  # fmt: skip
BOX = re.compile(  # \boxed{..}, alone, with braces inside that are at most two deep
    r"(?<!\w)\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}(?!\w)"
)


@lru_cache(maxsize=1 << 14)
def clean(text):
    """Any text -> one notation: NFKC, ASCII operators, no mark-up."""
    # indices and vulgar fractions go first: NFKC would make 52 of 5² and 11/2 of 1½
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", r"^{\g<0>}", text.replace("º", "°").replace("˚", "°"))
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", r"_{\g<0>}", text)
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)).translate(CHARACTERS)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text.strip())
    boxes = BOX.findall(text)
    if len(boxes) == 1 and not HEDGE.search(text.replace(boxes[0], "")):
        text = boxes[0]
    bare = text.lstrip(' `*"=').rstrip(' `*".,;:')
    return bare or text.strip()  # '=' may be an answer


def plain_words(text):
    """Text without case, articles and punctuation, but for marks between digits: 'The red car!' ->
    'red car'."""
    between = r"(?<=[a-z]{2})-(?=[a-z]{2})|(?<!\d)[.,:;!\"]+|[.,:;!\"]+(?!\d)"
    text = re.sub(between, " ", text.casefold())
    return " ".join(re.sub(r"\b(?:an?|the)\s+(?=\w)", "", text).split())


# -------------------------------------------------------------------------------------- expression
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
OPERATORS |= {":": operator.truediv, "": operator.mul}  # "": side by side
BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, ":": 2, "": 2, "^": 3, "!": 3, "°": 3}
CLOSING = {"(": ")", "[": "]", "{": "}"}
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
TOKEN = re.compile(  # a number, a command or letters, either with an index, or any other mark
    rf"{DIGITS}(?:[eE][-+]?\d{{1,3}}(?![\d.]))?|\\?[A-Za-z]+(?:_\{{\w*\}})?|\S"
)
MIXED = re.compile(r"(?<![\d.}])(\d+)(?: ?\\frac\{(\d+)\}\{(\d+)\}| (\d+)/(\d+)(?![\d.]))")
UNCLEAR = re.compile(  # numbers side by side, 5!!, 9^9^9, 1:2:3; signs in a row, a function f(x)
    r"[\d)]\s+[\d.(]|!!|\^(?:\{[^{}]*\}|\w)\^|:.*:|"
    r"[-+]\s*[-+]\s*[-+]|^[-+]\s*[-+]|[fgh]\s?\("
)
POINTS = (1, 1, 1, 1, 20, Fraction(1, 2))  # scales; at the first four letters have either sign
PRECISION = 1000  # digits of real numbers: at least 4 for each character of both sides
MP = MPContext()  # threads share it: nothing used here changes its precision
MP.dps = 4 * PRECISION
STORE = [+MP.pi, +MP.e, +MP.ln2, +MP.ln10, +MP.degree]  # mpmath's: no thread needs to enlarge it
MP.dps = PRECISION
TOLERANCE = MP.mpf(10) ** (-PRECISION // 2)
CONSTANTS = {"e": +MP.e, r"\pi": +MP.pi, "°": +MP.degree}
FUNCTIONS = {"arcsin": MP.asin, "arccos": MP.acos, "arctan": MP.atan, "log": MP.ln, "lg": MP.ln}
FUNCTIONS |= {"sin": MP.sin, "cos": MP.cos, "tan": MP.tan, "ln": MP.ln, "exp": MP.exp, "fabs": abs}
FUNCTIONS |= {"csc": MP.sin, "sec": MP.cos, "cot": MP.tan}  # of which the inverse is taken


class Beyond(Exception):
    """Not to be computed so: too large, too small, too deep, or irrational where all is exact."""


def settle(value, may_vanish=False):
    """Every number passes here: a Fraction of bounded size, or a real number that is not beyond a
    fourth of its digits, so that the others tell two apart.  What is left of a difference of equal
    numbers becomes 0.  ArithmeticError: not defined, or not real."""
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise Beyond
        return value
    if isinstance(value, MP.mpc) or not MP.isfinite(value):
        raise ArithmeticError
    if not value or may_vanish and MP.mag(value) < -0.75 * MP.prec:
        return MP.zero
    if abs(MP.mag(value)) > MP.prec / 4:
        raise Beyond
    return value


def exact(number):
    return settle(Fraction(number))


def real(number):
    return settle(MP.convert(Fraction(number)))


def power(base, exponent):
    """Exact for a whole exponent; 0^0 is not defined."""
    if base == 0 and exponent <= 0:
        raise ArithmeticError
    if not isinstance(base, Fraction):
        return settle(MP.power(base, exponent))
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator > 1 or abs(exponent) * bits > MAX_BITS:
        raise Beyond
    return base**exponent


class Reader:
    """Computes what tokens say while it reads them; the grammar is on top of this file."""

    def __init__(self, tokens, letters, number):
        self.tokens, self.letters, self.number = [*tokens, "end"], letters, number
        self.at = self.depth = 0

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1]

    def operator(self):
        """The next operator, "" for a product without a sign; None if there is none.  A number is
        no factor without a sign: '2 3' is not 6."""
        token = self.tokens[self.at]
        is_factor = token in CLOSING or token[0] == "\\" or token[0].isalpha() and token != "end"
        if token in BINDING:
            return token
        return "" if is_factor else None

    def value(self, binding=0):
        """All that binds more than `binding`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Beyond
        sign = self.take() if self.tokens[self.at] in ("+", "-") else ""
        value = self.value(2) if sign else self.atom()
        value = -value if sign == "-" else value
        while (symbol := self.operator()) is not None and BINDING[symbol] > binding:
            self.at += symbol != ""
            if symbol == "°":
                value = settle(value * self.irrational(symbol))
            elif symbol == "!":
                value = self.factorial(value)
            elif symbol == "^":
                value = power(value, self.atom())
            else:
                value = OPERATORS[symbol](value, self.value(BINDING[symbol]))
                value = settle(value, may_vanish=symbol in ("+", "-"))
        self.depth -= 1
        return value

    def atom(self):
        token = self.take()
        if token in CLOSING:
            value = self.value()
            if self.take() != CLOSING[token]:
                raise SyntaxError
            return value
        if token in self.letters:
            return self.letters[token]
        if token[0] in ".0123456789":
            return self.number(token.replace(",", ""))
        if token == r"\frac":
            return settle(self.atom() / self.atom())
        if token == r"\binom":
            n, k = self.atom(), self.atom()
            return self.factorial(n) / self.factorial(k) / self.factorial(n - k)
        if token == r"\sqrt":
            root = self.atom() if self.tokens[self.at] == "[" else self.number(2)
            return power(self.atom(), 1 / root)
        return self.irrational(token)

    def factorial(self, value):
        if not 0 <= value <= 1000 or value != int(value):
            raise Beyond
        return self.number(math.factorial(int(value)))

    def irrational(self, token):
        r"""\pi; \sin x, \sin^{2} x, \log_{2} 8: of a bracket, or of factors side by side."""
        if self.number is exact:
            raise Beyond
        if token in CONSTANTS:
            return CONSTANTS[token]
        name, _, base = token[1:].partition("_")
        exponent = 1
        if self.tokens[self.at] == "^" and self.take():
            exponent = self.atom()
        if name not in FUNCTIONS or base and not re.fullmatch(r"log\d+", name + base[1:-1]):
            raise SyntaxError
        if exponent < 0:
            raise SyntaxError  # \sin^{-1} has two meanings
        is_open, value = self.tokens[self.at] not in CLOSING, self.value(2)
        while is_open and self.operator() == "" and self.tokens[self.at][1:] not in FUNCTIONS:
            value = settle(value * self.value(2))
        value = settle(FUNCTIONS[name](value), may_vanish=name != "exp")
        if name in ("log", "lg"):
            value /= settle(MP.ln(int(base[1:-1] or 10)))
        return power(value, -exponent if name in ("csc", "sec", "cot") else exponent)


@lru_cache(maxsize=1 << 13)
def tokenize(text):
    """Text -> tokens, names of the letters among them; no tokens if it is no expression."""
    text = MIXED.sub(lambda match: "({}+{}/{})".format(*filter(None, match.groups())), text)
    if UNCLEAR.search(text):
        return (), frozenset()
    tokens = []
    for token in TOKEN.findall(re.sub(r"\|([^|]*)\|", r"\\fabs(\1)", text)):
        name = token.partition("_")[0]
        if len(name) > 2 and name.isalpha() and name not in ("abc", "xyz"):
            return (), frozenset()
        if name.isalpha():  # letters side by side are a product
            tokens += name[:-1]
            token = token[len(name) - 1 :]
        tokens.append(token)
    letters = {token for token in tokens if token[0].isalpha() or token[1:].split("_")[0] in GREEK}
    return tuple(tokens), frozenset(letters - CONSTANTS.keys())


@lru_cache(maxsize=1 << 13)
def values(text, number):
    """Expression -> its values at the points, None where it is not defined; () if it is none, None
    if it is not to be computed with such numbers: exact or real."""
    (tokens, names), found = tokenize(text), []
    for i, scale in enumerate(POINTS if names else POINTS[:1]):
        letters = {}
        for name in names:
            random = zlib.crc32(f"{name}{i}".encode())
            sign = -1 if random & 1 and i < 4 else 1
            letters[name] = number(Fraction(random % 1999 + 1, 997) * scale * sign)
        try:
            reader = Reader(tokens, letters, number)
            found.append(reader.value())
            if reader.at < len(tokens):
                return ()
        except (SyntaxError, IndexError):
            return ()
        except Beyond:
            return None
        except (ArithmeticError, ValueError):
            found.append(None)
    return tuple(found)


def aligned(left, right):
    """Two expressions -> pairs of values where both are defined; none if one is no expression, or
    they have other letters, or are defined together at one point alone."""
    global refusals
    if tokenize(left)[1] != tokenize(right)[1]:
        return []
    for number in (exact, real):
        sides = values(left, number), values(right, number)
        if () in sides:
            return []
        if None not in sides and (number is exact or 4 * len(left + right) <= PRECISION):
            pairs = [pair for pair in zip(*sides) if None not in pair]
            return pairs if len(pairs) > 1 or len(sides[0]) == 1 else []
    refusals += 1
    return []


def equal(x, y, slack=0):
    """Exactly, or to half of the digits, or nearer than `slack`."""
    if isinstance(x, Fraction):
        return x == y or abs(x - y) < slack
    return abs(x - y) <= max(TOLERANCE * abs(y), MP.convert(slack))


def same_expression(p, g, slack=0):
    pairs = aligned(p, g)
    if not re.search(r"[\d\\+*/^|!-]", p + g):
        return False  # words are no products of letters: 'no' is not 'on'
    return pairs != [] and all(equal(x, y, slack) for x, y in pairs)


refusals = 0


def timeouts():
    """How many comparisons of this process were given up because they would take too long."""
    return refusals


# --------------------------------------------------------------------------------------- statement
HEAD = re.compile(  # the longest beginning without letters: [currency] digits, marks, \frac, \pi
    r"((?:[-+](?!\s*[-+]))?)\s*([$€£¥]?)\s*"
    r"((?:[-+\d\s.,:/*()^{}!\[\]]|\\(?:frac|sqrt|pi|binom)(?![a-z])|"
    r"[eE](?=[-+]?\d))+)"
)
FORMULA_TAIL = re.compile(  # no units: '\frac{1}{2}mv^{2}', '2\pi h'; '5a', '2mg'; '5K', '1990s'
    r"\\.*[ })](?!(?:cm|mm|dm|km|kg|ft|m)\b)[a-zA-Z]{1,2}(?:\^\{\d\})?$|"
    r"[ \d](?:[anwvjkt]|(?<=\d)m[gva])(?:\^\{\d\})?$|\d[KM]$|\d{4}s$"
)
TAIL = re.compile(  # '5 cm long', '3 apples in the basket'
    r"(?:^|\s)(?:long|wide|tall|high|deep|old|left|each|total|remaining|altogether|"
    r"in (?:total|all)|(?<=[\w}%°]\s)(?:in|on|at|of|from) [a-z ]+)$"
)
SPELLED = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"\bper cent\b", "percent"), (r"\s*\bper\s+|\s*/\s*", "/"),
    (r"^units?$", ""),
    (r"\b(?:square|sq\.?) +([a-z]+)|平方(\w+)", r"\1\2^{2}"), (r" squared\b|(?<=[a-z])2\b", "^{2}"),
    (r"\bcubic +([a-z]+)|立方(\w+)", r"\1\2^{3}"), (r" cubed\b|(?<=[a-z])3\b", "^{3}"),
    (r"[ *](\w+)\^\{-(\d)\}", r"/\1^{\2}"), (r"\^\{1\}", ""),  # m s^{-1}
]]  # fmt: skip


class Quantity(NamedTuple):
    value: Fraction | str  # the expression, if it is not exact
    unit: str = ""
    ulp: Fraction = Fraction(0)  # last place of a decimal with at least six significant digits


def parse_unit(text, is_one=False):
    """What follows a number -> canonical unit, None if that is none: ' square metres' -> 'm^{2}'.
    A plural is a unit too, and more words may stand before it: '3 red apples' -> '#red apple'."""
    text = re.sub(r"^\s*M(?=(?:W|Ω|Hz|Pa|J)\b)", " mega", text).casefold()
    text = TAIL.sub("", text.rstrip(" .")).strip()
    for pattern, replacement in SPELLED:
        text = pattern.sub(replacement, text).strip()
    parts = re.split(r"(/|[ *]|\^\{\d\})", text)
    if all(name in ALIAS for name in parts[::2]):
        parts[::2] = [ALIAS[name] for name in parts[::2]]
        return "".join(parts)
    words = text.split()
    counts = is_one or re.search(r"s$|^(?:people|children|men|women)$", words[-1]) or text > "一"
    is_plain = all(re.fullmatch(r"[a-z]{3,}|[一-龥]+", word) for word in words)
    if not counts or not is_plain or HEDGE.search(text) or CHANGE.search(text):
        return None
    return "#" + " ".join(word.removesuffix("s") for word in words)


@lru_cache(maxsize=1 << 13)
def parse_quantity(text):
    """'1 1/2 cm' -> (3/2, 'cm', 0), '50%' -> (1/2, '%', 0), '$5 million' -> (5000000, '$', 0)."""
    head = HEAD.match(text)
    if not head or not re.search(r"\d|\\pi", head[3]) or FORMULA_TAIL.search(text):
        return Quantity(text)
    number, tail, factor = (head[1] + head[3]).strip(), text[head.end() :], Fraction(1)
    if scale := re.match(r"(?i)(hundred|thousand|million|billion|trillion)s?\b|[万亿]", tail):
        factor *= 10 ** SCALES[scale[0].lower().removesuffix("s")]
        tail = tail[scale.end() :]
    unit = parse_unit(tail, is_one=number == "1")
    if unit is None:
        return Quantity(text)
    if unit.startswith("%"):
        factor /= 100
    decimals = re.fullmatch(r"[-+]?[\d,]*\.(\d*)", number)
    is_long = decimals and len(re.sub(r"^[-+0.]+|\D", "", number)) >= 6
    ulp = factor / 10 ** len(decimals[1]) if is_long else Fraction(0)
    unit = f"{ALIAS[head[2]]} {unit}".strip()
    number = number if factor == 1 else f"({number})*{factor}"
    value = (values(number, exact) or [None])[0]
    return Quantity(number if value is None else value, unit, ulp)


def same_unit(a, b):
    """One may be missing; '3 red apples' are 3 apples."""
    more, less = sorted((set(a[1:].split()), set(b[1:].split())), key=len, reverse=True)
    return not a or not b or a == b or a[0] == b[0] == "#" and less < more


def same_quantity(p, g):
    """With equal values, and equal units where both have one; or equal as formulas: 'mv' is no
    millivolt there."""
    a, b = parse_quantity(p), parse_quantity(g)
    slack = 0 if "." in p and "." in g else a.ulp or b.ulp
    readings = {} if "°" in p + g else {(p, g): 0}
    if same_unit(a.unit, b.unit):
        readings[str(a.value), str(b.value)] = slack
    return any(same_expression(*sides, within) for sides, within in readings.items())


def relation(text):
    """'1 <= x < 3' -> ['1', '≤', 'x', '<', '3'], 'x > 2' -> ['2', '<', 'x'], '5' -> ['5']."""
    chain = re.split(r"\s*([<>=≤≥≠])\s*", text)
    if set(chain[1::2]) <= {">", "≥"}:
        chain = [{">": "<", "≥": "≤"}.get(part, part) for part in reversed(chain)]
    return chain


def same_relation(p, g):
    """Equations and inequalities whose left - right agree up to a factor, a positive one for <."""
    (a, symbol, b), (c, other, d) = relation(p), relation(g)
    pairs = aligned(f"{a}-({b})", f"{c}-({d})")
    if symbol != other or len(pairs) < 2 or 0 in pairs[0]:
        return False
    x, y = pairs[0]
    if len(tokenize(f"{a}-({b})")[1]) == 1 and not equal(abs(x), abs(y)):
        return False  # 2x = 8 is no solution
    return (symbol in "=≠" or x / y > 0) and all(equal(x * w, y * v) for v, w in pairs)


TIME = re.compile(r"(\d\d?:[0-5]\d)( [ap]m)?")
END = rf"[$€£¥]?{DIGITS} ?[%°]?"
RANGE = re.compile(  # '18-29', 'from 18 to 29', 'between 18 and 29'
    rf"(?:from )?({END}) ?(-|to) ?({END}(?: [a-z]+)?)|between ({END}) and ({END})"
)


def same_statement(p, g):
    """'3 to 4' may be the ratio 3:4."""
    p, g = (re.sub(r"^([\d.]+) to ([\d.]+)$", r"\1:\2", text) for text in (p, g))
    if len(relation(p)) == len(relation(g)) == 3:
        return same_relation(p, g)
    return same_quantity(p, g)


def same_range(p, g):
    """Times and ranges, which are no ratios and no differences: None if neither side is one."""
    times, ranges = (TIME.fullmatch(p), TIME.fullmatch(g)), (RANGE.fullmatch(p), RANGE.fullmatch(g))
    if times[1] and ":" in p and not times[0]:
        return False
    if all(times):
        return times[0][1] == times[1][1] and (None in (times[0][2], times[1][2]) or p == g)
    if all(ranges):
        ends = [(match[1] or match[4], match[3] or match[5]) for match in ranges]
        return all(map(same_quantity, *ends))
    return False if any(match and match[2] == "-" for match in ranges) else None


# ----------------------------------------------------------------------------------------- content
SEPARATOR = re.compile(  # a bracket that opens, one that closes, or ', and', 'or', ∪
    r"(?i)([(\[{])|([)\]}])|\s*[,;]\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+|\s*∪\s*"
)
NAME = re.compile(  # x, x_{1}, f(2), \angle ABC, area, (x, y); no formula
    r"(?i)(?!.*\\(?:frac|sqrt|sin|cos|tan|log|ln|pi)\b)[a-z\\][a-z\\ _'{}]*\d{0,2}\}?"
    r"(?:\([^()]*\))?|\([a-z](?:, ?[a-z])+\)"
)
EITHER = ("or", "∪", "{}")  # 'x < 1 or x > 3' may be a union or a set, but no list


class Items(NamedTuple):
    kinds: tuple  # brackets, or "" for a list; the other side has one of them too
    parts: list
    is_ordered: bool
    name: str = ""  # of the variable that takes these values


def split_top(text):
    """Splits at the separators outside all brackets; [] if the brackets do not match."""
    parts, depth, start = [], 0, 0
    for match in SEPARATOR.finditer(text):
        depth += bool(match[1]) - bool(match[2])
        if depth < 0:
            return []
        if depth == 0 and not match[2]:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in [*parts, text[start:]] if part.strip()] if depth == 0 else []


def as_interval(text):
    """'1 <= x < 3' -> '[1, 3)', 'x > 2' -> '(2, \\infty)'; '' if it bounds no single letter."""
    chain = relation(text)
    if len(chain) == 3:
        chain = ["-\\infty", "<", *chain] if chain[0].isalpha() else [*chain, "<", "\\infty"]
    if len(chain) != 5 or not {chain[1], chain[3]} <= {"<", "≤"} or not chain[2].isalpha():
        return ""
    return "[("[chain[1] == "<"] + f"{chain[0]}, {chain[4]}" + "])"[chain[3] == "<"]


def parse_named(text):
    """'x = 2 + 3 = 5' -> ('x', ['2 + 3', '5']), anything else -> ('', [text])."""
    name, *rest = relation(text)
    named = set(rest[::2]) == {"="} and NAME.fullmatch(name) and not HEDGE.search(name)
    if not named or len(split_top(text)) != 1:
        return "", [text]
    return (name if name[0] == "(" else name.split()[-1]), rest[1::2]


def parse_solutions(parts, is_either):
    """'x = 2', 'x = 5' or 'x_1 = 2', 'x_2 = 5' -> values in any order; 'x = 3', 'y = 4' -> a point;
    anything else -> None."""
    found = [parse_named(part) for part in parts]
    names = {re.sub(r"_?\{?\d\}?$", "", name) for name, values in found}
    if len(parts) < 2 or "" in names or any(len(values) > 1 for name, values in found):
        return None
    if len(names) == 1:
        return Items(("", "or", "{}"), [values[0] for name, values in found], False, *names)
    if is_either or len(names) < len(parts):
        return Items((), [], False)  # x = 3 or y = 4: neither
    point = [values[0] for name, values in sorted(found)]
    return Items(("", "()"), point, True, ",".join(sorted(names)))


def parse_items(text):
    """'(1, 2]' -> 1, 2 in order; '{1, 2}', '1 or 2' and '±1' in any; '(5)' is 5; '(1) 5; (2) 6' is
    5, 6; '1 < x < 3y' is 1 < x and x < 3y; anything else is one part."""
    text = re.sub(r"\}\s*∪\s*\{", ", ", re.sub(r"^(?:[Pp]oint )?[A-Z] ?(?=\(.*,.*\)$)", "", text))
    if text.count("±") == 1:
        return Items(EITHER, [text.replace("±", "+"), text.replace("±", "-")], False)
    numbered = re.split(r"\s*[,;]?\s*\((\d)\)\s*", text)
    marks, said = "".join(numbered[1::2]), numbered[2::2]
    if len(said) > 1 and not numbered[0] and all(said) and "123456789".startswith(marks):
        return Items(("",), said, True)
    if text[:1] in "([{" and text[-1:] in ")]}" and (inner := split_top(text[1:-1])):
        if len(inner) > 1:
            return Items((text[0] + text[-1],), inner, text[0] != "{")
        return parse_items(inner[0])
    parts = split_top(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)) or [text]
    chain = relation(text)
    if len(parts) == 1 and len(chain) > 3 and set(chain[1::2]) != {"="}:
        return Items(("",), ["".join(chain[i : i + 3]) for i in range(0, len(chain) - 2, 2)], False)
    is_either = bool(re.search(r"(?i)\bor\b", text))
    kinds = EITHER if is_either else ("", "or", "{}")
    if "∪" in text:
        kinds = ("∪",)
    return parse_solutions(parts, is_either) or Items(kinds, parts, kinds[0] == "")


def same_content(p, g, top):
    """Named values; lists and sets, in any order only at the top, which bounds the work; else a
    single statement."""
    if (verdict := same_range(p, g)) is not None:
        return verdict
    (name, said), (other, golds) = parse_named(p), parse_named(g)
    if len({name, other} - {""}) == 1:
        if all(same_answer(value, golds[-1], min(top, 1)) for value in said):  # not x = 4 = 5
            return True
    chain = relation(p)
    is_sum = set(chain[1::2]) == {"="} and len(set(chain)) > 2 and len(relation(g)) == 1
    if is_sum and all(same_quantity(part, g) for part in chain[::2]):  # 6 * 7 = 42
        return True
    if p[-1] in ")]" or g[-1] in ")]":
        p, g = as_interval(p) or p, as_interval(g) or g
    if "[[" in (p[:2], g[:2]) and not (p[:2] + g[:2]).strip("([{"):  # matrices
        p, g = (text.translate(str.maketrans("({})", "[[]]")) for text in (p, g))
        if len(re.findall(r"\], ?\[", p)) != len(re.findall(r"\], ?\[", g)):
            return False  # a row is no column
    return same_items(parse_items(p), parse_items(g), top)


def same_items(left, right, top):
    if len(left.parts) == len(right.parts) == 1:
        return same_statement(left.parts[0], right.parts[0])
    names = {left.name, right.name} - {""}
    if len(left.parts) != len(right.parts) or not {*left.kinds} & {*right.kinds} or len(names) > 1:
        return False
    rest = list(right.parts)
    if left.is_ordered and right.is_ordered or not top or len(rest) > MAX_SET:
        return all(same_answer(a, b, 0) for a, b in zip(left.parts, rest))
    for a in left.parts:
        match = next((i for i, b in enumerate(rest) if same_answer(a, b, 0)), None)
        if match is None:
            return False
        del rest[match]
    return True


# ------------------------------------------------------------------------------------------ answer
AGREES = re.compile(  # 'No, it is not', 'Yes they are'
    r"(?i)(yes|no|true|false)(?:[,.;:!]|$| (?=(?:it|they|there|this|that|the|we|you)\b))"
)
DOUBT = re.compile(r"(?i)\b(?:yes|true|or|maybe|perhaps|possibly|probably|unsure)\b|\?")
FORMULA = re.compile(r"\d?(?:[A-Z][a-z]?\d*|[()\[\]]\d*)+(?:\^?\d*[+-])?")  # H2O, SO4^2-


def statements(text):
    """What a sentence may say: after 'the answer is', after 'Year', before 'is correct'.  What is
    cut off says nothing else: it holds no number, no hedge, and no word that changes a number."""
    bodies = [text]
    for lead in filter(None, (pattern.match(text) for pattern in LEADS)):
        claims = re.findall(r"(?i)\b(?:is|are|was|were|equals?(?! to))\b:?|:|[.;!]\s", lead[0])
        changed = HEDGE.search(lead[0]) or SUBJECT.search(lead[0])
        if len(claims) < 2 and not changed and not re.search(r"(?i)[\d<>≤≥≠]|\byes\b", lead[0]):
            bodies.append(text[lead.end() :])
    cut = {JUDGEMENT.sub("", body)[LABEL.match(body).end() :] for body in bodies}
    return [*bodies[1:], *cut.difference(bodies)]


def same_answer(p, g, top=2):
    """Is p the answer g?  Both cleaned.  top: 2 as a whole, 1 what a sentence says, 0 an item."""
    if not p or not g:
        return False
    if re.sub(r"\s*([^\w\s,.])\s*", r"\1", p) == re.sub(r"\s*([^\w\s,.])\s*", r"\1", g):
        return True
    said, right, word = parse_choice(p), parse_choice(g), plain_words(g)
    if said and right:
        fits = same_answer(said[1], right[1], 0) if right[1] else not parse_choice(said[1])
        return said[0] == right[0] and (not said[1] or fits)  # 'B. C' is no choice
    if right and letters_in(p) - {right[0]} - letters_in(right[1]):
        return False  # two letters are no choice, and '13 (A)' is not '(B) 13'
    if top and said and same_answer(said[1], g, 0) or right and same_answer(p, right[1], top):
        return True
    if word in YES_NO and (start := AGREES.match(p)) and start[1].lower() == word:
        doubt = HEDGE if YES_NO[word] else DOUBT  # 'No, it is not' denies nothing
        return not doubt.search(p[start.end() :])
    formulas = {re.sub(r"[_{}\s]|\^(?=\{?\d?\}?[+-])", "", text) for text in (p, g)}
    if len(formulas) == 1 and FORMULA.fullmatch(*formulas):
        return True
    if word and plain_words(p) == word and not (tokenize(p)[0] and re.search(r"[\d\\!]", p + g)):
        return True
    if same_content(p, g, top):
        return True
    return top > 1 and any(same_answer(text, g, 1) for text in statements(p))


# ------------------------------------------------------------------------------------------ choice
CHOICE = re.compile(  # '(B) 40', 'B) 40', 'B. 40', 'B: 40', 'B, blue', 'B (40)', 'B'
    r"(?i)(?:option |choice )?(?:[(\[]([A-J])[)\]][.:,]?\s*(.*)|"
    r"([A-J])(?:\)\s*(.*)|[.:,](?:\s+(.*))?|\s+\((.*)\))?)"
)
SECOND = re.compile(  # in what follows a letter: another one
    r"(?i)^(?:or|and)\b|^[,/&]|(?:^|\s)\([A-J]\)|"
    r"\b(?:or|and|but|actually|rather|wait),? \(?[A-J]\)?\W*$"
)


def letters_in(text):
    """The letters of options in a text; an A before a word is an article."""
    return set(re.findall(r"\b(?:[B-HJ]|A(?! (?!is\b|the\b)[a-z]))\b", text))


def parse_choice(text):
    """'(B) 40', 'option B', 'b' -> (letter, what follows); None if it is no choice, or two."""
    match = CHOICE.fullmatch(text)
    rest = match and (match[2] or match[4] or match[5] or match[6] or "")
    return None if rest is None or SECOND.search(rest) else ((match[1] or match[3]).upper(), rest)


def find_choice(text, options):
    """Where there are options, also 'B 40' if option B is 40, and '20 (B)'."""
    ending = re.fullmatch(r"(.+?),?\s*(?:\(([A-J])\)|(?:option|choice|answer) ([A-J]))", text)
    spaced = re.fullmatch(r"([A-J])(?: -)? (.+)", text)
    if ending and not parse_choice(text):
        return ending[2] or ending[3], ending[1]
    if spaced and spaced[1] in options and same_answer(spaced[2], options[spaced[1]], 0):
        return spaced.groups()
    return parse_choice(text)


def fits_option(rest, letter, options):
    """May `rest` follow the letter?  Also misspelt or cut, but with no other number, letter or
    option, and no denial."""
    text = options[letter]
    if not rest or same_answer(rest, text) or JUDGEMENT.fullmatch(" " + rest):
        return True
    said, words = plain_words(rest), plain_words(text)
    if re.findall(r"\d+", said) != re.findall(r"\d+", words) or letters_in(rest) - letters_in(text):
        return False
    if HEDGE.search(rest) and not HEDGE.search(text):
        return False
    closest = get_close_matches(said, map(plain_words, options.values()), 1, 0.7)
    return len(said) > 2 and (words.startswith(said) or closest == [words])


def same_choice(p, letter, options):
    """Does an answer choose the option with this letter: by its letter, alone or with the option's
    text, or else by the text?"""
    for said in (p, *statements(p)):
        if found := find_choice(said, options):
            return found[0] == letter and fits_option(found[1], letter, options)
    others = letters_in(p) - letters_in(options[letter]) - {letter}
    return not others and same_answer(p, options[letter])


# ------------------------------------------------------------------------------------------ verify
def accepts(prediction, gold, options):
    """One prediction against one gold."""
    if not prediction.strip() or prediction.split() == gold.split() and not options:
        return bool(prediction.strip())
    texts = [unicodedata.normalize("NFKC", text[: MAX_CHARS + 1]) for text in (prediction, gold)]
    steps = ((mark in "([{") - (mark in ")]}") for mark in "".join(texts))
    if max(map(len, texts)) > MAX_CHARS or max(map(abs, accumulate(steps))) > MAX_DEPTH:
        return prediction.casefold().split() == gold.casefold().split()
    p, g = clean(prediction), clean(re.sub(r"(?s)^.*####|</?answer>", " ", gold))
    if "_" not in p:  # 72_8: who is asked for octal need not say it
        g = re.sub(r"^(\d+)_\{\d+\}$", r"\1", g)
    if re.fullmatch("A?B?C?D?E?F?G?H?", g) and len(g) > 1:  # several choices: 'A, C' and 'A and C'
        p = re.sub(r"(?<=\b[A-H])(?:\s*[,;]\s*|\s*\band\b\s*|\s+)(?=[A-H]\b)", "", p)
    texts = [(parse_choice(option) or ("", ""))[1] or option for option in map(clean, options)]
    options = dict(zip(LETTERS, texts))
    named = (parse_choice(g) or "?")[0]
    for letter, text in options.items():
        if letter == named or named not in options and same_answer(text, g, 0):
            return same_choice(p, letter, options)
    return same_answer(p, g)


def to_golds(gold):
    """Gold answers of any type -> texts; what is no answer (None, NaN, a dict) is left out."""
    if isinstance(gold, (list, tuple)):
        return [text for one in gold for text in to_golds(one)]
    if isinstance(gold, bool):
        return ["true", "yes"] if gold else ["false", "no"]
    return [str(gold)] if isinstance(gold, (str, int, float)) and gold == gold else []


def with_percent(gold, question):
    """The golds to accept where the question speaks of per cent: 62 and 62% are one there."""
    if not re.search(r"(?i)%|\bper ?cent|百分", question):
        return gold
    golds = to_golds(gold)
    numbers = [text.strip() for text in golds if re.fullmatch(r"\s*-?[\d.,]+\s*%?\s*", text)]
    other = [text[:-1].strip() if text.endswith("%") else f"{text}%" for text in numbers]
    return golds + other


def verify(prediction, gold, options=None):
    """Is `prediction` (the text of an answer) right?

    gold: the accepted answer (text, number or bool), or a list of them.  options: the texts of a
    multiple choice in order (A first); then a letter may be answered by its text and the other way
    round.  Never raises, runs no code, touches no state of the process; takes well under a second.
    """
    try:
        return any(accepts(prediction, text, options or []) for text in to_golds(gold))
    except (AttributeError, TypeError, ValueError, RecursionError, ArithmeticError):
        return False  # not a text, or out of depth: not shown to be right
