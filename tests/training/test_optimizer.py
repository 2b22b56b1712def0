"""Optimizers and schedules by name, by-path settings: against optax, sharded, resumed."""

import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spark import config
from spark.checkpoints.manager import Checkpoints
from spark.errors import ConfigError
from spark.evaluation import evaluate
from spark.inference.load import load
from spark.nn.layers import METRICS
from spark.nn.transformer import width
from spark.training import by_path, optimizer
from spark.training.run import train
from spark.training.start import initial_state
from spark.training.step import Trainer
from tests.helpers import corpus, model_and_params, records, small
from tests.training.test_step import random_batch

NAMES = ('adamw', 'adafactor', 'lion', 'muon')
FIRST = [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
WIDE = {'model.d_model': 128, 'model.ffn.d_ff': 256, 'model.n_layers': 2}  # wide enough that Adafactor's moments are factored


def of(**overrides):
    """The optimizer's config with lr 1."""
    overrides = {'lr': 1.0, 'warmup_steps': 0} | overrides
    return small(**{f'optimizer.{name}': value for name, value in overrides.items()}).optimizer


def random_like(params, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)


@pytest.mark.parametrize(
    ('overrides', 'rates'),  # at steps 0, 4, 5, 12, 19, 20 of 20
    [
        ({'schedule': 'constant'}, [1, 1, 1, 1, 1, 1]),
        ({'schedule': 'cosine', 'final_lr': 0.0}, [1, 0.904508, 0.853553, 0.345492, 0.006156, 0]),
        ({'schedule': 'linear', 'final_lr': 0.5}, [1, 0.9, 0.875, 0.7, 0.525, 0.5]),
        ({'schedule': 'linear', 'warmup_steps': 4}, [0.2, 1, 0.94375, 0.55, 0.15625, 0.1]),
        ({'schedule': 'wsd', 'final_lr': 0.0, 'decay_share': 0.5}, [1, 1, 1, 0.8, 0.1, 0]),
        ({'schedule': 'wsd', 'final_lr': 0.0, 'decay_steps': 10}, [1, 1, 1, 0.8, 0.1, 0]),
        ({'schedule': 'auto', 'final_lr': 0.0, 'decay_steps': 10}, [1, 1, 1, 0.8, 0.1, 0]),
        ({'schedule': 'wsd', 'final_lr': 0.2, 'decay_form': 'cosine', 'decay_steps': 10}, [1, 1, 1, 0.923607, 0.219577, 0.2]),
        ({'schedule': 'wsd', 'final_lr': 0.0, 'decay_form': 'sqrt', 'decay_steps': 10}, [1, 1, 1, 0.552786, 0.051317, 0]),
        ({'schedule': 'inverse_sqrt', 'warmup_steps': 4}, [0.2, 1, 0.894427, 0.57735, 0.458831, 0.447214]),
        ({'schedule': 'inverse_sqrt', 'warmup_steps': 4, 'final_lr': 0.5}, [0.2, 1, 0.894427, 0.57735, 0.5, 0.5]),
        ({'schedule': 'auto', 'warmup_steps': 4, 'final_lr': 0.0}, [0.2, 1, 0.990393, 0.5, 0.009607, 0]),
        ({'schedule': 'auto', 'warmup_steps': 4, 'warmup_from_zero': True, 'final_lr': 0.0}, [0, 1, 0.990393, 0.5, 0.009607, 0]),
    ],
    ids=str,
)
def test_schedules(overrides, rates):
    rate = jax.jit(optimizer.schedule(of(**overrides), 20))
    np.testing.assert_allclose([rate(step) for step in (0, 4, 5, 12, 19, 20)], rates, atol=2e-6)


@pytest.mark.parametrize('schedule', ['constant', 'cosine', 'linear', 'wsd', 'inverse_sqrt'])
@pytest.mark.parametrize('warm', [0, 1, 5])
def test_no_step_is_wasted_and_the_warm_up_is_a_line(schedule, warm):
    rate = optimizer.schedule(of(schedule=schedule, warmup_steps=warm), 20)
    rates = np.array([rate(step) for step in range(20)])
    assert (rates > 0).all() and rates.max() == rates[warm] == 1
    np.testing.assert_allclose(rates[: warm + 1], np.arange(1, warm + 2) / (warm + 1), rtol=1e-6)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'name': 'adam'}, r"optimizer\.name = 'adam': want 'adamw', 'adafactor', 'lion' or 'muon'"),
        ({'momentum': 0.9}, r"optimizer\.momentum = 0\.9: want 0\.95, the default: name 'adamw' has no Muon"),
        ({'name': 'lion', 'eps': 1e-6}, r"optimizer\.eps = 1e-06: want 1e-08, the default: name 'lion' has none"),
        ({'name': 'adafactor', 'eps': 1e-20}, r'optimizer\.eps = 1e-20: want at least 1e-15 for adafactor'),
        ({'schedule': 'linear', 'decay_steps': 3}, r"optimizer\.decay_steps = 3: want 0, the default: schedule 'linear'"),
        ({'decay_form': 'sqrt'}, r"optimizer\.decay_form = 'sqrt': want 'linear', the default: schedule 'auto' has no cool-down"),
        ({'schedule': 'constant', 'final_lr': 0.0}, r"optimizer\.final_lr = 0\.0: want 0\.1, the default: schedule 'constant'"),
        ({'decay_steps': 3, 'decay_share': 0.5}, r'optimizer\.decay_share = 0\.5: want 0\.2, the default: decay_steps says it'),
        ({'schedule': 'wsd', 'decay_share': 0.9, 'warmup_steps': 2}, r'decay_share = 0\.9: want at most 0\.8, since 2 of 10'),
        ({'rates': 'embedding'}, r"optimizer\.rates = 'embedding': want 'PATTERN=NUMBER …'"),
        ({'rates': '(=1'}, r"optimizer\.rates = '\(=1': want 'PATTERN=NUMBER …'"),
        ({'decays': 'V=-1'}, r"optimizer\.decays = 'V=-1': want 'PATTERN=NUMBER …'"),
    ],
    ids=str,
)
def test_what_is_not_read_or_wrong_is_told(overrides, message):
    with pytest.raises(ConfigError, match=message):
        of(**overrides)


