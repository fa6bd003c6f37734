"""Answer verification.

A wrong acceptance is a reward hack that the policy will find, a wrong rejection is a lost signal: strict about what an
answer says, lenient about how it is written.  In order:

1. Both sides are cleaned: unicode forms, LaTeX mark-up and spacing become one notation (`clean`).
2. Exact rules, in microseconds: same text, option letters, yes / no, tuples, intervals and sets, `x = ...`, rational
   numbers with units.  1e-9 is not 0; a decimal stands for another value from six significant digits on.
3. What is left - surds, pi, letters - is read by math-verify's LaTeX grammar and evaluated by sympy at three fixed
   points: equal expressions agree at all of them.  It may hang (9^9^9^9), so it runs in a process that can be stopped.
4. A sentence is right if it says one right answer and no other number, denial or doubt.

Unlike the authors' verifier: units, brackets and the whole expression count; 'not 5' and '3 or 4' are not 5.
"""

import inspect
import json
import re
import socket
import subprocess
import sys
import threading
import unicodedata
from fractions import Fraction
from functools import lru_cache


MAX_CHARS, MAX_SET = 1000, 12  # longer answers are compared as text, larger sets in order: this bounds the time
JOB_SECONDS, START_SECONDS = 0.5, 120.0  # for symbolic work; for the `import sympy` that the first such job waits for
NUMERALS = "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
HEDGE = re.compile(
    r"(?i)[?±]|\b(?:or|n?either|nor|maybe|perhaps|possibly|probably|might|could|unsure|not|no|never|cannot|\w+n't|wrong|"
    r"incorrect|false|but|except|exclud\w+|instead|rather|without|unless|unlikely|hardly|doubt|impossible|opposite|other than|"
    r"far from)\b"
)
CHANGE = re.compile(  # words beside a number that make it another: 'half of 5', 'less than 5', '5 million'
    r"(?i)\b(?:than|least|most|more|less|fewer|under|over|above|below|up to|within|exceeds?|too|squared?|cubed?|factorial|"
    r"roots?|log|minus|plus|negative|times|twice|double|triple|hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|"
    r"nin|ten|hundred|thousand)ths?|dozen|grand|(?:hundred|thousand|[mbtr]+illion)s?|divided|multiplied|"
    rf"(?:reciprocal|inverse|complement|supplement|negation|sum|product|difference) of|{NUMERALS})\b"
)
LEAD = re.compile(  # 'The answer is', 'So the length of AB equals', 'Answer:'
    r"(?i).*(?:\b(?:is|are|was|were|be|equals?|has|have|shows?|contains?|choose|select|pick|so|thus|hence|therefore|"
    r"answer|option|choice)\b|(?<=[a-z]{2}):)[\s:,]*"
)
CHOICE = re.compile(  # '(B) 40', 'B) 40', 'B. 40', 'B (40)', 'B'
    r"(?i)(?:option |choice )?(?:[(\[]([A-J])[)\]][.:]?\s*(.*)|([A-J])(?:\)\s*(.*)|[.:](?:\s+(.*))?|\s+\((.*)\))?)"
)
YES_NO = {"yes": True, "true": True, "no": False, "false": False}
UNITS = (  # canonical name, then what else it is called; nothing is converted: '50 mm' is not '5 cm'
    "mm millimeter millimetre;cm centimeter centimetre;dm decimeter decimetre;m meter metre;km kilometer kilometre;"
    "in inch inches;ft foot feet;yd yard;mi mile;mg milligram;g gram;kg kilogram;t ton tonne;lb pound lbs;oz ounce;ms;"
    "ml milliliter millilitre;l liter litre;s sec second;min minute;h hr hour;day;week;month;yr year;° deg degree;"
    "rad radian;hz hertz;n newton;kn;j joule;kj;w watt;kw;v volt;kv;mv;a amp ampere;ma;ω ohm;pa pascal;kpa;mpa;"
    "k kelvin;mol mole;mph;% percent pct percentage;$ dollar usd;€ euro eur;£ gbp;¥ yuan 元 rmb;¢ cent"
)
ALIAS = {name + s: row.split()[0] for row in UNITS.split(";") for name in row.split() for s in ("", "s")[: len(name)]}
LONG_UNIT = "|".join(sorted((re.escape(a) for a in ALIAS if len(a) > 1 or a in "m°%"), key=len, reverse=True))
TAIL_UNIT = re.compile(rf"(?i)(?<=[\d\s}})])(?:{LONG_UNIT})(?:\^\{{\d\}})?(?:/(?:{LONG_UNIT}|s|h)(?:\^\{{\d\}})?)?$")
GREEK = "alpha|beta|gamma|delta|theta|lambda|pi|rho|sigma|tau|phi|omega"
CHARACTERS = str.maketrans(
    dict(zip("−–—⁄÷∶×·⋅∙≈∈’‘“”。、⟨⟩", "---//:****==''\"\".,()"))
    | {"∞": r"\infty ", "∠": "angle ", "△": "triangle ", "√": r"\sqrt "}
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", " ")  # not seen, but no part of a number or word
    | {unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('bd', 'd')}"): f"\\{name} " for name in GREEK.split("|")}
)
COMMANDS = (  # what stands for what
    r"times * cdot * div / ** ^ approx = sim = in = <= ≤ le ≤ leq ≤ >= ≥ ge ≥ geq ≥ ne ≠ neq ≠ lt < gt > cup ∪ pm ± "
    r"circ ° degree ° dfrac \frac tfrac \frac cfrac \frac"
).split()
COMMANDS = dict(zip(COMMANDS[::2], COMMANDS[1::2])) | {"angle": " angle ", "triangle": " triangle "}
COMMANDS |= dict.fromkeys(["left", "right", "quad", "qquad", "displaystyle"], " ")


