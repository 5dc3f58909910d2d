"""Makes the page of all commands, with their --help, when the site is built (a hook of mkdocs)."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PROGRAMS = (
    "data_pipeline.__main__", "mathscale_jax.convert.__main__", "mathscale_jax.train", "mathscale_jax.plan",
    "eval.__main__",
)  # fmt: skip
INTRODUCTION = """# Commands

Every command prints this page's text with `--help`. Exit codes: 0 success, 1 failure, 2 wrong usage or configuration,
75 pre-empted (run the same command again), 130 Ctrl-C.
"""


def on_files(files: Files, config: Any) -> Files:
    """Adds the page. A process of its own makes it, since a command sets up logging and signals as it starts."""
    environment = {**os.environ, "COLUMNS": "94", "JAX_PLATFORMS": "cpu"}
    made = subprocess.run([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    files.append(File.generated(config, "reference/commands.md", content=made.stdout))
    return files


def page() -> Iterator[str]:
    """The lines of the page: a section a program, and one a word of it."""
    yield INTRODUCTION
    for program in PROGRAMS:
        module = importlib.import_module(program)
        title = f"python -m {program.removesuffix('.__main__')}"
        yield from section(2, title, module.main, [])
        for name in getattr(module, "COMMANDS", {}):
            yield from section(3, f"{title} {name}", module.main, [name])


def section(level: int, title: str, main: Any, words: list[str]) -> Iterator[str]:
    """A command's heading and its help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    if not text.getvalue().startswith("usage:"):
        raise RuntimeError(f"{title} --help printed no help: {text.getvalue()!r}")
    yield f"{'#' * level} `{title}`\n\n```text\n{text.getvalue().rstrip()}\n```\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))  # where mkdocs was started: the root
    print("\n".join(page()))
