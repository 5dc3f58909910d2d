"""Checks a command of ours before a machine is rented, or a queue waited in, for it.

    python launch/check.py python -m mathscale_jax.train --config configs/x.yaml key=value ...
    python launch/check.py python -m eval sample --task gsm8k ...

Before the command may stand `--chips N --slices K`, the TPU that it is for, or `--here`: what it reads and is not there
is warned of.

Prints, as JSON, what it writes to, what it reads, and all gs:// paths of its settings. Exit code 2: it is wrong, and
the message says how; 3: this Python has not the packages that could tell. Commands of others are not looked at.
"""

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
_OURS = ("mathscale_jax", "eval", "data_pipeline", "benchmarks")
_READ = ("init_from", "path", "tokenizer", "template", "checkpoint", "source", "shots_source")  # settings


def main(words: list[str]) -> None:
    """Checks `words`; ends the process."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--chips", type=int)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--here", action="store_true")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    words = given.words
    module, rest = "", []
    for place, word in enumerate(words[:-2]):
        if re.fullmatch(r"(?:.*/)?python[\d.]*", word) and words[place + 1] == "-m":
            module, rest = words[place + 2], words[place + 3 :]
            break
    told: dict[str, Any] = {"writes": None, "reads": [], "places": []}
    try:
        from data_pipeline.settings import UsageError
    except ImportError:
        sys.exit(3)
    try:
        settings, config = _settings_of(module, rest)
        if settings is not None:
            values = dict(_values(settings.model_dump(mode="json")))
            told["writes"] = values.get("output_dir") or values.get("out")
            told["reads"] = [value for key, value in values.items() if key.rpartition(".")[2] in _READ] + config
            told["places"] = [value for value in values.values() if value.startswith("gs://")]
            _check(settings, given, told["reads"])
    except ImportError:
        sys.exit(3)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(told))


def _settings_of(module: str, rest: list[str]) -> tuple[Any, list[str]]:
    """The settings of a command, and the file that they are in; None where it has none that say what it reads.

    Raises UsageError.
    """
    from data_pipeline.cli import from_flags, parsed_command
    from data_pipeline.settings import UsageError

    if module.partition(".")[0] in _OURS and not _is_there(module):
        raise UsageError(f"there is no module {module}")
    if module == "mathscale_jax.train":
        from mathscale_jax.train import parsed

        config, settings, _ = parsed(rest)
        return settings, [config]
    if module == "eval":
        from eval.__main__ import COMMANDS
        from eval.sample import RunSettings, SampleSettings

        arguments, _ = parsed_command("python -m eval", None, COMMANDS, rest)
        if rest[0] in ("sample", "run"):
            return from_flags(SampleSettings if rest[0] == "sample" else RunSettings, arguments), []
    return None, []


def _check(settings: Any, given: argparse.Namespace, reads: list[str]) -> None:
    """What only shows when a command has begun. Raises UsageError."""
    from data_pipeline.tasks import get_task
    from mathscale_jax.config import TrainSettings
    from mathscale_jax.mesh import check_batch, mesh_sizes

    if not isinstance(settings, TrainSettings):
        get_task(settings.task).check_split(settings.split)
        if settings.source is None:
            get_task(settings.task).check_public("--source")
    elif given.chips is not None:
        sizes = mesh_sizes(settings.mesh, given.chips * given.slices, "tpu", given.slices)
        check_batch(settings.batch_size, settings.accumulation_steps, sizes)
    for path in reads if given.here else ():
        if "://" not in path and path != "default" and not _exists(path):  # a job that is waited for may make it
            print(f"warning: the command reads {path}, which does not exist yet", file=sys.stderr)


def _exists(path: str) -> bool:
    return Path(path).exists() or (Path(__file__).resolve().parents[1] / path).exists()  # packaged configs, too


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that is none
        return False


def _values(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested settings, by its dotted key."""
    if isinstance(tree, str):
        is_checkpoint = key in ("init_from", "checkpoint")
        yield key, re.sub(r"@[^/@]*$", "", tree) if is_checkpoint else tree  # without @STEP
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _values(value, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from _values(value, f"{key}.{place}")


if __name__ == "__main__":
    main(sys.argv[1:])
