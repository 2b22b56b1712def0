"""The attention half of a layer: a lookup in the tokens of the context."""

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from spark import ops
from spark.config import AttentionConfig, Kind, called
from spark.errors import ConfigError
from spark.kernels import attention_gpu, blockwise, cpu, gpu, sparse_attention, tpu
from spark.kernels.blockwise import Keys, PerQuery, Queries
from spark.nn.block import Hidden, Integers
from spark.nn.layers import RMSNorm, by_token, matrix, mesh_axes, shards, sow
from spark.nn.runs import K

# What attention kernels compute: blockwise and Pallas for training, C++ for decoding. They decline every other kind.
KERNEL_KINDS = (Kind('softmax'), Kind('softmax', gate='softplus', topk=True, predictor=True))
SPARSE_KINDS = KERNEL_KINDS[1:]  # what the CPU kernels for training compute

ArrayOrNumpy = Array | np.ndarray
OfQueries = Int[ArrayOrNumpy, '#B L']
OfKeys = Int[ArrayOrNumpy, '#B S']
Scores = Float[Array, '*rows S']
Mask = Bool[Array, '... S']
Heads = Float[Array, 'B L H d']
KeyHeads = Float[Array, 'B L N d']
Rotations = list[tuple[Float[Array, '*positions _'], Float[Array, '*positions _']]]  # each part may have another half


def visible_keys(
    q_positions: OfQueries, k_positions: OfKeys, q_segments: OfQueries, k_segments: OfKeys, window: int = 0
) -> Bool[ArrayOrNumpy, 'B L S']:
    """Query l sees key s if both are in the same segment, and s is not later, and less than `window` (if not 0) before l."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (q_segments[:, :, None] == k_segments[:, None, :]) & (distance >= 0)
    return seen & (distance < window) if window else seen


@flax.struct.dataclass
class Packed:
    """What the queries of packed rows see, as attention in blocks takes it: the first key that each sees, and its segment."""

    starts: Integers
    segments: Integers
    window: int = flax.struct.field(pytree_node=False)


Visible = Bool[ArrayOrNumpy, 'B L L'] | Packed  # the mask of `visible_keys`, or for attention in blocks, `Packed`


def visible_to(
    cfg: AttentionConfig, window: int, varies: bool, positions: Integers, segments: Integers, dtype: DTypeLike, platform: str
) -> Visible:  # fmt: skip
    """What each query sees, in the form that `cfg.impl` takes; a ConfigError if its kernels decline this kind.

    `varies`: k is known at run time only, and some kernels decline that.
    """
    sharded, has_kernel = shards('length') > 1, cfg.traits in KERNEL_KINDS
    if cfg.impl in ('blockwise', 'pallas') and not has_kernel:
        raise ConfigError(f"model.attention.impl = {cfg.impl!r}: want 'auto' or 'full' for {called(cfg)}")
    if sharded and not has_kernel:
        raise ConfigError(f'mesh.context = {shards("length")}: want 1, since no kernel in blocks computes {called(cfg)}')
    L = positions.shape[1]
    long, sparse = L > cfg.block or sharded, computes_survivors_only(cfg, dtype, platform, L, varies)
    if cfg.impl in ('blockwise', 'pallas') or sparse or (cfg.impl == 'auto' and long and has_kernel):
        return Packed(blockwise.visible_starts(segments, window), segments, window)
    return visible_keys(positions, positions, segments, segments, window)


def computes_survivors_only(cfg: AttentionConfig, dtype: DTypeLike, platform: str, length: int, varies: bool = False) -> bool:
    """True if kernels that compute surviving keys only run this lookup; a ConfigError if `cfg.impl` wants them and they cannot.

    They compute in float32 on one CPU device. 'auto' takes them where they were measured to be faster: for at least 128 tokens.
    """
    able = cfg.traits in SPARSE_KINDS and not varies and cpu.can_train(dtype, platform)
    if cfg.impl == 'sparse' and not able:
        kernels = 'kernels compute Spark attention, of one k, in float32, on one CPU device, if they were built'
        want = "'auto', 'full' or 'blockwise'" if cfg.traits in KERNEL_KINDS else "'auto' or 'full'"
        raise ConfigError(f"model.attention.impl = 'sparse': want {want}: {kernels}, and this is {called(cfg)}")
    return able and (cfg.impl == 'sparse' or (cfg.impl == 'auto' and length >= 128))


class Attention(nn.Module):
    """The lookup of `cfg.kind` in the visible keys; `config.ATTENTION_KINDS` says what each kind computes.

    In Spark attention the first r dimensions of a head select about k of the visible keys (all, if no more are visible) and weigh
    them by softmax; the other dimensions multiply by softplus. Rotary embedding and the scale 1/sqrt(width) apply to each part
    separately; parts whose scores are added have the scale of the whole head. The threshold is taken of the plain scores, and the
    soft-cap, which is monotone, comes after it, unless `cfg.cap_first`.
    """

    cfg: AttentionConfig
    dtype: DTypeLike
    platform: str = 'cpu'

    @nn.compact
    def __call__(self, x_BxLxD: Hidden, positions_BxL: Integers, visible: Visible, kept: K = None) -> Hidden:
        """`kept` is k in place of that of the config, which is then the largest of the layers that are scanned with this one."""
        cfg = self.cfg
        (B, L), D, H, N, d = positions_BxL.shape, x_BxLxD.shape[-1], cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        x = by_token(x_BxLxD)

        def project(name, heads, axis):
            W_DxHxd = matrix(self, name, (D, heads, d), ('embed', axis, 'head_dim'), D, self.dtype)
            return (x @ W_DxHxd.reshape(D, heads * d)).reshape(B, L, heads, d)

        qkv = project('q', H, 'heads'), project('k', N, 'kv_heads'), project('v', N, 'kv_heads')
        look_up = lambda q, k, v: self.look_up(q, k, v, visible, kept)
        y_BxLxHd = attend(cfg, *qkv, rotations(cfg, positions_BxL), look_up, lambda name, x: RMSNorm(name=name)(x))
        out = matrix(self, 'out', (H, d, D), ('heads', 'head_dim', 'embed'), H * d, self.dtype)
        return (by_token(y_BxLxHd) @ out.reshape(H * d, D)).reshape(B, L, D)

    def look_up(self, q_BxNxGxLxd: Queries, k_BxNxSxd: Keys, v_BxNxSxd: Keys, visible: Visible, kept: K = None) -> Queries:
        """The lookup by the kernel that `visible` is made for; sows the number of attended keys."""
        cfg, (B, N, G, L, d) = self.cfg, q_BxNxGxLxd.shape
        if isinstance(visible, Packed):
            y, attended = in_blocks(cfg, self.platform, q_BxNxGxLxd, k_BxNxSxd, v_BxNxSxd, visible, kept)
            sow(self, 'attended', attended.reshape(B, N, G * L))
            return y
        # All scores at once. The queries that share keys become rows of one axis, so that each lookup has one table.
        q, K = q_BxNxGxLxd.reshape(B, N, G * L, d), k_BxNxSxd.swapaxes(2, 3)
        visible = jnp.tile(visible, (1, G, 1))[:, None]
        sigma1 = lambda s, s2=None: self.activate(s, visible, s2, k=kept)
        if not cfg.traits.second:
            y = ops.dense_lookup(q, K, v_BxNxSxd, sigma1, score_dtype=jnp.float32)
        else:
            (q1, q2), (K1, K2) = jnp.split(q, [cfg.r], axis=-1), jnp.split(K, [cfg.r], axis=-2)
            if cfg.traits.adds:
                y = ops.added_lookup(q1, q2, K1, K2, v_BxNxSxd, sigma1, score_dtype=jnp.float32)
            else:
                sigma2 = ops.ACTIVATIONS[cfg.traits.gate]
                y = ops.spark_lookup(q1, q2, K1, K2, v_BxNxSxd, sigma1, sigma2, score_dtype=jnp.float32)
        return y.reshape(B, N, G, L, d)

    def activate(self, s: Scores, visible: Mask, s2: Scores | None = None, *, k: K = None) -> Scores:
        """`weights` of this layer's scores; sows the number of attended keys."""
        w, keep = weights(self.cfg, s, visible, s2, k=k)
        sow(self, 'attended', jnp.sum(jnp.broadcast_to(keep, s.shape), axis=-1, dtype=jnp.float32))
        return w


