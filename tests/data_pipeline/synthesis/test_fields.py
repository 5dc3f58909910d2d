"""Fields are found whatever dress a teacher writes them in. Every text here was written by hand."""

import json
import time

import pytest

from data_pipeline.synthesis.fields import find_fields, last_question, schema

QUESTION = ("created question", "verification and modification", "final created question")
ANSWER = ("solution", "final answer")


@pytest.mark.parametrize(
    "text",
    [
        "SOLUTION: 3 + 4 = 7\nFINAL ANSWER: 7",
        "Solution:\n3 + 4 = 7\n\nFinal answer:\n7",
        "**Solution:** 3 + 4 = 7\n\n**Final Answer:** 7",
        "**SOLUTION**: 3 + 4 = 7\n**FINAL ANSWER**: **7**",
        "### Solution:\n3 + 4 = 7\n\n### Final Answer:\n7",
        "## **Solution:**\n\n3 + 4 = 7\n\n---\n\n## **Final Answer:**\n\n7",
        "1. Solution: 3 + 4 = 7\n2. Final answer: 7",
        "- solution: 3 + 4 = 7\n- final_answer: 7",
        "(1) SOLUTION : 3 + 4 = 7\n(2) FINAL ANSWER : 7",
        "> Solution: 3 + 4 = 7\n> Final Answer: `7`",
        "Of course! Here it is.\n\nSOLUTION: 3 + 4 = 7\nFINAL ANSWER: <7>",
        "_Solution:_ 3 + 4 = 7\n_Final Answer:_ _7_",
        "SOLUTION：3 + 4 = 7\nFINAL ANSWER：7",
        '{"solution": "3 + 4 = 7", "final_answer": "7"}',
        '```json\n{"Solution": "3 + 4 = 7", "Final Answer": 7}\n```',
        "SOLUTION: ```\n3 + 4 = 7\n```\nFINAL ANSWER: 7",
        "**SOLUTION: 3 + 4 = 7**\n**FINAL ANSWER: 7**",
        "### SOLUTION\n3 + 4 = 7\n\n### FINAL ANSWER\n7",
        "**Solution**\n3 + 4 = 7\n\n**Final answer**\n7",
        "### SOLUTION\r\n3 + 4 = 7\r\n\r\n### FINAL ANSWER\r\n7\r\n",
        "**Step 1: SOLUTION**\n3 + 4 = 7\n**Step 2: FINAL ANSWER**\n7",
        "SOLUTION - 3 + 4 = 7\nFINAL ANSWER – 7",
        "SOLUTION: 3 + 4 = 7 FINAL ANSWER: 7",
        "Here you are. **SOLUTION:** 3 + 4 = 7 **FINAL ANSWER:** 7",
        "SOLUTION: 3 + 4 = 7\nFINAL ANSWER: <final answer>7</final answer>",
        "<solution>3 + 4 = 7</solution>\n\nFINAL ANSWER: 7",
        "<solution>3 + 4 = 7</solution>\n<final_answer>7</final_answer>",
        "<think>No.</think>\n<SOLUTION>\n3 + 4 = 7\n</SOLUTION>\n\n<FINAL ANSWER>\n7\n</FINAL ANSWER>",
        'Here is the JSON:\n\n{"solution": "3 + 4 = 7", "final_answer": "7"}\n\nI hope this helps!',
        "SOLUTION: 3 + 4 = 7\nFINAL ANSWER: 7\n\nLet me know if you want another one.",
    ],
)
def test_a_field_is_found_in_any_dress(text):
    assert find_fields(text, ANSWER) == {"solution": "3 + 4 = 7", "final answer": "7"}


def test_a_solution_keeps_its_lines_its_formulas_and_its_emphasis():
    solution = "He **doubles** it: $2 \\times 3 = 6$.\n\n1. Then $\\{x : x > 6\\}$\n2. so **it** is **7**"
    assert find_fields(f"SOLUTION: {solution}\nFINAL ANSWER: 7", ANSWER)["solution"] == solution


