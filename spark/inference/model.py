"""The forward pass of decoding: the weights of `layout`, a cache of keys and records, kernels that read active entries only."""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spark import ops
from spark.config import Kind
from spark.inference.layout import Matrix, Serving, of_layer
from spark.kernels import cpu, gather, rows_gpu, rows_tpu
from spark.nn import attention as nn_attention
from spark.nn import ffn as nn_ffn
from spark.nn.block import block, embed, logits, rms_norm

CPU_FFN = Kind('gelu', gate='identity', topk=True, predictor=True)  # the one kind with a predictor that cpu.ffn computes

Counts = dict[str, Array]
Rows = Int[Array | np.ndarray, ' B']
Tokens = Int[Array | np.ndarray, 'B L']
Length = Int[Array | np.ndarray, '']
Flag = Bool[Array | np.ndarray, '']


@flax.struct.dataclass
class Cache:
    """What decoding remembers."""

    layers: list  # of {'keys', 'records'}: ring buffers that hold position p in slot p mod S
    length: Length  # the number of positions so far
    rotations: list  # of every position, as tables: XLA:CPU evaluates sines again for each head that uses them


def computed_by(serving: Serving, half: str) -> str:
    """What computes the lookup of 'attention' or 'ffn': serving.kernels, or 'gather' or 'masked' if those decline its kind.

    'gather' and the Pallas kernels leave a step to 'masked' where active entries could be more than half of the table. Where
    layers differ in this, all names.
    """
    if serving.cfg.layers:
        found = [computed_by(of_layer(serving, i), half) for i in range(serving.cfg.n_layers)]
        return ' + '.join(dict.fromkeys(found))
    cfg, f, kind = serving.cfg, serving.cfg.ffn, getattr(serving.cfg, half).traits
    reads_records = kind.topk and kind.gate == 'identity' and serving.dtype != 'int8'
    takes = {
        ('attention', 'cpu'): kind in nn_attention.KERNEL_KINDS,
        ('ffn', 'cpu'): not kind.selects or (kind == CPU_FFN and f.soft),
        ('ffn', 'tpu'): reads_records,
        ('ffn', 'gpu'): reads_records and rows_gpu.columns(cfg.d_model - f.r, cfg.d_model) > 0,
    }
    if takes.get((half, serving.kernels)):
        return serving.kernels
    return 'gather' if kind.topk and serving.kernels != 'masked' else 'masked'