def attend(
    cfg: AttentionConfig, q: Heads, k: KeyHeads, v: KeyHeads, rotations: Rotations,
    look_up: Callable[[Queries, Keys, Keys], Queries], norm: Callable[[str, Heads], Heads],
) -> Float[Array, 'B L Hd']:  # fmt: skip
    """Attention between the projections, heads side by side; in `look_up`, G heads share each of the N key-value heads.

    `norm(name, x)` normalises with the scale of that name, as in `block`.
    """
    (B, L, H, d), N = q.shape, cfg.n_kv_heads
    if cfg.qk_norm:
        q, k = norm('q_norm', q), norm('k_norm', k)
    q, k = rotate(cfg, q, rotations, scale=True), rotate(cfg, k, rotations)
    q_BxNxGxLxd = q.reshape(B, L, N, H // N, d).transpose(0, 2, 3, 1, 4)
    y_BxNxGxLxd = look_up(q_BxNxGxLxd, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    return y_BxNxGxLxd.transpose(0, 3, 1, 2, 4).reshape(B, L, H * d)


def weights(
    cfg: AttentionConfig, s: Scores, visible: Mask, s2: Scores | None = None, *, k: K = None
) -> tuple[Scores, Mask]:  # fmt: skip
    """(σ1 of scores, top-k included; the mask of the keys that have a weight); `visible` broadcasts against the scores.

    In a kind that adds them, the second scores join those that top-k leaves. `k` is that of the config, or this.
    """
    keep = select(cfg, s, visible, k=k)
    return activated(cfg, s if s2 is None else s + s2, keep), keep


def select(cfg: AttentionConfig, s: Scores, visible: Mask, *, k: K = None) -> Mask:
    """The keys that top-k leaves of the visible ones."""
    if not cfg.traits.topk:
        return visible
    s = ops.softcap(s, cfg.logit_cap) if cfg.traits.cap_first else s
    return ops.statistical_keep(s, cfg.k if k is None else k, where=visible, ddof=cfg.traits.ddof)


def activated(cfg: AttentionConfig, s: Scores, keep: Mask) -> Scores:
    """σ1 of soft-capped scores; keys that are not kept have none."""
    # A select, since softmax(…, where=keep) takes twice as long. A token sees itself, so no row is all −inf.
    return ops.ACTIVATIONS[cfg.traits.activation](jnp.where(keep, ops.softcap(s, cfg.logit_cap), -jnp.inf))


def rotations(cfg: AttentionConfig, positions: Int[ArrayOrNumpy, '*positions']) -> Rotations:
    """`ops.rotation` for each part of a head."""
    widths = [cfg.r, cfg.head_dim - cfg.r] if cfg.r else [cfg.head_dim]
    return [ops.rotation(positions, width, cfg.rope_base) for width in widths]


def rotate(cfg: AttentionConfig, x: Heads, rotations: Rotations, scale: bool = False) -> Heads:
    """Rotary embedding of each part of a head. `scale`, for queries, divides each part by the root of its width.

    Parts whose scores are added are divided by the root of the whole width.
    """
    parts = []
    for part, rotation in zip(jnp.split(x, [cfg.r] if cfg.r else [], axis=-1), rotations, strict=True):
        width = cfg.head_dim if cfg.traits.adds else part.shape[-1]
        width = width * (cfg.query_dim or cfg.head_dim) / cfg.head_dim
        part = ops.rope(part, rotation)
        parts.append(part * width**-0.5 if scale else part)
    return jnp.concatenate(parts, axis=-1)


def in_blocks(
    cfg: AttentionConfig, platform: str, q: Queries, k: Keys, v: Keys, packed: Packed, kept: K = None
) -> tuple[Queries, PerQuery]:  # fmt: skip
    """`blockwise.attention` on each device's own rows, heads and queries, by the kernels of the platform.

    shard_map, because the trip counts of its loops depend on the data and may then differ between devices. Where the length is
    sharded, each device all-gathers the keys and values of its heads.
    """
    (B, N, _, L, _), mesh = q.shape, jax.sharding.get_abstract_mesh()
    if mesh.empty or any(size % shards(axis) for axis, size in [('batch', B), ('kv_heads', N), ('length', L)]):
        return _kernel(cfg, platform, None, q, k, v, packed, kept)
    length = mesh_axes('length') if shards('length') > 1 else None
    rows, heads = mesh_axes('batch'), mesh_axes('kv_heads')
    by_query, by_key = PartitionSpec(rows, heads, None, length), PartitionSpec(rows, heads, length)
    inputs = by_query, by_key, by_key, PartitionSpec(rows, length), PartitionSpec()
    specs = {'in_specs': inputs, 'out_specs': (by_query, by_query)}
    kernel = lambda *args: _kernel(cfg, platform, length, *args)
    return jax.shard_map(kernel, mesh=mesh, check_vma=False, **specs)(q, k, v, packed, kept)


def _kernel(cfg, platform, length_axes, q, k, v, packed, kept):
    """Chooses the kernel for one device's queries; `length_axes` are the mesh axes that shard the length, or None."""
    L, spec = q.shape[3], blockwise.Spec(cfg.r, cfg.k, cfg.logit_cap, cfg.block)
    if computes_survivors_only(cfg, q.dtype, platform, L, kept is not None):
        return sparse_attention.attention(q, k, v, jnp.broadcast_to(packed.starts, (len(q), L)), spec)
    pallas, interpret = cfg.impl == 'pallas' or (cfg.impl == 'auto' and platform == 'tpu'), platform != 'tpu'
    if pallas and platform != 'gpu' and not spec.k and not length_axes and L % tpu.LANES == 0 and L % min(L, spec.block) == 0:
        return tpu.splash_attention(q, k, v, packed.segments, spec, packed.window, interpret=interpret)
    # Causal rows of one document need no segments: padding comes last, and no token sees it.
    if cfg.impl == 'auto' and platform == 'gpu' and cfg.documents == 'joined' and not length_axes and gpu.covers(q, spec):
        return gpu.attention(q, k, v, packed.window)
    offset = 0
    if length_axes:
        k, v = (jax.lax.all_gather(x, length_axes, axis=2, tiled=True) for x in (k, v))
        offset = L * jax.lax.axis_index(length_axes)
    if pallas and platform == 'gpu':
        if why_not := attention_gpu.why_not(spec, q.shape[-1], v.shape[-1]):
            raise ConfigError(f"model.attention.impl = 'pallas': want 'auto' or 'blockwise', or {why_not}")
        return attention_gpu.attention(q, k, v, packed.starts, spec, offset, kept)
    if pallas and (not length_axes or min(L, spec.block) % tpu.LANES == 0):
        return tpu.attention(q, k, v, packed.starts, spec, offset, kept, interpret=interpret)
    return blockwise.attention(q, k, v, packed.starts, spec, offset, kept=kept)
