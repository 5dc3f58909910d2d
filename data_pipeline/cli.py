"""What every command shares: exit codes, one-line errors, and flags made from settings.

Exit codes: 0 success, 1 failure, 2 usage or configuration, 75 pre-empted (run me again), 130 Ctrl-C.
"""

import argparse
import errno
import json
import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn, TypeVar

from etils import epath

from data_pipeline.settings import Settings, UsageError, validated

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130

logger = logging.getLogger("mathscale")
SettingsT = TypeVar("SettingsT", bound=Settings)


class RunError(Exception):
    """The command was asked for properly and could not be carried out (exit code 1)."""


class Stopped(Exception):
    """The command was asked to stop and left everything in order; carries the exit code (75 or 130)."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request that is heeded between two steps, or by `StopSignal.heed`.

    A second SIGINT is a KeyboardInterrupt: files are written whole and renamed, so nothing is damaged, and a save
    under way ends first. Use as a context manager around the loop.
    """

    _active: "StopSignal | None" = None

    @staticmethod
    def heed() -> None:
        """Raises Stopped where the one that is entered was asked to stop: for where there is nothing to save."""
        if StopSignal._active is not None and StopSignal._active.exit_code is not None:
            raise Stopped("stopped before it was done: run the same command again", StopSignal._active.exit_code)

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.at_once = False  # a second request, which does not wait
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        StopSignal._active = self
        return self

    def __exit__(self, *_: object) -> None:
        StopSignal._active = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code is not None and number == signal.SIGINT:
            self.at_once = True
            raise KeyboardInterrupt
        if self.exit_code is None:  # the first request says how the run ended
            self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
        logger.warning("asked to stop: finishing what is under way (Ctrl-C again does not wait)")


def add_flags(parser: argparse._ActionsContainer, settings: type[Settings]) -> None:
    """One `--flag` per field of `settings`, with the field's description and default as its help.

    What is required comes first, what is inherited last. Values stay strings here; `from_flags` has them checked.
    """
    own = settings.__annotations__
    fields = sorted(settings.model_fields.items(), key=lambda item: (not item[1].is_required(), item[0] not in own))
    for name, field in fields:
        required = field.is_required()
        default = "required" if required else f"default: {'none' if field.default is None else field.default}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            required=required,
            default=argparse.SUPPRESS,
            metavar=name.split("_")[-1].upper(),
            help=f"{field.description} ({default})".replace("%", "%%"),
        )


def from_flags(settings: type[SettingsT], arguments: argparse.Namespace) -> SettingsT:
    """The validated settings that the flags of `add_flags` give. Raises UsageError."""
    given = {k: v for k, v in vars(arguments).items() if k in settings.model_fields}
    try:
        return validated(settings, given, where="")
    except UsageError as error:
        message = str(error).removeprefix(":").strip()
        for name in given:  # say --num-samples where the settings say num_samples
            message = message.replace(f"{name}=", f"--{name.replace('_', '-')} ")
        raise UsageError(message) from error


def flags_of(settings: Settings, of: type[Settings] | None = None) -> list[str]:
    """The words that make `from_flags` give these settings, or their part in the class `of`: what was set, no defaults.

    Where a setting has a default, null cannot be said in words, and is left out.
    """
    words: list[str] = []
    for name in type(settings).model_fields:
        value: Any = getattr(settings, name)
        if name in settings.model_fields_set & (of or type(settings)).model_fields.keys() and value is not None:
            words += [
                f"--{name.replace('_', '-')}",
                json.dumps(value) if isinstance(value, tuple | bool) else str(value),
            ]
    return words


