"""A run directory is all that evaluation needs; it gives the loss of training's own evaluation, from one compiled step."""

import json

import jax
import numpy as np
import pytest

from spark.data.documents import split_of
from spark.errors import CheckpointError, ConfigError, DataError
from spark.evaluation import calibrate, evaluate, neurons, plots, predictor, sparsity, strips, tables
from spark.nn.runs import runs
from spark.training.step import Trainer
from tests.helpers import BOTH, corpus, model_and_params, small
from tests.training.test_step import random_batch


@pytest.fixture(scope='module')
def evaluated(run):
    workdir, _ = run
    model = evaluate.load(workdir)
    return model, *evaluate.evaluate(model, 'test')


def documents_of(workdir, split):
    """How many documents of the run's corpus are in a split."""
    holdout = json.loads((workdir / 'config.json').read_text())['data']['holdout']
    return [split_of(path.read_text(), holdout) for path in workdir.parent.glob('*.txt')].count(split)


@BOTH
def test_the_loss_is_that_of_training(run, evaluated):
    workdir, summary = run
    _, report, sums = evaluated
    for name in ('loss', 'perplexity', 'bits_per_byte', 'attended'):
        assert report[name] == pytest.approx(summary['test'][name], rel=1e-5)
    assert report['tokens'] == summary['test']['tokens'] == sums['positions'].sum()
    assert report['tokens'] % 256, 'a partial batch is wanted here'
    assert ('active' in report) == ('active' in summary['test']) == ('dead' in report['layers'][0])
    assert report.get('active', 0) == pytest.approx(summary['test'].get('active', 0), rel=1e-5)
    assert report['documents'] == documents_of(workdir, 'test')


def test_an_older_step_another_split_and_other_text(run, evaluated, tmp_path):
    workdir, _ = run
    _, newest, _ = evaluated
    older, _ = evaluate.evaluate(evaluate.load(workdir, step=5), 'test')
    assert older['step'] == 5 and older['loss'] > newest['loss']
    assert older['tokens'] == newest['tokens']
    validation, _ = evaluate.evaluate(evaluate.load(workdir), 'train')
    assert validation['documents'] == documents_of(workdir, 'train')
    (tmp_path / 'other.txt').write_text('spark sparse ' * 20)
    other, _ = evaluate.evaluate(evaluate.load(workdir, source=f'text:{tmp_path}/other.txt'), 'test')
    assert other['documents'] == 1 and other['bytes'] == 260 and other['tokens'] == 261


def test_rows_at_a_time_change_nothing_and_one_step_is_compiled(run, evaluated, caplog):
    workdir, _ = run
    _, report, _ = evaluated
    with jax.log_compiles(), caplog.at_level('WARNING'):
        other, _ = evaluate.evaluate(evaluate.load(workdir, batch_size=8), 'train')
    assert sum('Finished XLA compilation of jit(step)' in r.message for r in caplog.records) == 1 and other['tokens'] > 2000
    assert evaluate.evaluate(evaluate.load(workdir, batch_size=24), 'test')[0]['loss'] == pytest.approx(report['loss'], rel=1e-6)


def test_nothing_is_compiled_where_a_compiled_step_is_given(run, caplog):
    model = evaluate.load(run[0])
    with model.trainer.context():
        compiled = evaluate.step_for(model.trainer, model.tokenizer.eos)
        batches = [next(iter(evaluate.rows.EvalBatches(model.cfg.data, 'test', model.trainer.local_rows)))] * 2
        again = lambda: evaluate.accumulate(model.trainer, model.params, model.tokenizer.eos, batches, compiled=compiled)
        first = again()
        with jax.log_compiles(), caplog.at_level('WARNING'):
            assert again()['tokens'] == first['tokens']
    assert not [r.message for r in caplog.records if 'ompil' in r.message]


def test_sums_outlive_the_int32_they_are_made_in(run, monkeypatch):
    workdir, _ = run
    model = evaluate.load(workdir)
    whole, _ = evaluate.evaluate(model, 'train')
    monkeypatch.setattr(evaluate, 'FETCH_EVERY', 2)
    drained, sums = evaluate.evaluate(model, 'train')
    assert sums['attended'].dtype == np.int64
    for a, b in zip(drained['layers'], whole['layers'], strict=True):
        for name in ('span', 'union', 'union_rows'):
            x, y = a.pop(name), b.pop(name)
            assert x == (y if name == 'span' else pytest.approx(y, rel=1e-6))
        assert a == pytest.approx(b, rel=1e-6)
    assert drained['loss'] == pytest.approx(whole['loss'], rel=1e-6)


