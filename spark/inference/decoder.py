"""Generation: prompts in chunks, then token by token."""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from spark.inference.layout import Serving
from spark.inference.model import Tokens, forward, init_cache
from spark.inference.sampling import GREEDY, Sampling, sample
from spark.runtime import trim

extend = jax.jit(forward, static_argnames='serving', donate_argnames='cache')


@functools.partial(jax.jit, static_argnames=('serving', 'n', 'sampling'))
def generate(
    serving: Serving, weights: dict, prompt_BxL: Tokens, key: Key[Array, ''], *, n: int, sampling: Sampling = GREEDY,
    lengths_B: Int[Array, ' B'] | None = None,
) -> Int[Array, 'B n']:  # fmt: skip
    """The n ≥ 1 tokens that follow each prompt, in one compiled program; `key` is not used at temperature 0.

    Prompts include BOS. Those of fewer than L tokens, by `lengths_B` (None: all have L), are padded on the left, with any token.
    """
    B, L = prompt_BxL.shape
    first_B = jnp.zeros(B, jnp.int32) if lengths_B is None else L - lengths_B

    def step(carry, key):
        cache, logits = carry
        token_B = sample(logits, key, sampling)
        return forward(serving, weights, cache, token_B[:, None], first_B)[:2], token_B

    start = forward(serving, weights, init_cache(serving, B, L + n, L), prompt_BxL, first_B)[:2]
    _, tokens_nxB = jax.lax.scan(step, start, jax.random.split(key, n))
    return tokens_nxB.T


class Stream:
    """Generation token by token: call `prefill`, then iterate over `decode`.

    Prompts are token ids, BOS included. One compiled program serves all lengths: `prefill` takes `chunk` tokens of each prompt
    per step. At most n tokens are generated.

    Attributes:
      length: positions that the prompts take, padded on the left to whole chunks.
      counts: those of the last step, see `model.hidden`.
    """

    def __init__(self, serving: Serving, weights: dict, prompts: list[list[int]], n: int, chunk: int = 64):
        if not prompts or not all(prompts):
            raise ValueError('prompts: want at least one, each of at least one token')
        self._serving, self._weights, self._n = serving, weights, n
        self.length = -(-max(map(len, prompts)) // chunk) * chunk
        self._chunk = chunk
        self._tokens = np.zeros((len(prompts), self.length), np.int32)
        for row, prompt in zip(self._tokens, prompts, strict=True):
            row[self.length - len(prompt) :] = prompt
        self._first = jnp.asarray([self.length - len(prompt) for prompt in prompts], jnp.int32)
        # The first cache has the sharding of later ones: another sharding would compile each program again.
        mesh = jax.sharding.get_abstract_mesh()
        sharding = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
        make = lambda: init_cache(serving, len(prompts), self.length + n, chunk)
        self.cache, self._logits, self.counts = jax.jit(make, out_shardings=sharding)(), None, None

    def _extend(self, tokens, with_head=None):
        self.cache, self._logits, self.counts = extend(self._serving, self._weights, self.cache, tokens, self._first, with_head)

    def _prefill_chunk(self, start):
        end = start + self._chunk
        self._extend(jnp.asarray(self._tokens[:, start:end]), np.bool_(end == self.length))

    def warm_up(self, sampling: Sampling = GREEDY) -> None:
        """Compiles what `prefill` and `decode` run, on a chunk and two tokens that are discarded; call it before `prefill`."""
        self._prefill_chunk(0)
        trim()
        list(itertools.islice(self.decode(jax.random.key(0), sampling), 2))
        trim()
        self.cache, self._logits = self.cache.replace(length=self.cache.length * 0), None

    def prefill(self, tick: Callable[[], None] = lambda: None) -> Float[Array, 'B V']:
        """Puts the prompts into the cache and returns the logits that follow them; calls `tick` after each chunk."""
        for start in range(0, self.length, self._chunk):
            previous = self._logits
            self._prefill_chunk(start)
            jax.block_until_ready(previous)  # the device already has the next chunk
            tick()
        jax.block_until_ready(self._logits)
        return self._logits

    def decode(self, key: Key[Array, ''], sampling: Sampling = GREEDY, stop: Collection[int] = ()) -> Iterator[np.ndarray]:
        """Yields the next token of each prompt, −1 from the first one in `stop` on; up to n times, or until all have stopped."""
        live, keys = np.ones(len(self._tokens), bool), jax.random.split(key, self._n)
        for i in range(self._n):
            token_B = _sample(self._logits, keys, np.int32(i), sampling)
            if i + 1 < self._n:  # dispatched before the host reads the token, so that the device never waits
                self._extend(token_B[:, None])
            tokens = np.asarray(token_B)
            live &= ~np.isin(tokens, list(stop))
            if not live.any():
                return
            yield np.where(live, tokens, -1)


@functools.partial(jax.jit, static_argnames='sampling')
def _sample(logits_BxV, keys, i, sampling):
    return sample(logits_BxV, keys[i], sampling)  # iterating over keys on the host compiles again after every hundred
