"""python -m eval: draws samples, grades them, shows what they mean.

    python -m eval run --task gsm8k --checkpoint runs/gsm8k --out runs/gsm8k/eval
    python -m eval sample --task gsm8k --checkpoint runs/gsm8k --out runs/gsm8k/eval --shard 0/4
    python -m eval grade runs/gsm8k/eval
    python -m eval report runs/gsm8k/eval

`run` is sample, grade and report in one; sampling goes on where it was stopped, and N jobs share it by --shard.
"""

import argparse
from collections.abc import Sequence

from etils import epath

from data_pipeline import cli
from eval.files import read_run
from eval.grade import grade
from eval.report import write_report
from eval.sample import SampleSettings, sample


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "sample, grade and report"),
        ("sample", "draw samples from a checkpoint, a Hugging Face folder or a server"),
    ):
        cli.add_flags(commands.add_parser(name, help=text, description=text), SampleSettings)
    for name, text in (
        ("grade", "grade the samples of an eval folder again and write metrics.json"),
        ("report", "write report.html from metrics.json and the samples"),
    ):
        commands.add_parser(name, help=text, description=text).add_argument("folder", metavar="DIR", help="eval folder")
    arguments = parser.parse_args(argv)

    if arguments.command in ("run", "sample"):
        folder = sample(cli.from_flags(SampleSettings, arguments))
    else:
        folder = epath.Path(arguments.folder)
        read_run(folder)
    if arguments.command in ("run", "grade"):
        grade(folder)
    if arguments.command in ("run", "report"):
        cli.logger.info("the report: %s", write_report(folder))


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-eval."""
    cli.run_command(_main, argv)


if __name__ == "__main__":
    main()
