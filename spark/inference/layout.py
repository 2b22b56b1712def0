"""How a trained model is laid out for decoding: its weights in the order in which kernels read them.

| half      | scanned for every token                | read for active entries: one record per entry  |
|-----------|----------------------------------------|------------------------------------------------|
| FFN       | K1 (F, r), a row per neuron            | (F, (D − r) + D), its row of K2 and of V       |
| attention | keys (B, N, S, r), a row per token     | (B, N, S, (d − r) + d), rest of key, and value |

Without a predictor r is the whole width, and K2, which a gate has, is as wide. Without a second score there is no K2. FFNs
without top-k or predictor are two products, by 'keys' and by 'VT'. A learned projection 'P' is a product of its own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from spark.config import ModelConfig, ServeConfig
from spark.errors import ConfigError
from spark.kernels import cpu, rows_tpu
from spark.nn.block import NORMS
from spark.nn.runs import runs
from spark.nn.transformer import abstract_params

DTYPES = ('float32', 'bfloat16', 'int8')  # of weights; int8 has a float32 scale per row


class Serving(NamedTuple):
    """How a model is served. Kernels (not 'auto'), capacity and overflow are those of `ServeConfig`."""

    cfg: ModelConfig
    dtype: str = 'float32'  # of the weights, one of DTYPES
    kernels: str = 'masked'  # for both lookups; `model.computed_by` tells what they decline
    platform: str = 'cpu'  # 'cpu', 'gpu' or 'tpu'
    capacity: float = 1.5
    overflow: str = 'masked'

    @property
    def compute(self) -> np.dtype:
        """The dtype of activations: float32 on CPUs, where XLA's bfloat16 is slow, else that of the weights."""
        return jnp.dtype('float32' if self.platform == 'cpu' or self.dtype == 'float32' else 'bfloat16')

    @property
    def stored(self) -> np.dtype:
        """The dtype of the cache."""
        return jnp.dtype('float32' if self.dtype == 'float32' else 'bfloat16')


def serving_for(cfg: ModelConfig, dtype: str, platform: str, devices: int = 1, serve: ServeConfig | None = None) -> Serving:
    """The `Serving` that a ServeConfig asks for; a ConfigError if its kernels are not available.

    Kernels 'auto' are the platform's fastest on one device, and 'masked' on several.
    """
    serve = serve or ServeConfig()
    kernels = serve.kernels
    if kernels == 'auto':
        available = platform in ('tpu', 'gpu') or (platform == 'cpu' and cpu.available())
        kernels = 'masked' if devices > 1 else platform if available else 'gather'
    if kernels in ('cpu', 'gpu', 'tpu'):
        wrong = f'there is {devices} × {platform}' if platform != kernels or devices > 1 else ''
        if wrong or (kernels == 'cpu' and not cpu.available()):
            raise ConfigError(f"serve.kernels = {kernels!r}: {wrong or cpu.why_unavailable()}; want 'gather', 'masked' or 'auto'")
    if kernels == 'cpu' and (wanted := cpu.preferred()) not in (sets := ('best', *cpu.instruction_sets())):
        raise ConfigError(f'SPARK_CPU_INSTRUCTIONS={wanted}: want one of {", ".join(sets)}')
    return Serving(cfg, dtype, kernels, platform, serve.capacity, serve.overflow)


def of_layer(serving: Serving, i: int) -> Serving:
    """The same, of a model in which all layers are like layer i."""
    return serving._replace(cfg=serving.cfg.per_layer[i])


class Matrix(NamedTuple):
    """Rows of weights, and the scales of int8 rows."""

    values: Shaped[Array | np.ndarray, 'rows ...']
    scales: Float[Array | np.ndarray, 'rows ...'] | None = None


def rows(W: Float[Array | np.ndarray, 'rows ...'], dtype: str) -> Matrix:
    """A float matrix as a `Matrix`. int8 rounds to multiples of 1/127 of the largest magnitude of each row."""
    if dtype != 'int8':
        return Matrix(W.astype(dtype))
    W = W.astype(jnp.float32)
    largest = jnp.max(jnp.abs(W), axis=-1, initial=0)  # rows may be empty
    scales = jnp.where(largest > 0, largest, 1) / 127
    return Matrix(jnp.round(W / scales[..., None]).astype(jnp.int8), scales)


def records(K2: Float[Array | np.ndarray, 'n R'], V: Float[Array | np.ndarray, 'n D'], dtype: str, tiles: bool = False) -> Matrix:
    """Both rows of each entry side by side, with `tiles` as the TPU kernel reads them (not int8, which has two scales each)."""
    K2, V = rows(K2, dtype), rows(V, dtype)
    scales = None if K2.scales is None else jnp.stack([K2.scales, V.scales], axis=-1)
    table = jnp.concatenate([K2.values, V.values], axis=-1)
    return Matrix(rows_tpu.tiled(table) if tiles and scales is None else table, scales)


