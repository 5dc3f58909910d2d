"""What an expression is worth: a small reader of LaTeX and plain arithmetic that computes as it reads.

It knows numbers, letters, the four operations (also unwritten products and mixed numbers), powers, roots, fractions,
factorials, binomials, percent, degrees and the common functions: enough for nearly all answers and steps of
school mathematics. Nothing is handed to an interpreter, and every size is bounded: what is too large, too deep, or not
understood is `Unreadable`.

Values are exact fractions as long as the operations keep them so, and complex numbers of double precision otherwise.
"""

import cmath
import math
import random
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

Value = Fraction | complex

MAX_CHARS = 2000
_MAX_DEPTH = 80  # calls of one another; brackets take two
_MAX_BITS = 100_000  # of an exact number: 2004! has 19,000
_MAX_FACTORIAL = 5000
_MAX_LETTERS = 3  # beside each other: more are a word
_PLAIN = re.compile(r"\s*-?\s*(?:\d+\.?\d*|\.\d+)\s*", re.ASCII)
_NEGATIVE = -1
_POINTS = 3  # expressions with letters are compared at so many places
_CLOSE = 1e-9  # relative, between values of double precision
_CLOSE_DECIMALS = 2e-6  # relative, where one side is written with a decimal point, as rounded
_ZERO = 1e-12

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<command>\\[A-Za-z]+|√)|(?P<name>[A-Za-z]+)|(?P<sign>[-+*/^_!%°|()\[\]{}]))",
    re.ASCII,
)
_FUNCTIONS: Mapping[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "exp": cmath.exp,
    "ln": cmath.log,
    "log": cmath.log10,
}
_OF_AN_ANGLE = ("sin", "cos", "tan", "cot", "sec", "csc")
_PRODUCT = ("*", r"\cdot", r"\times", r"\ast")
_QUOTIENT = ("/", r"\div")
_FRACTION = (r"\frac", r"\dfrac", r"\tfrac", r"\cfrac")
_LETTERS = set(
    """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon
    phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell
""".split()
)


class Unreadable(ValueError):
    """The text is no expression that is understood here, or its value is too large or undefined."""


def value_of(text: str, letters: Callable[[str], float] | None = None) -> Value:
    """The value of an expression. `letters` gives those of its letters; without it they are Unreadable.

    Raises Unreadable.
    """
    try:
        return _Reader(text, letters).whole()
    except (OverflowError, ZeroDivisionError, ValueError) as error:
        raise error if isinstance(error, Unreadable) else Unreadable(str(error)) from error


def letters_in(text: str) -> set[str]:
    """The letters that stand for something unknown. Raises Unreadable."""
    found: set[str] = set()

    def seen(letter: str) -> float:
        found.add(letter)
        return _at(0)(letter)

    value_of(text, seen)
    return found


def same_value(a: str, b: str) -> bool | None:
    """Whether two expressions have the same value, wherever their letters are put; None where one is unreadable.

    Two numbers are compared exactly if both are rational, else to nine digits; a number written with a decimal point
    is taken as rounded, to six. Two expressions with letters are the same if they are at three random places.
    """
    try:
        points = list(range(_POINTS if letters_in(a) | letters_in(b) else 1))
        if "|" in a + b and len(points) > 1:
            points.append(_NEGATIVE)
        values = [(value_of(a, _at(point)), value_of(b, _at(point))) for point in points]
    except Unreadable:
        return None
    rounded = _is_decimal(a) != _is_decimal(b) and not (_PLAIN.fullmatch(a) and _PLAIN.fullmatch(b))
    return all(close(*pair, rounded=rounded) for pair in values)


