"""One page that shows what an evaluation found: eval folder in, report.html and its figures out.

The page is a single file without scripts or network access. What a model wrote is shown as inert text: the
template escapes every value, and a content security policy forbids the browser to run or load anything.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath
from markupsafe import Markup

from data_pipeline.files import write_atomically
from data_pipeline.pages import write_page
from data_pipeline.settings import UsageError
from data_pipeline.tasks import TASKS
from eval.browser import shown_problems
from eval.errors import TYPES
from eval.figures import COLOURS, Paint, error_types, files, on_the_page, pass_at_k, percent, step_law
from eval.files import read_errors, read_metrics, read_run
from eval.metrics import NUM_PERMUTATIONS, NUM_RESAMPLES


def write_report(eval_dir: epath.PathLike, beside: Sequence[epath.PathLike] = ()) -> epath.Path:
    """Writes report.html and its figures, as .svg and .png, into an eval folder; returns the page's path.

    Reads run.json, metrics.json, problems.jsonl, samples/ and grades/, and errors.json where there is one. With one
    sample a problem there is no curve of Pass@k to draw, and without steps no step law. `beside` are eval folders that
    the page compares this one with, in the order in which they, and last this one, stand on an axis: growing data, say.

    Raises:
        UsageError: where there are no metrics yet.
        RunError: where a file is damaged.
    """
    folder = epath.Path(eval_dir)
    run, metrics, errors = read_run(folder), read_metrics(folder), read_errors(folder)
    kind = TASKS[run["task"]].graded_as if run["task"] in TASKS else "number"
    problems, num_graded = shown_problems(folder, kind)
    complete, n = metrics["complete"] is True, metrics["num_samples"]
    names = {"ratio": f"PassRatio@{n}", "vote": f"maj@{n}", "pass": f"Pass@{n}"}
    if not complete:  # an unfinished run must not be quoted by the names of a finished one
        names = {"ratio": "Share right so far", "vote": "Vote so far", "pass": "Any right so far"}
    unfinished = "" if complete else " · unfinished run"
    drawn: dict[str, tuple[Paint, str]] = {}
    if n > 1:
        drawn["pass_at_k"] = pass_at_k(metrics, names), f"problems answered right{unfinished}"
    if metrics.get("step_law"):
        drawn["step_law"] = step_law(metrics["step_law"]), f"samples answered right, by steps{unfinished}"
    runs = [_run_beside(epath.Path(path), label, run) for path, label in _labelled([*beside, folder])] if beside else []
    diagnosed = [run for run in runs if run["calculation"] is not None]
    if len(diagnosed) > 1:
        drawn["error_types"] = error_types(diagnosed), "samples that go wrong by"
    figures: dict[str, dict[str, Markup]] = {"pass_at_k": {}, "step_law": {}, "error_types": {}}
    for name, (paint, title) in drawn.items():
        for suffix, content in files(paint, title).items():
            write_atomically(folder / f"{name}.{suffix}", functools.partial(_write, content))
        figures[name] = on_the_page(paint, title, name)
    write_page(
        folder / "report.html",
        Path(__file__).with_name("report.html.j2"),
        {"percent": percent, "interval": _interval},
        run=run,
        metrics=metrics,
        complete=complete,
        headline=headline(metrics, run),
        names=names,
        figures=figures["pass_at_k"],
        law_figures=figures["step_law"],
        errors=errors,
        runs=runs,
        errors_figures=figures["error_types"],
        problems=problems,
        num_graded=num_graded,
        num_permutations=NUM_PERMUTATIONS,
        num_resamples=NUM_RESAMPLES,
        colours=COLOURS,
    )
    return folder / "report.html"


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _labelled(folders: Sequence[epath.PathLike]) -> list[tuple[epath.PathLike, str]]:
    """Each folder with what of its path tells it from the others."""
    paths = [str(folder).rstrip("/").split("/") for folder in folders]
    shortest = min(map(len, paths))
    same = [len(set(of_place)) == 1 for of_place in zip(*paths, strict=False)]
    start = next((i for i in range(shortest) if not same[i]), shortest - 1)
    backwards = [len(set(of_place)) == 1 for of_place in zip(*(path[::-1] for path in paths), strict=False)]
    end = next((i for i in range(shortest) if not backwards[i]), 0)
    return [
        (folder, "/".join(path[start : max(start + 1, len(path) - end)]))
        for folder, path in zip(folders, paths, strict=True)
    ]


def _run_beside(folder: epath.Path, label: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says of another run: shares of samples that are right, and that go wrong in either way.

    Raises UsageError where it is of another task or split than `run`.
    """
    other = read_run(folder)
    if (other["task"], other["split"]) != (run["task"], run["split"]):
        raise UsageError(f"{folder} is of {other['task']}/{other['split']}, not of {run['task']}/{run['split']}")
    metrics, errors = read_metrics(folder), read_errors(folder)
    ratio = metrics["pass_ratio"][str(metrics["num_samples"])]
    told = {"label": label, "metrics": metrics, "calculation": None, "reasoning": None}
    if errors is not None and errors["program"]["shares"]["calculation"] is not None:
        told |= {name: (1 - ratio["value"]) * errors["program"]["shares"][name]["value"] for name in TYPES}
    return told


