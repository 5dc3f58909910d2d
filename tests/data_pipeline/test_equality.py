"""Equality of mathematical answers: by hand, over all of MATH, and against wrong answers that MATH itself offers."""

import random
import re

import pytest

from data_pipeline.answers import check_gold, extract, is_equal
from data_pipeline.tasks import read_problems

RIGHT = r"""
all real numbers                | (-\infty,\infty)
\mathbb{R}                      | (-\infty,\infty)
2102 in base 3                  | 2102_3
negative one third              | -\frac13
5!                              | 120
5 red balls                     | 5
5 miles per hour                | 5
twenty five                     | 25
the function is even            | \text{even}
\frac{1}{2}                     | 0.5
1/2                             | \frac12
\dfrac{\sqrt{3}}{2}             | \frac{\sqrt3}2
\sqrt{12}                       | 2\sqrt{3}
2√3                             | 2\sqrt{3}
½                               | \frac{1}{2}
−3                              | -3
x² + 1                          | x^2+1
2x+3                            | 3 + 2x
(x+1)^2                         | x^2+2x+1
x=5                             | 5
5                               | x=5
2+3=5                           | 5
\{1,2\}                         | \{2,1\}
1,2                             | 2,1
1 and 2                         | 1,2
x=1 or x=2                      | 1,2
7, -2, \text{ and } -5          | -5, -2, 7
x=1, y=2                        | (1,2)
1 \pm \sqrt{19}                 | 1-\sqrt{19}, 1+\sqrt{19}
3, 4                            | (3,4)
[1,2)                           | [1, 2)
1 \le x < 2                     | [1,2)
x > 3                           | (3,\infty)
3 < x                           | (3,\infty)
x<-2 or x>3                     | (-\infty,-2)\cup(3,\infty)
(3,\infty)\cup(-\infty,-2)      | (-\infty,-2)\cup(3,\infty)
x \ne 3                         | (-\infty,3)\cup(3,\infty)
x \in [-2,7]                    | [-2,7]
\{x \mid x > 3\}                | (3,\infty)
5 cm                            | 5\text{ cm}
5                               | 5\text{ cm}
50 cm                           | 0.5\text{ m}
60 minutes                      | 1\text{ hour}
864 square inches               | 864\mbox{ inches}^2
18\text{ ways.}                 | 18
\$4                             | 4
4 dollars                       | \$4
50 cents                        | \$0.50
\$32,348                        | \$32,\!348
90 degrees                      | 90^\circ
\cos 77°                        | \sin 13^\circ
7\%                             | 7
0.07                            | 7\%
42_{7}                          | 42_7
42                              | 42_7
monday                          | \text{Monday}
B                               | \text{(B)}
(B)                             | \text{B}
\textbf{(B) } 5                 | \text{(B)}
F, C and A                      | \text{A,C,F}
4:30 PM                         | \text{4:30 p.m.}
9 a.m.                          | 9\text{ a.m.}
5,460                           | 5,\!460
70, 110                         | 70,110
3 1/2                           | 3\frac12
0.\overline{3}                  | \frac13
y = 2x+3                        | 2x+3
2x+3                            | y = 2x+3
2x - y + 3 = 0                  | y = 2x+3
\begin{bmatrix}1\\7\end{bmatrix} | \begin{pmatrix} 1 \\ 7 \end{pmatrix}
(1,7)                           | \begin{pmatrix} 1 \\ 7 \end{pmatrix}
\begin{pmatrix}.5&0\\0&1\end{pmatrix} | \begin{pmatrix} 1/2 & 0 \\ 0 & 1 \end{pmatrix}
1:2                             | \frac{1}{2}
five                            | 5
\frac{\pi}{4}                   | π/4
0.333333333                     | \frac13
3-2f(x)                         | 3 - 2f(x)
f(x) = 2x                       | 2x
\left(-\infty, 0\right]         | (-\infty,0]
x^2+y^2-13=0                    | x^2+y^2=13
(x,y) = (1,-2)                  | (1,-2)
y=2, x=1                        | (1,2)
\mathbf{v} = (1,7)               | \begin{pmatrix} 1 \\ 7 \end{pmatrix}
\left(\begin{array}{c} 1 \\ 7 \end{array}\right) | \begin{pmatrix} 1 \\ 7 \end{pmatrix}
\frac{1}{5}\begin{pmatrix} 5 \\ 35 \end{pmatrix} | \begin{pmatrix} 1 \\ 7 \end{pmatrix}
f^{-1}(x) = 2x                  | 2x
m+n=5                           | 5
|AB| = 5                        | 5
\angle ABC = 45^\circ            | 45^\circ
5 = x                           | 5
P(2,-1,5)                       | (2,-1,5)
[0,+\infty)                      | [0,\infty)
\{x \in \mathbb{R} \mid x \ge 0\} | [0,\infty)
-10 \le f(x) \le 4               | [-10,4]
x>1 \text{ and } x \le 2          | (1,2]
\frac12, or 0.5                 | 1/2
204_{\text{five}}                | 204_5
204 (base 5)                    | 204_5
sqrt(2)/2                       | \frac{\sqrt2}{2}
8:34 PM                         | 8\!:\!34 \text{ p.m.}
A and C                         | \text{A,C}
(E) 5                           | \text{(E)}
\text{five}                      | 5
\approx 8.24                     | 8.24 \text{ mph}
1 million                       | 1,000,000
1 to 2                          | 1:2
\color{red}{17}                  | 17
10 010                          | 10,\!010
A5_{11}                         | \text{A5}_{11}
The function is even.           | \text{even}
on Tuesday                      | \text{Tuesday}
9:00 AM                         | 9\text{ a.m.}
f(x)=2x+3                       | y=2x+3
x**2+1                          | x^2+1
(-inf, -5) U (7, inf)           | (-\infty,-5)\cup(7,\infty)
x<-5, x>7                       | (-\infty,-5)\cup(7,\infty)
"""
WRONG = r"""
5!                              | 5
2004!!                          | 2004!
5 minus x                       | 5
5 plus x                        | 5
5 over x                        | 5
5 mod n                         | 5
5 choose k                      | 5
5 factorial                     | 5
5 thousandths                   | 5
5 alpha                         | 5
5\text{ is wrong}               | 5
5 \text{ and not 6}             | 5
20 degrees below zero           | 20
odd, even                       | \text{even}
can't be even                   | \text{even}
true/false                      | \text{true}
false, true                     | \text{true}
hardly true                     | \text{true}
Monday, Tuesday                 | \text{Monday}
A: not this                     | \text{(A)}
4.5 p.m.                        | 45\text{ p.m.}
y=5                             | x=5
x+1=5                           | 5
(1,2)                           | (2,1)
[1,2]                           | (1,2)
[1,2]                           | [1,2)
\{1,2\}                         | \{1,2,3\}
1,2                             | 1,2,2
1,1,2                           | 1,2,2
1 < x < 2                       | [1,2]
x > 3                           | [3,\infty)
x < 3                           | (3,\infty)
5 m                             | 5\text{ cm}
864 cubic inches                | 864\mbox{ inches}^2
440\text{ cm}^5                 | 440\text{ cm}^2
9 p.m.                          | 9\text{ a.m.}
4:30 a.m.                       | \text{4:30 p.m.}
5 cents                         | \$5
30\%                            | 30^\circ
42_8                            | 42_7
30                              | 42_7
Tuesday                         | \text{Monday}
C                               | \text{(B)}
A,C                             | \text{A,C,F}
KAME                            | \text{MAKE}
dod                             | \text{odd}
0.33                            | \frac13
2.236                           | \sqrt5
3.14                            | \pi
10^{-20}                        | 2\cdot 10^{-20}
10^{-20}                        | 0
3^{2008}                        | 3^{2007}
10^{30}+1                       | 10^{30}
3                               | 3s^2
3s^2                            | 3
q-p                             | p-q
-x                              | x
f(1) < f(2) < f(4)              | f(2) < f(1) < f(4)
(7,1)                           | \begin{pmatrix} 1 \\ 7 \end{pmatrix}
\begin{pmatrix} 1 \\ 8 \end{pmatrix} | \begin{pmatrix} 1 \\ 7 \end{pmatrix}
\begin{pmatrix} 1 & 7 \end{pmatrix} | \begin{pmatrix} 1 \\ 7 \end{pmatrix}
y=2x+4                          | y=2x+3
6,000                           | (6,0)
1+\sqrt{19}                     | 1 \pm \sqrt{19}
-\infty                         | \infty
\text{none}                     | 0
120                             | 5!+1
x^2                             | x^3
\frac{2}{1}                     | \frac12
July 20                         | \text{June 20}
x+y=x+y                         | y=2x+3
0x=0y                           | y=2x+3
x=x                             | x=5
y=3, x=4                        | (3,4)
(-36,104)                       | [-36,104]
100101                          | (100,101)
[2,3]                           | 2,3
-2 < x < 1                      | -2,1
C                               | \text{A,C}
A or B                          | \text{(A)}
A circle                        | \text{(A)}
5 \text{ million}                | 5
5 \text{ squared}                | 5
8 \text{ or more}                | 8
90 cubic units                  | 90\text{ square units}
\$306,956.64                     | 306,956.63
1000001.0                       | 1000000
|x|                             | x
1 000                           | 0
17_8                            | 17
neither even nor odd            | \text{even}
Tuesday or Monday               | \text{Tuesday}
"""