def sides(params):
    """The dimensions of matrices for `optax.contrib.muon`."""
    dims = {'embedding': None, 'scale': None, 'out': ((1, 2), (3,))} | dict.fromkeys('qkv', ((1,), (2, 3)))
    of_leaf = lambda path, _: dims.get(path[-1].key, ((1,), (2,)))
    as_dims = lambda d: None if d is None else optax.contrib.MuonDimensionNumbers(*d)
    return jax.tree_util.tree_map_with_path(lambda path, x: as_dims(of_leaf(path, x)), params)


@pytest.mark.parametrize('name', NAMES)
def test_updates_are_those_of_optax(name):
    cfg = small(**{'optimizer.name': name, 'optimizer.clip': 0.0} | WIDE)
    o, (_, params) = cfg.optimizer, model_and_params(cfg)
    rate, decays = optimizer.schedule(o, 10), lambda p: by_path.map_by_name(lambda name, _: not name.endswith('scale'), p)
    theirs = {
        'adamw': lambda: optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=0.1, mask=decays),
        'lion': lambda: optax.lion(rate, o.b1, o.b2, weight_decay=0.1, mask=decays),
        'muon': lambda: optax.contrib.muon(
            rate, beta=0.95, eps=o.eps, weight_decay=0.1, adam_b1=o.b1, adam_b2=o.b2, consistent_rms=0.2,
            muon_weight_dimension_numbers=sides(params),
        ),
        'adafactor': lambda: optax.chain(
            optax.scale_by_factored_rms(epsilon=o.eps**2, decay_rate_fn=lambda i, e: jnp.minimum(1 - (i + 1.0) ** -e, o.b2)),
            optax.clip_by_block_rms(1.0), optax.ema(o.b1, debias=False), optax.add_decayed_weights(0.1, decays),
            optax.scale_by_learning_rate(rate),
        ),
    }[name]()  # fmt: skip
    ours = optimizer.make_optimizer(o, 10, by_path.settings(o, params))

    def after(tx, params):
        state = tx.init(params)
        for i in range(3):
            updates, state = tx.update(random_like(params, i), state, params)
            params = optax.apply_updates(params, updates)
        return params

    found, expected = (jax.jit(lambda p, tx=tx: after(tx, p))(params) for tx in (ours, theirs))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True))
    if name == 'muon':  # optax's AdamW inside of Muon has Nesterov's momentum and no weight decay
        of_muon = lambda tree: [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if x.ndim > 2]
        found, expected = of_muon(found), of_muon(expected)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal if name == 'adamw' else close, found, expected)


