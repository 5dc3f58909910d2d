"""What several tests of the data pipeline share: a small tokenizer, the public rows, files of rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.tasks import Problem
from data_pipeline.templates import Template
from data_pipeline.tokenized import TokenizedRows, tokenize
from data_pipeline.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    names = ("Ann", "Ben", "Cleo")
    texts = [f"Problem: {n} has {i} pens.\nSolution: {i} + 1 = {i + 1}" for n in names for i in range(30)]
    return train_tokenizer(texts, vocab_size=310)


@pytest.fixture(scope="session")
def large_tokenizer(test_data: Path) -> Tokenizer:
    return Tokenizer.load(str(test_data / "mistral_v1_tokenizer.model"))


@pytest.fixture(scope="session")
def gsm8k_rows(gsm8k_train: list[Problem], large_tokenizer: Tokenizer) -> TokenizedRows:
    return tokenize(gsm8k_train, large_tokenizer, Template())


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows, each a mapping or a line as it is, and gives the path."""

    def write(*rows: Any, name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write
