"""The errors of a folder, by program and by a judge that is a server here; nothing is asked, or paid, twice."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from etils import epath

from data_pipeline.answers import GRADER_VERSION
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
            grades.append({**key, "correct": correct, "answer": "4", "finish_reason": "eos"})
    for file, rows in (
        ("problems", problems),
        ("samples/part-00000-00001", samples),
        ("grades/part-00000-00001", grades),
    ):
        (out / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    needed = ("task", "split", "checkpoint", "num_problems", "num_samples", "temperature", "max_tokens")
    (out / "run.json").write_text(json.dumps(dict.fromkeys(needed, 1)))
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
    # Wilson's interval of 2 of 4: (2 + z²/2 ± z sqrt(1 + z²/4)) / (4 + z²), z = 1.96.
    half = {"value": 0.5, "ci95": [pytest.approx(0.15004, abs=1e-4), pytest.approx(0.84996, abs=1e-4)]}
    assert told == {
        "grader_version": GRADER_VERSION,
        "metrics_sha256": "",
        "seed": 0,
        "num_wrong_in_all": 6,
        "program": {
            "num_wrong": 6, "calculation": 2, "reasoning": 2, "not_checkable": 2, "first_false_position": 0.5,
            "shares": {"calculation": half, "reasoning": half},
        },
    }  # fmt: skip
    assert json.loads((folder / "errors.json").read_text()) == told
    assert (
        "6 of 6 wrong samples; 4 state equations to check, of which 50 % state a false one (calculation)" in caplog.text
    )


def test_shares_are_those_of_the_samples_however_they_lie(folder: epath.Path) -> None:
    """One problem has one wrong sample, of calculation; the other 60, of reasoning: no problem weighs more."""
    rows = [("p", 0, "1 + 1 = 3", False)] + [("q", i, "1 + 1 = 2\nThe answer is: 5.", False) for i in range(60)]
    for kind in ("samples", "grades"):
        lines = [
            {"problem_id": name, "sample_id": i, "text": text, "correct": correct, "finish_reason": "eos"}
            for name, i, text, correct in rows
        ]
        (folder / kind / "part-00000-00001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [diagnose(folder, ErrorSettings(num_samples=12, seed=seed))["program"] for seed in range(40)]
    assert all(program["num_wrong"] == 12 for program in found)
    assert 1 <= sum(program["calculation"] for program in found) <= 18  # of 480, 7.9 are expected


def test_equal_solutions_are_asked_about_once(folder: epath.Path, server: tuple[str, list[str]]) -> None:
    url, asked = server
    part = folder / "samples" / "part-00000-00001.jsonl"
    part.write_text(re.sub(r'"text": "[^"]*"', '"text": "1 + 1 = 3\\\\nSo.\\\\nThe answer is: 9."', part.read_text()))
    told = diagnose(folder, ErrorSettings(endpoint=url, model="m", max_requests=2))
    assert len(asked) == 2 and told["judge"]["num_judged"] == 6  # one for each problem


def test_a_judge_is_asked_once_within_its_budget(
    folder: epath.Path, server: tuple[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    url, asked = server
    settings = ErrorSettings(endpoint=url, model="m", max_requests=4)
    diagnose(folder, settings)
    assert len(asked) == 4 == len(set(asked))
    told = diagnose(folder, settings)
    assert len(set(asked)) == 6  # the two that were left
    assert not any("Who knows" not in prompt and asked.count(prompt) > 1 for prompt in asked)
    assert diagnose(folder, settings) == told
    assert "2 of 2 answers named no step and type: they are not kept" in caplog.text
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
