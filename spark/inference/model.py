"""The forward pass of decoding: `layout`'s weights, a cache of keys and records, and kernels that touch what is active."""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from spark.config import FFN_KINDS
from spark.kernels import cpu, gather, rows_gpu, rows_tpu
from spark.nn import attention as nn_attention
from spark.nn import ffn as nn_ffn
from spark.nn.layers import rms_norm, softcap


@flax.struct.dataclass
class Cache:
    """What decoding remembers.

    layers: of each {'keys', 'records'}, rings with place p in slot p mod S. length: int32 (), places so far.
    rotations: `nn.attention.rotations` by every place, since XLA:CPU evaluates sines anew for each head that uses them.
    """

    layers: list
    length: jax.Array
    rotations: list


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
    return Cache(layers, jnp.zeros((), jnp.int32), nn_attention.rotations(a, jnp.arange(size)))


def forward(serving, weights, cache, tokens_BxL, first_B, wanted=None):
    """(the cache with L more places, float32 logits (B, V) behind the last, counts): `hidden` and the output head.

    Equal to the training model's full forward pass over each row's own tokens. Where `wanted`, bool (), is False, zeros take the
    place of logits: only the last of a prompt's chunks needs the head, a twentieth of a 2B model's work on a chunk of 64.
    """
    cache, h_BxD, counts = hidden(serving, weights, cache, tokens_BxL, first_B)
    E, cap = weights['embedding'], serving.cfg.logit_cap
    head = lambda h_BxD: softcap(product(serving, h_BxD, E).astype(jnp.float32), cap)
    none = lambda h_BxD: jnp.zeros((len(h_BxD), len(E.values)), jnp.float32)
    return cache, head(h_BxD) if wanted is None else jax.lax.cond(wanted, head, none, h_BxD), counts


def hidden(serving, weights, cache, tokens_BxL, first_B):
    """(the cache with L more places, hidden states (B, D) of the last, counts per layer).

    Args:
      serving: a `Serving`.
      weights: of `layout.lay_out`.
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
    rotations = jax.tree.map(lambda table: table[positions_BxL], cache.rotations)
    layers, counts = [], []
    for i, w in enumerate(weights['layers']):
        window = cfg.attention.window if cfg.pattern[i % len(cfg.pattern)] == 'local' else 0
        y, layer, count = _attention(serving, w, window, rms_norm(x_BxLxD, w['pre_attention']), rotations, cache, i, first_B)
        x_BxLxD = x_BxLxD + rms_norm(y, w['post_attention'])
        y_TxD, count_ffn = ffn(serving, w, rms_norm(x_BxLxD, w['pre_ffn']).reshape(B * L, D))
        x_BxLxD = x_BxLxD + rms_norm(y_TxD.reshape(B, L, D), w['post_ffn'])
        layers.append(layer)
        count |= {name: x.reshape(B, L) if x.ndim else x + count.get(name, 0) for name, x in count_ffn.items()}
        counts.append(count)
    counts = {name: jnp.stack([count[name] for count in counts]) for name in counts[0]}
    return cache.replace(layers=layers, length=cache.length + L), rms_norm(x_BxLxD[:, -1], weights['final_norm']), counts


def product(serving, x_TxI, W):
    """x Wᵀ for a `Matrix` W (O, I): (T, O); float32 by the CPU kernels and for logits, else in the dtype of x."""
    if serving.kernels == 'cpu':
        return cpu.matmul(x_TxI, W.values, W.scales)
    y = jnp.matmul(x_TxI, W.values.astype(x_TxI.dtype).T, preferred_element_type=jnp.float32)
    return y if W.scales is None else y * W.scales


def _attention(serving, w, window, x_BxLxD, rotations, cache, i, first_B):
    """(y (B, L, D), the layer's cache, counts)."""
    a = serving.cfg.attention
    (B, L, D), H, N, d = x_BxLxD.shape, a.n_heads, a.n_kv_heads, a.head_dim
    qkv = product(serving, x_BxLxD.reshape(B * L, D), w['qkv']).astype(serving.compute).reshape(B, L, H + 2 * N, d)
    q, k, v = qkv[:, :, :H], qkv[:, :, H : H + N], qkv[:, :, H + N :]
    q_BxNxGxLxd = nn_attention.rotate(a, q, rotations, scale=True).reshape(B, L, N, H // N, d).transpose(0, 2, 3, 1, 4)
    k_BxNxLxd, v_BxNxLxd = (x.transpose(0, 2, 1, 3) for x in (nn_attention.rotate(a, k, rotations), v))
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
