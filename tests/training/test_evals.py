"""train.evals: what is evaluated while a run trains, at which steps, and what is refused."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from etils import epath

from spark.config import eval_entries, load
from spark.errors import ConfigError, DataError
from spark.evaluation import evaluate, in_loop
from spark.training.run import train
from spark.training.trackers import MetricsWriter
from tests.helpers import corpus, records, small

OWN = '''
import jax.numpy as jnp

def hits(model, params, batch):
    """How often the likeliest token is the next one, and how often it is the one before."""
    real = batch['segments'] > 0
    hidden = model.apply(params, batch['tokens'], batch['positions'], batch['segments'])
    likeliest = jnp.argmax(model.apply(params, hidden, method='logits'), axis=-1)
    return {'hits': jnp.sum(real & (likeliest == batch['targets'])), 'weight': jnp.sum(real * 0.5)}

def by_layer(model, params, batch):
    return {'hits': jnp.zeros(4)}

def loss(model, params, batch):
    return {'loss': 0.0}

def step(model, params, batch):
    return {'step': jnp.sum(1.0 * (batch['segments'] > 0))}

def ema(model, params, batch):
    return {'ema_hits': 0.0}

def fails(model, params, batch):
    return {'x': batch['labels']}
'''


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A directory whose modules can be imported, with other text in other.txt."""
    place = tmp_path_factory.mktemp('own')
    (place / 'of_ones_own.py').write_text(OWN)
    (place / 'other.txt').write_text('key top 漢字 ' * 40)
    sys.path.insert(0, str(place))
    yield place
    sys.path.remove(str(place))


EVALS = (
    'test every=3 split=test batches=1', 'other source=text:{}/other.txt', 'seen every=5 split=train batches=2',
    'own every=4 metrics=of_ones_own:hits', 'lookups every=5 batches=2 statistics=True',
)  # fmt: skip


@pytest.fixture(scope='module')
def evaluated(place):
    """(overrides, the directory of a run with EVALS and a mean of its parameters, its summary, its last state)."""
    overrides = corpus(place) | {'train.evals': tuple(text.format(place) for text in EVALS), 'optimizer.ema': 0.8}
    overrides |= {'train.accumulate': 2, 'mesh.fsdp': 4, 'mesh.data': 1, 'train.eval_every': 4, 'data.batch_size': 8}
    overrides |= {'mesh.model': 2}
    summary, trainer, state = train(small(**overrides), place / 'run')
    return overrides, place / 'run', summary, trainer, state


def test_each_entry_has_its_own_period_and_name(evaluated):
    """And all are evaluated after the last step."""
    _, workdir, summary, _, _ = evaluated
    seen = {}
    for r in records(workdir):
        seen.setdefault(r['split'], []).append(r['step'])
    assert seen.pop('train') == list(range(1, 11))
    assert seen == {'validation': [4, 8, 10], 'test': [10], 'eval/test': [3, 6, 9, 10], 'eval/other': [10],
                    'eval/seen': [5, 10], 'eval/own': [4, 8, 10], 'eval/lookups': [5, 10]}  # fmt: skip
    found = {(r['step'], r['split']): r for r in records(workdir)}
    assert found[10, 'eval/own']['loss'] == summary['eval/own']['loss'] == found[10, 'validation']['loss']
    assert found[10, 'eval/test']['tokens'] == 8 * 32 < found[10, 'test']['tokens']
    assert found[10, 'eval/seen']['tokens'] == 2 * 8 * 32
    assert found[10, 'eval/other']['bytes'] > 500 and found[10, 'eval/other']['loss'] != found[10, 'validation']['loss']
    board = b''.join(path.read_bytes() for path in (workdir / 'tensorboard').iterdir())
    assert b'eval/own/ema_hits' in board and b'eval/lookups/recall_by_layer/3' in board


def test_the_mean_of_the_parameters_is_evaluated_beside(evaluated):
    _, workdir, _, _, _ = evaluated
    last = {r['split']: r for r in records(workdir) if r['split'] != 'train'}
    for split, name in [('validation', 'loss'), ('eval/other', 'perplexity'), ('eval/own', 'hits'), ('eval/lookups', 'recall')]:
        assert np.isfinite(last[split][f'ema_{name}'])
    assert last['eval/other']['ema_loss'] != last['eval/other']['loss']


def test_a_function_of_ones_own_is_summed_over_all_tokens(evaluated):
    _, workdir, _, trainer, state = evaluated
    import of_ones_own

    hits = jax.jit(lambda params, batch: of_ones_own.hits(trainer.model, params, batch)['hits'])
    with trainer.context():
        data = evaluate.rows.EvalBatches(trainer.cfg.data, 'validation')
        total = sum(int(hits(state.params, trainer.put(batch))) for batch in data)
    last = [r for r in records(workdir) if r['split'] == 'eval/own'][-1]
    assert last['hits'] * last['tokens'] == pytest.approx(total, abs=1.5) and total > 10 and last['weight'] == 0.5


