"""`teacher`: a rule-based teacher behind the same interface as a language model, for demos, tests and studies.

It writes word problems of our generator and solves them, with a share of wrong questions and answers that one sets: so
that all of synthesis runs without a model and without a network, and its filters can be seen at work. What it replies
is a function of the request.
"""

import hashlib
import json
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pydantic

from data_pipeline.cli import logger
from data_pipeline.settings import Settings, UsageError
from data_pipeline.word_problems import generate_problems, solve


class RuleTeacher(Settings):
    """`teacher`: word problems by rule, as an OpenAI-compatible server on this machine.

    Its model is called "rules". It knows problems of its own only: asked about others, as rephrasing and MetaMath's
    masked numbers do, it guesses.
    """

    port: int = pydantic.Field(8765, ge=0, le=65535, description="of localhost; 0: any free one")
    wrong_questions: float = pydantic.Field(
        0.1, ge=0, le=1, description="share of new questions that cannot be answered; asked to verify, it mends most"
    )
    mended: float = pydantic.Field(0.8, ge=0, le=1, description="share of those that it mends where it verifies")
    wrong_answers: float = pydantic.Field(0.1, ge=0, le=1, description="share of answers with a wrong step")
    min_steps: pydantic.PositiveInt = pydantic.Field(2, description="fewest steps of a new problem")
    max_steps: pydantic.PositiveInt = pydantic.Field(4, description="most steps of a new problem")
    delay: pydantic.NonNegativeFloat = pydantic.Field(0.0, description="seconds that a reply takes")

    @pydantic.model_validator(mode="after")
    def _steps_in_order(self) -> "RuleTeacher":
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps={self.min_steps} must not be above max_steps={self.max_steps}")
        return self


def reply_to(prompt: str, body: dict[str, Any], rules: RuleTeacher) -> str:
    """What the teacher writes. A function of the request's body and the rules."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    rng = random.Random(digest)
    if "SOLUTION:" in prompt:
        return _answer(_after(prompt, "The question:"), rng, rules)
    (problem,) = generate_problems(1, rng.getrandbits(60), rules.min_steps, rules.max_steps)
    whole = problem.question
    created = _unanswerable(whole) if rng.random() < rules.wrong_questions else whole
    if "FINAL CREATED QUESTION:" not in prompt:
        label = next(iter(re.findall(r"^([A-Z][A-Z ]+): <", prompt, re.MULTILINE)), "CREATED QUESTION")
        return f"{label}: {created}"
    final = whole if created == whole or rng.random() < rules.mended else created
    said = (
        "It keeps to the rules." if final == created else "How many there are at first is not said: a rule is broken."
    )
    return f"CREATED QUESTION: {created}\nVERIFICATION AND MODIFICATION: {said}\nFINAL CREATED QUESTION: {final}"


def _answer(question: str, rng: random.Random, rules: RuleTeacher) -> str:
    problem = solve(question)
    if problem is None:  # it knows its own problems only; a model would guess, too
        return f"SOLUTION: I take it to be this.\nFINAL ANSWER: {rng.randint(1, 20)}"
    lines = problem.solution.splitlines()
    answer = int(problem.answer)
    if lines and rng.random() < rules.wrong_answers:
        place = rng.randrange(len(lines))
        off = rng.choice((-2, -1, 1, 2))
        value = None
        for index in range(place, len(lines)):
            left, sign, n, _, _ = lines[index].split()
            start = int(left) if value is None else value
            value = {"+": start + int(n), "-": start - int(n), "*": start * int(n)}[sign] + (
                off if index == place else 0
            )
            lines[index] = f"{start} {sign} {n} = {value}"
        answer = value if value is not None else answer
    return "\n".join(["SOLUTION: " + "\n".join(lines), f"FINAL ANSWER: {answer}"])


def _unanswerable(question: str) -> str:
    """A question that does not say how many there are at first."""
    return re.sub(r"has \d+ ", "has some ", question, count=1)


def _after(prompt: str, mark: str) -> str:
    """The paragraph behind a mark."""
    return prompt.partition(mark)[2].strip().split("\n\n")[0].strip()


class Handler(BaseHTTPRequestHandler):
    """One connection. A subclass says in `complete` what is answered to a request for a chat completion."""

    protocol_version = "HTTP/1.1"
    rules = RuleTeacher()

    def do_POST(self) -> None:
        """Chat completions."""
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/v1/chat/completions":
            self.answer(404, {"error": {"message": f"there is no {self.path}", "code": "not_found"}})
            return
        try:
            body = json.loads(data)
            prompt = body["messages"][-1]["content"]
        except (ValueError, LookupError, TypeError):
            self.answer(400, {"error": {"message": "the body is no request for a chat completion"}})
            return
        self.complete(body, prompt)

    def do_GET(self) -> None:
        """The list of models, by which people look whether a server is there."""
        if self.path != "/v1/models":
            self.answer(404, {"error": {"message": f"there is no {self.path}", "code": "not_found"}})
            return
        self.answer(200, {"object": "list", "data": [{"id": "rules", "object": "model"}]})

    def complete(self, body: dict[str, Any], prompt: str) -> None:
        """Answers a request."""
        time.sleep(self.rules.delay)
        self.answer(200, completion(reply_to(prompt, body, self.rules), body, prompt))

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        """Sends JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a request is too much."""


def completion(text: str, body: dict[str, Any], prompt: str) -> dict[str, Any]:
    """A chat completion as OpenAI's API writes it; four bytes are a token."""
    used = {"prompt_tokens": len(prompt.encode()) // 4, "completion_tokens": len(text.encode()) // 4 + 1}
    return {
        "id": "chatcmpl-rules",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.get("model", "rules"),
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": used | {"total_tokens": sum(used.values())},
    }


class Server(ThreadingHTTPServer):
    """A server on localhost that takes many connections at once."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, handler: type[Handler], port: int = 0):
        super().__init__(("127.0.0.1", port), handler)

    @property
    def url(self) -> str:
        """What teacher.base_url says."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that went away is no error of ours."""


def serve(rules: RuleTeacher) -> None:
    """Serves until Ctrl-C. Raises UsageError where the port is taken."""
    handler = type("RuleHandler", (Handler,), {"rules": rules})
    try:
        server = Server(handler, rules.port)
    except OSError as error:
        raise UsageError(f"port={rules.port} is taken ({error.strerror}): choose another, or 0 for any") from error
    logger.info('the rule-based teacher listens: teacher: {model: rules, base_url: "%s"}; Ctrl-C ends it', server.url)
    try:
        server.serve_forever()
    finally:
        server.server_close()
