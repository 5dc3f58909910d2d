"""The jitted training step over a (data, fsdp, tensor) mesh, with every sharding pinned."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from data_pipeline.loader import Batch
from mathscale_jax import lora, model
from mathscale_jax.chips import chip_of
from mathscale_jax.config import ComputeSettings, LoraSettings, ModelConfig
from mathscale_jax.loss import summed_cross_entropy
from mathscale_jax.mesh import check_divisible, check_sharded, constrain, sharding_of

DeviceBatch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
SummedLoss: TypeAlias = Callable[[Any, Any, DeviceBatch], tuple[jax.Array, jax.Array]]


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
    """The sharding of every parameter.

    Raises UsageError where the mesh does not divide a dimension, or would leave too much of the model unsharded.
    """
    specs = model.param_specs(config)
    shardings = spec_shardings(specs, mesh)
    sizes = model.named_leaves(jax.tree.map(lambda spec: math.prod(spec.shape), specs, is_leaf=_is_spec))
    check_sharded(mesh, sizes, model.named_leaves(shardings))
    return shardings


def spec_shardings(specs: Any, mesh: Mesh) -> Any:
    """The sharding of every array that a tree of ParamSpec describes; errors as `param_shardings`."""

    def sharding(path: tuple[Any, ...], spec: model.ParamSpec) -> NamedSharding:
        check_divisible(mesh, jax.tree_util.keystr(path, simple=True, separator="."), spec.shape, spec.axes)
        return sharding_of(mesh, spec.axes)

    return jax.tree_util.tree_map_with_path(sharding, specs, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, model.ParamSpec)


def state_shardings(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A TrainState of shardings: moments lie as the parameters they belong to, counters on every device.

    `params` are the shardings of what is trained.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    any_shape = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), params)
    optimizer_shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, any_shape),
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(step=replicated, params=params, optimizer=optimizer_shardings)


def init_state(params: model.Params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """The state before the first step. `params` are donated."""

    def init(params: model.Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def _nll(
    config: ModelConfig,
    compute: ComputeSettings,
    lora_settings: LoraSettings | None,
    trained: model.Params,
    frozen: model.Params | None,
    part: DeviceBatch,
    dropout_key: PRNGKeyArray | None = None,
) -> jax.Array:
    """Sum of the masked NLL of rows. `trained` are all weights; or an adapter, of the `frozen` ones."""
    adapter = None
    narrow = model.cast(trained, compute.dtype)
    if lora_settings is not None:
        assert frozen is not None
        adapter = lora.low_ranks(narrow, lora_settings, dropout_key)
        narrow = model.cast(frozen, compute.dtype)
    hidden = model.hidden_states(
        config, narrow, part["tokens"], part["positions"], part["segment_ids"], compute, adapter
    )
    return summed_cross_entropy(hidden, narrow["output"], part["targets"], part["loss_mask"], compute.loss_chunk)


def make_summed_loss(
    config: ModelConfig, compute: ComputeSettings, mesh: Mesh, lora_settings: LoraSettings | None = None
) -> SummedLoss:
    """The loss without gradients or dropout: (trained, frozen or None, batch) -> (sum of the NLL, its tokens)."""

    def summed_loss(trained: model.Params, frozen: model.Params | None, batch: DeviceBatch) -> Any:
        total = _nll(config, compute, lora_settings, trained, frozen, batch)
        return total, jnp.sum(batch["loss_mask"])

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(summed_loss, out_shardings=(replicated, replicated))


def make_train_step(
    config: ModelConfig,
    compute: ComputeSettings,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: TrainState,
    mesh: Mesh,
    accumulation_steps: int,
    *,
    compiler_options: Mapping[str, str | bool | int] | None = None,
    lora_settings: LoraSettings | None = None,
    seed: int = 0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step: (state, batch) -> (state, metrics), or with LoRA (state, batch, frozen). The state is donated.

    loss = sum of the masked NLL over the whole global batch / its number of masked tokens, whatever the number
    of devices, processes and parts. `frozen` are the weights that an adapter, the state's params, belongs to;
    `seed` is that of its dropout. Call it inside `jax.set_mesh(mesh)`. Gradients cross the network in the compute
    dtype, once for every part, and add up over the parts in float32. `compiler_options` are by default the chip's.
    """

    def nll_and_gradients(
        trained: model.Params, frozen: model.Params | None, part: DeviceBatch, key: PRNGKeyArray
    ) -> tuple[jax.Array, Any]:
        loss = partial(_nll, config, compute, lora_settings)
        value, gradients = jax.value_and_grad(loss)(trained, frozen, part, key)
        return value, jax.lax.with_sharding_constraint(gradients, shardings.params)

    def accumulated(
        trained: model.Params, frozen: model.Params | None, batch: DeviceBatch, key: PRNGKeyArray
    ) -> tuple[jax.Array, Any]:
        if accumulation_steps == 1:
            return nll_and_gradients(trained, frozen, batch, key)

        def part_of(x: jax.Array) -> jax.Array:
            # Part i takes rows i, i + k, ...: each device keeps its own rows, no row changes its place.
            parts = x.reshape(x.shape[0] // accumulation_steps, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)
            return constrain(parts, None, ("data", "fsdp"), None)

        def add(total: Any, part: tuple[DeviceBatch, PRNGKeyArray]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, nll_and_gradients(trained, frozen, *part)), None

        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained))
        parts = (jax.tree.map(part_of, batch), jax.random.split(key, accumulation_steps))
        return jax.lax.scan(add, zeros, parts)[0]

    def train_step(
        state: TrainState, batch: DeviceBatch, frozen: model.Params | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.step)
        total, gradients = accumulated(state.params, frozen, batch, key)
        tokens = jnp.sum(batch["loss_mask"])
        scale = 1.0 / jnp.maximum(tokens, 1)
        gradients = jax.tree.map(lambda g: g * scale, gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        metrics = {
            "loss": total * scale,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "loss_tokens": tokens,
            "tokens": jnp.sum(batch["segment_ids"] > 0),
            "examples": jnp.sum((batch["segment_ids"] > 0) & (batch["positions"] == 0)),
        }
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), metrics

    if compiler_options is None:
        chip = chip_of(mesh.devices.flat[0].device_kind)
        compiler_options = {} if chip is None else chip.compiler_options
    replicated = NamedSharding(mesh, PartitionSpec())
    inputs: tuple[Any, ...] = (shardings, sharding_of(mesh, ("batch", None)))
    if lora_settings is not None:
        inputs += (param_shardings(config, mesh),)
    return jax.jit(
        train_step,
        in_shardings=inputs,
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=dict(compiler_options),
    )


def to_devices(batch: Batch, mesh: Mesh, batch_size: int | None = None) -> DeviceBatch:
    """This process's rows of a batch as its part of the global arrays.

    `batch_size` counts the rows of all processes; by default this one holds them all.
    """
    sharding = sharding_of(mesh, ("batch", None))
    arrays: dict[str, np.ndarray] = dict(batch)  # type: ignore[arg-type]
    with jax.transfer_guard_host_to_device("allow"):  # this is the transfer that is meant
        return {
            name: jax.make_array_from_process_local_data(sharding, array, (batch_size or len(array), *array.shape[1:]))
            for name, array in arrays.items()
        }
