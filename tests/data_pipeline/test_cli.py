"""Exit codes, and a stop request that is honoured between two steps."""

import argparse
import errno
import signal
import subprocess
import sys

import pydantic
import pytest

from data_pipeline.cli import (
    Command,
    RunError,
    Stopped,
    StopSignal,
    add_flags,
    from_flags,
    is_disk_full,
    run_command,
    run_commands,
)
from data_pipeline.settings import Settings, UsageError

pytestmark = pytest.mark.usefixtures("logging_left_as_it_was")


class Flags(Settings):
    """Two settings as flags."""

    out: str = pydantic.Field(description="where to write, 100% of it")
    num_rows: pydantic.PositiveInt = pydantic.Field(5, description="how many")


def exit_code_of(error):
    def command(argv):
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_command(command, [])
    return caught.value.code


def caused_by(outer, cause):
    outer.__cause__ = cause
    return outer


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "exit_code", "said"),
    [
        (None, 0, ""),
        (UsageError("context=0 is too small"), 2, "error: context=0 is too small\n"),
        (RunError("the server went away"), 1, "error: the server went away\n"),
        (Stopped("saved at step 7", 75), 75, "saved at step 7\n"),
        (Stopped("saved at step 7", 130), 130, "saved at step 7\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_each_ending_has_its_exit_code_and_message(capsys, error, exit_code, said):
    assert exit_code_of(error) == exit_code
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    "error",
    [
        NO_SPACE,
        OSError(errno.EDQUOT, "quota"),
        OSError(errno.EFBIG, "too big"),
        caused_by(ValueError("could not save"), NO_SPACE),
        caused_by(ValueError("outermost"), caused_by(TypeError("middle"), NO_SPACE)),
        ExceptionGroup("two writers failed", [ValueError("a"), ExceptionGroup("b", [NO_SPACE])]),
        caused_by(ValueError("save"), ExceptionGroup("group", [caused_by(TypeError("c"), NO_SPACE)])),
        ValueError("RESOURCE_EXHAUSTED: Error writing local file"),
    ],
)
def test_a_full_disk_is_one_line_and_exit_code_1_wherever_it_is_hidden(capsys, error):
    assert exit_code_of(error) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: no room on disk: ") and "Traceback" not in err
    assert "free some space" in err


def test_a_full_disk_met_while_another_error_was_handled_counts():
    try:
        try:
            raise NO_SPACE
        except OSError:
            raise ValueError("clean-up failed")  # noqa: B904 - the implicit context is the point
    except ValueError as error:
        assert is_disk_full(error)


def test_a_bug_keeps_its_traceback():
    error = ValueError("bug")
    with pytest.raises(ValueError, match="bug") as caught:
        run_command(lambda argv: (_ for _ in ()).throw(error), [])
    assert caught.value is error
    assert not is_disk_full(error)


def test_a_file_that_cannot_be_read_is_one_message(capsys):
    error = PermissionError(errno.EACCES, "Permission denied", "some/file")
    with pytest.raises(SystemExit) as ended:
        run_command(lambda argv: (_ for _ in ()).throw(error), [])
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == ["error: [Errno 13] Permission denied: 'some/file'"]


def test_a_device_out_of_memory_is_told_what_helps(capsys):
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.")
    with pytest.raises(SystemExit) as ended:
        run_command(lambda argv: (_ for _ in ()).throw(error), [])
    assert ended.value.code == 1
    assert "accumulation_steps" in capsys.readouterr().err


def test_an_error_that_is_its_own_cause_ends_the_search():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the search goes round in circles"))
    signal.alarm(5)
    try:
        assert not is_disk_full(first)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_the_command_is_given_its_arguments():
    given = []
    with pytest.raises(SystemExit):
        run_command(given.append, ["--out", "x"])
    assert given == [["--out", "x"]]


def test_the_first_ctrl_c_asks_and_the_second_ends():
    with StopSignal() as stop:
        assert stop.exit_code is None
        signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 130 and not stop.at_once
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.at_once


def test_pre_emption_asks_however_often_it_comes():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == 75


def test_ctrl_c_after_pre_emption_ends():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 75


def test_a_run_that_the_user_stopped_is_not_reported_as_pre_empted():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == 130


@pytest.mark.parametrize("fails", [False, True])
def test_signal_handlers_are_restored(fails):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with StopSignal():
            during = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert all(new != old for new, old in zip(during, before, strict=True))


def parse_flags(*argv):
    parser = argparse.ArgumentParser()
    add_flags(parser, Flags)
    return from_flags(Flags, parser.parse_args(argv))


def test_flags_become_settings_with_their_defaults():
    assert parse_flags("--out", "x") == Flags(out="x", num_rows=5)
    assert parse_flags("--out", "x", "--num-rows", "7") == Flags(out="x", num_rows=7)


def test_a_flag_with_a_wrong_value_is_a_usage_error_that_names_it():
    with pytest.raises(UsageError, match=r"--num-rows .0.: Input should be greater than 0"):
        parse_flags("--out", "x", "--num-rows", "0")


def test_a_missing_required_flag_ends_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags()
    assert caught.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_help_shows_descriptions_and_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags("--help")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "where to write, 100% of it (required)" in shown
    assert "how many (default: 5)" in shown


def build_interrupted(parser):
    raise KeyboardInterrupt  # as Ctrl-C in the middle of an import


COMMANDS = {
    "write": Command("writes", lambda parser: add_flags(parser, Flags) or (lambda given: print("wrote", given.out))),
    "load": Command("loads", build_interrupted),
}


@pytest.mark.parametrize(
    ("argv", "exit_code", "said"),
    [
        (["write", "--out", "here"], 0, "wrote here"),
        (["load"], 130, "stopped by Ctrl-C"),
        (["--help"], 0, "loads"),
        (["wriet"], 2, "invalid choice: 'wriet'"),
        ([], 2, "the following arguments are required: COMMAND"),
    ],
)
def test_the_first_word_says_which_command_runs_and_only_that_one_is_built(capsys, argv, exit_code, said):
    with pytest.raises(SystemExit) as caught:
        run_commands("program", "what it is", COMMANDS, argv)
    assert caught.value.code == exit_code
    assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize("command", [["grade", "--help"], ["report", "--help"], ["--help"]])
def test_commands_that_need_no_accelerator_do_not_import_jax(command):
    code = f"import sys, eval.__main__ as m\ntry: m.main({command})\nexcept SystemExit: sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
