"""The batch job that draws samples: one immutable part file per problem, resumable at any moment."""

import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import pydantic
from etils import epath

from data_pipeline.cli import Stopped, StopSignal, logger, make_folder
from data_pipeline.files import write_json, write_json_lines
from data_pipeline.progress import Progress
from data_pipeline.settings import UsageError
from data_pipeline.tasks import TASKS, Problem
from data_pipeline.tasks import read_problems as read_task
from data_pipeline.tokenizer import Tokenizer
from eval.files import part_name, parts, read_problems, read_run
from mathscale_jax.checkpoint import Checkpoint, open_checkpoint
from mathscale_jax.checksums import fingerprint
from mathscale_jax.sampler import ProblemSamples, Prompt, Sampler, SamplingSettings


class SampleSettings(SamplingSettings):
    """`eval sample`: draws samples of a task's problems from a checkpoint."""

    checkpoint: str = pydantic.Field(description="checkpoint or run folder; @STEP or @best behind it, else the newest")
    task: str = pydantic.Field(description=f"one of {', '.join(TASKS)}")
    split: str = pydantic.Field("test", description="split of the task")
    source: str | None = pydantic.Field(None, description="file of rows; none takes the task's public source")
    num_problems: pydantic.PositiveInt | None = pydantic.Field(None, description="only the first ones; none: all")
    dtype: Literal["bfloat16", "float32"] = pydantic.Field("bfloat16", description="of weights and activations")
    out: str = pydantic.Field(description="eval folder")


def sample(settings: SampleSettings) -> epath.Path:
    """Draws what is not there yet; returns the eval folder.

    A prompt that fills the model's context is recorded as an error and does not stop the job. Raises UsageError
    where the folder belongs to other samples; Stopped where a signal ended the job between two problems.
    """
    out = epath.Path(settings.out)
    make_folder(out / "samples", "--out")
    problems = read_task(settings.task, settings.split, settings.source)[: settings.num_problems]
    checkpoint = open_checkpoint(settings.checkpoint)
    logger.info("loading %s as %s", checkpoint.name, settings.dtype)
    sampler = Sampler.of(checkpoint, settings.dtype)
    prompts = [_prompt(problem, checkpoint) for problem in problems]
    _open_folder(out, _run(settings, checkpoint, sampler, problems), problems)

    todo = [i for i in range(len(problems)) if not (out / "samples" / part_name(i)).exists()]
    done = len(problems) - len(todo)
    if done:
        logger.info("%d of %d problems are sampled already", done, len(problems))
    num_tokens, started = 0, time.monotonic()
    with StopSignal() as stop, Progress(len(problems), "sampling", "problems", done=done) as bar:
        for index in todo:
            try:
                sampler.room(prompts[index], settings)
            except UsageError as error:
                logger.warning("%s: recorded as an error", error)
                rows = _failed(problems[index], settings.num_samples)
            else:
                (drawn,) = sampler.sample([prompts[index]], settings)
                rows = _rows(drawn, checkpoint.tokenizer)
            write_json_lines(out / "samples" / part_name(index), rows)
            num_tokens += sum(row["num_tokens"] for row in rows)
            bar.update(1, f"{num_tokens / (time.monotonic() - started):,.0f} useful tokens/s")
            if stop.exit_code is not None and index != todo[-1]:
                saved = f"{bar.done} of {len(problems)} problems saved"
                raise Stopped(f"stopped with {saved}; the same command goes on", stop.exit_code)
    return out


def _prompt(problem: Problem, checkpoint: Checkpoint) -> Prompt:
    text = checkpoint.meta.template.render_prompt(problem.question)
    return Prompt(problem.id, checkpoint.tokenizer.encode_prompt(text))


def _rows(drawn: ProblemSamples, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [
        {
            "problem_id": drawn.problem_id,
            "sample_id": sample_id,
            "text": tokenizer.decode(tokens.tolist()),
            "num_tokens": len(tokens),
            "finish_reason": reason,
        }
        for sample_id, (tokens, reason) in enumerate(zip(drawn.tokens, drawn.finish_reasons, strict=True))
    ]


def _failed(problem: Problem, num_samples: int) -> list[dict[str, Any]]:
    row = {"problem_id": problem.id, "text": "", "num_tokens": 0, "finish_reason": "error"}
    return [{**row, "sample_id": sample_id} for sample_id in range(num_samples)]


def _run(
    settings: SampleSettings, checkpoint: Checkpoint, sampler: Sampler, problems: Sequence[Problem]
) -> dict[str, Any]:
    """run.json: what determines the samples, its hash, and what they were made with."""
    texts = json.dumps([dataclasses.asdict(problem) for problem in problems], sort_keys=True)
    determining = {
        "task": settings.task,
        "split": settings.split,
        "num_problems": len(problems),
        "problems_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "weights": fingerprint(sampler.params),
        "model": checkpoint.meta.model.model_dump(mode="json"),
        "template": checkpoint.meta.template.model_dump(mode="json"),
        "tokenizer_sha256": checkpoint.meta.tokenizer_sha256,
        "dtype": settings.dtype,
        **{name: getattr(settings, name) for name in SamplingSettings.model_fields},
        # Other hardware, or another version of jax, may round otherwise and so draw other texts.
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    digest = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()
    versions = {name: importlib.metadata.version(name) for name in ("mathscale-jax", "jaxlib", "flax")}
    return {
        **determining,
        "hash": digest,
        "checkpoint": checkpoint.name,
        "lineage": checkpoint.meta.lineage,
        "source": settings.source,
        "made_with": versions,
    }


def _open_folder(out: epath.Path, run: dict[str, Any], problems: Sequence[Problem]) -> None:
    """Begins the folder, or checks that it belongs to the same samples, of these problems or the first of them."""
    rows = [{"problem_id": problem.id, **dataclasses.asdict(problem)} for problem in problems]
    for row in rows:
        del row["id"]
    if (out / "run.json").exists():
        before = read_run(out)
        told = {"hash", "checkpoint", "lineage", "source", "made_with"}
        changed = {key for key in run if key not in told and before.get(key) != run[key]}
        if not changed:
            return
        if changed == {"num_problems", "problems_sha256"} and rows[: before["num_problems"]] == read_problems(out):
            logger.info("%d problems instead of %d: the first ones are kept", len(rows), before["num_problems"])
        else:
            if "dtype" in changed:
                changed -= {"weights"}  # they are hashed as they are used
            listed = "\n  ".join(f"{key}: {before.get(key)!r} -> {run[key]!r}" for key in run if key in changed)
            raise UsageError(f"{out} holds the samples of another run:\n  {listed}\nchoose another --out")
    elif parts(out, "samples"):
        raise UsageError(f"{out} holds samples but no run.json that says of what: choose another --out")
    write_json_lines(out / "problems.jsonl", rows)
    write_json(out / "run.json", run)
