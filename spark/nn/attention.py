"""The attention half of a layer: a lookup in the tokens of the context."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spark import ops
from spark.config import AttentionConfig
from spark.kernels import blockwise, gpu, tpu
from spark.nn.layers import by_token, count, matrix, mesh_axes, shards, softcap, sow


def visible_keys(q_positions, k_positions, q_segments, k_segments, window=0):
    """(B, L, S): may query l see key s: in the same segment, not later, and less than `window` (if any) before it."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (q_segments[:, :, None] == k_segments[:, None, :]) & (distance >= 0)
    return seen & (distance < window) if window else seen


@flax.struct.dataclass
class Packed:
    """What the queries of packed rows see, for attention in blocks: the first key of each, and its segment; both (B, L) int32."""

    starts: jax.Array
    segments: jax.Array
    window: int = flax.struct.field(pytree_node=False)


def visible_to(cfg, window, positions_BxL, segments_BxL):
    """What each query sees, in the form that `Attention` wants: `visible_keys`, or in blocks, `Packed`."""
    long = positions_BxL.shape[1] > cfg.block or shards('length') > 1
    if cfg.impl in ('blockwise', 'pallas') or (cfg.impl == 'auto' and long):
        return Packed(blockwise.visible_starts(segments_BxL, window), segments_BxL, window)
    return visible_keys(positions_BxL, positions_BxL, segments_BxL, segments_BxL, window)


def in_blocks(cfg, platform, q, k, v, packed):
    """`blockwise.attention` on each device's own rows, heads and queries, by the kernels of the platform.

    Loops whose length depends on the data need not agree between devices then. Where the length is split, each device gathers
    the keys and values of its heads.
    """
    (B, N, _, L, _), mesh = q.shape, jax.sharding.get_abstract_mesh()
    split = {axis: n for axis in ('batch', 'kv_heads', 'length') if (n := shards(axis)) > 1}
    together = mesh.empty or any({'batch': B, 'kv_heads': N, 'length': L}[axis] % n for axis, n in split.items())
    across = mesh_axes('length') if 'length' in split and not together else None
    own = L // split['length'] if across else L
    spec = blockwise.Spec(cfg.r, cfg.k, cfg.logit_cap, cfg.block)
    pallas = cfg.impl == 'pallas' or (cfg.impl == 'auto' and platform == 'tpu')

    def look_up(q, k, v, packed):
        interpret = {'interpret': platform != 'tpu'}
        if pallas and not spec.k and not across and L % tpu.LANES == 0 and L % min(L, spec.block) == 0:
            return tpu.splash_attention(q, k, v, packed.segments, spec, packed.window, **interpret)
        # Causal rows of one document need no segments: padding comes last, and nothing sees it.
        if cfg.impl == 'auto' and platform == 'gpu' and cfg.documents == 'joined' and not across and gpu.covers(q, spec):
            return gpu.attention(q, k, v, packed.window)
        offset = 0
        if across:
            k, v = (jax.lax.all_gather(x, across, axis=2, tiled=True) for x in (k, v))
            offset = own * jax.lax.axis_index(across)
        if pallas and (not across or min(own, spec.block) % tpu.LANES == 0):
            return tpu.attention(q, k, v, packed.starts, spec, offset, **interpret)
        return blockwise.attention(q, k, v, packed.starts, spec, offset)

    if together:
        return look_up(q, k, v, packed)
    rows, heads = mesh_axes('batch'), mesh_axes('kv_heads')
    by_query, by_key = PartitionSpec(rows, heads, None, across), PartitionSpec(rows, heads, across)
    specs = {'in_specs': (by_query, by_key, by_key, PartitionSpec(rows, across)), 'out_specs': (by_query, by_query)}
    return jax.shard_map(look_up, mesh=mesh, check_vma=False, **specs)(q, k, v, packed)