def repeating(whole, start, period):
    """0.1\\overline{6}: whole '0', start '1', period '6' -> its fraction (16 - 1) / 90 in LaTeX."""
    numerator = int(whole + start + period) - int(whole + start or 0)
    return rf"\frac{{{numerator}}}{{{10 ** len(start + period) - 10 ** len(start)}}}"


REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"(?<!\\)\$(.*?)(?<!\\)\$|\\[\[\]()!]|\\[,;: ]|[~\s]+", r" \1 "),  # math mode and spaces
    (r"(?<![\w)])\*\*(?=\S)(.+?)\*\*(?![\w(])|^['`](.*)['`]$", r"\1\2"),  # bold, quoted
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}", lambda match: repeating(*match.groups())),
    (r"\\(?:text\w*|math\w+|operatorname|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:vec|hat|(?:overline|bar)(?=\s*\{[A-Za-z]{2}))\s*\{([A-Za-z][^{}]*)\}", r" \1 "),  # not: a complement
    (r"\\([%${}&#])|\{(,)\}", r"\1\2"),
    (r"\\([A-Za-z]+)|[<>]=|\*\*", lambda match: COMMANDS.get(match[1] or match[0], match[0])),
    (r"\s*\^\s*\{?\s*°\s*\}?|\s+°", "°"), (r"°\s*T(?![A-Za-z])", "°"),  # the last is a true bearing
    (r"(?<![\\A-Za-z])(sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|log|ln|pi)(?![A-Za-z])", r"\\\1 "),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\sqrt\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
    (r"(\\sqrt|\^)\s*\(([^()]*)\)", r"\1{\2}"), (r"\s*([\^_])\s*(?:(-?\d+|[A-Za-z])|\{([^{}]*)\})", r"\1{\2\3}"),
    (rf"(?i)^(?:{NUMERALS})\b", lambda match: str(NUMERALS.split("|").index(match[0].lower()))),
    (r"(?i)\b(?:approximately|approx\.?|about|around|roughly)\s+(?=[-\d$\\.])|\b(?:because|since)\b.*", ""),
    (r"\s+", " "),
]]  # fmt: skip
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(  # currency, sign, currency, whole part of a mixed number, digits, exponent twice, power, divisor
    rf"(?i)([$€£¥]?)\s*([-+]?)\s*([$€£¥]?)\s*(?:(\d+)\s+(?=\d+\s*/))?({DIGITS})(?:e([-+]?\d{{1,3}})(?![\d.]))?"
    rf"(?:\s*[*x]\s*10\^\{{(-?\d{{1,3}})\}}|\^\{{(-?\d{{1,3}})\}}|\s*[/:]\s*({DIGITS}))?"
)
FRACTION = re.compile(r"^([-+]?\s*\d*)\s*\\frac\s*\{\s*([-+]?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}")
SEPARATOR = re.compile(r"(?i)([(\[{])|([)\]}])|\s*[,;]\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+|\s*∪\s*")
RELATION = re.compile(r"\s*([<>=≤≥≠])\s*")
NAME = re.compile(r"(?i)(?!.*\\(?:frac|sqrt|sin|cos|tan|log|ln|pi)\b)[a-z\\][a-z\\ _'{}]*\d{0,2}\}?(?:\([^()]*\))?")
EXPRESSION = re.compile(  # all that ever reaches the LaTeX parser: no words, no number beside a number
    rf"(?i)(?:\\(?:frac|sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|binom|infty|{GREEK})(?![a-z])|"
    r"(?<![\\a-z])[a-z]{1,2}(?![a-z])|\d(?!\s+[\d.])|\.(?=\d)|\)(?!\s+[\d(])|(?<=[a-z])_|[-+*/^{}\[\]|!( ])+"
)


