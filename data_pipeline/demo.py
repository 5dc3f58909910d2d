"""`prepare demo`: a small dataset and its tokenizer, generated, for the loop that a laptop runs."""

import dataclasses

import pydantic
from etils import epath

from data_pipeline.cli import logger, make_folder
from data_pipeline.files import write_atomically, write_json_lines
from data_pipeline.settings import Settings
from data_pipeline.tasks import Problem
from data_pipeline.templates import Template
from data_pipeline.tokenizer import train_tokenizer
from data_pipeline.word_problems import generate_problems


class DemoData(Settings):
    """`prepare demo`: generated word problems and a tokenizer for them."""

    out: str = pydantic.Field(description="folder for train.jsonl, test.jsonl and tokenizer.model")
    num_train: int = pydantic.Field(800, ge=1, le=1_000_000, description="training problems")
    num_test: int = pydantic.Field(60, ge=1, le=1_000_000, description="held-out problems")
    vocab_size: int = pydantic.Field(512, ge=300, description="pieces of the tokenizer")
    seed: pydantic.NonNegativeInt = pydantic.Field(0, description="seed of the generator")


def prepare_demo(settings: DemoData) -> None:
    """Writes train.jsonl, test.jsonl (no question in both) and tokenizer.model."""
    out = epath.Path(settings.out)
    make_folder(out, "out")
    problems = list(generate_problems(settings.num_train + settings.num_test, settings.seed))
    train, test = problems[: settings.num_train], problems[settings.num_train :]
    for name, part in (("train", train), ("test", test)):
        write_json_lines(out / f"{name}.jsonl", (_row(problem) for problem in part))
    template = Template()
    texts = [
        text
        for p in train
        for text in (template.render_prompt(p.question), template.render_response(p.solution, p.answer))
    ]
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    write_atomically(out / "tokenizer.model", lambda file: file.write(tokenizer.model))
    logger.info(
        "wrote %d training and %d held-out problems and a tokenizer of %d pieces to %s",
        len(train),
        len(test),
        tokenizer.vocab_size,
        out,
    )


def _row(problem: Problem) -> dict[str, str]:
    row = dataclasses.asdict(problem)
    return {key: row[key] for key in ("id", "question", "solution", "answer")}
