"""Needles: what the texts hold, and what a model that cheats, one that guesses and one that is trained score."""

import functools
import re

import numpy as np
import pytest

pytest.importorskip('lm_eval')

from spark.errors import ConfigError
from spark.evaluation import evaluate, needles, tasks

CELLS = {'length': [320, 500], 'depth': [0.0, 0.5, 1.0]}


@pytest.fixture(scope='module')
def model(trained):
    model = evaluate.load(trained('spark')[0])
    data = model.cfg.data.model_copy(update={'cache_dir': ''})  # where the embedded corpus is prepared already
    return model._replace(cfg=model.cfg.model_copy(update={'data': data}))


@pytest.fixture(autouse=True)
def none_of_the_harness(monkeypatch):
    """Without its own tasks, an index of thousands of files."""
    monkeypatch.setattr(tasks, 'TaskManager', functools.partial(tasks.TaskManager, include_defaults=False))


def solved(text):
    """The answer, by reading the text from its start, as a language model must."""
    values, question = {}, text.rpartition('\n')[2]
    for line in text.splitlines():
        if found := re.fullmatch(r'# The magic number of (\w+) is (\d+)\.|(\w+) = (\w+)', line):
            key, value = found[1] or found[3], found[2] or found[4]
            values[key] = values.get(value, value)
    return values[re.fullmatch(r'# (?:The magic number of )?(\w+) (?:is|==)', question)[1]]


@pytest.mark.parametrize('name', needles.BUILDERS)
def test_a_text_has_its_length_and_its_needle_at_its_depth(model, name):
    make = functools.partial(needles.documents_of, name, model.tokenizer, model.cfg.data)
    documents = make([320, 500, 5000], [0.0, 0.3, 1.0], 3)
    assert documents == make([320, 500, 5000], [0.0, 0.3, 1.0], 3)
    assert len({d['text'] for d in documents}) == len(documents) == 27
    for d in documents:
        answer = d['choices'][d['answer']]
        assert solved(d['text']) == answer and len(set(d['choices'])) == needles.CHOICES
        size = 1 + len(model.tokenizer.encode(f'{d["text"]} {answer}'))
        assert d['length'] - 200 < size <= d['length']  # a line of the haystack has up to 200 bytes
        before, _, after = d['text'].partition(f'{answer}')
        haystack = lambda text: sum(len(line.encode()) + 1 for line in text.splitlines()[: -1 or None])
        if d['length'] == 5000:
            assert haystack(before) / (haystack(before) + haystack(after)) == pytest.approx(d['depth'], abs=0.1)
    answers = [d['answer'] for d in make([320], [0.5], 40)]
    assert set(answers) == set(range(needles.CHOICES))
    with pytest.raises(ConfigError, match=rf'--metadata: length = 60: {name} takes \d\d\d? tokens without a haystack'):
        make([60], [0.0], 1)


@pytest.mark.parametrize('name', ['needle_multikey', 'needle_tracking'])
def test_the_place_of_a_number_does_not_give_the_answer_away(model, name):
    """Whoever takes the first or the last number of a text is right by chance, at every depth."""
    for depth in (0.0, 0.5, 1.0):
        found = []
        for d in needles.documents_of(name, model.tokenizer, model.cfg.data, [320], [depth], 100):
            numbers = re.findall(rf'\b(?:{"|".join(d["choices"])})\b', d['text'])
            assert len(numbers) == needles.CHOICES
            found.append([numbers[i] == d['choices'][d['answer']] for i in (0, -1)])
        assert np.mean(found, axis=0) == pytest.approx([1 / needles.CHOICES] * 2, abs=0.17)  # four standard deviations


def run(model, monkeypatch, score, **metadata):
    """The results of all tasks where `score(context, continuation)` is the log-likelihood; None: that of the model."""
    if score:
        monkeypatch.setattr(tasks.HarnessModel, 'loglikelihood', lambda self, requests, **_: [score(*r.args) for r in requests])
    names = list(needles.BUILDERS)
    return tasks.run(model, tasks.load(names, metadata=metadata, ours=needles.tasks(model.tokenizer, model.cfg.data)))


def test_who_cheats_scores_1_and_who_guesses_scores_chance(model, monkeypatch):
    def cheat(context, continuation):
        right = continuation == f' {solved(context)}'
        return (0.0 if right else -1.0), right

    results, table = run(model, monkeypatch, cheat, **CELLS, documents=2)
    for name in needles.BUILDERS:
        assert results[name]['acc,none'] == results[name]['exact_match,none'] == 1
        cells = results[name]['by_length_and_depth']
        assert [(c['length'], c['depth']) for c in cells] == [(n, d) for n in CELLS['length'] for d in CELLS['depth']]
        assert all(c['acc'] == c['exact_match'] == 1 and c['documents'] == 2 for c in cells)
        assert f'| {name}: acc | depth 0 | depth 0.5 | depth 1 |' in table and '| 500 tokens | 1.00 | 1.00 | 1.00 |' in table
    rng = np.random.default_rng(0)
    results, _ = run(model, monkeypatch, lambda *_: (rng.normal(), False), length=320, depth=0.5, documents=200)
    for name in needles.BUILDERS:
        assert results[name]['acc,none'] == pytest.approx(1 / needles.CHOICES, abs=0.12)  # four standard deviations
        assert results[name]['exact_match,none'] == 0


def test_a_trained_model_reads_four_times_what_it_was_trained_on(model, monkeypatch):
    results, _ = run(model, monkeypatch, None, length=16 * model.cfg.data.seq_len, depth=[0.0, 1.0], documents=1)
    assert all(0 <= cell['acc'] <= 1 for name in needles.BUILDERS for cell in results[name]['by_length_and_depth'])


@pytest.mark.parametrize(
    ('metadata', 'message'),
    [
        ({'lenght': 5}, "--metadata: 'lenght'; did you mean length\\?: want length, depth, documents"),
        ({'length': [0]}, '--metadata: length = 0: want a number, at least 1'),
        ({'depth': [0, 2]}, '--metadata: depth = 2: want a share, 0 to 1, or a list of them'),
        ({'documents': '3'}, "--metadata: documents = '3': want a number, at least 1"),
    ],
)
def test_wrong_metadata(model, metadata, message):
    with pytest.raises(ConfigError, match=message):
        tasks.load(['needle_single'], metadata=metadata, ours=needles.tasks(model.tokenizer, model.cfg.data))
