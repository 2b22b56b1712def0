"""lm-evaluation-harness through the adapter, offline, on tasks made here."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('lm_eval')

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from spark.errors import ConfigError, DataError
from spark.evaluation import evaluate, tasks
from spark.inference.sampling import Sampling
from tests.helpers import small

TEXT = 'spark sparse 漢字 top key spark spark ' * 9  # several rows of 32 bytes


@pytest.fixture(scope='module')
def model(trained, tmp_path_factory):
    text = tmp_path_factory.mktemp('text') / 'text.txt'
    text.write_text(TEXT)
    return evaluate.load(trained('spark')[0], source=f'text:{text}')


@pytest.fixture(scope='module')
def adapter(model):
    return tasks.HarnessModel(model)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.fixture(scope='module')
def log_probabilities(model):
    """ids → (len(ids), V): log-probabilities of every next token, one row by itself."""
    transformer, size = model.trainer.model, 160

    @jax.jit
    def row(params, tokens, segments):
        hidden = transformer.apply(params, tokens, jnp.arange(size)[None], segments)
        return jax.nn.log_softmax(transformer.apply(params, hidden, method='logits')[0])

    def of(ids):
        tokens, segments = np.zeros((2, 1, size), np.int32)
        tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
        return np.asarray(row(model.params, tokens, segments))[: len(ids)]

    return of


def test_loglikelihood_of_any_context(model, adapter, log_probabilities):
    """Empty contexts, trailing spaces, and lengths far beyond those of the training."""
    tokenizer = model.tokenizer
    pairs = [('', 'spark'), ('spark ', 'sparse'), ('top key', ' 漢字'), ('key ' * 30, 'spark')]
    pairs += [('key', f' {i} spark') for i in range(20)]  # more rows than a training batch has
    found = adapter.loglikelihood(requests('loglikelihood', *pairs))
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = [tokenizer.bos, *tokenizer.encode(context + continuation)]
        n = len(tokenizer.encode((context[len(context.rstrip()) :] if context else '') + continuation))
        log_p = log_probabilities(ids)[-n - 1 : -1]
        target = np.array(ids[-n:])
        assert value == pytest.approx(log_p[np.arange(n), target].sum(), abs=1e-3)
        assert greedy == bool((log_p.argmax(-1) == target).all())


def test_rolling_perplexity_is_that_of_evaluation(model, adapter):
    report, _ = evaluate.evaluate(model, 'test')
    (value,) = adapter.loglikelihood_rolling(requests('loglikelihood_rolling', (TEXT,)))
    ours = report['without_ends']
    tokens = len(model.tokenizer.encode(TEXT))
    assert tokens > 3 * model.cfg.data.seq_len and report['tokens'] == tokens + 1
    assert math.exp(-value / tokens) == pytest.approx(ours['perplexity'], rel=1e-3)
    assert -value / len(TEXT.encode()) / math.log(2) == pytest.approx(ours['bits_per_byte'], rel=1e-3)
    assert adapter.loglikelihood_rolling(requests('loglikelihood_rolling', ('',), ('key',)))[0] == 0


def test_generation_stops_where_it_is_told(model, adapter, log_probabilities):
    contexts = ('spark', 'sparse top key ' * 5, 'k')
    ask = lambda **options: requests('generate_until', *[(context, options) for context in contexts])
    whole = adapter.generate_until(ask(until=[], max_gen_toks=8))
    tokenizer = model.tokenizer
    for text, context in zip(whole, contexts, strict=True):
        ids = [tokenizer.bos, *tokenizer.encode(context)]
        for _ in range(8):
            ids.append(int(log_probabilities(ids)[-1].argmax()))
        expected = ids[-8:]
        expected = expected[: expected.index(tokenizer.eos)] if tokenizer.eos in expected else expected
        assert text == tokenizer.decode(expected)
    stop = next(text for text in whole if len(text) > 2)[2]
    for short, long in zip(adapter.generate_until(ask(until=[stop], max_gen_toks=8)), whole, strict=True):
        assert short == long.split(stop)[0]
    assert adapter.generate_until(ask(until=stop, max_gen_toks=8, do_sample=False)) == [t.split(stop)[0] for t in whole]
    harmless = {'num_beams': 1, 'top_p': 0.9, 'top_k': 50, 'length_penalty': 2.0, 'use_cache': True, 'repetition_penalty': 1.0}
    assert adapter.generate_until(ask(until=None, max_new_tokens=8, **harmless)) == whole
    drawn = adapter.generate_until(ask(max_gen_toks=8, do_sample=True))
    assert drawn == adapter.generate_until(ask(max_gen_toks=8, do_sample=True, temperature=1.0)) != whole
    assert adapter.generate_until(ask(max_gen_toks=8, do_sample=True, temperature=1.0, top_k=1)) == whole


def test_each_batch_of_samples_is_another(model, adapter):
    rows = adapter._rows(32 + 8)
    asked = requests('generate_until', *[('key', {'do_sample': True, 'max_gen_toks': 8})] * (2 * rows))
    drawn = adapter.generate_until(asked, disable_tqdm=True)
    assert drawn[:rows] != drawn[rows:] and drawn == adapter.generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, ((), 256, Sampling())),
        ({'until': 'x', 'max_gen_toks': 5, 'temperature': 0.0}, (('x',), 5, Sampling())),
        ({'do_sample': False, 'temperature': 0.7, 'top_p': 1.0}, ((), 256, Sampling())),
        ({'temperature': 0.7}, ((), 256, Sampling(0.7))),
        ({'do_sample': True, 'num_beams': 1}, ((), 256, Sampling(1.0))),
        ({'do_sample': True, 'temperature': 0.2, 'top_p': 0.95, 'top_k': -1}, ((), 256, Sampling(0.2, top_p=0.95))),
        ({'do_sample': True, 'temperature': 0.0}, r'generation option temperature = 0 with do_sample: want one above 0'),
        ({'num_beams': 4}, r'generation option num_beams = 4: want 1, which is to do without'),
        ({'repetition_penalty': 1.2}, r'generation option repetition_penalty = 1\.2: want 1, which is to do without'),
        ({'temprature': 1.0}, r"generation option 'temprature'; did you mean temperature\?: want until, max_gen_toks"),
    ],
)  # fmt: skip
def test_options_of_generation(options, expected):
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            tasks._generation_options(options)
    else:
        assert tasks._generation_options(options) == expected


@pytest.fixture(scope='module')
def task_path(tmp_path_factory):
    """Three tasks on local files: multiple choice, perplexity, generation."""
    directory = tmp_path_factory.mktemp('tasks')
    documents = [{'text': TEXT, 'question': f'spark {i}', 'choices': ['sparse', 'zq!'], 'answer': i % 2} for i in range(6)]
    (directory / 'data.jsonl').write_text(''.join(json.dumps(d) + '\n' for d in documents))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {directory}/data.jsonl}}
test_split: test
"""
    (directory / 'choice.yaml').write_text(f"""task: spark_choice{common}output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    (directory / 'perplexity.yaml').write_text(f"""task: spark_perplexity{common}output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
""")
    (directory / 'generation.yaml').write_text(f"""task: spark_generation{common}output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
""")
    return str(directory)


@pytest.fixture
def none_of_the_harness(monkeypatch):
    """Without its own tasks, an index of thousands of files."""
    monkeypatch.setattr(tasks, 'TaskManager', functools.partial(tasks.TaskManager, include_defaults=False))


def test_data_is_read_once(model, adapter, task_path, none_of_the_harness, monkeypatch):
    (path := pathlib.Path(task_path) / 'group.yaml').write_text('group: spark_group\ntask: [spark_choice, spark_perplexity]\n')
    loaded = tasks.load(['spark_group', 'spark_generation'], str(path.parent))
    with pytest.raises(ConfigError, match="--tasks=spark_group,spark_choice: Duplicate task 'spark_choice'"):
        tasks.load(['spark_group', 'spark_choice'], str(path.parent))
    path.unlink()
    monkeypatch.setattr(ConfigurableTask, 'download', lambda *args, **kwargs: 1 / 0)
    first, _ = tasks.run(adapter, loaded, limit=4)
    assert {'spark_choice', 'spark_perplexity', 'spark_generation'} <= first.keys()
    assert tasks.run(adapter, loaded, limit=4)[0] == first


def test_the_harness_runs_our_tasks(model, adapter, task_path, none_of_the_harness):
    names = ['spark_choice', 'spark_perplexity', 'spark_generation']
    results, table = tasks.run(model, tasks.load(names, task_path), limit=4)
    # Documents 0 to 3: is the likelier of the two choices the answer?
    pairs = [(f'spark {i}', f' {choice}') for i in range(4) for choice in ('sparse', 'zq!')]
    values = adapter.loglikelihood(requests('loglikelihood', *pairs))
    likelier = [int(values[2 * i][0] < values[2 * i + 1][0]) for i in range(4)]
    assert results['spark_choice']['acc,none'] == np.mean([choice == i % 2 for i, choice in enumerate(likelier)])
    assert results['spark_generation']['exact_match,none'] == 0  # no text is 'x' alone
    ours = evaluate.evaluate(model, 'test')[0]['without_ends']['bits_per_byte']
    assert results['spark_perplexity']['bits_per_byte,none'] == pytest.approx(ours, rel=1e-3)
    assert all(name in table for name in names)


def test_a_directory_of_tasks_that_is_not_there():
    with pytest.raises(ConfigError, match='--task_path=/no/where: no such directory'):
        tasks.load(['lost'], '/no/where')


def test_data_that_is_not_there(tmp_path, none_of_the_harness):
    lines = ['task: lost', 'dataset_path: json', 'dataset_kwargs: {data_files: /no/where.jsonl}', 'test_split: train']
    lines += ['output_type: loglikelihood_rolling', 'doc_to_target: x']
    (tmp_path / 'lost.yaml').write_text('\n'.join(lines))
    with pytest.raises(DataError, match='--tasks=lost: its data cannot be read or downloaded'):
        tasks.load(['lost'], str(tmp_path))


def test_lengths_are_padded_to_few_shapes():
    assert [tasks._bucket(n) for n in (1, 32, 33, 64, 100, 8192)] == [32, 32, 64, 64, 128, 8192]
    assert small().data.seq_len == tasks._bucket(32)