def pairs(table):
    return [
        (line.rpartition(" | ")[0].strip(), line.rpartition(" | ")[2].strip()) for line in table.strip().splitlines()
    ]


@pytest.mark.parametrize(("answer", "gold"), pairs(RIGHT))
def test_the_same_in_another_spelling_is_right(answer, gold):
    assert is_equal(answer, gold, "latex") is True


@pytest.mark.parametrize(("answer", "gold"), pairs(WRONG))
def test_what_only_looks_alike_is_wrong(answer, gold):
    assert is_equal(answer, gold, "latex") is False


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("3+f(x)", "f(x)+3", True),
        (r"\lim_{x\to 0} \frac{\sin x}{x}", "1", True),
        (r"\int_0^1 2x\,dx", "1", True),
        (r"\sum_{k=1}^{4} k", "10", True),
        (r"\sum_{k=1}^{4} k", "11", False),
        (r"\int_0^1 10^{-20}\,dx", r"\int_0^1 2 \cdot 10^{-20}\,dx", False),  # rounded, both are 0
    ],
)
def test_what_we_cannot_read_is_decided_by_computer_algebra(answer, gold, right):
    assert is_equal(answer, gold, "latex") is right


@pytest.mark.parametrize(
    ("response", "answer", "rule"),
    [
        (r"The answer is: $\frac{1}{2}$.", r"$\frac{1}{2}$", "answer_line"),
        (r"So $x = 5$, as we wanted.", "x = 5", "last_math"),
        (r"The answer is $x=2$ and $x=3$.", "$x=2$ and $x=3$", "answer_line"),
        (r"The answer is 5 because $2+3=5$.", "5", "answer_line"),
        (r"The answer is $10$ cm, since it is long.", "10 cm", "answer_line"),
        (r"Therefore $\boxed{1}$ and $\boxed{2}$.", "1, 2", "boxed"),
        (r"\boxed{\frac{\sqrt{3}}{\{2\}}} it is.", r"\frac{\sqrt{3}}{\{2\}}", "boxed"),
        ("The answer is:\n\\[\n\\frac{3}{4}\n\\]\nand so on", "\\[\n\\frac{3}{4}\n\\]", "answer_line"),
        (r"This is $\boxed{7}$, so our answer is correct.", "7", "boxed"),
        ("Answer: Monday", "Monday", "answer_line"),
        (r"\frac{1}{2}", r"\frac{1}{2}", "whole"),
        ("(B)", "(B)", "whole"),
        ("So we get 42.", "42", "last_number"),
        ("I cannot tell what it might possibly be.", None, None),
        ("", None, None),
        (r"\boxed{5", "5", "last_number"),
    ],
)  # fmt: skip
def test_the_answer_of_a_mathematical_response_and_its_rule(response, answer, rule):
    extracted = extract(response, "latex")
    assert (extracted.answer, extracted.rule) == (answer, rule)