def proportional(a: str, b: str) -> bool | None:
    """Whether two expressions are the same but for a factor, as two sides of an equation may be; None as above."""
    try:
        if not letters_in(a) or letters_in(a) != letters_in(b):
            return same_value(a, b)
        values = [(value_of(a, _at(point)), value_of(b, _at(point))) for point in range(_POINTS)]
        if any(close(value, Fraction(0)) for pair in values for value in pair):  # 0 = 0 is no equation
            return False
        ratios = [_apply("/", *pair) for pair in values]
    except (Unreadable, ZeroDivisionError):
        return None
    return all(close(ratio, ratios[0]) for ratio in ratios)


def close(a: Value, b: Value, rounded: bool = False) -> bool:
    """Whether two values are the same, as `same_value` says; what computing leaves of zero is zero."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b or (rounded and abs(a - b) <= Fraction(_CLOSE_DECIMALS) * max(abs(a), abs(b)))
    try:
        a, b = complex(a), complex(b)
    except OverflowError:  # beyond double precision, where the other is not
        return False
    largest = max(abs(a), abs(b))
    if a == 0 or b == 0:
        return largest <= _ZERO
    return abs(a - b) <= largest * (_CLOSE_DECIMALS if rounded else _CLOSE)


def _at(point: int) -> Callable[[str], float]:
    """Where letters are put: positive, so that roots are real; but for the one place that absolute values need."""
    sign = -1 if point == _NEGATIVE else 1
    return lambda letter: sign * random.Random(f"{letter} {point}").uniform(0.4, 2.6)


def _is_decimal(text: str) -> bool:
    return "." in text and _PLAIN.fullmatch(text) is not None


class _Reader:
    """One pass over the tokens; each method reads what it is named for and returns its value."""

    def __init__(self, text: str, letters: Callable[[str], float] | None):
        if len(text) > MAX_CHARS:
            raise Unreadable(f"longer than {MAX_CHARS} characters")
        self._tokens = _tokens(text)
        self._next = 0
        self._depth = 0
        self._letters = letters
        self._in_angle = False
        self._in_bars = 0

    def whole(self) -> Value:
        value = self._sum()
        if self._next < len(self._tokens):
            raise Unreadable(f"cannot read on at {self._peek()!r}")
        if isinstance(value, complex) and not cmath.isfinite(value):
            raise Unreadable("not a number")
        return value

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self, *allowed: str) -> str:
        token = self._peek()
        if not token or (allowed and token not in allowed):
            raise Unreadable(f"{' or '.join(allowed) or 'something'} expected, not {token or 'the end'!r}")
        self._next += 1
        return token

    def _sum(self) -> Value:
        value = self._product()
        while self._peek() in ("+", "-"):
            sign = self._take()
            other = self._product()
            value = _apply("+", value, other if sign == "+" else _apply("*", Fraction(-1), other))
        return value

    def _product(self) -> Value:
        value = self._signed()
        while True:
            token = self._peek()
            if token in _PRODUCT:
                self._take()
                value = _apply("*", value, self._signed())
            elif token in _QUOTIENT:
                self._take()
                value = _apply("/", value, self._signed())
            elif self._begins_a_factor():
                value = _apply("*", value, self._power())
            else:
                return value

    def _begins_a_factor(self) -> bool:
        token = self._peek()
        if token == "|":
            return not self._in_bars
        return bool(token) and (token[0].isalnum() or token[0] in "\\√.({[") and token not in (*_PRODUCT, *_QUOTIENT)

    def _signed(self) -> Value:
        sign = 1
        while self._peek() in ("+", "-"):
            sign = sign if self._take() == "+" else -sign
        value = self._power()
        return value if sign > 0 else _apply("*", Fraction(-1), value)  # of the power: -2^2 is -4

    def _power(self) -> Value:
        self._deeper()
        value = self._with_its_signs(self._atom())
        self._depth -= 1
        return value

    def _with_its_signs(self, value: Value) -> Value:
        while True:
            token = self._peek()
            if token == "^":
                self._take()
                return _apply("^", value, self._argument() if self._peek() == "{" else self._signed())
            if token == "!":
                self._take()
                value = _factorial(value)
            elif token == "%":
                self._take()
                value = _apply("/", value, Fraction(100))
            elif token == "°":
                self._take()
                value = _apply("*", value, complex(math.pi / 180)) if self._in_angle else value
            else:
                return value

    def _atom(self) -> Value:
        self._deeper()
        value = self._read_atom(self._take())
        self._depth -= 1
        return value

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("too deep")

    def _read_atom(self, token: str) -> Value:
        if token[0].isdigit() or token[0] == ".":
            return self._number(token)
        if token in ("(", "[", "{"):
            return self._inside({"(": ")", "[": "]", "{": "}"}[token])
        if token == "|":
            self._in_bars += 1
            value = self._sum()
            self._take("|")
            self._in_bars -= 1
            return abs(value) if isinstance(value, Fraction) else complex(abs(value))
        name = token.lstrip("\\")
        if token in _FRACTION:
            numerator = self._argument()
            return _apply("/", numerator, self._argument())
        if name in ("sqrt", "√"):
            degree: Value = Fraction(2)
            if self._peek() == "[":
                self._take()
                degree = self._inside("]")
            return _root(self._root_argument(token), degree)
        if name in ("binom", "dbinom", "tbinom"):
            return _binomial(self._argument(), self._argument())
        if name in _FUNCTIONS:
            return self._function(name)
        if name == "pi":
            return complex(math.pi)
        if token == "i":
            return 1j
        if token == "e":
            return complex(math.e)
        if (len(token) == 1 and token.isalpha()) or (token[0] == "\\" and name in _LETTERS):
            return self._letter(name)
        raise Unreadable(f"{token!r} is not understood")

    def _number(self, token: str) -> Value:
        value = Fraction(token if token[-1] != "." else token[:-1])
        # 3\frac{1}{2} is a mixed number, and so is "3 1/2".
        start = self._next
        if "." not in token and self._peek() in _FRACTION:
            self._take()
            parts = self._argument(), self._argument()
            if all(isinstance(part, Fraction) and part.denominator == 1 for part in parts):
                numerator, denominator = (part.numerator for part in parts if isinstance(part, Fraction))
                if 0 < numerator < denominator:
                    return value + Fraction(numerator, denominator)
            self._next = start
        elif "." not in token and self._peek().isdigit():
            numerator_text, slash, denominator_text = (*self._tokens[start : start + 3], "", "", "")[:3]
            if slash == "/" and denominator_text.isdigit() and int(denominator_text):
                self._next += 3
                return value + Fraction(int(numerator_text), int(denominator_text))
            raise Unreadable("two numbers beside each other")
        elif self._peek()[:1].isdigit() or self._peek()[:1] == ".":
            raise Unreadable("two numbers beside each other")
        return value

    def _inside(self, closing: str) -> Value:
        in_bars, self._in_bars = self._in_bars, 0
        value = self._sum()
        self._take(closing)
        self._in_bars = in_bars
        return value

    def _argument(self) -> Value:
        r"""What a command takes: a group in braces, or the next token; of a number its first digit, as in \frac12."""
        token = self._peek()
        if token == "{":
            self._take()
            return self._inside("}")
        if token[:1].isdigit():
            self._split_number(1)
            return Fraction(self._take())
        return self._atom()

    def _root_argument(self, token: str) -> Value:
        if token != r"\sqrt" and self._peek()[:1].isdigit():  # sqrt 12 and √12 take the whole number
            return Fraction(self._take())
        return self._argument()

    def _split_number(self, count: int) -> None:
        token = self._tokens[self._next]
        if len(token) > count:
            self._tokens[self._next : self._next + 1] = [token[:count], token[count:]]

    def _function(self, name: str) -> Value:
        power: Value = Fraction(1)
        base: Value | None = None
        while self._peek() in ("^", "_"):
            if self._take() == "^":
                power = self._argument()
            else:
                base = self._argument()
        if power == -1 and name in ("sin", "cos", "tan"):
            name, power = f"arc{name}", Fraction(1)
        in_angle, self._in_angle = self._in_angle, name in _OF_AN_ANGLE
        if self._peek() in ("(", "{", "["):
            argument = self._atom()
            if self._peek() == "°":
                self._take()
                argument = _apply("*", argument, complex(math.pi / 180))
        else:  # sin 2x is the sine of 2x
            argument = self._signed()
            while self._begins_a_factor() and self._peek().lstrip("\\") not in _FUNCTIONS:
                argument = _apply("*", argument, self._power())
        self._in_angle = in_angle
        value: Value = _FUNCTIONS[name](complex(argument))
        if base is not None:
            if name != "log":
                raise Unreadable(f"a base of {name}")
            value = cmath.log(complex(argument)) / cmath.log(complex(base))
        return value if power == 1 else _apply("^", value, power)

    def _letter(self, name: str) -> complex:
        if self._peek() == "_":  # x_1 is a letter of its own
            self._take()
            end = self._next + 1
            if self._peek() == "{":
                end = self._tokens.index("}", self._next) + 1
            name = f"{name}_{''.join(self._tokens[self._next : end]).strip('{}')}"
            self._next = end
        if self._letters is None:
            raise Unreadable(f"the letter {name!r}")
        return self._letters(name)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unreadable(f"{text[position]!r} is not understood")
        position = match.end()
        token = match[0].strip()
        if match["name"] and token not in _FUNCTIONS and token not in ("sqrt", "pi"):
            if len(token) > _MAX_LETTERS:
                raise Unreadable(f"{token!r} is a word")
            tokens += token  # letters beside each other are a product
        else:
            tokens.append(token)
    return tokens


def _apply(operation: str, a: Value, b: Value) -> Value:
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    if operation == "^":
        return _to_the(a, b)
    if exact:
        assert isinstance(a, Fraction) and isinstance(b, Fraction)
        if _bits(a) + _bits(b) > 2 * _MAX_BITS:
            raise Unreadable("too large")
        return a + b if operation == "+" else a * b if operation == "*" else a / b
    a, b = complex(a), complex(b)
    return a + b if operation == "+" else a * b if operation == "*" else a / b


def _to_the(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            if base in (0, 1, -1) or _bits(base) * abs(exponent.numerator) <= _MAX_BITS:
                return base ** (exponent.numerator % 2 if base == -1 else exponent.numerator)
            raise Unreadable("too large")
        if base >= 0 and exponent.denominator <= 64 and abs(exponent.numerator) <= 64:
            return _to_the(_root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    return complex(base) ** complex(exponent)


def _root(value: Value, degree: Value) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 <= degree <= 64:
        return _to_the(value, _apply("/", Fraction(1), degree))
    n = int(degree)
    if isinstance(value, Fraction):
        if value < 0 and n % 2:
            return _apply("*", Fraction(-1), _root(-value, degree))
        top, bottom = _whole_root(abs(value.numerator), n), _whole_root(value.denominator, n)
        if top is not None and bottom is not None:
            return (
                Fraction(top, bottom) if value >= 0 else complex(Fraction(top, bottom)) * cmath.exp(1j * cmath.pi / n)
            )
    return complex(value) ** (1 / n)


def _whole_root(value: int, n: int) -> int | None:
    """The n-th root of a whole number, if it is whole."""
    guess = math.isqrt(value) if n == 2 else round(value ** (1 / n)) if value < 2**900 else -1
    return guess if guess >= 0 and guess**n == value else None


def _factorial(value: Value) -> Value:
    return Fraction(math.factorial(_small(value)))


def _binomial(n: Value, k: Value) -> Value:
    return Fraction(math.comb(_small(n), _small(k)))


def _small(value: Value) -> int:
    """A whole number from 0 to some thousands. Raises Unreadable."""
    if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= _MAX_FACTORIAL:
        return int(value)
    raise Unreadable("a small whole number is needed")


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
