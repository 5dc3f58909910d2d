"""python -m data_pipeline: makes datasets.

    python -m data_pipeline prepare demo --out runs/demo/data
    python -m data_pipeline from-samples runs/gsm8k/eval --out right.jsonl

The first writes train.jsonl, test.jsonl and tokenizer.model; the second right answers that a model drew.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import pydantic
from etils import epath

from data_pipeline import cli
from data_pipeline.files import write_atomically, write_json_lines
from data_pipeline.from_samples import FromSamples, rows_from_samples
from data_pipeline.settings import Settings
from data_pipeline.tasks import Problem
from data_pipeline.templates import Template
from data_pipeline.tokenizer import train_tokenizer
from data_pipeline.word_problems import generate_problems


class DemoData(Settings):
    """`prepare demo`: generated word problems and a tokenizer for them."""

    out: str = pydantic.Field(description="folder for train.jsonl, test.jsonl and tokenizer.model")
    num_train: pydantic.PositiveInt = pydantic.Field(800, description="training problems")
    num_test: pydantic.PositiveInt = pydantic.Field(60, description="held-out problems")
    vocab_size: int = pydantic.Field(512, ge=300, description="pieces of the tokenizer")
    seed: pydantic.NonNegativeInt = pydantic.Field(0, description="seed of the generator")


def prepare_demo(settings: DemoData) -> None:
    """Writes train.jsonl, test.jsonl (no question in both) and tokenizer.model."""
    out = epath.Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
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
    cli.logger.info(
        "wrote %d training and %d held-out problems and a tokenizer of %d pieces to %s",
        len(train),
        len(test),
        tokenizer.vocab_size,
        out,
    )


def _row(problem: Problem) -> dict[str, str]:
    row = dataclasses.asdict(problem)
    return {key: row[key] for key in ("id", "question", "solution", "answer")}


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="make or fetch a dataset")
    tasks = prepare.add_subparsers(dest="task", required=True)
    demo = tasks.add_parser("demo", help="generated multi-step word problems", description=DemoData.__doc__)
    cli.add_flags(demo, DemoData)
    right = commands.add_parser("from-samples", help="right answers of a model", description=FromSamples.__doc__)
    right.add_argument("folder", metavar="DIR", help="graded eval folder")
    cli.add_flags(right, FromSamples)
    arguments = parser.parse_args(argv)
    if arguments.command == "from-samples":
        rows_from_samples(arguments.folder, cli.from_flags(FromSamples, arguments))
    else:
        prepare_demo(cli.from_flags(DemoData, arguments))


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-data."""
    cli.run_command(_main, argv)


if __name__ == "__main__":
    main()
