"""Checksums of arrays, computed where they lie: what shows that a restored checkpoint is the saved one, bit for bit."""

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mathscale_jax import model


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
