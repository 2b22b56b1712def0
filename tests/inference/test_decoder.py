"""Generation gives what the full forward pass would choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark.inference.decoder import generate
from spark.inference.sampling import sample
from tests.helpers import model_and_params, random_rows, small


@pytest.mark.parametrize('kind', ['dense', 'spark'])
def test_greedy_generation_is_the_argmax_of_the_forward_pass(kind):
    cfg = small(kind)
    model, params = model_and_params(cfg)
    prompt = random_rows(cfg, length=9)[0]
    tokens = generate(model, params, prompt, jax.random.key(0), n=8)
    whole = jnp.concatenate([prompt, tokens], axis=1)
    positions = jnp.broadcast_to(jnp.arange(17), whole.shape)
    hidden, _ = model.apply(params, whole, positions, jnp.ones_like(whole))
    expected = jnp.argmax(model.apply(params, hidden, method='logits'), axis=-1)[:, 8:-1]
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize('kind', ['dense', 'spark'])
def test_prompts_padded_on_the_left_go_on_as_they_would_alone(kind):
    cfg = small(kind)
    model, params = model_and_params(cfg)
    prompts = random_rows(cfg, batch=3, length=12)[0]
    lengths = jnp.array([12, 5, 9])
    together = generate(model, params, prompts, jax.random.key(0), n=6, lengths_B=lengths)
    for i, length in enumerate(lengths):
        alone = generate(model, params, prompts[i : i + 1, 12 - length :], jax.random.key(0), n=6)
        np.testing.assert_array_equal(together[i], alone[0])


def test_sampling_follows_the_softmax():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    draws = jax.vmap(lambda key: sample(logits, key, 1.0)[0])(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 4000, [0.5, 0.3, 0.2], atol=0.03)
    cold = jax.vmap(lambda key: sample(logits, key, 0.05)[0])(jax.random.split(jax.random.key(0), 400))
    assert (cold == 0).mean() > 0.99 and sample(logits, None, 0.0)[0] == 0
