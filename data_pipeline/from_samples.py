"""Right answers that a model drew as a dataset to train on: rejection-sampling fine-tuning (arXiv 2308.01825)."""

import hashlib
import json
import string
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic
from etils import epath

from data_pipeline.cli import logger
from data_pipeline.files import damage_named, read_json_lines, write_json_lines
from data_pipeline.settings import Settings, UsageError
from data_pipeline.templates import Template


class FromSamples(Settings):
    """`from-samples DIR`: the right answers in a graded eval folder, as rows of the task jsonl."""

    out: str = pydantic.Field(description="file of rows to write, .jsonl")
    per_problem: pydantic.PositiveInt = pydantic.Field(4, description="at most this many different answers a problem")
    seed: pydantic.NonNegativeInt = pydantic.Field(0, description="which ones, where there are more")


def rows_from_samples(folder: str, settings: FromSamples) -> int:
    """Writes the rows, and returns how many. A row's `lineage` says which sample of which run it is.

    Answers that differ in white space only are one. Raises UsageError where the folder is not graded, or no answer of
    it is right.
    """
    directory = epath.Path(folder)
    if not (directory / "run.json").exists():
        raise UsageError(f"{folder} is not an eval folder: it has no run.json")
    if not any((directory / "grades").glob("part-*.jsonl")):
        raise UsageError(f"{folder} is not graded: run `python -m eval grade {folder}` first")
    with damage_named(directory / "run.json", "sample into another folder"):
        run = json.loads((directory / "run.json").read_text())
        template = Template(**run["template"])
        lineage = {"checkpoint": run["checkpoint"], "run": run["hash"]}
        if run["split"] == "test":
            logger.warning("these are answers to the TEST split: who trains on them cannot be measured by it any more")
    grades = _rows(directory / "grades", "grade again", ("problem_id", "sample_id", "correct"))
    right = {(row["problem_id"], row["sample_id"]) for row in grades if row["correct"]}
    before, between = _around_solution(template)
    texts: dict[str, dict[str, tuple[int, str]]] = {}
    odd = 0
    for row in _rows(directory / "samples", "remove it and sample again", ("problem_id", "sample_id", "text")):
        problem, sample = row["problem_id"], row["sample_id"]
        if (problem, sample) in right:
            text = row["text"].strip()
            body, found, _ = text.removeprefix(before.lstrip()).rpartition(between)
            if not found or not body.strip():
                odd += 1
            else:
                texts.setdefault(problem, {}).setdefault(" ".join(body.split()), (sample, body.strip()))
    with damage_named(directory / "problems.jsonl", "sample into another folder"):
        rows = [
            row
            for problem in read_json_lines(directory / "problems.jsonl")
            for row in _of_problem(problem, list(texts.get(problem["problem_id"], {}).values()), lineage, settings)
        ]
    if not rows:
        raise UsageError(f"{folder}: none of its samples is right, and in the form of the template")
    write_json_lines(settings.out, rows)
    distinct = sum(map(len, texts.values()))
    logger.info(
        "%d rows of %d problems in %s: of %d right samples %d differ, %d are not in the template's form",
        len(rows), len({row["lineage"]["problem_id"] for row in rows}), settings.out, len(right), distinct, odd,
    )  # fmt: skip
    return len(rows)


def _around_solution(template: Template) -> tuple[str, str]:
    """What a response has before its solution, and between that and the answer."""
    parts = [(text, field) for text, field, _, _ in string.Formatter().parse(template.response) if field is not None]
    if [field for _, field in parts] != ["solution", "answer"] or not parts[1][0].strip():
        raise UsageError(
            f"its response {template.response!r} does not tell solution from answer: no rows can be made of it"
        )
    return parts[0][0], parts[1][0]


def _rows(folder: epath.Path, advice: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    for part in sorted(folder.glob("part-*.jsonl")):
        with damage_named(part, advice):
            rows = [{key: row[key] for key in keys} for row in read_json_lines(part)]
        yield from rows


def _of_problem(
    problem: dict[str, Any], solutions: list[tuple[int, str]], lineage: dict[str, Any], settings: FromSamples
) -> Iterator[dict[str, Any]]:
    def chance(solution: tuple[int, str]) -> bytes:
        return hashlib.sha256(f"{settings.seed} {problem['problem_id']} {solution[0]}".encode()).digest()

    for sample, text in sorted(sorted(solutions, key=chance)[: settings.per_problem]):
        yield {
            "id": f"{problem['problem_id']}#{sample}",
            "question": problem["question"],
            "solution": text,
            "answer": problem["answer"],
            "lineage": {
                "problem_id": problem["problem_id"],
                "sample_id": sample,
                **lineage,
            },
        }
