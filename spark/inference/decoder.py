"""Generation with a KV cache: the prompts in chunks, then token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spark.inference.sampling import GREEDY, sample
from spark.nn.transformer import init_cache


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def extend(model, params, cache, tokens_BxL, padding_B):
    """(the cache with L more tokens, float32 logits (B, V) behind the last of them).

    Args:
      model, params: a Transformer and its parameters.
      cache: a `KVCache` with room for them; given away.
      tokens_BxL: int32.
      padding_B: int32, by how many tokens each row was padded on the left, before all that is in the cache.
    """
    places = jnp.broadcast_to(cache.length + jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
    padding_Bx1 = padding_B[:, None]
    # Padding is a segment of its own, which no token of the prompt sees.
    segments = (places >= padding_Bx1).astype(jnp.int32)
    hidden, cache = model.apply(params, tokens_BxL, jnp.maximum(places - padding_Bx1, 0), segments, cache)
    return cache, model.apply(params, hidden[:, -1:], method='logits')[:, 0]


@functools.partial(jax.jit, static_argnames=('model', 'n', 'how'))
def generate(model, params, prompt_BxL, key, *, n, how=GREEDY, lengths_B=None):
    """(B, n) int32: the n tokens that follow each prompt, in one compiled program.

    Args:
      model: a Transformer.
      params: its parameters.
      prompt_BxL: int32, BOS included; shorter prompts are padded on the left, with any token.
      key: a jax.random key; not used at temperature 0.
      n: how many tokens, ≥ 1.
      how: a `Sampling`.
      lengths_B: int32, tokens of each prompt without its padding; None if all have L.
    """
    B, L = prompt_BxL.shape
    padding_B = jnp.zeros(B, jnp.int32) if lengths_B is None else L - lengths_B

    def step(carry, key):
        cache, logits = carry
        token_B = sample(logits, key, how)
        return extend(model, params, cache, token_B[:, None], padding_B), token_B

    start = extend(model, params, init_cache(model.cfg, B, L + n, model.dtype), prompt_BxL, padding_B)
    _, tokens_nxB = jax.lax.scan(step, start, jax.random.split(key, n))
    return tokens_nxB.T


class Stream:
    """The same, token by token: `prefill`, then iterate over what follows.

    Args:
      model, params: a Transformer and its parameters.
      prompts: a list of lists of ids, BOS included.
      n: how many tokens at most.
      chunk: prompts go in by so many tokens at a time, one compiled program for all lengths.
    """

    def __init__(self, model, params, prompts, n, chunk=64):
        if not prompts or not all(prompts):
            raise ValueError('prompts: want at least one, each of at least one token')
        self._model, self._params, self._n = model, params, n
        self.length = -(-max(map(len, prompts)) // chunk) * chunk
        self._chunk = chunk
        self._tokens = np.zeros((len(prompts), self.length), np.int32)
        for row, prompt in zip(self._tokens, prompts, strict=True):
            row[self.length - len(prompt) :] = prompt
        self._padding = jnp.asarray([self.length - len(prompt) for prompt in prompts], jnp.int32)
        # Born where it will come back to: another placement would compile each program once more.
        mesh = jax.sharding.get_abstract_mesh()
        where = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
        make = lambda: init_cache(model.cfg, len(prompts), self.length + n, model.dtype)
        self._cache, self._logits = jax.jit(make, out_shardings=where)(), None

    def prefill(self, tick=lambda: None):
        """Puts the prompts into the cache; `tick` is called after each chunk. Returns the float32 logits (B, V) behind them."""
        for start in range(0, self.length, self._chunk):
            tokens = jnp.asarray(self._tokens[:, start : start + self._chunk])
            before = self._logits
            self._cache, self._logits = extend(self._model, self._params, self._cache, tokens, self._padding)
            jax.block_until_ready(before)  # so that the device has the next chunk to do while this one is told
            tick()
        jax.block_until_ready(self._logits)
        return self._logits

    def decode(self, key, how=GREEDY, stop=()):
        """Yields numpy int32 (B,) up to n times: the next token of each prompt, −1 once a token of `stop` came (it is not given).

        Ends when all have stopped.
        """
        live = np.ones(len(self._tokens), bool)
        for i, step_key in enumerate(jax.random.split(key, self._n)):
            token_B = _sample(self._logits, step_key, how)
            if i + 1 < self._n:  # before anyone looks at the token, so that the device never waits
                self._cache, self._logits = extend(self._model, self._params, self._cache, token_B[:, None], self._padding)
            tokens = np.asarray(token_B)
            live &= ~np.isin(tokens, stop)
            if not live.any():
                return
            yield np.where(live, tokens, -1)


_sample = jax.jit(sample, static_argnames='how')
