"""Sources of documents, chosen by one string.

    stdlib                     the Python standard library's source
    text:GLOB                  .txt, .jsonl, .parquet; the first two also as .gz and .zst
    jsonl:GLOB, parquet:GLOB   the same, whatever the files are called
    tfds:NAME[/CONFIG]         a prepared TFDS data set, or its directory; files in ArrayRecord format
    array_record:GLOB          ArrayRecord files of UTF-8 records
    hf:NAME[:CONFIG]           a Hugging Face data set, or a folder of one
    tokens:DIR                 a token store, as scripts/prepare.py leaves it
    0.7 stdlib + 0.3 text:…    a mixture: tokens are drawn in these proportions
    MIXTURE until 1000, MIXTURE until 5000, MIXTURE
                               mixtures that change after these steps

A GLOB may be local or on any filesystem that fsspec knows (gs://, s3://, …). A source is cut into pieces, each of which one
worker reads at once. Which pieces there are depends on the source alone.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import pathlib
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import filelock
import fsspec
import pyarrow.parquet
from fsspec.core import url_to_fs

from spark.config import DataConfig
from spark.errors import ConfigError, DataError

PIECE = 16 << 20  # bytes that a worker reads at once
DOCUMENT = 64 << 10  # bytes; a longer .txt file becomes several documents, cut at line ends
SPLITS = ('train', 'validation', 'test')
KINDS = (
    'stdlib, text:GLOB, jsonl:GLOB, parquet:GLOB, tfds:NAME, array_record:GLOB, hf:NAME, tokens:DIR, '
    "or a mixture such as '0.7 stdlib + 0.3 text:GLOB'"
)
ZIPPED = {'.gz': 'gzip', '.zst': 'zstd'}


class Document(NamedTuple):
    """A text and where it stands; or, if it is unusable, why."""

    place: str
    text: str = ''
    why: str = ''


class Span(NamedTuple):
    """A part of a file: bytes of text, records or row groups; `stop` = None: to the end."""

    file: str
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one worker reads at once: spans of files of one format, which belong to one split of the source if that has splits."""

    format: str
    spans: tuple[Span, ...]
    field: str
    size: int  # in bytes, about
    split: str | None = None

    def documents(self) -> Iterator[Document]:
        """The documents in order, unusable ones included."""
        for span in self.spans:
            found = False
            try:
                for document in READERS[self.format](span, self.field):
                    found = True
                    yield document
            except DataError:
                raise
            except Exception as e:  # whatever a decoder raises; the rest of the span is lost
                found = True
                yield Document(span.file, why=f'cannot be read: {getattr(e, "strerror", None) or e}')
            if not found and not span.start:
                yield Document(span.file, why='is empty')


class Phase(NamedTuple):
    """A mixture: the weight of each part, by name; up to a step (None: to the end)."""

    weights: dict[str, float]
    until: int | None


def parse(source: str) -> list[Phase]:
    """The phases of a source string. Raises a ConfigError if it is malformed."""
    words = re.split(r'\s+until\s+(\d+)\s*,\s*', source)
    ends = [int(n) for n in words[1::2]]
    if ends != sorted(set(ends)) or 0 in ends:
        raise ConfigError(f'data.source = {source!r}: want growing steps after `until`')
    return [Phase(_weights(source, mixture), until) for mixture, until in zip(words[::2], [*ends, None], strict=True)]


def _weights(source, mixture):
    weights = {}
    for part in mixture.split(' + '):
        weighted = re.fullmatch(r'\s*(?:(\d+(?:\.\d+)?(?:e-?\d+)?)\s+)?(\S.*?)\s*', part)
        weight, name = (float(weighted[1] or 1), weighted[2]) if weighted else (1.0, '')
        kind, _, rest = name.partition(':')
        if not (name == 'stdlib' or (kind in (*FILES, 'tfds', 'hf', 'tokens') and rest)):
            raise ConfigError(f'data.source = {source!r}: {name or part!r} is not a source; want {KINDS}')
        if weight <= 0:
            raise ConfigError(f'data.source = {source!r}: the weight of {name!r} must be above 0')
        if name in weights:
            raise ConfigError(f'data.source = {source!r}: names {name!r} twice')
        weights[name] = weight
    return weights


class Source(NamedTuple):
    """A source that is no mixture."""

    files: list[tuple[str | None, str, str, str]]  # (split, format, file, field); without splits of its own the first is None
    state: list[list]  # [file, size, version] of each of them

    def pieces(self) -> list[Piece]:
        """The pieces: long files are cut, short ones of one kind grouped."""
        result, group = [], []
        for (split, format, file, field), (_, size, _) in zip(self.files, self.state, strict=True):
            for span, n in _cut(format, file, size):
                kind = format, field, split
                if group and (kind != group[0][0] or sum(n for *_, n in group) + n > PIECE):
                    result.append(_piece(group))
                    group = []
                group.append((kind, span, n))
        return [*result, _piece(group)]


