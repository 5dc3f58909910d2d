"""report.html of a cleaning: how many rows went and why, with examples beside what they repeat."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from data_pipeline.pages import write_page

_MAX_CHARS = 1500  # of a text that is shown


class Pair(NamedTuple):
    """A row that was removed, why, and the text of what it repeats ("" of nothing)."""

    reason: str
    detail: str
    text: str
    like: str


def write_report(path: epath.Path, report: Mapping[str, Any], pairs: Sequence[Pair]) -> None:
    """One self-contained page, in which every text is escaped."""
    template = Path(__file__).with_name("report.html.j2")
    write_page(path, template, report=report, pairs=pairs, max_chars=_MAX_CHARS)
