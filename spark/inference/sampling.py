"""Choosing the next token from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How to draw: temperature (0: the likeliest token), then among which tokens of the softmax at that temperature.

    top_k: the k likeliest (0: all). top_p: the likeliest whose probabilities just reach p, nucleus sampling
    (arXiv 1904.09751; 1: all). min_p: those at least min_p times as likely as the likeliest (arXiv 2407.01082; 0: all).
    Each narrows what the others leave; ties at an edge stay.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = Sampling()


def sample(logits_BxV, key, how):
    """int32 (B,): tokens drawn as a `Sampling` says."""
    if how.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filtered(logits_BxV, how), axis=-1).astype(jnp.int32)


def filtered(logits_BxV, how):
    """Logits over the temperature, −inf for tokens that `how` leaves out."""
    z = logits_BxV.astype(jnp.float32) / how.temperature
    least = jnp.full(z.shape[:-1], -jnp.inf)
    if 0 < how.top_k < z.shape[-1]:
        least = jnp.maximum(least, jax.lax.top_k(z, how.top_k)[0][..., -1])
    if how.top_p < 1:
        z_down = jnp.sort(z, axis=-1, descending=True)
        p = jax.nn.softmax(z_down, axis=-1)
        inside = jnp.cumsum(p, axis=-1) - p < how.top_p  # what comes before a token has not reached p
        least = jnp.maximum(least, jnp.min(jnp.where(inside, z_down, jnp.inf), axis=-1))
    if how.min_p > 0:
        least = jnp.maximum(least, jnp.max(z, axis=-1) + jnp.log(how.min_p))
    # The likeliest always stays, whatever rounding does at the edge.
    least = jnp.minimum(least, jnp.max(z, axis=-1))
    return jnp.where(z >= least[..., None], z, -jnp.inf)
