"""Checksums of arrays, computed where they lie: what shows that a restored checkpoint is the saved one, bit for bit."""

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mathscale_jax import model

_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}  # all of its bits: NaN or infinite
_BLOCK = 2**17


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
    mixed = bits.astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B1))  # then the finaliser of MurmurHash3
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def host_checksum(array: np.ndarray, first: int) -> tuple[int, int]:
    """`array_checksum` of an array in the host's memory, and how many of its floats are NaN or infinite.

    Block by block, so that all of it happens in the processor's cache.
    """
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    exponent = bits.dtype.type(_EXPONENTS[array.dtype.name])
    places = np.arange(_BLOCK, dtype=np.uint32)
    mixed_buffer, shifted_buffer = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    total = not_finite = 0
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        mixed, shifted = mixed_buffer[: block.size], shifted_buffer[: block.size]
        np.add(places[: block.size], np.uint32((first + start) % 2**32), out=mixed)
        mixed *= np.uint32(0x9E3779B1)
        mixed ^= block
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            np.right_shift(mixed, np.uint32(shift), out=shifted)
            mixed ^= shifted
            mixed *= np.uint32(factor)
        np.right_shift(mixed, np.uint32(16), out=shifted)
        mixed ^= shifted
        total += int(mixed.sum(dtype=np.uint64))
        exponents = block & exponent
        if exponents.max(initial=0) == exponent:
            not_finite += int(np.count_nonzero(exponents == exponent))
    return total % 2**32, not_finite


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