def init_cache(serving: Serving, batch: int, size: int, chunk: int) -> Cache:
    """An empty `Cache` for `batch` rows of at most `size` positions, which arrive `chunk` at a time or one by one."""
    layers = []
    for own, window in zip(serving.cfg.per_layer, serving.cfg.windows, strict=True):
        a = own.attention
        r = a.r or a.head_dim
        # The first token of a chunk still sees a window back, and a chunk must lie in consecutive slots.
        slots = min(size, -(-(window + chunk - 1) // chunk) * chunk) if window else size
        empty = lambda width, slots=slots: jnp.zeros((batch, serving.cfg.attention.n_kv_heads, slots, width), serving.stored)
        layers.append({'keys': empty(r), 'records': empty(2 * a.head_dim - r)})
    rotations = [nn_attention.rotations(a, jnp.arange(size)) for a in _rotated_alike(serving.cfg)]
    return Cache(layers, jnp.zeros((), jnp.int32), rotations)


def _rotated_alike(cfg):
    """The different configs of attention, whatever their k."""
    return list(dict.fromkeys(layer.attention.model_copy(update={'k': 0}) for layer in cfg.per_layer))


def forward(
    serving: Serving, weights: dict, cache: Cache, tokens_BxL: Tokens, first_B: Rows, with_head: np.bool_ | Flag | None = None
) -> tuple[Cache, Float[Array, 'B V'], Counts]:
    """`hidden`, and the float32 logits that follow the last position.

    They equal those of the training model's full forward pass over each row's own tokens. Where `with_head` is False they are
    zeros: only the last chunk of a prompt needs the output head, 5 % of a 2B model's work on a chunk of 64.
    """
    cache, h_BxD, counts = hidden(serving, weights, cache, tokens_BxL, first_B)
    E = weights['embedding']
    head = lambda h_BxD: logits(h_BxD, lambda h: product(serving, h, E), serving.cfg.logit_cap)
    zeros = lambda h_BxD: jnp.zeros((len(h_BxD), len(E.values)), jnp.float32)
    return cache, head(h_BxD) if with_head is None else jax.lax.cond(with_head, head, zeros, h_BxD), counts


def hidden(
    serving: Serving, weights: dict, cache: Cache, tokens_BxL: Tokens, first_B: Rows
) -> tuple[Cache, Float[Array, 'B D'], Counts]:
    """(the cache with L more positions, hidden states of the last position, counts per layer).

    `first_B` is the position of each row's first token; all before it is padding. The cache must have room for L positions.

    Counts: 'attended' (n_layers, B, L) keys, mean over the heads; 'active' (n_layers, B, L) neurons of sparse kinds; with
    top-k 'records_read' (n_layers,), the records of neurons that the kernels read, one that is read twice counted twice;
    'overflow' (n_layers,) tokens and queries with more active entries than the capacity.
    """
    L, E = tokens_BxL.shape[1], weights['embedding']
    x_BxLxD = E.values[tokens_BxL].astype(jnp.float32)
    if E.scales is not None:
        x_BxLxD = x_BxLxD * E.scales[tokens_BxL][..., None]
    x_BxLxD = embed(x_BxLxD, serving.compute)
    positions_BxL = jnp.maximum(cache.length + jnp.arange(L) - first_B[:, None], 0)
    rotations = jax.tree.map(lambda table: table[positions_BxL], cache.rotations)
    layers, counts = [], []
    for i, w in enumerate(weights['layers']):
        layer = _Layer(serving, w, cache, i, rotations, first_B)
        x_BxLxD = block(x_BxLxD, lambda name, x, w=w: rms_norm(x, w[name]), layer.attention, layer.ffn)
        layers.append(layer.cache)
        counts.append(layer.counts)
    counts = _stacked(serving.cfg, counts)
    return cache.replace(layers=layers, length=cache.length + L), rms_norm(x_BxLxD[:, -1], weights['final_norm']), counts


def _stacked(cfg, counts):
    """The counts of all layers. Where only some layers count neurons, all are active in the others."""
    some = {name: x for count in counts for name, x in count.items()}

    def of(name, count, layer):
        most = layer.ffn.d_ff if name in ('active', 'records_read') else 0
        return count[name] if name in count else jnp.full_like(some[name], most)

    return {name: jnp.stack([of(name, *pair) for pair in zip(counts, cfg.per_layer, strict=True)]) for name in some}


def product(serving: Serving, x_TxI: Float[Array, 'T I'], W: Matrix) -> Float[Array, 'T O']:
    """x Wᵀ in float32."""
    if serving.kernels == 'cpu':
        return cpu.matmul(x_TxI, W.values, W.scales)
    y = jnp.matmul(x_TxI, W.values.astype(x_TxI.dtype).T, preferred_element_type=jnp.float32)
    return y if W.scales is None else y * W.scales


class _Layer:
    """The two halves of a layer as `block` takes them; they leave the layer's new cache and its counts in attributes."""

    def __init__(self, serving, w, cache, i, rotations, first_B):
        self.serving, self.w, self.first_B, self.length = of_layer(serving, i), w, first_B, cache.length
        self.rotations = rotations[_rotated_alike(serving.cfg).index(self.serving.cfg.attention.model_copy(update={'k': 0}))]
        self.cache, self.window, self.counts = cache.layers[i], serving.cfg.windows[i], {}

    def attention(self, x_BxLxD):
        serving, a = self.serving, self.serving.cfg.attention
        (B, L, D), H, N, d = x_BxLxD.shape, a.n_heads, a.n_kv_heads, a.head_dim
        multiply = lambda x, W: product(serving, x.reshape(B * L, -1), W).astype(serving.compute)
        qkv = multiply(x_BxLxD, self.w['qkv']).reshape(B, L, H + 2 * N, d)
        q, k, v = qkv[:, :, :H], qkv[:, :, H : H + N], qkv[:, :, H + N :]
        y_BxLxHd = nn_attention.attend(a, q, k, v, self.rotations, self._look_up, lambda name, x: rms_norm(x, self.w[name]))
        return multiply(y_BxLxHd.astype(serving.compute), self.w['out']).reshape(B, L, D)

    def _look_up(self, q_BxNxGxLxd, k_BxNxLxd, v_BxNxLxd):
        """Adds the new keys and values to the cache and looks the queries up in it."""
        a, keys, table = self.serving.cfg.attention, self.cache['keys'], self.cache['records']
        (B, N, G, L, d), (*_, S, r) = q_BxNxGxLxd.shape, keys.shape
        new = jnp.concatenate([k_BxNxLxd, v_BxNxLxd], axis=-1)
        if computed_by(self.serving, 'attention') == 'cpu':
            arguments = q_BxNxGxLxd, new, keys, table, self.first_B, self.length
            y, attended, keys, table = cpu.attention(*arguments, k=a.k, window=self.window, cap=a.logit_cap)
        else:
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.length % S, axis=2)
            keys, table = write(keys, new[..., :r]), write(table, new[..., r:])
            q, K, records = q_BxNxGxLxd.reshape(B, N, G * L, d), keys.astype(new.dtype), table.astype(new.dtype)
            s = jnp.matmul(q[..., :r], K.swapaxes(2, 3), preferred_element_type=jnp.float32)
            mask = visible(self.length, L, S, self.first_B, self.window)
            keep = jnp.broadcast_to(nn_attention.select(a, s, jnp.tile(mask, (1, G, 1))[:, None]), s.shape)
            weights = s if a.traits.adds else nn_attention.activated(a, s, keep)
            if a.traits.topk:
                y, overflow, _ = _second_half(self.serving, 'attention', q[..., r:], weights, keep, Matrix(records))
            else:
                y, overflow = weights.astype(records.dtype) @ records[..., d - r :], jnp.zeros((), jnp.int32)
            y, attended = y.reshape(q_BxNxGxLxd.shape), jnp.sum(keep, axis=-1).reshape(B, N, G, L)
            self.counts['overflow'] = overflow
        self.cache = {'keys': keys, 'records': table}
        self.counts['attended'] = jnp.mean(attended.astype(jnp.float32), axis=(1, 2))
        return y

    def ffn(self, x_BxLxD):
        B, L, D = x_BxLxD.shape
        y_TxD, counts = ffn(self.serving, self.w, x_BxLxD.reshape(B * L, D))
        for name, x in counts.items():
            self.counts[name] = x.reshape(B, L) if x.ndim else x + self.counts.get(name, 0)
        return y_TxD.reshape(B, L, D)


def visible(length: Length, L: int, S: int, first_B: Rows, window: int) -> Bool[Array, 'B L S']:
    """The mask: query l, at position length + l, sees the key in slot s of a ring buffer that holds these L positions, too.

    `visible_keys`, where the tokens of a row are one segment, and each padding token is a segment of its own.
    """
    last = length + L - 1
    queries_1xL = (length + jnp.arange(L))[None]
    positions_1xS = (last - (last - jnp.arange(S)) % S)[None]
    segment = lambda p: jnp.where(p >= first_B[:, None], jnp.iinfo(jnp.int32).max, p)
    return nn_attention.visible_keys(queries_1xL, positions_1xS, segment(queries_1xL), segment(positions_1xS), window)


def ffn(serving: Serving, w: dict, x_TxD: Float[Array, 'T D']) -> tuple[Float[Array, 'T D'], Counts]:
    """One layer's FFN by its weights, and its counts."""
    f, kind = serving.cfg.ffn, serving.cfg.ffn.traits
    if not kind.selects:
        s = product(serving, x_TxD, w['keys']).astype(serving.compute)
        a, active = nn_ffn.activations(f, s[:, : f.d_ff])
        if kind.gated:
            a = a * ops.ACTIVATIONS[kind.gate](s[:, f.d_ff :])
        y = product(serving, a, w['VT']).astype(serving.compute)
        return y, {} if active is None else {'active': jnp.sum(active, axis=-1)}
    K1, table = w['K1'], w['records']
    if computed_by(serving, 'ffn') == 'cpu':
        y, active, read = cpu.ffn(x_TxD, K1.values, table.values, f.k, f.huber, K1.scales, table.scales)
        return y, {'active': active, 'records_read': read}
    q1_Txr = product(serving, x_TxD, w['P']).astype(serving.compute) if kind.projected else x_TxD[:, : f.r or None]
    q2 = x_TxD[:, f.r :] if kind.second else x_TxD[:, :0]
    s = product(serving, q1_Txr, K1).astype(serving.compute)
    if kind.adds:
        a = nn_ffn.select(f, s)
        active = a != 0
    else:
        a, active = nn_ffn.activations(f, s)
    y, overflow, read = _second_half(serving, 'ffn', q2, a, active, table)
    counts = {'active': jnp.sum(active, axis=-1), 'records_read': read, 'overflow': overflow}
    return y[:, : x_TxD.shape[1]].astype(serving.compute), counts


def _second_half(serving, half, q2, a, active, table):
    """(y, overflow (), records read from each table (…)) of a lookup in plain JAX or Pallas."""
    cfg, by, (queries, n) = getattr(serving.cfg, half), computed_by(serving, half), a.shape[-2:]
    kind, room = cfg.traits, _room(serving, half, queries, n)
    if kind.adds:  # `a` are scores
        activated = {'attention': nn_attention, 'ffn': nn_ffn}[half].activated
        weigh = lambda a, s2, active: activated(cfg, a + s2, active)
    else:
        weigh = lambda a, s2, active: a * ops.ACTIVATIONS[kind.gate](s2) if kind.gated else a
    if not room:
        y, read = gather.masked(q2, a, active, table.values, weigh, table.scales), jnp.full(a.shape[:-2], n)
        return y, jnp.zeros((), jnp.int32), read
    pallas = {'tpu': rows_tpu, 'gpu': rows_gpu}.get(by)  # other platforms than its own interpret it
    kernel = pallas and functools.partial(pallas.read_rows, interpret=serving.platform != by)
    y, overflow = gather.look_up(q2, a, active, table.values, weigh, room, serving.overflow, table.scales, kernel)
    own = jnp.minimum(jnp.sum(active, axis=-1), room) if pallas else jnp.full(a.shape[:-1], room)
    again = jnp.where(overflow > 0, n, 0) if serving.overflow == 'masked' else 0
    return y, overflow, jnp.sum(own, axis=-1) + again


def _room(serving, half, queries, n):
    """How many of a table's n records each query has room for; 0 if all are read, since the rooms are over half of them."""
    room = math.ceil(getattr(serving.cfg, half).k * serving.capacity)
    return 0 if computed_by(serving, half) == 'masked' or 2 * queries * room > n else room


def bytes_per_step(serving: Serving, weights: dict, cache: Cache, means: dict, head: bool = True) -> float:
    """Bytes that a step of decoding has to read.

    All weights, but of Spark's records only those that were read: kernels for CPUs read a record once for up to 64 tokens that
    activate it, plain JAX reads each query's whole room. Of the cache, all keys, and the records of attended keys, or of each
    query's room. Masked lookups read everything. `means` has the mean of each of a step's counts, of all layers or by layer.
    """
    nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    total = nbytes(weights['embedding']) if head else 0
    means = {name: np.broadcast_to(mean, serving.cfg.n_layers) for name, mean in means.items()}
    for i, (w, table) in enumerate(zip(weights['layers'], cache.layers, strict=True)):
        own = of_layer(serving, i)
        a, F = own.cfg.attention, own.cfg.ffn.d_ff
        records = nbytes(w.get('records', ()))
        total += nbytes(w) - records + records * (means['records_read'][i] if 'records_read' in means else F) / F
        S = table['keys'].shape[2]
        filled, queries = jnp.minimum(S, cache.length), a.n_heads // a.n_kv_heads
        if computed_by(own, 'attention') == 'cpu':
            read = means['attended'][i] if a.k else S
        else:
            read = queries * _room(own, 'attention', queries, S) or S
        total += (nbytes(table['keys']) * filled + nbytes(table['records']) * jnp.minimum(read, filled)) / S
    return float(total)
