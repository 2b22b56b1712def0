"""A trained model laid out for decoding: weights as the kernels read them, a cache of keys and records, and the forward pass.

| half      | scanned for every token                | read where active: one record per entry       |
|-----------|----------------------------------------|------------------------------------------------|
| FFN       | K1 (F, r), a row per neuron            | (F, (D − r) + D), its row of K2 and of V       |
| attention | keys (B, N, S, r), a row per token     | (B, N, S, (d − r) + d), rest of key, and value |

Dense attention is the same table with r = d. Other FFNs have no predictor and are two products.
"""

import functools
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from spark.config import FFN_KINDS, ModelConfig, ServeConfig
from spark.errors import ConfigError
from spark.kernels import cpu, gather, rows_gpu, rows_tpu
from spark.nn import attention as nn_attention
from spark.nn import ffn as nn_ffn
from spark.nn.layers import rms_norm, softcap

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
    return Serving(cfg, dtype, kernels, platform, serve.capacity, serve.overflow)


class Matrix(NamedTuple):
    """Rows of weights: values (rows, …), and scales float32 (rows, …) of int8 values, else None."""

    values: jax.Array
    scales: jax.Array | None = None


@flax.struct.dataclass
class Cache:
    """What decoding remembers: per layer {'keys', 'records'}, rings with place p in slot p mod S; and int32 () places so far."""

    layers: list
    length: jax.Array


# — weights —————————————————————————————————————————————————————————————————————————————————————————————————————————————————————


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


def lay_out(serving, leaf, place=lambda x: x):
    """The weights of a model for serving. Each leaf is asked for once and let go before the next: there is hardly a second copy.

    Args:
      serving: a `Serving`.
      leaf: a function of a parameter's path, such as ('groups', 'ffn_0', 'K1'), to the array.
      place: puts an array that is made of them where it is to stay.

    Returns:
      {'embedding': Matrix, 'final_norm', 'layers': [{'norms', 'qkv', 'out', 'ffn'}]}.
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
    embedding = jax.tree.map(place, jax.jit(lambda E: rows(E, dtype))(leaf('embedding')))
    return {'embedding': embedding, 'final_norm': leaf('final_norm', 'scale'), 'layers': layers}


def from_params(serving, params):
    """`lay_out` of a Transformer's parameters that are in memory."""
    return lay_out(serving, lambda *path: functools.reduce(lambda tree, name: tree[name], path, params['params']))


# — cache ———————————————————————————————————————————————————————————————————————————————————————————————————————————————————————


