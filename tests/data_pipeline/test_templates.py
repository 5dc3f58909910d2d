"""One template in training and evaluation."""

import pydantic
import pytest

from data_pipeline.settings import UsageError
from data_pipeline.tasks import Problem
from data_pipeline.templates import Template, load_template
from data_pipeline.tokenized import tokenize

LATEX = r"Let $\frac{1}{2} + x_{0}$ be {question} of {} and {{solution}}. {answer}"


def test_the_default_template_is_the_documented_wording():
    template = load_template("default")
    assert template.render_prompt("How many?") == "Problem: How many?\nSolution:"
    assert template.render_response("1 + 1 = 2", "2") == "1 + 1 = 2\nThe answer is: 2."


def test_braces_in_questions_and_solutions_stay_as_they_are():
    template = Template(prompt="Q {{}} {question}", response="{{{solution}}} A {answer}")
    assert template.render_prompt(LATEX) == "Q {} " + LATEX
    assert template.render_response(LATEX, "{2}") == "{" + LATEX + "} A {2}"


@pytest.mark.parametrize(
    "question", ["How many pens?", LATEX, "two\nlines\n", " spaced  ", "\u00bd caf\u00e9 \U0001f95a"]
)
def test_the_prompt_of_a_training_row_is_the_prompt_of_evaluation(small_tokenizer, question):
    template = Template()
    problem = Problem("p", question, "1 + 1 = 2\n2 + 1 = 3", "3")
    rows = tokenize([Problem("first", "Who?", "9", "9"), problem], small_tokenizer, template)
    row = rows[1].tolist()
    length = int(rows.prompt_lengths[1])
    assert row[:length] == small_tokenizer.encode_prompt(template.render_prompt(question))
    assert small_tokenizer.decode(row[length:]) == "1 + 1 = 2\n2 + 1 = 3\nThe answer is: 3."


def test_prompts_of_gsm8k_rows_are_those_of_evaluation(gsm8k_train, gsm8k_rows, large_tokenizer):
    for index in range(0, len(gsm8k_train), 50):
        length = gsm8k_rows.prompt_lengths[index]
        prompt = Template().render_prompt(gsm8k_train[index].question)
        assert gsm8k_rows[index][:length].tolist() == large_tokenizer.encode_prompt(prompt)


def test_a_template_file_is_used_in_its_own_words(tmp_path):
    (tmp_path / "chat.yaml").write_text('prompt: "Q: {question}\\nA:"\nresponse: " {solution} => {answer}"\n')
    template = load_template(str(tmp_path / "chat.yaml"))
    assert template.render_prompt("1+1?") == "Q: 1+1?\nA:"
    assert template.render_response("two", "2") == " two => 2"


def test_another_wording_has_another_hash():
    templates = [
        Template(),
        Template(prompt="{question}"),
        Template(response="{answer}"),
        Template(prompt="{question}", response="{answer}"),
    ]
    assert len({template.sha256 for template in templates}) == 4
    assert Template().sha256 == load_template("default").sha256


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt: 'Q: {query} {question}'", "prompt must contain {question}; it has"),
        ("prompt: 'Q:'", "prompt must contain {question}"),
        ("prompt: '{question} {answer}'", "prompt must contain {question}; it has"),
        ("prompt: '{}'", "prompt must contain"),
        ("prompt: '{question.__class__}'", "prompt must contain"),
        ("response: 'done'", "response must contain {answer} or {solution}; it has none"),
        (
            "response: '{answer} {question}'",
            "response must contain {answer} or {solution}",
        ),
        ("prompt: '{question} {'", "write {{ and }} for literal braces"),
        ("prompt: '{question} }'", "write {{ and }} for literal braces"),
        ("prompts: '{question}'", "unknown key prompts; did you mean prompt?"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_the_reason(tmp_path, text, said):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_template(str(tmp_path / "broken.yaml"))
    assert "broken.yaml" in str(caught.value) and said in str(caught.value)


def test_a_template_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match=r"'no-such-template\.yaml' does not exist"):
        load_template("no-such-template.yaml")


def test_a_template_cannot_be_changed_once_made():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Template().prompt = "{question}"


def test_the_symbolic_template_of_puzzles_is_a_puzzle_and_its_steps():
    template = load_template("configs/templates/puzzle.yaml")
    assert template.render_prompt("3, 6 -> 18") == "3, 6 -> 18\n"
    assert template.render_response("3 * 6 = 18", "3, 6 -> 18") == "3 * 6 = 18"
