"""Extraction and equality of number answers, by hand, against hostile text, and over all of GSM8K."""

import ast
import gzip
import hashlib
import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

import data_pipeline.answers
from data_pipeline.answers import GRADER_VERSION, Votes, extract, is_equal, parse_number
from data_pipeline.templates import Template

ANSWER, HASH, BOXED, LAST = "answer_line", "hash_line", "boxed", "last_number"


@pytest.mark.parametrize(
    ("response", "answer", "rule"),
    [
        # The rules, in their order.
        ("24 + 48 = 72\nThe answer is: 72.", "72", ANSWER),
        ("the final answer is 72", "72", ANSWER),
        ("THE ANSWER IS: 72", "72", ANSWER),
        ("The answer is:\n72", "72", ANSWER),
        ("The answer is:\n\\[ 72 \\]", "72", ANSWER),
        ("Answer: 72", "72", ANSWER),
        ("**Final answer:** 72 apples", "72", ANSWER),
        ("So the answer to the question is 72.", "72", ANSWER),
        ("24 + 48 = 70\n#### 72", "72", HASH),
        ("#### 71\nThe answer is: 72", "72", ANSWER),
        ("The answer is: 72\n#### 71", "71", HASH),
        ("24 + 48 = \\boxed{72}, which is less than 80.", "72", BOXED),
        ("\\boxed{71} is wrong. It is \\fbox{ 72 }.", "72", BOXED),
        ("\\boxed 72", "72", BOXED),
        ("It is \\boxed{72, as 24 + 48 is 80 - 8", "8", LAST),  # never closed
        ("She has 24, he has 48, so 72 in all.", "72", LAST),
        ("The answer is: unknown.\n#### 72", "72", HASH),
        ("72 it is.\nThe answer is: unknown.", "72", LAST),
        # The last marked line wins.
        ("The answer is: 5.\nWait.\nThe answer is: 6.", "6", ANSWER),
        ("The answer is: 5. No, the answer is: 6.", "6", ANSWER),
        ("#### 5\n#### 6", "6", HASH),
        ("The answer is: 6.\nThen 99 more lines.", "6", ANSWER),
        # In a marked line: the first number after a last "=".
        ("The answer is: 3 + 4 = 7 apples.", "7", ANSWER),
        ("The answer is: 2 * 2 = 4 = 4 of 9.", "4", ANSWER),
        ("The answer is: 72 apples in 3 boxes.", "72", ANSWER),
        ("#### 5 * 2 = 10", "10", HASH),
        # Spellings of a number.
        ("The answer is: $18.", "18", ANSWER),
        ("The answer is: $ 18.", "18", ANSWER),
        ("The answer is: \\$18.50", "18.50", ANSWER),
        ("The answer is: $1,234.50", "1,234.50", ANSWER),
        ("The answer is: 1,234,567.", "1,234,567", ANSWER),
        ("The answer is: -5.", "-5", ANSWER),
        ("The answer is: -$5.", "-5", ANSWER),
        ("The answer is: \u22125.", "-5", ANSWER),
        ("The answer is: (-5)", "-5", ANSWER),
        ("x=-5", "-5", LAST),
        ("The answer is: 3/4 of it.", "3/4", ANSWER),
        ("The answer is: -1/2", "-1/2", ANSWER),
        ("The answer is: 0.125", "0.125", ANSWER),
        ("The answer is: .5", ".5", ANSWER),
        ("The answer is: 25%.", "25", ANSWER),
        ("The answer is: **72**", "72", ANSWER),
        ("The answer is: $\\boxed{72}$.", "72", ANSWER),
        ("It costs 72.", "72", LAST),
        ("The answer is: $\\frac{3}{4}$.", "3/4", ANSWER),
        ("The answer is: 3 1/2 hours.", "7/2", ANSWER),
        ("The answer is: \u00bd", "1/2", ANSWER),
        ("The answer is: twelve.", "12", ANSWER),
        ("The answer is: 1.5 million dollars.", "1500000", ANSWER),
        ("The answer is: 3 dozen.", "3", ANSWER),
        ("The answer is: $5.6 million.", "5600000", ANSWER),
        ("The answer is: twenty-five.", "25", ANSWER),
        ("The answer is: one hundred.", "100", ANSWER),
        ("The answer is: negative 10.", "-10", ANSWER),
        ("The answer is: 72 (48 + 24)", "72", ANSWER),
        ("The answer is: 22 when x=10.", "22", ANSWER),
        ("The answer is: 2*3", "6", ANSWER),
        (r"The answer is: 70\,000", "70000", ANSWER),
        (r"So the ratio is $\frac{3}{2}$.", "3/2", LAST),
        # Whichever is said last, and said as an answer.
        (r"Let us see whether the answer is 12. It is not. \boxed{10}", "10", ANSWER),
        (r"\boxed{10} So our answer is correct.", "10", BOXED),
        (r"\boxed{2 \cdot 10^{5000}}", None, None),  # no number that an answer has
        # Several words, and powers of ten.
        ("The answer is: a hundred and five.", "105", ANSWER),
        ("The answer is: twenty five.", "25", ANSWER),
        ("The answer is: one half.", "1/2", ANSWER),
        ("The answer is: two and a half hours.", "5/2", ANSWER),
        ("The answer is: 1.2e3", "1200", ANSWER),
        ("The answer is 25% of 80, which is 20.", "20", ANSWER),
        ("The answer is: minus one third", "-1/3", ANSWER),
        ("The answer is: 5 x 10^3 meters.", "5000", ANSWER),
        ("The answer is: 18!", "18", ANSWER),
        ("The answer is: $15k.", "15000", ANSWER),
        ("The answer is: 15 km.", "15", ANSWER),
        (r"\boxed{5!}", "120", BOXED),
        ("1 dozen = 12. The answer is: 1 dozen = 12", "12", ANSWER),
        ("The answer is: 18 or $18.00.", "18", ANSWER),
        (r"\boxed{\text{minus }5}", "-5", BOXED),
        ("The answer is: 3 times as many.", "3", ANSWER),
        ("The answer is: 18, not 20.", "18", ANSWER),
        ("The answer is: 90 minutes, or 1.5 hours.", "90", ANSWER),
        # What is denied, left open, or not computed is no answer; nor is another number of the response.
        ("7 + 5. The answer is: 12 or 15.", None, None),
        ("The answer is: not 5.", None, None),
        ("The answer is: 2 hours and 30 minutes.", None, None),
        ("The answer is: less than 12.", None, None),
        ("The answer is: 5, 6, 7, 8", None, None),
        ("The answer is: 3 plus 4.", None, None),
        ("The answer is: 10:30", None, None),
        ("The answer is: 10%10", None, None),
        # A response ends where the model asks itself another question, or speaks for the user.
        ("The answer is: 5.\n\nQuestion: And then?\nThe answer is: 6.", "5", ANSWER),
        ("#### 5\n\nQ: And then?\n#### 6", "5", HASH),
        ("The answer is: 5.\nUSER: And then? ASSISTANT: The answer is: 6.", "5", ANSWER),
        ("The answer is: 5.<|im_end|>\nThe answer is: 6.", "5", ANSWER),
        ("Question: 2 + 3?\nThe answer is: 5.", "5", ANSWER),
        ("Let me see.\nQuestion 1: 5\n", "5", LAST),  # there is no answer before it
        ("<think>The answer is: 6.</think>\nThe answer is: 5.", "5", ANSWER),
        # Digits beside letters and other digits.
        ("The answer is: 72apples", "72", ANSWER),
        ("The answer is: 5km", "5", ANSWER),
        ("one, 2, 1,2345", "2345", LAST),
        # A minus that subtracts, lists or joins belongs to no number.
        ("10-5", "5", "whole"),
        ("so 10 - 5", "5", LAST),
        ("(3+4)-5", "5", LAST),
        ("In all:\n- 72 apples", "72", LAST),
        ("between 5\u201310", "10", LAST),
        # Nothing.
        ("", None, None),
        ("I do not know.", None, None),
        ("The answer is: none. ####", None, None),
        ("5/0", None, None),
        ("-$,./%", None, None),
        ("\u0663\u0664 \u00b2 \u216b \uff17", None, None),
    ],
)
def test_the_answer_and_its_rule(response, answer, rule):
    extracted = extract(response, "number")
    assert (extracted.answer, extracted.rule) == (answer, rule)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        (" 72 \n", 72),
        ("7.", 7),
        ("007", 7),
        ("-1,234.5", Fraction(-2469, 2)),
        ("\u22123", -3),
        ("$18", 18),
        ("-$18", -18),
        ("$-18", -18),
        ("3/4", Fraction(3, 4)),
        ("1.5/2", Fraction(3, 4)),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("50%", 50),
        ("9" * 50, 10**50 - 1),
    ],
)
def test_a_number_has_its_exact_value(text, value):
    assert parse_number(text) == value