@BOTH
def test_flops_follow_what_was_measured(evaluated):
    model, report, _ = evaluated
    cfg = model.cfg.model
    found = evaluate.flops_report(cfg, 32, report['layers'])
    for phase in ('prefill', 'decode'):
        dense, configured, measured = (found[phase][way] for way in ('dense', 'configured', 'measured'))
        assert measured['head'] == dense['head'] and measured['projections'] == dense['projections']
        if cfg.ffn.kind == 'gated':
            assert dense == configured == measured
        else:
            neurons = sum(layer['active_mean'] for layer in report['layers']) * cfg.ffn.d_ff
            assert measured['ffn.V'] == pytest.approx(2 * cfg.d_model * neurons)
            assert measured['body'] < dense['body'] and configured['body'] == pytest.approx(measured['body'], rel=0.05)
    if cfg.attention.kind == 'spark':
        keys = sum(layer['attended_long'] for layer in report['layers'])
        assert found['decode']['measured']['attention.V'] == pytest.approx(2 * 4 * 8 * keys)
        short = evaluate.flops_report(cfg, 3, report['layers'])['decode']
        assert short['measured']['attention.V'] == 4 * 2 * 4 * 8 * 3
    json.dumps(found)


def temporaries(f, trainer, *more):
    """Bytes that a function of parameters and a batch needs beside its arguments."""
    with trainer.context():
        compiled = jax.jit(f).lower(trainer.abstract_state.params, trainer.abstract_batch(), *more).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_losses_cost_a_forward_pass(monkeypatch):
    """Rows twice as long take at most about twice the memory, not four times; one layer's activations are one layer's."""
    monkeypatch.setattr(strips, 'STRIP', 1 << 16)
    found = {}
    for L in (1024, 2048):
        # As on accelerators: the CPU kernels for training need less memory than the logits.
        dense_work = {'model.ffn.impl': 'masked', 'model.attention.impl': 'blockwise', 'model.attention.block': 64}
        trainer = Trainer(small(**{'data.seq_len': L, 'data.batch_size': 4, **dense_work}), jax.devices()[:1])
        steps = {statistics: evaluate.step_for(trainer, 0, statistics) for statistics in (True, False)}
        found[L] = {statistics: temporaries(step, trainer, sums) for statistics, (step, sums) in steps.items()}
        assert found[L][False] < 1.05 * temporaries(trainer.eval_step, trainer)
        assert found[L][True] < 1.2 * found[L][False]
    assert found[2048][True] < 2.2 * found[1024][True]

    kept = {}
    for n_layers in (4, 32):
        trainer = Trainer(small(**{'model.n_layers': n_layers, 'data.batch_size': 64}), jax.devices()[:1])
        kept[n_layers] = temporaries(lambda p, b, t=trainer: neurons.activations(t.model, p, b, 2), trainer)
    assert kept[32] < 1.5 * kept[4]


def test_loss_and_keys_by_position_in_rows_longer_than_in_training(run):
    workdir, _ = run
    model = evaluate.load(workdir, length=128)
    assert (model.cfg.data.seq_len, model.cfg.data.batch_size) == (128, 8)  # 2 rows, for 8 devices
    report, sums = evaluate.evaluate(model, 'test')
    pieces = report['by_position']
    assert [piece['from'] for piece in pieces] == list(range(0, 128, 8)) and pieces[-1]['to'] == 128
    assert sum(piece['tokens'] for piece in pieces) == report['tokens'] == sums['positions'].sum()
    assert sum(piece['tokens'] * piece['loss'] for piece in pieces) == pytest.approx(report['tokens'] * report['loss'], rel=1e-5)
    for i, layer in enumerate(report['layers']):
        mean = sum(piece['tokens'] * piece['attended_mean'][i] for piece in pieces) / report['tokens']
        assert mean == pytest.approx(layer['attended_mean'], rel=1e-6)
        assert max(piece['attended_max'][i] for piece in pieces) == layer['attended_max']
    assert pieces[0]['attended_max'][0] <= 8  # the first eight tokens see no more
    alone, _ = evaluate.evaluate(model, 'test', statistics=False)
    assert [piece['loss'] for piece in alone['by_position']] == pytest.approx([piece['loss'] for piece in pieces], rel=1e-5)


