"""`prepare demo`: a small dataset and its tokenizer, generated, for the loop that a laptop runs."""

import dataclasses
import functools
import itertools
from typing import Literal

import pydantic
from etils import epath

from data_pipeline.cli import logger, make_folder
from data_pipeline.expression_problems import generate_expressions
from data_pipeline.files import write_atomically, write_json_lines
from data_pipeline.settings import Settings
from data_pipeline.tasks import Problem
from data_pipeline.templates import Template
from data_pipeline.tokenizer import train_tokenizer
from data_pipeline.word_problems import MAX_VALUE, generate_problems

Style = Literal["stories", "expressions", "both"]
_VOCAB_SIZES: dict[Style, int] = {"stories": 512, "expressions": 384, "both": 512}


class DemoData(Settings):
    """`prepare demo`: generated problems and a tokenizer for them."""

    out: str = pydantic.Field(description="folder for train.jsonl, test.jsonl and tokenizer.model")
    style: Style = pydantic.Field(
        "stories",
        description="word problems; expressions, such as $(3 + 4) \\cdot 2$; or both by turns, under one tokenizer",
    )
    num_train: int = pydantic.Field(800, ge=1, le=1_000_000, description="training problems")
    num_test: int = pydantic.Field(60, ge=1, le=1_000_000, description="held-out problems")
    max_steps: int = pydantic.Field(4, ge=2, le=8, description="most steps of a problem; the fewest are 2")
    max_value: int = pydantic.Field(
        MAX_VALUE, ge=MAX_VALUE, le=999, description="largest value in a story, at first and after each step"
    )
    rarer: float = pydantic.Field(
        1.0,
        ge=1,
        le=10,
        allow_inf_nan=False,
        description="in training stories each number of steps is so many times as rare as the one before, and in the "
        "test set all are alike",
    )
    vocab_size: int | None = pydantic.Field(
        None, ge=300, description="pieces of the tokenizer; none: 512, of expressions alone, whose words are few, 384"
    )
    seed: pydantic.NonNegativeInt = pydantic.Field(0, description="seed of the generator")

    @pydantic.model_validator(mode="after")
    def _of_stories_only(self) -> "DemoData":
        for key, default in (("rarer", 1), ("max_value", MAX_VALUE)):
            value = getattr(self, key)
            if value != default and self.style != "stories":
                raise ValueError(f"{key}={value:g} is of stories: leave style={self.style} out")
        return self


def prepare_demo(settings: DemoData) -> None:
    """Writes train.jsonl, test.jsonl (no question in both) and tokenizer.model.

    Raises UsageError where there are not so many different problems, or no tokenizer of so many pieces.
    """
    out = epath.Path(settings.out)
    make_folder(out, "out")
    train, test = _generate(settings)
    for name, part in (("train", train), ("test", test)):
        write_json_lines(out / f"{name}.jsonl", (_row(problem) for problem in part))
    template = Template()
    texts = [
        text
        for p in train
        for text in (template.render_prompt(p.question), template.render_response(p.solution, p.answer))
    ]
    tokenizer = train_tokenizer(texts, settings.vocab_size or _VOCAB_SIZES[settings.style])
    write_atomically(out / "tokenizer.model", lambda file: file.write(tokenizer.model))
    logger.info(
        "wrote %d training and %d held-out problems and a tokenizer of %d pieces to %s",
        len(train),
        len(test),
        tokenizer.vocab_size,
        out,
    )


def _generate(settings: DemoData) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems."""
    count, seed, most = settings.num_train + settings.num_test, settings.seed, settings.max_steps
    stories = functools.partial(generate_problems, max_steps=most, max_value=settings.max_value)
    if settings.rarer > 1:
        test = list(stories(settings.num_test, seed + 1))
        asked = {problem.question for problem in test}
        more = stories(settings.num_train, seed, rarer=settings.rarer, without=asked)
        own = [dataclasses.replace(p, id=f"demo/{settings.num_train + index}") for index, p in enumerate(test)]
        return list(more), own
    if settings.style == "stories":
        problems = list(stories(count, seed))
    elif settings.style == "expressions":
        problems = list(generate_expressions(count, seed, max_steps=most))
    else:
        marked = (dataclasses.replace(problem, subject="story") for problem in stories(-(-count // 2), seed))
        by_turns = itertools.zip_longest(marked, generate_expressions(count // 2, seed, max_steps=most))
        problems = [problem for pair in by_turns for problem in pair if problem is not None]
    return problems[: settings.num_train], problems[settings.num_train :]


def _row(problem: Problem) -> dict[str, str]:
    row = dataclasses.asdict(problem)
    keys = ("id", "question", "solution", "answer", "subject")
    return {key: row[key] for key in keys if row[key] is not None}