@pytest.mark.parametrize('name', FIRST)
def test_the_state_of_each_optimizer_is_sharded_and_resumes_exactly(name, tmp_path):
    rates = {'optimizer.rates': 'final_norm=0 K2=0.5'} if name in ('muon', 'adafactor') else {}
    mesh, more = {'mesh.fsdp': 4, 'mesh.model': 2}, {'optimizer.name': name, 'optimizer.lr': 1e-3} | rates | WIDE
    trainer, alone = Trainer(small(**more | mesh)), Trainer(small(**more), jax.devices()[:1])

    def steps(trainer, state, batches):
        losses = []
        for i in batches:
            state, sums = trainer.train_step(state, trainer.put(random_batch(trainer.cfg, i)))
            losses.append(float(sums['nll'] / sums['tokens']))
        return state, losses

    with trainer.context():
        half, first = steps(trainer, trainer.init_state(0), range(2))
        held = [(x.shape, x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(half.opt_state)]
        (tmp_path / 'config.json').write_text(trainer.cfg.model_dump_json())
        checkpoints = Checkpoints(tmp_path / 'checkpoints')
        checkpoints.save(2, half, {})
        assert checkpoints.wait()
        straight, last = steps(trainer, half, range(2, 5))
        restored, _ = checkpoints.restore(2, trainer.abstract_state)
        again, _ = steps(trainer, restored, range(2, 5))
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(straight), jax.device_get(again))
    # Every number that is kept for a matrix, or for its rows, is on some devices only; norms are whole.
    matrices = [(shape, shard) for shape, shard in held if np.prod(shape) > 128]
    assert matrices and all(np.prod(shard) <= np.prod(shape) / 2 for shape, shard in matrices)
    if name == 'adafactor':  # the rows and the columns of V
        assert ((1, 128), (1, 32)) in held and ((1, 256), (1, 128)) in held
    whole = sum(x.size for x in jax.tree.leaves(half.params))
    share = {'adamw': 2, 'lion': 1, 'muon': 1 + 264 * 128 / whole, 'adafactor': 1.5}[name]  # of the size of the parameters
    assert sum(np.prod(shape) for shape, _ in held) < (share + 0.01) * whole
    with alone.context():
        np.testing.assert_allclose(first + last, steps(alone, alone.init_state(0), range(5))[1], rtol=1e-4)


def test_patterns_choose_rates_and_decay_and_freeze():
    cfg = small(**{'optimizer.rates': 'groups/.*=0.5 /ffn_0/=2 embedding=0', 'optimizer.decays': 'scale=0.3 ^final=0 V=0'})
    trainer = Trainer(cfg, jax.devices()[:1])
    found = trainer.settings
    assert found['embedding'].frozen and found['groups/ffn_0/K1'].rate == 2 and found['groups/ffn_1/K1'].rate == 0.5
    assert (found['groups/post_ffn_0/scale'].rate, found['final_norm/scale'].rate) == (0.5, 1)  # the last match counts
    several = cfg.model_copy(update={'model': cfg.model.model_copy(update={'layers': '2-:ffn.kind=gated'})})
    with pytest.raises(ConfigError, match=r"optimizer\.rates = 'groups/"):  # which would be one of two scans
        _ = Trainer(several, jax.devices()[:1]).settings
    names = ('final_norm/scale', 'groups/pre_ffn_0/scale', 'groups/ffn_0/V', 'groups/ffn_0/K2')
    assert [found[name].decay for name in names] == [0, 0.3, 0, 0.1]
    with trainer.context():
        state = trainer.init_state(0)
        kept = jax.device_get(state.params['params'])
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
        assert any('K1' in path for path in paths) and not any('embedding' in path for path in paths)
        after, sums = trainer.train_step(state, trainer.put(random_batch(cfg)))
        params = after.params['params']
        np.testing.assert_array_equal(params['embedding'], kept['embedding'])
        # Adam's first step is the rate by the sign of a gradient: without decay, every number of V moves by it.
        rate = float(sums['learning_rate'])
        for i, factor in [(0, 2), (1, 0.5)]:
            moved = np.abs(params['groups'][f'ffn_{i}']['V'] - kept['groups'][f'ffn_{i}']['V'])
            np.testing.assert_allclose(np.median(moved), factor * rate, rtol=1e-3)
    everything = Trainer(small(), jax.devices()[:1])
    with everything.context():
        _, all_ = everything.train_step(everything.init_state(0), everything.put(random_batch(cfg)))
    assert 0 < float(sums['grad_norm']) < float(all_['grad_norm'])  # without what is frozen