def test_a_fitted_predictor_is_compared_on_other_text(run, evaluated):
    _, report, _ = evaluated
    model = evaluate.load(run[0])
    found, _ = evaluate.evaluate(model, 'test', fit=True)
    for layer, plain in zip(found['layers'], report['layers'], strict=True):
        assert layer['recall'] == pytest.approx(plain['recall'], rel=1e-3)
        assert layer['active_mean'] < layer['recall_constant'] < layer['recall_fitted'] <= layer['calibration']
        kept = [layer[f'contribution_{which}'] for which in ('kept_constant', 'kept_fitted', 'best')]
        assert layer['active_mean'] < kept[0] < kept[1] < kept[2]
    assert '| fitted |' in tables.tables(found) and '| fitted |' not in tables.tables(report)
    validation, _ = evaluate.evaluate(model, 'validation', statistics=False)
    assert (found['fit_tokens'], found['fit_text'], found['tokens']) == (validation['tokens'], 'validation', report['tokens'])
    few = f'fitted to {validation["tokens"]:,} tokens of validation: fewer than the 3,200 wanted'
    assert few in tables.tables(found) and 'fewer than' not in tables.tables(found | {'fit_tokens': 3200})


def test_a_predictor_is_never_fitted_to_the_text_that_it_is_measured_on(run, tmp_path, monkeypatch):
    """Text that has one split serves both: every other row for each, and no row twice."""
    words = np.random.default_rng(1).choice(['spark', 'sparse', 'top', 'key'], 600)
    (tmp_path / 'other.txt').write_text(' '.join(words))
    model = evaluate.load(run[0], source=f'text:{tmp_path}/other.txt')
    rows_seen, fitted = [], evaluate.predictor.fitted

    def spy(trainer, params, batches, *rest):
        real = lambda batches: [tuple(x[on]) for b in batches for x, on in zip(b['tokens'], b['segments'] > 0, strict=True)]
        rows_seen.extend(row for row in real(batches) if row)
        return fitted(trainer, params, batches, *rest)

    monkeypatch.setattr(evaluate.predictor, 'fitted', spy)
    whole, _ = evaluate.evaluate(model, 'test', statistics=False)
    found, _ = evaluate.evaluate(model, 'test', fit=True)
    assert found['fit_tokens'] == sum(map(len, rows_seen)) > 0 and found['fit_tokens'] + found['tokens'] == whole['tokens']
    rest, _ = evaluate.evaluate(model, 'test', statistics=False, fit=True)
    _, own, _ = evaluate.with_fitted(model, 'test')
    measured = [tuple(row[on]) for b in own for row, on in zip(b['tokens'], b['segments'] > 0, strict=True) if on.any()]
    assert not set(measured) & set(rows_seen) and found['loss'] == pytest.approx(rest['loss'], rel=1e-6)
    assert 'every other row of test, which is not evaluated' in tables.tables(found)
    (tmp_path / 'other.txt').write_text('a single row')
    with pytest.raises(ConfigError, match='no row is left to fit to; want more text, or a smaller --length'):
        evaluate.evaluate(evaluate.load(run[0], source=f'text:{tmp_path}/other.txt', length=64), 'test', fit=True)