def test_a_label_inside_a_text_begins_no_field():
    text = (
        "CREATED QUESTION: Which field holds the solution: A or B?\n"
        "VERIFICATION AND MODIFICATION: The final created question: as above, keeps the rules. Solution: 1.\n"
        "Final created question: it stays.\n"
        "FINAL CREATED QUESTION: Which one holds the solution: A or B?"
    )
    assert find_fields(text, QUESTION) == {
        "created question": "Which field holds the solution: A or B?",
        "verification and modification": (
            "The final created question: as above, keeps the rules. Solution: 1.\nFinal created question: it stays."
        ),
        "final created question": "Which one holds the solution: A or B?",
    }


def test_fields_that_are_missing_or_empty_are_not_there():
    assert find_fields("SOLUTION: 3 + 4 = 7", ANSWER) == {"solution": "3 + 4 = 7"}
    assert find_fields("SOLUTION: 3 + 4 = 7\nFINAL ANSWER:\n", ANSWER) == {"solution": "3 + 4 = 7"}
    assert find_fields("I cannot help with that.", ANSWER) == {}
    assert find_fields("", ANSWER) == {}
    assert find_fields('{"other": 1}', ANSWER) == {}
    assert find_fields('{"solution": ["a"]', ANSWER) == {}
    assert find_fields("[" * 5000, ANSWER) == {}


@pytest.mark.parametrize(
    ("last", "question"),
    [
        ("FINAL CREATED QUESTION: How old is Bo?", "How old is Bo?"),
        ("FINAL CREATED QUESTION: Same as above.", "How old is Al?"),
        ("FINAL CREATED QUESTION: (unchanged)", "How old is Al?"),
        ("FINAL CREATED QUESTION: The question remains unchanged.", "How old is Al?"),
        ("FINAL CREATED QUESTION: The created question stays as it is.", "How old is Al?"),
        ("FINAL CREATED QUESTION: Same as above; no changes needed.", "How old is Al?"),
        ("FINAL CREATED QUESTION: No modifications were needed.", "How old is Al?"),
        ("FINAL CREATED QUESTION: Same as the question in Job 1.", "How old is Al?"),
        ("FINAL CREATED QUESTION: Find the area above the axis.", "Find the area above the axis."),
        ("FINAL CREATED QUESTION: Find 3 times the same number as 4.", "Find 3 times the same number as 4."),
        ("FINAL CREATED QUESTION: No modification needed.", "How old is Al?"),
        ("FINAL CREATED QUESTION: See CREATED QUESTION.", "How old is Al?"),
        ("FINAL CREATED QUESTION: Identical to the created question.", "How old is Al?"),
        ("FINAL CREATED QUESTION: The question does not need to be changed.", "How old is Al?"),
        ("FINAL CREATED QUESTION: How old is Bo?\n\nI hope this is what you wanted.", "How old is Bo?"),
        (
            "FINAL CREATED QUESTION: A ticket costs $8.\n\nIf you have $50, how many can you buy?",
            "A ticket costs $8.\n\nIf you have $50, how many can you buy?",
        ),
        (
            "FINAL CREATED QUESTION: Tell me.\n\nLet me know how many of the 3 are left?",
            "Tell me.\n\nLet me know how many of the 3 are left?",
        ),
        (
            "FINAL CREATED QUESTION: Find the chance that two dice show identical faces.",
            "Find the chance that two dice show identical faces.",
        ),
        (
            "FINAL CREATED QUESTION: Show that there is no need for a third weight.",
            "Show that there is no need for a third weight.",
        ),
        ("FINAL CREATED QUESTION: The same question of Al's age has which answer?", None),
        ("", "How old is Al?"),
    ],
)
def test_a_last_field_that_is_missing_or_says_the_same_is_the_first(last, question):
    text = f"CREATED QUESTION: How old is Al?\nVERIFICATION AND MODIFICATION: It is fine.\n{last}"
    found = last_question(find_fields(text, QUESTION), QUESTION)
    assert found == (question or "The same question of Al's age has which answer?")


@pytest.mark.parametrize("label", ["VERIFICATION", "VERIFICATION & MODIFICATION", "Verification and Modifications"])
def test_a_label_that_is_said_otherwise_still_ends_the_field_before(label):
    text = f"CREATED QUESTION: How old is Al?\n{label}:\n3 + 4 = 7, so the answer is 7. No rule is broken."
    assert last_question(find_fields(text, QUESTION), QUESTION) == "How old is Al?"


