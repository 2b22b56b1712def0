"""Readers of files: each yields the documents of a span, and says why one is unusable.

Unusable is what cannot be decoded. A file that cannot be read, since a disk or a server fails, ends the work instead: it may be
read later.
"""

import collections
import concurrent.futures
import contextlib
import functools
import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import fsspec
import pyarrow
import pyarrow.parquet
from fsspec.core import url_to_fs

from spark.errors import DataError, SparkError, UnreadableError
from spark.runtime import in_bucket, path_of
from spark.storage import Verdict, verdict

PIECE = 16 << 20  # bytes that a worker reads at once
DOCUMENT = 64 << 10  # bytes; a longer .txt file becomes several documents. Divides PIECE
CONTINUATION = bytes(range(0x80, 0xC0))  # of a character in UTF-8
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


def read(format: str, span: Span, field: str) -> Iterator[Document]:
    """The documents of a span in order, unusable ones included; `field` names the text in records that have several fields.

    Raises a DataError if the file cannot be read.
    """
    empty = span == Span(span.file)
    try:
        for document in READERS[format](span, field):
            empty = False
            yield document
    except (SparkError, MemoryError):
        raise
    except Exception as e:  # whatever a decoder raises; the rest of the span is lost
        if getattr(e, 'errno', None):  # it comes from the system
            raise DataError(f'{span.file}: cannot be read: {e.strerror}') from e
        empty = False
        yield Document(span.file, why=f'cannot be read: {e}')
    if empty:
        yield Document(span.file, why='is empty')