@pytest.mark.parametrize(
    'rates, decays, message',
    [
        ('.=0', '', r"optimizer\.rates = '.=0': every parameter has rate 0"),
        ('V$=0', 'scale=0.1 V$=0.5', r"optimizer\.decays = .*: what 'V\$' matches is frozen"),
    ],
)
def test_what_would_do_nothing_is_an_error(rates, decays, message):
    cfg = small(**{'optimizer.rates': rates, 'optimizer.decays': decays})
    with pytest.raises(ConfigError, match=message):
        by_path.settings(cfg.optimizer, model_and_params(cfg)[1])


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError) as e:
        Trainer(small(**{'optimizer.decays': 'V=0 embeding=1'}), jax.devices()[:1])
    start = "optimizer.decays = 'V=0 embeding=1': 'embeding' matches no parameter; did you mean embedding? There are embedding, "
    assert str(e.value).startswith(start + 'final_norm/scale, groups/attention_*/k') and '\n' not in str(e.value)


def test_the_table_has_a_line_for_what_is_treated_alike():
    cfg = small(**{'optimizer.name': 'muon', 'optimizer.rates': 'embedding=0 ffn_0/V=0.5', 'model.d_model': 64})
    _, params = model_and_params(cfg)
    lines = [line.split() for line in by_path.table(by_path.settings(cfg.optimizer, params)).splitlines()]
    norms = [f'groups/{half}_{what}_*/scale' for half in ('post', 'pre') for what in ('attention', 'ffn')]
    matrices = ['groups/attention_*/{k,out,q,v}', 'groups/ffn_*/{K1,K2}', 'groups/ffn_1/V']
    assert lines == [
        ['adamw', 'frozen', '16,896', 'embedding'],
        ['adamw', 'lr', '×', '1', 'decay', '0', '1,088', 'final_norm/scale', *norms],
        ['muon', 'lr', '×', '1', 'decay', '0.1', '61,440', *matrices],
        ['muon', 'lr', '×', '0.5', 'decay', '0.1', '12,288', 'groups/ffn_0/V'],
    ]
    title = optimizer.title(of(warmup_steps=4, schedule='linear'), 20)
    assert title == 'adamw, schedule linear, lr 0.2 at first, 1 from step 4, 0.1 at the end'


def test_what_extends_a_run_may_change_the_schedule_and_nothing_else_of_the_optimizer():
    base, o = small(), small(**{'optimizer.schedule': 'wsd', 'optimizer.decay_share': 0.5, 'optimizer.decay_form': 'sqrt'})
    assert config.differences(base, o, ignore=config.SCHEDULE) == ''
    other = small(**{'optimizer.name': 'muon', 'optimizer.momentum': 0.9, 'optimizer.rates': 'V=2', 'optimizer.decays': 'V=2'})
    assert config.differences(base, other, ignore=config.SCHEDULE).count(';') == 3


