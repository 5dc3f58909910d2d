"""`eval errors`: what goes wrong in the wrong samples of a graded folder, by program and, if asked for, by a judge."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydantic
from etils import epath

from data_pipeline.answers import GRADER_VERSION
from data_pipeline.cli import RunError, logger
from data_pipeline.files import write_json
from data_pipeline.settings import Settings
from eval.errors import TYPES, Examined, error_types, examine
from eval.files import metrics_digest, parts, read_grades, read_problems, read_run, read_samples
from eval.judge import Judge, Opinion


class ErrorSettings(Settings):
    """`eval errors DIR`: types of errors, and where the first one stands."""

    num_samples: pydantic.PositiveInt = pydantic.Field(
        2000, description="wrong samples that are examined, at most; drawn evenly from all of them"
    )
    endpoint: str | None = pydantic.Field(
        None, description="URL of an OpenAI-compatible server whose model judges, too"
    )
    model: str | None = pydantic.Field(None, description="name of the model at the endpoint")
    max_requests: pydantic.NonNegativeInt = pydantic.Field(
        200, description="solutions that the model is asked about, at most; those it has judged before are free"
    )
    seed: pydantic.NonNegativeInt = pydantic.Field(0, description="which samples, where there are more")

    @pydantic.model_validator(mode="after")
    def _one_judge(self) -> "ErrorSettings":
        if (self.endpoint is None) != (self.model is None):
            raise ValueError("--endpoint and --model go together")
        return self


def diagnose(folder: epath.Path, settings: ErrorSettings) -> dict[str, Any]:
    """Examines wrong samples, each as likely as any other, writes errors.json, and returns what it holds.

    Raises UsageError where `folder` is no eval folder, RunError where no sample is wrong or the judge does not answer.
    """
    read_run(folder)
    wrong, num_in_all = _wrong_samples(folder, settings)
    examined = [examine(sample["text"]) for sample in wrong]
    told: dict[str, Any] = {
        "grader_version": GRADER_VERSION,
        "metrics_sha256": metrics_digest(folder),
        "seed": settings.seed,
        "num_wrong_in_all": num_in_all,
        "program": error_types(examined, [sample["problem_id"] for sample in wrong]),
    }
    if settings.endpoint is not None:
        assert settings.model is not None
        opinions = Judge(settings.endpoint, settings.model).opinions(wrong, settings.max_requests)
        told["judge"] = {"model": settings.model, **_opinions(opinions, examined)}
        told["agreement"] = agreement(examined, opinions)
    write_json(folder / "errors.json", told)
    logger.info("%s", summary(told))
    return told


def summary(told: dict[str, Any]) -> str:
    """The result in a line or two."""
    program = told["program"]
    checkable = program["num_wrong"] - program["not_checkable"]
    lines = [
        f"{program['num_wrong']} of {told['num_wrong_in_all']} wrong samples; {checkable} state equations to check"
    ]
    if checkable:
        shares = {name: 100 * program["shares"][name]["value"] for name in TYPES}
        lines[0] += (
            f", of which {shares['calculation']:.0f} % state a false one (calculation), "
            f"{shares['reasoning']:.0f} % only true ones (reasoning)"
        )
    if "judge" in told and told["judge"]["num_judged"]:
        judge, both = told["judge"], told["agreement"]
        share = 100 * judge["calculation"] / judge["num_judged"]
        lines.append(
            f"{judge['model']} on {judge['num_judged']} of them: {share:.0f} % calculation, "
            f"first error after {100 * judge['first_error_position']:.0f} % of the steps"
        )
        if both["num_both"]:
            lines.append(f"they agree on the type of {100 * both['same_type']:.0f} % (kappa {both['kappa']:.2f})")
    return "\n".join(lines)


def agreement(examined: Sequence[Examined], opinions: Sequence[Opinion | None]) -> dict[str, Any]:
    """How often program and judge name the same type, with Cohen's kappa, and the same step of a false equation."""
    pairs = [(e, o) for e, o in zip(examined, opinions, strict=True) if e.error is not None and o is not None]
    same = [e.error == o.error for e, o in pairs]
    steps = [e.first_false == o.step for e, o in pairs if e.first_false is not None and o.error == "calculation"]
    told: dict[str, Any] = {"num_both": len(pairs), "same_type": None, "kappa": None, "same_step": None}
    if pairs:
        a, b = (
            np.mean([each == "calculation" for each in of])
            for of in zip(*((e.error, o.error) for e, o in pairs), strict=True)
        )
        chance = a * b + (1 - a) * (1 - b)
        told["same_type"] = float(np.mean(same))
        told["kappa"] = float((np.mean(same) - chance) / (1 - chance)) if chance < 1 else 1.0
    if steps:
        told["same_step"] = float(np.mean(steps))
    return told


def _opinions(opinions: Sequence[Opinion | None], examined: Sequence[Examined]) -> dict[str, Any]:
    given = [(o, e.num_steps) for o, e in zip(opinions, examined, strict=True) if o is not None]
    return {
        "num_judged": len(given),
        **{name: sum(o.error == name for o, _ in given) for name in ("calculation", "reasoning")},
        "first_error_position": float(np.mean([o.step / steps for o, steps in given])) if given else None,
    }


def _wrong_samples(folder: epath.Path, settings: ErrorSettings) -> tuple[list[dict[str, str]], int]:
    """Problem, question, answer and text of the wrong samples that are drawn, and how many there are in all."""
    wrong = [
        (row["problem_id"], row["sample_id"])
        for row in read_grades(folder)
        if not row["correct"] and row["finish_reason"] != "error"  # which was never drawn
    ]
    if not wrong:
        raise RunError(f"{folder} holds no wrong sample: is it graded? `python -m eval grade {folder}` does that")
    chosen = set(random.Random(settings.seed).sample(wrong, min(settings.num_samples, len(wrong))))
    problems = {row["problem_id"]: row for row in read_problems(folder)}
    texts: dict[tuple[str, int], dict[str, str]] = {}
    for part in parts(folder, "samples"):
        for sample in read_samples(part, problems)[0]:
            key = (sample["problem_id"], sample["sample_id"])
            if key in chosen and key not in texts:
                problem = problems[key[0]]
                texts[key] = {
                    "problem_id": key[0],
                    "question": problem["question"],
                    "answer": problem["answer"],
                    "text": sample["text"],
                }
    return list(texts.values()), len(wrong)
