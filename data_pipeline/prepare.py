"""`prepare TASK`: a public data set as a dataset folder, from its files or its public place."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pydantic
import requests
from etils import epath

from data_pipeline.cli import RunError, logger
from data_pipeline.dataset import check_out, dataset_splits, is_dataset, write_dataset
from data_pipeline.files import cache_folder, write_atomically
from data_pipeline.problem import Problem
from data_pipeline.progress import Progress, progress
from data_pipeline.rows import files_below, holds_split, says_split
from data_pipeline.settings import Settings, UsageError
from data_pipeline.tasks import Task, get_task
from data_pipeline.tasks.base import TextDigest


class PrepareSettings(Settings):
    """`prepare TASK`: reads every problem of a public data set, checks it, and writes a dataset folder."""

    out: str = pydantic.Field(description="folder of the dataset")
    source: str | None = pydantic.Field(
        None, description="file, folder or URL of the published rows; none takes the task's public place"
    )
    split: str | None = pydantic.Field(None, description="the only split to read; none takes all that are there")


def prepare(task: str, settings: PrepareSettings) -> dict[str, int]:
    """Writes the dataset, and returns the number of problems of each split. Raises UsageError."""
    definition = get_task(task)
    source = settings.source
    if source is not None and source.startswith(("http://", "https://")):
        source = str(download(source))
    if source is not None and not epath.Path(source).exists():
        raise UsageError(f"source={source} does not exist")
    about: dict[str, Any] = {"about": definition.about}
    if source is not None:
        about |= {"source": settings.source, "sha256": _checksums(epath.Path(source))}
    splits = [settings.split] if settings.split is not None else _splits(definition, source)
    check_out(settings.out, task, splits)
    digests = {split: TextDigest() for split in splits}
    counts = write_dataset(
        settings.out, task, {split: _problems(definition, split, source, digests[split]) for split in splits}, about
    )
    for split, count in counts.items():
        published = definition.splits.get(split, count)
        known = definition.digests.get(split)
        if published != count:
            meant = [other for other, number in definition.splits.items() if number == count]
            advice = f" (as many as {meant[0]} has: --split {meant[0]}?)" if meant else ""
            logger.warning("%s: %s problems, where %s are published%s", split, f"{count:,}", f"{published:,}", advice)
        elif known is None:
            logger.info("%s: %s problems", split, f"{count:,}")
        elif known == digests[split].hexdigest():
            logger.info("%s: %s problems, word for word as published", split, f"{count:,}")
        else:
            logger.warning("%s: %s problems, but not in the words that are published", split, f"{count:,}")
    logger.info("%s\nwrote %s", definition.about, settings.out)
    return counts


def download(url: str) -> Path:
    """The file at `url`, kept in the cache folder: fetched once. Raises RunError."""
    name = url.rstrip("/").split("/")[-1].split("?")[0]
    file = cache_folder() / "downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with requests.get(url, stream=True, timeout=60) as response:
            response.raise_for_status()
            size = response.headers.get("Content-Length")
            with Progress(int(size) if size else None, name, "bytes") as bar:

                def write(opened: BinaryIO) -> None:
                    for block in response.iter_content(2**20):
                        opened.write(block)
                        bar.update(len(block))

                write_atomically(file, write)
    except requests.RequestException as error:
        raise RunError(f"{url} could not be had ({error}): download it yourself, and give --source FILE") from error
    return file


def _splits(task: Task, source: str | None) -> list[str]:
    """The splits that a source has. Raises UsageError where it does not say."""
    known = list(task.splits) or ["train", "test"]
    if source is None:
        return known
    if is_dataset(source):
        return dataset_splits(source)
    if epath.Path(source).is_dir():
        found = [split for split in known if holds_split(source, split)]
    else:
        found = [split for split in known if says_split(epath.Path(source).name, split)]
        if len(found) > 1:
            raise UsageError(f"source={source}: its name says {' and '.join(found)}: give --split {'|'.join(found)}")
    if not found and len(known) == 1:
        return known
    if not found:
        raise UsageError(f"source={source}: its name does not say which split it is: give --split {'|'.join(known)}")
    return found


def _problems(task: Task, split: str, source: str | None, digest: TextDigest) -> Iterator[Problem]:
    for problem in progress(task.problems(split, source), f"{task.name}/{split}", "problems"):
        digest.add(problem)
        yield problem


def _checksums(path: epath.Path) -> dict[str, str]:
    """SHA-256 of a file, or of each in a folder."""
    files = list(files_below(path)) if path.is_dir() else [path]
    sums = {}
    for file in files:
        with file.open("rb") as opened:
            sums[file.name if file == path else str(file.relative_to(path))] = hashlib.file_digest(
                opened, "sha256"
            ).hexdigest()
    return sums
