"""The feed-forward half of a layer: a lookup in a table of neurons."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from spark import ops
from spark.config import FFNConfig, Kind, called
from spark.errors import ConfigError
from spark.kernels import cpu, ffn_gpu, ffn_tpu, fused_ffn, sparse_ffn
from spark.nn.block import Hidden
from spark.nn.layers import by_token, matrix, mesh_axes, shards, sow
from spark.nn.runs import K

# What the kernels for training compute, with a soft statistical top-k. They decline every other kind.
KERNEL_KINDS = (
    Kind('gelu', gate='identity', topk=True, predictor=True),
    Kind('gelu', gate='identity', topk=True, ddof=0),
    Kind('gelu', topk=True),
)

Scores = Float[Array, '*tokens F']


class FFN(nn.Module):
    """The lookup of `cfg.kind`, with d_ff neurons, for each token.

    `config.FFN_KINDS` says what each kind computes. The keys are K (D × F) if there is one score, K1 and K2 (D × F) if there are
    two, and K1 (r × F) and K2 (D − r × F) with a predictor, K (r × F) if that is all. A learned projection is P (D × r). The
    values are V (F × D).
    """

    cfg: FFNConfig
    dtype: DTypeLike
    platform: str = 'cpu'

    @nn.compact
    def __call__(self, x_BxLxD: Hidden, k: K = None) -> Hidden:
        """`k` in place of that of the config, which is then the largest of the layers that are scanned with this one."""
        D, F, r, kind = x_BxLxD.shape[-1], self.cfg.d_ff, self.cfg.r, self.cfg.traits
        x_TxD = by_token(x_BxLxD)
        # Scores begin with a variance of 1; those that are added, together.
        keys = lambda name, width: matrix(self, name, (width, F), ('embed', 'ffn'), D if kind.adds else width, self.dtype)
        V_FxD = matrix(self, 'V', (F, D), ('ffn', 'embed'), F, self.dtype)
        q1, q2 = (x_TxD[..., :r], x_TxD[..., r:]) if kind.predictor else (x_TxD, x_TxD)
        if kind.projected:
            q1 = x_TxD @ matrix(self, 'P', (D, r), ('embed', None), D, self.dtype)
        if kind.second:
            K1, K2 = keys('K1', q1.shape[-1]), keys('K2', q2.shape[-1])
        else:
            q2, K1, K2 = x_TxD[..., :0], keys('K', q1.shape[-1]), jnp.zeros((0, F), self.dtype)
        sigma1 = lambda s, s2=None: self.activate(s, s2, k=k)
        if computes_active_only(self.cfg, self.dtype, self.platform, x_BxLxD.size // D, k):
            y_TxD, active = sparse_ffn.ffn(q1, q2, K1, K2, V_FxD, self.cfg.k, self.cfg.huber, kind.ddof)
            sow(self, 'active', active.astype(jnp.float32))
        elif self.cfg.impl == 'pallas':
            y_TxD, active = fused(self.cfg, self.platform, q1, q2, K1, K2, V_FxD, k)
            sow(self, 'active', active)
        elif kind.adds:
            y_TxD = ops.added_lookup(q1, q2, K1, K2, V_FxD, sigma1)
        elif kind.gated:
            y_TxD = ops.spark_lookup(q1, q2, K1, K2, V_FxD, sigma1, ops.ACTIVATIONS[kind.gate])
        else:
            y_TxD = ops.dense_lookup(q1, K1, V_FxD, sigma1)
        return y_TxD.reshape(x_BxLxD.shape)

    def activate(self, s_TxF: Scores, s2_TxF: Scores | None = None, *, k: K = None) -> Scores:
        """σ1 of this layer's scores, and of the second ones if those are added; sows the number of active neurons."""
        s_TxF = nn.with_logical_constraint(s_TxF, ('batch', *(['length'] if s_TxF.ndim == 3 else []), 'ffn'))
        a_TxF, active = activations(self.cfg, s_TxF, s2_TxF, k=k)
        if active is not None:
            sow(self, 'active', jnp.sum(active, axis=-1, dtype=jnp.float32))
        return a_TxF


