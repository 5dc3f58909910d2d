"""python -m data_pipeline: makes datasets.

    python -m data_pipeline prepare demo --out runs/demo/data
    python -m data_pipeline synthesize --config configs/synthesis/gsm8k_brand_new.yaml --dry-run
    python -m data_pipeline from-samples runs/gsm8k/eval --out right.jsonl

The first writes train.jsonl, test.jsonl and tokenizer.model; the second says what new problems of GSM8K's would cost;
the third writes right answers that a model drew.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from data_pipeline import cli


def _prepare(parser: ArgumentParser) -> cli.Action:
    from data_pipeline.demo import DemoData, prepare_demo
    from data_pipeline.prepare import PrepareSettings, prepare
    from data_pipeline.puzzles import PuzzleData, prepare_puzzles
    from data_pipeline.tasks import TASKS

    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    demo = tasks.add_parser("demo", help=TASKS["demo"].about, description=DemoData.__doc__)
    cli.add_flags(demo, DemoData)
    puzzle = tasks.add_parser("puzzle", help=TASKS["puzzle"].about, description=PuzzleData.__doc__)
    cli.add_flags(puzzle, PuzzleData)
    for name, task in TASKS.items():
        if task.splits:
            public = tasks.add_parser(name, help=task.about, description=f"{task.about}. {PrepareSettings.__doc__}")
            cli.add_flags(public, PrepareSettings)

    def act(arguments: Namespace) -> None:
        if arguments.task == "demo":
            prepare_demo(cli.from_flags(DemoData, arguments))
        elif arguments.task == "puzzle":
            prepare_puzzles(cli.from_flags(PuzzleData, arguments))
        else:
            prepare(arguments.task, cli.from_flags(PrepareSettings, arguments))

    return act


def _check(parser: ArgumentParser) -> cli.Action:
    from data_pipeline.check import CheckSettings, check
    from data_pipeline.tasks import TASKS

    parser.add_argument("task", metavar="TASK", choices=list(TASKS), help=f"one of {', '.join(TASKS)}")
    cli.add_flags(parser, CheckSettings)

    def act(arguments: Namespace) -> None:
        check(arguments.task, cli.from_flags(CheckSettings, arguments))

    return act


def _clean(parser: ArgumentParser) -> cli.Action:
    from data_pipeline.clean.job import CleanSettings, clean

    cli.add_flags(parser, CleanSettings)

    def act(arguments: Namespace) -> None:
        clean(cli.from_flags(CleanSettings, arguments))

    return act


def _inspect(parser: ArgumentParser) -> cli.Action:
    from data_pipeline.inspecting import InspectSettings, inspect

    cli.add_flags(parser, InspectSettings)
    parser.add_argument("overrides", metavar="data.key=value", nargs="*", help="settings that differ from the config's")

    def act(arguments: Namespace) -> None:
        inspect(cli.from_flags(InspectSettings, arguments), arguments.overrides)

    return act


def _synthesize(parser: ArgumentParser) -> cli.Action:
    from data_pipeline.settings import describe, load_settings
    from data_pipeline.synthesis.run import synthesize
    from data_pipeline.synthesis.settings import SynthesisSettings
    from data_pipeline.synthesis.strategies import Strategy, strategies

    parser.formatter_class = RawDescriptionHelpFormatter
    named = [f"  {name}\n      {strategy.about}" for name, strategy in strategies().items()]
    parser.epilog = "\n".join(
        [
            "strategies:", *named, "",
            "a strategy of your own, a YAML file (a whole one stands in data_pipeline/synthesis/strategies/):",
            *describe(Strategy), "", "settings:", *describe(SynthesisSettings),
        ]
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="CONFIG", help="YAML file of settings")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be asked and what it may cost; send nothing"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that differ from the config's")

    def act(arguments: Namespace) -> None:
        synthesize(load_settings(SynthesisSettings, arguments.config, arguments.overrides), arguments.dry_run)

    return act


def _teacher(parser: ArgumentParser) -> cli.Action:
    from data_pipeline.synthesis.rules import RuleTeacher, serve

    cli.add_flags(parser, RuleTeacher)

    def act(arguments: Namespace) -> None:
        serve(cli.from_flags(RuleTeacher, arguments))

    return act


def _from_samples(parser: ArgumentParser) -> cli.Action:
    from data_pipeline.from_samples import FromSamples, rows_from_samples

    parser.add_argument("folder", metavar="DIR", help="graded eval folder")
    cli.add_flags(parser, FromSamples)

    def act(arguments: Namespace) -> None:
        rows_from_samples(arguments.folder, cli.from_flags(FromSamples, arguments))

    return act


COMMANDS = {
    "prepare": cli.Command("make or fetch a dataset", _prepare),
    "check": cli.Command("grade every training text against its own gold answer", _check),
    "clean": cli.Command("leave out what is malformed, wrong, duplicated, or in a test set", _clean),
    "inspect": cli.Command("show what a model will see of the data of a training config", _inspect),
    "synthesize": cli.Command("new questions and answers from a teacher behind an OpenAI-compatible API", _synthesize),
    "teacher": cli.Command("a rule-based teacher on this machine, to try synthesize with", _teacher),
    "from-samples": cli.Command("the right answers in a graded eval folder, as rows to train on", _from_samples),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-data."""
    cli.run_commands("python -m data_pipeline", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    main()
