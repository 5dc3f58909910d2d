"""The jitted training step over a (data, fsdp, tensor) mesh, with every sharding pinned."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipeline.loader import Batch
from mathscale_jax import model
from mathscale_jax.config import ComputeSettings, ModelConfig
from mathscale_jax.loss import summed_cross_entropy
from mathscale_jax.mesh import check_divisible, constrain, sharding_of

DeviceBatch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes: arrays, or in a TrainState of the same structure their shardings.

    `step` counts the finished steps, as an int32 scalar: it is the position in the data as well.
    """

    step: Any
    params: model.Params
    optimizer: optax.OptState


def param_shardings(config: ModelConfig, mesh: Mesh) -> Any:
    """The sharding of every parameter. Raises UsageError where the mesh does not divide a dimension."""

    def sharding(path: tuple[Any, ...], spec: model.ParamSpec) -> NamedSharding:
        name = ".".join(entry.key for entry in path)
        check_divisible(mesh, name, spec.shape, spec.axes)
        return sharding_of(mesh, spec.axes)

    specs = model.param_specs(config)
    return jax.tree_util.tree_map_with_path(sharding, specs, is_leaf=lambda x: isinstance(x, model.ParamSpec))


def state_shardings(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, config: ModelConfig
) -> TrainState:
    """A TrainState of shardings: moments lie as their parameters do, counters on every device."""
    replicated = NamedSharding(mesh, PartitionSpec())
    specs = model.param_specs(config)
    abstract = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32),
        specs,
        is_leaf=lambda x: isinstance(x, model.ParamSpec),
    )
    optimizer_shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract),
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(step=replicated, params=params, optimizer=optimizer_shardings)


def init_state(params: model.Params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """The state before the first step. `params` are donated."""

    def init(params: model.Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def make_train_step(
    config: ModelConfig,
    compute: ComputeSettings,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: TrainState,
    mesh: Mesh,
    accumulation_steps: int,
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
    """The step: (state, batch) -> (state, metrics). The state is donated.

    loss = sum of the masked NLL over the whole global batch / its number of masked tokens, whatever the number
    of devices, processes and parts. Call it inside `jax.set_mesh(mesh)`.
    """

    def nll(params: model.Params, part: DeviceBatch) -> jax.Array:
        narrow = model.cast(params, compute.dtype)
        hidden = model.hidden_states(config, narrow, part["tokens"], part["positions"], part["segment_ids"], compute)
        return summed_cross_entropy(hidden, narrow["output"], part["targets"], part["loss_mask"], compute.loss_chunk)

    def nll_and_gradients(params: model.Params, part: DeviceBatch) -> tuple[jax.Array, Any]:
        value, gradients = jax.value_and_grad(nll)(params, part)
        return value, jax.lax.with_sharding_constraint(gradients, shardings.params)

    def accumulated(params: model.Params, batch: DeviceBatch) -> tuple[jax.Array, Any]:
        if accumulation_steps == 1:
            return nll_and_gradients(params, batch)

        def part_of(x: jax.Array) -> jax.Array:
            # Part i takes rows i, i + k, ...: each device keeps its own rows, no row changes its place.
            parts = x.reshape(x.shape[0] // accumulation_steps, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)
            return constrain(parts, None, ("data", "fsdp"), None)

        def add(total: Any, part: DeviceBatch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, nll_and_gradients(params, part)), None

        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zeros, jax.tree.map(part_of, batch))[0]

    def train_step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        total, gradients = accumulated(state.params, batch)
        tokens = jnp.sum(batch["loss_mask"])
        scale = 1.0 / jnp.maximum(tokens, 1)
        gradients = jax.tree.map(lambda g: g * scale, gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        metrics = {
            "loss": total * scale,
            "grad_norm": optax.global_norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "loss_tokens": tokens,
            "tokens": jnp.sum(batch["segment_ids"] > 0),
            "examples": jnp.sum((batch["segment_ids"] > 0) & (batch["positions"] == 0)),
        }
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), metrics

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding_of(mesh, ("batch", None))),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def to_devices(batch: Batch, mesh: Mesh) -> DeviceBatch:
    """This process's rows of a batch as its part of the global arrays."""
    sharding = sharding_of(mesh, ("batch", None))
    arrays: dict[str, np.ndarray] = dict(batch)  # type: ignore[arg-type]
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in arrays.items()}