@pytest.fixture(scope="module")
def golds(test_data):
    every = [
        p
        for split in ("train", "test")
        for p in read_problems("math", split, str(test_data / f"math_{split}.jsonl.gz"))
    ]
    assert len(every) == 12_498  # two of the training rows have an empty box
    return every


def never(answer, gold):
    return False


def test_each_gold_answer_of_math_is_right_in_several_phrasings(golds):
    """Without computer algebra; the exceptions are texts that say "our answer: …" of something else."""
    wrong = []
    for problem in golds:
        for response in (
            problem.solution,
            f"{problem.solution}\nThe answer is: {problem.answer}.",
            f"We find it. The final answer is ${problem.answer}$. I hope it is correct.",
            f"So\n\\[ \\boxed{{{problem.answer}}}. \\]",
            problem.answer.replace(r"\frac", r"\dfrac").replace("(", r"\left(").replace(")", r"\right)"),
        ):
            answer = extract(response, "latex").answer
            if answer is None or not is_equal(answer, problem.answer, "latex", never):
                wrong.append((problem.answer, response[-200:]))
    assert len(wrong) <= 0.0005 * 5 * len(golds), wrong


def test_no_changed_gold_answer_of_math_is_right(golds):
    """A digit that is raised by one changes any of them, but for what a list or a product may hide."""
    rng = random.Random(0)
    wrong = []
    texts = sorted({problem.answer for problem in golds if re.search(r"\d", problem.answer)})
    for gold in texts:
        place = rng.choice([match.start() for match in re.finditer(r"\d", gold)])
        changed = gold[:place] + str((int(gold[place]) + 1) % 10) + gold[place + 1 :]
        if is_equal(changed, gold, "latex", never):
            wrong.append((changed, gold))
    assert len(wrong) <= 0.002 * len(texts), wrong


