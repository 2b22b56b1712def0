"""Documents to a token store: pieces of the source are tokenized side by side, then joined to one array per split.

    DIR/plan.json                what the store is made of
    DIR/parts/N.npz, N.json      piece N, tokenized; deleted when the store is finished
    DIR/SPLIT/tokens, bytes      the arrays, written a file at a time
    DIR/manifest.json            written last: the store is finished

A part and a file of an array are functions of the source alone, and appear whole or not at all. So any number of workers writes
the same bytes, and a preparation that was killed goes on where it was.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import sys

import filelock
import numpy as np
from etils import epath
from tqdm import tqdm

from spark.config import DataConfig
from spark.data import documents, launchers, store, tokenizer
from spark.data.launchers import Launcher
from spark.errors import ConfigError, DataError
from spark.runtime import write_bytes, write_json

LISTED = 100  # unusable documents that the manifest names


@dataclasses.dataclass(frozen=True)
class Worker:
    """What all workers know."""

    directory: epath.Path
    tokenizer: tuple[str, str, str]  # of DataConfig: tokenizer, bos, eos
    holdout: float

    def part(self, n: int, suffix: str) -> epath.Path:
        """The file of piece n."""
        return self.directory / 'parts' / f'{n:06}{suffix}'

    def tokenize(self, item: tuple[int, documents.Piece]) -> None:
        """Writes piece n: the ids of each split, and the tokens and bytes of its documents; N.json once N.npz is there."""
        n, piece = item
        texts, bad, seen = {split: [] for split in documents.SPLITS}, [], 0
        for document in piece.documents():
            seen += 1
            if document.why:
                bad.append(f'{document.place}: {document.why}')
            else:
                texts[piece.split or documents.split_of(document.text, self.holdout)].append(document.text)
        encoder = _load(*self.tokenizer)
        arrays, digest = {}, hashlib.blake2b(digest_size=16)
        for split in documents.SPLITS:
            ids = encoder.start(texts[split])
            arrays[f'{split}/tokens'] = np.concatenate([[], *ids]).astype(store.narrowest(encoder.vocab_size))
            arrays[f'{split}/lengths'] = np.array([len(x) for x in ids], np.int64)
            arrays[f'{split}/bytes'] = np.array([len(text.encode()) for text in texts[split]], np.int64)
        for array in arrays.values():
            digest.update(array.tobytes())
        total = lambda split, name: int(arrays[f'{split}/{name}'].sum())
        counts = {split: [len(texts[split]), total(split, 'lengths'), total(split, 'bytes')] for split in texts}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_bytes(self.part(n, '.npz'), buffer.getvalue(), DataError)
        report = {'documents': seen, 'splits': counts, 'unusable': len(bad), 'listed': bad[:LISTED], 'digest': digest.hexdigest()}
        write_json(self.part(n, '.json'), report, DataError)

    def write(self, item: tuple[str, int, int, list[tuple[int, int]]]) -> None:
        """Writes the files that hold [first, last) of a split, from [(part, position of its first token)]."""
        split, first, last, parts = item
        vocab_size = _load(*self.tokenizer).vocab_size
        tokens, sizes = np.empty(last - first, store.narrowest(vocab_size)), np.empty(last - first, np.uint32)
        for n, start in parts:
            with np.load(io.BytesIO(self.part(n, '.npz').read_bytes())) as part:
                ids, lengths, total = (part[f'{split}/{x}'] for x in ('tokens', 'lengths', 'bytes'))
            a, b = max(first, start), min(last, start + len(ids))
            tokens[a - first : b - first] = ids[a - start : b - start]
            sizes[a - first : b - first] = _spread(lengths, total)[a - start : b - start]
        for name, x in [('tokens', tokens), ('bytes', sizes)]:
            store.open_array(self.directory / split / name)[first:last].write(x).result()


def _spread(lengths, total):
    """The bytes of documents, spread evenly over their targets, so that sums over whole documents are exact."""
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    n, size = np.repeat(lengths, lengths), np.repeat(total, lengths)
    return (place + 1) * size // n - place * size // n


_load = functools.cache(tokenizer.load)  # once per process


def prepare(cfg: DataConfig, part: str, out: epath.PathLike, launcher: Launcher | None = None) -> store.Store:
    """The token store of a source that is no mixture, in `out`: goes on if it is unfinished, does nothing if it is there.

    Args:
      cfg: tokenizer, holdout (0: nothing is held out), text_field, max_bad and cache_dir are those of the store.
      part: the source.
      out: a directory or a bucket.
      launcher: where the work is done; by default, on all cores of this machine.

    Raises:
      DataError: the source cannot be read, or more documents are unusable than cfg.max_bad allows.
      ConfigError: `out` holds another store.
    """
    directory = epath.Path(out).expanduser()
    source, description = describe(cfg, part)
    with _locked(directory):
        with contextlib.suppress(OSError, ValueError, KeyError):
            there = json.loads((directory / 'plan.json').read_text())
            if there['key'] != description['key']:
                other = next(name for name, value in there.items() if name != 'key' and value != description[name])
                raise ConfigError(f'{directory}: holds another store, of which `{other}` differs; choose another directory')
        if not (directory / 'manifest.json').exists():
            _finish(cfg, directory, source, description, launcher or launchers.local())
    return store.Store(directory)


def describe(cfg: DataConfig, part: str) -> tuple[documents.Source, dict]:
    """(a source, what its store is made of: `key` is a hash of all that it depends on)."""
    encoder = tokenizer.of_config(cfg)
    source = documents.open_part(part, cfg.text_field, documents.cache_dir(cfg.cache_dir))
    made_of = {'version': store.VERSION, 'source': part, 'text_field': cfg.text_field, 'holdout': cfg.holdout}
    made_of |= {'tokenizer': cfg.tokenizer, 'tokenizer_hash': encoder.fingerprint}
    made_of |= {'mark': encoder.bos, 'eos': encoder.eos, 'vocab_size': encoder.vocab_size, 'files': source.state}
    return source, {'key': hashlib.sha256(json.dumps(made_of).encode()).hexdigest(), **made_of}


def _finish(cfg, directory, source, description, launcher):
    worker, part = Worker(directory, (cfg.tokenizer, cfg.bos, cfg.eos), cfg.holdout), description['source']
    pieces = source.pieces()
    (directory / 'parts').mkdir(parents=True, exist_ok=True)
    write_json(directory / 'plan.json', description, DataError)
    reports = {int(path.stem): json.loads(path.read_text()) for path in (directory / 'parts').glob('*.json')}
    missing = [n for n in range(len(pieces)) if n not in reports]
    _check(part, reports.values(), cfg.max_bad, finished=False)
    total, done = sum(piece.size for piece in pieces), sum(pieces[n].size for n in reports)
    with _bar(total=total, initial=done, desc=f'Tokenizing {part}', unit='B', unit_scale=True) as bar:
        for i in launcher(worker.tokenize, [(n, pieces[n]) for n in missing]):
            n = missing[i]
            reports[n] = json.loads(worker.part(n, '.json').read_text())
            _check(part, reports.values(), cfg.max_bad, finished=False)
            bar.update(pieces[n].size)
    reports = [reports[n] for n in range(len(pieces))]
    _check(part, reports, cfg.max_bad, finished=True)
    splits, files = _create_arrays(directory, reports, store.narrowest(description['vocab_size']))
    missing = [file for file in files if not _is_written(directory, file)]
    with _bar(total=len(missing), desc=f'Writing {part}', unit='file', disable=len(files) < 8) as bar:
        for _ in launcher(worker.write, missing):
            bar.update()
    manifest = {**description, 'splits': splits, 'unusable': sum(r['unusable'] for r in reports)}
    manifest['listed'] = [line for r in reports for line in r['listed']][:LISTED]
    manifest['digest'] = hashlib.sha256(''.join(r['digest'] for r in reports).encode()).hexdigest()
    if '://' not in str(directory):
        manifest['checksums'] = store.file_checksums(directory)
    write_json(directory / 'manifest.json', manifest, DataError)
    (directory / 'parts').rmtree()


def _create_arrays(directory, reports, dtype):
    """({split: its counts}, [(split, first, last, [(part, position of its first token)])] of the files to write)."""
    splits, files = {}, []
    for split in documents.SPLITS:
        counts = np.array([r['splits'][split] for r in reports], np.int64)
        edges = np.cumsum([0, *counts[:, 1]])
        n = int(edges[-1])
        if not n:
            continue
        splits[split] = dict(zip(('documents', 'tokens', 'bytes'), map(int, counts.sum(0)), strict=True))
        for name, dtype_ in [('tokens', dtype), ('bytes', np.dtype(np.uint32))]:
            store.create(directory / split / name, n, dtype_)
        for first in range(0, n, store.SHARD):
            last = min(first + store.SHARD, n)
            overlap = np.flatnonzero((edges[:-1] < last) & (edges[1:] > first))
            files.append((split, first, last, [(int(i), int(edges[i])) for i in overlap]))
    return splits, files


def _bar(*args, **kw):
    return tqdm(*args, **kw, mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True)


def _is_written(directory, file):
    """Files of an array appear whole or not at all."""
    split, first, _, _ = file
    return all((directory / split / name / 'c' / str(first // store.SHARD)).exists() for name in ('tokens', 'bytes'))


@contextlib.contextmanager
def _locked(directory):
    """Processes of one machine prepare a store one after another."""
    if '://' in str(directory):
        yield
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f'{directory}.lock'):
            yield
    except OSError as e:
        raise DataError(f'{e.filename or directory}: {e.strerror or e}') from e


def _check(part, reports, max_bad, finished):
    """Raises a DataError if more documents are unusable than allowed: a number, or below 1 a share of all."""
    bad, seen = (sum(r[name] for r in reports) for name in ('unusable', 'documents'))
    too_many = bad > max_bad if max_bad == 0 or max_bad >= 1 else finished and bad > max_bad * seen
    if too_many:
        first = next(r['listed'][0] for r in reports if r['listed'])
        raise DataError(f'{first}; {bad} of {seen} documents of {part} are unusable, allowed are {max_bad:g}: to leave such '
                        'documents out, set data.max_bad (--max_bad)')  # fmt: skip
    if finished and bad == seen:
        raise DataError(f'{part}: holds no documents')


# ---- Stores in the cache.


def cached(cfg: DataConfig, part: str) -> store.Store:
    """The token store of a source that is no mixture: the one that `tokens:DIR` names, or one in the cache, made on first use.

    Raises as `prepare` does, and a ConfigError if a store was prepared with another tokenizer. A store in the cache that is
    damaged is made again.
    """
    kind, _, directory = part.partition(':')
    if kind == 'tokens':
        found = store.Store(directory)
        if found.manifest['tokenizer_hash'] != tokenizer.of_config(cfg).fingerprint:
            name = found.manifest['tokenizer']
            raise ConfigError(f'data.tokenizer = {cfg.tokenizer!r}: {directory} was prepared with another one, {name!r}')
        return found
    _, description = describe(cfg, part)
    directory = epath.Path(documents.cache_dir(cfg.cache_dir)) / 'stores' / description['key'][:16]
    with _locked(directory):
        if (directory / 'manifest.json').exists():
            try:
                found = store.Store(directory)
                found.verify()
                return found
            except DataError as e:
                print(f'Warning: {e}. It is in the cache, and made again', file=sys.stderr, flush=True)
                directory.rmtree()
    return prepare(cfg, part, directory)
