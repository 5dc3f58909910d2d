"""python -m eval: draws samples, grades them, shows what they mean.

    python -m eval run --task gsm8k --checkpoint runs/gsm8k --out runs/gsm8k/eval
    python -m eval sample --task gsm8k --checkpoint runs/gsm8k --out runs/gsm8k/eval --shard 0/4
    python -m eval grade runs/gsm8k/eval
    python -m eval report runs/gsm8k/eval
    python -m eval errors runs/gsm8k/eval
    python -m eval compare runs/gsm8k/eval runs/other/eval

`run` is sample, grade and report in one, on several GPUs with --shards; sampling and grading go on where they were
stopped, and N jobs anywhere share the sampling by --shard.
"""

import shlex
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from etils import epath

from data_pipeline import cli
from data_pipeline.settings import UsageError


def _run(parser: ArgumentParser) -> cli.Action:
    from data_pipeline.tasks import get_task
    from eval.grade import grade
    from eval.report import write_report
    from eval.sample import RunSettings, sample
    from eval.shards import sample_in_shards

    cli.add_flags(parser, RunSettings)

    def act(arguments: Namespace) -> None:
        settings = cli.from_flags(RunSettings, arguments)
        _ = get_task(settings.task).graded_as  # what people grade is refused before anything is drawn
        folder = sample(settings) if settings.shards is None else sample_in_shards(settings, settings.shards)
        grade(folder)
        cli.logger.info("the report: %s", write_report(folder))

    return act


def _sample(parser: ArgumentParser) -> cli.Action:
    from eval.sample import SampleSettings, sample

    cli.add_flags(parser, SampleSettings)

    def act(arguments: Namespace) -> None:
        sample(cli.from_flags(SampleSettings, arguments))

    return act


def _grade(parser: ArgumentParser) -> cli.Action:
    from eval.grade import grade

    parser.add_argument("folder", metavar="DIR", help="eval folder")
    parser.add_argument("--again", action="store_true", help="grade anew what this version has graded before, too")

    def act(arguments: Namespace) -> None:
        grade(epath.Path(arguments.folder), again=arguments.again)

    return act


def _report(parser: ArgumentParser) -> cli.Action:
    from eval.files import what_is_missing
    from eval.report import write_report

    parser.add_argument("folder", metavar="DIR", help="eval folder")
    parser.add_argument(
        "--beside",
        metavar="DIR",
        nargs="+",
        default=[],
        help="eval folders to compare with, such as those of less data",
    )
    parser.add_argument("--complete", action="store_true", help="fail where samples or grades are missing")

    def act(arguments: Namespace) -> None:
        folder = epath.Path(arguments.folder)
        missing = what_is_missing(folder)
        if (folder / "metrics.json").exists():
            cli.logger.info("the report: %s", write_report(folder, arguments.beside))
        elif missing is None:
            raise UsageError(f"nothing is graded yet: run `python -m eval grade {shlex.quote(str(folder))}` first")
        if missing is not None:
            if arguments.complete:
                raise cli.RunError(missing)
            cli.logger.info("%s", missing)

    return act


def _sheet(parser: ArgumentParser) -> cli.Action:
    from eval.sheet import write_sheet

    parser.add_argument("folder", metavar="DIR", help="eval folder")

    def act(arguments: Namespace) -> None:
        cli.logger.info("the answer sheet: %s, and sheet.csv", write_sheet(epath.Path(arguments.folder)))

    return act


def _errors(parser: ArgumentParser) -> cli.Action:
    from eval.diagnose import ErrorSettings, diagnose

    parser.add_argument("folder", metavar="DIR", help="eval folder")
    cli.add_flags(parser, ErrorSettings)

    def act(arguments: Namespace) -> None:
        diagnose(epath.Path(arguments.folder), cli.from_flags(ErrorSettings, arguments))

    return act


def _compare(parser: ArgumentParser) -> cli.Action:
    from eval.compare import as_text, compare

    parser.add_argument("folders", metavar="DIR", nargs="+", help="eval folders, two or more")
    parser.add_argument("--out", metavar="FILE", help="write the comparison as JSON, too")

    def act(arguments: Namespace) -> None:
        if len(arguments.folders) < 2:
            raise UsageError("give two eval folders or more")
        print(as_text(compare([epath.Path(folder) for folder in arguments.folders], arguments.out)))

    return act


def _leakage(parser: ArgumentParser) -> cli.Action:
    from eval.leakage import LeakageSettings, leakage

    cli.add_flags(parser, LeakageSettings)

    def act(arguments: Namespace) -> None:
        leakage(cli.from_flags(LeakageSettings, arguments))

    return act


def _study(parser: ArgumentParser) -> cli.Action:
    from data_pipeline.settings import describe
    from eval.study.jobs import LAUNCHERS, write_jobs
    from eval.study.run import StudyOptions, study, tell
    from eval.study.settings import StudySettings, load_study

    parser.formatter_class = RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["settings:", *describe(StudySettings)])
    parser.add_argument("--config", required=True, metavar="CONFIG", help="YAML file of the study")
    parser.add_argument("--dry-run", action="store_true", help="say what is done and what would be run; run nothing")
    parser.add_argument(
        "--emit",
        choices=list(LAUNCHERS),
        help="make the data, write one job a cell for launch/ into OUT/jobs, and run no cell; this command, without "
        "--emit, reports when they are done",
    )
    cli.add_flags(parser, StudyOptions)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that differ from the config's")

    def act(arguments: Namespace) -> None:
        settings = load_study(arguments.config, arguments.overrides)
        options = cli.from_flags(StudyOptions, arguments)
        if arguments.dry_run:
            print(tell(settings, options))
        elif arguments.emit is not None:
            again = ["python", "-m", "eval", "study", "--config", arguments.config, *arguments.overrides]
            write_jobs(settings, arguments.emit, options.cell, again)
        else:
            study(settings, options)

    return act


COMMANDS = {
    "run": cli.Command("sample, grade and report", _run),
    "sample": cli.Command("draw samples from a checkpoint, a Hugging Face folder or a server", _sample),
    "grade": cli.Command("grade the samples of an eval folder and write metrics.json", _grade),
    "report": cli.Command("write report.html from metrics.json and the samples", _report),
    "sheet": cli.Command("write sheet.html and sheet.csv, for people to grade the answers", _sheet),
    "errors": cli.Command("say what goes wrong in the wrong samples of a graded eval folder, in errors.json", _errors),
    "compare": cli.Command("compare graded eval folders of the same problems with the first of them", _compare),
    "study": cli.Command("run a grid of train, sample, grade runs, and report on it: the papers' experiments", _study),
    "leakage": cli.Command("compare the loss on the test set with that on new and on training questions", _leakage),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-eval."""
    cli.run_commands("python -m eval", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    main()
