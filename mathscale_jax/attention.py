"""Attention behind one function with one mask contract, and the choice of the back-end that computes it."""

from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from data_pipeline.settings import UsageError
from data_pipeline.sources import DataSettings
from mathscale_jax.attention_kernels import attend_cudnn, attend_pallas, attend_splash
from mathscale_jax.attention_xla import RESIDUALS, attend_xla
from mathscale_jax.config import AttentionBackend, ComputeSettings, ModelConfig

BACKENDS = {"xla": attend_xla, "splash": attend_splash, "cudnn": attend_cudnn, "pallas": attend_pallas}

# The kernels for a platform, the fastest first; xla works everywhere.
KERNELS: dict[str, tuple[AttentionBackend, ...]] = {"tpu": ("splash",), "gpu": ("cudnn", "pallas")}


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"],
    *,
    sliding_window: int | None,
    backend: AttentionBackend,
) -> Float[Array, "batch length heads head_dim"]:
    """Grouped-query attention; query head h reads key head h // (heads / kv_heads). Softmax in float32.

    A query sees the keys at or before it, of its own segment, and less than `sliding_window` positions back.
    Worked example, segment_ids [1, 1, 2, 2, 0] (0 is padding):
        query 0 sees 0;  query 1 sees 0, 1;  query 2 sees 2;  query 3 sees 2, 3;  query 4 sees 4.
    What a padded position gets is finite and nobody reads it.

    Inside a mesh (`jax.set_mesh`) each device computes its rows and heads by itself, where they can be split evenly.
    """
    batch, length, _, head_dim = query.shape
    mesh = jax.sharding.get_abstract_mesh()
    if backend == "auto":
        # Without a mesh the compiler splits the arrays as it likes, and it cannot split a kernel.
        platform = jax.default_backend() if jax.device_count() == 1 or not mesh.empty else "cpu"
        backend = choose_backend(
            "auto",
            platform=platform,
            layout="packed",
            length=length,
            head_dim=head_dim,
            sliding_window=sliding_window,
            dtype=query.dtype.name,
        )

    def local(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        return BACKENDS[backend](query, key, value, segment_ids, sliding_window)

    if mesh.empty or mesh.are_all_axes_manual:
        return local(query, key, value, segment_ids)
    rows = ("data", "fsdp") if batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    heads = "tensor" if key.shape[2] % mesh.shape["tensor"] == 0 else None
    by_head = PartitionSpec(rows, None, heads, None)
    in_specs = (by_head, by_head, by_head, PartitionSpec(rows, None))
    # A kernel's outputs do not say over which axes they vary, so that this cannot be checked.
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=by_head, check_vma=False)
    return mapped(query, key, value, segment_ids)


def choose_backend(
    requested: AttentionBackend,
    *,
    platform: str,
    layout: Literal["packed", "padded"],
    length: int,
    head_dim: int,
    sliding_window: int | None,
    dtype: str,
) -> AttentionBackend:
    """The back-end for rows of `length`: `requested`, or for "auto" the fastest that can do it.

    `platform` is that of jax ("cpu", "gpu", "tpu"). Raises UsageError where the one requested cannot do it.
    """

    def obstacle(backend: str) -> str | None:
        if backend != "xla" and backend not in KERNELS.get(platform, ()):
            return f"does not run on platform {platform}"
        if backend == "cudnn":
            if layout == "packed":
                return "cannot keep packed examples apart, and data.layout is packed"
            if dtype != "bfloat16":
                return f"computes in bfloat16 only, and compute.dtype is {dtype}"
        if backend == "pallas" and sliding_window is not None and sliding_window < length:
            return (
                f"has no sliding window, and model.sliding_window={sliding_window} is shorter than the row of {length}"
            )
        if backend in ("cudnn", "pallas") and head_dim > 128:
            return f"takes heads of up to 128, and model.head_dim is {head_dim}"
        return None

    every: tuple[AttentionBackend, ...] = (*KERNELS.get(platform, ()), "xla")
    able = [name for name in every if obstacle(name) is None]
    if requested == "auto":
        return able[0]
    if (why := obstacle(requested)) is not None:
        raise UsageError(f"compute.attention={requested} {why}; here it may be {', '.join(able)}, or auto")
    return requested


def with_backend(compute: ComputeSettings, config: ModelConfig, data: DataSettings, platform: str) -> ComputeSettings:
    """`compute` with the back-end that trains this model on such rows. Raises UsageError as `choose_backend` does."""
    backend = choose_backend(
        compute.attention,
        platform=platform,
        layout=data.layout,
        length=data.context,
        head_dim=config.head_dim,
        sliding_window=config.sliding_window,
        dtype=compute.dtype,
    )
    return compute.model_copy(update={"attention": backend})


def saves_attention(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Rematerialisation policy: keeps what the backward pass of an attention reads besides query, key and value.

    With it the forward pass of attention is not computed again. Our own loop and splash name these arrays; those of
    the two GPU kernels are known by the call that makes them.
    """
    if primitive.name == "name":
        return params["name"] == RESIDUALS
    if primitive.name == "custom_vjp_call":
        return "mha_forward" in str(params["call_jaxpr"])
    return primitive.name.startswith("dot_product_attention_fwd")
