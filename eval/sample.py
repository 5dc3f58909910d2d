"""The batch job that draws samples: immutable part files of whole problems, resumable at any moment, in shards."""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import pydantic
from etils import epath

from data_pipeline.cli import StopSignal, logger, make_folder
from data_pipeline.files import write_json, write_json_lines
from data_pipeline.progress import Progress
from data_pipeline.settings import UsageError
from data_pipeline.tasks import TASKS, Problem
from data_pipeline.tasks import read_problems as read_task
from data_pipeline.templates import load_template
from eval.endpoint import Endpoint
from eval.files import gaps, part_name, parts, problems_of, read_problems, read_run
from eval.local import Local, Row
from eval.prompts import Prompts, PromptSettings
from mathscale_jax.sampler import SamplingSettings

# A group of problems fills the rows about this many times: its last samples, few at a time, are a small part then.
_WAVES_OF_A_GROUP = 8


class SampleSettings(PromptSettings, SamplingSettings):
    """`eval sample`: draws samples of a task's problems from a checkpoint, or from a server."""

    checkpoint: str | None = pydantic.Field(
        None,
        description="checkpoint or run folder, @STEP or @best behind it, else the newest; or a Hugging Face folder",
    )
    endpoint: str | None = pydantic.Field(
        None, description="or: URL of an OpenAI-compatible server, such as http://localhost:8000/v1, with its model"
    )
    model: str | None = pydantic.Field(None, description="name of the model at the endpoint")
    template: str | None = pydantic.Field(
        None, description="prompt template of the endpoint's model, a YAML file; a checkpoint has its own"
    )
    task: str = pydantic.Field(description=f"one of {', '.join(TASKS)}")
    split: str = pydantic.Field("test", description="split of the task")
    source: str | None = pydantic.Field(None, description="file of rows; none takes the task's public source")
    num_problems: pydantic.PositiveInt | None = pydantic.Field(None, description="only the first ones; none: all")
    dtype: Literal["bfloat16", "float32"] = pydantic.Field("bfloat16", description="of weights and activations")
    kv_cache: Literal["int8"] | None = pydantic.Field(
        None, description="dtype of the responses' keys and values: int8 takes half the memory; none: as the others"
    )
    rows: pydantic.PositiveInt = pydantic.Field(
        256,
        description="samples that are decoded at once, rounded up to a power of two; eight times as many are a file",
    )
    shard: str | None = pydantic.Field(
        None, description="i/N: only every N-th group of problems, from the i-th on (0/4 to 3/4), for N such jobs"
    )
    out: str = pydantic.Field(description="eval folder")

    @pydantic.model_validator(mode="after")
    def _one_model(self) -> "SampleSettings":
        if (self.checkpoint is None) == (self.endpoint is None):
            given = "" if self.checkpoint is None else ": both are given"
            raise ValueError(f"give --checkpoint, or --endpoint with its --model{given}")
        if (self.endpoint is None) != (self.model is None):
            raise ValueError("--endpoint and --model go together")
        if self.endpoint is not None and (self.dtype != "bfloat16" or self.kv_cache is not None):
            raise ValueError("--dtype and --kv-cache are the server's own choice: leave them out with --endpoint")
        if self.template is not None and self.endpoint is None:
            raise ValueError(
                f"template={self.template!r}: a checkpoint has its own; only an endpoint's model takes one"
            )
        return self

    @pydantic.field_validator("shard")
    @classmethod
    def _is_a_shard(cls, shard: str | None) -> str | None:
        found = None if shard is None else re.fullmatch(r"(\d+)/(\d+)", shard)
        if shard is not None and not (found and int(found[1]) < int(found[2])):
            raise ValueError("must be i/N with i from 0 to N - 1, for example 0/4")
        return shard


class RunSettings(SampleSettings):
    """`eval run`: the same, and in how many processes."""

    shards: pydantic.PositiveInt | None = pydantic.Field(
        None, description="processes that share the sampling on this machine's GPUs; none: one process with all of them"
    )

    @pydantic.model_validator(mode="after")
    def _one_way_to_share(self) -> "RunSettings":
        if self.shard is not None:
            raise ValueError(f"shard={self.shard!r} is one job's share: `eval sample` draws it, `eval run` draws all")
        return self


