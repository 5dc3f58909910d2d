"""Files are whole or as before; progress is a bar on a terminal and plain lines in a log."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest
from etils import epath

import data_pipeline.progress
from data_pipeline.files import locked, read_json_lines, write_atomically, write_json, write_json_lines, write_text
from data_pipeline.progress import Progress, progress
from data_pipeline.settings import UsageError

AWKWARD = 'line\nfeed \r\n return, \u2028 and \u2029 and \x85, "quotes" \\ \u00bd \U0001f95a \x00'


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_a_write_that_fails_halfway_leaves_the_old_content_and_nothing_else(tmp_path, error, existed):
    path = tmp_path / "file"
    if existed:
        path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        file.flush()
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"file": b"old"} if existed else {})


def test_a_reader_sees_the_old_content_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        for part in (b"a" * 10**5, b"b" * 10**5):
            file.write(part)
            file.flush()
            assert path.read_bytes() == b"old"

    write_atomically(path, write)
    assert path.read_bytes() == b"a" * 10**5 + b"b" * 10**5
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_rows_that_cannot_be_written_leave_the_old_file(tmp_path):
    write_json_lines(tmp_path / "rows.jsonl", [{"a": 1}])
    with pytest.raises(TypeError):
        write_json_lines(tmp_path / "rows.jsonl", [{"a": 2}, {"a": object()}])
    assert list(read_json_lines(tmp_path / "rows.jsonl")) == [{"a": 1}]


def test_files_have_the_permissions_that_the_umask_gives(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(umask)
        try:
            write_text(tmp_path / "file", "x")
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_rows_survive_being_written_and_read_back_whatever_is_in_the_text(tmp_path):
    rows = [{"text": AWKWARD, "n": 1}, {"text": ""}, {AWKWARD: [None, True, 1.5, {"deep": AWKWARD}]}]
    write_json_lines(tmp_path / "rows.jsonl", iter(rows))
    assert list(read_json_lines(tmp_path / "rows.jsonl")) == rows
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 3, "one row a line"


def test_no_rows_make_an_empty_file(tmp_path):
    write_json_lines(tmp_path / "rows.jsonl", [])
    assert (tmp_path / "rows.jsonl").read_bytes() == b""
    assert list(read_json_lines(tmp_path / "rows.jsonl")) == []


def test_json_is_utf_8_that_any_reader_understands(tmp_path):
    write_json(tmp_path / "value.json", {"a": AWKWARD})
    content = (tmp_path / "value.json").read_bytes()
    assert json.loads(content) == {"a": AWKWARD}
    assert "\u00bd".encode() in content


@pytest.fixture
def log_lines(caplog):
    caplog.set_level(logging.INFO, logger="mathscale")
    return lambda: [record.getMessage() for record in caplog.records]


def test_progress_in_a_log_is_plain_lines(monkeypatch, capsys, log_lines):
    monkeypatch.setattr(data_pipeline.progress, "SECONDS_BETWEEN_LINES", 0)
    assert list(progress("abc", "tokenising", "rows")) == ["a", "b", "c"]
    assert [line.partition(" rows, ")[0] for line in log_lines()[:3]] == [
        "tokenising: 1/3",
        "tokenising: 2/3",
        "tokenising: 3/3",
    ]
    written = capsys.readouterr()
    assert "\r" not in written.err + written.out and "\x1b" not in written.err + written.out


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, log_lines):
    clock = iter([0.0, *([1.0] * 3), 10.5, 10.5, *([11.0] * 20)])
    monkeypatch.setattr(data_pipeline.progress.time, "monotonic", lambda: next(clock))
    with Progress(None, "sampling", "problems", done=7) as bar:
        for _ in range(6):
            bar.update(2, note="loss 1.5")
    # 7 were done before; the fourth update comes after ten seconds: 8 more in 10.5 s.
    assert log_lines() == ["sampling: 15 problems, 0.762/s, loss 1.5", "sampling: 19 problems, 1.09/s"]


def test_the_last_line_of_progress_is_not_said_twice(monkeypatch, log_lines):
    clock = iter([0.0, *([12.0] * 20)])
    monkeypatch.setattr(data_pipeline.progress.time, "monotonic", lambda: next(clock))
    with Progress(2, "sampling", "problems") as bar:
        bar.update(2)
    assert log_lines() == ["sampling: 2/2 problems, 0.167/s"]


def test_progress_of_bytes_is_told_in_gigabytes(monkeypatch, log_lines):
    clock = iter([0.0, *([10.0] * 20)])
    monkeypatch.setattr(data_pipeline.progress.time, "monotonic", lambda: next(clock))
    with Progress(26_953_662_464, "importing", "bytes") as bar:
        bar.update(4_500_000_000)
    assert log_lines()[0] == "importing: 4.50/26.95 GB, 0.45 GB/s, 00:49 left"


def test_nothing_done_says_nothing(log_lines):
    with Progress(5, "sampling", "problems", done=5):
        pass
    assert log_lines() == []


def test_progress_on_a_terminal_is_a_bar(monkeypatch, log_lines):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress([1, 2, 3], "tokenising", "rows")) == [1, 2, 3]
    assert "\r" in terminal.getvalue() and "tokenising" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert log_lines() == []


def test_a_row_is_one_line_for_every_reader(tmp_path):
    row = {"text": "a\nb\rc\x0bd\x0ce\x1cf\x85g\u2028h\u2029i é"}
    write_json_lines(tmp_path / "rows.jsonl", [row, row])
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [row, row]
    assert "é" in lines[0]


def test_a_folder_is_locked_for_others_until_the_process_that_has_it_ends(tmp_path):
    program = "import sys, time; from etils import epath; from data_pipeline.files import locked\n"
    program += f"with locked(epath.Path({str(tmp_path)!r}), 'output_dir'): print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "locked\n"
    with pytest.raises(UsageError, match=r"output_dir=.* is in use by another run"):
        locked(epath.Path(tmp_path), "output_dir").__enter__()
    other.kill()
    other.wait()
    with locked(epath.Path(tmp_path), "output_dir"):
        pass
