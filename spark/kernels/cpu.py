"""Both lookups on CPUs, by C++ kernels behind XLA's foreign function interface, which read only what is active.

`pip install` builds them from cpu/*.cc if there is a compiler. Queries are float32. Tables are float32, bfloat16, or int8 with a
float32 scale per row. All arithmetic is in float32, on XLA's own threads.
"""

import ctypes
import functools
import importlib.machinery
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32, Num
from scipy.special import ndtri

SETS = ('best', 'portable', 'avx2', 'avx512')  # instruction sets; 'portable' is SSE2 or NEON
TARGETS = (
    'matmul', 'ffn', 'attention', 'read',
    'ffn_forward', 'ffn_backward', 'attention_forward', 'attention_backward', 'add_transposed',
)  # fmt: skip
AnyArray = Array | np.ndarray
Tokens = Float32[AnyArray, 'T D']
Keys = Num[AnyArray, 'B N S r']
Records = Num[AnyArray, 'B N S 2*d-r']


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, with its functions registered in XLA; None if there is none. $SPARK_CPU_KERNELS is another path, or 'none'."""
    built = [pathlib.Path(__file__).with_name(f'_cpu{suffix}') for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = os.environ.get('SPARK_CPU_KERNELS') or next((path for path in built if path.exists()), None)
    if path in (None, 'none'):
        return None
    library = ctypes.CDLL(str(path))
    for name in TARGETS:
        name = f'spark_{name}'
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
    return library


def available() -> bool:
    """True if the kernels can be used; if not, `why_unavailable` says why."""
    return _library() is not None


def why_unavailable() -> str:
    """The reason, for a message: what setup.py recorded when the build failed, if it did."""
    if os.environ.get('SPARK_CPU_KERNELS') == 'none':
        return 'SPARK_CPU_KERNELS=none'
    report = pathlib.Path(__file__).with_name('cpu_build_error.txt')
    return report.read_text('utf-8').strip() if report.exists() else 'they were never built'


def instruction_sets() -> tuple[str, ...]:
    """Those of SETS that this processor supports, the best last."""
    return SETS[1 : _library().spark_best_set() + 1]


def preferred() -> str:
    """The instruction set that 'best' stands for: $SPARK_CPU_INSTRUCTIONS, to try another than the processor's best."""
    return os.environ.get('SPARK_CPU_INSTRUCTIONS', 'best')


def instructions() -> str:
    """The instruction set that kernels use."""
    return instruction_sets()[-1] if preferred() == 'best' else preferred()


def matmul(
    x_TxD: Tokens, W_OxD: Num[AnyArray, 'O D'], scales: Float32[AnyArray, ' O'] | None = None, *, instructions: str = 'best'
) -> Float32[Array, 'T O']:
    """x Wᵀ; `scales` are those of int8 rows."""
    y = jax.ShapeDtypeStruct((x_TxD.shape[0], W_OxD.shape[0]), jnp.float32)
    return call('spark_matmul', y, instructions)(x_TxD, W_OxD, _scales(scales))


def ffn(
    x_TxD: Tokens, K1_Fxr: Num[AnyArray, 'F r'], records_FxR: Num[AnyArray, 'F 2*D-r'], k: int, huber: float = 0.0,
    K1_scales: Float32[AnyArray, ' F'] | None = None, record_scales: Float32[AnyArray, 'F 2'] | None = None,
    *, instructions: str = 'best',
) -> tuple[Float32[Array, 'T D'], Int32[Array, ' T'], Int32[Array, '']]:  # fmt: skip
    """The Spark FFN, V · (GELU(StatTopK_k(K1 x[:r])) ⊙ K2 x[r:]), each token's active neurons, and the records read.

    Only the records of active neurons are read, once for all tokens of a chunk of 64. A record is a neuron's row of K2 followed
    by its row of V, in the dtype of K1; in int8 it has a scale for each of the two. k and huber are those of FFNConfig.
    """
    T, F = x_TxD.shape[0], K1_Fxr.shape[0]
    quantile = -ndtri(k / F) if k < F else -np.inf
    shapes = jax.ShapeDtypeStruct(x_TxD.shape, jnp.float32), jax.ShapeDtypeStruct((T,), jnp.int32)
    shapes = *shapes, jax.ShapeDtypeStruct((), jnp.int32)
    run = call('spark_ffn', shapes, instructions, quantile=np.float32(quantile), huber=np.float32(huber))
    return run(x_TxD, K1_Fxr, _scales(K1_scales), records_FxR, _scales(record_scales))