NO_NUMBERS = [
    "",
    " ",
    "-",
    ".",
    "$",
    "%",
    "/2",
    "1/",
    "1/0",
    "1/-2",
    "1/2/3",
    "1 1/2",
    "12 34",
    "1,5",
    "1,23",
]
NO_NUMBERS += ["1$2", "--5", "1e5", "1_000", "0x10", "nan", "inf", "x", "7 apples", "1..2", "1.2.3", "9" * 51]
NO_NUMBERS += ["\u0663", "\u00b2", "\uff17"]  # digits to Python's str.isdigit, none to a maths problem


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number_has_no_value(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("72", "72", True),
        ("72.0", "72", True),
        ("72.0001", "72", False),
        ("71.99999999", "72", False),
        ("1,234", "1234", True),
        ("$1,234.00", "1234", True),
        ("144/2", "72", True),
        ("-72", "72", False),
        ("0", "-0", True),
        ("100000000000000000001", "100000000000000000000", False),  # equal as floats
        ("0.5", "1/2", True),
        ("1/2", "0.5", True),
        ("0.333", "1/3", True),  # off by exactly 1e-3
        ("0.3329", "1/3", False),
        ("0.3337", "1/3", False),
        ("2.5025", "2.5", True),
        ("2.50251", "2.5", False),
        ("-0.5", "0.5", False),
        ("-0.5", "-1/2", True),
        ("no number", "72", False),
        ("", "72", False),
    ],
)
def test_integers_are_equal_exactly_and_others_to_a_thousandth(answer, gold, equal):
    assert is_equal(answer, gold, "number") is equal


