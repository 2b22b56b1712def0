"""Generation: the prompts in chunks, then token by token."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spark.inference.model import forward, init_cache
from spark.inference.sampling import GREEDY, sample
from spark.runtime import trim

extend = jax.jit(forward, static_argnames='serving', donate_argnames='cache')


@functools.partial(jax.jit, static_argnames=('serving', 'n', 'how'))
def generate(serving, weights, prompt_BxL, key, *, n, how=GREEDY, lengths_B=None):
    """(B, n) int32: the n tokens that follow each prompt, in one compiled program.

    Args:
      serving: a `Serving`.
      weights: of `layout.lay_out`.
      prompt_BxL: int32, BOS included; shorter prompts are padded on the left, with any token.
      key: a jax.random key; not used at temperature 0.
      n: how many tokens, ≥ 1.
      how: a `Sampling`.
      lengths_B: int32, tokens of each prompt without its padding; None if all have L.
    """
    B, L = prompt_BxL.shape
    first_B = jnp.zeros(B, jnp.int32) if lengths_B is None else L - lengths_B

    def step(carry, key):
        cache, logits = carry
        token_B = sample(logits, key, how)
        return forward(serving, weights, cache, token_B[:, None], first_B)[:2], token_B

    start = forward(serving, weights, init_cache(serving, B, L + n, L), prompt_BxL, first_B)[:2]
    _, tokens_nxB = jax.lax.scan(step, start, jax.random.split(key, n))
    return tokens_nxB.T


class Stream:
    """The same, token by token: `prefill`, then iterate over what follows.

    Args:
      serving: a `Serving`.
      weights: of `layout.lay_out`.
      prompts: a list of lists of ids, BOS included.
      n: how many tokens at most.
      chunk: prompts go in by so many tokens at a time, one compiled program for all lengths.

    Attributes:
      length: places that the prompts take, padded on the left to whole chunks.
      cache: the `Cache`.
      counts: of the last step, see `model.forward`.
    """

    def __init__(self, serving, weights, prompts, n, chunk=64):
        if not prompts or not all(prompts):
            raise ValueError('prompts: want at least one, each of at least one token')
        self._serving, self._weights, self._n = serving, weights, n
        self.length = -(-max(map(len, prompts)) // chunk) * chunk
        self._chunk = chunk
        self._tokens = np.zeros((len(prompts), self.length), np.int32)
        for row, prompt in zip(self._tokens, prompts, strict=True):
            row[self.length - len(prompt) :] = prompt
        self._first = jnp.asarray([self.length - len(prompt) for prompt in prompts], jnp.int32)
        # Born where it will come back to: another placement would compile each program once more.
        mesh = jax.sharding.get_abstract_mesh()
        where = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
        make = lambda: init_cache(serving, len(prompts), self.length + n, chunk)
        self.cache, self._logits, self.counts = jax.jit(make, out_shardings=where)(), None, None

    def _extend(self, tokens, wanted=None):
        self.cache, self._logits, self.counts = extend(self._serving, self._weights, self.cache, tokens, self._first, wanted)

    def _put(self, start):
        """The prompts' chunk that begins at `start` into the cache."""
        end = start + self._chunk
        self._extend(jnp.asarray(self._tokens[:, start:end]), np.bool_(end == self.length))

    def warm_up(self, how=GREEDY):
        """Compiles what `prefill` and `decode` run, by a chunk and two tokens that are forgotten again; before `prefill`."""
        self._put(0)
        trim()
        list(itertools.islice(self.decode(jax.random.key(0), how), 2))
        trim()
        self.cache, self._logits = self.cache.replace(length=self.cache.length * 0), None

    def prefill(self, tick=lambda: None):
        """Puts the prompts into the cache; `tick` is called after each chunk. Returns the float32 logits (B, V) behind them."""
        for start in range(0, self.length, self._chunk):
            before = self._logits
            self._put(start)
            jax.block_until_ready(before)  # so that the device has the next chunk to do while this one is told
            tick()
        jax.block_until_ready(self._logits)
        return self._logits

    def decode(self, key, how=GREEDY, stop=()):
        """Yields numpy int32 (B,) up to n times: the next token of each prompt, −1 once a token of `stop` came (it is not given).

        Ends when all have stopped.
        """
        live, keys = np.ones(len(self._tokens), bool), jax.random.split(key, self._n)
        for i in range(self._n):
            token_B = _sample(self._logits, keys, np.int32(i), how)
            if i + 1 < self._n:  # before anyone looks at the token, so that the device never waits
                self._extend(token_B[:, None])
            tokens = np.asarray(token_B)
            live &= ~np.isin(tokens, stop)
            if not live.any():
                return
            yield np.where(live, tokens, -1)


@functools.partial(jax.jit, static_argnames='how')
def _sample(logits_BxV, keys, i, how):  # taken here: iterating over keys compiles anew after every hundred
    return sample(logits_BxV, keys[i], how)
