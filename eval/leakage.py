"""Was a model trained on the test set? The language-model loss on sets that differ in one thing each.

After arXiv 2403.04706, table 6: d1 = loss(test) - loss(new), d2 = loss(test) - loss(train). `test` and `train` hold the
benchmark's questions with answers that one teacher wrote anew, `new` questions that it made from the test set's. d1
near 0 with d2 well above says that the test set is as unknown to the model as questions nobody has seen.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from data_pipeline.cli import logger
from data_pipeline.files import write_json
from data_pipeline.loader import Batches
from data_pipeline.progress import progress
from data_pipeline.settings import Settings, UsageError
from data_pipeline.sources import DataSettings, Source, load_rows
from data_pipeline.tasks import TASKS
from eval.metrics import NUM_RESAMPLES, resamples
from mathscale_jax import model
from mathscale_jax.checkpoint import Checkpoint, open_checkpoint
from mathscale_jax.config import ComputeSettings, MeshSettings, ModelConfig
from mathscale_jax.convert.published import Published, is_published
from mathscale_jax.mesh import make_mesh
from mathscale_jax.step import DeviceBatch, param_shardings, to_devices

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

    Intervals resample examples. Raises UsageError where a file or the checkpoint cannot be read, or a file holds a
    single example.
    """
    path = settings.checkpoint
    weights: Published | Checkpoint = Published(path) if is_published(path) else open_checkpoint(path)
    files = {name: getattr(settings, name) for name in SETS if getattr(settings, name) is not None}
    config = weights.meta.model
    mesh = make_mesh(MeshSettings())
    rows_at_once = settings.batch_size * jax.device_count()
    data = {
        name: DataSettings(
            sources=(Source(task=settings.task, split="test", path=file, allow_evaluation_only=True),),
            context=config.max_context,
            layout="padded",
        )
        for name, file in files.items()
    }
    rows = {}
    for name, source in data.items():
        read = load_rows(source, weights.tokenizer, weights.meta.template)
        if settings.num_rows is not None:
            read = read.select(np.arange(min(settings.num_rows, len(read))))
        if len(read) < 2:
            raise UsageError(
                f"{name}={source.sources[0].path} holds one example: a loss without an interval says nothing"
            )
        rows[name] = read
    compute = ComputeSettings(dtype=settings.dtype, remat="none")
    longest = max(int(of_set.input_lengths.max()) for of_set in rows.values())
    context = math.ceil(longest / compute.loss_chunk) * compute.loss_chunk
    params = weights.restore_params(param_shardings(config, mesh), "float32")
    example_losses = make_example_losses(config, compute, mesh)
    sums: dict[str, Float[np.ndarray, "examples 2"]] = {}
    with jax.set_mesh(mesh):
        for name, of_set in rows.items():
            narrow = data[name].model_copy(update={"context": context})
            batches = Batches(of_set, narrow, batch_size=rows_at_once, seed=_SEED, num_epochs=1)
            results = [
                jax.device_get(example_losses(params, to_devices(batches[step], mesh, rows_at_once)))
                for step in progress(range(len(batches)), name, "batches")
            ]
            every = np.concatenate(results, dtype=float)
            sums[name] = every[every[:, 1] > 0]  # the last batch is filled up with empty rows
    told = differences(sums)
    told = {"checkpoint": weights.name, "num_examples": {name: len(of_set) for name, of_set in rows.items()}, **told}
    if settings.out is not None:
        write_json(epath.Path(settings.out), told)
    logger.info("%s", summary(told))
    return told


def make_example_losses(
    config: ModelConfig, compute: ComputeSettings, mesh: Mesh
) -> Callable[[model.Params, DeviceBatch], Float[Array, "batch 2"]]:
    """(params, batch) -> (sum of the masked NLL in nats, its tokens) of each row; see `loss` for that of a batch."""

    def example_losses(params: model.Params, batch: DeviceBatch) -> Array:
        narrow = model.cast(params, compute.dtype)
        hidden = model.hidden_states(config, narrow, batch["tokens"], batch["positions"], batch["segment_ids"], compute)
        mask, length = batch["loss_mask"], hidden.shape[1]

        def of_chunk(start: Array) -> Array:
            part, targets, counted = (
                jax.lax.dynamic_slice_in_dim(x, start, compute.loss_chunk, axis=1)
                for x in (hidden, batch["targets"], mask)
            )
            logits = jnp.einsum("ble,ev->blv", part, narrow["output"], preferred_element_type=jnp.float32)
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return jnp.sum(jnp.where(counted, nll, 0), axis=1)

        nll = jnp.sum(jax.lax.map(of_chunk, jnp.arange(0, length, compute.loss_chunk)), axis=0)
        return jnp.stack([nll, jnp.sum(mask, axis=1).astype(jnp.float32)], axis=1)

    return jax.jit(example_losses, out_shardings=NamedSharding(mesh, PartitionSpec()))


def differences(sums: dict[str, Float[np.ndarray, "examples 2"]]) -> dict[str, Any]:
    """Losses, d1 and d2, from (sum of the NLL, tokens) of each example of each set."""
    losses = {name: _losses(of_set, SETS.index(name)) for name, of_set in sums.items()}
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
    low, high = told["d1"]["ci95"]
    lines.append(
        "the test set is easier for this model than new questions are: it may have been trained on it"
        if high < 0
        else f"no sign that the test set was trained on; a difference of {min(low, 0):.3f} cannot be ruled out"
    )
    if told["d2"]["ci95"][0] <= 0:
        lines.append("the training set is no easier than the test set: was this model trained on it at all?")
    return "\n".join(lines)


def _losses(sums: Float[np.ndarray, "examples 2"], seed: int) -> Float[np.ndarray, "resamples+1"]:
    """The loss of the set, and of its resamples."""
    drawn = np.concatenate([np.ones((1, len(sums))), resamples(len(sums), NUM_RESAMPLES, seed)]) @ sums
    return drawn[:, 0] / drawn[:, 1]


def _with_interval(values: Float[np.ndarray, "resamples+1"]) -> dict[str, Any]:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "ci95": [float(low), float(high)]}