def headline(metrics: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[str, str]:
    """What the numbers mean, and a sentence that explains it; says where they are close, or unfinished."""
    n, num_problems = metrics["num_samples"], metrics["num_problems"]
    ratio = metrics["pass_ratio"][str(n)]["value"]
    passed = metrics["pass_at"][str(n)]["value"]
    if metrics["complete"] is not True:
        every = "their sample" if n == 1 else f"all their {n:,} samples"
        return (
            f"This run is not finished: {num_problems:,} of {run['num_problems']:,} problems have {every}.",
            f"On those {num_problems:,} the model answers right in {percent(ratio)} of its samples, and for "
            f"{percent(passed)} of them at least one sample is right. The numbers will move, and the missing "
            "problems may be harder than these: do not quote them.",
        )
    if n == 1:
        sample = "one greedy sample" if run["temperature"] == 0 else "one sample"
        return (
            f"With {sample} each, the model answers {percent(ratio)} of {num_problems:,} problems right.",
            "One sample cannot tell what the model is unable to solve from what it solves only sometimes.",
        )
    if passed == 0:
        return (
            f"None of the {num_problems * n:,} samples is right.",
            "There is nothing yet that a vote or more samples could bring out.",
        )
    right = f"The model answers right in {percent(ratio)} of its samples"
    once = f"for {percent(passed)} of the problems at least one of {n:,} samples is right"
    # The way to a perfect score has two parts: problems solved only sometimes, and problems never solved.
    unreliable, unsolved = passed - ratio, 1 - passed
    if unreliable < 0.05 and unreliable < 0.1 * passed:  # 1 % against 4 % is near, but not the same
        never = f": for {percent(unsolved)} of the problems no sample is right." if unsolved >= 0.05 else "."
        return (
            f"{right}, and {once}: the two are close.",
            f"What it can solve, it solves nearly every time. More samples would add little{never}",
        )
    if passed == 1:
        return (f"{right}, yet {once}.", "No problem is beyond it: all that is missing is reliability.")
    if unreliable > unsolved:
        points_sometimes, points_missing = (round(100 * to) - round(100 * ratio) for to in (passed, 1))
        clearly = unreliable > 2 * unsolved
        missing = "not so much the ability as its reliability" if clearly else "more reliability than ability"
        return (
            f"{right}, yet {once}.",
            f"What is missing is {missing}: of the {points_missing} points between this model and one that "
            f"is always right, {points_sometimes} lie in problems that it does solve, only not every time.",
        )
    return (
        f"{right}, and {once}.",
        f"Reliability is the smaller part of what is missing: for {percent(unsolved)} of the problems no "
        "sample is right.",
    )


def _interval(entry: Mapping[str, Any]) -> str:
    low, high = entry["ci95"]
    return f"{100 * low:.1f}–{100 * high:.1f}"