def slots(cfg, span, size, chunk):
    """Slots of a layer's ring for `size` places that come by `chunk` at a time and then one by one."""
    if span == 'global':
        return size
    # The first of a chunk still sees a window back; and chunks do not wrap.
    return min(size, -(-(cfg.attention.window + chunk - 1) // chunk) * chunk)


def init_cache(serving, batch, size, chunk):
    """An empty `Cache` for `batch` rows of at most `size` places, put in by `chunk` or one at a time."""
    cfg, a = serving.cfg, serving.cfg.attention
    layers = []
    for i in range(cfg.n_layers):
        shape = batch, a.n_kv_heads, slots(cfg, cfg.pattern[i % len(cfg.pattern)], size, chunk)
        r = a.r or a.head_dim
        table = {'keys': (*shape, r), 'records': (*shape, 2 * a.head_dim - r)}
        layers.append({name: jnp.zeros(shape, serving.stored) for name, shape in table.items()})
    return Cache(layers, jnp.zeros((), jnp.int32))


# — forward pass ————————————————————————————————————————————————————————————————————————————————————————————————————————————————


def forward(serving, weights, cache, tokens_BxL, first_B):
    """(the cache with L more places, float32 logits (B, V) behind the last, counts): `hidden` and the output head.

    Equal to the training model's full forward pass over each row's own tokens.
    """
    cache, h_BxD, counts = hidden(serving, weights, cache, tokens_BxL, first_B)
    logits_BxV = product(serving, h_BxD, weights['embedding']).astype(jnp.float32)
    return cache, softcap(logits_BxV, serving.cfg.logit_cap), counts


def hidden(serving, weights, cache, tokens_BxL, first_B):
    """(the cache with L more places, hidden states (B, D) of the last, counts per layer).

    Args:
      serving: a `Serving`.
      weights: of `lay_out`.
      cache: of `init_cache`, with room left.
      tokens_BxL: int32.
      first_B: int32, the place of each row's first token; what is before it is padding.

    Counts: 'attended' (layers, B, L) keys, mean over the heads; 'active' (layers, B, L) neurons, of kinds that have zeros;
    'overflow' (layers,): tokens and queries of theirs for which the capacity was too small.
    """
    cfg = serving.cfg
    (B, L), D = tokens_BxL.shape, cfg.d_model
    E = weights['embedding']
    x_BxLxD = E.values[tokens_BxL].astype(jnp.float32)
    if E.scales is not None:
        x_BxLxD = x_BxLxD * E.scales[tokens_BxL][..., None]
    x_BxLxD = x_BxLxD.astype(serving.compute) * jnp.asarray(D**0.5, serving.compute)
    positions_BxL = jnp.maximum(cache.length + jnp.arange(L) - first_B[:, None], 0)
    angles = nn_attention.angles(cfg.attention, positions_BxL)
    layers, counts = [], []
    for i, w in enumerate(weights['layers']):
        window = cfg.attention.window if cfg.pattern[i % len(cfg.pattern)] == 'local' else 0
        y, layer, count = _attention(serving, w, window, rms_norm(x_BxLxD, w['pre_attention']), angles, cache, i, first_B)
        x_BxLxD = x_BxLxD + rms_norm(y, w['post_attention'])
        y_TxD, count_ffn = ffn(serving, w, rms_norm(x_BxLxD, w['pre_ffn']).reshape(B * L, D))
        x_BxLxD = x_BxLxD + rms_norm(y_TxD.reshape(B, L, D), w['post_ffn'])
        layers.append(layer)
        count |= {name: x.reshape(B, L) if x.ndim else x + count.get(name, 0) for name, x in count_ffn.items()}
        counts.append(count)
    counts = {name: jnp.stack([count[name] for count in counts]) for name in counts[0]}
    return Cache(layers, cache.length + L), rms_norm(x_BxLxD[:, -1], weights['final_norm']), counts


def product(serving, x_TxI, W):
    """x Wᵀ for a `Matrix` W (O, I): (T, O); float32 by the CPU kernels and for logits, else in the dtype of x."""
    if serving.kernels == 'cpu':
        return cpu.matmul(x_TxI, W.values, W.scales)
    y = jnp.matmul(x_TxI, W.values.astype(x_TxI.dtype).T, preferred_element_type=jnp.float32)
    return y if W.scales is None else y * W.scales


def _attention(serving, w, window, x_BxLxD, angles, cache, i, first_B):
    """(y (B, L, D), the layer's cache, counts)."""
    a = serving.cfg.attention
    (B, L, D), H, N, d = x_BxLxD.shape, a.n_heads, a.n_kv_heads, a.head_dim
    qkv = product(serving, x_BxLxD.reshape(B * L, D), w['qkv']).astype(serving.compute).reshape(B, L, H + 2 * N, d)
    q, k, v = qkv[:, :, :H], qkv[:, :, H : H + N], qkv[:, :, H + N :]
    q_BxNxGxLxd = nn_attention.rotate(a, q, angles, scale=True).reshape(B, L, N, H // N, d).transpose(0, 2, 3, 1, 4)
    k_BxNxLxd, v_BxNxLxd = (x.transpose(0, 2, 1, 3) for x in (nn_attention.rotate(a, k, angles), v))
    new = jnp.concatenate([k_BxNxLxd, v_BxNxLxd], axis=-1)
    layer, r = cache.layers[i], a.r or d
    S = layer['keys'].shape[2]
    if serving.kernels == 'cpu':
        keys, table = layer['keys'], layer['records']
        y, attended, keys, table = cpu.attention(
            q_BxNxGxLxd, new, keys, table, first_B, cache.length, k=a.k, window=window, cap=a.logit_cap
        )
        layer, counts = {'keys': keys, 'records': table}, {}
    else:
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.length % S, axis=2)
        layer = {'keys': write(layer['keys'], new[..., :r]), 'records': write(layer['records'], new[..., r:])}
        y, attended, overflow = _look_up(serving, q_BxNxGxLxd, layer, visible(cache.length, L, S, first_B, window))
        counts = {'overflow': overflow}
    y_TxHd = y.transpose(0, 3, 1, 2, 4).reshape(B * L, H * d).astype(serving.compute)
    out = product(serving, y_TxHd, w['out']).astype(serving.compute).reshape(B, L, D)
    return out, layer, counts | {'attended': jnp.mean(attended.astype(jnp.float32), axis=(1, 2))}


def visible(length, L, S, first_B, window):
    """(B, L, S): does query l, at place length + l, see what slot s holds once L places are written; padding sees itself."""
    last = length + L - 1
    places_S = last - (last - jnp.arange(S)) % S
    queries_L = length + jnp.arange(L)
    first = jnp.maximum(first_B[:, None], queries_L - window + 1 if window else 0)
    first = jnp.minimum(first, queries_L)[:, :, None]
    return (places_S >= first) & (places_S <= queries_L[:, None])


def _look_up(serving, q_BxNxGxLxd, layer, visible_BxLxS):
    """(y (B, N, G, L, d), attended (B, N, G, L), overflow ()) in plain JAX."""
    a = serving.cfg.attention
    B, N, G, L, d = q_BxNxGxLxd.shape
    keys, table = layer['keys'].astype(q_BxNxGxLxd.dtype), layer['records'].astype(q_BxNxGxLxd.dtype)
    q, r = q_BxNxGxLxd.reshape(B, N, G * L, d), keys.shape[-1]
    s = jnp.matmul(q[..., :r], keys.swapaxes(2, 3), preferred_element_type=jnp.float32)
    weights, keep = nn_attention.sigma1(a, s, jnp.tile(visible_BxLxS, (1, G, 1))[:, None])
    keep, room, overflow = jnp.broadcast_to(keep, s.shape), math.ceil(a.k * serving.capacity), jnp.zeros((), jnp.int32)
    if not a.k:
        y = weights.astype(table.dtype) @ table
    elif serving.kernels != 'masked' and 2 * G * L * room <= s.shape[-1]:
        y, overflow = gather.look_up(q[..., r:], weights, keep, table, jax.nn.softplus, room, serving.overflow)
    else:
        y = gather.masked(q[..., r:], weights, table, jax.nn.softplus)
    return y.reshape(q_BxNxGxLxd.shape), jnp.sum(keep, axis=-1).reshape(B, N, G, L), overflow


def ffn(serving, w, x_TxD):
    """One layer's FFN by its weights: (y (T, D), counts)."""
    f = serving.cfg.ffn
    gated, _, has_predictor = FFN_KINDS[f.kind]
    if not has_predictor:
        s = product(serving, x_TxD, w['keys']).astype(serving.compute)
        s1, s2 = (s[:, : f.d_ff], s[:, f.d_ff :]) if gated else (s, 1)
        a, active = nn_ffn.sigma1(f, s1)
        y = product(serving, a * s2, w['VT']).astype(serving.compute)
        return y, {} if active is None else {'active': jnp.sum(active, axis=-1)}
    K1, table = w['K1'], w['records']
    if serving.kernels == 'cpu' and f.topk == 'statistical':
        y, active = cpu.ffn(x_TxD, K1.values, table.values, f.k, f.huber, K1.scales, table.scales)
        return y, {'active': active}
    s = product(serving, x_TxD[:, : f.r], K1).astype(serving.compute)
    a, active = nn_ffn.sigma1(f, s)
    room, q2_TxR, identity, overflow = math.ceil(f.k * serving.capacity), x_TxD[:, f.r :], lambda s2: s2, jnp.zeros((), jnp.int32)
    if serving.kernels != 'masked' and 2 * len(x_TxD) * room <= f.d_ff:
        read = _reader(serving, table)
        y, overflow = gather.look_up(q2_TxR, a, active, table.values, identity, room, serving.overflow, table.scales, read)
    else:
        y = gather.masked(q2_TxR, a, table.values, identity, table.scales)
    return y[:, : x_TxD.shape[1]].astype(serving.compute), {'active': jnp.sum(active, axis=-1), 'overflow': overflow}


def _reader(serving, table):
    """The Pallas kernel that reads a layer's records, or None; interpreted where it is not at home."""
    interpret = {'interpret': serving.platform != serving.kernels}
    if serving.kernels == 'tpu' and table.values.ndim == 3:
        return functools.partial(rows_tpu.read_rows, **interpret)
    D, r = serving.cfg.d_model, serving.cfg.ffn.r
    if serving.kernels == 'gpu' and table.scales is None and rows_gpu.columns(D - r, D):
        return functools.partial(rows_gpu.read_rows, **interpret)
    return None


def union(share, n):
    """The share of entries that at least one of n tokens activates, each a share of its own, independently."""
    return 1 - (1 - share) ** n


def bytes_per_step(serving, weights, cache, did, batch, head=True):
    """Bytes that a step of decoding has to read.

    All weights, but of Spark's records those of active neurons; of the cache the keys and the attended records. Masked lookups
    read everything. Records that several tokens of a batch activate are read once; they are taken to choose independently.

    Args:
      did: the means of a step's counts, {'active', 'attended'}.
      head: the output head is read too.
    """
    nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    sparse, read = serving.kernels != 'masked', nbytes(weights['embedding']) if head else 0
    active = union(did['active'] / serving.cfg.ffn.d_ff, batch) if sparse and 'active' in did else 1
    for w, table in zip(weights['layers'], cache.layers, strict=True):
        records = nbytes(w.get('records', ()))
        read += nbytes(w) - records * (1 - active)
        S = table['keys'].shape[2]
        seen = jnp.minimum(S, cache.length) / S
        attended = did['attended'] / S if sparse and serving.cfg.attention.k else seen
        read += nbytes(table['keys']) * seen + nbytes(table['records']) * jnp.minimum(attended, seen)
    return float(read)
