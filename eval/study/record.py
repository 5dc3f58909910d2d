"""What is kept of a cell, and whether what is done still belongs to what is asked for.

cell.json holds the settings that determine the results, the sizes of the files that were read, and of each command that
is done when, in how many seconds and with which versions.
"""

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from data_pipeline.cli import RunError
from data_pipeline.files import damage_named, write_json
from data_pipeline.settings import UsageError, differences
from eval.study.grid import Cell, paths_of
from mathscale_jax.config import MAY_CHANGE_ON_RESUME

_VERSIONS = ("mathscale-jax", "jax", "jaxlib", "flax", "optax", "numpy")
# A run may be resumed with these changed, but from the beginning it would have been another.
_DETERMINE = ("num_steps", "data.tokenizer", "data.template", "validation")
_FREE = tuple(key for key in MAY_CHANGE_ON_RESUME if key not in _DETERMINE)


def read_json(file: epath.Path) -> Any:
    """A file of a cell. Raises RunError where it is damaged."""
    with damage_named(file, "remove the cell's folder to run it again"):
        return json.loads(file.read_text())


def read_record(cell: Cell) -> dict[str, Any]:
    """cell.json; empty where there is none. Raises RunError where it is damaged."""
    file = epath.Path(cell.folder) / "cell.json"
    if not file.exists():
        return {}
    record = read_json(file)
    if not isinstance(record, dict) or not {"settings", "files", "done"} <= set(record):
        raise RunError(f"{file} is damaged: remove the cell's folder to run it again")
    return record


def begin_record(cell: Cell) -> None:
    """Writes down what a cell is about to be run with, beside what is done already, perhaps for another study."""
    before = read_record(cell)
    now = cell.settings()
    if before:
        now["evals"] = {**before["settings"]["evals"], **now["evals"]}
        now["leakage"] = now["leakage"] or before["settings"]["leakage"]
    files = {**before.get("files", {}), **files_of(cell)}
    record = {"point": cell.point, "seed": cell.seed, "settings": now, "files": files}
    record |= {"done": before.get("done", {}), "spent": before.get("spent", {})}
    write_json(epath.Path(cell.folder) / "cell.json", record)


def add_time(cell: Cell, stage: str, seconds: float) -> None:
    """Writes down how long a command ran that was stopped, or failed."""
    record = read_record(cell)
    spent = record.setdefault("spent", {})
    spent[stage] = spent.get(stage, 0.0) + round(seconds, 1)
    write_json(epath.Path(cell.folder) / "cell.json", record)


def mark_done(cell: Cell, stage: str, seconds: float) -> None:
    """Writes down that a command has ended well, after so many seconds and those of earlier tries."""
    record = read_record(cell)
    seconds += record.get("spent", {}).pop(stage, 0.0)
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record["done"][stage] = {"seconds": round(seconds, 1), "at": at, "versions": versions}
    write_json(epath.Path(cell.folder) / "cell.json", record)


def done_stages(cell: Cell) -> dict[str, float]:
    """The commands that are done, and the seconds they took."""
    return {name: entry["seconds"] for name, entry in read_record(cell).get("done", {}).items()}


def check_unchanged(cells: Sequence[Cell]) -> None:
    """Raises UsageError where a folder holds results of other settings, or of other data, than its cell has now.

    Data that is not there is no other data: it may be made again.
    """
    sizes: dict[str, str] = {}
    for cell in cells:
        record = read_record(cell)
        if not record:
            continue
        lines = _changes(record, cell)
        for path in record["files"].keys() & {path for _, path in paths_of(cell)}:
            if path not in sizes:
                sizes[path] = _sizes(path)
            if sizes[path] and sizes[path] != record["files"][path] and record["done"]:
                lines.append(f"{path}: its files are not those that were read")
        if lines:
            listed = "\n  ".join(lines)
            raise UsageError(
                f"{cell.folder} holds results of other settings:\n  {listed}\n"
                "choose another out for the changed study, or remove the folder to run this cell again"
            )


def files_of(cell: Cell) -> dict[str, str]:
    """What a cell reads, with a digest of its files' names and sizes."""
    return {path: _sizes(path) for _, path in paths_of(cell)}


def _changes(record: dict[str, Any], cell: Cell) -> list[str]:
    before, now = record["settings"], cell.settings()
    lines: list[str] = []
    if "train" in record["done"] or (epath.Path(cell.train.output_dir) / "checkpoints").exists():
        lines = differences(before["train"], now["train"])
        free = tuple(f"{key}{end}" for key in _FREE for end in ":.")
        lines = [line for line in lines if not line.startswith(free)]
    for name in before["evals"].keys() & now["evals"].keys():  # others may come, or belong to another study
        if name not in record["done"] and not (epath.Path(cell.evals[name].out) / "run.json").exists():
            continue  # nothing is drawn yet
        changes = differences(before["evals"][name], now["evals"][name])
        lines += [f"evals.{name}.{line}" for line in changes if not line.startswith("shards:")]
    if before["leakage"] and now["leakage"]:
        lines += [f"leakage.{line}" for line in differences(before["leakage"], now["leakage"])]
    return lines


def _sizes(path: str) -> str:
    """A digest of names and sizes: not of content, which may be a terabyte; "" of what is not there."""
    file = epath.Path(path)
    if not file.exists():
        return ""
    told = [f"{str(each).removeprefix(str(file))} {size}" for each, size in _walk(file, depth=2)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _walk(file: epath.Path, depth: int) -> Iterator[tuple[epath.Path, int]]:
    """Files and their sizes, in order; of what lies deeper, such as the arrays of a checkpoint, the folder alone."""
    if not file.is_dir():
        yield file, file.stat().length
    elif not depth:
        yield file, 0
    else:
        for each in sorted(file.iterdir()):
            if not each.name.startswith("."):
                yield from _walk(each, depth - 1)
