"""Next-token cross-entropy, with z-loss (arXiv 2204.02311), distillation, and the sums that training and evaluation share."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spark.config import ExperimentConfig, ModelConfig
from spark.nn.layers import METRICS
from spark.nn.transformer import Transformer, activity

Sum = np.ndarray | np.generic  # on the host
ROUNDING = 1e-5  # of logits, relative to 1 + their size, when they are computed twice


class Teacher(NamedTuple):
    """A frozen model whose next-token distributions a run learns from, at a temperature."""

    model: Transformer
    params: dict
    temperature: float
    top: int  # likeliest tokens that its distribution is restricted to; 0: none are left out


def cross_entropy(
    model: Transformer, params: dict, hidden_BxLxD: jax.Array, targets_BxL: jax.Array, pieces: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per token (B, L): −log p(target) and log Z in nats (float32), and whether the target is the likeliest token.

    The vocabulary is cut into `pieces`, a divisor of its size. Logits exist for one piece at a time, forward and backward,
    and a sharded embedding is gathered piece by piece.
    """
    hidden_BxLxD = hidden_BxLxD.astype(jnp.float32)  # its gradient is then summed over the pieces in float32

    def step(carry, piece):
        E_RxD, c = piece
        return _likelihood(carry, _logits(model, params, hidden_BxLxD, E_RxD), targets_BxL, pieces, c), None

    top, total, target = _over_vocabulary(step, _nothing(targets_BxL), params['params']['embedding'], pieces)
    log_z = top + jnp.log(total)
    return log_z - target, log_z, target >= top