def test_labels_in_one_line_are_told_by_their_capitals():
    text = (
        "CREATED QUESTION: How old is Al? VERIFICATION AND MODIFICATION: The final created question: fine. "
        "FINAL CREATED QUESTION: How old is Bo?"
    )
    assert find_fields(text, QUESTION) == {
        "created question": "How old is Al?",
        "verification and modification": "The final created question: fine.",
        "final created question": "How old is Bo?",
    }


def test_a_long_text_without_a_field_takes_no_time():
    for text in (" " * 200_000, "\n" * 200_000, " \n" * 100_000, "{ " * 100_000, '{"' * 50_000, "<solution>" * 20_000,
                 "- " * 100_000, "<b>" * 50_000):  # fmt: skip
        for whole in (text, f"SOLUTION: a{text}b\nFINAL ANSWER: 7"):
            started = time.process_time()
            find_fields(whole, ANSWER)
            assert time.process_time() - started < 5


def test_nothing_is_no_question():
    assert last_question({}, QUESTION) is None
    assert last_question({"created question": "unchanged"}, QUESTION) is None


def test_commands_of_latex_with_one_backslash_in_json_are_read_as_meant():
    text = r'{"solution": "\frac{1}{2} \times x\nThen \(y\) and \\frac{3}{4}.\tSo.", "final_answer": "\sqrt{2}"}'
    fields = find_fields(text, ANSWER)
    assert fields["solution"] == "\\frac{1}{2} \\times x\nThen \\(y\\) and \\frac{3}{4}.\tSo."
    assert fields["final answer"] == "\\sqrt{2}"
    commands = r"\textbf \rightarrow \rfloor \notin \bullet \therefore \underline \ne \nu \beta \tan"
    assert find_fields(f'{{"solution": "{commands}"}}', ANSWER)["solution"] == commands
    assert find_fields(r'{"solution": "one\ntwo\n\n\u00e9"}', ANSWER)["solution"] == "one\ntwo\n\n\u00e9"


@pytest.mark.parametrize(
    "text",
    [
        "Let\nu = x^2 + 1\ndu = 2x dx",
        "Cases:\ni) even\nii) odd",
        "So\ne^{x} = 1, not\nnot 2",
        "We get \\frac{1}{2}.\nu = 3",
        "x \\\\\n y & 2 \\\\ \\hline",
        "\\nu \\ne 3 {\\rm x}",
        "a\tand b\tto c",
        "\\begin{cases} 1 & x \\in A \\\\ 0 & \\text{else}\\end{cases}",
    ],
)
def test_latex_and_lines_that_are_escaped_as_json_wants_come_back_as_they_are(text):
    assert find_fields(json.dumps({"solution": text, "final_answer": "1"}), ANSWER)["solution"] == text


def test_old_commands_of_latex_with_one_backslash_are_read_as_meant():
    commands = r"{\rm cm} \(\) {\bf x} {\tt y} \nolimits \bB \to \not= \hline"
    assert find_fields(f'{{"solution": "{commands}"}}', ANSWER)["solution"] == commands


@pytest.mark.parametrize("dress", [r"\textbf{%s}:", r"\textbf{%s:}", r"\section*{%s}", r"\underline{%s} :"])
def test_labels_in_the_dress_of_latex_are_found(dress):
    text = f"{dress % 'SOLUTION'}\n3 + 4 = 7\n{dress % 'FINAL ANSWER'}\n7\n"
    assert find_fields(text, ANSWER) == {"solution": "3 + 4 = 7", "final answer": "7"}


def test_json_behind_a_line_of_words_is_read():
    text = 'Here is the JSON:\n```json\n{"solution": "3 + 4 = 7", "final_answer": 7}\n```\n'
    assert find_fields(text, ANSWER) == {"solution": "3 + 4 = 7", "final answer": "7"}


def test_a_schema_asks_for_each_field_and_for_nothing_else():
    said = schema(ANSWER)["json_schema"]
    assert said["strict"] is True and said["schema"]["required"] == ["solution", "final_answer"]
    assert said["schema"]["additionalProperties"] is False
    assert set(said["schema"]["properties"]) == {"solution", "final_answer"}
    reply = json.dumps(dict.fromkeys(said["schema"]["required"], "x"))
    assert find_fields(reply, ANSWER) == dict.fromkeys(ANSWER, "x")
