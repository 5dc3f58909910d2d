"""Formulas become MathML, prices stay prices, and nothing a model writes becomes an element of its own."""

import gzip
import json
import re
import time
from html.parser import HTMLParser

import pytest

from eval.typeset import answer, formula, typeset


class Elements(HTMLParser):
    """What an independent parser finds in a piece of HTML."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], set(), ""
        self.feed(str(text))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.words += data


def test_a_formula_is_set_and_the_words_around_it_stay():
    found = Elements(typeset(r"So $\frac{1}{2}$ of <b>it</b> & more."))
    assert [tag for tag in found.tags if tag in ("math", "mfrac")] == ["math", "mfrac"] and "b" not in found.tags
    assert found.words == "So 12 of <b>it</b> & more."


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("It costs $5 and then she pays $7.", 0),
        ("It costs $5.", 0),
        ("$x$ and $y$", 2),
        (r"\(x\) and \[y\] and $$z$$", 3),
        (r"\begin{align*}x&=1\\y&=2\end{align*}", 1),
        (r"\$5 and \$6", 0),
        ("$x$ costs $5", 1),
        (r"$\text{not a formula but words}$", 1),
        ("[asy] draw((0,0)--(1,1)); label('$A$'); [/asy]", 0),
        ("$" * 99, 0),
        (r"$\frac{$", 0),
        (r"$\newcommand{\x}{\x\x}\x$", 0),
        ("$" + "x" * 1000 + "$", 0),
    ],
)  # fmt: skip
def test_what_is_a_formula(text, formulas):
    assert Elements(typeset(text)).tags.count("math") == formulas


@pytest.mark.parametrize(
    ("text", "marked", "words"),
    [
        ("3 + 4 = 7. The answer is: 7.", "7", "7"),
        ("The answer is: <7>.", "<7>", "<7>"),
        (r"The answer is: $\frac{1}{2}$.", r"\frac{1}{2}", "12"),
        (r"The answer is: $\frac{1}{2}$.", r"$\frac{1}{2}$", "12"),
        (r"Either $1$ or $2$.", "$1$ or $2$", "1 or 2"),
        ("Nothing here.", "7", ""),
        ("Nothing here.", None, ""),
    ],
)
def test_the_answer_is_marked_where_it_stands_last(text, marked, words):
    html = str(typeset(text, marked))
    found = "".join(Elements(part).words for part in re.findall(r"<mark>(.*?)</mark>", html))
    assert found == words
    assert Elements(html).words.replace(" ", "") == Elements(typeset(text)).words.replace(" ", "")


HOSTILE = [
    "<script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    r"$\text{<script>alert(1)</script>}$",
    r"$\text{&lt;img src=x onerror=alert(1)&gt;}$",
    r"$x < y > <img src=x onerror=alert(1)>$",
    r"$\href{javascript:alert(1)}{x}$",
    r"$\style{background:url(http://evil.example)}{x}$",
    r"$\color{red\" onclick=\"alert(1)}{x}$",
    r"$\colorbox{\"><script>}{x}$",
    r"$&#x3c;script&#x3e;$",
    r"$\class{evil}{x}$",
    r"$\hspace{1\" onload=\"x}$",
    "$" + "{" * 500 + "$",
    "$" + r"\left(" * 80 + "$",
    "$" + r"\frac" * 100 + "$",
    "$" + "^" * 500 + "$",
    "$\x00\x01\ud800$",
    "$" + r"\begin{matrix}" * 30 + "$",
    "</mark></pre><iframe>",
]


# Of MathML Core: elements that show, and attributes that neither run, load, nor link anything.
HARMLESS_TAGS = set(
    """
    mark math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd
    mstyle mpadded mphantom menclose merror mmultiscripts mprescripts none
    """.split()
)
HARMLESS_ATTRIBUTES = set(
    """
    display displaystyle scriptlevel mathvariant stretchy symmetric fence form accent accentunder movablelimits
    linethickness width height depth lspace rspace minsize maxsize columnalign rowspacing columnspacing notation
    """.split()
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    started = time.process_time()
    found = Elements(typeset(text, text[:10]))
    assert set(found.tags) <= HARMLESS_TAGS and found.attributes <= HARMLESS_ATTRIBUTES
    assert time.process_time() - started < 1
    assert set(Elements(answer(text, "latex")).tags) <= HARMLESS_TAGS


def test_most_formulas_of_math_are_set(test_data):
    with gzip.open(test_data / "math_test.jsonl.gz", "rt", encoding="utf-8") as file:
        golds = [json.loads(line)["solution"] for _, line in zip(range(400), file, strict=False)]
    formulas = [latex for text in golds for latex in re.findall(r"(?<![\\$])\$([^$]+)\$", text)]
    assert len(formulas) > 2000
    assert sum(formula(latex) is None for latex in formulas) < 0.01 * len(formulas)
