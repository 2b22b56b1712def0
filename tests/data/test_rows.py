"""Batches are a function of (seed, number of rows seen): nothing lost, nothing twice, whoever reads them."""

import collections
import gzip
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from spark.config import DataConfig
from spark.data import documents, rows
from spark.data.tokenizer import ByteTokenizer, of_config, tokenizer_for
from spark.errors import ConfigError, DataError
from tests.helpers import small

quickly = hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=['function_scoped_fixture'])


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Documents of 1 to 60 bytes, each of one letter: {split: [text]}, and the source."""
    directory = tmp_path_factory.mktemp('letters')
    texts = [chr(ord('A') + i % 26) * (i + 1) for i in range(60)]
    for i, text in enumerate(texts):
        (directory / f'{i:02}.txt').write_text(text)
    splits = collections.defaultdict(list)
    for text in texts:
        splits[documents.split_of(text, 0.1)].append(text)
    assert all(len(splits[split]) > 2 for split in documents.SPLITS)
    return splits, f'text:{directory}/*.txt', str(directory / 'cache')


def data(corpus, **more):
    _, source, cache = corpus
    return DataConfig(**{'source': source, 'cache_dir': cache, 'holdout': 0.1, 'seq_len': 16, 'batch_size': 4, **more})


def take(iterator, n=None):
    batches = list(itertools.islice(iterator, n))
    iterator.close()
    return batches


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in rows.NAMES)


def joined(batches):
    """All rows of the batches, by name."""
    return {name: np.concatenate([b[name] for b in batches]) for name in rows.NAMES}


@quickly
@hypothesis.given(seq_len=st.integers(5, 200), seed=st.integers(0, 2**31), epoch=st.integers(0, 2))
def test_every_row_once_per_epoch_and_every_token_once(corpus, seq_len, seed, epoch):
    texts = corpus[0]['train']
    train = rows.TrainRows(data(corpus, seq_len=seq_len, epochs=3), seed)
    n = train.total() // 3
    chosen = [train[g] for g in range(epoch * n, (epoch + 1) * n)]
    slots = np.concatenate([(row.start + np.arange(row.n)) % row.split.tokens for row in chosen])
    assert sorted(slots) == list(range(chosen[0].split.tokens))
    batch = rows.read(chosen, seq_len)
    real = batch['segments'] > 0
    counts = collections.Counter(batch['targets'][real].tolist())
    assert counts.pop(ByteTokenizer.vocab_size - 1) == len(texts)
    assert {chr(t): n for t, n in counts.items()} == dict(collections.Counter(''.join(texts)))
    assert batch['bytes'].sum() == sum(map(len, texts))
    assert not any(batch[name][~real].any() for name in rows.NAMES)


@quickly
@hypothesis.given(seq_len=st.integers(2, 100), seed=st.integers(0, 2**31))
def test_a_row_shows_documents_from_their_marks(corpus, seq_len, seed):
    tokenizer = ByteTokenizer()
    batch = joined(take(rows.TrainRows(data(corpus, seq_len=seq_len), seed).batches(0), 3))
    for tokens, targets, positions, segments in zip(*(batch[name] for name in rows.NAMES[:4]), strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            np.testing.assert_array_equal(tokens[here][1:], targets[here][:-1])
            assert (tokens[here] == tokenizer.bos).sum() == (segment > 1 or tokens[0] == tokenizer.bos)
            assert tokenizer.bos not in targets[here] and tokenizer.eos not in targets[here][:-1]
            assert len(set(tokens[here]) - {tokenizer.bos}) <= 1  # one letter: no document runs into another


@quickly
@hypothesis.given(
    seed=st.integers(0, 2**31), first=st.integers(0, 500), processes=st.sampled_from([1, 2, 4, 8]),
    threads=st.integers(1, 4), prefetch=st.integers(1, 5), batch_size=st.sampled_from([8, 16]),
)  # fmt: skip
def test_any_processes_threads_and_restarts_give_the_same_batches(corpus, seed, first, processes, threads, prefetch, batch_size):
    whole = rows.TrainRows(data(corpus, batch_size=8), seed).batches(first)
    expected = joined(take(whole, 4))
    train = rows.TrainRows(data(corpus, batch_size=batch_size, threads=threads, prefetch=prefetch), seed)
    n = 32 // batch_size
    held = np.array_split(np.arange(batch_size), processes)
    restart = first + (n - 1) * batch_size
    parts = [[*take(train.batches(first, mine), n - 1), *take(train.batches(restart, mine), 1)] for mine in held]
    batches = [{name: np.concatenate([part[i][name] for part in parts]) for name in rows.NAMES} for i in range(n)]
    assert same([joined(batches)], [expected])


def test_order_depends_on_the_seed_and_the_epoch(corpus):
    batches = lambda seed: take(rows.TrainRows(data(corpus), seed).batches(0), 40)
    assert same(batches(3), batches(3)) and not same(batches(3), batches(4))
    train = rows.TrainRows(data(corpus, epochs=2), 3)
    n = train.total() // 2
    first, second = [[train[g + e * n].start for g in range(n)] for e in range(2)]
    offset = first[0] % 16 - second[0] % 16
    assert first != second and offset  # other rows, not only another order
    assert first != sorted(first) and first != sorted(first, reverse=True)


@quickly
@hypothesis.given(weights=st.lists(st.floats(1e-4, 1e3) | st.just(0.0), min_size=1, max_size=5), n=st.integers(0, 10**9))
def test_each_row_of_a_mixture_is_of_one_part(weights, n):
    hypothesis.assume(sum(weights))
    before, after = rows.counts(n, weights), rows.counts(n + 1, weights)
    assert sorted(np.subtract(after, before)) == [0] * (len(weights) - 1) + [1]
    shares = np.divide(weights, sum(weights))
    assert np.all(np.abs(before - shares * n) <= len(weights)) and sum(before) == n
    assert all(count == 0 for count, weight in zip(after, weights, strict=True) if not weight)


@pytest.fixture(scope='module')
def letters(tmp_path_factory):
    """Two sources, of the letters a and b."""
    directory = tmp_path_factory.mktemp('ab')
    for letter in 'ab':
        for i in range(20):
            (directory / f'{letter}{i}.txt').write_text(letter * (31 + i))
    return f'text:{directory}/a*.txt', f'text:{directory}/b*.txt', str(directory / 'cache')


def shares(train, first, last):
    chosen = [train[g].split.store.manifest['source'][-6] for g in range(first, last)]
    return chosen.count('a') / len(chosen)


def test_mixtures_keep_their_proportions_and_change_at_their_steps(letters):
    a, b, cache = letters
    mixed = lambda source, **more: rows.TrainRows(
        DataConfig(**{'source': source, 'cache_dir': cache, 'seq_len': 8, 'batch_size': 10, 'holdout': 0.0, **more}), 0
    )
    assert shares(mixed(f'3 {a} + 1 {b}'), 0, 400) == 0.75
    train = mixed(f'3 {a} + 1 {b} until 20, {b} until 30, 0.1 {a} + 0.9 {b}')
    assert [shares(train, *edges) for edges in [(0, 200), (200, 300), (300, 700)]] == [0.75, 0, 0.1]
    # Each part goes through its own epochs, whatever the phases: no row is skipped, none comes twice.
    n = train._parts[0].per_epoch
    from_a = [row.start for row in map(train.__getitem__, range(700)) if row.split.store.manifest['source'] == a]
    assert n < len(from_a) < 2 * n and len(set(from_a[:n])) == n and len(set(from_a[n:])) == len(from_a) - n
    once = mixed(f'3 {a} + 1 {b}', epochs=1)
    assert once.counts(once.total())[0] == n and len(take(once.batches(0))) == once.total() // 10


def test_evaluation_covers_the_split_to_the_last_token(corpus):
    cfg = data(corpus, batch_size=2)
    texts = corpus[0]['test']
    dataset = rows.EvalBatches(cfg, 'test')
    batches = take(iter(dataset))
    assert len(batches) == len(dataset) > 1
    whole = joined(batches)
    real = whole['segments'] > 0
    assert whole['tokens'].shape == (2 * len(batches), 16)
    assert real.sum() == sum(len(text) + 1 for text in texts) and whole['bytes'].sum() == sum(map(len, texts))
    tokenizer = of_config(cfg)
    assert list(dataset.texts(tokenizer)) == texts
    assert documents.gzip_size(dataset.texts(tokenizer)) == len(gzip.compress(''.join(texts).encode(), 9))
    halves = [rows.EvalBatches(cfg, 'test', np.array([i])) for i in range(2)]
    both = [{name: np.concatenate([x[name], y[name]]) for name in rows.NAMES} for x, y in zip(*halves, strict=True)]
    assert same(both, batches)


def test_a_source_for_evaluation(corpus, letters):
    """The whole of it is the held-out text, and the whole training source is trained on."""
    cfg = data(corpus, eval_source=letters[0])
    sizes = lambda dataset: [(s.store.manifest['source'], s.documents) for s in dataset.splits]
    assert sizes(rows.EvalBatches(cfg, 'validation')) == sizes(rows.EvalBatches(cfg, 'test')) == [(letters[0], 20)]
    assert sizes(rows.EvalBatches(cfg, 'train')) == [(corpus[1], 60)]
    with pytest.raises(DataError, match=r"no document is in the split 'test', only 60 in train; raise data\.holdout"):
        rows.EvalBatches(data(corpus, holdout=0.0), 'test')


def test_a_tokenizer_without_bos_starts_documents_with_eos(corpus):
    cfg = data(corpus, bos='none', seq_len=200, batch_size=1)
    batch = joined(take(iter(rows.EvalBatches(cfg, 'test'))))
    real = batch['segments'] > 0
    assert 256 not in batch['tokens'][real] and 257 in batch['tokens'] and batch['targets'][real][-1] == 257
    assert (batch['targets'] == 257).sum() == len(corpus[0]['test'])


def test_a_store_of_1e11_tokens_opens_at_once(corpus):
    """Neither the permutation nor the position in a mixture is a list."""
    train = rows.TrainRows(data(corpus), 0)
    split = train._parts[0].split
    large = rows.Shuffled(rows.Split(split.store, 'train', 10**8, 10**11, 10**11), 8192, (0, 0))
    assert large.per_epoch == -(-(10**11) // 8192)
    starts = {large[i].start for i in range(1000)}
    assert len(starts) == 1000 and max(starts) > 9e10 and min(starts) < 1e10


def test_a_vocabulary_too_small_for_the_tokenizer_is_said():
    with pytest.raises(ConfigError, match=r'model\.vocab_size = 100: want 0 or at least 258'):
        tokenizer_for(small(**{'model.vocab_size': 100}))
    assert tokenizer_for(small(**{'model.vocab_size': 0}))[1].model.vocab_size == 258
