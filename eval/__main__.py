"""python -m eval: draws samples, grades them, shows what they mean.

    python -m eval run --task gsm8k --checkpoint runs/gsm8k --out runs/gsm8k/eval
    python -m eval sample --task gsm8k --checkpoint runs/gsm8k --out runs/gsm8k/eval --shard 0/4
    python -m eval grade runs/gsm8k/eval
    python -m eval report runs/gsm8k/eval
    python -m eval errors runs/gsm8k/eval
    python -m eval compare runs/gsm8k/eval runs/other/eval

`run` is sample, grade and report in one; sampling and grading go on where they were stopped, and N jobs share the
sampling by --shard.
"""

import argparse
from collections.abc import Sequence

from etils import epath

from data_pipeline import cli
from data_pipeline.settings import UsageError
from eval.compare import as_text, compare
from eval.diagnose import ErrorSettings, diagnose
from eval.files import read_run
from eval.grade import grade
from eval.leakage import LeakageSettings, leakage
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
    text = "grade the samples of an eval folder and write metrics.json"
    grading = commands.add_parser("grade", help=text, description=text)
    text = "write report.html from metrics.json and the samples"
    reporting = commands.add_parser("report", help=text, description=text)
    for command in (grading, reporting):
        command.add_argument("folder", metavar="DIR", help="eval folder")
    reporting.add_argument(
        "--beside",
        metavar="DIR",
        nargs="+",
        default=[],
        help="eval folders to compare with, such as those of less data",
    )
    grading.add_argument("--again", action="store_true", help="grade anew what this version has graded before, too")
    text = "say what goes wrong in the wrong samples of a graded eval folder, in errors.json"
    diagnosing = commands.add_parser("errors", help=text, description=text)
    diagnosing.add_argument("folder", metavar="DIR", help="eval folder")
    cli.add_flags(diagnosing, ErrorSettings)
    text = "compare the loss on the test set with that on new and on training questions"
    cli.add_flags(commands.add_parser("leakage", help=text, description=text), LeakageSettings)
    text = "compare graded eval folders of the same problems with the first of them"
    comparing = commands.add_parser("compare", help=text, description=text)
    comparing.add_argument("folders", metavar="DIR", nargs="+", help="eval folders, two or more")
    comparing.add_argument("--out", metavar="FILE", help="write the comparison as JSON, too")
    arguments = parser.parse_args(argv)

    if arguments.command == "compare":
        if len(arguments.folders) < 2:
            raise UsageError("give two eval folders or more")
        print(as_text(compare([epath.Path(folder) for folder in arguments.folders], arguments.out)))
        return
    if arguments.command == "leakage":
        leakage(cli.from_flags(LeakageSettings, arguments))
        return
    if arguments.command in ("run", "sample"):
        folder = sample(cli.from_flags(SampleSettings, arguments))
    else:
        folder = epath.Path(arguments.folder)
        read_run(folder)
    if arguments.command == "errors":
        diagnose(folder, cli.from_flags(ErrorSettings, arguments))
    if arguments.command in ("run", "grade"):
        grade(folder, again=arguments.command == "grade" and arguments.again)
    if arguments.command in ("run", "report"):
        beside = arguments.beside if arguments.command == "report" else []
        cli.logger.info("the report: %s", write_report(folder, beside))


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-eval."""
    cli.run_command(_main, argv)


if __name__ == "__main__":
    main()
