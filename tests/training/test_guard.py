"""Updates that are left out leave everything as it was; and what is not finite is found where it began."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark.training.guard import WARM, Guard, first_not_finite, judge
from spark.training.step import Trainer
from tests.helpers import random_rows, small


@pytest.fixture(scope='module')
def trained():
    """A Trainer that may leave two updates out in a row, a state after two steps (on the host), and a batch."""
    cfg = small(**{'model.n_layers': 2, 'model.pattern': ('local',), 'train.max_skips': 2, 'train.spike': 4.0})
    trainer = Trainer(cfg, jax.devices()[:1])
    tokens, positions, segments = random_rows(cfg, cfg.data.batch_size, cfg.data.seq_len)
    batch = {'tokens': tokens, 'targets': tokens[:, ::-1], 'positions': positions, 'segments': segments, 'bytes': segments}
    batch = {name: np.asarray(x) for name, x in batch.items()}
    with trainer.context():
        state = trainer.init_state(0)
        for _ in range(2):
            state, sums = trainer.train_step(state, trainer.put(batch))
        assert int(sums['left_out']) == 0
        yield trainer, jax.device_get(state), batch


def step(trained, state):
    trainer, _, batch = trained
    return trainer.train_step(jax.device_put(state, trainer.state_shardings), trainer.put(batch))


def changed(state, change, *path):
    """The state with change(x) for the parameter at a path."""
    params = jax.tree.map(np.copy, state.params)
    node = params['params']
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = change(node[path[-1]])
    return state.replace(params=params)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def weights(state):
    return state.params, state.opt_state


def test_an_update_that_is_not_finite_changes_nothing(trained):
    _, good, _ = trained
    broken = changed(good, lambda x: np.where(x == x.max(), np.nan, x), 'groups', 'ffn_0', 'V')
    after, sums = step(trained, broken)
    assert not np.isfinite(sums['grad_norm'])
    assert_same(weights(after), weights(broken))
    assert (int(after.step), int(after.guard.left_out), int(after.guard.in_a_row), int(after.guard.good)) == (3, 1, 1, 2)
    assert int(sums['left_out']) == int(sums['in_a_row']) == 1
    after, sums = step(trained, jax.device_get(after).replace(params=good.params))
    assert (int(after.guard.left_out), int(after.guard.in_a_row), int(after.guard.good)) == (1, 0, 3)
    with pytest.raises(AssertionError):
        assert_same(after.params, good.params)


def test_a_spike_changes_nothing_and_does_not_count_in_the_mean(trained):
    _, good, _ = trained
    norm = float(step(trained, good)[1]['grad_norm'])
    for mean, count, left_out in [(norm / 4.1, WARM, 1), (norm / 3.9, WARM, 0), (norm / 4.1, WARM - 1, 0)]:
        guard = good.guard.replace(good=np.int32(count), mean_norm=np.float32(mean))
        after, _ = step(trained, good.replace(guard=guard))
        assert int(after.guard.left_out) == left_out
        if left_out:
            assert_same(weights(after), weights(good))
            assert float(after.guard.mean_norm) == np.float32(mean)


def test_after_too_many_in_a_row_the_state_waits_for_the_loop(trained):
    """The loop looks one step late: the update behind the bad ones must not happen, be it good or not."""
    cfg, guard = trained[0].cfg.train, Guard.new()
    bad, fine = (jnp.float32(np.nan), jnp.float32(1)), (jnp.float32(1), jnp.float32(1))
    verdicts = []
    for update in [fine, bad, bad, fine, bad, bad, bad, fine, fine]:
        ok, guard = judge(cfg, guard, *update)
        verdicts.append(bool(ok))
    assert verdicts == [True, False, False, True, False, False, False, False, False]
    assert int(guard.in_a_row) == 5 and int(guard.left_out) == 7
    for first in ((np.nan, 1), (1, np.inf), (-np.inf, 1)):
        assert not judge(cfg, Guard.new(), *map(jnp.float32, first))[0]


@pytest.mark.parametrize(
    ('change', 'path', 'said'),
    [
        (lambda x: np.where(np.arange(x.shape[0])[:, None, None] == 1, np.nan, x), ('groups', 'ffn_0', 'V'),
         'the parameter groups.ffn_0.V itself is not finite'),
        (lambda x: np.where(np.arange(x.shape[0])[:, None, None] == 1, np.float32(3e38), x), ('groups', 'ffn_0', 'V'),
         'first not finite: the output of ffn in layer 1 of 2'),
        (lambda x: np.full_like(x, 3e38), ('groups', 'attention_0', 'q'),
         'first not finite: the output of attention in layer 0 of 2'),
        (lambda x: x * np.float32(1e25), ('embedding',), 'the forward pass is finite; first not finite in backward: '),
    ],
)  # fmt: skip
def test_where_it_began(trained, change, path, said):
    trainer, good, batch = trained
    state = changed(good, change, *path)
    assert said in first_not_finite(trainer, jax.device_put(state.params, trainer.state_shardings.params), batch)


def test_nothing_is_wrong(trained):
    trainer, good, batch = trained
    params = jax.device_put(good.params, trainer.state_shardings.params)
    assert first_not_finite(trainer, params, batch) == 'every module and every gradient by itself is finite'