def test_layers_may_be_fitted_a_few_at_a_time(run, monkeypatch, capsys):
    """On eight devices and with sums of one group of layers in memory, the predictors are those of a single pass."""
    model, found = evaluate.load(run[0]), {}
    for sums in (1 << 30, 1):
        monkeypatch.setattr(evaluate.predictor, 'SUMS', sums)
        params, _, fit = evaluate.with_fitted(model, 'test')
        layers = [params['params']['groups'][f'ffn_{i}']['fitted'] for i in range(2)]
        found[sums] = [(x['mean'], x['constant'], x['down'] @ x['up']) for x in layers]
        assert fit['fit_tokens'] > 0 and found[sums][0][2].shape == (2, 32, 96)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found[1], found[1 << 30])
    out = capsys.readouterr().out
    assert 'Fitting predictors: 1 × up to ' in out and 'Fitting predictors: 2 × up to ' in out
    (whole,) = runs(model.cfg.model)
    step, sums = predictor.adder(model.trainer, whole), jax.eval_shape(lambda: predictor.zeros(model.trainer, whole, 1))
    with model.trainer.context():
        compiled = step.lower(model.params, model.trainer.abstract_batch(), np.int32(0), sums).compile()
    size = sum(x.size * 4 for x in jax.tree.leaves(sums))
    assert compiled.memory_analysis().alias_size_in_bytes >= size  # the sums are updated in place


def test_layers_of_different_kinds_are_fitted_each_by_itself():
    """The first layers see the same inputs as in a model whose layers are all like them."""

    class Batches:  # each pass begins anew, and is closed
        def __iter__(self):
            yield random_batch(small(), 0)

    found, alike = [], model_and_params(small())[1]['params']
    for words in ('', '2-:ffn.kind=spark_low_rank 2-:ffn.d_ff=64'):
        cfg = small(**{'model.layers': words})
        trainer, own = Trainer(cfg, jax.devices()[:1]), model_and_params(cfg)[1]['params']
        name = runs(cfg.model)[0].name
        first = jax.tree.map(lambda x, y: x[: len(y)], alike['groups'], own[name])
        params = {'params': own | {'embedding': alike['embedding'], name: first}}
        with trainer.context():
            fitted, tokens = predictor.fitted(trainer, params, Batches())
        found.append([fitted['params'][run.name]['ffn_1']['fitted'] for run in runs(cfg.model)])
        assert tokens > 0
    values = lambda x: (x['mean'][:1], x['constant'][:1], (x['down'] @ x['up'])[:1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), values(found[0][0]), values(found[1][0]))
    assert [x['up'].shape for x in found[1]] == [(1, 16, 96), (1, 16, 64)]


def test_a_dense_model_has_no_predictor_to_compare(trained):
    with pytest.raises(ConfigError, match=r"model\.ffn\.kind = 'gated': want a kind with a predictor"):
        evaluate.evaluate(evaluate.load(trained('dense')[0]), 'test', fit=True)


def test_k_is_found_at_which_a_share_of_the_neurons_is_active(run, trained):
    model = evaluate.load(run[0])
    found, active = evaluate.with_k(model, 0.2)
    report, _ = evaluate.evaluate(found, 'validation')
    assert active == pytest.approx(0.2, abs=0.01) and active != 0.2
    assert report['active'] == pytest.approx(0.2, abs=0.01) and found.cfg.model.ffn.k > 8 == model.cfg.model.ffn.k
    with pytest.raises(ConfigError, match=r'a share of 0\.001 of the neurons: want'):
        evaluate.with_k(model, 0.001)
    with pytest.raises(ConfigError, match="kind 'gated': want a statistical top-k"):
        evaluate.with_k(evaluate.load(trained('dense')[0]), 0.1)


def test_losses_alone_are_the_same_losses(evaluated):
    model, report, _ = evaluated
    losses, _ = evaluate.evaluate(model, 'test', statistics=False)
    assert losses.keys() == report.keys() - {'active', 'attended', 'layers', 'flops'}
    assert losses['loss'] == pytest.approx(report['loss'], rel=1e-6) and losses['documents'] == report['documents']
    assert losses['without_ends'] == pytest.approx(report['without_ends'], rel=1e-6)
    assert tables.tables(report).startswith(tables.tables(losses).splitlines()[0])


def test_the_last_evaluation_is_announced_and_bounded(tmp_path, capsys):
    from spark.training.run import train

    summary, trainer, _ = train(small(**corpus(tmp_path), **{'train.final_eval': 1, 'train.steps': 5}), tmp_path / 'run')
    assert 'Evaluating the test split: 1 batches' in capsys.readouterr().out
    assert 0 < summary['test']['tokens'] <= trainer.cfg.data.batch_size * trainer.cfg.data.seq_len
    assert summary['test']['gzip_bits_per_byte'] is None  # of the whole split, which was not evaluated


