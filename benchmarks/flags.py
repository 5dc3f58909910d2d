"""Settings of benchmarks that take several values at once."""

from typing import Annotated, Any

import pydantic


def _listed(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], pydantic.BeforeValidator(_listed)]
Numbers = Annotated[tuple[pydantic.PositiveInt, ...], pydantic.BeforeValidator(_listed)]