def test_a_run_of_an_older_version_goes_on_bitwise_also_in_its_warm_up(tmp_path):
    overrides = corpus(tmp_path) | {'optimizer.warmup_steps': 8, 'optimizer.warmup_from_zero': True}
    train(small(**overrides), tmp_path / 'run')
    raw = json.loads((tmp_path / 'run' / 'config.json').read_text())
    for name in ('name', 'schedule', 'warmup_from_zero', 'decay_share', 'decay_form', 'momentum', 'rates', 'decays', 'ema'):
        del raw['optimizer'][name]
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(raw))
    assert config.load(tmp_path / 'run' / 'config.json').optimizer.warmup_from_zero
    expected = records(tmp_path / 'run')
    assert expected[0]['learning_rate'] == 0
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '10')
    with pytest.raises(ConfigError, match=r'belongs to a run with optimizer\.warmup_from_zero = True, now False'):
        train(small(**overrides | {'optimizer.warmup_from_zero': False}), tmp_path / 'run')
    train(small(**overrides), tmp_path / 'run')
    assert records(tmp_path / 'run') == expected
    # What a checkpoint of that version holds.
    cfg = small()
    _, params = model_and_params(cfg)
    everything = lambda p: jax.tree.map(lambda _: True, p)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 1.0, mask=everything))
    ours = optimizer.make_optimizer(cfg.optimizer, 10, by_path.settings(cfg.optimizer, params))
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(adamw.init(params))


def test_the_mean_of_the_parameters_is_kept_sharded_evaluated_and_resumed(tmp_path):
    overrides = corpus(tmp_path) | {'optimizer.ema': 0.8, 'mesh.fsdp': 4, 'mesh.model': 2}
    overrides |= {'train.save_every': 1, 'train.keep': 10}
    _, trainer, state = train(small(**overrides), tmp_path / 'run')
    cfg, checkpoints = trainer.cfg, Checkpoints(tmp_path / 'run' / 'checkpoints')
    seen = [checkpoints.restore_params(step, trainer.abstract_state.params) for step in range(1, 11)]
    weights = 0.8 ** np.arange(9, -1, -1) / np.sum(0.8 ** np.arange(10))
    expected = jax.tree.map(lambda *x: sum(w * np.asarray(y, np.float64) for w, y in zip(weights, x, strict=True)), *seen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), jax.device_get(state.ema), expected)
    assert jax.tree.map(lambda x: x.sharding, state.ema) == jax.tree.map(lambda x: x.sharding, state.params)

    evaluated = {(r['step'], r['split']): r for r in records(tmp_path / 'run') if r['split'] != 'train'}
    last = evaluated[10, 'validation']
    assert last['loss'] != last['ema_loss'] and 'ema_bits_per_byte' in evaluated[5, 'validation']
    model = evaluate.load(tmp_path / 'run', ema=True)
    report, _ = evaluate.evaluate(model, 'validation', statistics=False)
    np.testing.assert_allclose(report['loss'], last['ema_loss'], rtol=1e-5)
    served = load(tmp_path / 'run', ema=True).weights, load(tmp_path / 'run').weights
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, served), strict=True))

    shutil.copytree(tmp_path / 'run', tmp_path / 'again')
    for step in range(4, 11):
        shutil.rmtree(tmp_path / 'again' / 'checkpoints' / str(step))
    _, _, again = train(small(**overrides), tmp_path / 'again')
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(again))
    assert records(tmp_path / 'again') == records(tmp_path / 'run')

    # An update that is left out does not count; from other weights the mean starts there.
    wrong = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), again.params)
    source = {'train': cfg.train.model_copy(update={'restore_from': str(tmp_path / 'run')})}
    other = Trainer(cfg.model_copy(update=source))
    with trainer.context():
        kept = jax.device_get(again.ema)
        after, _ = trainer.train_step(again.replace(params=wrong), trainer.put(random_batch(cfg)))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.ema), kept)
        born = initial_state(other)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(born.ema), jax.device_get(born.params))
    plain = small(**corpus(tmp_path))
    (tmp_path / 'run' / 'config.json').write_text(plain.model_dump_json())
    for loading in (evaluate.load, load):
        with pytest.raises(ConfigError, match=r'--ema: want a run with optimizer\.ema above 0'):
            loading(tmp_path / 'run', ema=True)