class Attention(nn.Module):
    """x (B, L, D) → (B, L, D).

    kind 'dense': softmax over all visible keys. kind 'spark': the first r dimensions of a head choose about k of the
    visible keys (all, where no more are visible) and weigh them by softmax; the others multiply by softplus. Rotary
    embedding and the scale 1/sqrt(width) go to each part by itself. The threshold is that of the plain scores; the
    soft-cap, being monotone, comes after it. `visible` is of `visible_to`.
    """

    cfg: AttentionConfig
    dtype: jnp.dtype
    platform: str = 'cpu'

    @nn.compact
    def __call__(self, x_BxLxD, positions_BxL, visible):
        cfg = self.cfg
        D, H, N, d = x_BxLxD.shape[-1], cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        B, L = positions_BxL.shape
        x = by_token(x_BxLxD)

        def project(name, heads, axis):
            W_DxHxd = matrix(self, name, (D, heads, d), ('embed', axis, 'head_dim'), D, self.dtype)
            return (x @ W_DxHxd.reshape(D, heads * d)).reshape(B, L, heads, d)

        by = rotations(cfg, positions_BxL)
        q_BxLxHxd = rotate(cfg, project('q', H, 'heads'), by, scale=True)
        k_BxSxNxd = rotate(cfg, project('k', N, 'kv_heads'), by)
        v_BxSxNxd = project('v', N, 'kv_heads')

        # H/N query heads share a key-value head.
        G = H // N
        q_BxNxGxLxd = q_BxLxHxd.reshape(B, L, N, G, d).transpose(0, 2, 3, 1, 4)
        k_BxNxSxd, v_BxNxSxd = k_BxSxNxd.transpose(0, 2, 1, 3), v_BxSxNxd.transpose(0, 2, 1, 3)
        if isinstance(visible, Packed):
            y, attended = in_blocks(cfg, self.platform, q_BxNxGxLxd, k_BxNxSxd, v_BxNxSxd, visible)
            sow(self, 'attended', attended.reshape(B, N, G * L))
        else:
            y = self._look_up(q_BxNxGxLxd, k_BxNxSxd, v_BxNxSxd, visible)
        y_BxLxHd = y.reshape(B, N, G, L, d).transpose(0, 3, 1, 2, 4).reshape(B, L, H * d)
        out = matrix(self, 'out', (H, d, D), ('heads', 'head_dim', 'embed'), H * d, self.dtype)
        return (by_token(y_BxLxHd) @ out.reshape(H * d, D)).reshape(B, L, D)

    def _look_up(self, q_BxNxGxLxd, k_BxNxSxd, V, visible_BxLxS):
        """All scores at once; the queries that share keys line up in one axis, so that each lookup has one table."""
        B, N, G, L, d = q_BxNxGxLxd.shape
        q, K = q_BxNxGxLxd.reshape(B, N, G * L, d), k_BxNxSxd.swapaxes(2, 3)
        visible = jnp.tile(visible_BxLxS, (1, G, 1))[:, None]
        sigma1 = lambda s: self.sigma1(s, visible)
        if self.cfg.kind == 'dense':
            return ops.dense_lookup(q, K, V, sigma1, score_dtype=jnp.float32)
        (q1, q2), (K1, K2) = jnp.split(q, [self.cfg.r], axis=-1), jnp.split(K, [self.cfg.r], axis=-2)
        return ops.spark_lookup(q1, q2, K1, K2, V, sigma1, jax.nn.softplus, score_dtype=jnp.float32)

    def sigma1(self, s, visible):
        """`sigma1` of this layer, counted."""
        weights, keep = sigma1(self.cfg, s, visible)
        count(self, 'attended', jnp.broadcast_to(keep, s.shape))
        return weights


def sigma1(cfg, s, visible):
    """(the weights of keys for scores (…, S), top-k included; which keys have one); `visible` broadcasts against them."""
    keep = visible if cfg.kind == 'dense' else ops.statistical_keep(s, cfg.k, where=visible)
    # A select, since softmax(…, where=keep) takes twice as long; a token sees itself, so no row is all −inf.
    return jax.nn.softmax(jnp.where(keep, softcap(s, cfg.logit_cap), -jnp.inf), axis=-1), keep


def rotations(cfg, positions):
    """`ops.rotation` by the positions, for each part of a head."""
    widths = [cfg.r, cfg.head_dim - cfg.r] if cfg.r else [cfg.head_dim]
    return [ops.rotation(positions, width, cfg.rope_base) for width in widths]


def rotate(cfg, x_BxLxHxd, rotations, scale=False):
    """Rotary embedding of each part of a head; a query's parts are also scaled for their scores."""
    parts = []
    for part, rotation in zip(jnp.split(x_BxLxHxd, [cfg.r] if cfg.r else [], axis=-1), rotations, strict=True):
        width = part.shape[-1] * (cfg.query_dim or cfg.head_dim) / cfg.head_dim
        part = ops.rope(part, rotation)
        parts.append(part * width**-0.5 if scale else part)
    return jnp.concatenate(parts, axis=-1)