@lru_cache(maxsize=1 << 14)
def clean(text):
    """Any text -> one notation: NFKC, ASCII operators, no mark-up."""
    # superscripts and vulgar fractions go first: NFKC would make 52 of 5² and 11/2 of 1½
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", r"^{\g<0>}", text.replace("º", "°").replace("˚", "°"))
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)).translate(CHARACTERS)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text.strip())
    boxes = re.findall(r"(?<!\w)\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}(?!\w)", text)
    if len(boxes) == 1 and not HEDGE.search(text.replace(boxes[0], "")):
        text = boxes[0]
    return text.strip(' `*"=').rstrip(".,;:").strip(' `*"')


def plain_words(text):
    """Text without case, articles and punctuation: 'The red car!' -> 'red car'.  Marks between digits stay."""
    text = re.sub(r"(?<=[a-z]{2})-(?=[a-z]{2})|(?<!\d)[.,:;!\"]+|[.,:;!\"]+(?!\d)", " ", text.casefold())
    return " ".join(re.sub(r"\b(?:an?|the)\s+(?=\w)", "", text).split())


def parse_choice(text):
    """'(B) 40', 'option B', 'b' -> (letter, what follows); None if this is no choice, or more than one."""
    match = CHOICE.fullmatch(text)
    rest = match and (match[2] or match[4] or match[5] or match[6] or "")
    second = r"(?i)^(?:or|and)\b|^[,/&]|(?:^|\s)\([A-J]\)|\b(?:or|and|but|actually|rather|wait),? \(?[A-J]\)?\W*$"
    if not match or re.search(second, rest):
        return None
    return (match[1] or match[3]).upper(), rest


