"""Both lookups on CPUs, by kernels in C++ behind XLA's foreign function interface: they touch only what is active.

`pip install` builds them (cpu/*.cc) if there is a compiler; `available()` says if they can be used. They take float32 queries and
tables in float32, bfloat16 or int8 with a float32 scale per row; everything is computed in float32 on XLA's own threads.
"""

import ctypes
import functools
import importlib.machinery
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

SETS = ('best', 'portable', 'avx2', 'avx512')  # instruction sets; SSE2 or NEON are the portable one's


@functools.cache
def _library():
    """The library, its functions registered with XLA; None if it was not built. $SPARK_CPU_KERNELS names another, or 'none'."""
    built = [pathlib.Path(__file__).with_name(f'_cpu{suffix}') for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = os.environ.get('SPARK_CPU_KERNELS') or next((path for path in built if path.exists()), None)
    if path in (None, 'none'):
        return None
    library = ctypes.CDLL(str(path))
    for name in ('spark_matmul', 'spark_ffn', 'spark_attention', 'spark_read'):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
    return library


def available():
    """Were the kernels built?"""
    return _library() is not None


def instruction_sets():
    """Those of SETS that this processor has, the best last."""
    return SETS[1 : _library().spark_best_set() + 1]


def preferred():
    """What 'best' stands for: $SPARK_CPU_INSTRUCTIONS, one of SETS, to try another than the processor's best."""
    return os.environ.get('SPARK_CPU_INSTRUCTIONS', 'best')


def matmul(x_TxD, W_OxD, scales=None, *, instructions='best'):
    """x Wᵀ: float32 (T, O).

    Args:
      x_TxD: float32.
      W_OxD: float32, bfloat16 or int8.
      scales: float32 (O,), of int8 rows.
      instructions: one of SETS.
    """
    y = jax.ShapeDtypeStruct((x_TxD.shape[0], W_OxD.shape[0]), jnp.float32)
    return _call('spark_matmul', y, instructions)(x_TxD, W_OxD, _scales(scales))


def ffn(x_TxD, K1_Fxr, records_FxR, k, huber=0.0, K1_scales=None, record_scales=None, *, instructions='best'):
    """The Spark FFN, V · (GELU(StatTopK_k(K1 x[:r])) ⊙ K2 x[r:]), reading the rows of active neurons alone.

    Args:
      x_TxD: float32.
      K1_Fxr: float32, bfloat16 or int8.
      records_FxR: (F, (D − r) + D), a neuron's row of K2 and its row of V side by side, in the dtype of K1.
      k, huber: of FFNConfig.
      K1_scales: float32 (F,), record_scales: float32 (F, 2), of int8 rows.

    Returns:
      (y float32 (T, D), active neurons int32 (T,)).
    """
    T, F = x_TxD.shape[0], K1_Fxr.shape[0]
    quantile = -ndtri(k / F) if k < F else -np.inf
    shapes = jax.ShapeDtypeStruct(x_TxD.shape, jnp.float32), jax.ShapeDtypeStruct((T,), jnp.int32)
    call = _call('spark_ffn', shapes, instructions, quantile=np.float32(quantile), huber=np.float32(huber))
    return call(x_TxD, K1_Fxr, _scales(K1_scales), records_FxR, _scales(record_scales))


def attention(q, new, keys, records, first, length, *, k=0, window=0, cap=0.0, instructions='best'):
    """Attention of L queries to a ring of S slots, place p of a row in slot p mod S, where their own keys and values go first.

    Spark if k > 0: the r leading dimensions of the keys are scanned, the rest and the values are read for survivors alone.

    Args:
      q: float32 (B, N, G, L, d), rotated and scaled; query l has place length + l.
      new: float32 (B, N, L, 2d), the rotated keys of these places and their values, side by side.
      keys: (B, N, S, r) float32 or bfloat16; r = d for dense attention.
      records: (B, N, S, (d − r) + d), the rest of a token's key and its value side by side, in the dtype of keys.
      first: int32 (B,), the first place that holds a token; what is before it sees itself alone.
      length: int32 ().
      k, window, cap: of AttentionConfig; window 0: all.

    Returns:
      (y float32 (B, N, G, L, d), attended keys int32 (B, N, G, L), keys, records); the last two in place where nobody else needs
      the old ones.
    """
    shapes = [jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:-1], jnp.int32)]
    shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, records)]
    attrs = {'k': np.int64(k), 'window': np.int64(window), 'cap': np.float32(cap)}
    call = _call('spark_attention', shapes, instructions, {2: 2, 3: 3}, **attrs)
    return call(q, new, keys, records, first, length, quantiles(k, keys.shape[2]))


def quantiles(k, n):
    """float32 (n + 1,): Q(1 − k / i) for i visible keys, −∞ up to k."""
    i = np.arange(n + 1)
    return jnp.asarray(np.where(i > k, -ndtri(np.minimum(k / np.maximum(i, 1), 1)), -np.inf), jnp.float32)


def read(x, *, instructions='best'):
    """The sum of a float32 array, (): the fastest way to read it, and so the measure of the others."""
    return _call('spark_read', jax.ShapeDtypeStruct((), jnp.float32), instructions)(x)


def _call(name, shapes, instructions, aliases=None, **attrs):
    if instructions == 'best':
        instructions = preferred()
    _library()
    call = jax.ffi.ffi_call(name, shapes, input_output_aliases=aliases)
    return functools.partial(call, set=np.int64(SETS.index(instructions)), **attrs)


def _scales(scales):
    return jnp.zeros(0, jnp.float32) if scales is None else scales
