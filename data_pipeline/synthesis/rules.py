"""`teacher`: a rule-based teacher behind the same interface as a language model, for demos, tests and studies.

It writes word problems of our generator, or changes those it is given as the strategy says, and solves them, with a
share of wrong questions and answers that one sets: so that all of synthesis runs without a model and without a network,
and its filters can be seen at work. What it replies is a function of the request.
"""

import functools
import hashlib
import json
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pydantic

from data_pipeline import word_problem_variants as variants
from data_pipeline.cli import logger
from data_pipeline.settings import Settings, UsageError
from data_pipeline.synthesis.strategies import Strategy, strategies, unfilled
from data_pipeline.word_problems import Working, generate_problems, parse_story, work_out


class RuleTeacher(Settings):
    """`teacher`: word problems by rule, as an OpenAI-compatible server on this machine.

    Its model is called "rules". It knows problems of its own only (the stories of `prepare demo`), and every strategy
    that comes with the package: asked about other problems it guesses, and asked to change them it writes a new one.
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
    whole = _asked(prompt, rng, rules) or _brand_new(rng, rules)
    created = _unanswerable(whole) if rng.random() < rules.wrong_questions else whole
    if "FINAL CREATED QUESTION:" not in prompt:
        label = next(iter(re.findall(r"^([A-Z][A-Z ]+): <", prompt, re.MULTILINE)), "CREATED QUESTION")
        return f"{label}: {created}"
    final = whole if created == whole or rng.random() < rules.mended else created
    said = (
        "It keeps to the rules." if final == created else "How many there are at first is not said: a rule is broken."
    )
    return f"CREATED QUESTION: {created}\nVERIFICATION AND MODIFICATION: {said}\nFINAL CREATED QUESTION: {final}"


def _brand_new(rng: random.Random, rules: RuleTeacher) -> str:
    (problem,) = generate_problems(1, rng.getrandbits(60), rules.min_steps, rules.max_steps)
    return problem.question


def _asked(prompt: str, rng: random.Random, rules: RuleTeacher) -> str | None:
    """What the prompt's strategy makes of its seed; None where a new problem is as good, or all that can be done."""
    for name, strategy in _strategies().items():
        texts = strategy.read_prompt(prompt, "number") if strategy.asks else None
        if texts is None:
            continue
        if name == "self_verification":
            return variants.state_answer(texts["masked"], texts["answer"], _last_sentence(strategy))
        story = parse_story(texts.get("reference", texts.get("question", "")))
        if story is None or min(story.values) < 1:
            return None
        match name:
            case "add_constraint":
                return (variants.add_event(story, rng) if len(story.events) <= rules.max_steps else story).question
            case "change_numbers":
                return variants.change_numbers(story, rng).question
            case "change_background":
                return variants.change_background(story, rng).question
            case "change_numbers_and_background":
                return variants.change_background(variants.change_numbers(story, rng), rng).question
            case "rephrasing":
                return variants.rephrase(story, rng).question
        return None
    return None


@functools.cache
def _strategies() -> dict[str, Strategy]:
    return strategies()


def _last_sentence(strategy: Strategy) -> str:
    """The question that a prompt gives in quotation marks, to be written as it is."""
    return re.findall(r'"([^"]+\?)"', strategy.question or "")[-1]


def _answer(question: str, rng: random.Random, rules: RuleTeacher) -> str:
    solved = _solved(question)
    if solved is None:  # it knows its own problems only; a model would guess, too
        return f"SOLUTION: I take it to be this.\nFINAL ANSWER: {rng.randint(1, 20)}"
    lines = solved[0].lines
    if lines and rng.random() < rules.wrong_answers:
        solved = None
        while solved is None:  # a slip may leave an odd number to be halved
            solved = _solved(question, slip=(rng.randrange(len(lines)), rng.choice((-2, -1, 1, 2))))
    working, answer = solved
    return f"SOLUTION: {working.solution}\nFINAL ANSWER: {answer}"


def _solved(question: str, slip: tuple[int, int] | None = None) -> tuple[Working, int] | None:
    """Lines and answer of a story, or of one in which a number is unknown; None of any other question."""
    working = Working(slip)
    story = parse_story(question)
    if story is not None:
        return working, work_out(story, working)
    texts = unfilled(_strategies()["fobar"].given or "", question)
    masked = variants.read_statement(question)
    if texts is not None:
        masked = variants.read_masked(texts["masked"], texts["answer"])
    value = None if masked is None else variants.find_masked(masked, working)
    return None if value is None else (working, value)


def _unanswerable(question: str) -> str:
    """A question that does not say how many there are at first; where that is x, how many in the end."""
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
