"""Low-rank adaptation (LoRA, arXiv 2106.09685): W x + alpha / rank * B A dropout(x), with W left as it is.

An adapter is a tree like the blocks' parameters, with {"a", "b"} in the place of each adapted matrix:

    adapter["attention"]["query"]["a"]   [layers, embed, rank]
    adapter["attention"]["query"]["b"]   [layers, rank, heads, head_dim]

A has the input axes of its matrix and B its output axes, and both are split over the mesh as the matrix is.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mathscale_jax.config import LORA_TARGETS, LoraSettings, ModelConfig
from mathscale_jax.model import LowRank, Params, ParamSpec, param_specs


def adapter_specs(config: ModelConfig, settings: LoraSettings) -> dict[str, Any]:
    """Shape and logical axes of every array of an adapter."""
    specs: dict[str, Any] = {}
    blocks = param_specs(config)["blocks"]
    for target in settings.targets:
        module, name = LORA_TARGETS[target]
        (layers, *shape), (_, *axes) = (list(part) for part in dataclasses.astuple(blocks[module][name]))
        # The residual stream is the first axis of a matrix that reads it and the last one of one that writes to it.
        num_inputs = 1 if axes[0] == "embed" else len(axes) - 1
        specs.setdefault(module, {})[name] = {
            "a": ParamSpec((layers, *shape[:num_inputs], settings.rank), ("layers", *axes[:num_inputs], "rank")),
            "b": ParamSpec((layers, settings.rank, *shape[num_inputs:]), ("layers", "rank", *axes[num_inputs:])),
        }
    return specs


def init(config: ModelConfig, settings: LoraSettings, seed: int) -> Params:
    """A new adapter in float32: A uniform within 1 / sqrt(inputs), as PEFT makes it, and B zero."""
    key = jax.random.key(seed, impl="threefry2x32")

    def array(path: tuple[Any, ...], spec: ParamSpec) -> Array:
        if path[-1].key == "b":
            return jnp.zeros(spec.shape, jnp.float32)
        bound = 1 / math.sqrt(math.prod(spec.shape[1:-1]))
        number = list(LORA_TARGETS.values()).index((path[0].key, path[1].key))
        return jax.random.uniform(jax.random.fold_in(key, number), spec.shape, jnp.float32, -bound, bound)

    specs = adapter_specs(config, settings)
    return jax.tree_util.tree_map_with_path(array, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def num_parameters(config: ModelConfig, settings: LoraSettings) -> int:
    """Of an adapter."""
    specs = jax.tree.leaves(adapter_specs(config, settings), is_leaf=lambda x: isinstance(x, ParamSpec))
    return sum(math.prod(spec.shape) for spec in specs)


def low_ranks(adapter: Params, settings: LoraSettings, dropout_key: PRNGKeyArray | None = None) -> dict[str, Any]:
    """The adapter as the model takes it. With a `dropout_key` inputs are dropped, each layer and matrix its own."""
    low_ranks: dict[str, Any] = {}
    for number, (module, name) in enumerate(LORA_TARGETS[target] for target in settings.targets):
        a, b = adapter[module][name]["a"], adapter[module][name]["b"]
        keys = None
        if dropout_key is not None and settings.dropout:
            keys = jax.random.split(jax.random.fold_in(dropout_key, number), a.shape[0])
        scale = settings.alpha / settings.rank
        low_ranks.setdefault(module, {})[name] = LowRank(a, b, keys, scale=scale, dropout=settings.dropout)
    return low_ranks


def adapted_matrices(settings: LoraSettings) -> dict[str, tuple[str, str]]:
    """The dotted name of each parameter that an adapter adds to, and its (module, matrix)."""
    return {".".join(("blocks", *LORA_TARGETS[target])): LORA_TARGETS[target] for target in settings.targets}


def merge(
    weight: Float[Array, "layers *shape"], a: Float[Array, "layers *inputs rank"], b: Array, settings: LoraSettings
) -> Float[Array, "layers *shape"]:
    """The stacked matrix with its adapter added, in the dtype of `weight`; the sum is made in float32."""
    product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision="highest"))(a, b)
    return (weight.astype(jnp.float32) + settings.alpha / settings.rank * product).astype(weight.dtype)


def merge_all(params: Params, adapter: Params, settings: LoraSettings) -> Params:
    """All weights of the adapted model; those without an adapter are shared with `params`."""
    blocks = {module: dict(matrices) for module, matrices in params["blocks"].items()}
    for module, name in (LORA_TARGETS[target] for target in settings.targets):
        low_rank = adapter[module][name]
        blocks[module][name] = jax.jit(merge, static_argnums=3)(
            blocks[module][name], low_rank["a"], low_rank["b"], settings
        )
    return {**params, "blocks": blocks}
