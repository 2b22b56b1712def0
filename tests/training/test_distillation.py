"""Distillation: the loss is its equation, a mesh changes nothing, a run resumes with the same teacher."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark import flops
from spark.compiling import aot
from spark.config import fields, load
from spark.data.tokenizer import tokenizer_for
from spark.errors import CheckpointError, ConfigError
from spark.training import distillation, loss
from spark.training.run import train
from spark.training.step import Trainer
from tests.helpers import corpus, model_and_params, records, small
from tests.training.test_run import CHIP
from tests.training.test_step import random_batch

WIDER = {'model.d_model': 64, 'model.n_layers': 2, 'model.ffn.d_ff': 128}  # a teacher of another shape


CASES = [(0, 1.0, 1), (0, 2.0, 8), (264, 2.0, 8), (1, 0.5, 264), (7, 2.0, 1), (7, 3.0, 8)]


@pytest.mark.parametrize(('top', 'T', 'pieces'), CASES)
def test_the_loss_and_its_gradients_are_the_equation(top, T, pieces):
    """Against distributions over the whole vocabulary at once."""
    (model, params), (wise, frozen) = model_and_params(small()), model_and_params(small('dense', **WIDER), seed=1)
    rng = np.random.default_rng(0)
    hidden, taught = (jnp.asarray(3 * rng.normal(size=(2, 7, D)), jnp.float32) for D in (32, 64))
    targets = jnp.asarray(rng.integers(0, 264, (2, 7)), jnp.int32)
    apart = jnp.arange(1.0, 8.0)  # each token has a weight of its own
    teacher = loss.Teacher(wise, frozen, T, top)

    def ours(params, hidden):
        nll, log_z, kl = loss.distillation(model, params, hidden, targets, teacher, taught, pieces)
        return jnp.sum((0.3 * nll + 0.7 * T**2 * kl + 0.1 * log_z**2) * apart), (nll, log_z, kl)

    def theirs(params, hidden):
        z, t = model.apply(params, hidden, method='logits'), wise.apply(frozen, taught, method='logits')
        likeliest = jnp.argsort(-t, axis=-1)[..., : top or None]
        chosen = jnp.zeros_like(t).at[jnp.arange(2)[:, None, None], jnp.arange(7)[:, None], likeliest].set(1)
        p = chosen * jnp.exp(t / T)
        p /= p.sum(-1, keepdims=True)
        log_p = jnp.log(jnp.where(p > 0, p, 1))
        kl = jnp.sum(p * (log_p - jax.nn.log_softmax(z / T)), axis=-1)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0]
        log_z = jax.nn.logsumexp(z, axis=-1)
        return jnp.sum((0.3 * nll + 0.7 * T**2 * kl + 0.1 * log_z**2) * apart), (nll, log_z, kl)

    (_, found), gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(params, hidden)
    (_, expected), gradients_ = jax.value_and_grad(theirs, (0, 1), has_aux=True)(params, hidden)
    assert (expected[2] > 0.05).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), gradients, gradients_)


def learnt(devices, **overrides):
    """(sums of two steps of a Spark model that learns from a wider dense one, its last parameters)."""
    steady = {'optimizer.eps': 1e-3, 'optimizer.lr': 1e-3, 'model.n_layers': 2, 'train.teacher': 'x', 'train.kd_top': 9}
    cfg = small(**steady | overrides)
    wise, frozen = model_and_params(small('dense', **WIDER), seed=1)
    start, frozen, seen = jax.device_get(model_and_params(cfg)[1]), jax.device_get(frozen), []
    trainer = Trainer(cfg, devices, wise.cfg)
    with trainer.context():
        state = trainer.init_state(0).replace(params=jax.device_put(start, trainer.state_shardings.params))
        taught = jax.device_put(frozen, jax.tree.map(lambda x: x.sharding, trainer.abstract_teacher))
        assert len(devices) == 1 or not taught['params']['groups']['ffn_0']['V'].sharding.is_fully_replicated
        for step in range(2):
            state, sums = trainer.train_step(state, trainer.put(random_batch(cfg, step)), taught)
            seen.append([float(sums[name]) for name in ('nll', 'kd', 'grad_norm')])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(taught), frozen)  # it is there as before
    return np.array(seen), jax.device_get(state.params)


@pytest.fixture(scope='module')
def one_device():
    return learnt(jax.devices()[:1])


@pytest.mark.parametrize('overrides', [
    {'mesh.fsdp': 2, 'mesh.context': 2, 'mesh.model': 2, 'train.loss_pieces': 4},
    pytest.param({'mesh.data': 4, 'mesh.model': 2}, marks=pytest.mark.slow),
    pytest.param({'mesh.data': 1, 'train.accumulate': 2, 'train.loss_pieces': 8, 'model.remat': 'full'}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_every_mesh_gives_the_losses_of_one_device(one_device, overrides):
    expected, last = one_device
    seen, params = learnt(jax.devices()[: 1 if overrides.get('mesh.data') == 1 else 8], **overrides)
    np.testing.assert_allclose(seen, expected, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(last), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b) + 1e-6


@pytest.mark.parametrize('top', [0, 16])
def test_no_logits_exist_at_once(top):
    fields = {'model.vocab_size': 5000, 'train.loss_pieces': 8, 'data.batch_size': 2, 'train.teacher': 'x', 'train.kd_top': top}
    trainer = Trainer(small(**fields), jax.devices()[:1], small('dense', **WIDER | {'model.vocab_size': 5000}).model)
    with trainer.context():
        text = trainer.train_step.lower(*trainer.abstract_inputs()).as_text()
    assert '2x32x625x' in text and '2x32x5000' not in text and '64x5000' not in text


@pytest.fixture(scope='module')
def taught(trained, tmp_path_factory):
    """(overrides of a run that learns from the dense run of `trained`, its directory, its summary, its last state)."""
    teacher, directory = trained('dense')[0], tmp_path_factory.mktemp('taught')
    own = {'train.teacher': str(teacher), 'train.kd_temperature': 2.0, 'train.loss_pieces': 2}
    overrides = corpus(directory) | own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('spark.devices.chip', lambda device: CHIP)
        summary, _, state = train(small(**overrides), directory / 'run')
    return overrides, directory / 'run', summary, jax.device_get(state)


def test_a_run_learns_from_a_teacher(taught, trained):
    """It logs both losses and both costs, and keeps nothing of the teacher but which one it was."""
    _, workdir, summary, _ = taught
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    lines = [line for line in lines if line['split'] == 'train']
    assert all(line['ce'] == line['loss'] and line['kd'] > 0 for line in lines) and lines[-1]['kd'] < lines[0]['kd']
    cfg = load(workdir / 'config.json')
    teacher = load(trained('dense')[0] / 'config.json').model.model_copy(update={'vocab_size': 258})
    model = cfg.model.model_copy(update={'vocab_size': 258})
    forward = sum(flops.flops_per_token(teacher, 32, 'training').values()) / 3
    assert lines[-1]['teacher_mfu'] / lines[-1]['mfu'] == pytest.approx(forward / flops.model_flops_per_token(model, 32))
    searched = cfg.model_copy(update={'train': cfg.train.model_copy(update={'kd_top': 9})})
    assert distillation.flops_per_token(searched, teacher) == pytest.approx(forward + 2 * 32 * 258)
    assert summary['teacher']['step'] == 10 and 'kd' not in summary['validation']
    saved = json.loads((workdir / 'checkpoints' / '10' / 'data' / 'metadata').read_text())
    assert saved['data']['teacher'] == summary['teacher']
    assert not [path for path in saved['checksums'] if 'teacher' in path]


@pytest.mark.soak
def test_compiling_ahead_counts_the_memory_of_the_teacher(taught, trained):
    _, cfg = tokenizer_for(load(taught[1] / 'config.json'))
    alone = cfg.model_copy(update={'train': cfg.train.model_copy(update={'kd_weight': 0.0})})
    device, found = jax.devices()[0], []
    for each in (cfg, alone):
        step = aot.memory(aot.compile_step(each, [device])[1], device)['arguments']
        found.append((step, aot.evaluation(each, [device])['while training']['arguments']))
    size = 4 * trained('dense')[1]['parameters']
    assert [a - b for a, b in zip(*found, strict=True)] == pytest.approx([size, size], rel=0.01)


def test_a_run_resumes_with_the_teacher_that_it_had(taught, trained, tmp_path):
    """Also when the run of the teacher has gone on; not when its checkpoint is another one, or gone."""
    overrides, workdir, _, expected = taught
    shutil.copytree(trained('dense')[0], tmp_path / 'teacher')

    def stopped(name, teacher):
        """The run, as it was at step 5, with a teacher that lies elsewhere now."""
        shutil.copytree(workdir, tmp_path / name, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / name / 'checkpoints' / '10')
        return small(**overrides | {'train.teacher': str(tmp_path / teacher)}), tmp_path / name

    wise = load(tmp_path / 'teacher' / 'config.json')
    longer = wise.model_copy(update={'train': wise.train.model_copy(update={'steps': 12, 'keep': 5})})
    train(longer, tmp_path / 'teacher', extend=True)
    _, _, state = train(*stopped('a', 'teacher'))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
    untimed = lambda run: [{name: x for name, x in r.items() if not name.endswith('mfu')} for r in records(run)]
    assert untimed(tmp_path / 'a') == untimed(workdir)

    shutil.rmtree(tmp_path / 'teacher' / 'checkpoints' / '10')
    with pytest.raises(CheckpointError, match=r"train\.teacher = '.*teacher': step 10 is gone, from which this run has learnt"):
        train(*stopped('b', 'teacher'))
    shutil.copytree(trained('spark')[0], tmp_path / 'other')
    with pytest.raises(CheckpointError, match='step 10 is not what this run has learnt from'):
        train(*stopped('c', 'other'))


def test_a_run_does_not_go_on_with_a_teacher_that_it_did_not_have_or_without():
    alone = Trainer(small(), jax.devices()[:1])
    with pytest.raises(CheckpointError, match=r"^train\.teacher = '': want step 10 of its teacher, wherever that lies"):
        distillation.load(alone, {'data': {}, 'teacher': {'step': 10, 'digest': 1}})
    assert distillation.load(alone, {'data': {}}) == distillation.load(alone, {}) == ([], None)
    taught = Trainer(small(**{'train.teacher': '/no/where'}), jax.devices()[:1], small('dense').model)
    with pytest.raises(CheckpointError, match=r"train\.teacher = '/no/where': want none, from which this run has learnt"):
        distillation.load(taught, {'data': {}})


def test_no_weight_is_no_teacher(trained, tmp_path, capsys):
    workdir, _ = trained('spark')
    names = ('data.source', 'data.cache_dir', 'model.vocab_size', 'train.eval_every')
    overrides = {name: fields(load(workdir / 'config.json'))[name] for name in names}
    train(small(**overrides, **{'train.teacher': '/no/where', 'train.kd_weight': 0.0}), tmp_path / 'run')
    assert records(tmp_path / 'run') == records(workdir)
    assert 'train.kd_weight = 0: nothing is learnt from /no/where' in capsys.readouterr().out


def test_a_teacher_that_cannot_teach_is_told(taught, trained, tmp_path):
    overrides, _, _, _ = taught
    other = overrides | {'data.bos': 'none'}
    cases = [
        (overrides | {'train.teacher': str(tmp_path / 'typo')}, r"train\.teacher = '.*typo': want a run directory, or a checkp"),
        (other, r"train\.teacher = '.*': data\.tokenizer = 'bytes' of that run gives other ids: want one with data\.tokenizer"),
        (overrides | {'model.vocab_size': 264}, r"train\.teacher = '.*': that run has model\.vocab_size = 258: want 264"),
        (overrides | {'train.teacher': f'{trained("dense")[0]}/7'}, r"train\.teacher = '.*': want a run directory.* no step 7"),
    ]  # fmt: skip
    for wrong, message in cases:
        with pytest.raises((ConfigError, CheckpointError), match=message) as e:
            train(small(**wrong), tmp_path / 'run')
        assert '\n' not in str(e.value)
    split = {'mesh.model': 6, 'model.attention.n_heads': 6, 'model.attention.n_kv_heads': 6, 'model.vocab_size': 258}
    with pytest.raises(ConfigError, match=r"train\.teacher = '.*': model\.ffn\.d_ff = 64: want a multiple of mesh\.model = 6"):
        distillation.model_of(small(**overrides | split), 6)
    with pytest.raises(ConfigError, match=r"train\.kd_weight = 0\.3: want 0\.5, the default: there is no train\.teacher"):
        small(**{'train.kd_weight': 0.3})