def cut(format: str, file: str, size: int) -> list[tuple[Span, int]]:
    """[(span, its size in bytes)] of a file of `size` bytes: pieces of a long one that can be read from the middle."""
    n = -(-size // PIECE)
    text, whole = format in ('text', 'jsonl'), [(Span(file), size)]
    if format == 'hf':
        name, split = file.rsplit('#', 1)
        items = len(hf_dataset(name)[split])
    elif n <= 1 or (text and os.path.splitext(file)[1] in ZIPPED):
        return whole
    elif text:
        return [(Span(file, a, min(a + PIECE, size)), min(PIECE, size - a)) for a in range(0, size, PIECE)]
    elif format == 'parquet':
        with open_file(file) as f:
            items = pyarrow.parquet.ParquetFile(f).num_row_groups
    elif in_bucket(file):  # each span would download it
        return whole
    else:
        with _records(file) as records:
            items = len(records)
    n = max(1, min(n, items))
    edges = [items * i // n for i in range(n + 1)]
    return [(Span(file, a, b), size // n) for a, b in itertools.pairwise(edges)]


def ahead(function: Callable[[Any], Any], items: Iterable[Any], threads: int = 32) -> Iterator[Any]:
    """Like map, in threads: what is waiting for a disk or a bucket does not wait for each other."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            while waiting and (len(waiting) >= threads or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    """Turns what filesystems and the clients of buckets raise into an error that names the file.

    An UnreadableError if storage does not answer, else a DataError.
    """
    try:
        yield
    except SparkError:
        raise
    except Exception as e:
        kind = UnreadableError if verdict(e) is Verdict.PASSES else DataError
        raise kind(f'{file}: cannot be read: {getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"}') from e


class _File(io.RawIOBase):
    """A file whose errors name it. So they differ from those of what unpacks and decodes it."""

    def __init__(self, file: str):
        self._name = file
        with reading(file):
            self._file = fsspec.open(file, 'rb').open() if in_bucket(file) else open(file, 'rb', buffering=0)

    def readinto(self, buffer) -> int:
        with reading(self._name):
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        with reading(self._name):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed and hasattr(self, '_file'):
            self._file.close()
        super().close()


@contextlib.contextmanager
def open_file(file: str) -> Iterator[io.BufferedReader]:
    """The bytes of a file, local or remote, unpacked.

    Raises a DataError if the file cannot be read; an OSError if it cannot be unpacked, or ends in the middle of its packed data.
    """
    codec = ZIPPED.get(os.path.splitext(file)[1])
    with io.BufferedReader(_File(file), 1 << 20) as f:
        if not codec:
            yield f
            return
        with io.BufferedReader(pyarrow.CompressedInputStream(f, codec), 1 << 12) as unpacked:
            yield unpacked


@contextlib.contextmanager
def local_copy(file: str) -> Iterator[str]:
    """The path of a file for libraries that open only local ones; a remote file is downloaded and deleted afterwards."""
    if not in_bucket(file):
        yield file
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, os.path.basename(file))
        with reading(file):
            fs, remote = url_to_fs(file)
            fs.get_file(remote, path)
        yield path


def _read_text(span, field):
    """The document of a block of DOCUMENT bytes starts at its first line start; without one, at its first character.

    So where documents start does not depend on the span, nor on how the file is packed.
    """
    del field
    with open_file(span.file) as f:
        if span.start:
            f.seek(span.start)
        document, offset = b'', span.start
        for start in itertools.count(span.start, DOCUMENT):
            block = f.read(DOCUMENT)
            cut = _first_start(block) if start else 0
            if start > span.start and (document := document + block[:cut]):
                yield _decoded(span.file, document, offset)
            if not block or start == span.stop:
                return
            document, offset = block[cut:], start + cut


def _first_start(block):
    return block.find(b'\n') + 1 or len(block) - len(block.lstrip(CONTINUATION))


def _decoded(file, data, offset):
    try:
        return Document(f'{file}: byte {offset}', data.decode())
    except UnicodeDecodeError as e:
        return Document(file, why=f'byte {offset + e.start} is not UTF-8 ({e.reason})')


def _read_jsonl(span, field):
    """The objects in the lines that start in a span; blank lines are nothing."""
    with open_file(span.file) as f:
        offset = 0
        if span.start:
            f.seek(span.start - 1)
            offset = span.start - 1 + len(f.readline())
        for number, line in enumerate(f, 1):
            if span.stop is not None and offset >= span.stop:
                return
            place = f'{span.file}: byte {offset}' if span.start else f'{span.file}:{number}'
            offset += len(line)
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
                if not (isinstance(text, str) and text.encode()):
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                yield Document(place, why=f'want a JSON object in UTF-8 with a non-empty string "{field}"')
                continue
            yield Document(place, text)


def _read_parquet(span, field):
    with open_file(span.file) as f:
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
        _File(path).close()  # which tells a file that cannot be read from one that is damaged
        try:
            records = ArrayRecordDataSource([path])
            len(records)  # opens it
        except Exception as e:
            raise OSError(f'cannot be read as ArrayRecord: {e}') from e
        yield records


def _read_records(span, field, decode: Callable[[bytes], Any] = bytes):
    del field
    with _records(span.file) as records:
        for i in range(span.start, len(records) if span.stop is None else span.stop):
            place = f'{span.file}: record {i}'
            try:
                text = decode(records[i])
            except Exception as e:
                if getattr(e, 'errno', None):
                    raise
                yield Document(place, why=f'cannot be read: {e}')
                continue
            yield _checked(place, text)


def _read_tfds(span, field):
    """Records that hold tf.Example messages; `field` is `DIRECTORY OF THE DATA SET#FEATURE`."""
    directory, feature = field.rsplit('#', 1)
    features = _tfds_features(directory)
    return _read_records(span, field, lambda record: features.deserialize_example_np(record)[feature])


@functools.cache
def _tfds_features(directory):
    import tensorflow_datasets as tfds

    with reading(directory):
        return tfds.builder_from_directory(directory).info.features


def _read_hf(span, field):
    """Examples of a Hugging Face data set; the file of the span is `NAME[:CONFIG]#SPLIT`."""
    name, split = span.file.rsplit('#', 1)
    rows = hf_dataset(name)[split].select_columns([field]).select(range(span.start, span.stop))
    texts = itertools.chain.from_iterable(batch[field] for batch in rows.iter(1000))
    for i, text in enumerate(texts, span.start):
        yield _checked(f'hf:{name}: {split} {i}', text)


@functools.cache
def hf_dataset(name: str) -> dict[str, Any]:
    """The splits of a Hugging Face data set: one of the hub, or a folder. Raises a DataError if it cannot be loaded."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"hf:{name}: needs pip install 'spark-transformer[hf]'") from None
    path, _, config = name.partition(':')
    folder = os.path.expanduser(path)
    try:
        saved = any((path_of(path) / f).exists() for f in ('dataset_dict.json', 'state.json'))
        found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(folder, config or None)
    except Exception as e:
        raise DataError(f'hf:{name}: {" ".join(str(e).split())[:300]}') from e
    return found if isinstance(found, dict) else {'train': found}


def _checked(place, text):
    """The document of a record."""
    if not text and isinstance(text, str | bytes | None):
        return Document(place, why='is empty')
    try:
        if isinstance(text, bytes):
            text = text.decode()
        text.encode()
    except UnicodeError as e:
        return Document(place, why=f'is not UTF-8: {e}')
    except AttributeError:
        return Document(place, why=f'is not text, but {type(text).__name__}')
    return Document(place, text)


READERS = {
    'text': _read_text,
    'jsonl': _read_jsonl,
    'parquet': _read_parquet,
    'array_record': _read_records,
    'tfds': _read_tfds,
    'hf': _read_hf,
}