def parse_unit(text):
    """What follows a number -> canonical unit, None if that is no unit: ' square metres' -> 'm^{2}'.  A word that is
    no known unit counts as one if it stands apart: '3 apples', '12 people in the room'."""
    text = re.sub(r"\bper\b", "/", text.casefold().replace("per cent", "percent"))
    text = re.sub(r"\b(?:(?:square|sq|cubic)\.? +)?units?\b(?: squared|\^\{\d\})?", "", text)  # '12 units': no unit
    text = re.sub(r"\b(?:square|sq)\.? +([a-z]+)|([a-z]) squared\b|(?<=[a-z])2(?![\d.])", r"\1\2^{2}", text)
    text = re.sub(r"\bcubic +([a-z]+)|(?<=[a-z])3(?![\d.])", r"\1^{3}", text)
    names = re.findall(r"° ?[cf]\b|[^\W\d_]+|[°$€£¥¢%/]|\^\{-?\d\}", text)
    first = names[0] if names else "°"
    known = first in ALIAS or first[0] == "°" or text[0] == " " and len(first) > 2
    known = known or "一" <= first <= "鿿" and first[0] not in "一二三四五六七八九十百千万亿"
    foreign = re.search(r"[^\w °$€£¥¢%/.'-]|[\d_]|%.*%", re.sub(r"\^\{-?\d\}", "", text))
    if foreign or not known or text.strip() and not names or HEDGE.search(text) or CHANGE.search(text):
        return None
    return re.sub(r" ?/ ?| (?=\^)", lambda m: m[0].strip(), " ".join(ALIAS.get(n, n.removesuffix("s")) for n in names))


@lru_cache(maxsize=1 << 14)
def parse_quantity(text):
    """Text -> (Fraction or LaTeX, unit, ulp): '1 1/2 cm' -> (3/2, 'cm', 0), '50%' -> (1/2, '', 0).
    ulp is the last place of a decimal with at least six significant digits, else 0."""
    plain = FRACTION.sub(r"\1 \2/\3", text).strip()
    match = NUMBER.match(plain)
    unit = match and parse_unit(plain[match.end() :])
    if unit is None or match[9] and not re.search("[1-9]", match[9]):  # not a number, or divided by zero
        tail = TAIL_UNIT.search(text)
        return (text[: tail.start()].strip(), parse_unit(tail[0]), 0) if tail else (text, "", 0)
    digits = re.sub("[, ]", "", match[5])
    shift = int(match[6] or 0) + int(match[7] or 0) - 2 * (unit[:1] == "%")
    value = Fraction(digits) * Fraction(10) ** shift
    if match[8]:
        value **= int(match[8])
    value = int(match[4] or 0) + value / Fraction(re.sub("[, ]", "", match[9] or "1"))
    is_long = "." in digits and len(re.sub(r"^[0.]+|\.", "", digits)) >= 6 and not match[8] and not match[9]
    ulp = Fraction(10) ** (shift - len(digits.partition(".")[2])) if is_long else 0
    unit = f"{ALIAS.get(match[1] or match[3], '')} {unit.removeprefix('%')}".strip()
    return -value if match[2] == "-" else value, unit, ulp


def symbolic_server(descriptor, seconds):
    """Runs in a bare Python of its own: imports sympy once, then forks for each job that arrives as a socket.  A job is
    a JSON list of LaTeX; the answer is "s" (started), then per expression its values at three points [[re, im], ..] or
    null.  SIGALRM's default action ends a fork whose time is up, even inside C."""
    import json, os, resource, signal, socket, zlib  # noqa: I001, E401
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy  # the grammar of math-verify
    from sympy import Rational

    def values(latex):
        try:
            config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
            parsed = latex2sympy(latex, is_real=True, normalization_config=None, conversion_config=config)
            number = lambda s, i: Rational(zlib.crc32(f"{s}{i}".encode()) % 4001 - 2000, 777)  # by name alone
            point = lambda i: {s: number(s, i) for s in parsed.free_symbols}
            row = [complex(parsed.subs(point(i)).evalf(20)) for i in range(3)]
            return [[z.real, z.imag] for z in row] if max(map(abs, row)) < 1e300 else None
        except Exception:  # noqa: BLE001  what the grammar or sympy does not understand has no value
            return None

    values(r"-\frac{1}{2}\sqrt{3}+4\pi x^{2}\cdot y-\sin(2x)\log_{2}(a)(b+1)/|c|")  # forks inherit the warm parser
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished forks need no wait()
    control = socket.socket(fileno=descriptor)
    while (received := socket.recv_fds(control, 1, 1))[0]:  # until the parent is gone
        with socket.socket(fileno=received[1][0]) as job:
            if os.fork() == 0:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
                job.sendall(b"s")
                job.sendall(json.dumps([values(latex) for latex in json.loads(job.makefile().readline())]).encode())
                os._exit(0)


