"""The table, and the files benchmarks/results/<model>_<hardware>_<date>.{md,json}."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rounds import Row, cpu_ratio, ratios
from data_pipeline.files import write_json, write_text

_PACKAGES = ("jax", "jaxlib", "torch", "transformers", "numpy", "grain")


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where and when something was measured, and with which versions."""

    device: str
    num_cores: int
    date: str
    versions: dict[str, str]
    load_before: float  # processes that wanted to run, the minute before the measurement

    @property
    def hardware(self) -> str:
        """The device's name as a part of a file name."""
        cores = f" {self.num_cores} cores" if self.device == processor() else ""
        return _slug(self.device.split("@")[0] + cores)


def environment(device: str, load_before: float, peers: Sequence[str] = ()) -> Environment:
    """What is so now. `device` as jax calls it; a CPU's own name is found here. `peers`: further packages' names."""
    versions = {"python": platform.python_version()}
    for package in (*_PACKAGES, *peers):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = processor() if device.lower() == "cpu" else device
    return Environment(name, len(os.sched_getaffinity(0)), date, versions, load_before)


def processor() -> str:
    """The name of the CPU."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = re.findall(r"^model name\s*: (.*)$", information.read_text(), re.MULTILINE)
        if names:
            return names[0].strip()
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as plain text, too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def train_table(rows: Sequence[Row], flops_per_token: float, reference: Row | None) -> str:
    """One line a contestant. `reference` is what useful tokens a second, and a second of CPU time, are compared with.

    "times the reference" is the median of the rounds, with the lowest and the highest one.
    """
    if reference is not None and reference.failure is not None:
        reference = None
    header = [
        "step of",
        "positions/s/device",
        "useful tokens/s/device",
        "TFLOP/s",
        "MFU",
        "peak memory",
        "CPU s a step",
        "others' cores",
        "times the reference",
        "by CPU time",
    ]
    lines = []
    for row in rows:
        if row.failure is not None or not row.step_seconds:
            lines.append([row.contestant.name, row.failure or "not measured", *[""] * (len(header) - 2)])
            continue
        flops, peak = row.positions_per_second * flops_per_token, row.description.get("peak_flops")
        lines.append(
            [
                row.contestant.name,
                f"{row.positions_per_second:,.0f}",
                f"{row.tokens_per_second:,.0f}",
                f"{flops / 1e12:.3g}",
                "peak not known" if peak is None else f"{100 * flops / peak:.1f} %",
                "not known" if row.peak_memory is None else f"{row.peak_memory / 2**30:.2f} GiB",
                f"{statistics.median(row.cpu_seconds):.2f}",
                f"{statistics.median(row.others_cpu):.2f}",
                _ratio(row, reference) if reference is not None else "",
                f"{cpu_ratio(row, reference):.2f}" if reference is not None else "",
            ]
        )
    return table(header, lines)


def _ratio(row: Row, reference: Row) -> str:
    if row is reference:
        return "the reference"
    values = ratios(row, reference)
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def row_as_json(row: Row, reference: Row | None) -> dict[str, Any]:
    """Everything measured of a contestant."""
    measured = row.failure is None and bool(row.step_seconds)
    values = dataclasses.asdict(row) | {
        "contestant": row.contestant.name,
        "positions_per_step": row.contestant.positions,
        "tokens_per_step": row.contestant.tokens,
        "positions_per_second_per_device": row.positions_per_second if measured else None,
        "tokens_per_second_per_device": row.tokens_per_second if measured else None,
    }
    if measured and reference is not None and reference.failure is None:
        values["times_reference"] = ratios(row, reference)
    return values


def write_results(
    directory: str, subject: str, where: Environment, command: str, body: str, values: dict[str, Any]
) -> Path:
    """Writes <subject>_<hardware>_<date>.md and .json; returns the first one's path."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{_slug(subject)}_{where.hardware}_{where.date}"
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    text = f"""# {subject}, {where.device}, {where.date}

    {command}

- {where.device}, {where.num_cores} cores for this process; {platform.system()}
- {versions}
- load average of the minute before: {where.load_before:.1f}

{body}
"""
    write_text(folder / f"{stem}.md", text)
    write_json(folder / f"{stem}.json", {"command": command, "environment": dataclasses.asdict(where), **values})
    return folder / f"{stem}.md"


def _slug(text: str) -> str:
    text = text.lower().replace("(r)", "").replace("(tm)", "")
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")
