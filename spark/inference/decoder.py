"""Generation with a KV cache: the prompt in one pass, then token by token."""

import functools

import jax
import jax.numpy as jnp

from spark.inference.sampling import sample
from spark.nn.transformer import init_cache


@functools.partial(jax.jit, static_argnames=('model', 'n', 'temperature'))
def generate(model, params, prompt_BxL, key, *, n, temperature=0.0, lengths_B=None):
    """(B, n) int32: the n tokens that follow each prompt.

    Args:
      model: a Transformer.
      params: its parameters.
      prompt_BxL: int32, BOS included; shorter prompts are padded on the left, with any token.
      key: a jax.random key; not used at temperature 0.
      n: how many tokens, ≥ 1.
      temperature: see `sampling.sample`.
      lengths_B: int32, tokens of each prompt without its padding; None if all have L.
    """
    B, L = prompt_BxL.shape
    cache = init_cache(model.cfg, B, L + n, model.dtype)
    padding_Bx1 = 0 if lengths_B is None else (L - lengths_B)[:, None]

    def forward(cache, tokens, start):
        places = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        # Padding is a segment of its own, which no token of the prompt sees.
        segments = (places >= padding_Bx1).astype(jnp.int32)
        hidden, cache = model.apply(params, tokens, jnp.maximum(places - padding_Bx1, 0), segments, cache)
        return cache, model.apply(params, hidden[:, -1:], method='logits')[:, 0]

    def step(carry, key):
        cache, logits = carry
        token_B = sample(logits, key, temperature)
        return forward(cache, token_B[:, None], cache.length), token_B

    _, tokens_nxB = jax.lax.scan(step, forward(cache, prompt_BxL, 0), jax.random.split(key, n))
    return tokens_nxB.T
