"""Checksums of arrays, computed where they lie: what shows that a restored checkpoint is the saved one, bit for bit."""

import hashlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mathscale_jax import model

_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}  # all of its bits: NaN or infinite
_ROW = 4096
_ALIGNMENT = 64  # bytes


@jax.jit
def array_checksum(array: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """32 bits over every element's bits and its place: a sum, so the same on any mesh and in any order.

    Of a range of an array along axis 0, `first` is the place of its first element: the ranges' checksums add up.
    """
    if jnp.issubdtype(array.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(array, jnp.uint16 if array.dtype.itemsize == 2 else jnp.uint32)
    else:
        bits = array
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    place += jnp.asarray(first).astype(jnp.uint32)
    return jnp.sum(_mixed(bits, place), dtype=jnp.uint32)


def _mixed(bits: jax.Array, place: jax.Array) -> jax.Array:
    mixed = bits.astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B1))  # then the finaliser of MurmurHash3
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> 16)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory of the host that jax reads where it lies."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def host_checksum(array: np.ndarray, first: int) -> tuple[int, int]:
    """`array_checksum` of an array of floats in the host's memory, and how many of them are NaN or infinite.

    Fastest with memory of `aligned_empty`; other is copied.
    """
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    exponent = bits.dtype.type(_EXPONENTS[array.dtype.name])
    on_host = jax.device_put(bits, _host(), may_alias=True)
    total, not_finite = _flat_checksum(on_host, np.uint32(first % 2**32), exponent)
    return int(total), int(not_finite)


def _host() -> jax.Device:
    """Where what lies in the host's memory need not be moved; unless jax was told to leave the processor alone."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


@jax.jit
def _flat_checksum(bits: jax.Array, first: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    # A row at a time: XLA's own sums of a whole array use no vector instructions on a processor, and take five times
    # as long.
    whole = bits.size // _ROW * _ROW
    rows, rest = bits[:whole].reshape(-1, _ROW), bits[whole:]
    place = jax.lax.iota(jnp.uint32, _ROW) + first

    def sum_over_rows(of_row: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            return total + of_row(rows[i], place + i.astype(jnp.uint32) * jnp.uint32(_ROW))

        if not len(rows):
            return jnp.uint32(0)
        return jnp.sum(jax.lax.fori_loop(0, len(rows), add, jnp.zeros(_ROW, jnp.uint32)), dtype=jnp.uint32)

    def not_finite(bits: jax.Array) -> jax.Array:
        return ((bits & exponent) == exponent).astype(jnp.uint32)

    place_of_rest = jax.lax.iota(jnp.uint32, rest.size) + first + jnp.uint32(whole)
    return (
        sum_over_rows(_mixed) + jnp.sum(_mixed(rest, place_of_rest), dtype=jnp.uint32),
        sum_over_rows(lambda bits, _: not_finite(bits)) + jnp.sum(not_finite(rest), dtype=jnp.uint32),
    )


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The checksum of each array by its name. Waits for the devices."""
    on_device = {name: array_checksum(array) for name, array in arrays.items()}
    return {name: int(value) for name, value in jax.device_get(on_device).items()}


def fingerprint(params: model.Params) -> str:
    """Hexadecimal digest of every bit of the weights, computed on the device; the same for any sharding."""
    return digest(checksums(model.named_leaves(params)))


def digest(sums: Mapping[str, int]) -> str:
    """One short name for the checksums of a tree."""
    return hashlib.sha256(np.asarray([sums[name] for name in sorted(sums)], np.uint32).tobytes()).hexdigest()[:16]
