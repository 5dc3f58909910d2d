"""Seeds of our generator, and settings of a synthesis from them."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from teachers import Books, Teacher, serving

from data_pipeline.settings import validated
from data_pipeline.synthesis.settings import SynthesisSettings
from data_pipeline.word_problems import generate_problems

FAST = {"concurrency": 8, "retries": 8, "longest_wait": 0.05, "timeout": 20}
PRICE = {"input": 10, "output": 30}


@pytest.fixture
def seeds(tmp_path: Path) -> str:
    rows = [
        {"id": p.id, "question": p.question, "solution": p.solution, "answer": p.answer}
        for p in generate_problems(30, seed=5)
    ]
    (tmp_path / "seeds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "seeds.jsonl")


@pytest.fixture
def settings_of(tmp_path: Path, seeds: str) -> Callable[..., SynthesisSettings]:
    """Settings with another teacher, and other changes; `out` is a folder's name."""

    def make(url: str, out: str = "out", **changes: Any) -> SynthesisSettings:
        teacher = {"model": "rules", "base_url": url, "price": PRICE, "max_tokens": 400} | changes.pop("teacher", {})
        tree = {
            "out": str(tmp_path / out), "seeds": {"task": "demo", "path": seeds}, "teacher": teacher,
            "limits": FAST | changes.pop("limits", {}), "budget": 100, "similarity": 1, **changes,
        }  # fmt: skip
        return validated(SynthesisSettings, tree, where="")

    return make


@pytest.fixture
def server() -> Iterator[Callable[..., tuple[str, Books]]]:
    """Starts a hostile server; gives its URL and its books."""
    with ExitStack() as stack:

        def start(kind: type[Teacher] = Teacher, **changes: Any) -> tuple[str, Books]:
            made, books = serving(kind, **changes)
            stack.enter_context(made)
            return made.url, books

        yield start
