"""Choosing the next token from logits."""

import jax
import jax.numpy as jnp


def sample(logits_BxV, key, temperature):
    """int32 (B,): the argmax for temperature 0, else a draw from softmax(logits / temperature)."""
    if temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BxV / temperature, axis=-1).astype(jnp.int32)