def make_folder(path: epath.Path, what: str) -> None:
    """Makes the folder of an output before any work is done for it. Raises UsageError that names `what`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{what}={path} cannot be made a folder: {error.strerror or error}") from error


# What a command does with its flags.
Action = Callable[[argparse.Namespace], None]


class Command(NamedTuple):
    """One word of a program: what it is for, and how its parser is filled.

    `build` adds the flags, and returns what is done with them. It imports what it needs itself: so `--help` and light
    commands do not wait for heavy ones, and Ctrl-C during an import is a Ctrl-C like any other.
    """

    help: str
    build: Callable[[argparse.ArgumentParser], Action]


def parsed_command(
    program: str, description: str | None, commands: Mapping[str, Command], argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Action]:
    """The arguments of the one of `commands` that the first word of `argv` names, and what is done with them.

    Ends the process where they are none of its own, or ask for help.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    act: Action | None = None
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        if words[:1] == [name]:
            act = command.build(subparser)
    arguments = parser.parse_args(words)
    assert act is not None  # the parser refuses, or helps with, whatever is no command
    return arguments, act


def run_commands(
    program: str, description: str | None, commands: Mapping[str, Command], argv: Sequence[str] | None = None
) -> NoReturn:
    """Runs the one of `commands` that the first word of `argv` names, and ends the process; see `run_command`."""

    def run(argv: Sequence[str] | None) -> None:
        arguments, act = parsed_command(program, description, commands, argv)
        act(arguments)

    run_command(run, argv)


def run_command(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `command(argv)` and ends the process with the exit code that belongs to how it ended."""

    def preempted(number: int, frame: FrameType | None) -> None:
        raise Stopped("asked to stop: run the same command again", EXIT_PREEMPTED)

    signal.signal(signal.SIGTERM, preempted)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    _silence_echoes()
    try:
        command(argv)
    except UsageError as error:
        _end(f"error: {error}", EXIT_USAGE)
    except RunError as error:
        _end(f"error: {error}", EXIT_FAILURE)
    except Stopped as stop:
        _end(str(stop), stop.exit_code)
    except KeyboardInterrupt:
        _end("stopped by Ctrl-C: run the same command again", EXIT_INTERRUPTED)
    except Exception as error:
        explained = explain(error)
        if explained is not None:
            _end(f"error: {explained}", EXIT_FAILURE)
        raise
    sys.exit(0)


def explain(error: Exception) -> str | None:
    """What a person can do about an error of the machine or the system; None of one that is a defect of ours."""
    if is_disk_full(error):
        return (
            f"no room on disk: {first_line(error)}\nwhat was saved before is whole; "
            "free some space and run the same command again"
        )
    if "RESOURCE_EXHAUSTED: Out of memory" in str(error):
        return (
            f"the device is out of memory: {first_line(error)}\nmake the work smaller: in training a lower "
            "batch_size, more accumulation_steps, compute.remat=full, a smaller compute.loss_chunk or more devices "
            "in mesh.fsdp; in sampling a lower --num-samples or --max-tokens"
        )
    return first_line(error) if isinstance(error, OSError) else None  # it names the file


def _silence_echoes() -> None:
    """Keeps an error that a library raises from being printed many times over besides.

    urllib3 warns of every attempt at a download. Orbax logs through absl, its unawaited futures speak through
    asyncio, and reads and writes that end after its event loop through the hook for exceptions nobody can catch.
    """
    for name in ("absl", "asyncio", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def without_echoes(unraisable: Any) -> None:
        if not any(text in str(unraisable.exc_value) for text in ("Event loop is closed", "TensorStore")):
            hook(unraisable)

    sys.unraisablehook = without_echoes


def is_disk_full(error: BaseException | None) -> bool:
    """True where `error`, or one that caused it, says that a disk, a quota or a file size limit is reached."""
    # Orbax and TensorStore report the system's error as text inside errors of their own.
    texts = (
        "No space left on device",
        "Disk quota exceeded",
        "File too large",
        "RESOURCE_EXHAUSTED: Error writing",
    )
    seen: set[int] = set()  # an error may be its own cause
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(text in str(error) for text in texts):
            return True
        if isinstance(error, BaseExceptionGroup) and any(is_disk_full(e) for e in error.exceptions):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException | str) -> str:
    """What an error says, cut to a line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _end(message: str, exit_code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(exit_code)
