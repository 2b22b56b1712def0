"""Batches: nothing lost, nothing twice, the same from the same seed, whoever reads them."""

import collections
import gzip
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark.checkpoints.manager import Checkpoints
from spark.data import pipeline
from spark.errors import ConfigError, DataError
from tests.helpers import small


@pytest.fixture
def cfg(tmp_path):
    """60 documents of 1 to 60 bytes, each of one letter, a quarter of them held out."""
    for i in range(60):
        (tmp_path / f'{i:02}.txt').write_text(chr(ord('A') + i % 26) * (i + 1))
    return small(**{'data.source': f'text:{tmp_path}/*.txt', 'data.cache_dir': str(tmp_path / 'cache'), 'data.holdout': 0.1})


def with_data(cfg, **kw):
    return cfg.data.model_copy(update=kw)


def take(dataset, n=None):
    iterator = iter(dataset)
    batches = list(itertools.islice(iterator, n))
    iterator.close()
    return batches


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_an_epoch_holds_every_token_of_every_document_once(cfg):
    tokenizer, _ = pipeline.tokenizer_for(cfg)
    once = with_data(cfg, epochs=1, batch_size=1, shuffle_rows=4)
    batches = take(pipeline.train_dataset(once, 0, tokenizer))
    targets = np.concatenate([b['targets'][b['segments'] > 0] for b in batches])
    counts = collections.Counter(targets.tolist())
    held_out = {s: [t for d in pipeline.held_out(once, s) for t in d] for s in ('validation', 'test')}
    letters = collections.Counter(''.join(chr(ord('A') + i % 26) * (i + 1) for i in range(60)))
    for text in itertools.chain(*held_out.values()):
        letters -= collections.Counter(text)
    assert counts.pop(tokenizer.eos) == 60 - 12
    assert {chr(t): n for t, n in counts.items()} == dict(letters)
    assert sum(b['bytes'].sum() for b in batches) == letters.total()


def test_rows_are_documents_with_their_positions_and_targets(cfg):
    tokenizer, _ = pipeline.tokenizer_for(cfg)
    for batch in take(pipeline.train_dataset(cfg.data, 0, tokenizer), 5):
        for tokens, targets, positions, segments in zip(
            *(batch[k] for k in ('tokens', 'targets', 'positions', 'segments')), strict=True
        ):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
                np.testing.assert_array_equal(tokens[here][1:], targets[here][:-1])
                body = tokens[here][tokens[here] != tokenizer.bos]
                assert len(set(body.tolist())) <= 1  # one letter: no document runs into another


def test_order_depends_on_the_seed_alone(cfg):
    tokenizer, _ = pipeline.tokenizer_for(cfg)
    batches = lambda seed=3, **kw: take(pipeline.train_dataset(with_data(cfg, **kw), seed, tokenizer), 12)
    assert same(batches(), batches())
    assert same(batches(), batches(threads=1, prefetch=1))
    assert not same(batches(), batches(seed=4))
    crcs = [b['crc'] for b in batches()]
    assert len(set(crcs)) == 12  # each epoch in another order


@pytest.mark.parametrize(
    ('seen', 'shuffle_rows', 'aligned'),
    [(0, 16, False), (1, 0, True), (1, 16, False), (2, 16, True), (7, 0, False), (7, 16, False), (20, 0, True), (20, 16, False)],
)
def test_the_stream_goes_on_exactly_where_its_state_was_taken(cfg, seen, shuffle_rows, aligned, tmp_path):
    """Through the file of a checkpoint; also where rows end with documents, and nothing is left over from the one before."""
    if aligned:
        (tmp_path / 'rows').mkdir()
        for i in range(20):
            (tmp_path / 'rows' / f'{i}.txt').write_text(chr(97 + i) * 31)
        cfg = cfg.model_copy(update={'data': with_data(cfg, source=f'text:{tmp_path}/rows/*.txt')})
    tokenizer, _ = pipeline.tokenizer_for(cfg)
    stream = lambda: iter(pipeline.train_dataset(with_data(cfg, shuffle_rows=shuffle_rows), 0, tokenizer))
    first = stream()
    for _ in range(seen):
        next(first)
    (tmp_path / 'config.json').touch()
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    checkpoints.save(seen, {'x': jnp.zeros(1)}, first.get_state())
    checkpoints.close()
    expected = [next(first) for _ in range(10)]
    second = stream()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {'x': jax.ShapeDtypeStruct((1,), jnp.float32, sharding=here)}
    second.set_state(Checkpoints(tmp_path / 'checkpoints').restore(seen, abstract)[1])
    assert same(expected, [next(second) for _ in range(10)])
    first.close()
    second.close()


def test_evaluation_covers_the_split_to_the_last_token(cfg):
    tokenizer, _ = pipeline.tokenizer_for(cfg)
    texts = [t for d in pipeline.held_out(cfg.data, 'test') for t in d]
    dataset = pipeline.EvalDataset(cfg.data.model_copy(update={'batch_size': 2}), 'test', tokenizer)
    batches = take(dataset)
    assert len(batches) > 1
    assert sum(map(dataset.documents_ending_in, batches)) == len(dataset) == len(texts)
    assert all(b['tokens'].shape == (2, 32) for b in batches)
    assert sum((b['segments'] > 0).sum() for b in batches) == sum(len(t) + 1 for t in texts)
    assert sum(b['bytes'].sum() for b in batches) == sum(map(len, texts))
    assert pipeline.gzip_size(cfg.data, 'test') == len(gzip.compress(''.join(texts).encode(), 9))


def test_mixtures_keep_their_proportions(tmp_path):
    for letter in 'ab':
        for i in range(20):
            (tmp_path / f'{letter}{i}.txt').write_text(letter * 31)
    cfg = small(**{'data.source': f'3 text:{tmp_path}/a*.txt + 1 text:{tmp_path}/b*.txt', 'data.cache_dir': str(tmp_path / 'c')})
    tokenizer, _ = pipeline.tokenizer_for(cfg)
    tokens = np.concatenate([b['tokens'].ravel() for b in take(pipeline.train_dataset(cfg.data, 0, tokenizer), 20)])
    a, b = (tokens == ord('a')).sum(), (tokens == ord('b')).sum()
    assert abs(a / (a + b) - 0.75) < 0.02


def test_a_vocabulary_too_small_for_the_tokenizer_is_said(cfg):
    with pytest.raises(ConfigError, match=r'model\.vocab_size = 100: want 0 or at least 258'):
        pipeline.tokenizer_for(small(**{'model.vocab_size': 100}))
    assert pipeline.tokenizer_for(small(**{'model.vocab_size': 0}))[1].model.vocab_size == 258


def test_a_record_that_cannot_be_decoded_reaches_the_reader(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / 'a.array_record'), 'group_size:1')
    for _ in range(9):
        writer.write(b'\xff')
    writer.close()
    cfg = small(**{'data.source': f'array_record:{tmp_path}/a.array_record'})
    tokenizer, _ = pipeline.tokenizer_for(cfg)
    with pytest.raises(DataError, match='is not UTF-8'):
        take(pipeline.train_dataset(cfg.data, 0, tokenizer), 1)
