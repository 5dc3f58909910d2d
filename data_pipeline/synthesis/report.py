"""report.html of a synthesis: what came of the items, what it cost, and rows beside their seeds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from data_pipeline.pages import write_page
from data_pipeline.synthesis.estimate import dollars
from data_pipeline.synthesis.requests import NANO

_MAX_CHARS = 1500  # of a text that is shown
_REMOVED = {  # what `clean` calls it, in the words of a synthesis
    "there beside it": "repeats a seed",
    "nearly there beside it": "is nearly a seed",
    "there already": "repeats a new row",
    "nearly there already": "is nearly a new row",
    "in a test set": "is in a test set",
}


class Sample(NamedTuple):
    """A seed, and what was made of it: a problem, or the text that was lost."""

    seed: str
    text: str


def write_report(
    path: Path,
    report: Mapping[str, Any],
    samples: Sequence[Sample],
    lost: Mapping[tuple[str, str], Sequence[Sample]],
    steps: Mapping[str, Mapping[int, int]],
) -> None:
    """One self-contained page, in which every text is escaped. `steps`: histograms of the seeds and of the rows."""
    write_page(
        epath.Path(path),
        Path(__file__).with_name("report.html.j2"),
        report=report,
        stages=_stages(report),
        removed={_REMOVED.get(reason, reason): count for reason, count in report["removed"].items()},
        totals={
            name: sum(row[name] for row in report["requests"])
            for name in ("count", "prompt_tokens", "completion_tokens", "cost")
        },
        samples=samples,
        lost=[(f"{stage}: {reason}", texts) for (stage, reason), texts in lost.items()],
        steps=_step_rows(steps),
        max_chars=_MAX_CHARS,
        dollars=lambda value: dollars(value * NANO),
    )


def _stages(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    """How many items are left after each stage."""
    lost = Counter[str]()
    for row in report["lost"]:
        lost[row["stage"]] += row["count"]
    done = report["num_items"] - report["num_open"]
    removed = Counter(report["removed"])
    repeated = sum(count for reason, count in removed.items() if "there" in reason)
    asked = done - lost["seed"]
    distinct = report["num_rows"] - repeated
    in_no_test_set = ", and it is in no test set" if report["settings"]["against"] else " (no test set was named)"
    return [
        ("items that were asked", asked),
        ("with a question", asked - lost["question"]),
        ("with an answer", report["num_rows"]),
        ("not there already", distinct),
        ("kept: the solution ends in its answer" + in_no_test_set, report["num_kept"]),
    ]


def _step_rows(steps: Mapping[str, Mapping[int, int]]) -> list[tuple[str, list[tuple[int, float]]]]:
    """By number of steps: of each histogram the count and its share in percent."""
    totals = {name: max(1, sum(of.values())) for name, of in steps.items()}
    numbers = sorted(set().union(*steps.values())) if steps else []
    return [
        (
            "unknown" if n == -1 else str(n),
            [(of.get(n, 0), 100 * of.get(n, 0) / totals[name]) for name, of in steps.items()],
        )
        for n in numbers
    ]