def sample(settings: SampleSettings) -> epath.Path:
    """Draws what is not there yet; returns the eval folder.

    A prompt that fills the model's context is recorded as an error and does not stop the job. Raises UsageError
    where the folder belongs to other samples; Stopped where a signal ended the job: what is in files is kept.
    """
    out = epath.Path(settings.out)
    problems = read_task(settings.task, settings.split, settings.source)[: settings.num_problems]
    before = read_run(out) if (out / "run.json").exists() else {}
    model = _model(settings, before.get("cache_tokens"))
    prompts = Prompts(settings, model.template)
    settings = settings.model_copy(update={"stop": tuple(dict.fromkeys((*settings.stop, *prompts.stop)))})
    make_folder(out, "--out")
    make_folder(out / "samples", "--out")
    _open_folder(out, _run(settings, model, problems, prompts), problems)

    mine = list(_groups(len(problems), settings))
    if not mine:
        count = len(list(_groups(len(problems), settings.model_copy(update={"shard": None}))))
        logger.warning("shard %s has nothing to do: %d problems are %d groups", settings.shard, len(problems), count)
    covered = {index for part in parts(out, "samples") for index in problems_of(part)}
    done = sum(index in covered for group in mine for index in group)
    if done:
        logger.info("%d of %d problems are sampled already", done, sum(map(len, mine)))
    total = sum(map(len, mine)) * settings.num_samples
    num_tokens, started = 0, time.monotonic()
    with (
        StopSignal(),
        ThreadPoolExecutor(1) as writer,
        Progress(total, "sampling", "samples", done=done * settings.num_samples) as bar,
    ):

        def one_more(tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += tokens
            bar.update(1, f"{num_tokens / (time.monotonic() - started):,.0f} useful tokens/s")

        written: Future[None] | None = None  # while the next group is drawn
        # Of a group that was cut off at the end of fewer problems, the others are left.
        for group in (missing for whole in mine for missing in gaps(whole, covered)):
            of_group = [problems[index] for index in group]
            drawn = model.draw({problem.id: prompts.render(problem) for problem in of_group}, settings, one_more)
            if written is not None:
                written.result()
            written = writer.submit(write_json_lines, out / "samples" / part_name(group), _rows(of_group, drawn))
        if written is not None:
            written.result()
    return out


def _model(settings: SampleSettings, cache_tokens: int | None) -> Local | Endpoint:
    if settings.endpoint is not None:
        assert settings.model is not None
        return Endpoint(settings.endpoint, settings.model, load_template(settings.template))
    assert settings.checkpoint is not None
    return Local(
        settings.checkpoint, dtype=settings.dtype, kv_cache=settings.kv_cache, rows=settings.rows,
        cache_tokens=cache_tokens,  # as planned where the job began
    )  # fmt: skip


def _rows(problems: Sequence[Problem], drawn: Sequence[Sequence[Row]]) -> list[Row]:
    return [
        {"problem_id": problem.id, "sample_id": sample_id, **row}
        for problem, rows in zip(problems, drawn, strict=True)
        for sample_id, row in enumerate(rows)
    ]


def group_size(rows: int, num_samples: int) -> int:
    """How many problems are decoded together."""
    return max(1, _WAVES_OF_A_GROUP * rows // num_samples)


def _groups(num_problems: int, settings: SampleSettings) -> Iterator[range]:
    """The problems that are decoded together, and lie in a file together; of this shard."""
    size = group_size(settings.rows, settings.num_samples)
    shard, shards = map(int, (settings.shard or "0/1").split("/"))
    for number, first in enumerate(range(0, num_problems, size)):
        if number % shards == shard:
            yield range(first, min(first + size, num_problems))


def _run(
    settings: SampleSettings, model: Local | Endpoint, problems: Sequence[Problem], prompts: Prompts
) -> dict[str, Any]:
    """run.json: what determines the samples, its hash, and what they were made with."""
    texts = json.dumps([dataclasses.asdict(problem) for problem in problems], sort_keys=True)
    determining = {
        "task": settings.task,
        "split": settings.split,
        "num_problems": len(problems),
        "problems_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "shots": settings.shots,
        "shots_sha256": prompts.sha256,
        "rows": settings.rows,
        **settings.model_dump(mode="json", include=set(SamplingSettings.model_fields)),
        **model.told,
    }
    digest = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()
    versions = {name: importlib.metadata.version(name) for name in ("mathscale-jax", "jaxlib", "flax")}
    return {
        **determining,
        "hash": digest,
        "checkpoint": model.name,
        "lineage": model.lineage,
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
        count = before["num_problems"]
        grown = changed == {"num_problems", "problems_sha256"} and rows[:count] == read_problems(out)[:count]
        if grown:
            logger.info("%d problems instead of %d: the first ones are kept", len(rows), count)
        elif changed == {"num_problems", "problems_sha256"} and rows == read_problems(out)[: len(rows)]:
            raise UsageError(
                f"{out} holds samples of {count} problems already, the first {len(rows)} among them: "
                f"ask for as many (or leave --num-problems out), or choose another --out"
            )
        elif changed:
            if "dtype" in changed:
                changed -= {"weights"}  # they are hashed as they are used
            listed = "\n  ".join(f"{key}: {before.get(key)!r} -> {run[key]!r}" for key in run if key in changed)
            raise UsageError(f"{out} holds the samples of another run:\n  {listed}\nchoose another --out")
    elif parts(out, "samples"):
        raise UsageError(f"{out} holds samples but no run.json that says of what: choose another --out")
    # In this order: a job that ends between the two begins anew, or grows again.
    if not (out / "problems.jsonl").exists() or read_problems(out) != rows:
        write_json_lines(out / "problems.jsonl", rows)
    write_json(out / "run.json", run)
