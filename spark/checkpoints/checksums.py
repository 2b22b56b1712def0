"""Checksums of saved arrays, computed on the devices that hold them; how an array is sharded does not change them."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree: Any) -> dict[str, int]:
    """{path: checksum} of a tree of arrays.

    The sum over elements of hash(bits, index), modulo 2³², with MurmurHash3's finalizer: a change of any one element changes it.
    """
    return {name: int(n) for name, n in jax.device_get(_checksums(by_path(tree))).items()}


@jax.jit
def _checksums(arrays):
    return {name: checksum(x, np.zeros(x.ndim, np.uint32), np.array(x.shape, np.uint32)) for name, x in arrays.items()}


@jax.jit
def checksum(x: jax.Array | np.ndarray, start: jax.Array | np.ndarray, shape: jax.Array | np.ndarray) -> jax.Array:
    """The contribution to its array's checksum of a block x; the contributions of blocks add up, modulo 2³².

    `start` is the index of the block's first element, `shape` that of the whole array; both uint32.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}').astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        index = index * shape[axis] + start[axis] + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    h = bits ^ (index * np.uint32(0x9E3779B9) + np.uint32(0x7F4A7C15))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def by_path(tree: Any) -> dict[str, Any]:
    """{'params.groups.b': leaf} of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='.'): x for path, x in leaves}


def json_crc(value: Any) -> int:
    """CRC-32 of a JSON value."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
