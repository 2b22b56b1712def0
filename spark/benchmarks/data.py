"""Reading batches from a token store against tokenizing in the loop, and against reading a plain array."""

import functools
import math
import pathlib
import resource
import tempfile
import time
from collections.abc import Iterator

import grain
import numpy as np

from spark.benchmarks.timing import row
from spark.config import ExperimentConfig
from spark.data import documents, rows, store
from spark.data.tokenizer import of_config
from spark.progress import tqdm
from spark.runtime import write_json

BATCH = 64  # rows
LARGE = 100_000_000  # tokens; several times what TensorStore's cache holds


def data(cfg: ExperimentConfig, repeats: int = 5) -> list[dict]:
    """Milliseconds per million tokens of one process, at two lengths of rows; CPU seconds of one of 1, 8 and 64 processes."""
    result = []
    with tempfile.TemporaryDirectory() as scratch:
        opened = _open_large(pathlib.Path(scratch) / 'empty')
        source = f'tokens:{_enlarged(rows.TrainRows(cfg.data, cfg.seed)[0].split, pathlib.Path(scratch) / "store")}'
        for seq_len in (2048, 8192):
            size = cfg.data.model_copy(update={'seq_len': seq_len, 'batch_size': BATCH})
            train = rows.TrainRows(size.model_copy(update={'source': source}), cfg.seed)
            array = _plain_file(train, pathlib.Path(scratch) / 'array')
            # name: (what makes an iterator over batches, millions of tokens to read)
            sides = {
                'store': (functools.partial(train.batches, 0), 32),
                '8_processes': (functools.partial(train.batches, 0, np.arange(0, BATCH, 8)), 128),
                '64_processes': (functools.partial(train.batches, 0, np.arange(1)), 256),
                'tokenizing': (functools.partial(_tokenizing, size), 2),
                'array': (functools.partial(_random_rows, array, seq_len), 32),
            }
            wall, cpu = _per_million(sides, BATCH * seq_len / 1e6, repeats)
            details = {'seq_len': seq_len, **{f'{name}_tokens_per_second': 1e6 / wall[name] for name in ('store', 'array')}}
            details |= {f'cpu_seconds_{name}': seconds for name, seconds in cpu.items()} | opened
            result.append(row(f'store/tokenizing, {seq_len}', 1e3 * wall['store'], 1e3 * wall['tokenizing'], **details))
    return result


def _per_million(sides, millions_per_batch, repeats):
    """Medians of the wall and CPU seconds per million tokens of the job; the sides are measured in turn."""
    wall, cpu = {name: [] for name in sides}, {name: [] for name in sides}
    for _ in tqdm(range(repeats), desc='repeats', leave=False):
        for name, (make, millions) in sides.items():
            batches, n = make(), math.ceil(millions / millions_per_batch)
            next(batches)
            start, busy = time.perf_counter(), time.process_time()
            for _ in range(n):
                next(batches)
            wall[name].append((time.perf_counter() - start) / (n * millions_per_batch))
            cpu[name].append((time.process_time() - busy) / (n * millions_per_batch))
            batches.close()
    return [{name: float(np.median(x)) for name, x in times.items()} for times in (wall, cpu)]


def _tokenizing(cfg) -> Iterator[dict]:
    """Shuffled documents that are tokenized, joined and cut into rows in the loop, by Grain, in threads."""
    tokenizer, texts = of_config(cfg), list(documents.texts(cfg.source, 'train', cfg))

    def encode(text):
        ids = tokenizer.encode(text)
        return {'tokens': np.concatenate([[tokenizer.bos], ids]), 'targets': np.concatenate([ids, [tokenizer.eos]])}

    encoded = grain.MapDataset.source(texts).shuffle(0).repeat().map(encode).to_iter_dataset(grain.ReadOptions(8, 16))
    cut = grain.experimental.ConcatThenSplitIterDataset(encoded, length_struct=dict.fromkeys(('tokens', 'targets'), cfg.seq_len))
    return iter(grain.experimental.ThreadPrefetchIterDataset(cut.batch(cfg.batch_size), prefetch_buffer_size=4))


def _enlarged(split, directory) -> pathlib.Path:
    """A store of the tokens of a split, repeated."""
    n, (tokens, sizes) = split.tokens, split.read(0, split.tokens)()
    times = -(-LARGE // n)
    for name, x in [('tokens', np.tile(tokens, times)), ('bytes', np.tile(sizes, times))]:
        array = store.create(directory / 'train' / name, n * times, x.dtype)
        for first in tqdm(range(0, n * times, store.SHARD), desc=f'writing {name}', leave=False):
            last = min(first + store.SHARD, n * times)
            array[first:last].write(x[first:last]).result()
    counts = {'documents': split.documents * times, 'tokens': n * times, 'bytes': split.bytes * times}
    write_json(directory / 'manifest.json', {**split.store.manifest, 'splits': {'train': counts}, 'checksums': {}})
    return directory


def _plain_file(train, path) -> np.memmap:
    """The same tokens in a plain file."""
    split = train[0].split
    tokens = split.read(0, split.tokens)()[0]
    tokens.tofile(path)
    return np.memmap(path, tokens.dtype)


def _random_rows(array, seq_len) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    while True:
        yield np.stack([array[i : i + seq_len] for i in rng.integers(0, len(array) - seq_len, BATCH)]).astype(np.int32)


def _open_large(directory) -> dict:
    """Seconds and megabytes that it takes to open a store of 10¹¹ tokens and read a row; only its first files are there."""
    n, split = 10**11, directory / 'train'
    for name, dtype in (('tokens', np.uint32), ('bytes', np.uint32)):
        store.create(split / name, n, dtype)[: store.SHARD].write(np.zeros(store.SHARD, dtype)).result()
    counts = {'documents': n // 1000, 'tokens': n, 'bytes': 4 * n}
    manifest = {'version': store.VERSION, 'splits': {'train': counts}, 'mark': 1, 'eos': 2, 'digest': ''}
    write_json(directory / 'manifest.json', manifest)
    used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    start, before = time.perf_counter(), used()
    shuffled = rows.Shuffled(store.Store(directory).splits['train'], 8192, (0, 0))
    rows.read([shuffled[10**6]._replace(start=10**6)], 8192)
    return {'open_1e11_seconds': time.perf_counter() - start, 'open_1e11_megabytes': used() - before}