def test_plots_are_pictures_of_every_layer(evaluated, tmp_path):
    model, report, sums = evaluated
    paths = plots.draw(model.cfg.model, report, sums, 1, tmp_path / 'new' / 'place')
    assert [p.name for p in paths] == ['activity.png', 'scores_1.png', 'attended.png']
    assert all(p.read_bytes().startswith(b'\x89PNG') and p.stat().st_size > 10_000 for p in paths)


def test_what_one_checkpoint_lacks_is_drawn_of_the_others(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, 'save', lambda fig, path: figures.append(fig) or path)
    layers = [{'recall': 0.5, 'attention_recall': 0.75}, {'recall': 0.25}]
    first = [{'active_mean': 0.9}, {'recall': 0.75, 'active_mean': 0.1}]
    plots.recall([{'step': 1, 'layers': first}, {'step': 2, 'layers': layers}], '', tmp_path)
    means = [[line.get_ydata() for line in ax.lines if line.get_marker() == 'o'] for ax in figures[0].axes]
    np.testing.assert_allclose(means[0][0], [0.75, 0.375])
    np.testing.assert_allclose(means[2][0], [np.nan, 0.75])
    np.testing.assert_allclose(means[0][1], [0.1, np.nan])  # by chance, of layers that have a recall
    assert not means[1] and figures[0].axes[1].texts[0].get_text() == 'nothing is selected'


@pytest.mark.parametrize(
    ('fields', 'drawn'), [({}, True), ({'shrink': False}, True), ({'topk': 'exact'}, False), ({'groups': 2}, False)]
)
def test_only_a_threshold_by_statistics_is_drawn(fields, drawn, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, 'save', lambda fig, path: figures.append(fig))
    cfg = small(**{f'model.ffn.{name}': value for name, value in fields.items()}).model
    counts = np.ones((cfg.n_layers, len(sparsity.EDGES) - 1))
    plots._scores(cfg, {'ffn_scores': counts, 'attention_scores': counts}, 1, '', tmp_path)
    legend = ' '.join(text.get_text() for text in figures[0].axes[0].get_legend().get_texts())
    assert ('threshold' in legend) == drawn


@pytest.mark.parametrize('groups', [1, 4])
def test_the_smallest_share_is_that_of_one_neuron_in_each_group(groups):
    cfg = small(**{'model.ffn.groups': groups})
    trainer, (_, params) = Trainer(cfg, jax.devices()[:1]), model_and_params(cfg)
    with trainer.context():
        k, found = calibrate.k_measured(trainer, params, jax.device_get(random_batch(cfg)), 1 / 96)
    assert groups <= k <= groups + 2 and found == pytest.approx(k / 96, rel=0.5)


def test_what_is_missing_is_named(run, tmp_path):
    workdir, _ = run
    with pytest.raises(CheckpointError, match=r'no step 4; there are 5, 10'):
        evaluate.load(workdir, step=4)
    with pytest.raises(ConfigError, match=r'want the config\.json of a run'):
        evaluate.load(tmp_path)
    (tmp_path / 'config.json').write_text((workdir / 'config.json').read_text())
    with pytest.raises(CheckpointError, match='no checkpoint yet'):
        evaluate.load(tmp_path)
    assert not (tmp_path / 'checkpoints').exists()
    with pytest.raises(DataError, match='no file matches'):
        evaluate.evaluate(evaluate.load(workdir, source='text:/no/where.txt'), 'test')


def test_a_run_of_many_devices_is_evaluated_on_what_is_here(run):
    workdir, _ = run
    from spark.config import load

    cfg = load(workdir / 'config.json')
    own, devices = evaluate._fit_mesh(cfg, jax.devices())
    assert own == cfg and len(devices) == 8
    mesh = cfg.mesh.model_copy(update={'data': 2, 'fsdp': 16, 'model': 2})
    fitted, devices = evaluate._fit_mesh(cfg.model_copy(update={'mesh': mesh}), jax.devices())
    assert (fitted.mesh.fsdp, fitted.mesh.model, len(devices)) == (8, 1, 8)
    odd, devices = evaluate._fit_mesh(cfg.model_copy(update={'mesh': mesh}), jax.devices()[:5])
    assert len(devices) == 1 and odd.data.batch_size == 8
