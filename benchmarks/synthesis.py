"""python -m benchmarks.synthesis: what the ledger, the budget and the pace cost a request, against the bare client.

    python -m benchmarks.synthesis

A server in a process of its own answers every chat completion with the same text at once. The bare contestant sends
requests by openai's AsyncOpenAI, so many at a time, and throws the replies away; ours is what `synthesize` asks with:
each request held and on the disk before it is sent, each reply on the disk before anything follows. They take turns, in
several rounds, each in a process of its own; medians are shown.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pydantic

from benchmarks.flags import Numbers, settings_and_command
from benchmarks.report import environment, table, write_results
from benchmarks.worker import Limits, Worker, anonymous_memory
from data_pipeline.cli import StopSignal, logger, run_command
from data_pipeline.settings import Settings
from data_pipeline.synthesis.direct import DirectTeacher
from data_pipeline.synthesis.ledger import Ledger
from data_pipeline.synthesis.requests import NANO, Request, make_request
from data_pipeline.synthesis.rules import Handler, Server, completion
from data_pipeline.synthesis.settings import Limits as Pace
from data_pipeline.synthesis.settings import Price, Teacher
from data_pipeline.synthesis.strategies import ANSWER_FIELDS, answer_prompt

_TEXT = "SOLUTION: 48 / 2 = 24\n48 + 24 = 72\nFINAL ANSWER: 72"


class SynthesisBenchmark(Settings):
    """What is measured."""

    num_requests: pydantic.PositiveInt = pydantic.Field(3000, description="of a round")
    concurrency: Numbers = pydantic.Field((16, 256), description="requests under way at once, by commas")
    rounds: pydantic.PositiveInt = pydantic.Field(3, description="times that each sends everything")
    out: str | None = pydantic.Field(None, description="folder for the results as Markdown and JSON")


class Answering:
    """A server that answers at once."""

    def __init__(self) -> None:
        class Always(Handler):
            def complete(self, body: dict[str, Any], prompt: str) -> None:
                """The same text."""
                self.answer(200, completion(_TEXT, body, prompt))

        self._server = Server(Always).__enter__()

    def url(self) -> str:
        """Where it is."""
        return self._server.url


def requests_to(url: str, count: int) -> list[Request]:
    """Different requests of a usual length."""
    teacher = _teacher(url)
    question = "Natalia sold clips to {} of her friends in April, and then half as many in May. How many in all?"
    prompts = [answer_prompt(question.format(number), "number") for number in range(count)]
    return [make_request(teacher, "answer", prompt, ANSWER_FIELDS, "0") for prompt in prompts]


class Bare:
    """openai's client and a semaphore."""

    def __init__(self, url: str, concurrency: int, count: int):
        self._url, self._concurrency = url, concurrency
        self._requests = requests_to(url, count)

    def run(self) -> tuple[float, float, int]:
        """Seconds, CPU seconds of this process, and its anonymous memory in the end."""
        started, used = time.perf_counter(), time.process_time()
        asyncio.run(self._send())
        return time.perf_counter() - started, time.process_time() - used, anonymous_memory()

    async def _send(self) -> None:
        import httpx2

        limits = httpx2.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        client = openai.AsyncOpenAI(
            base_url=self._url, api_key="none", max_retries=0, http_client=openai.DefaultAsyncHttpxClient(limits=limits)
        )
        free = asyncio.Semaphore(self._concurrency)

        async def one(request: Request) -> None:
            async with free:
                await client.chat.completions.create(**request.body)

        async with client, asyncio.TaskGroup() as group:
            for request in self._requests:
                group.create_task(one(request))


class Ours(Bare):
    """The teacher that `synthesize` asks, with a ledger in a new folder."""

    async def _send(self) -> None:
        pace = Pace(concurrency=self._concurrency)
        with tempfile.TemporaryDirectory(dir=".") as folder, Ledger(Path(folder) / "ledger.sqlite") as ledger:
            asked = DirectTeacher(_teacher(self._url), pace, ledger, 10**6 * NANO, StopSignal())
            async with asyncio.TaskGroup() as group:
                for request in self._requests:
                    group.create_task(asked.ask(request))
            await asked.close()


def _teacher(url: str) -> Teacher:
    return Teacher(model="always", base_url=url, price=Price(input=10, output=30))


def benchmark(settings: SynthesisBenchmark, command: str) -> None:
    """Measures, prints, and writes the results."""
    where = environment("cpu", os.getloadavg()[0], ("openai",))
    limits = Limits(600, None, {})
    found: dict[tuple[int, str], list[tuple[float, float, int]]] = {}
    with Worker(Answering, (), limits) as server:
        url = server.call("url")
        for _ in range(settings.rounds):
            for concurrency in settings.concurrency:
                for name, kind in (("openai alone", Bare), ("ours", Ours)):
                    with Worker(kind, (url, concurrency, settings.num_requests), limits) as worker:
                        found.setdefault((concurrency, name), []).append(worker.call("run"))
    lines, values = [], []
    for (concurrency, name), runs in found.items():
        seconds, cpu, memory = (statistics.median(column) for column in zip(*runs, strict=True))
        rate, milliseconds = settings.num_requests / seconds, 1000 * cpu / settings.num_requests
        lines.append([name, str(concurrency), f"{rate:,.0f}", f"{milliseconds:.2f}", f"{memory / 1e6:.0f}"])
        values.append({"contestant": name, "concurrency": concurrency, "runs": runs, "requests_per_second": rate})
    body = table(["", "at once", "requests/s", "CPU ms a request", "memory, MB"], lines)
    print(body, flush=True)
    if settings.out is not None:
        told = {"settings": settings.model_dump(exclude={"out"}), "rows": values}
        logger.info("wrote %s", write_results(settings.out, "synthesis", where, command, body, told))


def _main(argv: Sequence[str] | None) -> None:
    benchmark(*settings_and_command("benchmarks.synthesis", __doc__, SynthesisBenchmark, argv))


if __name__ == "__main__":
    run_command(_main)