def test_statistics_are_those_of_evaluate(evaluated):
    _, workdir, _, _, _ = evaluated
    last = [r for r in records(workdir) if r['split'] == 'eval/lookups'][-1]
    model = evaluate.load(workdir)
    whole, _ = evaluate.evaluate(model, 'validation')
    assert last['tokens'] == 2 * 8 * 32 < whole['tokens']
    for name in ('active_mean', 'recall', 'attended_p95', 'union_8'):
        assert len(last[f'{name}_by_layer']) == 4 and last[name] == pytest.approx(np.mean(last[f'{name}_by_layer']))
    assert last['recall'] == pytest.approx(np.mean([layer['recall'] for layer in whole['layers']]), abs=0.1)


def test_no_value_takes_the_place_of_the_step_of_a_record(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path), 0)
    writer.write(3, 'eval/x', {'loss': 1.0, 'step': 99.5, 'split': 7.0})
    writer.close()
    assert records(tmp_path) == [{'step': 3, 'split': 'eval/x', 'loss': 1.0}]


def test_a_statistic_is_of_the_layers_that_have_it():
    layers = [{'layer': 0, 'gini': 0.5}, {'layer': 1, 'recall': 0.25, 'gini': 1.5}, {'layer': 2, 'recall': 0.75, 'gini': 1.0}]
    found = in_loop._by_name(layers)
    recall = {'recall': 0.5, 'recall_by_layer/1': 0.25, 'recall_by_layer/2': 0.75}
    assert found == {'gini': 1.0, 'gini_by_layer': [0.5, 1.5, 1.0]} | recall


@pytest.mark.slow
def test_statistics_that_some_layers_lack_are_of_the_others(tmp_path):
    overrides = corpus(tmp_path) | {'model.layers': '0:ffn.kind=gated', 'train.steps': 1, 'optimizer.warmup_steps': 0}
    summary, _, _ = train(small(**overrides, **{'train.evals': ('x statistics=True batches=1',)}), tmp_path / 'run')
    report = summary['eval/x']
    assert len(report['attended_mean_by_layer']) == 4 and 'recall_by_layer' not in report and 'recall_by_layer/0' not in report
    assert report['recall'] == pytest.approx(np.mean([report[f'recall_by_layer/{i}'] for i in (1, 2, 3)]))


class Cut(Exception):
    """In place of a kill."""


AT = [(8, 'eval/own'), *(pytest.param(*at, marks=pytest.mark.slow) for at in [(6, 'train'), (10, 'eval/lookups')])]


@pytest.mark.parametrize(('at', 'split'), AT)
def test_a_resumed_run_is_evaluated_at_the_same_steps(evaluated, tmp_path, monkeypatch, at, split):
    overrides, workdir, _, _, expected = evaluated
    write = MetricsWriter.write

    def cut(self, step, name, values):
        if (step, name) == (at, split):
            raise Cut
        write(self, step, name, values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, 'write', cut)
        with pytest.raises(Cut):
            train(small(**overrides), tmp_path / 'run')
    _, _, state = train(small(**overrides), tmp_path / 'run')
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(expected))
    assert records(tmp_path / 'run') == records(workdir)


@pytest.mark.slow
def test_nothing_is_compiled_twice(evaluated, tmp_path, monkeypatch):
    overrides, _, _, _, _ = evaluated
    made, step_for = [], in_loop.step_for
    monkeypatch.setattr(in_loop, 'step_for', lambda *args: made.append(args) or step_for(*args))
    train(small(**overrides | {'train.evals': ('a every=2 statistics=True batches=1',), 'train.steps': 4}), tmp_path / 'run')
    assert len(made) == 1


def test_entries_may_change_on_resume_and_old_configs_load(evaluated, tmp_path):
    overrides, workdir, _, _, expected = evaluated
    shutil.copytree(workdir, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '10')
    raw = json.loads((tmp_path / 'run' / 'config.json').read_text())
    del raw['train']['evals'], raw['train']['trackers'], raw['train']['teacher']
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(raw))
    assert load(tmp_path / 'run' / 'config.json').train.evals == ()
    _, _, state = train(small(**overrides | {'train.evals': ('late every=7',)}), tmp_path / 'run')
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(expected))
    assert [r['step'] for r in records(tmp_path / 'run') if r['split'] == 'eval/late'] == [7, 10]


def test_a_stop_leaves_an_evaluation_for_the_resumed_run(evaluated, tmp_path, monkeypatch):
    """Statistics, too, are interrupted between two batches."""
    overrides, _, _, trainer, state = evaluated
    cfg = small(**overrides)
    (entry,) = (entry for entry in eval_entries(cfg.train.evals) if entry.name == 'lookups')
    asked = []
    data = evaluate.rows.EvalBatches(trainer.cfg.data, 'validation', trainer.local_rows)
    run = in_loop.of_lookups(entry, trainer, evaluate.tokenizer_for(cfg)[0], data)
    with trainer.context():
        assert run(state.params, 'x', lambda: bool(asked.append(1) or len(asked) == 2)) is None
    assert len(asked) == 2


