"""`eval sheet`: answers for people to grade, as a page to read or print and a table to fill in."""

import csv
import io
from pathlib import Path
from typing import Any

from etils import epath

from data_pipeline.files import write_text
from data_pipeline.pages import write_page
from data_pipeline.settings import UsageError
from eval.browser import shorten
from eval.files import parts, read_problems, read_run, read_samples
from eval.typeset import typeset


def write_sheet(folder: epath.Path) -> epath.Path:
    """Writes sheet.html and sheet.csv (problem_id, sample_id, points) into an eval folder; returns the page's path.

    Samples stand in the order of the problems. Raises UsageError where there are none.
    """
    run = read_run(folder)
    problems = {row["problem_id"]: row for row in read_problems(folder)}
    answers: dict[str, list[dict[str, Any]]] = {}
    for part in parts(folder, "samples"):
        for sample in read_samples(part, problems, run["num_samples"])[0]:
            answers.setdefault(sample["problem_id"], []).append(sample)
    if not answers:
        raise UsageError(f"{folder} has no samples yet: run `python -m eval sample` first")
    shown = [
        {
            "problem_id": pid,
            "question": typeset(problem["question"]),
            "answers": [
                {"sample_id": sample["sample_id"], "text": typeset(shorten(sample["text"]))}
                for sample in sorted(answers.get(pid, []), key=lambda sample: sample["sample_id"])
            ],
        }
        for pid, problem in problems.items()
    ]
    template = Path(__file__).with_name("sheet.html.j2")
    write_page(folder / "sheet.html", template, run=run, problems=shown)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["problem_id", "sample_id", "points"])
    writer.writerows([problem["problem_id"], one["sample_id"], ""] for problem in shown for one in problem["answers"])
    write_text(folder / "sheet.csv", table.getvalue())
    return folder / "sheet.html"