def attention(
    q: Float32[AnyArray, 'B N G L d'], new: Float32[AnyArray, 'B N L 2*d'], keys: Keys, records: Records,
    first: Int32[AnyArray, ' B'], length: Int32[AnyArray, ''],
    *, k: int = 0, window: int = 0, cap: float = 0.0, instructions: str = 'best',
) -> tuple[Float32[Array, 'B N G L d'], Int32[Array, 'B N G L'], Keys, Records]:  # fmt: skip
    """Writes the new keys and values to the cache, then lets L queries attend to it.

    The cache is a ring buffer of S slots: position p lies in slot p mod S. Spark attention, k > 0, scans the first r dimensions
    of the keys, and reads the remaining ones and the values of attended keys only. Dense attention, k = 0, needs r = d.

    Args:
      q: after rotary embedding and scaling; query l has position length + l.
      new: the keys at these positions, after rotary embedding, followed by their values.
      keys, records: the cache, in float32 or bfloat16; a record is the remaining dimensions of a key followed by its value.
      first: each row's first position that holds a token; a padding token, before it, sees itself alone.
      k, window, cap: as in AttentionConfig.

    Returns:
      (y, the number of attended keys, keys, records). The cache is updated in place where no one else needs the old one.
    """
    shapes = [jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:-1], jnp.int32)]
    shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, records)]
    attrs = {'k': np.int64(k), 'window': np.int64(window), 'cap': np.float32(cap)}
    run = call('spark_attention', shapes, instructions, {2: 2, 3: 3}, **attrs)
    return tuple(run(q, new, keys, records, first, length, quantiles(k, keys.shape[2])))


def quantiles(k: int, n: int) -> Float32[Array, ' {n}+1']:
    """Q(1 − k / i) for i = 0 … n visible keys; −∞ where i ≤ k."""
    i = np.arange(n + 1)
    return jnp.asarray(np.where(i > k, -ndtri(np.minimum(k / np.maximum(i, 1), 1)), -np.inf), jnp.float32)


def add_transposed(
    y: Float32[AnyArray, 'n m'], x: Float32[AnyArray, 'm n'], bias: Float32[AnyArray, ' n']
) -> Float32[Array, 'n m']:  # fmt: skip
    """y + xᵀ + bias[:, None], in place where no one else needs y."""
    return call('spark_add_transposed', jax.ShapeDtypeStruct(y.shape, jnp.float32), aliases={0: 0})(y, x, bias)


def read(x: Float32[AnyArray, '...']) -> Float32[Array, '']:
    """The sum of an array: the fastest way to read memory, with which the other kernels are compared."""
    return call('spark_read', jax.ShapeDtypeStruct((), jnp.float32), 'best')(x)


def floats(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    """Float32 results of these shapes, for `call`."""
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def can_train(dtype: DTypeLike, platform: str) -> bool:
    """Do the kernels for training run here? They compute in float32, on one CPU device."""
    return dtype == jnp.float32 and platform == 'cpu' and jax.sharding.get_abstract_mesh().size <= 1 and available()


def call(
    name: str, shapes: Any, instructions: str = 'best', aliases: dict[int, int] | None = None, **attrs
) -> Callable[..., Any]:  # fmt: skip
    """The kernel `name` as a function of arrays, whose results have these `shapes`; under vmap it is called row by row."""
    _library()
    chosen = preferred() if instructions == 'best' else instructions
    function = jax.ffi.ffi_call(name, shapes, input_output_aliases=aliases, vmap_method='sequential')
    return functools.partial(function, set=np.int64(SETS.index(chosen)), **attrs)


def _scales(scales):
    return jnp.zeros(0, jnp.float32) if scales is None else scales