@pytest.mark.parametrize("gold", ["", "seven", "1 1/2", "1/0"])
def test_a_gold_answer_that_is_no_number_is_an_error(gold):
    with pytest.raises(ValueError, match=r"the gold answer .* is not a number"):
        is_equal("72", gold, "number")


def test_equal_numbers_share_a_vote_and_others_do_not():
    vote = Votes("number").of
    assert len({vote(text) for text in ("1200", "1,200.0", "$1200", "2400/2", "1200.")}) == 1
    assert len({vote(text) for text in ("1200", "-1200", "1200.5", "0.12", "120")}) == 5
    assert vote("0.5") == vote("1/2")
    assert vote(None) is None and vote("many") is None


def test_equal_mathematics_shares_a_vote_in_any_spelling_and_others_do_not():
    vote = Votes("latex").of
    same = [
        [r"\frac12", "1/2", "0.5", r"\dfrac{2}{4}", "$.5$"],
        [r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", r"\sqrt3 / 2"],
        ["x+1", "1 + x"],
        [r"\text{even}", "even"],
        ["(1, 2)", "(1,2)"],
        ["right"],
        ["3^{20000}", "9^{10000}", r"\frac{3^{20001}}{3}"],
    ]
    votes = [{vote(text) for text in texts} for texts in same]
    assert [len(of) for of in votes] == [1] * len(same)
    assert len(set().union(*votes)) == len(same) and vote(None) is None


def test_whoever_changes_how_answers_are_judged_raises_the_version():
    """Grades of two versions do not compare; a change that only rewords or reorders takes the new digest alone."""
    folder = Path(data_pipeline.answers.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):  # without docstrings
            body = getattr(node, "body", None)
            if (
                isinstance(body, list)
                and body
                and isinstance(body[0], ast.Expr)
                and isinstance(body[0].value, ast.Constant)
            ):
                body[0].value.value = ""
        digest.update(ast.dump(tree).encode())
    assert (GRADER_VERSION, digest.hexdigest()[:16]) == ("3", "33ab8ff73bc6fa4e")


@pytest.mark.parametrize(
    "text",
    [
        "7" * 10**6,
        "The answer is: " + "7" * 10**6,
        "0." + "7" * 10**6,
        "1/" + "7" * 10**6,
        "$-,." * 10**5,
        "1," * 10**5,
        "1,234" * 10**5,
        "1" + ",234" * 10**5 + "5",
        "-" * 10**6,
        "the answer is" * 10**5,
        "the answer is" + "\n" * 10**6,
        "the answer is" + " = " * 10**5,
        "####" * 10**5,
        "=" * 10**6,
        "(" * 10**5 + "1" + ")" * 10**5,
        "{[" * 10**5,
        "\u0663" * 10**6,
        "\u00b2/" * 10**5,
        "\u2212" * 10**6,
        "\x00" * 10**6,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_hostile_text_is_answered_within_a_second(text):
    started = time.process_time()
    answer = extract(text, "number").answer
    is_equal(text, "72", "number")
    Votes("number").of(text)
    assert time.process_time() - started < 1
    assert answer is None or len(answer) <= 50


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_gsm8k_solution_is_graded_equal_to_its_own_gold(split, test_data, request):
    with gzip.open(test_data / f"gsm8k_{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        public = [json.loads(line)["answer"].split("#### ")[1].replace(",", "") for line in file]
    wrong = []
    for problem, gold in zip(request.getfixturevalue(f"gsm8k_{split}"), public, strict=True):
        extracted = extract(Template().render_response(problem.solution, problem.answer), "number")
        if extracted.rule != ANSWER or not is_equal(extracted.answer, gold, "number"):
            wrong.append((problem.id, extracted, gold))
    assert wrong == []


PHRASINGS = """
The answer is: {}.
The answer is {}
The answer is {} apples.
The answer is ${}.
#### {}
#### ${}
\\boxed{{{}}}
The final answer is: $\\boxed{{{}}}$
The answer is **{}**.
**Answer:** {} dollars
The answer is {} minutes, or 99999 hours.
The answer is {}, since 24 + 48 = 72.
The answer is {} (which is 3 more than 5).
The answer is {} times as many.
The answer is {} dollars per week.
The answer is {}%.
\\boxed{{\\${}}}
\\boxed{{{}\\text{{ dollars}}}}
The answer is x = {}.
The answer is about {} people.
The answer is: 1 + 2 = {}
The answer is {}!
The answer is {}, not 55555.
The answer is {} more than 5.
In total she pays {}
The answer is {} out of 100000 students.
The answer is \\({}\\).
The answer is {} - that's how many she sold.
The answer is {} and she is happy.
Answer: {} sq. ft.
"""


@pytest.mark.slow
def test_every_gold_answer_of_gsm8k_is_right_however_it_is_put(gsm8k_test):
    for phrasing in PHRASINGS.strip().split("\n"):
        for problem in gsm8k_test[::3]:
            for written in {problem.answer, f"{int(problem.answer):,}", f"{problem.answer}.00"}:
                text = f"We compute 12 * 3 = 36.\n{phrasing.format(written)}"
                answer = extract(text, "number").answer
                assert answer is not None and is_equal(answer, problem.answer, "number"), text
                assert not is_equal(answer, str(int(problem.answer) + 1), "number")
