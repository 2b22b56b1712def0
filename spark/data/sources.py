"""Sources of documents, chosen by one string: the embedded corpus, text files, TFDS, ArrayRecord, mixtures.

    stdlib                     the Python standard library's source
    text:GLOB                  .txt, .jsonl ({"text": …} per line), and .gz of both
    tfds:NAME[/CONFIG]         a prepared TFDS data set with a text feature (TFDS_DATA_DIR says where)
    array_record:GLOB          ArrayRecord files of UTF-8 records
    0.7 stdlib + 0.3 text:…    a mixture: documents are drawn in these proportions

Sources without splits of their own hold out documents by a fixed permutation of their indices. A TFDS data set that has only
one of validation and test uses it for both. Whatever cannot be read or decoded raises a DataError that names the file and the
place in it.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import pathlib
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence

import filelock
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource
from tqdm import tqdm

from spark.config import DataConfig
from spark.errors import ConfigError, DataError

PIECE = 64 * 1024  # bytes; a longer .txt file becomes several documents, cut at line ends
KINDS = "stdlib, text:GLOB, tfds:NAME, array_record:GLOB, or a mixture such as '0.7 stdlib + 0.3 text:GLOB'"


@dataclasses.dataclass(frozen=True)
class Documents(Sequence):
    """A random-access sequence of texts. Item i is `read(indices[i])`, decoded; a DataError names a record that is unusable."""

    name: str
    indices: Sequence[int] | np.ndarray
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> str:
        index = int(self.indices[i])
        try:
            record = self.read(index)
        except Exception as e:
            raise DataError(f'{self.name}: record {index} cannot be read: {e}') from e
        try:
            text = record.decode('utf-8')
        except UnicodeDecodeError as e:
            raise DataError(f'{self.name}: record {index} is not UTF-8: {e}') from e
        if not text:
            raise DataError(f'{self.name}: record {index} is empty')
        return text


def parse(source: str) -> list[tuple[float, str]]:
    """[(weight, part)] of a source string, with relative weights. Raises a ConfigError if it is malformed."""
    parts = []
    for part in source.split(' + '):
        weighted = re.fullmatch(r'\s*(?:(\d+(?:\.\d+)?(?:e-?\d+)?)\s+)?(\S.*?)\s*', part)
        weight, name = (weighted[1], weighted[2]) if weighted else (None, '')
        kind, _, rest = name.partition(':')
        if not (name == 'stdlib' or (kind in ('text', 'tfds', 'array_record') and rest)):
            raise ConfigError(f'data.source = {source!r}: {name or part!r} is not a source; want {KINDS}')
        parts.append((float(weight or 1), name))
        if parts[-1][0] <= 0:
            raise ConfigError(f'data.source = {source!r}: the weight of {name!r} must be above 0')
    return parts


def open_source(
    source: str, split: str, cfg: DataConfig, held_out_source: bool = False
) -> list[tuple[float, Documents]]:
    """[(weight, Documents)] of a split, 'train', 'validation' or 'test', of a source string.

    `held_out_source`: the source is for evaluation only, so if it has no splits, all of it is used.
    """
    return [(weight, _open_part(part, split, cfg, held_out_source)) for weight, part in parse(source)]


def cache_dir(cfg: DataConfig) -> pathlib.Path:
    """The directory of prepared corpora."""
    home = cfg.cache_dir or os.environ.get('SPARK_CACHE') or '~/.cache/spark'
    return pathlib.Path(home).expanduser()


def _open_part(part, split, cfg, held_out_source):
    if part == 'stdlib':
        return _tfds(part, _stdlib_builder(cfg), split)
    kind, _, rest = part.partition(':')
    if kind == 'tfds':
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(rest)
        except Exception as e:
            raise DataError(f'{part}: {e}') from e
        return _tfds(part, builder, split)
    files = sorted(pathlib.Path(f) for f in glob.glob(os.path.expanduser(rest), recursive=True) if os.path.isfile(f))
    if not files:
        raise DataError(f'{part}: no file matches')
    if kind == 'text':
        files = [_prepare_text(part, files, cache_dir(cfg))]
    try:
        records = ArrayRecordDataSource([str(f) for f in files])
        n = len(records)
    except Exception as e:
        raise DataError(f'{part}: cannot be read as ArrayRecord: {e}') from e
    if not n:
        raise DataError(f'{part}: holds no records')
    whole = held_out_source or (split == 'train' and bool(cfg.eval_source))
    indices = range(n) if whole else _split(part, n, split, cfg.holdout)
    return Documents(part, indices, lambda i: bytes(records[i]))


def _split(part, n, split, holdout):
    m = max(1, round(holdout * n))
    if n < 3:
        raise DataError(f'{part}: {n} document(s) cannot be split into train, validation and test; set data.eval_source')
    order = np.random.default_rng(0).permutation(n)
    chosen = {'test': order[:m], 'validation': order[m : 2 * m], 'train': order[2 * m :]}[split]
    return np.sort(chosen)


def _stdlib_builder(cfg):
    from spark.data.stdlib_corpus.stdlib_corpus_dataset_builder import Builder

    home = cache_dir(cfg)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(home / 'stdlib.lock'):
            # Inside the lock, since the constructor looks for what is prepared.
            builder = Builder(data_dir=str(home), file_format='array_record')
            builder.download_and_prepare()
    except (OSError, UnicodeError, SyntaxError) as e:
        raise DataError(f'stdlib: cannot be prepared in {home}: {e}') from e
    return builder


def _tfds(part, builder, split):
    splits = dict(builder.info.splits)
    if not splits:
        raise DataError(f'{part}: not prepared in {builder.data_path}; prepare it with `tfds build`, file format array_record')
    # Many data sets have only one held-out split.
    other = {'validation': 'test', 'test': 'validation'}.get(split)
    found = next((s for s in (split, other) if s in splits and splits[s].num_examples), None)
    if found is None:
        raise DataError(f'{part}: no split {split!r}, only {", ".join(splits)}; set data.eval_source')
    try:
        records = builder.as_data_source(found)
    except Exception as e:
        raise DataError(f'{part}: {e}') from e
    texts = [name for name, feature in builder.info.features.items() if type(feature).__name__ == 'Text']
    if 'text' not in texts and len(texts) != 1:
        raise DataError(f'{part}: want a feature `text`, or a single one of type Text; it has {texts or "none"}')
    feature = 'text' if 'text' in texts else texts[0]

    def read(i):
        text = records[i][feature]
        return text.encode() if isinstance(text, str) else text

    return Documents(part, range(len(records)), read)


def _prepare_text(part, files, home):
    """Converts text files to one ArrayRecord file in the cache, and checks them; once, until a file changes."""
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([PIECE, state]).encode()).hexdigest()[:16]
    path = home / 'text' / f'{key}.array_record'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f'{path}.lock'):
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                    unfinished = pathlib.Path(scratch) / 'records'
                    writer = ArrayRecordWriter(str(unfinished), 'group_size:1')
                    try:
                        for file in tqdm(files, desc=f'Preparing {part}', unit='file', disable=len(files) < 50):
                            for document in _read_text(file):
                                writer.write(document)
                    finally:
                        writer.close()
                    unfinished.rename(path)
    except OSError as e:
        raise DataError(f'{part}: {e.filename or home}: {e.strerror or e}') from e
    return path


def _read_text(file):
    """Yields the documents of one file as UTF-8 bytes."""
    suffixes = file.suffixes[-2:]
    zipped = suffixes[-1:] == ['.gz']
    kind = (suffixes[:-1] if zipped else suffixes)[-1:]
    if kind not in (['.txt'], ['.jsonl']):
        raise DataError(f'{file}: want .txt, .jsonl, .txt.gz or .jsonl.gz')
    documents = 0
    try:
        with (gzip.open if zipped else open)(file, 'rb') as f:
            for document in _jsonl(file, f) if kind == ['.jsonl'] else _pieces(file, f):
                yield document
                documents += 1
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f'{file}: {getattr(e, "strerror", None) or e}') from e
    if not documents:
        raise DataError(f'{file}: is empty')


def _jsonl(file, lines):
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)['text']
            if not (isinstance(text, str) and text):
                raise TypeError
            document = text.encode('utf-8')
        except (ValueError, TypeError, KeyError):
            raise DataError(f'{file}:{number}: want a JSON object in UTF-8 with a non-empty string "text"') from None
        yield document


def _pieces(file, f):
    """Yields the pieces of a .txt file, cut at line ends where possible."""
    rest, offset = b'', 0
    while block := f.read(PIECE):
        rest += block
        while len(rest) > PIECE:
            cut = rest.rfind(b'\n', 0, PIECE) + 1 or PIECE
            while cut < len(rest) and rest[cut] & 0xC0 == 0x80 and cut > PIECE - 4:  # inside a character
                cut -= 1
            yield _checked(file, rest[:cut], offset)
            rest, offset = rest[cut:], offset + cut
    if rest:
        yield _checked(file, rest, offset)


def _checked(file, piece, offset):
    try:
        piece.decode('utf-8')
    except UnicodeDecodeError as e:
        raise DataError(f'{file}: byte {offset + e.start} is not UTF-8 ({e.reason})') from None
    return piece
