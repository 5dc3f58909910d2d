"""The texts that a model is given: a question in the template, behind worked examples where a base model needs them."""

import hashlib
import json

import pydantic

from data_pipeline.cli import logger
from data_pipeline.settings import Settings, UsageError
from data_pipeline.tasks import Problem, read_problems
from data_pipeline.templates import Template

_BETWEEN = "\n\n"


class PromptSettings(Settings):
    """What stands before a question."""

    task: str
    shots: pydantic.NonNegativeInt = pydantic.Field(
        0, description="worked examples before each question; a response then ends where another question begins"
    )
    shots_source: str | None = pydantic.Field(
        None, description="file whose first rows they are; none: the training split of the task's public source"
    )


class Prompts:
    """Renders questions. `stop` ends a response where the model goes on with an example of its own.

    Raises UsageError where there are fewer examples than asked for.
    """

    def __init__(self, settings: PromptSettings, template: Template):
        self._template = template
        self._shots: list[tuple[str, str]] = []  # question, and its whole example
        self._count = settings.shots
        self.stop: tuple[str, ...] = ()
        if not settings.shots:
            return
        try:
            examples = read_problems(settings.task, "train", settings.shots_source)[: settings.shots + 1]
        except UsageError as error:
            raise UsageError(f"the worked examples of --shots (--shots-source names their file): {error}") from error
        if len(examples) < settings.shots:
            raise UsageError(f"shots={settings.shots}: there are {len(examples)} examples to take them from")
        self._shots = [(problem.question, self._example(problem) + _BETWEEN) for problem in examples]
        begins = template.prompt.partition("{question}")[0].strip()
        if begins:
            self.stop = (_BETWEEN + begins,)
        else:
            logger.warning("the template begins with the question: nothing but --stop ends a response before the next")

    def render(self, problem: Problem) -> str:
        """The whole text of a problem's prompt. Its own solution is not among the examples."""
        shots = [example for question, example in self._shots if question != problem.question][: self._count]
        return "".join(shots) + self._template.render_prompt(problem.question)

    @property
    def sha256(self) -> str:
        """Of the examples."""
        return hashlib.sha256(json.dumps([self._count, self._shots]).encode()).hexdigest()

    def _example(self, problem: Problem) -> str:
        prompt = self._template.render_prompt(problem.question)
        response = self._template.render_response(problem.solution, problem.answer)
        return prompt + ("" if prompt[-1:].isspace() else " ") + response
