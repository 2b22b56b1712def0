"""The benchmarks of decoding, on a model of seconds: they run, and count the bytes that there are."""

import jax
import numpy as np
import pytest

from spark.benchmarks import decoding
from spark.config import FFN_KINDS, Kind
from spark.inference.model import bytes_per_step
from spark.kernels import cpu
from tests.helpers import small


@pytest.fixture(scope='module')
def cfgs():
    """Spark and dense."""
    return [small(kind, **{'model.n_layers': 2}) for kind in ('spark', 'dense')]


@pytest.mark.slow
def test_rows_of_every_benchmark(cfgs):
    rows = decoding.ffn_decode(*cfgs, repeats=1, layers=2)
    rows += decoding.decode(*cfgs, repeats=1, contexts=(16,)) + decoding.prefill(*cfgs, repeats=1, length=32, chunk=8)
    found = [row['name'].partition(':')[0] for row in rows]
    assert [found.count(name) for name in ('ffn_decode', 'decode', 'prefill')] == [3 + cpu.available(), 4, 1]
    assert all(row['ours_ms'] > 0 < row['baseline_ms'] for row in rows)
    spark = next(row for row in rows if row['name'].startswith('decode: Spark'))
    assert 0 < spark['spark_active'] < 96 and spark['limit_by_bytes'] > 1 and spark['peak_memory_over_that'] > 0


def test_bytes_of_a_step(cfgs):
    """By hand: all weights but the records that slept, and the cache up to where it is filled."""
    decoder, spark = decoding.Decoder(cfgs[1].model), decoding.Decoder(cfgs[0].model)
    for model in (decoder, spark):
        model.begin(16, 40)
        model.step()
    weights = sum(x.nbytes for x in jax.tree.leaves(decoder.weights)) - decoder.weights['final_norm'].nbytes
    ring, whole = (sum(x.nbytes / x.shape[2] for x in layer.values()) for layer in decoder.cache.layers[:2])
    np.testing.assert_allclose(decoder.bytes(), weights + 17 * (ring + whole))
    np.testing.assert_allclose(decoder.bytes() - decoder.bytes(head=False), decoder.weights['embedding'].values.nbytes)
    everything = sum(x.nbytes for x in jax.tree.leaves(spark.weights))
    records = sum(w['records'].values.nbytes for w in spark.weights['layers'])
    assert everything - records < spark.bytes() < everything - 0.7 * records


def test_a_half_that_is_masked_reads_all_records(monkeypatch):
    """Whatever the kernels of the other half: here an FFN without a top-k, so that nothing gathers its active entries."""
    monkeypatch.setitem(FFN_KINDS, 'spark', Kind('relu', gate='identity', predictor=True, zeros=True))
    spark = decoding.Decoder(small('spark', **{'model.n_layers': 2, 'model.ffn.k': 0}).model)
    spark.begin(16, 40)
    spark.step()
    assert spark.serving.kernels != 'masked' and (spark.counts['records_read'] == 96).all()
    read = lambda attended: bytes_per_step(spark.serving, spark.weights, spark.cache, spark.activity() | {'attended': attended})
    assert read(2) < read(4)
    nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert read(4) > nbytes(spark.weights) - spark.weights['final_norm'].nbytes


def test_attention_in_plain_jax_reads_each_query_its_room():
    """Not the attended keys alone: two queries with room for 6 share a table, of whose 40 slots 17 are filled."""
    spark = decoding.Decoder(small('spark', **{'model.n_layers': 2}).model)
    spark.begin(16, 40)
    spark.step()
    means = {'attended': 4.0, 'records_read': 0.0}
    read = lambda kernels: bytes_per_step(spark.serving._replace(kernels=kernels), spark.weights, spark.cache, means)
    slot = sum(layer['records'].nbytes / 40 for layer in spark.cache.layers)
    assert [(read(kernels) - read('cpu')) / slot for kernels in ('gather', 'masked')] == pytest.approx([12 - 4, 17 - 4])
