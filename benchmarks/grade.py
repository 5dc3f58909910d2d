"""python -m benchmarks.grade: how long does grading take, and is it right where math-verify, called directly, is not?

    python -m benchmarks.grade --task math --source math_test.jsonl.gz
    python -m benchmarks.grade --task gsm8k --source gsm8k_test.jsonl.gz

For every problem of the task, `num_samples` responses with `num_answers` different answers are made: a quarter of the
answers are the gold one in another spelling, the others are wrong: gold ones with a digit or a sign changed, and those
of other problems. `python -m eval grade` grades them all, in as many processes as it takes by itself.

Some of the pairs of answer and gold answer are then judged by one process, by our `is_correct` and by math-verify's
parse and verify in turn. Which pairs are right is known, as they were made so.
"""

import dataclasses
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic

from benchmarks.flags import settings_and_command
from benchmarks.report import environment, table, write_results
from data_pipeline.cli import RunError, logger, run_command
from data_pipeline.files import write_json_lines
from data_pipeline.settings import Settings
from data_pipeline.tasks import Problem, get_task, read_problems
from eval.grade import is_correct

Pair = tuple[str, str, bool]  # answer, gold, whether it is right
_PART = 8  # problems in a file, as `eval sample` makes them with 256 samples


class GradeSettings(Settings):
    """What is measured."""

    task: str = pydantic.Field(description="task of the problems")
    source: str = pydantic.Field(description="file of its problems")
    num_samples: pydantic.PositiveInt = pydantic.Field(256, description="responses to a problem")
    num_answers: pydantic.PositiveInt = pydantic.Field(20, description="different answers among them")
    num_problems: pydantic.PositiveInt | None = pydantic.Field(None, description="only the first ones; none: all")
    pairs: pydantic.PositiveInt = pydantic.Field(2000, description="pairs for the comparison with math-verify")
    rounds: pydantic.PositiveInt = pydantic.Field(3, description="times that the pairs are compared by each in turn")
    seed: pydantic.NonNegativeInt = pydantic.Field(0, description="of answers and their order")
    out: str | None = pydantic.Field(None, description="folder for the results as Markdown and JSON")


def spellings(gold: str) -> list[str]:
    """The same answer, written otherwise."""
    told = [gold, f" {gold} ", gold.replace(" ", ""), gold.replace(r"\frac", r"\dfrac"), rf"\text{{ }}{gold}"]
    told.append(gold.replace("(", r"\left(").replace(")", r"\right)") if r"\left" not in gold else gold)
    if re.fullmatch(r"-?\d+", gold):
        told += [f"{gold}.0", f"x = {gold}", rf"\frac{{{2 * int(gold)}}}{{2}}", f"{int(gold):,}"]
    fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", gold)
    if fraction is not None:
        sign, top, bottom = fraction.groups()
        told += [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{3 * int(top)}}}{{{3 * int(bottom)}}}"]
    return told


def wrong_answer(gold: str, others: Sequence[str], rng: random.Random) -> str:
    """Another answer: the gold one changed, or that of another problem."""
    digits = [match.start() for match in re.finditer(r"\d", gold)]
    if digits and rng.random() < 0.5:
        place = rng.choice(digits)
        return f"{gold[:place]}{(int(gold[place]) + rng.randint(1, 8)) % 10}{gold[place + 1 :]}"
    return rng.choice(others)


