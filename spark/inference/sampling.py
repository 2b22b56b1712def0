"""Choosing the next token from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Sampling(NamedTuple):
    """How to draw the next token. Tokens that tie with the last one allowed are allowed, too."""

    temperature: float = 0.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens whose probabilities just reach p (arXiv 1904.09751); 1: all
    min_p: float = 0.0  # only tokens at least min_p times as likely as the most likely one (arXiv 2407.01082); 0: all


GREEDY = Sampling()


def sample(logits_BxV: Float[Array, 'B V'], key: Key[Array, ''], sampling: Sampling) -> Int[Array, ' B']:
    """Draws a token per row; the key is not used at temperature 0."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filtered(logits_BxV, sampling), axis=-1).astype(jnp.int32)


def filtered(logits_BxV: Float[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
    """Logits divided by the temperature; −inf for tokens that must not be drawn."""
    z = logits_BxV.astype(jnp.float32) / sampling.temperature
    least = jnp.full(z.shape[:-1], -jnp.inf)
    if 0 < sampling.top_k < z.shape[-1]:
        # A minimum rather than a slice, of which XLA:CPU would make a sort of the whole vocabulary.
        least = jnp.maximum(least, jnp.min(jax.lax.top_k(z, sampling.top_k)[0], axis=-1))
    if sampling.top_p < 1:
        z_down = jnp.sort(z, axis=-1, descending=True)
        p = jax.nn.softmax(z_down, axis=-1)
        inside = jnp.cumsum(p, axis=-1) - p < sampling.top_p  # the more likely tokens have not reached p
        least = jnp.maximum(least, jnp.min(jnp.where(inside, z_down, jnp.inf), axis=-1))
    if sampling.min_p > 0:
        least = jnp.maximum(least, jnp.max(z, axis=-1) + jnp.log(sampling.min_p))
    least = jnp.minimum(least, jnp.max(z, axis=-1))  # rounding must not exclude the most likely token
    return jnp.where(z >= least[..., None], z, -jnp.inf)
