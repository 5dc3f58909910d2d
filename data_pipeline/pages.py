"""Pages of HTML for people: one self-contained file each, in which text of whatever origin stays text."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from data_pipeline.files import write_text

# A model can write what HTML and UTF-8 forbid (C0 controls, lone surrogates), and marks that turn letters around, so
# that one reads what does not stand there (U+202A..202E, U+2066..2069).
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


def without_controls(text: str) -> str:
    """`text` with U+FFFD in place of what a page, or a terminal, should not be given."""
    return _FORBIDDEN.sub("\ufffd", text)


def write_page(
    path: epath.Path, template: Path, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any
) -> None:
    """Renders a Jinja template, which may include files beside it, with `values`, all of them escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    page = without_controls(environment.get_template(template.name).render(values))
    write_text(path, page.encode(errors="replace").decode())