def _layer_recipe(serving, i):
    """[(name, function of parameters, their paths in a group)] of the layer at place i of `pattern`, whose own config this is."""
    dtype, kind = serving.dtype, serving.cfg.ffn.traits
    flat = lambda W_DxHxd: W_DxHxd.reshape(W_DxHxd.shape[0], -1).T
    stack = lambda *Ws: rows(jnp.concatenate(Ws), dtype)
    of = lambda half, *names: [(f'{half}_{i}', name) for name in names]
    recipe = [
        ('qkv', lambda q, k, v: stack(flat(q), flat(k), flat(v)), of('attention', 'q', 'k', 'v')),
        ('out', lambda out: stack(out.reshape(-1, out.shape[-1]).T), of('attention', 'out')),
        *((norm, lambda scale: scale, [(f'{norm}_{i}', 'scale')]) for norm in NORMS),
    ]
    if serving.cfg.attention.qk_norm:
        recipe += [(norm, lambda scale: scale, [(f'attention_{i}', norm, 'scale')]) for norm in ('q_norm', 'k_norm')]
    if kind.projected:
        recipe.append(('P', lambda P: stack(P.T), of('ffn', 'P')))
    keys = ('K1', 'K2') if kind.second else ('K',)
    if not kind.selects:
        stacked = lambda *Ks: stack(*(K.T for K in Ks))
        return [*recipe, ('keys', stacked, of('ffn', *keys)), ('VT', lambda V: stack(V.T), of('ffn', 'V'))]
    tiles = serving.kernels == 'tpu' and kind.gate == 'identity'
    table = lambda *K2_and_V: records(K2_and_V[0].T if kind.second else K2_and_V[-1][:, :0], K2_and_V[-1], dtype, tiles)
    return [*recipe, ('K1', lambda K1: stack(K1.T), of('ffn', keys[0])), ('records', table, of('ffn', *keys[1:], 'V'))]


def lay_out(serving: Serving, leaf: Callable[..., Any], place: Callable = jax.device_put) -> dict[str, Any]:
    """{'embedding': Matrix, 'final_norm': scale, 'layers': [{name: Matrix or scale}]}; `_layer_recipe` has the names.

    Each parameter is requested once and read layer by layer, so it can stay on disk. A parameter that is not used is a
    ConfigError: generation would run another model than was trained.

    Args:
      serving: how the model is run.
      leaf: a function of a parameter's path, such as ('groups', 'ffn_0', 'K1'), to the array, or to what gives its rows: x[i:j].
      place: puts a finished array where it is to stay.
    """
    cfg = serving.cfg
    recipes = [(run, i, _layer_recipe(serving._replace(cfg=own), i)) for run in runs(cfg) for i, own in enumerate(run.layers)]
    used = {('embedding',), ('final_norm', 'scale')}
    used |= {(run.name, *path) for run, _, recipe in recipes for _, _, paths in recipe for path in paths}
    params = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(cfg)['params'])}
    if unused := sorted('.'.join(path) for path in params - used):
        raise ConfigError(
            f'generation does not use the parameters {", ".join(unused)} of this model (FFN {cfg.ffn.kind!r}, attention '
            f'{cfg.attention.kind!r}): spark/inference/layout.py has to lay them out and spark/inference/model.py to compute them'
        )
    layers = [{} for _ in range(cfg.n_layers)]
    for run, i, recipe in recipes:
        for name, make, paths in recipe:
            leaves, make = [leaf(run.name, *path) for path in paths], jax.jit(make)
            for group, layer in enumerate(layers[run.where(i)]):
                layer[name] = jax.tree.map(place, make(*(x[group] for x in leaves)))
    E, make = leaf('embedding'), jax.jit(functools.partial(rows, dtype=serving.dtype))
    E = make(E) if isinstance(E, jax.Array) else _in_pieces(make, E)
    final_norm = place(jnp.asarray(leaf('final_norm', 'scale')[:]))
    return {'embedding': jax.tree.map(place, E), 'final_norm': final_norm, 'layers': layers}


def _in_pieces(make, table, size=16 << 20):
    """make(table), a tree of numpy arrays, computed from pieces of about `size` bytes.

    `device_put` turns numpy into a CPU array without a copy, whereas XLA:CPU copies a whole bfloat16 array to update a part.
    """
    aligned = getattr(table, 'aligned', 1)
    n = max(1, size // (table.dtype.itemsize * math.prod(table.shape[1:])) // aligned) * aligned
    whole = None
    for start in range(0, table.shape[0], n):
        piece = make(table[start : start + n])
        whole = whole or jax.tree.map(lambda x: _empty((table.shape[0], *x.shape[1:]), x.dtype), piece)
        for x, part in zip(jax.tree.leaves(whole), jax.tree.leaves(piece), strict=True):
            x[start : start + n] = part
    return whole


def _empty(shape, dtype, alignment=64):
    """`np.empty` whose first byte is aligned as XLA requires for zero-copy."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : raw.size - alignment + start].view(dtype).reshape(shape)


def from_params(serving: Serving, params: dict, place: Callable = jax.device_put) -> dict[str, Any]:
    """`lay_out` of a Transformer's parameters, of arrays or `StoredArray`s."""
    return lay_out(serving, lambda *path: functools.reduce(lambda tree, name: tree[name], path, params['params']), place)