WRONG = [
    ('x every=a', r"want every of 'x every=a' to be a valid integer"),
    ('x evry=3', r"want field=value in place of 'evry=3', where field is one of every, split, source"),
    ('x 3', r"want field=value in place of '3'"),
    ('a/b every=3', r"want name of 'a/b every=3' to be"),
    ('', r"want 'NAME field=value …' in place of ''"),
    ("x source='a", r"want 'NAME field=value …' in place of"),
    ('x every=1 every=2', 'want each field once'),
    ('x split=valid', r"want split of 'x split=valid' to be 'validation', 'test' or 'train'"),
    ('x limit=3', r"want no limit in 'x limit=3': it is not an entry with tasks"),
    ('x tasks=a split=test', r"want no split in 'x tasks=a split=test': it is an entry with tasks"),
    ('x statistics=True metrics=a:b', 'want statistics and metrics in entries of their own'),
    ('x split=train source=stdlib', "want split 'validation' or 'test' with a source"),
]  # fmt: skip


@pytest.mark.parametrize(('text', 'message'), WRONG)
def test_a_wrong_entry_is_one_line(text, message):
    with pytest.raises(ConfigError, match=rf'^train\.evals = \(.*: {message}') as e:
        small(**{'train.evals': (text,)})
    assert '\n' not in str(e.value)


def test_names_are_told_apart():
    with pytest.raises(ConfigError, match=r"^train\.evals = .*: want 'x' once"):
        small(**{'train.evals': ('x every=1', 'x every=2')})


@pytest.mark.parametrize(('text', 'error', 'message'), [
    ('x metrics=of_ones_own:hitz', ConfigError, r'metrics=of_ones_own:hitz: cannot be imported: AttributeError.*want MODULE'),
    ('x metrics=no_such_module:f', ConfigError, r'metrics=no_such_module:f: cannot be imported: ModuleNotFoundError'),
    ('x metrics=of_ones_own', ConfigError, r'metrics=of_ones_own: cannot be imported'),
    ('x metrics=of_ones_own:by_layer', ConfigError, r"metrics=of_ones_own:by_layer: returns .*want \{name: a number\}"),
    ('x metrics=of_ones_own:loss', ConfigError, r"metrics=of_ones_own:loss: returns 'loss', which evaluation itself reports"),
    ('x metrics=of_ones_own:step', ConfigError, r"metrics=of_ones_own:step: returns 'step', which evaluation itself reports"),
    ('x metrics=of_ones_own:ema', ConfigError, r"metrics=of_ones_own:ema: returns 'ema_hits', which evaluation itself reports"),
    ('x metrics=of_ones_own:fails', ConfigError, r"metrics=of_ones_own:fails: fails on .*: KeyError: 'labels'"),
    ('x split=train', ConfigError, r"train\.evals: x: split='train': want batches=N: it is as long as the training data"),
    ('x source=text:/no/where', DataError, r'text:/no/where: no file matches'),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_told_before_the_training(place, tmp_path, text, error, message):
    with pytest.raises(error, match=message) as e:
        train(small(**corpus(tmp_path), **{'train.evals': (text,)}), tmp_path / 'run')
    assert '\n' not in str(e.value) and not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_tasks_are_evaluated_while_a_run_trains(tmp_path):
    pytest.importorskip('lm_eval')
    documents = [{'question': f'spark {i}', 'choices': ['sparse', 'zq!'], 'answer': i % 2} for i in range(6)]
    (tmp_path / 'data.jsonl').write_text(''.join(json.dumps(d) + '\n' for d in documents))
    (tmp_path / 'choice.yaml').write_text(f"""task: spark_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path}/data.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    text = f'choice every=6 tasks=spark_choice task_path={tmp_path} limit=4'
    overrides = corpus(tmp_path) | {'train.evals': (text,), 'train.accumulate': 2, 'mesh.data': 4, 'mesh.model': 2}
    train(small(**overrides), tmp_path / 'run')
    found = {r['step']: r for r in records(tmp_path / 'run') if r['split'] == 'eval/choice'}
    assert [*found] == [6, 10] and found[10]['spark_choice/acc'] in (0.0, 0.25, 0.5, 0.75, 1.0)

    from spark.evaluation import tasks

    model = evaluate.load(tmp_path / 'run')
    results, _ = tasks.run(model, tasks.load(['spark_choice'], str(tmp_path)), limit=4)
    assert found[10]['spark_choice/acc'] == results['spark_choice']['acc,none']
    with pytest.raises(ConfigError, match=r"^train\.evals: x: tasks: no task 'spark_chioce'; did you mean spark_choice\?"):
        train(small(**overrides | {'train.evals': (f'x tasks=spark_chioce task_path={tmp_path}',)}), tmp_path / 'other')
