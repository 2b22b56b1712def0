"""Documents to batches with Grain: shuffle, tokenize, concatenate and split into rows, batch, prefetch.

Each process walks the one global stream, of which its devices take what is theirs. So the stream's state is the same
small dict everywhere, and a run goes on exactly where it was on any number of processes.

A document of tokens t₁ … t_n becomes inputs BOS t₁ … t_n and targets t₁ … t_n EOS: every token is predicted once,
wherever rows are cut.
"""

import zlib

import grain
import numpy as np

from spark.data import sources
from spark.data.tokenizer import load as load_tokenizer
from spark.errors import ConfigError

HASH = 'crc'  # checksum of a batch, for logs


def train_dataset(cfg, seed, tokenizer):
    """An endless (or data.epochs long) `grain.IterDataset` of shuffled training batches.

    Args:
      cfg: a DataConfig.
      seed: of the shuffles.
      tokenizer: see spark.data.tokenizer.

    Returns:
      Batches: a dict of int32 arrays (batch_size, seq_len): `tokens`, `targets`, `positions` in the document,
      `segments` (1, 2, … by document, 0 for padding), `bytes` of text per target; and `crc`, an int.
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


def eval_dataset(cfg, split, tokenizer):
    """The batches of a split ('validation', 'test', or 'train') in order, once, none dropped; the last one is padded."""
    documents = held_out(cfg, split)
    in_order = grain.MapDataset.concatenate([grain.MapDataset.source(d) for d in documents])
    return _batches(_rows(in_order, cfg, tokenizer), cfg, drop_remainder=False)


def held_out(cfg, split):
    """The Documents of a split, a list with one entry per part of the source; held-out ones are those of data.eval_source."""
    other = bool(cfg.eval_source) and split != 'train'
    return [d for _, d in sources.open_source(cfg.eval_source if other else cfg.source, split, cfg, held_out_source=other)]


def gzip_size(cfg, split):
    """Bytes of a held-out split's text, all documents in a row, in `gzip -9`."""
    stream = zlib.compressobj(9, wbits=31)  # 31: the gzip format
    pieces = (stream.compress(text.encode()) for documents in held_out(cfg, split) for text in documents)
    return sum(map(len, pieces)) + len(stream.flush())


def tokenizer_for(cfg):
    """The tokenizer of an ExperimentConfig, and the config with model.vocab_size filled in."""
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
        # The text's bytes spread evenly over its targets: exact in any sum over whole documents.
        edges = np.arange(n + 1, dtype=np.int64) * len(text.encode()) // n
        return {
            'tokens': np.concatenate([[np.int32(tokenizer.bos)], ids]),
            'targets': np.concatenate([ids, [np.int32(tokenizer.eos)]]),
            'bytes': np.diff(edges).astype(np.int32),
        }

    read = grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=2 * cfg.threads)
    encoded = documents.map(encode).to_iter_dataset(read)
    lengths = dict.fromkeys(('tokens', 'targets', 'bytes'), cfg.seq_len)
    return grain.experimental.ConcatThenSplitIterDataset(encoded, length_struct=lengths)


def _batches(rows, cfg, drop_remainder):
    def finish(batch):
        names = {'tokens_segment_ids': 'segments', 'tokens_positions': 'positions'}
        names |= {name: name for name in ('tokens', 'targets', 'bytes')}
        padding = cfg.batch_size - len(batch['tokens'])
        whole = {new: np.pad(batch[old], ((0, padding), (0, 0))) for old, new in names.items()}
        return whole | {HASH: zlib.crc32(whole['tokens'].tobytes())}

    batches = rows.batch(cfg.batch_size, drop_remainder=drop_remainder).map(finish)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=cfg.prefetch)
