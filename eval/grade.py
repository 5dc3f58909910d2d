"""From samples to grades and metrics.json. Model text is compared, never evaluated."""

import time
from typing import Any

from etils import epath

from data_pipeline.answers import GRADER_VERSION, Extracted, canonical_number, extract_number, numbers_equal
from data_pipeline.cli import RunError, logger
from data_pipeline.files import write_json, write_json_lines
from data_pipeline.progress import progress
from data_pipeline.tasks import get_task
from eval.files import parts, read_problems, read_run, read_samples
from eval.metrics import answer_classes, compute_metrics


def is_correct(response: str, gold: str, kind: str = "number") -> bool:
    """Whether the final answer of `response` equals `gold`. `kind` is "number".

    Raises ValueError for another kind, or where `gold` is no answer of its kind.
    """
    return _judge(response, gold, kind)[1]


def _judge(response: str, gold: str, kind: str) -> tuple[Extracted, bool]:
    if kind != "number":
        raise ValueError(f"kind={kind!r} is not gradable; allowed: number")
    extracted = extract_number(response)
    return extracted, extracted.answer is not None and numbers_equal(extracted.answer, gold)


def grade(folder: epath.Path) -> epath.Path:
    """Grades every sample of an eval folder, anew, and writes metrics.json; returns its path.

    Only problems that have all their samples count; where any is missing, `complete` says so.
    Raises RunError where no problem is complete.
    """
    run = read_run(folder)
    problems = {problem["problem_id"]: problem for problem in read_problems(folder)}
    kind = get_task(run["task"]).kind
    graded: dict[str, dict[int, dict[str, Any]]] = {}  # by sample; the first of each counts
    (folder / "grades").mkdir(exist_ok=True)
    for part in progress(parts(folder, "samples"), "grading", "files"):
        rows = []
        for sample in read_samples(part, problems):
            row = _grade_sample(sample, problems[sample["problem_id"]]["answer"], kind)
            rows.append(row)
            of_problem = graded.setdefault(sample["problem_id"], {})
            of_problem.setdefault(sample["sample_id"], {**row, "finish_reason": sample["finish_reason"]})
        write_json_lines(folder / "grades" / part.name, rows)
    metrics = _metrics(run, problems, graded)
    write_json(folder / "metrics.json", metrics)
    logger.info("%s", _summary(run, metrics))
    return folder / "metrics.json"


def _grade_sample(sample: dict[str, Any], gold: str, kind: str) -> dict[str, Any]:
    started = time.perf_counter()
    extracted, correct = _judge(sample["text"], gold, kind)
    return {
        "problem_id": sample["problem_id"],
        "sample_id": sample["sample_id"],
        "answer": extracted.answer,
        "rule": extracted.rule,
        "correct": correct,
        "seconds": round(time.perf_counter() - started, 6),
    }


def _metrics(
    run: dict[str, Any], problems: dict[str, dict[str, Any]], graded: dict[str, dict[int, dict[str, Any]]]
) -> dict[str, Any]:
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
        correct=[[row["correct"] for row in of] for of in rows],
        classes=[answer_classes([canonical_number(row["answer"]) for row in of]).tolist() for of in rows],
        finish_reasons=[[row["finish_reason"] for row in of] for of in rows],
        groups={
            group: [problems[pid][field] for pid in whole]
            for group, field in (("level", "level"), ("subject", "subject"), ("steps", "num_steps"))
        },
        complete=complete,
    )
    drawn = ("temperature", "top_p", "top_k", "stop", "max_tokens", "seed", "dtype", "kv_cache")
    told = {key: run[key] for key in ("task", "split", "checkpoint", "shots", *drawn) if key in run}
    unasked = sum(all(row["finish_reason"] == "error" for row in of) for of in rows)
    return {**told, "grader_version": GRADER_VERSION, "problems_not_asked": unasked, **measured}


def _summary(run: dict[str, Any], metrics: dict[str, Any]) -> str:
    n = str(metrics["num_samples"])
    passed, ratio, vote = (100 * metrics[key][n]["value"] for key in ("pass_at", "pass_ratio", "maj_at"))
    cut = 100 * metrics["truncated_fraction"]
    truncated = f"; {cut:.0f} % of the samples were cut off at {run['max_tokens']} tokens" if cut >= 1 else ""
    if metrics["problems_not_asked"]:
        truncated += f"; {metrics['problems_not_asked']} problems could not be asked, as too long, and count as wrong"
    if metrics["complete"] is not True:
        return (
            f"UNFINISHED, {metrics['num_problems']} of {run['num_problems']} problems: right so far {ratio:.1f} % of "
            f"the samples, any right for {passed:.1f} % of the problems{truncated}"
        )
    return (
        f"{metrics['num_problems']} problems: PassRatio@{n} {ratio:.1f} %, Pass@{n} {passed:.1f} %, "
        f"maj@{n} {vote:.1f} %{truncated}"
    )
