"""The report as Chromium shows it: silent console, no request, filters by mouse and keyboard, a phone, the dark."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from test_report import HOSTILE, write_eval

from eval.report import write_report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

MIXED = [["42", "41", "42", "7"], ["1", "2", "2", None], ["42", "42", "42", "42"], ["1", "1", "1", "1"]]
LONG = "W" * 5000


class Browser:
    """Chromium by its debugging pipe: JSON messages that end with a zero byte, on file descriptors 3 and 4."""

    def __init__(self, profile: Path):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        arguments = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]  # out of the way of 3 and 4

        def where_chromium_looks_for_them() -> None:
            for end, place in zip(ends, (3, 4), strict=True):
                os.dup2(end, place)

        self._process = subprocess.Popen(
            arguments, preexec_fn=where_chromium_looks_for_them, pass_fds=(3, 4), stderr=subprocess.DEVNULL
        )
        for end in (to_read, to_write, *ends):
            os.close(end)
        self._buffer, self._last, self._session = b"", 0, None
        self.events: list[dict] = []

    def __call__(self, method: str, **parameters: object) -> dict:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            received = self._receive()
            if received.get("id") == self._last:
                assert "error" not in received, received
                return received["result"]
            self.events.append(received)

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 1 << 16)
            assert chunk, "Chromium has ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path) -> None:
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Page.navigate", url=path.as_uri())
        for _ in range(200):
            if self.value("document.readyState") == "complete" and self.value("location.protocol") == "file:":
                return
            time.sleep(0.05)
        raise AssertionError("the page does not load")

    def value(self, expression: str) -> object:
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def named(self, *methods: str) -> list[dict]:
        return [event for event in self.events if event.get("method") in methods]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture
def page(tmp_path, browser):
    folder = tmp_path / "eval"
    folder.mkdir()
    write_eval(
        folder,
        MIXED,
        question=f"{HOSTILE} What is $\\frac{{x}}{{2}}$?",
        text=f"{HOSTILE} \u202e שלום {LONG} The answer is: {{}}",
    )
    path = write_report(folder)
    path.write_text(path.read_text().replace("alert(", "window.pwned=("))
    browser.open(path)
    return browser


VISIBLE = "[...document.querySelectorAll('.problem')].filter(e => e.getClientRects().length).length"


def test_it_loads_without_a_word_and_asks_for_nothing(page):
    assert page.value("document.querySelectorAll('math').length") > 0
    time.sleep(0.3)
    page.value("1")  # collects what was said meanwhile
    assert not page.named("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    requests = [event["params"]["request"]["url"] for event in page.named("Network.requestWillBeSent")]
    assert len(requests) == 1 and requests[0].startswith("file:")


def test_hostile_text_is_inert(page):
    page.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.value("window.pwned") is None
    assert page.value("document.querySelectorAll('script, img, iframe, [onerror]').length") == 0
    assert "window.pwned=(1)" in str(page.value("document.querySelector('.problem .inside').innerText"))


@pytest.mark.parametrize(("choice", "count"), [("never", 2), ("often", 1), ("always", 1), ("all", 4)])
def test_problems_are_filtered_by_a_click(page, choice, count):
    assert page.value(VISIBLE) == 4
    page.value(f"document.querySelector('label[for=show-{choice}]').click()")
    assert page.value(VISIBLE) == count


def test_problems_are_filtered_and_opened_by_the_keyboard(page):
    page.value("document.getElementById('show-all').focus()")
    for kind in ("keyDown", "keyUp"):
        page("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    assert page.value("document.activeElement.id") == "show-never" and page.value(VISIBLE) == 2
    page.value("document.querySelector('.problem.never summary').focus()")
    for kind in ("keyDown", "keyUp"):
        page("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    assert page.value("document.querySelector('.problem.never').open") is True


def test_a_phone_needs_no_sideways_scrolling(page):
    page("Emulation.setDeviceMetricsOverride", width=380, height=800, deviceScaleFactor=2, mobile=True)
    page.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.value("document.documentElement.scrollWidth") <= 380
    assert page.value("getComputedStyle(document.querySelector('.narrow')).display") == "block"


def test_it_is_dark_in_the_dark(page):
    backgrounds = []
    for scheme in ("light", "dark"):
        page("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        backgrounds.append(page.value("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(253, 252, 249)", "rgb(21, 23, 26)"]