SERVER = inspect.getsource(symbolic_server) + "\nimport sys\nsymbolic_server(int(sys.argv[1]), float(sys.argv[2]))"
LOCK = threading.Lock()


@lru_cache(maxsize=1)
def start_server():
    """The server's control socket (it ends when this closes) and its process."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", SERVER, str(theirs.fileno()), str(JOB_SECONDS)]
        return ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)


@lru_cache(maxsize=1 << 12)
def evaluate(expressions):
    """Tuple of LaTeX -> for each its complex values at three fixed points, or None.  Raises OSError or ValueError when
    the time is up, so that only results are cached.  Any number of threads may ask at once."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(START_SECONDS)
        with theirs, LOCK:
            try:
                socket.send_fds(start_server()[0], [b"j"], [theirs.fileno()])
            except OSError:  # it was killed: the next call starts another
                start_server.cache_clear()
                raise
        ours.sendall(json.dumps(expressions).encode() + b"\n")
        ours.recv(1)  # sympy is there and the clock runs
        ours.settimeout(1.5 * JOB_SECONDS)
        reply = json.loads(b"".join(iter(lambda: ours.recv(1 << 16), b"")))
    return [row and [complex(*pair) for pair in row] for row in reply]


def lookup(text, leaves):
    """Fraction or LaTeX -> complex values at the three points, None if unknown.  `leaves` {LaTeX: values} collects what
    has to be evaluated: the first pass over an answer fills in the keys, the second finds the values."""
    if isinstance(text, Fraction):
        return [complex(text)] * 3 if abs(text) < 10**300 else None
    latex = re.sub(r"(?<=[\d)])\s*(?=\()|\*", r"\\cdot ", text)  # the grammar takes (2)(3) for a mixed number
    latex = re.sub(r"(?<![\d.}])(\d+)/(\d+)(?=\s*[a-zA-Z\\])", r"\\frac{\1}{\2}", latex)  # and 1/2 x for 1/(2x)
    return leaves.setdefault(latex, None) if EXPRESSION.fullmatch(text) else None


def same_values(left, right, tolerance=0.0):
    pairs = zip(left or (), right or ())
    return bool(left and right) and all(abs(a - b) <= max(tolerance, 1e-13 * abs(b)) for a, b in pairs)


def same_statement(p, g, leaves):
    """Two quantities with equal values and, where both have one, equal units; or two equations or inequalities whose
    left - right agree up to a factor (a positive one for < and <=)."""
    left, right = RELATION.split(p), RELATION.split(g)
    if len(left) == len(right) == 3:
        turned = [[z, "<≤"[o == "≥"], x] if o in ">≥" else [x, o, z] for x, o, z in (left, right)]  # > becomes <
        (a, operator, b), (c, other, d) = turned
        left, right = (EXPRESSION.fullmatch(x + y) and lookup(f"{x}-({y})", leaves) for x, y in ((a, b), (c, d)))
        if operator != other or not left or not right or len(set(left)) == 1 or 0 in right:
            return False
        factor = left[0] / right[0]
        return (operator in "=≠" or factor.real > 0) and same_values(left, [factor * value for value in right])
    (a, unit_a, ulp_a), (b, unit_b, ulp_b) = parse_quantity(p), parse_quantity(g)
    if unit_a and unit_b and unit_a != unit_b:
        more = set(unit_a.split()[len(unit_b.split()) :])  # '12 cm in total' has the unit of '12 cm', '12 N m' not that of '12 N'
        if not unit_a.startswith(f"{unit_b} ") or more & set(ALIAS.values()) - {"in", "a"}:
            return False
    if not unit_b and re.search(r"\d[kKM]$", p):  # thousands or millions
        return False
    tolerance = ulp_a if "." not in g else ulp_b if "." not in p else 0
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b or abs(a - b) < tolerance
    variables = [set(re.sub(r"\\[a-zA-Z]+|[^a-zA-Z]|e", "", str(value))) for value in (a, b)]
    # words are no products of letters: 'no' is not 'on'
    if variables[0] != variables[1] or not re.search(r"[\d\\+*/^|!-]", f"{a}{b}"):
        return False
    return same_values(lookup(a, leaves), lookup(b, leaves), float(tolerance))


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


