"""Hostile OpenAI-compatible servers on localhost: real HTTP, and what real servers do wrong."""

import email
import hashlib
import json
import re
import socket
import sqlite3
import threading
import time
from collections import Counter
from email.policy import HTTP
from pathlib import Path
from typing import Any

from data_pipeline.synthesis.rules import Handler, RuleTeacher, Server, completion, reply_to

RULES = RuleTeacher(wrong_questions=0.2, wrong_answers=0.0)


class Books:
    """What a server keeps of what it was asked, from whatever connection."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()  # times that a body came
        self.answered: Counter[str] = Counter()  # times that a body was answered, and so paid
        self.tokens = [0, 0]  # of prompts and replies that were paid
        self.times: list[float] = []  # when requests came
        self.under_way = self.most_under_way = 0

    @property
    def num_asked(self) -> int:
        return sum(self.asked.values())


class Teacher(Handler):
    """Answers by rule, and keeps the books. Subclasses say in `trouble` what else it does."""

    rules = RULES
    books: Books

    def complete(self, body: dict[str, Any], prompt: str) -> None:
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.books.lock:
            self.books.asked[key] += 1
            self.books.times.append(time.monotonic())
            self.books.under_way += 1
            self.books.most_under_way = max(self.books.most_under_way, self.books.under_way)
            times, self.number = self.books.asked[key], self.books.num_asked
        try:
            if not self.trouble(key, times, body, prompt):
                self.pay(key, completion(reply_to(prompt, body, self.rules), body, prompt))
        finally:
            with self.books.lock:
                self.books.under_way -= 1

    def trouble(self, key: str, times: int, body: dict[str, Any], prompt: str) -> bool:
        """Whether the request was dealt with, the `times`-th of its kind."""
        return False

    def pay(self, key: str, content: Any, usage: dict[str, int] | None = None, cut: bool = False) -> None:
        """Answers, and writes down what the answer costs: `usage`, whatever the content says of it."""
        usage = content["usage"] if usage is None else usage
        with self.books.lock:
            self.books.answered[key] += 1
            self.books.tokens[0] += usage["prompt_tokens"]
            self.books.tokens[1] += usage["completion_tokens"]
        if cut:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.cut()
        else:
            self.answer(200, content)

    def cut(self) -> None:
        """Ends the connection, whatever the client waits for."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def error(self, status: int, code: str, **headers: str) -> None:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer(status, {"error": {"message": f"because of {code}", "code": code, "type": code}}, names)


class Hostile(Teacher):
    """Errors that pass: by the request and how often it came. Errors of the content: by the request alone."""

    troubles = True  # errors that pass

    def trouble(self, key: str, times: int, body: dict[str, Any], prompt: str) -> bool:
        chance = int(hashlib.sha256(f"{key} {times}".encode()).hexdigest()[:8], 16) / 2**32
        if self.troubles and times < 4:
            if chance < 0.06:
                self.error(429, "rate_limit_exceeded", Retry_After="0.02")
                return True
            if chance < 0.10:
                self.error(429, "rate_limit_exceeded")
                return True
            if chance < 0.16:
                self.error(500, "server_error")
                return True
            if chance < 0.18:
                self.cut()
                return True
            if chance < 0.20:
                whole = completion(reply_to(prompt, body, self.rules), body, prompt)
                self.pay(key, whole, cut=True)
                return True
            if chance < 0.22:
                time.sleep(0.2)
        content = int(key[:8], 16) / 2**32
        whole = completion(reply_to(prompt, body, self.rules), body, prompt)
        if content < 0.03:
            self.pay(key, b'{"choices": [{"mess', whole["usage"])
        elif content < 0.06:
            self.pay(key, whole | {"choices": []}, whole["usage"])
        elif content < 0.09:
            self.pay(key, whole | {"usage": {"prompt_tokens": -5, "completion_tokens": 10**9}}, whole["usage"])
        elif content < 0.12:
            whole["choices"][0]["finish_reason"] = "length"
            self.pay(key, whole)
        elif content < 0.14:
            whole["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I'd rather not."}
            self.pay(key, whole)
        else:
            return False
        return True