def _piece(group):
    (format, field, split), _, _ = group[0]
    return Piece(format, tuple(span for _, span, _ in group), field, sum(n for *_, n in group), split)


def open_part(part: str, field: str = 'text', cache: pathlib.Path | None = None) -> Source:
    """The files of a source that is no mixture.

    `field` names the text in records that have several fields; `cache` is where the embedded corpus is kept. Raises a DataError
    if nothing is there, or if it is of a format that cannot be read.
    """
    kind, _, rest = part.partition(':')
    with _named(part):
        if part == 'stdlib':
            files = _tfds_files(part, _stdlib_builder(cache), field)
        elif kind == 'tfds':
            files = _tfds_files(part, _tfds_builder(part, rest), field)
        elif kind == 'hf':
            return _hf_source(part, rest, field)
        else:
            files = [(None, _format(kind, file), file, field) for file in list_files(part, rest)]
        return Source(files, [_state(file) for _, _, file, _ in files])


def list_files(part: str, pattern: str) -> list[str]:
    """The files that match a glob, sorted: local paths, or URLs."""
    if '://' not in pattern:
        files = filter(os.path.isfile, glob.glob(os.path.expanduser(pattern), recursive=True))
        found = sorted(map(os.path.abspath, files))
    else:
        fs, path = url_to_fs(pattern)
        found = sorted(fs.unstrip_protocol(f) for f, info in fs.glob(path, detail=True).items() if info['type'] == 'file')
    if not found:
        raise DataError(f'{part}: no file matches')
    return found


def cache_dir(path: str = '') -> pathlib.Path:
    """Where prepared data is kept: `path`, $SPARK_CACHE or ~/.cache/spark."""
    return pathlib.Path(path or os.environ.get('SPARK_CACHE') or '~/.cache/spark').expanduser()


@contextlib.contextmanager
def local_copy(file: str) -> Iterator[str]:
    """The path of a file for libraries that open only local ones; a remote file is downloaded and deleted afterwards."""
    if '://' not in file:
        yield file
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, os.path.basename(file))
        fs, remote = url_to_fs(file)
        fs.get_file(remote, path)
        yield path


@contextlib.contextmanager
def _named(part):
    """Turns what filesystems raise into a DataError that names the source."""
    try:
        yield
    except (OSError, ImportError, ValueError, RuntimeError) as e:
        where = getattr(e, 'filename', None)
        raise DataError(f'{part}: {f"{where}: " if where else ""}{getattr(e, "strerror", None) or e}') from e


def _state(file):
    """[file, size, what changes when the file is written anew]."""
    fs, path = url_to_fs(file)
    info = fs.info(path)
    names = ('generation', 'md5Hash', 'ETag', 'etag', 'content_md5', 'mtime', 'LastModified', 'updated', 'created')
    return [file, info['size'], next((str(info[name]) for name in names if info.get(name)), '')]


def _format(kind, file):
    """The format of a file: a key of READERS."""
    if kind == 'array_record':
        return kind
    name, _, zipped = file.rpartition('.')
    plain = name if f'.{zipped}' in ZIPPED else file
    found = kind if kind != 'text' else {'.txt': 'text', '.jsonl': 'jsonl', '.parquet': 'parquet'}.get(os.path.splitext(plain)[1])
    if found is None or (found == 'parquet' and plain != file):
        raise DataError(f'{file}: want .txt, .jsonl or .parquet, or .gz or .zst of the first two')
    return found


