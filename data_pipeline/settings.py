"""Settings: frozen, validated, read from YAML and dotted overrides.

Every package owns its settings as `Settings` classes; one file nests them. A mistake is one clear
`UsageError` that names the key, the value, what is allowed, and the nearest valid key for an unknown one.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from etils import epath
from pydantic_core import PydanticCustomError

SettingsT = TypeVar("SettingsT", bound="Settings")


class UsageError(Exception):
    """The user's request cannot be meant as it stands (exit code 2). The message says what to do."""


class Secret(PydanticCustomError):
    """What a validator raises of a value that may hold a secret: it is not shown."""

    def __new__(cls, message: str) -> "Secret":
        """With what is said instead of the value."""
        return super().__new__(cls, "secret", message)


class Settings(pydantic.BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True)


def load_settings(settings: type[SettingsT], path: str, overrides: Sequence[str] = ()) -> SettingsT:
    """Reads YAML from `path`, applies `key.sub=value` overrides, and validates.

    A relative path that does not exist here is looked up among the installed `configs/` as well.
    Raises UsageError.
    """
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return validated(settings, tree, where=path)


def read_yaml(path: str, what: str = "config file") -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError, which says `what` is missing, broken or no mapping."""
    file: Any = epath.Path(path)
    if not file.exists():
        packaged = resources.files("configs").joinpath(path.removeprefix("configs/"))
        if not packaged.is_file():
            raise UsageError(f"{what} {path!r} does not exist")
        file = packaged
    if file.is_dir():
        raise UsageError(f"{what} {path!r} is a folder, not a file")
    try:
        tree = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2024-13-45 is a plain ValueError
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold a mapping of settings, not {type(tree).__name__}")
    return tree


def validated(settings: type[SettingsT], tree: Mapping[str, Any], where: str) -> SettingsT:
    """`settings` made from plain values; a mistake raises UsageError with a line for each wrong key."""
    try:
        return settings.model_validate(tree)
    except pydantic.ValidationError as error:
        lines = [_explain(settings, item) for item in error.errors()]
        raise UsageError("\n  ".join([f"{where}:", *lines]) if len(lines) > 1 else f"{where}: {lines[0]}") from error


def to_yaml(settings: Settings) -> str:
    """The resolved settings as YAML that `load_settings` reads back."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def describe(settings: type[Settings], prefix: str = "") -> Iterable[str]:
    """Lines for `--help`: every key of `settings` with its default and description, groups after single keys."""
    fields = settings.model_fields.items()
    for name, field in fields:
        if nested_settings(field.annotation) is None:
            default = "required" if field.is_required() else f"default: {_plain(field.default)}"
            yield f"  {prefix}{name} ({default})\n      {field.description or ''}"
    for name, field in fields:
        nested = nested_settings(field.annotation)
        if nested is not None:
            yield f"\n{prefix}{name}: {field.description or ''}"
            yield from describe(nested, f"{prefix}{name}.{_index(field.annotation)}")


def nested_settings(annotation: Any) -> type[Settings] | None:
    """The Settings class inside an annotation such as `Settings | None` or `tuple[Settings, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Settings) else None
    for argument in typing.get_args(annotation):
        found = nested_settings(argument)
        if found is not None:
            return found
    return None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `key.sub=value` in nested settings. Raises UsageError."""
    key, equals, text = override.partition("=")
    key = key.removeprefix("--")
    if not equals or not key:
        raise UsageError(f"override {override!r} must look like key=value, for example optimizer.learning_rate=1e-5")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"override {override!r}: the value is not valid YAML") from error
    set_key(tree, key, value, f"override {override!r}")


def set_key(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets `key.sub` in nested settings; `where` is told in the UsageError that a key without a place raises."""
    *parents, leaf = key.split(".")
    node: Any = tree
    for i, parent in enumerate([*parents, leaf]):
        if isinstance(node, list):  # data.sources.0.path=...
            if not (parent.isdecimal() and int(parent) < len(node)):
                raise UsageError(f"{where}: {'.'.join(parents[:i])} has entries 0 to {len(node) - 1}")
            parent = int(parent)  # type: ignore[assignment]
        elif not isinstance(node, dict):
            raise UsageError(f"{where}: {'.'.join(parents[:i])} is {node!r} and has no keys below it")
        if i == len(parents):
            node[parent] = value
        else:
            if isinstance(node, dict) and node.get(parent) is None:
                node[parent] = {}
            node = node[parent]


def _explain(settings: type[Settings], item: Any) -> str:
    location = [part for part in item["loc"] if not (isinstance(part, str) and part in ("function-before",))]
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        in_first_entry = ".".join("0" if isinstance(part, int) else str(part) for part in location)
        nearest = difflib.get_close_matches(in_first_entry, list(_all_keys(settings)), n=1, cutoff=0.4)
        entries = iter([str(part) for part in location if isinstance(part, int)])
        parts = (next(entries, part) if part == "0" else part for part in "".join(nearest).split("."))
        hint = f"; did you mean {'.'.join(parts)}?" if nearest else ""
        return f"unknown key {key}{hint}"
    if item["type"] == "missing":
        return f"{key} is required"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "model_type":
        names = _names_at(settings, location)
        message = f"is a group of settings: say {', '.join(f'{key}.{name}=...' for name in names)}"
    if item["type"] == "secret":
        return f"{key} {message}"
    if not key:  # a contradiction between keys: its message names them
        return message
    shown = repr(item["input"])
    return f"{key}={shown if len(shown) < 80 else shown[:77] + '...'}: {message}"


def _names_at(settings: type[Settings], location: Sequence[Any]) -> list[str]:
    """The keys of the group at a place."""
    found: type[Settings] | None = settings
    for part in location:
        if isinstance(part, str) and found is not None and part in found.model_fields:
            found = nested_settings(found.model_fields[part].annotation)
    return list(found.model_fields) if found is not None else []


def _all_keys(settings: type[Settings], prefix: str = "") -> Iterable[str]:
    for name, field in settings.model_fields.items():
        yield prefix + name
        nested = nested_settings(field.annotation)
        if nested is not None:
            yield from _all_keys(nested, f"{prefix}{name}.{_index(field.annotation)}")


def _index(annotation: Any) -> str:
    """In the dotted key of a list of settings, the place of the first entry."""
    return "0." if typing.get_origin(annotation) is tuple else ""


def _plain(default: Any) -> str:
    """A default as YAML writes it."""
    return "null" if default is None else str(default)


def require_file(path: str | Path, what: str) -> epath.Path:
    """`path` as an epath, or a UsageError that says which `what` is missing."""
    file = epath.Path(path)
    if not file.exists():
        raise UsageError(f"{what} {str(path)!r} does not exist")
    if file.is_dir():
        raise UsageError(f"{what} {str(path)!r} is a folder, not a file")
    return file


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lines "key: old -> new", with dotted keys in order, for all that differs between two nested dictionaries."""

    def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v for key, sub in value.items() for k, v in flatten(sub, f"{prefix}.{key}" if prefix else key).items()
        }

    old, new = flatten(before), flatten(now)
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
