"""Checksums of saved arrays, computed on the devices where the arrays lie; the same however the arrays are sharded."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree):
    """{path: () uint32} of a tree of arrays; computed where they lie, the same however they are sharded.

    Σ hash(bits of an element, its place) modulo 2³², with the finalizer of MurmurHash3: any change of a single element shows.
    """
    return _checksums(by_path(tree))


@jax.jit
def _checksums(arrays):
    return {name: checksum(x, np.zeros(x.ndim, np.uint32), np.array(x.shape, np.uint32)) for name, x in arrays.items()}


@jax.jit
def checksum(x, start, shape):
    """Of the part of an array of a `shape` that begins at `start`, two uint32 vectors; those of parts add up."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}').astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        place = place * shape[axis] + start[axis] + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    h = bits ^ (place * np.uint32(0x9E3779B9) + np.uint32(0x7F4A7C15))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='.'): x for path, x in leaves}


def crc(data):
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())