def answers(problem: Problem, others: Sequence[str], settings: GradeSettings, rng: random.Random) -> list[Pair]:
    """Different answers to a problem; of wrong ones those that are certainly wrong."""
    gold = problem.answer
    right = sorted(set(spellings(gold)))
    found: dict[str, Pair] = {
        text: (text, gold, True) for text in rng.sample(right, min(len(right), settings.num_answers // 4))
    }
    for _ in range(20 * settings.num_answers):
        if len(found) == settings.num_answers:
            break
        text = wrong_answer(gold, others, rng)
        if _bare(text) != _bare(gold):
            found.setdefault(text, (text, gold, False))
    return list(found.values())


def _bare(text: str) -> str:
    """Digits and letters alone: two answers of the same ones may be the same after all, and are left out."""
    return "".join(sorted(re.sub(r"\\(?:[dt]?frac|left|right|text|mbox|circ|pi|sqrt)|[^\w]", "", text)))


def write_folder(
    folder: Path, problems: Sequence[Problem], every: Sequence[Sequence[Pair]], settings: GradeSettings
) -> int:
    """An eval folder whose responses are a solution's text with one of the answers; returns how many bytes it holds."""
    rng = random.Random(settings.seed)
    (folder / "samples").mkdir()
    rows = [dataclasses.asdict(problem) | {"problem_id": problem.id} for problem in problems]
    write_json_lines(folder / "problems.jsonl", rows)
    run = {"task": settings.task, "split": "test", "num_problems": len(problems), "num_samples": settings.num_samples}
    (folder / "run.json").write_text(json.dumps({**run, "temperature": 0.7, "max_tokens": 2048, "checkpoint": "none"}))
    for first in range(0, len(problems), _PART):
        group = range(first, min(first + _PART, len(problems)))
        name = f"part-{group[0]:05d}-{group[-1]:05d}.jsonl"
        write_json_lines(folder / "samples" / name, _samples(problems, every, group, settings, rng))
    return sum(path.stat().st_size for path in (folder / "samples").iterdir())


def _samples(
    problems: Sequence[Problem],
    every: Sequence[Sequence[Pair]],
    group: range,
    settings: GradeSettings,
    rng: random.Random,
) -> Iterator[dict[str, Any]]:
    for index in group:
        body = re.sub(r"\\boxed|\\fbox|####|answer", "", problems[index].solution)[:1000]
        for sample_id in range(settings.num_samples):
            text = f"{body}\nThe answer is: {rng.choice(every[index])[0]}."
            key = {"problem_id": problems[index].id, "sample_id": sample_id}
            yield {**key, "text": text, "num_tokens": len(text) // 3, "finish_reason": "eos"}


def grade_all(folder: Path) -> float:
    """Seconds that the command takes, from its start to its end. Raises RunError."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "eval", "grade", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RunError(f"grading failed: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def math_verify(answer: str, gold: str) -> bool:
    """As its documentation says, each text in dollar signs; its own time limits are off, as they cost nothing here."""
    import math_verify

    read = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (gold, answer))
    return math_verify.verify(*read, timeout_seconds=None)


def compared(pairs: Sequence[Pair], by: Callable[[str, str], bool | None]) -> tuple[float, int, int]:
    """Seconds; right answers that were called wrong; wrong ones that were called right."""
    started = time.perf_counter()
    verdicts = [bool(by(answer, gold)) for answer, gold, _ in pairs]
    seconds = time.perf_counter() - started
    wrong = [(verdict, right) for verdict, (_, _, right) in zip(verdicts, pairs, strict=True) if verdict != right]
    return seconds, sum(right for _, right in wrong), sum(not right for _, right in wrong)


def benchmark(settings: GradeSettings, command: str) -> None:
    """Measures, prints, and writes the results."""
    load = os.getloadavg()[0]
    kind = get_task(settings.task).graded_as
    problems = read_problems(settings.task, "test", settings.source)[: settings.num_problems]
    golds = sorted({problem.answer for problem in problems})
    rng = random.Random(settings.seed)
    every = [answers(problem, golds, settings, rng) for problem in problems]

    with tempfile.TemporaryDirectory() as temporary:
        logger.info("writing %d responses", len(problems) * settings.num_samples)
        num_bytes = write_folder(Path(temporary), problems, every, settings)
        logger.info("grading them")
        seconds = grade_all(Path(temporary))
        metrics = json.loads((Path(temporary) / "metrics.json").read_text())
    num_samples = len(problems) * settings.num_samples
    job = table(
        ["job", "seconds", "samples/s", "different answers", "killed"],
        [[f"{len(problems):,} problems x {settings.num_samples}, {num_bytes / 1e9:.2f} GB", f"{seconds:.1f}",
          f"{num_samples / seconds:,.0f}", f"{sum(map(len, every)):,}", str(metrics["killed"])]],
    )  # fmt: skip
    print(job, flush=True)

    pairs = rng.sample([pair for of in every for pair in of], min(settings.pairs, sum(map(len, every))))
    contestants: dict[str, Callable[[str, str], bool | None]] = {
        "ours": lambda answer, gold: is_correct(f"The answer is: {answer}", gold, kind),
        "math-verify, directly": math_verify,
    }
    rounds: dict[str, list[tuple[float, int, int]]] = {name: [] for name in contestants}
    for by in contestants.values():
        by("1", "2")  # imports, and starts its process
    for _ in range(settings.rounds):
        for name, by in contestants.items():
            rounds[name].append(compared(pairs, by))
            logger.info("%s: %.1f s for %d pairs", name, rounds[name][-1][0], len(pairs))
    num_right = sum(right for *_, right in pairs)
    lines = []
    for name, results in rounds.items():
        ratios = [theirs[0] / mine[0] for theirs, mine in zip(rounds["math-verify, directly"], results, strict=True)]
        took = statistics.median(seconds for seconds, _, _ in results)
        faster = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        errors = [f"{results[0][1]} of {num_right}", f"{results[0][2]} of {len(pairs) - num_right}"]
        lines.append([name, f"{1e3 * took / len(pairs):.2f}", faster, *errors])
    body = table(["one process", "ms a pair", "faster by", "right called wrong", "wrong called right"], lines)
    print(body, flush=True)
    if settings.out is not None:
        values = {
            "settings": settings.model_dump(exclude={"out"}), "job_seconds": seconds, "num_samples": num_samples,
            "bytes": num_bytes, "num_pairs": len(pairs), "rounds": rounds,
        }  # fmt: skip
        where = environment("cpu", load)
        logger.info(
            "wrote %s",
            write_results(settings.out, f"grade {settings.task}", where, command, f"{job}\n\n{body}", values),
        )


def _main(argv: Sequence[str] | None) -> None:
    benchmark(*settings_and_command("benchmarks.grade", __doc__, GradeSettings, argv))


if __name__ == "__main__":
    run_command(_main)
