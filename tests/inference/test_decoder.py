"""Generation gives what the full forward pass would choose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark.inference.decoder import Stream, extend, generate
from spark.inference.layout import Serving, from_params
from spark.inference.model import init_cache
from spark.inference.sampling import Sampling, filtered, sample
from tests.helpers import model_and_params, random_rows, small


def two_layers(kind='spark'):
    """A local and a global one: generation compiles every layer by itself."""
    return small(kind, **{'model.n_layers': 2})


def served(cfg):
    """A random model of a config, in training and in serving form."""
    model, params = model_and_params(cfg)
    return model, params, (Serving(cfg.model), jax.jit(functools.partial(from_params, Serving(cfg.model)))(params))


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    """Logits of the full forward pass; what comes behind a position is not seen by it."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.apply(params, tokens, positions, jnp.ones_like(tokens))
    return model.apply(params, hidden, method='logits')


@pytest.mark.parametrize('kind', ['dense', 'spark'])
def test_greedy_generation_is_the_argmax_of_the_forward_pass(kind):
    """Of two groups of layers: each layer is served with its own weights."""
    cfg = small(kind, **{'model.n_layers': 4})
    model, params, serve = served(cfg)
    prompt = random_rows(cfg, length=9)[0]
    tokens = generate(*serve, prompt, jax.random.key(0), n=8)
    whole = jnp.concatenate([prompt, tokens], axis=1)
    expected = jnp.argmax(forward(model, params, whole), axis=-1)[:, 8:-1]
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize('kind', ['dense', 'spark'])
def test_prompts_padded_on_the_left_go_on_as_they_would_alone(kind):
    cfg = two_layers(kind)
    _, _, serve = served(cfg)
    prompts = random_rows(cfg, batch=3, length=12)[0]
    lengths = jnp.array([12, 5, 9])
    together = generate(*serve, prompts, jax.random.key(0), n=6, lengths_B=lengths)
    for i, length in enumerate(lengths):
        alone = generate(*serve, prompts[i : i + 1, 12 - length :], jax.random.key(0), n=6)
        np.testing.assert_array_equal(together[i], alone[0])


@pytest.mark.parametrize(('chunk', 'kind'), [(1, 'spark'), (4, 'spark'), (16, 'spark'), (4, 'dense')])
def test_a_stream_is_what_is_generated_at_once(chunk, kind):
    """Prompts of different lengths, in chunks; and their logits are those of the full forward pass."""
    cfg = two_layers(kind)
    model, params, serve = served(cfg)
    rows = random_rows(cfg, batch=3, length=12)[0]
    prompts = [list(map(int, row[:n])) for row, n in zip(rows, (12, 5, 9), strict=True)]
    stream = Stream(*serve, prompts, 6, chunk)
    stream.warm_up()
    programs = extend._cache_size()
    logits = stream.prefill()
    for ours, whole, prompt in zip(logits, forward(model, params, rows), prompts, strict=True):
        np.testing.assert_allclose(ours, whole[len(prompt) - 1], atol=1e-3)
    found = np.stack(list(stream.decode(jax.random.key(0))), axis=1)
    assert extend._cache_size() == programs
    for row, prompt in zip(found, prompts, strict=True):
        alone = generate(*serve, jnp.asarray([prompt]), jax.random.key(0), n=6)
        np.testing.assert_array_equal(row, alone[0])


def test_logits_that_nobody_wants():
    """Zeros, of the same program that computes them, and the same cache."""
    cfg = two_layers()
    _, _, (serving, weights) = served(cfg)
    tokens, first = random_rows(cfg, batch=2, length=8)[0], jnp.zeros(2, jnp.int32)
    run = lambda wanted: extend(serving, weights, init_cache(serving, 2, 16, 8), tokens, first, wanted)
    (cache, logits, _), programs = run(np.bool_(True)), extend._cache_size()
    other, zeros, _ = run(np.bool_(False))
    assert extend._cache_size() == programs and jnp.any(logits) and not jnp.any(zeros) and zeros.shape == logits.shape
    np.testing.assert_array_equal(logits, run(None)[1])
    jax.tree.map(np.testing.assert_array_equal, cache, other)


def test_a_stream_stops_where_it_is_told():
    cfg = two_layers()
    _, _, serve = served(cfg)
    prompts = [[1, 2, 3], [4]]
    free = np.stack(list(_stream(serve, prompts)), axis=1)
    stop = int(free[0, 2])
    found = np.stack(list(_stream(serve, prompts, stop=[stop])), axis=1)
    for row, whole in zip(found, free, strict=True):
        ends = np.flatnonzero(whole == stop)
        kept = ends[0] if len(ends) else found.shape[1]
        np.testing.assert_array_equal(row[:kept], whole[:kept])
        assert (row[kept:] == -1).all()
    assert not list(_stream(serve, prompts[:1], stop=[int(free[0, 0])]))
    with pytest.raises(ValueError, match='each of at least one token'):
        Stream(*serve, [[]], 1)


def _stream(serve, prompts, stop=()):
    stream = Stream(*serve, prompts, 8, 4)
    stream.prefill()
    return stream.decode(jax.random.key(0), stop=stop)


@given(
    st.sampled_from([2, 7, 20]).flatmap(  # few shapes: each is compiled
        lambda n: st.lists(st.floats(-6, 6), min_size=n, max_size=n, unique_by=lambda x: round(x, 2))
    ),
    st.integers(0, 8), st.floats(0.05, 1.0), st.floats(0.0, 0.9), st.floats(0.3, 3.0),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_tokens_that_may_be_drawn(logits, k, p, min_p, temperature):
    """Against the definitions, one token at a time; those within rounding of an edge may go either way."""
    z = np.asarray(logits) / temperature
    share = np.exp(z - z.max())
    share /= share.sum()
    left = np.asarray(filtered(jnp.asarray([logits]), Sampling(temperature, k, p, min_p)))[0] > -np.inf
    for i in range(len(z)):
        above = share[share > share[i]]
        kept = (not k or len(above) < k) and (p == 1 or above.sum() < p) and share[i] >= min_p * share.max()
        edge = min(abs(above.sum() - p), abs(share[i] - min_p * share.max())) < 1e-5
        assert left[i] == (kept or not len(above)) or edge
    assert left[z.argmax()]


def test_the_k_likeliest_tokens_are_found_without_a_sort():
    program = jax.jit(lambda z: filtered(z, Sampling(1.0, 40, 1.0, 0.0))).lower(jnp.zeros((2, 4096))).compile().as_text()
    assert 'custom_call_target="TopK"' in program and ' sort(' not in program


def test_sampling_follows_the_softmax():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    draw = lambda how, n: jax.vmap(lambda key: sample(logits, key, how)[0])(jax.random.split(jax.random.key(0), n))
    np.testing.assert_allclose(np.bincount(draw(Sampling(1.0), 4000), minlength=3) / 4000, [0.5, 0.3, 0.2], atol=0.03)
    np.testing.assert_allclose(np.bincount(draw(Sampling(1.0, top_k=2), 4000)) / 4000, [5 / 8, 3 / 8], atol=0.03)
    cold = draw(Sampling(0.05), 400)
    assert (cold == 0).mean() > 0.99 and sample(logits, jax.random.key(0), Sampling())[0] == 0
