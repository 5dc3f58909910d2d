"""The LLaMA family in flax.nnx: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

nnx defines the modules; everything else sees a pure dict of arrays (`init`, `param_specs`, `forward`).
The blocks are one stacked block whose arrays carry a leading layer axis, run by `jax.lax.scan`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from mathscale_jax.attention import attend, saves_attention
from mathscale_jax.config import ComputeSettings, ModelConfig
from mathscale_jax.mesh import constrain_rows, gather_over_fsdp, on_own_rows

# A nested dict of arrays, with the paths of `param_specs`.
Params: TypeAlias = dict[str, Any]

# (query, key, value, layer cache) -> (attended values, what the scan over layers stacks up for the caller)
AttendFn = Callable[[Array, Array, Array, Any], tuple[Array, Any]]

# Of one module: its matrix's name -> the low-rank matrices added to it.
Adapter: TypeAlias = Mapping[str, "LowRank"]

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
        return _rms_norm(x, self.scale[...], self.eps)


def _rms_norm(x: Float[Array, "*batch embed"], scale: Float[Array, " embed"], eps: float) -> Array:
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale


# Cosines and sines of the rotary embedding, the same in every layer: [batch, length, 1, head_dim / 2] each.
Rotation: TypeAlias = tuple[Array, Array]


def rotation_of(positions: Int[Array, "batch length"], config: ModelConfig, dtype: Any) -> Rotation:
    """By how much queries and keys turn at these positions; computed in float32, whatever the `dtype` asked for."""
    half = config.head_dim // 2
    frequencies = 1.0 / config.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(
    x: Float[Array, "batch length heads head_dim"], rotation: Rotation
) -> Float[Array, "batch length heads head_dim"]:
    """Rotary embedding in the layout of the Hugging Face weights: dimension i turns with i + head_dim / 2."""
    cos, sin = rotation
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The adapter of one matrix (see lora.py). With a `dropout_key`, a share `dropout` of its inputs is dropped."""

    a: Float[Array, "*inputs rank"]
    b: Float[Array, "rank *outputs"]
    dropout_key: PRNGKeyArray | None
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "..."], weight: Float[Array, "..."], num_inputs: int) -> Float[Array, "..."]:
    """The last `num_inputs` axes of `x` contracted with the first ones of `weight`.

    Its backward pass is written out because JAX's own makes the weight's gradient transposed and turns it round:
    for that, XLA's CPU compiler makes a transposed copy of every gradient, which takes longer than the product.
    """
    return jnp.tensordot(x, weight, num_inputs)


def _product_forward(x: Array, weight: Array, num_inputs: int) -> tuple[Array, tuple[Array, Array]]:
    return jnp.tensordot(x, weight, num_inputs), (x, weight)


