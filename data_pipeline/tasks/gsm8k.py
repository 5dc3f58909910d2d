"""GSM8K (Cobbe et al. 2021, MIT licence): 7,473 training and 1,319 test problems, answers are numbers.

Read from TensorFlow Datasets, or from a file in the public layout (`question`, `answer` with a last line
`#### 72`). A step is a non-blank line before `####`. Ids are made from the question, as TensorFlow Datasets
shuffles the rows: a problem has the same id, and so the same random draws, whatever it was read from.
"""

import re
from collections.abc import Iterator

from data_pipeline.answers import parse_number
from data_pipeline.cli import Stopped
from data_pipeline.settings import UsageError
from data_pipeline.tasks.base import Problem, Task, count_lines, question_hash, read_jsonl, text_field

SPLITS = ("train", "test")
# The public solutions carry calculator marks such as 48/2 = <<48/2=24>>24, which no model should learn.
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def parse_row(question: str, answer: str, split: str) -> Problem:
    """A problem from a public row. Raises ValueError where the `####` line is missing or holds no number."""
    solution, mark, final = answer.rpartition("####")
    if not mark or not final.strip():
        raise ValueError("the answer has no last line of the form '#### 72'")
    solution = CALCULATOR_MARK.sub("", solution).strip()
    gold = final.strip().replace(",", "")
    if parse_number(gold) is None:
        raise ValueError(f"the answer after '####' must be a number, got {gold!r}")
    question = question.strip()
    return Problem(
        f"gsm8k/{split}/{question_hash(question)}", question, solution, gold, num_steps=count_lines(solution)
    )


def _read(split: str, source: str | None) -> Iterator[Problem]:
    if split not in SPLITS:
        raise UsageError(f"split={split!r}: gsm8k has {' and '.join(SPLITS)}")
    rows = _from_tfds(split) if source is None else _from_file(source)
    for where, question, answer in rows:
        try:
            yield parse_row(question, answer, split)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error


def _from_file(source: str) -> Iterator[tuple[str, str, str]]:
    for number, row in read_jsonl(source, "gsm8k source"):
        where = f"{source}, line {number}"
        yield where, text_field(row, "question", where), text_field(row, "answer", where)


def _from_tfds(split: str) -> Iterator[tuple[str, str, str]]:
    from tensorflow_datasets.text.gsm8k import gsm8k  # slow to import

    try:
        builder = gsm8k.Gsm8k(file_format="array_record")
        builder.download_and_prepare()
    except Stopped:
        raise
    except Exception as error:  # the download stack raises many kinds, all meaning the same to a user
        raise UsageError(
            f"GSM8K could not be had through TensorFlow Datasets ({type(error).__name__}: {error}); "
            "give a downloaded .jsonl file instead: data.sources.0.path=FILE in training, --source FILE in evaluation"
        ) from error
    for index, row in enumerate(builder.as_data_source(split=split)):
        yield f"gsm8k/{split} row {index}", row["question"].decode(), row["answer"].decode()


TASK = Task("gsm8k", kind="number", read=_read)
