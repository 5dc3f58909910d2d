"""`check TASK`: whether each training text, graded as a model's response would be, is right."""

import dataclasses

import pydantic

from data_pipeline.answers import Kind, extract, is_equal
from data_pipeline.cli import logger
from data_pipeline.problem import Problem
from data_pipeline.progress import progress
from data_pipeline.settings import Settings, UsageError
from data_pipeline.tasks import get_task
from data_pipeline.templates import Template, load_template


class CheckSettings(Settings):
    """`check TASK`: grades the text that a model is trained to write for each problem against its gold answer."""

    source: str | None = pydantic.Field(None, description="file, folder or dataset; none takes the public place")
    split: str = pydantic.Field("train", description="split of the task")
    template: str | None = pydantic.Field(None, description="chat template: a YAML file; none takes our own")


@dataclasses.dataclass(frozen=True)
class WrongRow:
    """A problem whose own text is graded wrong, and the answer that was read in it, with the rule that found it."""

    problem: Problem
    answer: str | None
    rule: str


def check(task: str, settings: CheckSettings) -> tuple[int, list[WrongRow]]:
    """How many problems were checked, and those whose own text is graded wrong, which it lists. Raises UsageError."""
    definition, template = get_task(task), load_template(settings.template)
    kind, count, wrong = definition.graded_as, 0, []
    problems = definition.problems(settings.split, settings.source)
    for problem in progress(problems, f"{task}/{settings.split}", "problems"):
        count += 1
        found = graded_wrong(problem, kind, template)
        if found is not None:
            wrong.append(found)
            logger.info("%s: gold %r, read %r (%s)", problem.id, problem.answer, found.answer, found.rule)
    if not count:
        raise UsageError(f"task={task} split={settings.split}: no problem was read")
    logger.info("%s of %s texts are graded right (%.2f %%)", f"{count - len(wrong):,}", f"{count:,}",
                100 * (1 - len(wrong) / count))  # fmt: skip
    return count, wrong


def graded_wrong(problem: Problem, kind: Kind, template: Template) -> WrongRow | None:
    """None where the problem's own text is graded right."""
    extracted = extract(template.render_response(problem.solution, problem.answer), kind)
    if extracted.answer is not None and is_equal(extracted.answer, problem.answer, kind):
        return None
    return WrongRow(problem, extracted.answer, extracted.rule or "no answer")