def moved(D, base, name):
    """RMS of what four steps change in the outputs of both halves, in the scores of neurons, and in the logits of the targets."""
    n = D // 32
    heads = {'model.d_model': D, 'model.attention.n_heads': 4 * n, 'model.attention.n_kv_heads': 2 * n}
    ffn = {'model.ffn.d_ff': 96 * n, 'model.ffn.k': 8 * n, 'model.ffn.r': 16 * n, 'model.ffn.impl': 'masked'}
    layers = {'model.n_layers': 1, 'model.pattern': ('global',), 'model.attention.window': 0, 'model.logit_cap': 0.0}
    more = {'optimizer.name': name, 'optimizer.schedule': 'constant', 'optimizer.warmup_steps': 0, 'model.base_width': base}
    trainer = Trainer(small(**heads | ffn | layers | more), jax.devices()[:1])
    batch = random_batch(trainer.cfg)

    def note(call, args, kwargs, context):
        y, module = call(*args, **kwargs), context.module
        if module.name in ('attention_0', 'ffn_0') and context.method_name in ('__call__', 'activate'):
            seen = args[0] if context.method_name == 'activate' else y  # the scores
            module.sow(METRICS, f'seen_{context.method_name}', seen, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return y

    @jax.jit
    def observe(params):
        with nn.intercept_methods(note):
            inputs = [batch[name] for name in ('tokens', 'positions', 'segments')]
            hidden, sown = trainer.model.apply(params, *inputs, mutable=[METRICS])
        sown = {by_path.name(path): x for path, x in jax.tree_util.tree_leaves_with_path(sown[METRICS])}
        logits = trainer.model.apply(params, hidden, method='logits')
        of_targets = jnp.take_along_axis(logits, batch['targets'][..., None], axis=-1) - logits.mean(-1, keepdims=True)
        return {name: x for name, x in sown.items() if '/seen_' in name} | {'logits': of_targets}

    with trainer.context():
        state, on_device = trainer.init_state(0), trainer.put(batch)
        before = jax.device_get(observe(state.params))
        for _ in range(4):
            state, _ = trainer.train_step(state, on_device)
        after = jax.device_get(observe(state.params))
    assert len(before) == 5
    return np.array([np.sqrt(np.mean((after[name] - before[name]) ** 2)) for name in before])


@pytest.mark.parametrize('name', FIRST)
def test_coordinate_check(name):
    """In wider models, what steps change keeps its size with a base width, and grows without."""
    narrow = moved(32, 32, name)
    scaled = np.array([moved(D, 32, name) / narrow for D in (64, 128)])
    unscaled = np.array([moved(D, 0, name) / narrow for D in (64, 128)])
    assert (scaled > 0.75).all() and (scaled < 1.25).all()
    assert (unscaled[1] > 1.35).all() and (unscaled[1] > unscaled[0]).all()


def test_without_a_base_width_nothing_is_scaled_and_at_it_neither():
    _, params = model_and_params(small())
    plain, at_base = by_path.settings(small().optimizer, params), by_path.settings(small().optimizer, params, 1.0)
    assert plain == at_base and all(setting.shape == setting.width == 1 for setting in plain.values())
    wide = small(**{'model.base_width': 8})
    assert (width(wide.model), width(small().model)) == (4, 1)
    settings = Trainer(wide, jax.devices()[:1]).settings
    scales = {name: s.width for name, s in settings.items()}
    of = {line.split('  ')[-1]: line for line in by_path.table(settings).splitlines()}
    assert {re.search('lr × 1( × [0-9.]+)?', line)[0]: 'K1' in names for names, line in of.items()} == {
        'lr × 1': False, 'lr × 1 × 0.25': True, 'lr × 1 × 0.5': False,
    }  # fmt: skip
    assert (scales['groups/ffn_0/V'], scales['embedding'], scales['final_norm/scale']) == (0.25, 0.5, 0.5)
    assert scales['groups/pre_ffn_0/scale'] == 1
    _, params = model_and_params(wide)
    np.testing.assert_array_equal(params['params']['final_norm']['scale'], -0.5)