def _product_backward(num_inputs: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = saved
    batch_axes = tuple(range(x.ndim - num_inputs))
    output_axes = tuple(range(len(batch_axes), gradient.ndim))
    to_x = jnp.tensordot(gradient, weight, (output_axes, tuple(range(num_inputs, weight.ndim))))
    return to_x, jnp.tensordot(x, gradient, (batch_axes, batch_axes))


product.defvjp(_product_forward, _product_backward)


def project(
    x: Float[Array, "batch length *inputs"], weight: Float[Array, "*shape"], low_rank: LowRank | None = None
) -> Float[Array, "batch length *outputs"]:
    """`x` times a matrix, whose input axes are those of `x`; with its adapter, where it has one."""
    num_inputs = x.ndim - 2
    projected = product(x, weight, num_inputs)
    if low_rank is None:
        return projected
    if low_rank.dropout_key is not None:
        kept = jax.random.bernoulli(low_rank.dropout_key, 1 - low_rank.dropout, x.shape)
        x = jnp.where(kept, x / (1 - low_rank.dropout), 0).astype(x.dtype)
    return projected + low_rank.scale * product(product(x, low_rank.a, num_inputs), low_rank.b, 1)


class Attention(nnx.Module):
    """Projections and rotary embedding; which keys a query reads is the caller's `attend_fn`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embed, head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.query = _matrix(rngs, (embed, heads, head_dim), ("embed", "heads", "head_dim"))
        self.key = _matrix(rngs, (embed, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.value = _matrix(rngs, (embed, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.output = _matrix(rngs, (heads, head_dim, embed), ("heads", "head_dim", "embed"))

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        rotation: Rotation,
        attend_fn: AttendFn,
        cache: Any,
        adapter: Adapter,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        query = rotate(project(x, self.query[...], adapter.get("query")), rotation)
        key = rotate(project(x, self.key[...], adapter.get("key")), rotation)
        value = project(x, self.value[...], adapter.get("value"))
        attended, stacked = attend_fn(query, key, value, cache)
        return project(attended, self.output[...], adapter.get("output")), stacked


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embed, mlp = config.hidden_size, config.intermediate_size
        self.gate = _matrix(rngs, (embed, mlp), ("embed", "mlp"))
        self.up = _matrix(rngs, (embed, mlp), ("embed", "mlp"))
        self.down = _matrix(rngs, (mlp, embed), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "batch length embed"], adapter: Adapter) -> Float[Array, "batch length embed"]:
        gate = project(x, self.gate[...], adapter.get("gate"))
        up = project(x, self.up[...], adapter.get("up"))
        return project(jax.nn.silu(gate) * up, self.down[...], adapter.get("down"))


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
        rotation: Rotation,
        attend_fn: AttendFn,
        cache: Any,
        adapter: Mapping[str, Adapter],
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        normed = self.attention_norm(x)
        attended, stacked = self.attention(normed, rotation, attend_fn, cache, adapter.get("attention", {}))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x), adapter.get("mlp", {})), stacked


class Llama(nnx.Module):
    """The parameters of an embedding, a stack of blocks, a last norm and the output layer; `forward` runs them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        def new_block(key: jax.Array) -> Any:
            return nnx.split(Block(config, nnx.Rngs(params=key)))[1]

        self.embedding = _matrix(rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"))
        stacked = jax.vmap(new_block)(jax.random.split(rngs.params(), config.num_layers))
        self.blocks = nnx.merge(_abstract_block(config)[0], stacked)
        self.norm = RMSNorm(config)
        self.output = _matrix(rngs, (config.hidden_size, config.vocab_size), ("embed", "vocab"))


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    attend_fn: AttendFn,
    caches: Any = None,
    adapter: Mapping[str, Adapter] | None = None,
    *,
    compute: ComputeSettings,
) -> tuple[Float[Array, "batch length embed"], Any]:
    """The normed hidden states, and what `attend_fn` returned for each layer, stacked.

    `caches` and `adapter` have a leading layer axis; each layer gets its own slice. Where `params` come from
    `layers_apart`, `caches` and what is returned are tuples, one item a layer.
    """
    graphdef, abstract = _abstract_block(config)

    def run_block(x: Array, layer: tuple[Any, Any, Any]) -> tuple[Array, Any]:
        values, cache, adapter = layer
        state = jax.tree.map(lambda variable: variable, abstract)  # a copy: replacing values works in place
        nnx.replace_by_pure_dict(state, values)
        x, stacked = nnx.merge(graphdef, _gathered(state))(x, rotation, attend_fn, cache, adapter)
        return constrain_rows(x), stacked

    run_block = rematerialised(run_block, compute.remat)
    # Looking up rows of a table split over fsdp would gather the whole batch; gather the table instead.
    x = on_own_rows(_look_up, params["embedding"], ("vocab", "embed"), tokens)
    x = constrain_rows(x)
    rotation = rotation_of(positions, config, x.dtype)
    stacked: Any
    if isinstance(params["blocks"], tuple):
        every = []
        for layer, values in enumerate(params["blocks"]):
            x, of_layer = run_block(x, (values, caches[layer] if caches else None, {}))
            every.append(of_layer)
        stacked = tuple(every)
    else:
        layers = params["blocks"], caches, adapter or {}
        x, stacked = jax.lax.scan(run_block, x, layers, unroll=compute.scan_unroll)
    return _rms_norm(x, params["norm"]["scale"], config.rms_norm_eps), stacked


def layers_apart(params: Params) -> Params:
    """The same parameters with the blocks as a tuple of the layers' own. The stacked arrays are deleted on the way.

    XLA's GPU compiler copies each layer's slice of a stacked array before it uses it, which the few rows of a decode
    step do not pay for; its TPU compiler reads it in place, and takes several times as long over a long program.
    """
    leaves, structure = jax.tree.flatten(params["blocks"])
    apart = []
    for leaf in leaves:
        sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
        apart.append(jax.jit(lambda leaf: tuple(leaf), out_shardings=sharding)(leaf))
        leaf.delete()
    return {**params, "blocks": tuple(jax.tree.unflatten(structure, layer) for layer in zip(*apart, strict=True))}


def _gathered(layer: Any) -> Any:
    """One layer's parameters whole over fsdp: gathered once for its forward pass, once for all of its backward pass."""

    def gather(parameter: nnx.Variable) -> nnx.Variable:
        return parameter.replace(gather_over_fsdp(parameter[...], parameter.get_metadata("out_sharding")))

    return jax.tree.map(gather, layer, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _look_up(tensor_axis: str | None, table: Array, tokens: Array) -> Array:
    """Rows of the table for one device's tokens; of a table split over `tensor_axis`, each device adds its rows."""
    if tensor_axis is None:
        return _rows_of(table, tokens)
    own = tokens - jax.lax.axis_index(tensor_axis) * table.shape[0]
    is_own = (own >= 0) & (own < table.shape[0])
    rows = _rows_of(table, jnp.where(is_own, own, 0))
    return jax.lax.psum(jnp.where(is_own[..., None], rows, 0), tensor_axis)


@jax.custom_vjp
def _rows_of(table: Float[Array, "vocab embed"], tokens: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
    """`table[tokens]`; its gradient adds up in float32, as a frequent token gets very many small terms."""
    return table[tokens]


def _rows_of_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[tokens], (table, tokens)


def _rows_of_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, tokens = saved
    total = jnp.zeros_like(table, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return total.astype(table.dtype), None


_rows_of.defvjp(_rows_of_forward, _rows_of_backward)


def rematerialised(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`function` such that its backward pass recomputes what `compute.remat` says."""
    if policy == "none":
        return function
    saved = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "save-attention": saves_attention,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    return jax.checkpoint(function, policy=saved[policy], prevent_cse=False)


@functools.cache
def _abstract_block(config: ModelConfig) -> tuple[Any, Any]:
    return _shapes(lambda: Block(config, nnx.Rngs(0)))


@functools.cache
def _abstract_state(config: ModelConfig) -> Any:
    return _shapes(lambda: Llama(config, nnx.Rngs(params=0)))[1]


def _shapes(make: Callable[[], nnx.Module]) -> tuple[Any, Any]:
    # Inside a mesh, nnx would take our logical axes for the mesh's own.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.split(nnx.eval_shape(make))


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

    flat = {path: spec(path, leaf) for path, leaf in nnx.to_flat_state(_abstract_state(config))}
    return nnx.traversals.unflatten_mapping(flat)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted name: "blocks.mlp.up"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def init(config: ModelConfig, seed: int) -> Params:
    """Random float32 parameters. Call under jit with out_shardings to have them made where they belong."""
    model = Llama(config, nnx.Rngs(params=jax.random.key(seed, impl="threefry2x32")))
    return nnx.to_pure_dict(nnx.split(model)[1])


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
    adapter: Mapping[str, Adapter] | None = None,
) -> Float[Array, "batch length embed"]:
    """The last hidden states of packed or padded rows, in the dtype of `params`."""

    def attend_packed(query: Array, key: Array, value: Array, _: None) -> tuple[Array, None]:
        window = config.sliding_window
        return attend(query, key, value, segment_ids, sliding_window=window, backend=compute.attention), None

    hidden, _ = forward(config, params, tokens, positions, attend_packed, adapter=adapter, compute=compute)
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
