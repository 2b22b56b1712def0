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
import hashlib
import json
import sys

import filelock
import numpy as np
from etils import epath

from spark.config import DataConfig
from spark.data import documents, launchers, readers, store, tokenizer
from spark.data.launchers import Launcher
from spark.data.worker import LISTED, Worker
from spark.errors import ConfigError, DamagedStoreError, DataError, SparkError, root_cause
from spark.progress import tqdm
from spark.runtime import in_bucket, path_of, write_json

FEW = 8  # files that are written in this process


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
    directory = path_of(out)
    files, description = describe(cfg, part)
    with _locked(directory):
        _refuse_another(directory, description)
        if not _is_finished(directory):
            try:
                _finish(cfg, directory, files, description, launcher)
            except Exception:
                # Another machine finished it meanwhile, and has deleted the parts.
                if not _is_finished(directory):
                    raise
        with contextlib.suppress(FileNotFoundError):
            (directory / 'parts').rmtree()
    result = store.Store(directory)
    result.verify()
    return _allowed(cfg, part, result)


def _is_finished(directory):
    return (directory / 'manifest.json').exists()


def _allowed(cfg, part, found):
    """The store, if no more documents of its source were unusable than cfg.max_bad allows."""
    bad, good = found.manifest['unusable'], sum(split.documents for split in found.splits.values())
    _Tally(part, cfg.max_bad, bad, bad + good).check(found.manifest['listed'], finished=True)
    return found


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
    if 'manifest.json' not in there and not any((directory / 'parts').glob('*')):
        there.discard('plan.json')  # nothing was made by it
    for name in {'manifest.json', 'plan.json'} & there:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads((directory / name).read_text())
            if found['key'] != description['key']:
                keys = [key for key in description if key not in ('key', 'tokenizer')]
                other = next(key for key in keys if found[key] != description[key])
                files = {tuple(file) for file in found['files']} ^ {tuple(file) for file in description['files']}
                which = f' ({min(files)[0]})' if other == 'files' and files else ''
                raise ConfigError(
                    f'{directory}: holds another store, of which `{other}` differs{which}; remove it, or choose another directory'
                )
            return
    if any(name not in ('plan.json', 'parts') and not name.endswith('.tmp') for name in there):
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
    written = {split: _written(directory / split) for split in splits}
    missing = [shard for shard in shards if str(shard[1] // store.SHARD) not in written[shard[0]]]
    few = len(missing) < FEW
    with (
        _bar(total=len(missing), desc=f'Writing {description["source"]}', unit='file', disable=few) as bar,
        contextlib.closing((launchers.local(1) if few else launcher)(worker.write, missing)) as done,
    ):
        for _ in done:
            bar.update()
    manifest = {**description, 'splits': splits, 'unusable': sum(r['unusable'] for r in reports)}
    manifest['listed'] = [line for r in reports for line in r['listed']][:LISTED]
    manifest['digest'] = hashlib.sha256(''.join(r['digest'] for r in reports).encode()).hexdigest()
    if not in_bucket(directory):
        manifest['checksums'] = store.file_checksums(directory)
    write_json(directory / 'manifest.json', manifest, DataError)


def _tokenized(worker, pieces, tally, launcher):
    """The reports of all pieces, after tokenizing those that have none."""
    there = [int(path.stem) for path in worker.path('').glob('*.json')]
    reports = {n: report for n, report in zip(there, readers.ahead(worker.report, there), strict=True) if report}
    if tally.exceeded(sum(r['unusable'] for r in reports.values()), sum(r['documents'] for r in reports.values())):
        # That is how it ended. What was unusable may be there now.
        reports = {n: report for n, report in reports.items() if not report['unusable']}
    for report in reports.values():
        tally.add(report)
    missing = [n for n in range(len(pieces)) if n not in reports]
    done = sum(pieces[n].size for n in reports)
    with (
        _bar(total=sum(piece.size for piece in pieces), initial=done, desc=f'Tokenizing {tally.part}', unit='B',
             unit_scale=True) as bar,
        contextlib.closing(launcher(worker.tokenize, [(n, pieces[n]) for n in missing])) as new,
    ):  # fmt: skip
        for n, report in readers.ahead(lambda i: (missing[i], worker.report(missing[i])), new):
            reports[n] = report
            tally.add(report)
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


def _bar(*args, desc, **kw):
    short = desc if len(desc) <= 40 else f'{desc[:20]}…{desc[-19:]}'  # the bar itself must fit into a line
    return tqdm(*args, desc=short, **kw)


def _written(split):
    """The names of the files that both arrays of a split have; each appears whole or not at all."""
    names = []
    for array in ('tokens', 'bytes'):
        with contextlib.suppress(FileNotFoundError):
            names.append({path.name for path in (split / array / 'c').iterdir()})
    return names[0] & names[1] if len(names) == 2 else set()


@contextlib.contextmanager
def _locked(directory):
    """Processes of one machine prepare a store one after another. What a filesystem or a bucket raises is a DataError."""
    try:
        if in_bucket(directory):
            yield
            return
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f'{directory}.lock')
        try:
            lock.acquire(timeout=1)
        except filelock.Timeout:
            print(f'Waiting for another process that prepares {directory}', file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except OSError as e:
        raise DataError(f'{e.filename or directory}: {e.strerror or e}') from e
    except Exception as e:
        if in_bucket(directory) and not isinstance(e, SparkError):  # clients of buckets raise exceptions of their own
            raise DataError(f'{directory}: {root_cause(e)}') from e
        raise


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

    def exceeded(self, bad, seen):
        """Are `bad` of `seen` documents too many?"""
        return bad > (self.allowed * seen if 0 < self.allowed < 1 else self.allowed)

    def check(self, listed, finished):
        """Raises a DataError if more documents are unusable than allowed, or if there is no other."""
        # A share is known at the end.
        if self.exceeded(self.bad, self.seen) and (finished or not 0 < self.allowed < 1):
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
                f'{found.manifest["tokenizer"]!r}, BOS {found.mark}, EOS {found.eos}; set data.tokenizer, .bos and .eos'
            )
        found.verify()
        return found
    _, description = describe(cfg, part)
    directory = documents.cache_dir(cfg.cache_dir) / 'stores' / description['key'][:16]
    with contextlib.suppress(DamagedStoreError):  # what is whole can be read where nothing can be written
        if found := _finished(directory):
            return _allowed(cfg, part, found)
    with _locked(directory):
        try:
            _finished(directory)
        except DamagedStoreError as e:
            print(f'Warning: {e}. It is in the cache, and made again', file=sys.stderr, flush=True)
            directory.rmtree()
    return prepare(cfg, part, directory)


def _finished(directory):
    """The store in a directory of the cache, or None. Raises a DamagedStoreError if it is damaged."""
    with readers.reading(str(directory)):
        if not _is_finished(directory):
            return None
    found = store.Store(directory)
    found.verify()
    return found
