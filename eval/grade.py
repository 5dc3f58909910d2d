"""From samples to grades and metrics.json. Model text is compared, never evaluated."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from data_pipeline.answers import GRADER_VERSION, Kind, check_gold, extract, is_equal
from data_pipeline.cli import RunError, StopSignal, logger
from data_pipeline.files import write_json
from data_pipeline.progress import Progress
from data_pipeline.tasks import get_task
from data_pipeline.workers import in_processes
from eval.files import Oddities, parts, read_problems, read_run
from eval.grading import Graded, PartGrades, grade_part
from eval.metrics import answer_classes, compute_metrics
from eval.step_law import as_arrays, step_law

Row = dict[str, Any]
_PARTS_A_WORKER = 4  # fewer are not worth a process, which takes a second to start


def is_correct(response: str, gold: str, kind: Kind = "number") -> bool:
    r"""Whether the final answer of `response` equals `gold`.

    `kind` is "number" (of a word problem), "latex" (mathematics: numbers, expressions, sets, intervals, matrices,
    equations, words) or "puzzle" (`gold` is "3, 6, 7, 51, 58 -> 4", and the response its steps). Neither text is ever
    executed; what is undecided after two and a half seconds counts as wrong.

    Raises ValueError for another kind, or where `gold` is no answer of its kind.
    """
    check_gold(gold, kind)
    answer = extract(response, kind).answer
    return answer is not None and bool(is_equal(answer, gold, kind))


def grade(folder: epath.Path, again: bool = False) -> epath.Path:
    """Grades the samples of an eval folder and writes metrics.json; returns its path.

    What this version of the grader has graded before is kept, unless `again`: a grading that was stopped goes on. Only
    problems that have all their samples count; where any is missing, `complete` says so.
    Raises RunError where no problem is complete; Stopped where a signal asks to stop.
    """
    run = read_run(folder)
    problems = {problem["problem_id"]: problem for problem in read_problems(folder)}
    kind = get_task(run["task"]).graded_as
    for problem in problems.values():
        try:
            check_gold(problem["answer"], kind)
        except ValueError as error:
            raise RunError(f"{folder / 'problems.jsonl'}, {problem['problem_id']!r}: {error}") from error
    golds = {problem_id: problem["answer"] for problem_id, problem in problems.items()}
    _open_grades(folder / "grades", golds, again)

    oddities: Oddities = Counter()
    graded: dict[str, dict[int, Graded]] = {}  # by sample; the first of each counts
    samples = parts(folder, "samples")
    with StopSignal(), Progress(len(samples), "grading", "files") as bar:
        for rows, odd in _every(samples, folder / "grades", golds, kind, run["num_samples"]):
            StopSignal.heed()
            oddities += odd
            for (problem_id, sample_id), of_sample in rows:
                of_problem = graded.setdefault(problem_id, {})
                oddities += Counter({"samples that occur twice": int(sample_id in of_problem)})
                of_problem.setdefault(sample_id, of_sample)
            bar.update()
    metrics = _metrics(run, problems, graded, oddities)
    write_json(folder / "metrics.json", metrics)
    logger.info("%s", _summary(run, metrics))
    return folder / "metrics.json"


def _open_grades(grades: epath.Path, golds: Mapping[str, str], again: bool) -> None:
    """Begins the folder, without what another version graded, or was graded by other gold answers."""
    grader = grades / "grader.json"
    digest = hashlib.sha256(json.dumps(golds).encode()).hexdigest()
    now = {"grader_version": GRADER_VERSION, "golds_sha256": digest}
    if grades.exists() and (again or not grader.exists() or _read_grader(grader) != now):
        for part in grades.glob("part-*.jsonl"):
            part.unlink()
    grades.mkdir(exist_ok=True)
    write_json(grader, now)


def _read_grader(file: epath.Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError:
        return None


def _every(
    samples: Sequence[epath.Path], grades: epath.Path, golds: Mapping[str, str], kind: Kind, num_samples: int
) -> Iterator[PartGrades]:
    """The grades of each part file, in order; several processes share the work."""
    todo = sum(not (grades / part.name).exists() for part in samples)
    workers = min(len(os.sched_getaffinity(0)), todo // _PARTS_A_WORKER)
    if workers < 2:
        yield from (grade_part(part, grades / part.name, golds, kind, num_samples) for part in samples)
        return
    files = [(str(part), str(grades / part.name)) for part in samples]
    yield from in_processes("eval.grading", (dict(golds), kind, num_samples), files, workers)


def _metrics(run: Row, problems: dict[str, Row], graded: dict[str, dict[int, Graded]], oddities: Oddities) -> Row:
    num_samples = run["num_samples"]
    whole = [pid for pid in problems if len(graded.get(pid, [])) == num_samples]
    if not whole:
        raise RunError(f"no problem has all its {num_samples} samples yet: run `python -m eval sample` to the end")
    complete: Any = True
    if len(whole) < len(problems):
        missing = sum(num_samples - len(graded.get(pid, [])) for pid in problems)
        complete = {"problems without all samples": len(problems) - len(whole), "missing samples": missing}
    rows = [[row for _, row in sorted(graded[pid].items())] for pid in whole]
    measured = compute_metrics(
        correct=[[row.correct for row in of] for of in rows],
        classes=[answer_classes([row.vote for row in of]).tolist() for of in rows],
        finish_reasons=[[row.finish_reason for row in of] for of in rows],
        groups={
            group: [problems[pid][field] for pid in whole]
            for group, field in (("level", "level"), ("subject", "subject"), ("steps", "num_steps"))
        },
        complete=complete,
    )
    drawn = ("temperature", "top_p", "top_k", "stop", "max_tokens", "seed", "dtype", "kv_cache")
    told = {key: run[key] for key in ("task", "split", "checkpoint", "shots", *drawn) if key in run}
    every = [row for of in rows for row in of]
    return {
        **told,
        "grader_version": GRADER_VERSION,
        "problems_not_asked": sum(all(row.finish_reason == "error" for row in of) for of in rows),
        "rules": dict(Counter(row.rule or "no answer" for row in every).most_common()),
        "killed": sum(row.killed for row in every),
        "left_out": dict(oddities),
        "unstable": [pid for pid, of in zip(whole, rows, strict=True) if 0 < 2 * sum(r.correct for r in of) < len(of)],
        **({"greedy_accuracy": measured["pass_ratio"]["1"]} if run["temperature"] == 0 else {}),
        **measured,
        "step_law": step_law(
            *as_arrays(
                [problems[pid]["num_steps"] for pid in whole],
                [float(np.mean([row.correct for row in of])) for of in rows],
            )
        ),
    }


def _summary(run: Row, metrics: Row) -> str:
    n = str(metrics["num_samples"])
    passed, ratio, vote = (100 * metrics[key][n]["value"] for key in ("pass_at", "pass_ratio", "maj_at"))
    cut = 100 * metrics["truncated_fraction"]
    notes = f"; {cut:.0f} % of the samples were cut off at {run['max_tokens']} tokens" if cut >= 1 else ""
    if metrics["problems_not_asked"]:
        notes += f"; {metrics['problems_not_asked']} problems could not be asked, as too long, and count as wrong"
    if metrics["killed"]:
        notes += f"; {metrics['killed']} answers took too long to compare, and count as wrong"
    for what, count in metrics["left_out"].items():
        notes += f"; left out: {count} {what}"
    if metrics["complete"] is not True:
        return (
            f"UNFINISHED, {metrics['num_problems']} of {run['num_problems']} problems: right so far {ratio:.1f} % of "
            f"the samples, any right for {passed:.1f} % of the problems{notes}"
        )
    if "greedy_accuracy" in metrics:
        return f"{metrics['num_problems']} problems: greedy accuracy {ratio:.1f} %{notes}"
    return (
        f"{metrics['num_problems']} problems: PassRatio@{n} {ratio:.1f} %, Pass@{n} {passed:.1f} %, "
        f"maj@{n} {vote:.1f} %{notes}"
    )
