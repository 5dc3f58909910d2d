"""The LLaMA family in flax.nnx: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

nnx defines the modules; everything else sees a pure dict of arrays (`init`, `abstract_params`, `bind`).
The blocks are one stacked block whose arrays carry a leading layer axis, run by `jax.lax.scan`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from mathscale_jax.attention import attend, attention_mask
from mathscale_jax.config import ComputeSettings, ModelConfig
from mathscale_jax.mesh import constrain

# A nested dict of arrays, with the paths of `param_specs`.
Params: TypeAlias = dict[str, Any]

# (query, key, value, layer cache) -> (attended values, what the scan over layers stacks up for the caller)
AttendFn = Callable[[Array, Array, Array, Any], tuple[Array, Any]]

INIT_STDDEV = 0.02  # of every matrix, as in LLaMA's published initializer_range


def _matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    values = INIT_STDDEV * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(values, out_sharding=axes, eager_sharding=False)


class RMSNorm(nnx.Module):
    """Scales to unit root mean square, in float32, then by a learned weight."""

    def __init__(self, config: ModelConfig):
        self.eps = config.rms_norm_eps
        self.scale = nnx.Param(jnp.ones(config.hidden_size), out_sharding=("norm",), eager_sharding=False)

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...]


def rotate(
    x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "batch length"], theta: float
) -> Float[Array, "batch length heads head_dim"]:
    """Rotary embedding in the layout of the Hugging Face weights: dimension i turns with i + head_dim / 2."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Projections and rotary embedding; which keys a query reads is the caller's `attend_fn`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embed, head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.theta = config.rope_theta
        self.query = _matrix(rngs, (embed, heads, head_dim), ("embed", "heads", "head_dim"))
        self.key = _matrix(rngs, (embed, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.value = _matrix(rngs, (embed, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.output = _matrix(rngs, (heads, head_dim, embed), ("heads", "head_dim", "embed"))

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        positions: Int[Array, "batch length"],
        attend_fn: AttendFn,
        cache: Any,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        query = rotate(jnp.einsum("ble,ehd->blhd", x, self.query[...]), positions, self.theta)
        key = rotate(jnp.einsum("ble,ehd->blhd", x, self.key[...]), positions, self.theta)
        value = jnp.einsum("ble,ehd->blhd", x, self.value[...])
        attended, stacked = attend_fn(query, key, value, cache)
        return jnp.einsum("blhd,hde->ble", attended, self.output[...]), stacked


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embed, mlp = config.hidden_size, config.intermediate_size
        self.gate = _matrix(rngs, (embed, mlp), ("embed", "mlp"))
        self.up = _matrix(rngs, (embed, mlp), ("embed", "mlp"))
        self.down = _matrix(rngs, (mlp, embed), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        return (jax.nn.silu(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]


class Block(nnx.Module):
    """One decoder block: attention and SwiGLU, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = SwiGLU(config, rngs)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        positions: Int[Array, "batch length"],
        attend_fn: AttendFn,
        cache: Any,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        attended, stacked = self.attention(self.attention_norm(x), positions, attend_fn, cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), stacked


class Llama(nnx.Module):
    """Embedding, a stack of blocks, a last norm and the output layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        def new_block(key: jax.Array) -> Any:
            return nnx.split(Block(config, nnx.Rngs(params=key)))[1]

        self.embedding = _matrix(rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"))
        graphdef = nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))[0]
        stacked = jax.vmap(new_block)(jax.random.split(rngs.params(), config.num_layers))
        self.blocks = nnx.merge(graphdef, stacked)
        self.norm = RMSNorm(config)
        self.output = _matrix(rngs, (config.hidden_size, config.vocab_size), ("embed", "vocab"))

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        attend_fn: AttendFn,
        caches: Any = None,
        *,
        compute: ComputeSettings,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        """The normed hidden states, and what `attend_fn` returned per layer, stacked.

        `caches` holds a leading layer axis; each layer's `attend_fn` gets its own slice.
        """
        graphdef, layers = nnx.split(self.blocks)

        def run_block(x: Array, layer: tuple[Any, Any]) -> tuple[Array, Any]:
            state, cache = layer
            x, stacked = nnx.merge(graphdef, state)(x, positions, attend_fn, cache)
            return constrain(x, ("data", "fsdp"), None, None), stacked

        # Looking up rows of a table split over fsdp would gather the whole batch; gather the table instead.
        table = constrain(self.embedding[...], "tensor", None)
        x = constrain(table[tokens], ("data", "fsdp"), None, None)
        x, stacked = jax.lax.scan(
            rematerialised(run_block, compute.remat), x, (layers, caches), unroll=compute.scan_unroll
        )
        return self.norm(x), stacked


def rematerialised(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`function` such that its backward pass recomputes what `compute.remat` says."""
    if policy == "none":
        return function
    policies = jax.checkpoint_policies
    saved = policies.dots_with_no_batch_dims_saveable if policy == "dots" else policies.nothing_saveable
    return jax.checkpoint(function, policy=saved, prevent_cse=False)


@functools.cache
def _abstract(config: ModelConfig) -> tuple[Any, Any]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(params=0))))
    return graphdef, state


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape and logical axes of one parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def param_specs(config: ModelConfig) -> PyTree[ParamSpec]:
    """The one description of the parameters, as a nested dict: what init, sharding, checkpoints and converters use."""

    def spec(path: tuple[Any, ...], leaf: Any) -> ParamSpec:
        axes = tuple(leaf.get_metadata("out_sharding"))
        if len(axes) < len(leaf.shape):  # the stacked blocks know their own axes only
            axes = ("layers", *axes)
        return ParamSpec(tuple(leaf.shape), axes)

    _, state = _abstract(config)
    flat = {path: spec(path, leaf) for path, leaf in nnx.to_flat_state(state)}
    return nnx.traversals.unflatten_mapping(flat)


def init(config: ModelConfig, seed: int) -> Params:
    """Random float32 parameters. Call under jit with out_shardings to have them made where they belong."""
    model = Llama(config, nnx.Rngs(params=jax.random.key(seed, impl="threefry2x32")))
    return nnx.to_pure_dict(nnx.split(model)[1])


def bind(config: ModelConfig, params: Params) -> Llama:
    """The module with these parameters."""
    graphdef, state = _abstract(config)
    state = jax.tree.map(lambda x: x, state)  # a copy: replacing values works in place
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def cast(params: Params, dtype: str) -> Params:
    """The parameters in the compute dtype. Before the layer scan, so that gathers move the narrow form."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    compute: ComputeSettings,
) -> Float[Array, "batch length embed"]:
    """The last hidden states of packed or padded rows, in the dtype of `params`."""
    mask = attention_mask(segment_ids, config.sliding_window)

    def attend_packed(query: Array, key: Array, value: Array, _: None) -> tuple[Array, None]:
        return attend(query, key, value, mask), None

    hidden, _ = bind(config, params)(tokens, positions, attend_packed, compute=compute)
    return hidden


def logits(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch length"],
    compute: ComputeSettings | None = None,
) -> Float[Array, "batch length vocab"]:
    """Float32 logits of whole sequences without padding: for short texts and for comparing implementations."""
    compute = compute or ComputeSettings(dtype="float32", remat="none")
    params = cast(params, compute.dtype)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(config, params, tokens, positions, jnp.ones_like(tokens), compute)
    return jnp.einsum("ble,ev->blv", hidden, params["output"], preferred_element_type=jnp.float32)