def parse_items(text):
    """Text -> (brackets, parts, does the order count): '(1, 2]' -> ('(]', ['1', '2'], True), '{1, 2}' and 'x=1 or x=2'
    False, '1<x<3' -> ('', ['1<x', 'x<3'], False), '±2' -> ('', ['+2', '-2'], False), '(5)' -> '5'; else one part."""
    if text.count("±") == 1:
        return "", [text.replace("±", "+"), text.replace("±", "-")], False
    if text[:1] in "([{" and text[-1:] in ")]}" and (inner := split_top(text[1:-1])):
        return (text[0] + text[-1], inner, text[0] != "{") if len(inner) > 1 else parse_items(inner[0])
    parts = split_top(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)) or [text]
    chain = RELATION.split(text)
    if len(parts) == 1 and len(chain) > 3 and set(chain[1::2]) != {"="}:
        return "", ["".join(chain[i : i + 3]) for i in range(0, len(chain) - 2, 2)], False
    return "", parts, not re.search(r"(?i)\bor\b|∪", text) and not all(map(RELATION.search, parts))


def parse_named(text):
    """'x = 2 + 3 = 5' -> ('x', ['2 + 3', '5']), anything else -> (None, [text])."""
    name, *rest = RELATION.split(text)
    named = set(rest[::2]) == {"="} and NAME.fullmatch(name) and not HEDGE.search(name)
    return (name.split()[-1], rest[1::2]) if named and len(parse_items(text)[1]) == 1 else (None, [text])


def same_content(p, g, leaves, top):
    """Named values, lists and sets (in any order only at the top level, which bounds the work), single statements."""
    (name, values), (other, golds) = parse_named(p), parse_named(g)
    if (name or other) and (not name or not other or name == other):
        if all(same_answer(value, golds[-1], leaves, False) for value in values):  # x = 4 = 5 is a hedge
            return True
    (brackets, left, ordered), (others, right, also) = parse_items(p), parse_items(g)
    if len(left) == len(right) == 1:
        return same_statement(left[0], right[0], leaves)
    if brackets != others or len(left) != len(right):
        return False
    if ordered and also or not top or len(left) > MAX_SET:
        return all(same_answer(a, b, leaves, False) for a, b in zip(left, right))
    for a in left:
        match = next((i for i, b in enumerate(right) if same_answer(a, b, leaves, False)), None)
        if match is None:
            return False
        del right[match]
    return True


def statements(text):
    """What a sentence may say: after 'the answer is', before 'is correct', from its first number on.  What is cut off
    holds no number and no hedge."""
    lead, number = LEAD.match(text), re.search(r"(?<=[\s(])[-+]?[$€£¥]?\.?\d", text)
    cut = lead[0] if lead else ""
    claims = re.findall(r"(?i)\b(?:is|are|was|were|equals?)\b:?|:|[.;!]\s", cut)
    if cut and len(claims) < 2 and not re.search(r"(?i)[\d<>≤≥≠]|\byes\b", cut) and not HEDGE.search(cut):
        yield text[len(cut) :]
    cut = text[: number.start()] if number else ""
    worded = re.fullmatch(r"(?i)[a-z ,.'()-]*", cut) and re.search("(?i)[a-z]{2}", cut)
    if worded and not HEDGE.search(cut) and not CHANGE.search(cut):
        yield text[len(cut) :]
    judgement = r"(?:the )?(?:(?:correct|right|final|best) )?(?:answer|option|choice|one)|correct|right"
    yield re.sub(rf"(?i)\s+(?:is|are) (?:{judgement})$", "", text)