def test_other_problems_answers_are_wrong(golds):
    """Two different golds are equal only where a person would say so: no brackets, units, names aside."""
    rng = random.Random(0)
    texts = sorted({problem.answer for problem in golds if not re.fullmatch(r"-?\d+", problem.answer)})
    alike = []
    for _ in range(20_000):
        a, b = rng.sample(texts, 2)
        bare = [
            re.sub(r"\\(?:[dt]?frac|left|right|text|mbox|circ)|[dt]frac|[^\w.\-/]|[a-z]=|cup", "", text)
            for text in (a, b)
        ]
        if is_equal(a, b, "latex", never) and sorted(bare[0]) != sorted(bare[1]):
            alike.append((a, b))
    assert len(alike) <= 8, alike


@pytest.mark.parametrize(("gold", "kind"), [("", "latex"), ("seven", "number"), ("1 2 3", "puzzle"), ("7", "poem")])
def test_a_gold_answer_of_another_kind_is_an_error(gold, kind):
    with pytest.raises(ValueError, match=r"gold answer|puzzle|gradable"):
        check_gold(gold, kind)


SOLVED = "58-51=7; 6-7=-1; 3*(-1)=-3; -3+7=4"


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (SOLVED, True),
        (SOLVED.replace("; ", "\n").replace("*", "×"), True),
        ("58-51=7\n6-7=-1\n3*(-1)=-3\n-3+7=4 done", True),
        (SOLVED.replace("-3+7=4", "-3+7=5"), False),  # wrong arithmetic
        ("58-51=7; 6-7=-1; 3*(-1)=-3", False),  # a number is left
        ("58-51=7; 6-7=-1; 3*(-1)=-3; -3+8=5", False),  # 8 is not there
        ("58-51=7; 7-6=1; 3*1=3; 7-3=4", True),
        ("58-51=7; 7-6=1; 3*1=3; 3+1=4", False),  # 1 is used twice, and a 7 is left
        ("58-51=7; 6-7=-1; 3*(-1)=-3; -3+7=4; 4+0=4", False),
        ("", False),
        ("=" * 1000, False),
        ("51/0=3; 6-7=-1; 3*(-1)=-3; -3+7=4", False),
    ],
)  # fmt: skip
def test_a_puzzle_is_solved_by_its_steps(response, right):
    assert is_equal(response, "3, 6, 7, 51, 58 -> 4", "puzzle") is right
