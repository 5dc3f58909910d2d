"""A language model's opinion on where a wrong solution goes wrong: asked once a solution, kept, and within a budget."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import openai

from data_pipeline.cli import RunError, StopSignal, first_line, logger
from data_pipeline.files import cache_folder, damage_named, write_json
from data_pipeline.progress import Progress
from eval.endpoint import client_of
from eval.errors import steps_of

_AT_ONCE = 8
_MAX_TOKENS = 512
_MAX_CHARS = 8000  # of a solution
_PROMPT = """You check the solution of a mathematics problem. Its final answer is wrong.

Problem:
{question}

The right answer is: {answer}

The solution, with its steps numbered:
{steps}

Find the first step that is wrong, and say what kind of error it is:
- calculation: the step sets out to compute the right thing, and computes it wrongly
- reasoning: anything else, such as a wrong operation, a misread or forgotten condition, a missing step

Think briefly. Then end with these two lines:
STEP: <number of the first wrong step>
TYPE: <calculation or reasoning>"""


class Opinion(NamedTuple):
    """The first wrong step, from 0, and "calculation" or "reasoning"."""

    step: int
    error: str


class Judge:
    """Asks a model behind an OpenAI-compatible endpoint; the key comes from OPENAI_API_KEY.

    What it answered is kept in the cache folder by model and prompt, and is never asked, or paid, again.
    """

    def __init__(self, endpoint: str, model: str):
        self._client, self._model = client_of(endpoint), model
        self._cache = cache_folder() / "judged"

    def opinions(self, solutions: Sequence[Mapping[str, str]], max_requests: int) -> list[Opinion | None]:
        """One a solution {question, answer, text}; None of those beyond the budget, and of answers in another form.

        Equal solutions are asked about once. Raises RunError where the server does not answer: what it answered before
        is kept; an answer in another form is not, and is counted in a warning.
        """
        self._cache.mkdir(parents=True, exist_ok=True)
        prompts = [self._prompt(solution) for solution in solutions]
        unknown = [prompt for prompt in dict.fromkeys(prompts) if not self._file(prompt).exists()]
        asked = unknown[:max_requests]
        logger.info(
            "%d different solutions, %d opinions are known; %d will be asked for",
            len(set(prompts)), len(set(prompts)) - len(unknown), len(asked),
        )  # fmt: skip
        with StopSignal(), ThreadPoolExecutor(_AT_ONCE) as pool, Progress(len(asked), "judging", "solutions") as bar:
            futures = [pool.submit(self._ask, prompt, bar) for prompt in asked]
            try:
                unusable = sum(not future.result() for future in futures)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if unusable:
            logger.warning("%d of %d answers named no step and type: they are not kept", unusable, len(asked))
        return [
            self._read(prompt, len(steps_of(solution["text"])))
            for prompt, solution in zip(prompts, solutions, strict=True)
        ]

    def _prompt(self, solution: Mapping[str, str]) -> str:
        steps = "\n".join(f"{i}. {step}" for i, step in enumerate(steps_of(solution["text"][:_MAX_CHARS]), start=1))
        return _PROMPT.format(question=solution["question"], answer=solution["answer"], steps=steps)

    def _file(self, prompt: str) -> Any:
        name = hashlib.sha256(f"{self._model}\n{prompt}".encode()).hexdigest()
        return self._cache / f"{name}.json"

    def _ask(self, prompt: str, bar: Progress) -> bool:
        """Whether the answer has the form that was asked for; only then it is kept."""
        StopSignal.heed()
        try:
            answer = self._client.chat.completions.create(
                model=self._model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=_MAX_TOKENS
            )
        except openai.OpenAIError as error:
            raise RunError(f"{self._client.base_url} does not answer: {first_line(error)}") from error
        bar.update()
        text = (answer.choices[0].message.content or "") if answer.choices else ""
        if _opinion(text) is None:
            return False
        write_json(self._file(prompt), {"model": self._model, "text": text})
        return True

    def _read(self, prompt: str, num_steps: int) -> Opinion | None:
        file = self._file(prompt)
        if not file.exists():
            return None
        with damage_named(file, "remove it"):
            opinion = _opinion(json.loads(file.read_text())["text"])
        return opinion if opinion is not None and 0 <= opinion.step < num_steps else None


def _opinion(text: str) -> Opinion | None:
    """What the last lines of an answer say."""
    steps = re.findall(r"STEP:\s*\**(\d{1,4})\b", text)
    types = re.findall(r"TYPE:\s*\**(calculation|reasoning)", text, re.IGNORECASE)
    return Opinion(int(steps[-1]) - 1, types[-1].lower()) if steps and types else None