def distillation(
    model: Transformer, params: dict, hidden_BxLxD: jax.Array, targets_BxL: jax.Array, teacher: Teacher, taught_BxLxD: jax.Array,
    pieces: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Per token (B, L), in nats: −log p(target), log Z, and KL(p ‖ q) of the teacher's and the model's next-token distributions.

    With logits t of the teacher, whose hidden states are `taught`, z of the model, and a temperature T:

        p_i = exp(t_i / T) / Σ_{j ∈ S} exp(t_j / T) for i ∈ S, else 0        q_i = exp(z_i / T) / Σ_j exp(z_j / T)
        KL(p ‖ q) = Σ_{i ∈ S} p_i · (log p_i − log q_i)

    S are the teacher.top likeliest tokens of the teacher, with all that are as likely as the last of them; q is not restricted.
    They are told by a threshold, so that both logits are met a piece at a time, as in `cross_entropy`, and nothing is gathered.
    """
    T, (frozen, E_VxD) = teacher.temperature, (teacher.params, teacher.params['params']['embedding'])
    hidden_BxLxD, zero = hidden_BxLxD.astype(jnp.float32), jnp.zeros(targets_BxL.shape, jnp.float32)
    of_teacher = functools.partial(_logits, teacher.model, frozen, taught_BxLxD)
    peak, least = zero - jnp.inf, None
    if teacher.top:
        best_BxLxn = _highest(of_teacher, E_VxD, targets_BxL.shape, teacher.top, pieces)
        peak, least = best_BxLxn[..., 0] / T, best_BxLxn[..., -1:]
        least = least - ROUNDING * (1 + jnp.abs(least))

    def step(carry, piece):
        (top, *_), spread, peak, mass, cross = carry[0], *carry[1:]
        (E_RxD, E_RxT), c = piece
        z, t = _logits(model, params, hidden_BxLxD, E_RxD), of_teacher(E_RxT)
        likelihood = _likelihood(carry[0], z, targets_BxL, pieces, c)
        spread = spread * jnp.exp((top - likelihood[0]) / T) + jnp.sum(jnp.exp((z - likelihood[0][..., None]) / T), axis=-1)
        u = t / T if least is None else jnp.where(t >= least, t / T, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(u, axis=-1))
        weight, shrunk = jnp.exp(u - new_peak[..., None]), jnp.exp(peak - new_peak)
        mass = mass * shrunk + jnp.sum(weight, axis=-1)
        cross = cross * shrunk + jnp.sum(weight * (t - z), axis=-1) / T
        return (likelihood, spread, new_peak, mass, cross), None

    start = _nothing(targets_BxL), zero, peak, zero, zero
    embeddings = params['params']['embedding'], E_VxD
    (top, total, target), spread, peak, mass, cross = _over_vocabulary(step, start, embeddings, pieces)
    log_z = top + jnp.log(total)
    kl = cross / mass - (peak + jnp.log(mass)) + (top / T + jnp.log(spread))
    return log_z - target, log_z, kl


def _logits(model, params, hidden_BxLxD, E_RxD):
    return model.apply(params, hidden_BxLxD.astype(model.dtype), E_RxD, method='logits')


def _over_vocabulary(step: Callable, start: Any, embeddings: Any, pieces: int) -> Any:
    """The last carry of step(carry, (a piece of each embedding, its number)) over all pieces."""
    if pieces == 1:
        return step(start, (embeddings, 0))[0]
    # Piece c holds the tokens i · pieces + c, so that every shard of the vocabulary holds a part of each piece.
    cut = lambda E_VxD: E_VxD.reshape(len(E_VxD) // pieces, pieces, -1).swapaxes(0, 1)
    return jax.lax.scan(jax.checkpoint(step), start, (jax.tree.map(cut, embeddings), jnp.arange(pieces)))[0]


def _nothing(targets_BxL):
    """What `_likelihood` starts from."""
    zero = jnp.zeros(targets_BxL.shape, jnp.float32)
    return zero - jnp.inf, zero, zero


def _likelihood(carry, z_BxLxR, targets_BxL, pieces, c):
    """(largest logit, Σ exp(logit − that), logit of the target) after one more piece of the vocabulary, number c."""
    top, total, target = carry
    new_top = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(z_BxLxR, axis=-1)))
    total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(z_BxLxR - new_top[..., None]), axis=-1)
    is_target = (targets_BxL[..., None] // pieces == jnp.arange(z_BxLxR.shape[-1])) & (targets_BxL[..., None] % pieces == c)
    return new_top, total, target + jnp.sum(jnp.where(is_target, z_BxLxR, 0), axis=-1)


def _highest(logits, E_VxD, shape, n, pieces):
    """(B, L, n): the n largest logits of each token, the largest first."""

    def step(best, piece):
        E_RxD, _ = piece
        return jax.lax.top_k(jnp.concatenate([best, logits(E_RxD)], axis=-1), n)[0], None

    return _over_vocabulary(step, jnp.full((*shape, n), -jnp.inf, jnp.float32), E_VxD, pieces)


def forward(
    model: Transformer, params: dict, batch: dict, *, pieces: int = 1, count: bool = True, teacher: Teacher | None = None
) -> dict[str, jax.Array]:
    """Runs the model on a batch (see spark.data.rows) and sums over its tokens, without padding.

    Returns {'nll', 'log_z2', 'tokens', 'bytes': () float32; 'active', 'attended': (n_layers,) float32 if `count`; 'kd': ()
    float32, of `distillation`, if there is a teacher}.
    """
    rows = batch['tokens'], batch['positions'], batch['segments']
    hidden, state = model.apply(params, *rows, mutable=[METRICS] if count else [])
    weights = (batch['segments'] > 0).astype(jnp.float32)
    if teacher:
        taught = teacher.model.apply(teacher.params, *rows)
        nll_BxL, log_z_BxL, kd_BxL = distillation(model, params, hidden, batch['targets'], teacher, taught, pieces)
    else:
        nll_BxL, log_z_BxL, _ = cross_entropy(model, params, hidden, batch['targets'], pieces)
    sums = {
        'nll': jnp.sum(weights * nll_BxL),
        'log_z2': jnp.sum(weights * log_z_BxL**2),
        'tokens': jnp.sum(weights),
        'bytes': jnp.sum(batch['bytes'], dtype=jnp.float32),
    }
    if teacher:
        sums['kd'] = jnp.sum(weights * kd_BxL)
    if count:
        sums |= {name: jnp.einsum('nBL,BL->n', n, weights) for name, n in activity(model.cfg, state[METRICS]).items()}
    return sums


def objective(cfg: ExperimentConfig, sums: dict[str, jax.Array]) -> jax.Array:
    """What a step minimises, summed over its tokens: (1 − w) · cross-entropy + w · T² · KL with a teacher, and the z-loss."""
    w, T = cfg.train.kd_weight, cfg.train.kd_temperature
    nll = (1 - w) * sums['nll'] + w * T**2 * sums['kd'] if 'kd' in sums else sums['nll']
    return nll + cfg.optimizer.z_loss * sums['log_z2']


def losses(nll: Sum, tokens: Sum, size: Sum) -> dict[str, float]:
    """`loss` in nats per token and its `perplexity`; and `bits_per_byte`, unless the text has no bytes."""
    loss = float(nll / tokens) if tokens else math.nan
    report = {'loss': loss, 'perplexity': math.exp(min(loss, 700.0))}
    return report | ({'bits_per_byte': float(nll / size / math.log(2))} if size else {})


def per_token(cfg: ModelConfig, sums: dict[str, Sum]) -> dict[str, Any]:
    """Metrics from the sums of `forward` over one or more batches, on the host.

    `losses`; `active` (share of neurons) and `attended` (number of keys), each the mean over layers, and a list `…_by_layer`;
    with a teacher `ce`, which is `loss` again, and `kd`, the KL divergence from it.
    """
    report = losses(sums['nll'], sums['tokens'], sums['bytes'])
    if 'kd' in sums:
        report |= {'ce': report['loss'], 'kd': float(sums['kd'] / sums['tokens'])}
    for name, scale in [('active', np.array([layer.ffn.d_ff for layer in cfg.per_layer], np.float32)), ('attended', 1)]:
        if name in sums:
            by_layer = sums[name] / sums['tokens'] / scale
            report |= {name: float(by_layer.mean()), f'{name}_by_layer': [float(x) for x in by_layer]}
    return report
