"""Documents to batches with Grain: shuffle, tokenize, concatenate and split into rows, batch, prefetch.

Every process reads the whole global stream, and its devices take their part of each batch. So the state of the stream is the
same small dict in all processes, and a run resumes exactly where it was on any number of processes.

A document of tokens t₁ … t_n becomes inputs BOS t₁ … t_n and targets t₁ … t_n EOS: every token is predicted exactly once,
wherever rows are cut.
"""

import zlib
from collections.abc import Iterator

import grain
import numpy as np

from spark.config import DataConfig, ExperimentConfig
from spark.data import sources
from spark.data.tokenizer import Tokenizer
from spark.data.tokenizer import load as load_tokenizer
from spark.errors import ConfigError

HASH = 'crc'  # key of a batch's checksum, for logs


def train_dataset(cfg: DataConfig, seed: int, tokenizer: Tokenizer) -> grain.IterDataset:
    """Shuffled training batches, without end or for data.epochs.

    A batch is a dict of int32 arrays (batch_size, seq_len): `tokens`, `targets`, `positions` in the document, `segments`
    (1, 2, … by document, 0 for padding), `bytes` of text per target; and `crc`, an int.
    """
    parts = sources.open_source(cfg.source, 'train', cfg)
    datasets = [
        grain.MapDataset.source(documents).shuffle((seed + i) % 2**32).repeat(cfg.epochs or None)
        for i, (_, documents) in enumerate(parts)
    ]
    mixed = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, [w for w, _ in parts])
    rows = _rows(mixed, cfg, tokenizer)
    if cfg.shuffle_rows:
        rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=cfg.shuffle_rows, seed=seed)
    return _batches(rows, cfg, drop_remainder=True)


class EvalDataset:
    """The batches of a split, 'validation', 'test' or 'train', in order, once, without dropping any; the last one is padded."""

    def __init__(self, cfg: DataConfig, split: str, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._documents = grain.MapDataset.concatenate([grain.MapDataset.source(d) for d in held_out(cfg, split)])
        self._batches = _batches(_rows(self._documents, cfg, tokenizer), cfg, drop_remainder=False)

    def __iter__(self) -> Iterator[dict]:
        return iter(self._batches)

    def __len__(self) -> int:
        """The number of documents. Only tokenizing the whole split could tell the number of batches."""
        return len(self._documents)

    def documents_ending_in(self, batch: dict) -> int:
        """How many documents have their last token in a batch."""
        return int(np.sum((batch['targets'] == self._tokenizer.eos) & (batch['segments'] > 0)))


def held_out(cfg: DataConfig, split: str) -> list[sources.Documents]:
    """The documents of a split by part of the source; 'validation' and 'test' come from data.eval_source if that is set."""
    from_eval_source = bool(cfg.eval_source) and split != 'train'
    source = cfg.eval_source if from_eval_source else cfg.source
    return [d for _, d in sources.open_source(source, split, cfg, held_out_source=from_eval_source)]


def gzip_size(cfg: DataConfig, split: str) -> int:
    """Bytes of the concatenated text of a split after `gzip -9`."""
    stream = zlib.compressobj(9, wbits=31)  # 31: the gzip format
    pieces = (stream.compress(text.encode()) for documents in held_out(cfg, split) for text in documents)
    return sum(map(len, pieces)) + len(stream.flush())


def tokenizer_for(cfg: ExperimentConfig) -> tuple[Tokenizer, ExperimentConfig]:
    """The tokenizer of a config, and the config with model.vocab_size filled in."""
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    size = cfg.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f'model.vocab_size = {size}: want 0 or at least {tokenizer.vocab_size}, the size of {cfg.data.tokenizer}'
        )
    if size % cfg.train.loss_pieces:
        raise ConfigError(f'train.loss_pieces = {cfg.train.loss_pieces}: want a divisor of the vocabulary of {size}')
    return tokenizer, cfg.model_copy(update={'model': cfg.model.model_copy(update={'vocab_size': size})})


def _rows(documents, cfg, tokenizer):
    def encode(text):
        ids = tokenizer.encode(text)
        n = len(ids) + 1
        # The text's bytes are spread evenly over its targets, so that sums over whole documents are exact.
        edges = np.arange(n + 1, dtype=np.int64) * len(text.encode()) // n
        return {
            'tokens': np.concatenate([[np.int32(tokenizer.bos)], ids]),
            'targets': np.concatenate([ids, [np.int32(tokenizer.eos)]]),
            'bytes': np.diff(edges).astype(np.int32),
        }

    encoded = documents.map(encode).to_iter_dataset(_read_options(cfg))
    lengths = dict.fromkeys(('tokens', 'targets', 'bytes'), cfg.seq_len)
    return grain.experimental.ConcatThenSplitIterDataset(encoded, length_struct=lengths)


def _read_options(cfg):
    return grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=2 * cfg.threads)


def _batches(rows, cfg, drop_remainder):
    def finish(batch):
        names = {'tokens_segment_ids': 'segments', 'tokens_positions': 'positions'}
        names |= {name: name for name in ('tokens', 'targets', 'bytes')}
        padding = cfg.batch_size - len(batch['tokens'])
        whole = {new: np.pad(batch[old], ((0, padding), (0, 0))) for old, new in names.items()}
        return whole | {HASH: zlib.crc32(whole['tokens'].tobytes())}

    batches = rows.batch(cfg.batch_size, drop_remainder=drop_remainder).map(finish)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=cfg.prefetch)
