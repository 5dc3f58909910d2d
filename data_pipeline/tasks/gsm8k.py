"""GSM8K (Cobbe et al. 2021): grade-school word problems whose answers are numbers.

A row is {"question": …, "answer": …}, the answer ending in a line `#### 72`. A step is a non-blank line before it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.answers import parse_number
from data_pipeline.cli import Stopped
from data_pipeline.rows import Located, Row
from data_pipeline.settings import UsageError
from data_pipeline.tasks.base import Problem, Task, count_lines, text_field

# The public solutions carry calculator marks such as 48/2 = <<48/2=24>>24, which no model should learn.
_PLACE = "https://raw.githubusercontent.com"  # where TFDS has it from
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def parse(row: Row) -> Problem:
    """A problem from a public row. Raises ValueError where the `####` line is missing or holds no number."""
    solution, mark, final = text_field(row, "answer").rpartition("####")
    if not mark or not final.strip():
        raise ValueError("the answer has no last line of the form '#### 72'")
    solution = CALCULATOR_MARK.sub("", solution).strip()
    gold = final.strip().replace(",", "")
    if parse_number(gold) is None:
        raise ValueError(f"the answer after '####' must be a number, got {gold!r}")
    return Problem("", text_field(row, "question"), solution, gold, num_steps=count_lines(solution))


def _download(split: str) -> Iterator[Located]:
    import requests
    from tensorflow_datasets.text.gsm8k import gsm8k  # slow to import

    try:
        builder = gsm8k.Gsm8k(file_format="array_record")
        if not Path(builder.data_dir).exists():
            requests.head(_PLACE, timeout=10)  # without a network TFDS tries for minutes
        builder.download_and_prepare()
    except Stopped:
        raise
    except Exception as error:  # the download stack raises many kinds, all meaning the same to a user
        raise UsageError(
            f"GSM8K could not be had through TensorFlow Datasets ({type(error).__name__}: {error}); "
            "give a downloaded .jsonl file instead: data.sources.0.path=FILE in training, --source FILE elsewhere"
        ) from error
    for number, row in enumerate(builder.as_data_source(split=split), 1):
        texts = {key: row[key].decode() for key in ("question", "answer")}
        yield Located(texts, number, f"gsm8k/{split} row {number}")


TASK = Task(
    "gsm8k",
    kind="number",
    parse=parse,
    about="GSM8K (Cobbe et al. 2021), MIT licence",
    splits={"train": 7473, "test": 1319},
    # of the files whose SHA-256 are 17f347dc51477c50… and 3730d312f6e34405…
    digests={"train": "bf7e83c3c69f513324446da32f5f6e2c", "test": "b50e33b8e15bf963fa227a5384bffb0b"},
    download=_download,
)
