"""The σ of the lookups by name, as the kinds in `spark/config/kinds.py` refer to them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# From scores (…, n) to weights (…, n).
ACTIVATIONS = {
    'identity': lambda s: s,
    'gelu': jax.nn.gelu,
    'relu': jax.nn.relu,
    'relu2': lambda s: jax.nn.relu(s) * jax.nn.relu(s),
    'softplus': jax.nn.softplus,
    'sigmoid': jax.nn.sigmoid,
    'softmax': lambda s: jax.nn.softmax(s, axis=-1),  # of entries that are −inf: 0
}


def softcap(x: Float[Array, '*shape'], cap: float) -> Float[Array, '*shape']:
    """cap · tanh(x / cap): bounds logits smoothly; cap 0 leaves them as they are."""
    return cap * jnp.tanh(x / cap) if cap else x