def computes_active_only(cfg: FFNConfig, dtype: DTypeLike, platform: str, tokens: int, k: K = None) -> bool:
    """True if kernels that compute active neurons only run this lookup; a ConfigError if `cfg.impl` wants them and they cannot.

    They compute in float32 on one CPU device. 'auto' takes them where they were measured to be faster: with AVX, for at least 512
    tokens, and at most a tenth of the neurons.
    """
    covered = k is None and cfg.traits in KERNEL_KINDS and cfg.soft and cfg.k < cfg.d_ff and (tokens + 16) * cfg.d_ff < 2**31
    able = covered and cpu.can_train(dtype, platform)
    if cfg.impl == 'sparse' and not able:
        kernels = 'kernels compute a statistical top-k with shrink, one k < d_ff, in float32, on one CPU device, if built'
        raise ConfigError(f"model.ffn.impl = 'sparse': want 'auto' or 'masked': {kernels}{_declined(cfg)}")
    faster = able and cpu.instructions() != 'portable' and tokens >= 512 and 10 * cfg.k <= cfg.d_ff
    return able and (cfg.impl == 'sparse' or (cfg.impl == 'auto' and faster))


def _declined(cfg):
    return '' if cfg.traits in KERNEL_KINDS and cfg.groups == 1 else f', and none computes {called(cfg)}'


def fused(
    cfg: FFNConfig, platform: str, x1: Float[Array, '*tokens r'], x2: Float[Array, '*tokens rest'],
    K1: Float[Array, 'r F'], K2: Float[Array, 'rest F'], V: Float[Array, 'F D'], k: K = None,
) -> tuple[Float[Array, '*tokens D'], Float[Array, '*tokens']]:  # fmt: skip
    """`fused_ffn.ffn` of each device's own tokens, by the kernels of the platform; a ConfigError if they decline.

    A CPU interprets the kernels for TPUs.
    """
    kind = cfg.traits
    if not (k is None and kind in KERNEL_KINDS and kind.gated and cfg.soft and cfg.k < cfg.d_ff):
        kernels = 'kernels compute a statistical top-k with shrink, of one k < d_ff neurons with a gate'
        raise ConfigError(f"model.ffn.impl = 'pallas': want 'auto' or 'masked': {kernels}{_declined(cfg)}")
    passes = (ffn_gpu if platform == 'gpu' else ffn_tpu).PASSES[platform == 'cpu']
    if why_not := passes.why_not(x1.shape[-1], x2.shape[-1], *V.shape):
        raise ConfigError(f"model.ffn.impl = 'pallas': want 'masked', or {why_not}")

    def local(x1, x2, K1, K2, V):
        rows = (x.reshape(-1, x.shape[-1]) for x in (x1, x2))
        y, active = fused_ffn.ffn(*rows, K1, K2, V, cfg.k, cfg.huber, kind.ddof, passes)
        return y.reshape(*x1.shape[:-1], -1), active.reshape(x1.shape[:-1])

    mesh, axes = jax.sharding.get_abstract_mesh(), ('batch', 'length') if x1.ndim == 3 else ('batch',)
    if mesh.empty or any(size % shards(axis) for axis, size in zip(axes, x1.shape, strict=False)):
        return local(x1, x2, K1, K2, V)
    by_token, whole = PartitionSpec(*map(mesh_axes, axes)), PartitionSpec()
    specs = {'in_specs': (by_token, by_token, whole, whole, whole), 'out_specs': (by_token, by_token)}
    return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(x1, x2, K1, K2, V)


def activations(
    cfg: FFNConfig, s: Scores, s2: Scores | None = None, *, k: K = None
) -> tuple[Scores, Bool[Array, '*tokens F'] | None]:  # fmt: skip
    """(σ1 of the scores, top-k included; which entries are active, None for a kind that has no zeros).

    In a kind that adds them, the second scores join those that top-k leaves. `k` is that of the config, or this.
    """
    kind = cfg.traits
    if not kind.topk:
        a = ops.ACTIVATIONS[kind.activation](s)
        return a, a != 0 if kind.zeros else None
    kept = select(cfg, s, k=k)
    active = kept != 0
    return ops.ACTIVATIONS[kind.activation](kept) if s2 is None else activated(cfg, kept + s2, active), active


def select(cfg: FFNConfig, s: Scores, *, k: K = None) -> Scores:
    """TopK of the scores."""
    match cfg.topk:
        case 'statistical':
            # Tokens are normalised and keys have random directions, so no mean is large against the standard deviation.
            how = {'ddof': cfg.traits.ddof, 'huber': cfg.huber, 'pivot': False}
            topk = functools.partial(ops.statistical_topk, **how)
        case 'exact':
            topk = ops.exact_topk
        case 'approx':
            topk = functools.partial(ops.approx_topk, recall=cfg.recall)
    return ops.in_groups(functools.partial(topk, shrink=cfg.shrink), s, cfg.k if k is None else k, cfg.groups)


def activated(cfg: FFNConfig, s: Scores, active: Bool[Array, '*tokens F']) -> Scores:
    """σ1 of the scores of active neurons, and 0 for the others."""
    return jnp.where(active, ops.ACTIVATIONS[cfg.traits.activation](s), 0)
