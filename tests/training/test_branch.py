"""Going on otherwise: what may change on resume, runs that are extended, branches of runs."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from spark.checkpoints.manager import Checkpoints
from spark.config import fields, load
from spark.data.tokenizer import tokenizer_for
from spark.errors import CheckpointError, ConfigError
from spark.training import run as run_module
from spark.training.run import train
from spark.training.step import Trainer
from spark.training.trackers import MetricsWriter
from tests.helpers import records, small


@pytest.fixture(scope='module')
def origin(trained):
    """(overrides of the config of a run of ten steps, its directory, its last state); it is evaluated and saved at 5 and 10."""
    workdir, _ = trained('spark')
    cfg = load(workdir / 'config.json')
    names = ('data.source', 'data.cache_dir', 'model.vocab_size', 'train.eval_every')
    return {name: fields(cfg)[name] for name in names}, workdir, state_at(workdir, 10)


def state_at(workdir, step):
    trainer = Trainer(tokenizer_for(load(workdir / 'config.json'))[1])
    return jax.device_get(Checkpoints(workdir / 'checkpoints').restore(step, trainer.abstract_state)[0])


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def after(workdir, step):
    return [r for r in records(workdir) if r['step'] > step]


class Cut(Exception):
    """In place of a kill."""


def cut_at(step, patch):
    write = MetricsWriter.write

    def cut(self, at, *args):
        if at == step:
            raise Cut
        write(self, at, *args)

    patch.setattr(MetricsWriter, 'write', cut)


def test_what_does_not_change_the_function_may_change_on_resume(origin, tmp_path):
    overrides, directory, _ = origin
    shutil.copytree(directory, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '10')
    other = {
        'train.accumulate': 1, 'train.loss_pieces': 2, 'model.remat': 'full', 'model.attention.impl': 'blockwise',
        'model.attention.block': 16, 'train.eval_every': 0, 'train.eval_batches': 1, 'train.activity': False,
        'train.log_every': 2,
    }  # fmt: skip
    train(small(**overrides | other), tmp_path / 'run')
    ours, theirs = ({r['step']: r for r in after(d, 5) if r['split'] == 'train'} for d in (tmp_path / 'run', directory))
    assert list(ours) == [6, 8, 10] and all(ours[step]['batch_crc'] == theirs[step]['batch_crc'] for step in ours)
    # The same parameters give the same loss. Then, what is rounded otherwise has moved a neuron or a key across its threshold.
    np.testing.assert_allclose(ours[6]['loss'], theirs[6]['loss'], rtol=1e-5)
    assert load(tmp_path / 'run' / 'config.json').model.remat == 'full'


@pytest.mark.parametrize('name', ['{}/5', '{}/checkpoints/5'])
def test_a_branch_with_the_same_config_is_the_run_itself(origin, tmp_path, name):
    overrides, directory, expected = origin
    source = name.format(directory)
    summary, _, state = train(small(**overrides, **{'train.branch_from': source}), tmp_path / 'branch')
    assert same(jax.device_get(state), expected)
    assert records(tmp_path / 'branch') == after(directory, 5)
    recorded = {'branch_from': f'{directory}/checkpoints/5', 'step': 5}
    assert json.loads((tmp_path / 'branch' / 'origin.json').read_text()) == summary['origin'] == recorded


def test_a_branch_is_killed_and_goes_on_without_the_run_it_came_from(origin, tmp_path, monkeypatch):
    overrides, directory, expected = origin
    shutil.copytree(directory, tmp_path / 'origin')
    cfg = small(**overrides, **{'train.branch_from': f'{tmp_path}/origin/checkpoints/5', 'train.save_every': 2, 'train.keep': 9})
    with monkeypatch.context() as patch:  # before it has a checkpoint of its own
        patch.setattr(run_module.Run, '_save', lambda self: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            train(cfg, tmp_path / 'branch')
    assert not list((tmp_path / 'branch' / 'checkpoints').iterdir())
    for step, saved in [(6, 5), (8, 6)]:
        with monkeypatch.context() as patch:
            cut_at(step, patch)
            with pytest.raises(Cut):
                train(cfg, tmp_path / 'branch')
        assert Checkpoints(tmp_path / 'branch' / 'checkpoints').steps()[-1] == saved
        shutil.rmtree(tmp_path / 'origin', ignore_errors=True)
    _, _, state = train(cfg, tmp_path / 'branch')
    assert same(jax.device_get(state), expected)
    assert records(tmp_path / 'branch') == after(directory, 5)


def test_a_run_is_extended_with_its_optimizer(origin, tmp_path):
    """It goes on as a branch does that ends at the same step; without the flag it is left as it is."""
    overrides, directory, _ = origin
    shutil.copytree(directory, tmp_path / 'run')
    longer = {'train.steps': 14, 'optimizer.lr': 2e-3, 'optimizer.final_lr': 0.0, 'optimizer.decay_steps': 4}
    cfg = small(**overrides | longer)
    with pytest.raises(ConfigError, match=r'train\.steps = 10, now 14: add --extend to go on so, or choose another') as e:
        train(cfg, tmp_path / 'run')
    assert '\n' not in str(e.value) and load(tmp_path / 'run' / 'config.json').train.steps == 10
    with pytest.raises(ConfigError, match=r'belongs to a run with model\.ffn\.k = 8, now 9: choose another'):
        train(small(**overrides | longer | {'model.ffn.k': 9}), tmp_path / 'run', extend=True)
    with pytest.raises(ConfigError, match=r'train\.steps = 9: want at least 10'):
        train(small(**overrides | {'train.steps': 9}), tmp_path / 'run', extend=True)
    with pytest.raises(ConfigError, match='rum: holds no run that --extend could extend'):
        train(cfg, tmp_path / 'rum', extend=True)
    summary, _, extended = train(cfg, tmp_path / 'run', extend=True)
    rates = [r['learning_rate'] for r in after(tmp_path / 'run', 10) if r['split'] == 'train']
    np.testing.assert_allclose(rates, [2e-3, 1.5e-3, 1e-3, 5e-4], rtol=1e-6)
    assert summary['steps'] == 14 and load(tmp_path / 'run' / 'config.json').train.steps == 14
    assert [r for r in records(tmp_path / 'run') if r['step'] <= 10] == records(directory)
    _, _, branched = train(small(**overrides | longer | {'train.branch_from': str(directory)}), tmp_path / 'branch')
    assert same(jax.device_get(extended), jax.device_get(branched))
    train(cfg, tmp_path / 'run')  # the flag is needed once


def test_what_a_branch_refuses(origin, tmp_path):
    overrides, directory, _ = origin
    for more, error, message in [
        ({'seed': 1}, ConfigError, r'that run has seed = 0, now 1: want the same, or only the weights by --restore_from='),
        ({}, ConfigError, r'train\.steps = 10: want more than 10, where the branch of .* starts'),
        ({'train.branch_from': f'{directory}/7'}, CheckpointError, r'train\.branch_from = .*no step 7; there are 5, 10'),
        ({'train.branch_from': '/no/run'}, CheckpointError, r"train\.branch_from = '/no/run': want a run directory"),
    ]:
        with pytest.raises(error, match=message):
            train(small(**overrides | {'train.branch_from': f'{directory}/checkpoints'} | more), tmp_path / 'branch')
        assert not pathlib.Path(tmp_path / 'branch' / 'config.json').exists()
    with pytest.raises(ConfigError, match=r"train\.restore_from = .*: want ''"):
        small(**{'train.branch_from': 'a', 'train.restore_from': 'b'})
    with pytest.raises(ConfigError, match=r'belongs to a run with train\.branch_from'):
        train(small(**overrides, **{'train.branch_from': str(directory)}), directory)
