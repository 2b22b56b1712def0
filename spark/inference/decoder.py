"""Generation with a KV cache: the prompt in one pass, then token by token."""

import functools

import jax
import jax.numpy as jnp

from spark.inference.sampling import sample
from spark.nn.transformer import init_cache


@functools.partial(jax.jit, static_argnames=('model', 'n', 'temperature'))
def generate(model, params, prompt_BxL, key, *, n, temperature=0.0):
    """(B, n) int32: the n tokens that follow each prompt.

    Args:
      model: a Transformer.
      params: its parameters.
      prompt_BxL: int32, BOS included, all of the same length.
      key: a jax.random key; not used at temperature 0.
      n: how many tokens, ≥ 1.
      temperature: see `sampling.sample`.
    """
    B, L = prompt_BxL.shape
    cache = init_cache(model.cfg, B, L + n, model.dtype)

    def forward(cache, tokens, start):
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, cache = model.apply(params, tokens, positions, jnp.ones_like(tokens), cache)
        return cache, model.apply(params, hidden[:, -1:], method='logits')[:, 0]

    def step(carry, key):
        cache, logits = carry
        token_B = sample(logits, key, temperature)
        return forward(cache, token_B[:, None], cache.length), token_B

    _, tokens_nxB = jax.lax.scan(step, forward(cache, prompt_BxL, 0), jax.random.split(key, n))
    return tokens_nxB.T
