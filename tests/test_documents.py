"""Links of the documents that `make docs` does not read as pages: it checks those of docs/ itself."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)\s]+)\)")


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