def _cut(format, file, size):
    """[(span, its size in bytes)] of a file."""
    n = -(-size // PIECE)
    if format == 'hf':
        name, split = file.rsplit('#', 1)
        items = len(_hf_dataset(name)[split])
    elif n <= 1 or (format in ('text', 'jsonl') and os.path.splitext(file)[1] in ZIPPED):
        return [(Span(file), size)]
    elif format in ('text', 'jsonl'):
        items = size
    elif format == 'parquet':
        with _open(file) as f:
            items = pyarrow.parquet.ParquetFile(f).num_row_groups
    else:
        with _records(file) as records:
            items = len(records)
    n = max(1, min(n, items))
    edges = [items * i // n for i in range(n + 1)]
    return [(Span(file, a, b), size // n) for a, b in itertools.pairwise(edges)]


# ---- Readers: each yields the documents of a span.


def _open(file):
    return fsspec.open(file, 'rb', compression=ZIPPED.get(os.path.splitext(file)[1])).open()


def _bounds(f, span):
    """The bytes [first, last) of the lines that start in a span, and `f` at the first; last is None for the end of the file."""

    def line_start(n):
        if n:
            f.seek(n - 1)
            f.readline()
        return n and f.tell()

    last = span.stop and line_start(span.stop)
    first = line_start(span.start)
    if span.start or span.stop:
        f.seek(first)
    return first, last


def _read_jsonl(span, field):
    with _open(span.file) as f:
        offset, last = _bounds(f, span)
        for number, line in enumerate(f, 1):
            if last is not None and offset >= last:
                return
            place = f'{span.file}: byte {offset}' if span.start else f'{span.file}:{number}'
            offset += len(line)
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
                if not (isinstance(text, str) and text.encode()):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                yield Document(place, why=f'want a JSON object in UTF-8 with a non-empty string "{field}"')
                continue
            yield Document(place, text)


def _read_text(span, field):
    """Cuts a text at line ends; a longer line is cut between characters."""
    del field
    with _open(span.file) as f:
        offset, last = _bounds(f, span)
        rest = b''
        while block := f.read(DOCUMENT if last is None else min(DOCUMENT, last - offset - len(rest))):
            rest += block
            while len(rest) > DOCUMENT:
                cut = rest.rfind(b'\n', 0, DOCUMENT) + 1 or DOCUMENT
                while rest[cut] & 0xC0 == 0x80 and cut > DOCUMENT - 4:  # inside a character
                    cut -= 1
                yield _decoded(span.file, rest[:cut], offset)
                rest, offset = rest[cut:], offset + cut
        if rest:
            yield _decoded(span.file, rest, offset)


def _decoded(file, data, offset):
    try:
        return Document(f'{file}: byte {offset}', data.decode())
    except UnicodeDecodeError as e:
        return Document(f'{file}', why=f'byte {offset + e.start} is not UTF-8 ({e.reason})')


def _read_parquet(span, field):
    with _open(span.file) as f:
        table = pyarrow.parquet.ParquetFile(f)
        if field not in table.schema_arrow.names:
            raise DataError(f'{span.file}: has no column {field!r}; it has {", ".join(table.schema_arrow.names)}')
        for group in range(span.start, table.num_row_groups if span.stop is None else span.stop):
            batches = table.iter_batches(row_groups=[group], columns=[field], batch_size=1000)
            for row, text in enumerate(itertools.chain.from_iterable(b.column(0).to_pylist() for b in batches)):
                yield _checked(f'{span.file}: row {row} of group {group}', text)


@contextlib.contextmanager
def _records(file):
    from grain.sources import ArrayRecordDataSource

    with local_copy(file) as path:
        try:
            records = ArrayRecordDataSource([path])
            n = len(records)
        except Exception as e:
            raise OSError(f'cannot be read as ArrayRecord: {e}') from e
        del n
        yield records


def _read_records(span, field, decode: Callable[[bytes], Any] = bytes):
    del field
    with _records(span.file) as records:
        for i in range(span.start, len(records) if span.stop is None else span.stop):
            try:
                text = decode(records[i])
            except Exception as e:
                yield Document(f'{span.file}: record {i}', why=f'cannot be read: {e}')
                continue
            yield _checked(f'{span.file}: record {i}', text)


def _read_tfds(span, field):
    """Records that hold tf.Example messages; `field` is (directory of the data set, feature)."""
    import tensorflow_datasets as tfds

    directory, feature = field.rsplit('#', 1)
    features = _builder_from(tfds, directory).info.features
    return _read_records(span, field, lambda record: features.deserialize_example_np(record)[feature])


@functools.cache
def _builder_from(tfds, directory):
    return tfds.builder_from_directory(directory)


def _read_hf(span, field):
    """Examples of a Hugging Face data set; the file of the span is `NAME[:CONFIG]#SPLIT`."""
    name, split = span.file.rsplit('#', 1)
    rows = _hf_dataset(name)[split].select_columns([field]).select(range(span.start, span.stop))
    for i, row in enumerate(rows, span.start):
        yield _checked(f'hf:{name}: {split} {i}', row[field])


def _checked(place, text):
    """The document of a record, which may be bytes."""
    try:
        text = text if isinstance(text, str) else bytes(text or b'').decode()
        text.encode()
    except UnicodeError as e:
        return Document(place, why=f'is not UTF-8: {e}')
    return Document(place, text) if text else Document(place, why='is empty')


READERS = {
    'text': _read_text,
    'jsonl': _read_jsonl,
    'parquet': _read_parquet,
    'array_record': _read_records,
    'tfds': _read_tfds,
    'hf': _read_hf,
}
FILES = ('text', 'jsonl', 'parquet', 'array_record')  # formats that a glob names


# ---- Data sets that know their splits.


def _stdlib_builder(cache):
    from spark.data.stdlib_corpus.stdlib_corpus_dataset_builder import Builder

    home = cache_dir(cache)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(home / 'stdlib.lock'):
            # Inside the lock, since the constructor looks for what is prepared.
            builder = Builder(data_dir=str(home), file_format='array_record')
            builder.download_and_prepare()
    except (OSError, UnicodeError, SyntaxError) as e:
        raise DataError(f'stdlib: cannot be prepared in {home}: {e}') from e
    return builder


def _tfds_builder(part, name):
    import tensorflow_datasets as tfds

    try:
        directory = os.path.expanduser(name)
        is_directory = '://' in name or os.path.isdir(directory)
        return tfds.builder_from_directory(directory) if is_directory else tfds.builder(name)
    except Exception as e:
        message = ' '.join(str(e).split())
        raise DataError(f'{part}: {message[:200]}{" …" * (len(message) > 200)}') from e


def _tfds_files(part, builder, field):
    """[(split, format, file, field)] of the files of a TFDS data set."""
    directory, info = str(builder.data_path), builder.info
    splits = {name: split for name, split in info.splits.items() if name in SPLITS and split.num_examples}
    if not splits:
        raise DataError(f'{part}: not prepared in {directory}; prepare it with `tfds build --file_format=array_record`')
    if info.file_format.value != 'array_record':
        raise DataError(
            f'{part}: its files are {info.file_format.value}; convert them with `tfds build --file_format=array_record`, or '
            f'python -m tensorflow_datasets.scripts.convert_format --dataset_dir={directory} --out_file_format=array_record'
        )
    texts = [name for name, feature in info.features.items() if type(feature).__name__ == 'Text']
    if field not in texts and len(texts) != 1:
        raise DataError(f'{part}: want a feature `{field}`, or a single one of type Text; it has {texts or "none"}')
    feature = field if field in texts else texts[0]
    files = [(split, file) for split, info in splits.items() for file in sorted(map(str, info.filepaths))]
    return [(split, 'tfds', file, f'{directory}#{feature}') for split, file in files]


def _hf_source(part, name, field):
    files, state = [], []
    data = _hf_dataset(name)
    has_splits = len(data) > 1
    for split, rows in data.items():
        if field not in rows.column_names:
            raise DataError(f'{part}: has no column {field!r}; it has {", ".join(rows.column_names)}')
        if len(rows) and (split in SPLITS or not has_splits):
            files.append((split if has_splits else None, 'hf', f'{name}#{split}', field))
            state.append([files[-1][2], rows.data.nbytes, rows._fingerprint])
    if not files:
        raise DataError(f'{part}: holds no documents in the splits {", ".join(SPLITS)}; it has {", ".join(data) or "none"}')
    return Source(files, state)


@functools.cache
def _hf_dataset(name):
    """A dict of the splits of a Hugging Face data set: one of the hub, or a folder."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"hf:{name}: needs pip install 'spark-transformer[hf]'") from None
    name, _, config = name.partition(':')
    folder = os.path.expanduser(name)
    saved = any(os.path.exists(os.path.join(folder, f)) for f in ('dataset_dict.json', 'state.json'))
    try:
        found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(folder, config or None)
    except Exception as e:
        raise DataError(f'hf:{name}: {" ".join(str(e).split())[:300]}') from e
    return found if isinstance(found, dict) else {'train': found}


def texts(source: str, split: str, cfg: DataConfig) -> Iterator[str]:
    """The documents of a split of a source, one part after another. Raises a DataError at the first unusable one."""
    for part in dict.fromkeys(name for phase in parse(source) for name in phase.weights):
        for piece in open_part(part, cfg.text_field, cache_dir(cfg.cache_dir)).pieces():
            for document in piece.documents() if piece.split in (None, split) else ():
                if document.why:
                    raise DataError(f'{document.place}: {document.why}')
                if piece.split or split_of(document.text, cfg.holdout) == split:
                    yield document.text


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') / 2**64


def split_of(text: str, holdout: float) -> str:
    """The split of a document in a source without splits: `holdout` of the documents are for validation, and as many for test."""
    x = share(text)
    return 'test' if x < holdout else 'validation' if x < 2 * holdout else 'train'


def gzip_size(texts: Iterable[str]) -> int:
    """Bytes of the concatenated texts after `gzip -9`."""
    stream = zlib.compressobj(9, wbits=31)
    return sum(len(stream.compress(text.encode())) for text in texts) + len(stream.flush())
