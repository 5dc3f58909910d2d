"""Was a model trained on the test set? The language-model loss on sets that differ in one thing each.

After arXiv 2403.04706, table 6: d1 = loss(test) - loss(new), d2 = loss(test) - loss(train). `test` and `train` hold the
benchmark's questions with answers that one teacher wrote anew, `new` questions that it made from the test set's. d1
near 0 with d2 well above says that the test set is as unknown to the model as questions nobody has seen.
"""

import math
from typing import Any, Literal

import jax
import numpy as np
import pydantic
from etils import epath
from jaxtyping import Float

from data_pipeline.cli import logger
from data_pipeline.files import write_json
from data_pipeline.loader import Batches, DataSettings, Source, load_rows
from data_pipeline.progress import progress
from data_pipeline.settings import Settings
from data_pipeline.tasks import TASKS
from eval.metrics import NUM_RESAMPLES, resamples
from mathscale_jax.checkpoint import Checkpoint, open_checkpoint
from mathscale_jax.config import ComputeSettings, MeshSettings
from mathscale_jax.convert.published import Published, is_published
from mathscale_jax.mesh import make_mesh
from mathscale_jax.step import make_summed_loss, param_shardings, to_devices

_SEED = 0
SETS = ("test", "new", "train", "original")


class LeakageSettings(Settings):
    """`eval leakage`: d1 and d2 of a checkpoint on files of question-answer rows."""

    checkpoint: str = pydantic.Field(description="checkpoint or run folder, as for sample; or a Hugging Face folder")
    test: str = pydantic.Field(description="questions of the test set, with regenerated answers")
    new: str = pydantic.Field(description="new questions made from the test set, with answers by the same teacher")
    train: str = pydantic.Field(description="questions of the training set, with regenerated answers")
    original: str | None = pydantic.Field(None, description="the test set with its own answers, for comparison")
    task: str = pydantic.Field("jsonl", description=f"how the files are read; one of {', '.join(TASKS)}")
    num_rows: pydantic.PositiveInt | None = pydantic.Field(None, description="only the first rows of each file")
    batch_size: pydantic.PositiveInt = pydantic.Field(8, description="examples that are computed at once, a device")
    dtype: Literal["bfloat16", "float32"] = pydantic.Field("bfloat16", description="of the computation")
    out: str | None = pydantic.Field(None, description="write the result as JSON, too")


def leakage(settings: LeakageSettings) -> dict[str, Any]:
    """The mean NLL of an answer's token in nats on each set, given its question; d1 and d2 with 95 % intervals.

    Intervals resample batches of examples. Raises UsageError where a file or the checkpoint cannot be read.
    """
    path = settings.checkpoint
    weights: Published | Checkpoint = Published(path) if is_published(path) else open_checkpoint(path)
    files = {name: getattr(settings, name) for name in SETS if getattr(settings, name) is not None}
    config = weights.meta.model
    mesh = make_mesh(MeshSettings())
    rows_at_once = settings.batch_size * jax.device_count()
    data = {
        name: DataSettings(
            sources=(Source(task=settings.task, split="test", path=file),), context=config.max_context, layout="padded"
        )
        for name, file in files.items()
    }
    rows = {}
    for name, source in data.items():
        read = load_rows(source, weights.tokenizer, weights.meta.template)
        if settings.num_rows is not None:
            read = read.select(np.arange(min(settings.num_rows, len(read))))
        rows[name] = read
    compute = ComputeSettings(dtype=settings.dtype, remat="none")
    longest = max(int(of_set.input_lengths.max()) for of_set in rows.values())
    context = math.ceil(longest / compute.loss_chunk) * compute.loss_chunk
    params = weights.restore_params(param_shardings(config, mesh), "float32")
    summed_loss = make_summed_loss(config, compute, mesh)
    sums: dict[str, Float[np.ndarray, "batches 2"]] = {}
    with jax.set_mesh(mesh):
        for name, of_set in rows.items():
            narrow = data[name].model_copy(update={"context": context})
            batches = Batches(of_set, narrow, batch_size=rows_at_once, seed=_SEED, num_epochs=1)
            results = [
                jax.device_get(summed_loss(params, None, to_devices(batches[step], mesh, rows_at_once)))
                for step in progress(range(len(batches)), name, "batches")
            ]
            sums[name] = np.array([[float(nll), int(tokens)] for nll, tokens in results])
    told = differences(sums)
    told = {"checkpoint": weights.name, "num_examples": {name: len(of_set) for name, of_set in rows.items()}, **told}
    if settings.out is not None:
        write_json(epath.Path(settings.out), told)
    logger.info("%s", summary(told))
    return told


def differences(sums: dict[str, Float[np.ndarray, "batches 2"]]) -> dict[str, Any]:
    """Losses, d1 and d2, from (sum of the NLL, tokens) of each batch of each set."""
    losses = {name: _losses(of_set) for name, of_set in sums.items()}
    told: dict[str, Any] = {"loss": {name: _with_interval(of_set) for name, of_set in losses.items()}}
    for name, other in (("d1", "new"), ("d2", "train")):
        told[name] = _with_interval(losses["test"] - losses[other])
    return told


def summary(told: dict[str, Any]) -> str:
    """The result in words."""
    losses = ", ".join(f"{name} {entry['value']:.3f}" for name, entry in told["loss"].items())
    lines = [f"loss of a token: {losses}"]
    for name, what in (("d1", "test - new"), ("d2", "test - train")):
        low, high = told[name]["ci95"]
        lines.append(f"{name} = {what} = {told[name]['value']:+.3f} [{low:+.3f}, {high:+.3f}]")
    known = told["d1"]["ci95"][1] < 0  # the test set is easier than questions that nobody has seen
    lines.append(
        "the test set is more familiar to this model than new questions are: it may have been trained on it"
        if known
        else "no sign that the test set was trained on: it is as unknown to this model as new questions are"
    )
    return "\n".join(lines)


def _losses(sums: Float[np.ndarray, "batches 2"]) -> Float[np.ndarray, "resamples+1"]:
    """The loss of the set, and of its resamples."""
    drawn = np.concatenate([np.ones((1, len(sums))), resamples(len(sums), NUM_RESAMPLES, _SEED)]) @ sums
    return drawn[:, 0] / drawn[:, 1]


def _with_interval(values: Float[np.ndarray, "resamples+1"]) -> dict[str, Any]:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "ci95": [float(low), float(high)]}
