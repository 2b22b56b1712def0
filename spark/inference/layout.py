"""How a trained model is laid out for decoding: its weights as the kernels read them.

| half      | scanned for every token                | read where active: one record per entry       |
|-----------|----------------------------------------|------------------------------------------------|
| FFN       | K1 (F, r), a row per neuron            | (F, (D − r) + D), its row of K2 and of V       |
| attention | keys (B, N, S, r), a row per token     | (B, N, S, (d − r) + d), rest of key, and value |

Dense attention is the same table with r = d. Other FFNs have no predictor and are two products.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spark.config import FFN_KINDS, ModelConfig, ServeConfig
from spark.errors import ConfigError
from spark.kernels import cpu, rows_tpu

DTYPES = ('float32', 'bfloat16', 'int8')  # of weights


class Serving(NamedTuple):
    """How a model is run.

    cfg: its ModelConfig.
    dtype: of the weights, one of DTYPES; int8 has a float32 scale per row.
    kernels: 'cpu' (of `kernels.cpu`, in float32), 'gather' (plain JAX that reads what is active), 'masked' (plain JAX that
      computes everything, as training does), or 'tpu' and 'gpu' (the Pallas kernel of the FFN for few tokens, 'gather' for the
      rest).
    platform: 'cpu', 'gpu' or 'tpu', which decides in what to compute.
    capacity: of 'gather': room for so many times k entries per token.
    overflow: of 'gather', for a token with more than that: 'masked' computes it in full, 'drop' leaves out the excess. Both are
      counted.
    """

    cfg: ModelConfig
    dtype: str = 'float32'
    kernels: str = 'masked'
    platform: str = 'cpu'
    capacity: float = 1.5
    overflow: str = 'masked'

    @property
    def compute(self):
        """The dtype of activations: float32 on CPUs, where XLA's own bfloat16 is slow, else that of the weights."""
        return jnp.dtype('float32' if self.platform == 'cpu' or self.dtype == 'float32' else 'bfloat16')

    @property
    def stored(self):
        """The dtype of the cache."""
        return jnp.dtype('float32' if self.dtype == 'float32' else 'bfloat16')


def serving_for(cfg, dtype, platform, devices=1, serve=None):
    """The `Serving` of a ModelConfig by a ServeConfig; 'auto' is the platform's best for one device, and 'masked' for several.

    Raises:
      ConfigError: the kernels asked for are not here.
    """
    serve = serve or ServeConfig()
    kernels = serve.kernels
    if kernels == 'auto':
        here = platform in ('tpu', 'gpu') or (platform == 'cpu' and cpu.available())
        kernels = 'masked' if devices > 1 else platform if here else 'gather'
    if kernels in ('cpu', 'gpu', 'tpu'):
        wrong = f'here is {devices} × {platform}' if platform != kernels or devices > 1 else ''
        if wrong or (kernels == 'cpu' and not cpu.available()):
            raise ConfigError(f"serve.kernels = {kernels!r}: {wrong or 'not built'}; want 'gather', 'masked' or 'auto'")
    if kernels == 'cpu' and (wanted := cpu.preferred()) not in (sets := ('best', *cpu.instruction_sets())):
        raise ConfigError(f'SPARK_CPU_INSTRUCTIONS={wanted}: want one of {", ".join(sets)}')
    return Serving(cfg, dtype, kernels, platform, serve.capacity, serve.overflow)


class Matrix(NamedTuple):
    """Rows of weights: values (rows, …), and scales float32 (rows, …) of int8 values, else None."""

    values: jax.Array
    scales: jax.Array | None = None


def rows(W, dtype):
    """A float matrix (rows, …) as a `Matrix`; int8 rounds to 127 steps either side of 0 of the largest of each row."""
    if dtype != 'int8':
        return Matrix(W.astype(dtype))
    W = W.astype(jnp.float32)
    largest = jnp.max(jnp.abs(W), axis=-1)
    scales = jnp.where(largest > 0, largest, 1) / 127
    return Matrix(jnp.round(W / scales[..., None]).astype(jnp.int8), scales)


def records(K2_xR, V_xD, dtype, tiles=False):
    """Both rows of each entry side by side; their scales, if any, (…, 2). In tiles for the TPU's kernel, which has no int8."""
    K2, V = rows(K2_xR, dtype), rows(V_xD, dtype)
    scales = None if K2.scales is None else jnp.stack([K2.scales, V.scales], axis=-1)
    table = jnp.concatenate([K2.values, V.values], axis=-1)
    return Matrix(rows_tpu.tiled(table) if tiles and scales is None else table, scales)


