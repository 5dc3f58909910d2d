"""The command lines of benchmarks: a flag for each setting, some of which take several values at once."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import pydantic

from data_pipeline.cli import add_flags, from_flags
from data_pipeline.settings import Settings

S = TypeVar("S", bound=Settings)


def _listed(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], pydantic.BeforeValidator(_listed)]
Numbers = Annotated[tuple[pydantic.PositiveInt, ...], pydantic.BeforeValidator(_listed)]


def settings_and_command(
    module: str, description: str | None, settings: type[S], argv: Sequence[str] | None
) -> tuple[S, str]:
    """What the command line of a benchmark says, and the command line itself, for its results."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, settings)
    command = shlex.join(["python", "-m", module, *(argv or sys.argv[1:])])
    return from_flags(settings, parser.parse_args(argv)), command
