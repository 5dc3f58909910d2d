"""A dataset: problems of one task as a TensorFlow Datasets folder of ArrayRecord files, which needs no TensorFlow.

dataset_info.json, features.json, metadata.json      what `tfds.builder_from_directory(DIR)` reads it by
question_answer-train.array_record-00000, …          problems, in the order in which they were written
"""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from data_pipeline.cli import RunError, make_folder
from data_pipeline.problem import Problem
from data_pipeline.rows import DATASET_INFO, is_tfds_folder
from data_pipeline.settings import UsageError

_NAME = "question_answer"
_VERSION = "1.0.0"  # of the fields below
_TEXTS = ("id", "question", "solution", "answer", "level", "subject", "lineage")
_SHARD = 200_000  # problems in a file
_CHUNK = 1024  # problems read at a time: one by one is 25 times slower


def is_dataset(source: str) -> bool:
    """Whether `source` is a dataset's folder."""
    return is_tfds_folder(epath.Path(source))


def check_out(out: str, task: str, splits: Collection[str]) -> None:
    """Raises UsageError where `out` cannot become a dataset of these splits: what is there would be lost."""
    destination = epath.Path(out)
    if not destination.exists():
        if "://" not in out:
            make_folder(destination.parent, "out")
        return
    if not destination.is_dir():
        raise UsageError(f"out={out} is a file: name a folder")
    if not any(destination.iterdir()):
        return
    if not is_dataset(out) or not _is_ours(out):
        raise UsageError(f"out={out} exists and is no dataset of ours: choose another folder")
    if dataset_task(out) != task:
        raise UsageError(
            f"out={out} holds problems of the task {dataset_task(out)!r}: choose another folder, or remove it"
        )
    lost = [split for split in dataset_splits(out) if split not in splits]
    if lost:
        raise UsageError(
            f"out={out} holds the split {' and '.join(lost)}, which would be lost: choose another folder, or remove it"
        )


