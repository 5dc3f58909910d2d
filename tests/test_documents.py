"""Links of the documents that `make docs` does not read as pages: it checks those of docs/ itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval.study.grid import cells_of, paths_of
from eval.study.settings import load_study

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILES_OF_PREPARE = ("train.jsonl", "test.jsonl", "tokenizer.model")  # of the demo


@pytest.mark.parametrize("name", ["README.md", "launch/README.md"])
def test_relative_links_lead_to_files(name: str) -> None:
    document = ROOT / name
    links = [link for link in LINK.findall(document.read_text("utf-8")) if "://" not in link]
    assert [link for link in links if not (document.parent / link.partition("#")[0]).exists()] == []


def test_guides_and_configs_that_documents_name_are_there() -> None:
    documents = [ROOT / "README.md", ROOT / "launch" / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        (document.name, path)
        for document in documents
        for path in re.findall(r"\b(?:configs|docs|launch)/[\w/.-]+\.\w+", document.read_text("utf-8"))
    }
    assert len(named) > 10
    assert {(document, path) for document, path in named if not (ROOT / path).exists()} == set()


def test_the_study_in_the_guide_is_a_grid_of_what_it_prepares(tmp_path: Path) -> None:
    guide = (ROOT / "docs/guides/studies.md").read_text("utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "my_study.yaml").write_text(example)
    study = load_study(str(tmp_path / "my_study.yaml"))
    cells = cells_of(study)
    assert len(cells) == 8 and "eight runs" in guide
    made = {step.makes.replace("tokenizer.model", name) for step in study.prepare for name in FILES_OF_PREPARE}
    assert {path for cell in cells for _, path in paths_of(cell)} <= made


def test_the_task_in_the_guide_is_one(tmp_path: Path) -> None:
    guide = (ROOT / "docs/guides/data.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    made: dict[str, Any] = {}
    exec(compile(example, "gsm_hard.py", "exec"), made)
    rows = [{"input": "How much is 2 eggs at $9 each?", "target": 18.0}, {"input": "And 1?", "target": 1e16}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = list(made["TASK"].problems("test", str(tmp_path)))
    assert [(p.question, p.answer) for p in problems] == [(rows[0]["input"], "18"), ("And 1?", "10000000000000000")]
    assert all(p.id.startswith("gsm_hard/test/") for p in problems)
