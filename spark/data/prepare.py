"""Documents to a token store: pieces of the source are tokenized side by side, then joined to one array per split.

    DIR/plan.json                what the store is made of
    DIR/parts/N-K.npz, N.json    piece N, tokenized, in parts; deleted when the store is finished
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
from spark.data import documents, launchers, readers, store, tokenizer
from spark.data.launchers import Launcher
from spark.errors import ConfigError, DataError, root_cause
from spark.runtime import write_bytes, write_json

LISTED = 100  # unusable documents that the manifest names
FEW = 8  # files that are written in this process


@dataclasses.dataclass(frozen=True)
class Worker:
    """What all workers know."""

    directory: epath.Path
    tokenizer: tuple[str, str, str]  # of DataConfig: tokenizer, bos, eos
    holdout: float

    def path(self, name: str) -> epath.Path:
        """A file of a piece."""
        return self.directory / 'parts' / name

    def tokenize(self, item: tuple[int, documents.Piece]) -> None:
        """Writes piece n: in N-K.npz the ids of each split, and the tokens and bytes of its documents; then N.json."""
        n, piece = item
        report = {'documents': 0, 'unusable': 0, 'listed': [], 'parts': []}
        digest = hashlib.blake2b(digest_size=16)
        for k, batch in enumerate(_batches(piece.documents())):
            bad = [f'{document.place}: {document.why}' for document in batch if document.why]
            texts = {split: [] for split in documents.SPLITS}
            for document in batch:
                if not document.why:
                    texts[piece.split or documents.split_of(document.text, self.holdout)].append(document.text)
            arrays = {f'{split}/{name}': x for split in texts for name, x in self._arrays(texts[split]).items()}
            for array in arrays.values():
                digest.update(array.tobytes())
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            write_bytes(self.path(f'{n:06}-{k}.npz'), buffer.getvalue(), DataError)
            total = lambda name, arrays=arrays: int(arrays[name].sum())
            counts = {s: [len(texts[s]), total(f'{s}/lengths'), total(f'{s}/bytes')] for s in texts}
            report['parts'].append(counts)
            report['documents'] += len(batch)
            report['unusable'] += len(bad)
            report['listed'] += bad[: LISTED - len(report['listed'])]
        write_json(self.path(f'{n:06}.json'), {**report, 'digest': digest.hexdigest()}, DataError)

    def _arrays(self, texts):
        encoder = _load(*self.tokenizer)
        dtype = store.narrowest(encoder.vocab_size)
        ids = encoder.start(texts)
        return {
            'tokens': np.concatenate(ids, dtype=dtype, casting='unsafe') if ids else np.zeros(0, dtype),
            'lengths': np.array([len(x) for x in ids], np.int64),
            'bytes': np.array([len(text.encode()) for text in texts], np.int64),
        }

    def write(self, item: tuple[str, int, int, list[tuple[str, int]]]) -> None:
        """Writes the files that hold [first, last) of a split, from [(file of a part, position of its first token)]."""
        split, first, last, parts = item
        try:
            self._write(split, first, last, parts)
        except Exception as e:  # TensorStore raises a ValueError when the disk is full
            raise DataError(f'{self.directory}: {root_cause(e)}') from e

    def _write(self, split, first, last, parts):
        vocab_size = _load(*self.tokenizer).vocab_size
        tokens, sizes = np.empty(last - first, store.narrowest(vocab_size)), np.empty(last - first, np.uint32)
        for name, start in parts:
            with np.load(io.BytesIO(self.path(name).read_bytes()), allow_pickle=False) as part:
                ids, lengths, total = (part[f'{split}/{x}'] for x in ('tokens', 'lengths', 'bytes'))
            a, b = max(first, start), min(last, start + len(ids))
            tokens[a - first : b - first] = ids[a - start : b - start]
            sizes[a - first : b - first] = _spread(lengths, total)[a - start : b - start]
        for name, x in [('tokens', tokens), ('bytes', sizes)]:
            store.open_array(self.directory / split / name)[first:last].write(x).result()


def _batches(found):
    """Documents in groups of about a piece, so that memory does not grow with the size of a packed file."""
    batch, size = [], 0
    for document in found:
        batch.append(document)
        size += len(document.text)
        if size >= readers.PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _spread(lengths, total):
    """The bytes of documents, spread evenly over their targets, so that sums over whole documents are exact."""
    groups = max(1, min(len(lengths), int(lengths.sum()) >> 15))  # of documents, which fit into a cache
    spread = map(_spread_group, np.array_split(lengths, groups), np.array_split(total, groups))
    return np.concatenate(list(spread))


def _spread_group(lengths, total):
    starts = np.cumsum(lengths) - lengths
    so_far = np.arange(1, lengths.sum() + 1)
    so_far -= np.repeat(starts, lengths)
    so_far *= np.repeat(total, lengths)
    so_far //= np.repeat(lengths, lengths)
    result = np.diff(so_far, prepend=0)
    result[starts] = so_far[starts]
    return result


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
    files, description = describe(cfg, part)
    with _locked(directory):
        _refuse_another(directory, description)
        if not (directory / 'manifest.json').exists():
            _finish(cfg, directory, files, description, launcher)
        if (directory / 'parts').exists():
            (directory / 'parts').rmtree()
    result = store.Store(directory)
    bad, good = result.manifest['unusable'], sum(split.documents for split in result.splits.values())
    _Tally(part, cfg.max_bad, bad, bad + good).check(result.manifest['listed'], finished=True)
    return result


def describe(cfg: DataConfig, part: str) -> tuple[list[documents.File], dict]:
    """(the files of a source, what its store is made of: `key` is a hash of all that it depends on)."""
    encoder = tokenizer.of_config(cfg)
    files = documents.open_part(part, cfg.text_field, cfg.cache_dir)
    made_of = {'version': store.VERSION, 'source': part, 'text_field': cfg.text_field, 'holdout': cfg.holdout}
    made_of |= {'tokenizer_hash': encoder.fingerprint, 'mark': encoder.bos, 'eos': encoder.eos}
    made_of |= {'vocab_size': encoder.vocab_size, 'files': [[file.path, file.size, file.version] for file in files]}
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return files, {'key': key, 'tokenizer': cfg.tokenizer, **made_of}


def _refuse_another(directory, description):
    """Raises a ConfigError if there is something in `directory`, but not the beginning of this store."""
    there = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if 'manifest.json' not in there and not any((directory / 'parts').glob('*.json')):
        there.discard('plan.json')  # nothing was made by it
    for name in {'manifest.json', 'plan.json'} & there:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads((directory / name).read_text())
            if found['key'] != description['key']:
                keys = [key for key in description if key not in ('key', 'tokenizer')]
                other = next(key for key in keys if found[key] != description[key])
                raise ConfigError(
                    f'{directory}: holds another store, of which `{other}` differs; remove it, or choose another directory'
                )
            return
    if there - {'plan.json', 'plan.json.tmp', 'parts'}:
        raise ConfigError(f'{directory}: is not empty, and holds no token store; choose another directory')


def _finish(cfg, directory, files, description, launcher):
    worker = Worker(directory, (cfg.tokenizer, cfg.bos, cfg.eos), cfg.holdout)
    (directory / 'parts').mkdir(parents=True, exist_ok=True)
    write_json(directory / 'plan.json', description, DataError)
    pieces = documents.pieces(files)
    # Starting processes takes longer than to tokenize less than a piece.
    launcher = launcher or launchers.local(1 if sum(piece.size for piece in pieces) < readers.PIECE else 0)
    reports = _tokenized(worker, pieces, _Tally(description['source'], cfg.max_bad), launcher)
    splits, shards = _create_arrays(directory, reports, store.narrowest(description['vocab_size']))
    missing = [shard for shard in shards if not _is_written(directory, shard)]
    few = len(missing) < FEW
    with _bar(total=len(missing), desc=f'Writing {description["source"]}', unit='file', disable=few) as bar:
        for _ in (launchers.local(1) if few else launcher)(worker.write, missing):
            bar.update()
    manifest = {**description, 'splits': splits, 'unusable': sum(r['unusable'] for r in reports)}
    manifest['listed'] = [line for r in reports for line in r['listed']][:LISTED]
    manifest['digest'] = hashlib.sha256(''.join(r['digest'] for r in reports).encode()).hexdigest()
    if '://' not in str(directory):
        manifest['checksums'] = store.file_checksums(directory)
    write_json(directory / 'manifest.json', manifest, DataError)


def _tokenized(worker, pieces, tally, launcher):
    """The reports of all pieces, after tokenizing those that have none."""
    reports = {}
    for path in worker.path('').glob('*.json'):
        with contextlib.suppress(ValueError):  # it was damaged: tokenized again
            reports[int(path.stem)] = json.loads(path.read_text())
    done = sum(pieces[n].size for n in reports)
    with _bar(total=sum(piece.size for piece in pieces), initial=done, desc=f'Tokenizing {tally.part}', unit='B',
              unit_scale=True) as bar:  # fmt: skip
        for report in reports.values():
            tally.add(report)
        missing = [n for n in range(len(pieces)) if n not in reports]
        for i in launcher(worker.tokenize, [(n, pieces[n]) for n in missing]):
            n = missing[i]
            reports[n] = json.loads(worker.path(f'{n:06}.json').read_text())
            tally.add(reports[n])
            bar.update(pieces[n].size)
    reports = [reports[n] for n in range(len(pieces))]
    tally.check([line for report in reports for line in report['listed']][:1], finished=True)
    return reports


def _create_arrays(directory, reports, dtype):
    """({split: its counts}, [(split, first, last, [(file of a part, position of its first token)])] of the shards to write)."""
    names = [f'{n:06}-{k}.npz' for n, report in enumerate(reports) for k in range(len(report['parts']))]
    splits, shards = {}, []
    for split in documents.SPLITS:
        counts = np.array([part[split] for report in reports for part in report['parts']], np.int64)
        edges = np.cumsum([0, *counts[:, 1]])
        n = int(edges[-1])
        if not n:
            continue
        splits[split] = dict(zip(('documents', 'tokens', 'bytes'), map(int, counts.sum(0)), strict=True))
        for name, dtype_ in [('tokens', dtype), ('bytes', np.dtype(np.uint32))]:
            store.create(directory / split / name, n, dtype_)
        for first in range(0, n, store.SHARD):
            last = min(first + store.SHARD, n)
            overlap = range(np.searchsorted(edges, first, 'right') - 1, np.searchsorted(edges, last))
            shards.append((split, first, last, [(names[i], int(edges[i])) for i in overlap if counts[i, 1]]))
    return splits, shards


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


@dataclasses.dataclass
class _Tally:
    """Counts unusable documents."""

    part: str
    allowed: float  # a number, or below 1 a share of all
    bad: int = 0
    seen: int = 0

    def add(self, report):
        self.bad, self.seen = self.bad + report['unusable'], self.seen + report['documents']
        self.check(report['listed'], finished=False)

    def check(self, listed, finished):
        """Raises a DataError if more documents are unusable than allowed, or if there is no other."""
        of_all = 0 < self.allowed < 1
        if self.bad > (self.allowed * self.seen if of_all else self.allowed) and (finished or not of_all):
            raise DataError(
                f'{listed[0]}; {self.bad} of {self.seen} documents of {self.part} are unusable, allowed are {self.allowed:g}: '
                'to leave such documents out, set data.max_bad (--max_bad)'
            )
        if finished and self.bad == self.seen:
            raise DataError(f'{self.part}: holds no documents')


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
            raise ConfigError(
                f'data.tokenizer = {cfg.tokenizer!r}: {directory} was prepared with another one, or with other special tokens: '
                f'{found.manifest["tokenizer"]!r}, mark {found.mark}, EOS {found.eos}'
            )
        found.verify()
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
