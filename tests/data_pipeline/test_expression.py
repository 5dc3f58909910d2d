"""Expressions against values that are computed beside them, from random trees, and against what hostile text does."""

import math
import random
import time
from fractions import Fraction

import pytest

from data_pipeline.answers.expression import Unreadable, proportional, same_value, value_of


def random_expression(rng, depth):
    """LaTeX, and its exact value, built together; every part stands in brackets of one kind or another."""
    if depth == 0:
        number = rng.randint(0, 40)
        return rng.choice([(str(number), Fraction(number)), (f"{number}.5", number + Fraction(1, 2))])
    (a, x), (b, y) = (random_expression(rng, depth - 1) for _ in range(2))
    kind = rng.randrange(6)
    if kind == 0:
        return f"({a} + {b})", x + y
    if kind == 1:
        return f"({a} - {b})", x - y
    if kind == 2:
        return rng.choice([f"({a} \\cdot {b})", f"({a})({b})", f"({a} \\times {b})"]), x * y
    if kind == 3:
        return (rf"\frac{{{a}}}{{{b}}}", x / y) if y else (a, x)
    if kind == 4:
        return (f"({a} / ({b}))", x / y) if y else (b, y)
    power = rng.randint(0, 3)
    return f"({a})^{{{power}}}", x**power


def test_values_are_those_of_fractions_computed_beside():
    rng = random.Random(0)
    for _ in range(500):
        text, value = random_expression(rng, rng.randint(0, 4))
        assert value_of(text) == value, text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2^2", -4),
        ("2^3^2", 512),
        ("2^{-1}", Fraction(1, 2)),
        ("2+3*4", 14),
        ("10-2-3", 5),
        ("8/2/2", 2),
        ("1/2(3)", Fraction(3, 2)),
        ("--3", 3),
        (r"\frac12", Fraction(1, 2)),
        (r"\frac1{72}", Fraction(1, 72)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        (r"3\frac{3}{2}", Fraction(9, 2)),  # no mixed number: a product
        ("3 1/2", Fraction(7, 2)),
        (r"\sqrt{16}", 4),
        (r"\sqrt[3]{-27}", -3),
        (r"\sqrt{\frac{4}{9}}", Fraction(2, 3)),
        (r"\sqrt49", 18),  # LaTeX's root takes one digit
        ("√49", 7),
        ("|3-5|", 2),
        ("5!", 120),
        (r"\binom{5}{2}", 10),
        ("50%", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("8^{2/3}", 4),
        ("90°", 90),
    ],
)
def test_exact_values(text, value):
    assert value_of(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\pi/2", math.pi / 2),
        (r"2\pi", 2 * math.pi),
        (r"\sqrt2", math.sqrt(2)),
        (r"\sin 30°", 0.5),
        (r"\cos(60°)", 0.5),
        (r"\sin^2 1 + \cos^2 1", 1),
        (r"\ln e^3", 3),
        (r"\log_2 8", 3),
        (r"\log 1000", 3),
        (r"2\sin 2\cos 2", math.sin(4)),
        (r"(1+i)(1-i)", 2),
        (r"e^{\pi i}", -1),
        (r"\tan^{-1} 1", math.pi / 4),
    ],
)
def test_values_of_double_precision(text, value):
    assert complex(value_of(text)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+2x+2", False),
        ("2xy", "2yx", True),
        ("x_1+x_2", "x_2+x_1", True),
        ("x_1", "x_2", False),
        (r"\frac{x^2-1}{x-1}", "x+1", True),
        ("x", "y", False),
        (r"\sqrt{x^2}", "x", True),  # letters are put at positive places
        (r"\alpha+1", r"1+\alpha", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.3333", False),
        (r"\pi", "3.14159", True),
        (r"\pi", "3.1416", False),
        ("10^{-20}", r"2\cdot 10^{-20}", False),
        (r"10^{-20}\pi", r"2\cdot 10^{-20}\pi", False),
        ("3^{2007}", "3^{2007}+1", False),
        (r"\sqrt{2}-\sqrt{2}", "0", True),
        ("CD", "DC", True),
    ],
)
def test_the_same_value_wherever_letters_are_put(a, b, same):
    assert same_value(a, b) is same


def test_sides_of_an_equation_are_the_same_up_to_a_factor():
    assert proportional("y - (2x+3)", "(2x - y + 3) - 0")
    assert not proportional("y - (2x+3)", "y - (2x+4)")
    assert not proportional("y - 2x", "z - 2x")


@pytest.mark.parametrize(
    "text",
    ["", "+", "x", "1/0", "0^{-1}", "(1", "1)", "1 2", "1..2", "f(x", r"\unknown{2}", r"\frac{1}", "dollars",
     "10^{10^{10}}", "9^{9^{9}}", "100000!", "(((3!)!)!)!", "a" * 5000, "(" * 500 + "1" + ")" * 500, "-" * 1900,
     r"\frac" * 400, r"\sqrt" * 400, "^" * 100, "2^" * 900 + "2", r"\sin" * 300, "10^{400}\\pi", r"\binom{10^9}{5}",
     r"\sqrt[0]{5}", "import os", "\u0663"],
)  # fmt: skip
def test_what_has_no_value_here_is_said_at_once(text):
    started = time.process_time()
    with pytest.raises(Unreadable):
        value_of(text)
    assert time.process_time() - started < 0.5