def same_answer(p, g, leaves, top=True):
    """Is p the answer g?  Both cleaned.  Sentences only at the top level."""
    if not p or not g:
        return False
    if re.sub(r"\s*([^\w\s,.])\s*", r"\1", p) == re.sub(r"\s*([^\w\s,.])\s*", r"\1", g):
        return True
    said, right, word = parse_choice(p), parse_choice(g), plain_words(g)
    letters = set(re.findall(r"\b(?:[B-HJ]|A(?! (?!is\b)[a-z]))\b", p))
    if said and right:
        fits = same_answer(said[1], right[1], leaves, False) if right[1] else not parse_choice(said[1])  # 'B. C'
        return said[0] == right[0] and (not said[1] or fits)
    if right and letters - {right[0]} - set(re.findall(r"\b[A-J]\b", right[1])):
        return False  # two letters are no choice, and '13 (A)' is not '(B) 13'
    if said and same_answer(said[1], g, leaves, False) or right and same_answer(p, right[1], leaves, top):
        return True
    if word in YES_NO and (start := re.match(rf"(?i){word}(?:[,.;:!]|$| (?=(?:it|they|there|this|that|the|we|you)\b))", p)):
        doubt = r"(?i)\b(?:yes|true|or|maybe|perhaps|possibly|probably|unsure)\b|\?"  # 'No, it is not' denies nothing
        return not re.search(HEDGE if YES_NO[word] else doubt, p[start.end() :])
    if word and plain_words(p) == word and not (EXPRESSION.fullmatch(p + g) and re.search(r"[\d\\!]", p + g)):
        return True
    if same_content(p, g, leaves, top):
        return True
    return top and any(same_answer(text, g, leaves) for text in statements(p) if text != p)


def accepts(prediction, gold, options, leaves):
    """One prediction against one gold.  With options, letter and text of the right one become '(B) 40'."""
    if not prediction.strip() or prediction.split() == gold.split():
        return bool(prediction.strip())
    if max(len(prediction), len(gold)) > MAX_CHARS:
        return prediction.casefold().split() == gold.casefold().split()
    p, g = clean(prediction), clean(gold)
    texts = [(parse_choice(text) or ("", ""))[1] or text for text in map(clean, options)]
    letters = [parse_choice(g)[0]] if parse_choice(g) else list("ABCDEFGHIJ")
    for letter, text in zip("ABCDEFGHIJ", texts):
        if letter in letters and (len(letters) == 1 or same_answer(text, g, leaves, False)):
            return same_answer(p, f"({letter}) {text}", leaves)
    return same_answer(p, g, leaves)


def verify(prediction, gold, options=None):
    """Is `prediction` (the text of an answer) right?

    gold: the accepted answer, or a list of them.  options: the multiple-choice texts in order (A first), so that a
    letter may be answered by its text and the other way round.  Never raises, runs no code, touches no global state.
    Any text of any length in any thread takes under a second, once sympy is there: the first that needs it waits.
    """
    golds, leaves = [gold] if isinstance(gold, str) else gold, {}
    try:
        if any(accepts(prediction, one, options or [], leaves) for one in golds):
            return True
        leaves.update(zip(leaves, evaluate(tuple(leaves)) if leaves else []))
        return any(leaves.values()) and any(accepts(prediction, one, options or [], leaves) for one in golds)
    except (OSError, ValueError, RecursionError, ArithmeticError):  # out of time, depth or range: not shown to be right
        return False


def timeouts():
    return 0
