"""The errors of a folder, by program and by a judge that is a server here; nothing is asked, or paid, twice."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from etils import epath

from data_pipeline.cli import RunError
from eval.diagnose import ErrorSettings, agreement, diagnose
from eval.errors import examine
from eval.judge import Opinion

TEXTS = [
    ("1 + 1 = 2\n2 + 2 = 5\nThe answer is: 5.", False),  # a false equation in the second step
    ("1 + 1 = 2\n2 + 3 = 5\nThe answer is: 5.", False),  # true ones
    ("Who knows.\nThe answer is: 9.", False),  # none
    ("1 + 1 = 2\n2 + 2 = 4\nThe answer is: 4.", True),
]


@pytest.fixture
def folder(tmp_path: Path) -> epath.Path:
    """Two problems, each with the four texts as its samples."""
    out = tmp_path / "eval"
    for kind in ("samples", "grades"):
        (out / kind).mkdir(parents=True)
    problems, samples, grades = [], [], []
    for name in ("p", "q"):
        problems.append({"problem_id": name, "question": f"What is {name}?", "answer": "4"})
        for sample_id, (text, correct) in enumerate(TEXTS):
            key = {"problem_id": name, "sample_id": sample_id}
            samples.append({**key, "text": text, "num_tokens": 3, "finish_reason": "eos"})
            grades.append({**key, "correct": correct, "answer": "4"})
    for file, rows in (
        ("problems", problems),
        ("samples/part-00000-00001", samples),
        ("grades/part-00000-00001", grades),
    ):
        (out / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "run.json").write_text("{}")
    return epath.Path(out)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A chat server that finds a calculation error in step 2, and the prompts that it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][0]["content"])
            text = "I cannot say." if "Who knows" in asked[-1] else "Hm.\nSTEP: 2\nTYPE: calculation"
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]}  # fmt: skip
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("localhost", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://localhost:{http.server_address[1]}/v1", asked
        http.shutdown()


def test_types_by_program(folder: epath.Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mathscale")
    told = diagnose(folder, ErrorSettings())
    assert told == {
        "program": {
            "num_wrong": 6, "calculation": 2, "reasoning": 2, "not_checkable": 2, "first_false_position": 0.5,
        }
    }  # fmt: skip
    assert json.loads((folder / "errors.json").read_text()) == told
    assert "6 wrong samples: 33 % state a false equation" in caplog.text


def test_samples_are_spread_over_the_problems(folder: epath.Path) -> None:
    for seed in range(5):
        assert diagnose(folder, ErrorSettings(num_samples=2, seed=seed))["program"]["num_wrong"] == 2


def test_a_judge_is_asked_once_within_its_budget(folder: epath.Path, server: tuple[str, list[str]]) -> None:
    url, asked = server
    settings = ErrorSettings(endpoint=url, model="m", max_requests=4)
    diagnose(folder, settings)
    assert len(asked) == 4 == len(set(asked))
    told = diagnose(folder, settings)
    assert len(asked) == 6 == len(set(asked))  # the two that were left
    assert diagnose(folder, settings) == told and len(asked) == 6
    assert told["judge"] == {
        "model": "m", "num_judged": 4, "calculation": 4, "reasoning": 0, "first_error_position": 0.5,
    }  # fmt: skip
    # Of four that both judged, the program calls two a calculation error, in the same step.
    assert told["agreement"] == {"num_both": 4, "same_type": 0.5, "kappa": 0.0, "same_step": 1.0}
    assert "The right answer is: 4" in asked[0] and "2. " in max(asked, key=len)


def test_agreement_beyond_chance() -> None:
    false, true = examine("1 + 1 = 3"), examine("1 + 1 = 2")
    calculation, reasoning = Opinion(0, "calculation"), Opinion(0, "reasoning")
    told = agreement([false] * 4 + [true] * 4, [calculation] * 3 + [reasoning] + [reasoning] * 3 + [calculation])
    # 6 of 8 agree; by chance half would: (0.75 - 0.5) / (1 - 0.5).
    assert told == {"num_both": 8, "same_type": 0.75, "kappa": pytest.approx(0.5), "same_step": 1.0}


def test_nothing_wrong_and_nobody_there_are_said(
    folder: epath.Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("eval.endpoint._RETRIES", 0)
    with pytest.raises(RunError, match="does not answer"):
        diagnose(folder, ErrorSettings(endpoint="http://localhost:9/v1", model="m"))
    part = folder / "grades" / "part-00000-00001.jsonl"
    part.write_text(part.read_text().replace("false", "true"))
    with pytest.raises(RunError, match="holds no wrong sample"):
        diagnose(folder, ErrorSettings())