def write_dataset(
    out: str, task: str, splits: Mapping[str, Iterable[Problem]], about: Mapping[str, Any] | None = None,
    add: Callable[[Path], None] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Writes the problems of each split to the folder `out`, which appears whole; returns how many each has.

    `about` is kept beside the task's name in metadata.json; `add` may put further files into the folder, once the
    problems are written. A dataset of the same splits that is there is replaced. Raises UsageError where a split is
    empty, or `check_out` says no.
    """
    import tensorflow_datasets as tfds  # slow to import

    check_out(out, task, splits)
    destination = epath.Path(out)
    local = "://" not in out
    with tempfile.TemporaryDirectory(prefix=".dataset-", dir=destination.parent if local else None) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        info = tfds.core.DatasetInfo(
            builder=tfds.core.dataset_info.DatasetIdentity(
                name=_NAME, version=tfds.core.Version(_VERSION), data_dir=str(made), module_name=__name__
            ),
            features=tfds.features.FeaturesDict({**dict.fromkeys(_TEXTS, tfds.features.Text()), "num_steps": np.int32}),
            metadata=tfds.core.MetadataDict({"task": task, **(about or {})}),
            disable_shuffling=True,
        )
        info.set_file_format("array_record")
        written = [_write_split(made, split, problems) for split, problems in splits.items()]
        for split in written:
            if not split.shard_lengths:
                raise UsageError(f"{out}: the split {split.name!r} would be empty, no problem was read")
        info.set_splits(tfds.core.splits.SplitDict(written))
        info.write_to_directory(str(made))
        counts = {split.name: sum(split.shard_lengths) for split in written}
        if add is not None:
            add(made)
        _move(made, destination)
    return counts


def read_dataset(source: str, split: str) -> Iterator[Problem]:
    """The problems of a split, in order. Raises UsageError where there is no such split, RunError on damage."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    splits = _open(source).info.splits
    if split not in splits:
        raise UsageError(f"split={split!r}: the dataset {source} has {' and '.join(splits)}")
    try:
        with ArrayRecordDataSource([str(path) for path in splits[split].filepaths]) as records:
            if len(records) != splits[split].num_examples:
                raise RunError(
                    f"{source} is damaged: {len(records)} of {splits[split].num_examples} problems are there"
                )
            for start in range(0, len(records), _CHUNK):
                chunk = range(start, min(start + _CHUNK, len(records)))
                yield from map(_decoded, records.__getitems__(list(chunk)))
    except RunError:
        raise
    except Exception as error:  # ArrayRecord and protobuf raise kinds of their own
        raise RunError(f"{source} is damaged ({type(error).__name__}: {error}): make it again") from error


def dataset_task(source: str) -> str:
    """The name of the task whose problems a dataset holds. Raises UsageError where it is none of ours."""
    try:
        metadata = _open(source).info.metadata
    except ValueError as error:  # it is read when it is asked for
        raise RunError(f"{source} is damaged (metadata.json: {error}): make it again") from error
    if not metadata or "task" not in metadata:
        raise UsageError(f"{source} is a TensorFlow Datasets folder, but not one that data_pipeline made")
    return metadata["task"]


def dataset_splits(source: str) -> list[str]:
    """The names of its splits."""
    return list(_open(source).info.splits)


def _open(source: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(source)
    except Exception as error:  # whatever a damaged file makes of it
        raise RunError(f"{source} is damaged ({type(error).__name__}: {error}): make it again") from error


def _write_split(folder: Path, split: str, problems: Iterable[Problem]) -> Any:
    """Writes the files of a split; returns its SplitInfo."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    names = tfds.core.naming.ShardedFileTemplate(
        dataset_name=_NAME, data_dir=epath.Path(folder), split=split, filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )  # fmt: skip
    remaining = iter(problems)
    lengths: list[int] = []
    num_bytes = 0
    while first := next(remaining, None):
        path = names.sharded_filepath(shard_index=len(lengths), num_shards=None)
        writer = ArrayRecordWriter(str(path), "group_size:1")
        lengths.append(0)
        for problem in itertools.chain([first], itertools.islice(remaining, _SHARD - 1)):
            record = _encoded(problem)
            writer.write(record)
            lengths[-1] += 1
            num_bytes += len(record)
        writer.close()
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=names)


def _encoded(problem: Problem) -> bytes:
    """A problem as the tf.train.Example that TFDS makes of it: made directly, which takes a tenth of the time."""
    from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

    example: Any = Example()
    features = example.features.feature
    for name in _TEXTS:
        features[name].bytes_list.value.append((getattr(problem, name) or "").encode())
    features["num_steps"].int64_list.value.append(-1 if problem.num_steps is None else problem.num_steps)
    return example.SerializeToString(deterministic=True)


def _decoded(record: bytes) -> Problem:
    from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

    features: Any = Example.FromString(record).features.feature
    texts = {name: features[name].bytes_list.value[0].decode() for name in _TEXTS}
    texts |= {name: texts[name] or None for name in ("level", "subject")}
    steps = features["num_steps"].int64_list.value[0]
    return Problem(**texts, num_steps=None if steps < 0 else steps)


def _is_ours(folder: str) -> bool:
    metadata = epath.Path(folder) / "metadata.json"
    try:
        return "task" in json.loads(metadata.read_text())
    except (OSError, ValueError, TypeError):
        return False


def _move(made: Path, destination: epath.Path) -> None:
    """Puts a whole folder in its place; on an object store dataset_info.json, by which it is known, comes last."""
    if "://" in str(destination):
        if destination.exists():
            destination.rmtree()
        destination.mkdir(parents=True)
        for file in sorted(made.iterdir(), key=lambda file: file.name == DATASET_INFO):
            epath.Path(file).copy(destination / file.name)
        return
    for file in made.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    place = Path(destination)
    before = place.with_name(f".{place.name}.replaced-{os.getpid()}")
    try:
        if place.exists():
            place.rename(before)
        made.rename(place)
    except BaseException:
        if before.exists() and not place.exists():
            before.rename(place)
        raise
    shutil.rmtree(before, ignore_errors=True)
