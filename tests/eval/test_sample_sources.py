"""Samples in shards, behind worked examples, from published folders and from servers; right ones as a dataset."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from small_run import run, write_config

from data_pipeline.cli import RunError
from data_pipeline.from_samples import FromSamples, rows_from_samples
from data_pipeline.settings import UsageError
from data_pipeline.tasks import read_problems
from data_pipeline.templates import load_template
from eval.grade import grade
from eval.prompts import Prompts
from eval.sample import SampleSettings, sample
from mathscale_jax.convert.exporting import export_hf

NUM_PROBLEMS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    result = run("mathscale_jax.train", "--config", str(write_config(folder)), "num_steps=4")
    assert result.returncode == 0, result.stderr
    return folder


def settings(trained: Path, out: Path, **changes: Any) -> SampleSettings:
    plain = dict(
        checkpoint=str(trained / "run"), task="demo", source=str(trained / "data" / "test.jsonl"), out=str(out),
        num_problems=NUM_PROBLEMS, num_samples=8, max_tokens=24, rows=1,
        dtype="bfloat16" if "endpoint" in changes else "float32",
    )  # fmt: skip
    return SampleSettings(**{**plain, **changes})


def contents(out: Path) -> dict[str, bytes]:
    return {part.name: part.read_bytes() for part in (out / "samples").iterdir()}


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for _, text in sorted(contents(out).items()) for line in text.decode().splitlines()]


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    sample(settings(trained, out))
    return out


def test_shards_together_make_the_files_of_one_job(trained: Path, whole: Path, tmp_path: Path) -> None:
    for shard in ("1/3", "0/3", "2/3"):
        before = contents(tmp_path) if (tmp_path / "samples").exists() else {}
        sample(settings(trained, tmp_path, shard=shard))
        assert len(contents(tmp_path)) == len(before) + 2
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/2", "a/b"])
def test_shards_are_numbered_from_zero(trained: Path, tmp_path: Path, shard: str) -> None:
    with pytest.raises(ValueError, match="must be i/N with i from 0 to N - 1"):
        settings(trained, tmp_path, shard=shard)


def test_a_published_folder_gives_the_samples_of_its_import(trained: Path, whole: Path, tmp_path: Path) -> None:
    export_hf(str(trained / "run"), str(tmp_path / "hf"))
    sample(settings(trained, tmp_path / "out", checkpoint=str(tmp_path / "hf")))
    assert contents(tmp_path / "out") == contents(whole)


def test_worked_examples_stand_before_a_question_and_end_a_response(trained: Path, tmp_path: Path) -> None:
    train = str(trained / "data" / "train.jsonl")
    out = sample(settings(trained, tmp_path, shots=2, shots_source=train, num_problems=1, logprobs=True))
    run_of = json.loads((tmp_path / "run.json").read_text())
    assert run_of["stop"] == ["\n\nProblem:"]
    assert all(row["logprob"] < 0 and "\n\nProblem:" not in row["text"] for row in rows_of(Path(out)))
    asked = read_problems("demo", "train", train)[1]
    texts = Prompts(settings(trained, tmp_path, shots=2, shots_source=train), load_template(None))
    assert texts.render(asked).count(asked.question) == 1 and texts.render(asked).count("The answer is:") == 2
    with pytest.raises(UsageError, match="shots=999"):
        sample(settings(trained, tmp_path / "more", shots=999, shots_source=train))


class Server(BaseHTTPRequestHandler):
    """Completions as an OpenAI-compatible server gives them: each problem's right answer, in every second sample."""

    requests: ClassVar[list[dict[str, Any]]] = []
    answers: ClassVar[dict[str, str]] = {}

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(asked)
        answer = next((answer for question, answer in self.answers.items() if question in asked["prompt"]), None)
        if "top_k" in asked:
            self._send(400, {"error": {"message": "no top_k here"}})
            return
        if answer is None:
            self._send(400, {"error": {"message": "the prompt is too long"}})
            return
        tokens = {"tokens": ["a"] * 7, "token_logprobs": [-0.5] * 7, "top_logprobs": None, "text_offset": [0] * 7}
        choices = [
            {
                "index": i,
                "text": f" 1 + {i} = 2\nThe answer is: {answer if i % 2 else 'none'}.",
                "finish_reason": "stop" if i else "length",
                "logprobs": tokens,
            }
            for i in range(asked["n"])
        ]
        self._send(200, {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": choices})

    def _send(self, code: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(trained: Path) -> Iterator[str]:
    problems = read_problems("demo", "test", str(trained / "data" / "test.jsonl"))[:NUM_PROBLEMS]
    Server.requests, Server.answers = [], {p.question: p.answer for p in problems[:-1]}  # the last one is refused
    http = ThreadingHTTPServer(("localhost", 0), Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://localhost:{http.server_address[1]}/v1"
    http.shutdown()


def test_a_server_is_sampled_into_the_same_files_and_asked_once(trained: Path, tmp_path: Path, server: str) -> None:
    there = settings(trained, tmp_path / "out", checkpoint=None, endpoint=server, model="m", rows=2)
    out = sample(there)
    assert len(Server.requests) == NUM_PROBLEMS
    assert {asked["n"] for asked in Server.requests} == {8} and Server.requests[0]["prompt"].endswith("Solution:")
    rows = rows_of(Path(out))
    assert [row["sample_id"] for row in rows] == list(range(8)) * NUM_PROBLEMS
    assert [row["finish_reason"] for row in rows[:2]] == ["length", "eos"] and rows[0]["num_tokens"] == 7
    assert {row["finish_reason"] for row in rows[-8:]} == {"error"}
    sample(there)
    assert len(Server.requests) == NUM_PROBLEMS
    metrics = json.loads(grade(out).read_text())
    assert metrics["pass_ratio"]["8"]["value"] == pytest.approx(0.5 * (NUM_PROBLEMS - 1) / NUM_PROBLEMS)


def test_a_server_that_refuses_how_it_is_asked_ends_the_job(trained: Path, tmp_path: Path, server: str) -> None:
    with pytest.raises(RunError, match=r"refuses the request: .*no top_k here"):
        sample(settings(trained, tmp_path / "out", checkpoint=None, endpoint=server, model="m", top_k=5))
    assert not list((tmp_path / "out" / "samples").iterdir())


def test_right_samples_become_a_dataset(trained: Path, tmp_path: Path, server: str) -> None:
    out = sample(settings(trained, tmp_path / "out", checkpoint=None, endpoint=server, model="m"))
    with pytest.raises(UsageError, match="is not graded"):
        rows_from_samples(str(out), FromSamples(out=str(tmp_path / "rows.jsonl")))
    grade(out)
    # Right are the samples 1, 3, 5 and 7 of all problems but one, with different texts.
    assert rows_from_samples(str(out), FromSamples(out=str(tmp_path / "rows.jsonl"), per_problem=3)) == 15
    part = next((out / "grades").iterdir())
    whole = part.read_text()
    part.write_text(whole[:100])
    with pytest.raises(RunError, match=f"{part.name} is damaged .* grade again"):
        rows_from_samples(str(out), FromSamples(out=str(tmp_path / "others.jsonl")))
    part.write_text(whole)
    problems = read_problems("jsonl", "train", str(tmp_path / "rows.jsonl"))
    asked = read_problems("demo", "test", str(trained / "data" / "test.jsonl"))
    assert [p.question for p in problems] == [p.question for p in asked[:5] for _ in range(3)]
    assert {p.answer for p in problems[:3]} == {asked[0].answer}
    assert {p.solution for p in problems} <= {f"1 + {i} = 2" for i in (1, 3, 5, 7)}
    lineage = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["lineage"]
    assert lineage["checkpoint"] == f"m at {server}" and lineage["sample_id"] in (1, 3, 5, 7)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"checkpoint": None}, "give --checkpoint, or --endpoint with its --model"),
        ({"endpoint": "http://localhost:1/v1", "model": "m"}, "give --checkpoint, or --endpoint with its --model"),
        ({"checkpoint": None, "endpoint": "http://localhost:1/v1"}, "--endpoint and --model go together"),
        ({"template": "x.yaml"}, "a checkpoint has its own"),
        ({"checkpoint": None, "endpoint": "http://localhost:1/v1", "model": "m", "kv_cache": "int8"}, "server's own"),
    ],
)
def test_one_model_is_sampled(trained: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        settings(trained, tmp_path, **changes)
