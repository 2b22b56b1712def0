"""Lookups that differ by layer, and k by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark import flops
from spark.config import check_devices
from spark.errors import ConfigError
from spark.evaluation import evaluate
from spark.nn.ffn import activations
from spark.nn.layers import METRICS
from spark.nn.runs import at_step, ks, place, runs
from spark.nn.transformer import STEP, Transformer, activity, with_step
from spark.training.step import Trainer
from tests.helpers import model_and_params, random_rows, small

SCHEDULE = {'model.ffn.k_schedule': 'all:3 linear:4', 'model.attention.k_schedule': '16:2 cosine:6'}


GROUPS = {'model.ffn.groups': 4}
# With every layer at a place of its own in the pattern, k is a number, not an array.
ONE_GROUP = {'model.pattern': ('local', 'global') * 2}


def own_groups(params):
    """The parameters of four layers in two groups, as those of ONE_GROUP."""
    groups = {}
    for name, x in params['params']['groups'].items():
        half, _, i = name.rpartition('_')
        for group in range(2):
            groups[f'{half}_{2 * group + int(i)}'] = jax.tree.map(lambda x, group=group: x[group][None], x)
    return params | {'params': params['params'] | {'groups': groups}}


def of_layers(cfg, *names):
    """One field of each layer."""
    return [functools.reduce(getattr, names, layer) for layer in cfg.model.per_layer]


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, rows):
    hidden, state = model.apply(variables, *rows, mutable=[METRICS])
    return hidden, activity(model.cfg, state[METRICS])


@pytest.mark.parametrize(
    ('layers', 'expected'),
    [
        ('', [8, 8, 8, 8]),
        ('ffn.k=4', [4, 4, 4, 4]),
        ('ffn.k=4/8/12/16', [4, 8, 12, 16]),
        ('ffn.k=4/8', [4, 8, 4, 8]),
        ('1-2:ffn.k=5 2-:ffn.k=all', [8, 5, 96, 96]),
        ('0-1:ffn.k=5% global:ffn.k=50%', [5, 48, 8, 48]),
        ('3:ffn.d_ff=48', [8, 8, 8, 4]),  # the share stays
        ('3:ffn.d_ff=48 3:ffn.k=25%', [8, 8, 8, 12]),
        ('local:ffn.kind=gated', [0, 8, 0, 8]),
        ('0:ffn.gate=none 1:ffn.gate=none 1:ffn.topk=exact 1:ffn.groups=4', [11, 12, 8, 8]),  # of 128 neurons
    ],
)
def test_the_words_for_layers(layers, expected):
    cfg = small(**{'model.layers': layers})
    assert of_layers(cfg, 'ffn', 'k') == expected == ks(cfg.model, 'ffn').tolist()


def test_what_follows_from_a_kind():
    cfg = small(**{'model.layers': '0:ffn.kind=gated 1:ffn.kind=topk 2:attention.kind=dense 3:ffn.topk=exact'})
    assert [(f.kind, f.d_ff, f.k, f.r) for f in of_layers(cfg, 'ffn')] == [
        ('gated', 64, 0, 0), ('topk', 96, 8, 0), ('spark', 96, 8, 16), ('spark', 96, 8, 16),
    ]  # fmt: skip
    assert [(a.kind, a.k, a.r) for a in of_layers(cfg, 'attention')][1:3] == [('spark', 4, 4), ('dense', 0, 0)]
    assert [f.topk for f in of_layers(cfg, 'ffn')][2:] == ['statistical', 'exact']
    dense = small('dense', **{'model.layers': 'global:ffn.kind=spark global:ffn.k=9 global:ffn.r=16'})
    assert [(f.kind, f.d_ff, f.k) for f in of_layers(dense, 'ffn')][:2] == [('gated', 64, 0), ('spark', 96, 9)]


def test_what_a_layers_kind_does_not_read_has_its_default_there():
    levers = {'ffn.groups': 4, 'ffn.ddof': 0, 'ffn.gate': 'sigmoid', 'ffn.huber': 0.1, 'ffn.k_schedule': 'all:3'}
    levers |= {'attention.ddof': 0, 'attention.cap_first': True, 'attention.gate': 'sigmoid', 'attention.k_schedule': '16:3'}
    words = '0:ffn.kind=relu 0:attention.kind=dense 1:ffn.kind=spark_low_rank 1:attention.kind=spark_low_rank 2:ffn.r=10'
    words += ' 2:ffn.kind=spark_projected 3:ffn.topk=exact 3:attention.kind=topk'
    cfg = small(**{f'model.{name}': value for name, value in levers.items()}, **{'model.layers': words})
    changed = lambda x: {name for name, field in type(x).model_fields.items() if getattr(x, name) != field.default}
    named = lambda layer: {f'{half}.{name}' for half in ('ffn', 'attention') for name in changed(getattr(layer, half))}
    read = [named(layer) & set(levers) for layer in cfg.model.per_layer]
    attention, gates = {f'attention.{name}' for name in ('ddof', 'cap_first', 'k_schedule')}, {'ffn.gate', 'attention.gate'}
    assert read == [
        set(), set(levers) - gates, set(levers), attention | {'ffn.groups', 'ffn.gate'},
    ]  # fmt: skip
    assert [x.ffn.d_ff for x in cfg.model.per_layer] == [96, 96, 92, 96]  # 91 is no multiple of 4
    twin = flops.dense_twin(cfg.model)
    assert not twin.ffn.k_schedule and not twin.attention.k_schedule and not twin.attention.cap_first
    assert abs(flops.parameters(twin) / flops.parameters(cfg.model) - 1) < 0.01
    _, params = model_and_params(cfg)
    assert flops.parameters(cfg.model) == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ('layers', 'message'),
    [
        ('ffn.k', "'ffn.k': want LAYERS:HALF.FIELD=VALUE"),
        ('0-9:ffn.k=3', "'0-9:ffn.k=3': 1 values for 0 of the 4 layers"),
        ('ffn.k=3/4/5', "'ffn.k=3/4/5': 3 values for 4 of the 4 layers: want as many, or a divisor of it"),
        ('ffn.kk=3', 'in layer 0 ffn.kk: want one of kind, d_ff, k, '),
        ('1:attention.window=3', 'in layer 1 attention.window: want one of kind, k, r'),
        ('1:ffn.k_schedule=3', 'in layer 1 ffn.k_schedule: want one of kind, '),
        ('ffn.k=many', "in layer 0 ffn.k = 'many': want a number, 'all' or a share of the neurons such as 8%"),
        ('ffn.k=0%', "in layer 0 ffn.k = '0%': want a number, 'all' or a share of the neurons such as 8%"),
        ('attention.k=5%', "in layer 0 attention.k = '5%': want a number, 'all'"),
        ('2:ffn.k=97', "in layer 2 ffn.k = 97: want 1 … d_ff = 96 for kind 'spark'"),
        ('2:ffn.kind=sparse', "in layer 2 ffn.kind = 'sparse': want 'gated'"),
        ('2:ffn.huber=-1', 'in layer 2 ffn.huber = -1.0: want greater than or equal to 0'),
    ],
)
def test_a_wrong_word_is_told_in_one_line(layers, message):
    with pytest.raises(ConfigError) as e:
        small(**{'model.layers': layers})
    assert str(e.value).startswith(f'model.layers = {layers!r}: {message}') and '\n' not in str(e.value)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'model.ffn.k_schedule': 'dense:3'}, "model.ffn.k_schedule = 'dense:3': want 'START:STEPS'"),
        ({'model.ffn.k_schedule': 'all:3', 'model.ffn.topk': 'exact'}, "model.ffn.k_schedule = 'all:3': want ''"),
        *(
            ({'model.ffn.k_schedule': text}, f"model.ffn.k_schedule = '{text}': want 'START:STEPS'")
            for text in ('1000:3 linear:4', '3000000000:3 linear:4', '4:3 linear:4', 'all:3000000000', 'all:3 linear:3000000')
        ),
        *(
            ({'model.attention.k_schedule': text}, f"model.attention.k_schedule = '{text}': want 'all:STEPS'")
            for text in ('3000000000:3 linear:4', '3:2', 'all:3000000000')
        ),
        ({'model.ffn.k_schedule': 'all:8 linear:4'}, "model.ffn.k_schedule = 'all:8 linear:4': want an end by train.steps = 10"),
        ({'model.attention.k_schedule': 'all:10'}, "model.attention.k_schedule = 'all:10': want an end by train.steps = 10"),
        (GROUPS | {'model.layers': '1:ffn.k=3'}, "model.layers = '1:ffn.k=3': in layer 1 ffn.k = 3: want at least groups = 4"),
        ({'model.ffn.k_schedule': 'all:3', 'train.evals': ('a statistics=1',)}, "train.evals = ('a statistics=1',): want no"),
        ({'model.attention.k_schedule': 'all:3 linear:4'}, "model.attention.k_schedule = 'all:3 linear:4': want 'all:STEPS'"),
        ({'model.layers': 'ffn.r=32'}, "model.layers = 'ffn.r=32': want ffn.r of at most d_model − 1 = 31"),
    ],
)
def test_other_wrong_values(fields, message):
    with pytest.raises(ConfigError) as e:
        small(**fields)
    assert str(e.value).startswith(message), e.value


def test_every_layer_divides_over_the_mesh():
    cfg = small(**{'model.layers': '3:ffn.r=15', 'mesh.fsdp': 2})
    with pytest.raises(ConfigError, match=r"^model\.layers = '3:ffn\.r=15': want model\.ffn\.r in all layers a multiple of mesh"):
        check_devices(cfg, 2)


def test_equal_k_in_words_is_the_same_program():
    """A uniform model is one scan, with the parameters that it always had."""
    cfg = small().model
    model, params = model_and_params(small())
    words = Transformer(small(**{'model.layers': 'ffn.k=8/8/8/8 attention.k=4'}).model)
    assert params['params'].keys() == {'embedding', 'final_norm', 'groups'} and [r.name for r in runs(cfg)] == ['groups']
    rows = random_rows(small())
    program = lambda model: jax.jit(model.apply).lower(params, *rows).as_text()
    assert program(model) == program(words)


def test_k_by_layer_is_an_array_in_one_scan():
    """Each layer keeps about its own k. The same parameters, unrolled into models of one k, give the same hidden states."""
    ffn, attention = [4, 96, 24, 12], [2, 40, 3, 8]
    words = f'ffn.k={"/".join(map(str, ffn))} attention.k={"/".join(map(str, attention))}'
    cfg = small(**{'model.layers': words})
    model, (_, params), rows = Transformer(cfg.model), model_and_params(small()), random_rows(cfg, batch=4, length=32)
    assert len(runs(cfg.model)) == 1 and all(all(v.values()) for v in runs(cfg.model)[0].varies)
    _, counts = run(model, params, rows)
    active, attended = (np.asarray(counts[name]).mean(axis=(1, 2)) for name in ('active', 'attended'))
    np.testing.assert_allclose(active, ffn, rtol=0.25)
    assert active[1] == 96 and attended[1] == np.arange(1, 33).mean()  # dense, exactly
    assert attended[3] > attended[2] and attended[1] > attended[3]
    static = Transformer(small(**{'model.layers': words, **ONE_GROUP}).model)
    assert not any(any(v.values()) for v in runs(static.cfg)[0].varies)
    expected, of_static = run(static, own_groups(params), rows)
    np.testing.assert_allclose(run(model, params, rows)[0], expected, atol=1e-4)
    for name in counts:
        np.testing.assert_array_equal(counts[name], of_static[name])
    loss = lambda model: lambda p: jnp.sum(model.apply(p, *rows) ** 3)
    gradients = jax.jit(jax.grad(loss(model)))(params)['params']
    other = jax.jit(jax.grad(loss(static)))(own_groups(params))['params']
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))
    error = jnp.linalg.norm(gradients['embedding'] - other['embedding']) / jnp.linalg.norm(other['embedding'])
    assert error < 1e-4


@pytest.mark.parametrize('fields', [{'model.ffn.huber': 0.3}, {'model.ffn.shrink': False}], ids=['huber', 'hard'])
def test_a_k_that_keeps_all_is_dense_and_has_finite_gradients(fields):
    """A row of equal scores, too."""
    cfg = small(**fields, **{'model.layers': '2-:ffn.k=all'})
    model, (_, params), rows = Transformer(cfg.model), model_and_params(small()), random_rows(cfg)
    params = jax.tree.map(lambda x: x, params)
    params['params']['groups']['ffn_0']['K1'] = params['params']['groups']['ffn_0']['K1'].at[1].set(0)
    _, counts = run(model, params, rows)
    assert (counts['active'][3] == 96).all()
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, *rows) ** 2)))(params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_compiling_does_not_depend_on_depth_where_only_k_differs():
    def lines(n):
        cfg = small(**{'model.n_layers': n, 'model.layers': f'ffn.k={"/".join(str(4 + i) for i in range(n))}'})
        model, rows = Transformer(cfg.model), random_rows(cfg)
        params = jax.eval_shape(model.init, jax.random.key(0), *rows)
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, *rows)))).lower(params).as_text().count('\n')

    assert lines(4) == lines(26)


def test_other_kinds_are_other_scans():
    cfg = small(**{'model.n_layers': 8, 'model.layers': '0:ffn.kind=gated 6-:attention.kind=dense 6-:attention.qk_norm=true'})
    found = [(r.name, r.first, r.length) for r in runs(cfg.model)]
    assert found == [('groups_0', 0, 1), ('groups_1', 2, 2), ('groups_2', 6, 1)]
    assert [(place(cfg.model, i)[0].name, *place(cfg.model, i)[1:]) for i in (0, 3, 5, 7)] == [
        ('groups_0', 0, 0), ('groups_1', 0, 1), ('groups_1', 1, 1), ('groups_2', 0, 1),
    ]  # fmt: skip
    _, params = model_and_params(cfg)
    assert params['params']['groups_0']['ffn_0']['K1'].shape == (1, 32, 64)
    assert params['params']['groups_1']['ffn_0']['K1'].shape == (2, 16, 96)
    assert flops.parameters(cfg.model) == sum(x.size for x in jax.tree.leaves(params))
    _, counts = run(Transformer(cfg.model), params, random_rows(cfg))
    assert counts['active'].shape[0] == 8 and (counts['active'][0] == 64).all() and (counts['active'][1:] < 60).all()
    assert (counts['attended'][7] > counts['attended'][5])[:, -1].all()


def test_flops_are_those_of_each_layer():
    cfg = small(**{'model.layers': '0-2:ffn.k=4/8/12 3:ffn.kind=gated 2:attention.kind=dense'}).model
    parts = flops.flops_per_token(cfg, 20)
    assert parts['ffn.V'] == 2 * 32 * (4 + 8 + 12 + 64) and parts['ffn.predictor'] == 2 * (3 * 16 * 96 + 32 * 64)
    assert parts['attention.V'] == 2 * 32 * (4 + 4 + 7 + 4)
    twin = flops.dense_twin(cfg)
    assert abs(flops.parameters(twin) / flops.parameters(cfg) - 1) < 0.01 and {x.ffn.kind for x in twin.per_layer} == {'gated'}
    for fields in ({'model.ffn.gate': 'none'}, {'model.layers': '0:ffn.gate=none'}):
        cfg = small(**fields).model
        assert abs(flops.parameters(flops.dense_twin(cfg)) / flops.parameters(cfg) - 1) < 0.01


def test_k_by_step():
    cfg = small(**SCHEDULE, **{'model.layers': '0:ffn.k=24 1:ffn.kind=gated'}).model
    by_step = [ks(cfg, 'ffn', step).tolist() for step in range(9)]
    assert by_step[0] == by_step[1] == by_step[3] == [96, 0, 96, 96] and by_step[4:6] == [[42, 0, 38, 38], [36, 0, 28, 28]]
    assert by_step[7] == by_step[8] == [24, 0, 8, 8]
    assert [ks(cfg, 'attention', step)[0] for step in (0, 2, 3, 5, 8, 100)] == [16, 16, 15, 10, 4, 4]
    traced = jax.jit(lambda step: ks(cfg, 'ffn', step))
    for step in range(9):
        assert traced(jnp.int32(step)).tolist() == by_step[step] == [x.ffn.k for x in at_step(cfg, step).per_layer]
    assert not at_step(cfg, 5).ffn.k_schedule and [r[:3] for r in runs(at_step(cfg, 5))] == [r[:3] for r in runs(cfg)]
    # A long fall goes down by stairs, exact in int32.
    long = small(**{'model.ffn.k_schedule': 'all:0 linear:2000000', 'train.steps': 2000000}).model
    assert [int(jax.jit(lambda step: ks(long, 'ffn', step))(jnp.int32(n))[0]) for n in (0, 10**6, 2 * 10**6)] == [96, 28, 8]


@pytest.mark.parametrize('form', ['linear', 'cosine'])
def test_a_fall_from_all_neurons_has_no_cliff(form):
    """Soft thresholds close below all of them lie far under the scores, and would add that to each."""
    cfg = small(**{'model.ffn.k_schedule': f'all:2 {form}:1000', 'train.steps': 2000}).model
    x, y = (jax.random.normal(jax.random.key(i), (2000, 96)) for i in (0, 1))
    dense = (jax.nn.gelu(x) * y).ravel()
    for step in (1, 2, 3, 4, 50):
        now = (activations(cfg.ffn, x, k=jnp.float32(ks(cfg, 'ffn', step)[0]))[0] * y).ravel()
        assert jnp.dot(now, dense) / jnp.linalg.norm(now) / jnp.linalg.norm(dense) > 0.98, step
    # What is asked for above half of the neurons stays: k itself, and a START that is a number.
    above = small(**{'model.ffn.k_schedule': 'all:2 linear:4', 'model.ffn.k': 90}).model
    assert [int(ks(above, 'ffn', step)[0]) for step in (2, 3, 6)] == [96, 90, 90]
    number = small(**{'model.ffn.k_schedule': '80:2 linear:4'}).model
    assert [int(ks(number, 'ffn', step)[0]) for step in (2, 3, 6)] == [80, 62, 8]


def test_a_layer_that_keeps_more_than_start_stays_as_it_is():
    """And one with fewer neurons than START begins with all of them."""
    words = 'ffn.k=8/32/all/8 3:ffn.d_ff=12 attention.k=4/20/all/4'
    cfg = small(**{'model.ffn.k_schedule': '16:2 linear:6', 'model.attention.k_schedule': '16:2 linear:6', 'model.layers': words})
    for half in ('ffn', 'attention'):
        start, end = (ks(cfg.model, half, step).tolist() for step in (1, 8))
        falls = np.array([ks(cfg.model, half, step) for step in range(10)])
        assert (np.diff(falls.astype(np.int64), axis=0) <= 0).all() and start[1:3] == end[1:3]
    assert ks(cfg.model, 'ffn', 1).tolist() == [16, 32, 96, 12] and ks(cfg.model, 'ffn', 8).tolist() == [8, 32, 96, 8]
    assert [x.ffn.k for x in at_step(cfg.model, 1).per_layer] == [16, 32, 96, 12]
    assert len(runs(small(**{'model.ffn.k_schedule': '16:2 linear:6', 'model.layers': 'ffn.k=8/8/32/all'}).model)) == 1


def test_a_scheduled_model_asks_for_the_step():
    cfg = small(**SCHEDULE)
    model, (_, params), rows = Transformer(cfg.model), model_and_params(small()), random_rows(cfg)
    with pytest.raises(ValueError, match=r"model.ffn.k_schedule = 'all:3 linear:4': k depends on the step, which is missing"):
        model.apply(params, *rows)
    assert with_step(small().model, params, 3) is params
    for step in (1, 5, 9):
        hidden, counts = run(model, with_step(cfg.model, params, jnp.int32(step)), rows)
        expected, of_static = run(Transformer(at_step(cfg.model, step)), params, rows)
        np.testing.assert_allclose(hidden, expected, atol=1e-4)
        np.testing.assert_array_equal(counts['active'], of_static['active'])
    assert model_and_params(cfg)[1].keys() == {'params'} != {STEP}


@pytest.mark.parametrize(
    'fields',
    [
        {'model.ffn.groups': 4, 'model.ffn.gate': 'none', 'model.ffn.ddof': 0},
        {'model.ffn.kind': 'spark_projected', 'model.ffn.shrink': False, 'model.attention.gate': 'sigmoid'},
        {'model.ffn.kind': 'spark_low_rank', 'model.ffn.groups': 2, 'model.attention.kind': 'spark_low_rank'},
        {'model.attention.cap_first': True, 'model.attention.logit_cap': 2.0},
    ],
    ids=['groups', 'projected', 'low_rank', 'cap_first'],
)
def test_every_statistical_lookup_takes_k_by_layer_and_step(fields):
    words = '2-:ffn.k=12/24 attention.k=3/4/5/6'
    cfg = small(**fields, **SCHEDULE, **{'model.layers': words})
    static = small(**fields, **SCHEDULE, **ONE_GROUP, **{'model.layers': words}).model
    assert all(all(v.values()) for v in runs(cfg.model)[0].varies)
    (_, params), rows = model_and_params(cfg), random_rows(cfg)
    for step in (3, 6, 9):
        one = at_step(static, step)
        assert not any(any(v.values()) for v in runs(one)[0].varies)
        hidden, counts = run(Transformer(cfg.model), with_step(cfg.model, params, jnp.int32(step)), rows)
        expected, of_static = run(Transformer(one), own_groups(params), rows)
        np.testing.assert_allclose(hidden, expected, atol=1e-4)
        for name in counts:
            np.testing.assert_array_equal(counts[name], of_static[name])


@pytest.mark.parametrize('impl', [{'model.ffn.impl': 'sparse'}, {'model.ffn.impl': 'pallas'}, {'model.attention.impl': 'sparse'}])
def test_kernels_that_take_one_k_decline(impl):
    cfg = small(**impl, **{'model.layers': 'ffn.k=4/4/8/8 attention.k=3/3/4/4'})
    _, params = model_and_params(small())
    with pytest.raises(ConfigError, match=r"model\.\w+\.impl = '\w+': want 'auto'.* one k"):
        Transformer(cfg.model).apply(params, *random_rows(cfg))


@pytest.mark.parametrize('impl', ['blockwise', 'pallas'])
def test_attention_in_blocks_takes_k_as_an_array(impl):
    words = {'model.layers': 'attention.k=2/3/6/12'}
    full, blocks = (small(**words, **{'model.attention.impl': name}) for name in ('full', impl))
    blocks = blocks.model.model_copy(update={'attention': blocks.model.attention.model_copy(update={'block': 128})})
    _, params = model_and_params(small())
    rows = random_rows(full, length=128)
    (expected, counts), (hidden, found) = (run(Transformer(cfg), params, rows) for cfg in (full.model, blocks))
    np.testing.assert_allclose(hidden, expected, atol=1e-3)
    np.testing.assert_array_equal(found['attended'], counts['attended'])


@pytest.mark.slow
def test_statistics_are_held_against_each_layers_own_k(trained):
    """As of a model in which all layers are like that one: the layers before it see other inputs, so only layer 0 is the same."""
    workdir, _ = trained('spark')
    model = evaluate.load(workdir)
    words = {'layers': 'ffn.k=8/4/16/96 attention.k=4/3/9/9 3:ffn.kind=spark'}
    cfg = model.cfg.model_copy(update={'model': model.cfg.model.model_copy(update=words)})
    mixed = model._replace(cfg=cfg, trainer=Trainer(cfg, list(model.trainer.mesh.devices.flat)))
    one, other = (evaluate.evaluate(m, 'test')[0] for m in (model, mixed))
    a, b = one['layers'][0], other['layers'][0]
    assert all(b[name] == pytest.approx(a[name], rel=1e-4) for name in ('active_mean', 'calibration', 'recall', 'attended_long'))
    layers = other['layers']
    assert layers[3]['active_mean'] == layers[3]['contribution_kept'] == 1 and layers[3]['union']['2'] == 1
    assert layers[1]['active_mean'] < layers[0]['active_mean'] < layers[2]['active_mean']
    assert layers[2]['contribution_best'] > layers[0]['contribution_best'] > layers[1]['contribution_best']