class BatchTeacher(Teacher):
    """The Batch API: files, batches, and how a batch ends by `endings`, one after another; then as it should."""

    endings: list[str]
    limit = 10**9  # requests that may wait at once
    store: dict[str, Any]

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.endswith("/files"):
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            message = email.message_from_bytes(head + data, policy=HTTP)
            content = next(p for p in message.iter_parts() if "filename" in str(p["Content-Disposition"]))
            self.answer(200, self.file(content.get_payload(decode=True)))
        elif self.path.endswith("/batches"):
            self.create(json.loads(data))
        else:
            self.error(404, "not_found")

    def do_GET(self) -> None:
        found = re.search(r"/files/([\w-]+)/content", self.path)
        batch = re.search(r"/batches/([\w-]+)", self.path)
        if found is not None:
            self.answer(200, self.store["files"][found[1]])
        elif batch is not None:
            found_batch = self.look(batch[1])
            if found_batch is None:
                self.error(404, "not_found")
            else:
                self.answer(200, found_batch)
        elif self.path.split("?")[0].endswith("/batches"):
            self.answer(200, {"object": "list", "data": list(self.store["batches"].values()), "has_more": False})
        else:
            name = self.path.rsplit("/", 1)[-1]
            self.answer(200, self.described(name)) if name in self.store["files"] else self.error(404, "not_found")

    def file(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.store['files'])}"
        self.store["files"][name] = content
        return self.described(name)

    def described(self, name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "file", "bytes": len(self.store["files"][name]), "created_at": 0, "filename": name,
            "purpose": "batch", "status": "processed",
        }  # fmt: skip

    def create(self, body: dict[str, Any]) -> None:
        name = f"batch-{len(self.store['batches'])}"
        ending = self.endings[0] if self.endings else ""
        if ending.startswith(("busy", "error", "refuses")):
            self.endings.pop(0)
            if ending.startswith("refuses"):
                self.error(403, ending)
                return
            if ending == "busy":
                self.error(429, "rate_limit_exceeded")
                return
        batch = {
            "id": name, "object": "batch", "completion_window": "24h", "created_at": 0, "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"], "status": "in_progress", "metadata": body.get("metadata"),
            "looks": 0,
        }  # fmt: skip
        self.store["batches"][name] = batch
        if ending == "cut on creation":
            self.endings.pop(0)
            self.cut()
        elif ending == "error on creation":
            self.error(502, "bad_gateway")
        else:
            self.answer(200, batch)

    def look(self, name: str) -> dict[str, Any] | None:
        """A batch ends at the second look."""
        batch = self.store["batches"].get(name)
        if batch is None or (self.endings and self.endings[0] == "gone"):
            self.endings[:1] = []
            return None
        with self.books.lock:
            batch["looks"] += 1
            if batch["status"] != "in_progress" or batch["looks"] < 2:
                return batch
            lines = [json.loads(line) for line in self.store["files"][batch["input_file_id"]].splitlines()]
            self.store["sizes"].append(len(lines))
            if len(lines) > self.limit:
                said = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}
                batch |= {"status": "failed", "errors": {"object": "list", "data": [said]}}
                return batch
            ending = self.endings.pop(0) if self.endings else "completed"
            done, failed = [], []
            for place, line in enumerate(lines):
                if ending == "no output file" or (ending == "some fail" and place % 3 == 0):
                    failed.append(line)
                elif ending == "expired" and place % 2:
                    continue
                else:
                    done.append(line)
            batch["status"] = "expired" if ending == "expired" else "completed"
            if ending == "nothing done":  # it says so, and names no file at all
                batch["request_counts"] = {"total": len(lines), "completed": 0, "failed": 0}
                return batch
            output = [self.done(line) for line in done][::-1]  # in another order
            if ending == "damaged line":
                output[0] = output[0][: len(output[0]) // 2]
            if ending == "odd lines":
                odd = [{"custom_id": 5}, [1], {"custom_id": "zz"}, {"custom_id": "00" * 32, "response": "x"}]
                output += [json.dumps(line).encode() for line in odd]
                mine = json.loads(output[0])["custom_id"]
                output[0] = json.dumps({"custom_id": mine, "response": {"status_code": 500, "body": "<html>"}}).encode()
        if output:
            batch["output_file_id"] = self.file(b"\n".join(output) + b"\n")["id"]
        if failed:
            errors = [
                json.dumps({"id": "x", "custom_id": line["custom_id"], "response": {"status_code": 500, "body": {
                    "error": {"message": "server error"}}}, "error": None}).encode() for line in failed
            ]  # fmt: skip
            batch["error_file_id"] = self.file(b"\n".join(errors))["id"]
        return batch

    def done(self, line: dict[str, Any]) -> bytes:
        body = line["body"]
        prompt = body["messages"][-1]["content"]
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        self.books.answered[key] += 1
        content = completion(reply_to(prompt, body, self.rules), body, prompt)
        self.books.tokens[0] += content["usage"]["prompt_tokens"]
        self.books.tokens[1] += content["usage"]["completion_tokens"]
        row = {
            "id": "x",
            "custom_id": line["custom_id"],
            "response": {"status_code": 200, "body": content},
            "error": None,
        }
        return json.dumps(row).encode()


def serving(kind: type[Teacher], **changes: Any) -> tuple[Server, Books]:
    """A server of its own class, so that its books and troubles are its own; enter it."""
    books = Books()
    handler = type(f"{kind.__name__}Here", (kind,), {"books": books, **changes})
    return Server(handler), books


def rows_in(out: str) -> list[dict[str, Any]]:
    """The rows that a synthesis made."""
    return [json.loads(line) for line in (Path(out) / "rows.jsonl").read_text().splitlines()]


def outcomes(out):
    """Status, finish reason and cost of everything that a folder's ledger has."""
    with sqlite3.connect(f"{out}/ledger.sqlite") as connection:
        return connection.execute("SELECT status, finish_reason, cost FROM outcomes").fetchall()


def paid(books):
    """Billionths of a dollar by the server's own books, at $10 and $30 a million tokens."""
    return books.tokens[0] * 10_000 + books.tokens[1] * 30_000
