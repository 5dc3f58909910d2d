"""The rate of a progress bar is that of what was done, on a terminal and in a log."""

import logging
import sys
import time

from data_pipeline import progress
from data_pipeline.progress import Progress


def test_what_was_skipped_says_nothing_of_the_rate_on_a_terminal(capsys, caplog, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    caplog.set_level(logging.INFO, "mathscale")
    with Progress(30_000, "asking", "items") as bar:
        for _ in range(20_000):
            bar.skip()
        for _ in range(8):
            time.sleep(0.05)
            bar.update(1)
        assert bar._bar.n == 20_008
        assert 5 < bar._bar.format_dict["rate"] < 30  # twenty a second at most
    assert len(capsys.readouterr().err) < 10_000


def test_nor_in_a_log(caplog, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.1)
    caplog.set_level(logging.INFO, "mathscale")
    with Progress(30_000, "asking", "items") as bar:
        bar.skip(20_000)
        time.sleep(0.2)
        bar.update(1)
    count, rate = caplog.messages[0].split(" items, ")
    assert count == "asking: 20001/30000" and float(rate.split("/s")[0]) < 6
