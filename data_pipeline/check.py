"""`check TASK`: whether each training text, graded as a model's response would be, is right.

A text ends with its gold answer, so that its grade says whether the grader reads that answer as it is written. A
solution that itself announces another one (in a box, or as "The answer is …") makes it wrong, too.
"""

import dataclasses
import re

import pydantic

from data_pipeline.answers import Kind, extract, is_equal
from data_pipeline.cli import logger
from data_pipeline.problem import Problem
from data_pipeline.progress import progress
from data_pipeline.settings import Settings, UsageError
from data_pipeline.tasks import get_task
from data_pipeline.templates import Template, load_template

_MAY_ANNOUNCE = re.compile(r"\\boxed|####|answer", re.IGNORECASE)  # what the rules below look for
_ANNOUNCED = ("boxed", "answer_line", "hash_line")  # rules that find what is meant as an answer


class CheckSettings(Settings):
    """`check TASK`: grades the text that a model is trained to write for each problem against its gold answer."""

    source: str | None = pydantic.Field(None, description="file, folder or dataset; none takes the public place")
    split: str | None = pydantic.Field(None, description="split of the task; none takes train, or the only one")
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
    only = len(definition.splits) == 1
    split = settings.split or (next(iter(definition.splits)) if only else "train")
    problems = definition.problems(split, settings.source)
    for problem in progress(problems, f"{task}/{split}", "problems"):
        count += 1
        found = graded_wrong(problem, kind, template)
        if found is not None:
            wrong.append(found)
            logger.info("%s: gold %r, read %r (%s)", problem.id, problem.answer, found.answer, found.rule)
    if not count:
        raise UsageError(f"task={task} split={split} source={settings.source}: no problem was read")
    logger.info("%s of %s texts are graded right (%.2f %%)", f"{count - len(wrong):,}", f"{count:,}",
                100 * (1 - len(wrong) / count))  # fmt: skip
    return count, wrong


def graded_wrong(problem: Problem, kind: Kind, template: Template) -> WrongRow | None:
    """None where the problem's own text is graded right, and its solution announces no other answer."""
    texts = [template.render_response(problem.solution, problem.answer)]
    if _MAY_ANNOUNCE.search(problem.solution):
        texts.append(problem.solution)
    for text in texts:
        found = extract(text, kind)
        if text is not texts[0] and found.rule not in _ANNOUNCED:
            continue
        if found.answer is None or not is_equal(found.answer, problem.answer, kind):
            return WrongRow(problem, found.answer, found.rule or "no answer")
    return None
