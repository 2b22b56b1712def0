"""Runs whose k follows a schedule, and whose layers are of different kinds."""

import json

import jax
import numpy as np
import pytest

from spark.config import load
from spark.data.tokenizer import tokenizer_for
from spark.errors import ConfigError
from spark.evaluation import evaluate
from spark.inference import decoder
from spark.inference import load as inference
from spark.inference.sampling import GREEDY
from spark.nn.runs import scheduled
from spark.training import distillation
from spark.training.guard import first_not_finite
from spark.training.run import train
from spark.training.step import Trainer
from spark.training.trackers import MetricsWriter
from tests.helpers import corpus, records, small

SCHEDULE = {'model.ffn.k_schedule': 'all:3 linear:6', 'model.attention.k_schedule': '16:2 cosine:8'}
KINDS = {'model.layers': '0:ffn.kind=gated 2-:ffn.k=4/12 2-:attention.kind=dense', 'optimizer.ema': 0.9}
KS = [96, 96, 96, 41, 35, 28, 21, 15, 8, 8]  # the fall begins at half of the neurons


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(the directory of a run with a schedule and different kinds, its overrides, its final state)."""
    directory = tmp_path_factory.mktemp('k')
    often = {'train.save_every': 5, 'train.keep': 5, 'train.evals': ('held every=5 batches=1',)}
    overrides = corpus(directory) | SCHEDULE | KINDS | often
    _, trainer, state = train(small(**overrides), directory / 'run')
    assert trainer.eval_step._cache_size() == 1  # for every k
    return directory, overrides, jax.device_get(state)


def test_k_is_in_the_metrics(run):
    lines = [line for line in records(run[0] / 'run') if line['split'] == 'train']
    by_layer = [[k, *(k if k == 96 else round(48 + (own - 48) * (48 - k) / 40) for own in (4, 12))] for k in KS]
    np.testing.assert_allclose([line['k'] for line in lines], np.mean(by_layer, axis=1), atol=0.7)
    assert lines[2]['k'] == 96 and lines[-1]['k'] == 8
    assert [line['attention_k'] for line in lines][:2] == [16, 16] and lines[-1]['attention_k'] < 16
    assert lines[0]['active'] == 1 and lines[-1]['active'] < 0.5  # at first every neuron
    assert lines[-1]['active_by_layer'][0] == 1 > lines[-1]['active_by_layer'][3] > lines[-1]['active_by_layer'][2]


def test_all_keys_are_counted_as_those_of_a_row():
    trainer = Trainer(small(**{'model.attention.k_schedule': 'all:3'}), jax.devices()[:1])
    tokens = np.zeros((8, 32), np.int32)
    batch = dict.fromkeys(('tokens', 'targets'), tokens) | dict.fromkeys(('segments', 'bytes'), np.ones_like(tokens))
    with trainer.context():
        rows = trainer.put(batch | {'positions': np.arange(32, dtype=np.int32) + tokens})
        assert float(trainer.train_step(trainer.init_state(0), rows)[1]['attention_k']) == 32


def test_evaluations_take_the_k_of_the_step(run):
    held = [line for line in records(run[0] / 'run') if line['split'] == 'eval/held']
    assert [line['step'] for line in held] == [5, 10] and held[0]['active'] > 0.45 > held[1]['active']


def test_a_run_teaches_with_the_k_of_its_end(run, tmp_path):
    overrides = {name: x for name, x in run[1].items() if name.startswith(('data.', 'model.vocab'))} | {'train.steps': 3}
    cfg = small(**overrides, **{'train.teacher': str(run[0] / 'run')})
    model = distillation.model_of(tokenizer_for(cfg)[1], 1)
    assert [layer.ffn.k for layer in model.per_layer] == [0, 8, 4, 12] and not scheduled(model)
    train(cfg, tmp_path / 'run')
    assert all(line['kd'] > 0 for line in records(tmp_path / 'run') if line['split'] == 'train')
    cfg = small(**overrides, **{'train.teacher': str(run[0] / 'run' / 'checkpoints' / '5')})
    with pytest.raises(ConfigError, match=r'checkpoints/5.: k still falls at step 5 of that run: want a later checkpoint$'):
        train(cfg, tmp_path / 'other')


def test_steps_compile_once(run):
    cfg = load(run[0] / 'run' / 'config.json')
    trainer = Trainer(small(**run[1] | {'model.vocab_size': 264}))
    tokens = np.random.default_rng(0).integers(0, 264, (8, 32)).astype(np.int32)
    ones = np.ones_like(tokens)
    batch = {'tokens': tokens, 'targets': tokens, 'positions': np.arange(32, dtype=np.int32) * ones}
    batch |= {'segments': ones, 'bytes': ones}
    with trainer.context():
        state, rows, seen = trainer.init_state(0), trainer.put(batch), []
        for _ in range(10):
            state, sums = trainer.train_step(state, rows)
            seen.append(float(sums['k']))
    assert trainer.train_step._cache_size() == 1 and len(set(seen)) == 7 and cfg.model.ffn.k == 8


def test_an_interrupted_run_goes_on_with_its_k(run, monkeypatch):
    directory, overrides, expected = run

    class Cut(Exception):
        pass

    write = MetricsWriter.write

    def cut(self, step, *args):
        if step == 7:
            raise Cut
        return write(self, step, *args)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(MetricsWriter, 'write', cut)
        train(small(**overrides), directory / 'broken')
    _, _, state = train(small(**overrides), directory / 'broken')
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
    assert records(directory / 'broken') == records(directory / 'run')


def test_a_checkpoint_is_evaluated_with_the_k_of_its_step(run):
    workdir = run[0] / 'run'
    of_step = {line['step']: line for line in records(workdir) if line['split'] == 'validation'}
    for step in (5, 10):
        model = evaluate.load(workdir, step)
        assert not model.cfg.model.ffn.k_schedule and model.cfg.model.ffn.k == KS[step - 1]
        found, _ = evaluate.evaluate(model, 'validation')
        assert found['loss'] == pytest.approx(of_step[step]['loss'], rel=1e-5)
        assert found['active'] == pytest.approx(of_step[step]['active'], rel=1e-3)
        json.dumps(found)
        kinds = [('recall' in layer, 'attention_recall' in layer) for layer in found['layers']]
        # At step 5 attention keeps more keys than a local layer sees.
        assert kinds == [(False, step == 10), (True, True), (True, False), (True, False)]
        mean, _ = evaluate.evaluate(evaluate.load(workdir, step, ema=True), 'validation', statistics=False)
        assert mean['loss'] == pytest.approx(of_step[step]['ema_loss'], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_writes_what_its_forward_pass_says(run):
    workdir = run[0] / 'run'
    for step in (5, 10):
        served, model = inference.load(workdir, step, serve={'kernels': 'gather'}), evaluate.load(workdir, step)
        prompt = jax.numpy.asarray(served.tokenizer.start(['spark sparse ']))
        with jax.set_mesh(served.mesh):
            tokens = decoder.generate(served.serving, served.weights, prompt, jax.random.key(0), n=12, sampling=GREEDY)
        row = jax.device_get(jax.numpy.concatenate([prompt, tokens], axis=1))
        with model.trainer.context():
            apply = jax.jit(model.trainer.model.apply, static_argnames='method')
            hidden = apply(model.params, row, np.arange(row.shape[1])[None], np.ones_like(row))
            best = jax.device_get(apply(model.params, hidden, method='logits').argmax(-1))
        np.testing.assert_array_equal(best[0, prompt.shape[1] - 1 : -1], row[0, prompt.shape[1] :])


@pytest.mark.slow
def test_a_mesh_gives_the_losses_of_one_device():
    """Rows of which devices hold parts, in blocks, too: k is an operand there."""

    def losses(devices, **overrides):
        cfg = small(**SCHEDULE, **KINDS, **overrides)
        trainer, seen = Trainer(cfg, devices), []
        rng = np.random.default_rng(0)
        tokens, ones = rng.integers(0, 264, (8, 32)).astype(np.int32), np.ones((8, 32), np.int32)
        batch = {'tokens': tokens, 'targets': tokens, 'positions': np.arange(32, dtype=np.int32) * ones}
        with trainer.context():
            state, rows = trainer.init_state(0), trainer.put(batch | {'segments': ones, 'bytes': ones})
            for _ in range(6):
                state, sums = trainer.train_step(state, rows)
                seen.append(jax.device_get((sums['nll'], sums['k'], sums['active'].sum())))
        return seen

    expected = losses(jax.devices()[:1])
    mesh = {'mesh.data': 2, 'mesh.context': 2, 'mesh.model': 2, 'train.accumulate': 2}
    np.testing.assert_allclose(losses(jax.devices(), **mesh), expected, rtol=2e-5)


def test_what_is_not_finite_is_found_in_its_layer(run):
    _, overrides, state = run
    trainer = Trainer(small(**overrides | {'model.vocab_size': 258}))  # that of bytes
    params = jax.tree.map(np.array, state.params)
    params['params']['groups_1']['ffn_1']['V'][:] = 3e38
    ones = np.ones((8, 32), np.int32)
    names = ('tokens', 'targets', 'positions', 'segments', 'bytes')
    with trainer.context():
        found = first_not_finite(trainer, params, dict.fromkeys(names, ones), step=1)
    assert found == 'first not finite: the output of ffn in layer 3 of 4'