def lay_out(serving, leaf, place=jax.device_put):
    """The weights of a model for serving. Leaves are asked for once, and read layer by layer, so they may lie on a disk.

    Args:
      serving: a `Serving`.
      leaf: a function of a parameter's path, such as ('groups', 'ffn_0', 'K1'), to the array, or to what gives its rows: x[i:j].
      place: puts an array that is made of them where it is to stay.

    Returns:
      {'embedding': Matrix, 'final_norm': scale, 'layers': [{'qkv', 'out': Matrix, 'pre_attention', 'post_attention', 'pre_ffn',
      'post_ffn': scale, and 'K1', 'records': Matrix of a Spark FFN, or 'keys', 'VT': Matrix of another}]}.
    """
    cfg, dtype = serving.cfg, serving.dtype
    groups, n = cfg.n_layers // len(cfg.pattern), len(cfg.pattern)
    layers = [{} for _ in range(cfg.n_layers)]
    gated, _, has_predictor = FFN_KINDS[cfg.ffn.kind]

    def fill(name, make, *paths):
        """layers[…][name] = make(the layer's slice of each leaf)."""
        leaves = [leaf('groups', *path) for path in paths]
        for g in range(groups):
            layers[g * n + i][name] = jax.tree.map(place, make(*(x[g] for x in leaves)))

    flat = lambda W_DxHxd: W_DxHxd.reshape(W_DxHxd.shape[0], -1).T
    as_rows = lambda *Ws: rows(jnp.concatenate(Ws), dtype)
    for i in range(n):
        qkv = lambda q, k, v: as_rows(flat(q), flat(k), flat(v))
        fill('qkv', jax.jit(qkv), *((f'attention_{i}', name) for name in 'qkv'))
        fill('out', jax.jit(lambda out: as_rows(out.reshape(-1, out.shape[-1]).T)), (f'attention_{i}', 'out'))
        if has_predictor:
            fill('K1', jax.jit(lambda K1: as_rows(K1.T)), (f'ffn_{i}', 'K1'))
            table = lambda K2, V: records(K2.T, V, dtype, tiles=serving.kernels == 'tpu')
            fill('records', jax.jit(table), (f'ffn_{i}', 'K2'), (f'ffn_{i}', 'V'))
        else:
            names = ('K1', 'K2') if gated else ('K',)
            fill('keys', jax.jit(lambda *Ks: as_rows(*(K.T for K in Ks))), *((f'ffn_{i}', name) for name in names))
            fill('VT', jax.jit(lambda V: as_rows(V.T)), (f'ffn_{i}', 'V'))
        for norm in ('pre_attention', 'post_attention', 'pre_ffn', 'post_ffn'):
            fill(norm, lambda scale: scale, (f'{norm}_{i}', 'scale'))
    E, make = leaf('embedding'), jax.jit(functools.partial(rows, dtype=dtype))
    E = make(E) if isinstance(E, jax.Array) else _some_at_a_time(make, E)
    final_norm = place(jnp.asarray(leaf('final_norm', 'scale')[:]))
    return {'embedding': jax.tree.map(place, E), 'final_norm': final_norm, 'layers': layers}


def _some_at_a_time(make, table, size=16 << 20):
    """make(table), a tree of rows, from pieces of about `size` bytes, or of as many rows as the table keeps together; numpy.

    Because `device_put` makes a CPU's array of numpy without a copy, and XLA:CPU copies all of a bfloat16 array to update a part.
    """
    aligned = getattr(table, 'aligned', 1)
    n = max(1, size // (table.dtype.itemsize * math.prod(table.shape[1:])) // aligned) * aligned
    whole = None
    for at in range(0, table.shape[0], n):
        piece = make(table[at : at + n])
        whole = whole or jax.tree.map(lambda x: _empty((table.shape[0], *x.shape[1:]), x.dtype), piece)
        for x, part in zip(jax.tree.leaves(whole), jax.tree.leaves(piece), strict=True):
            x[at : at + n] = part
    return whole


def _empty(shape, dtype, boundary=64):
    """`np.empty` that begins at a multiple of so many bytes, as XLA wants it."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + boundary, np.uint8)
    start = -raw.ctypes.data % boundary
    return raw[start : raw.size - boundary + start].view(dtype).reshape(shape)


def from_params(serving, params):
    """`lay_out` of a Transformer's parameters that are in memory."""
    return lay_out(serving, lambda *path: functools.reduce(lambda tree, name: tree[name], path, params['params']))
