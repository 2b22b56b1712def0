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
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import filelock
from etils import epath
from fsspec.core import url_to_fs

from spark.config import DataConfig
from spark.data import readers
from spark.errors import ConfigError, DataError, SparkError
from spark.progress import tqdm
from spark.runtime import check_bucket, in_bucket, path_of

FILES = ('text', 'jsonl', 'parquet', 'array_record')  # formats that a glob names
SPLITS = ('train', 'validation', 'test')
LOCAL_CACHE = '~/.cache/spark'
KINDS = (
    'stdlib, text:GLOB, jsonl:GLOB, parquet:GLOB, tfds:NAME, array_record:GLOB, hf:NAME, tokens:DIR, '
    "or a mixture such as '0.7 stdlib + 0.3 text:GLOB'"
)


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
        if re.search(r'\suntil\s', name):
            raise ConfigError(f'data.source = {source!r}: want MIXTURE until STEP, MIXTURE; the last MIXTURE has no `until`')
        kind, _, rest = name.partition(':')
        if not (name == 'stdlib' or (kind in (*FILES, 'tfds', 'hf', 'tokens') and rest)):
            raise ConfigError(f'data.source = {source!r}: {name or part!r} is not a source; want {KINDS}')
        if not 1e-9 <= weight <= 1e9:
            raise ConfigError(f'data.source = {source!r}: the weight of {name!r} must be above 0, and between 1e-9 and 1e9')
        if name in weights:
            raise ConfigError(f'data.source = {source!r}: names {name!r} twice')
        weights[name] = weight
    return weights


class File(NamedTuple):
    """A file of a source; `version` changes when it is written anew, `split` is None in a source without splits of its own."""

    path: str  # or a URL, or NAME#SPLIT of a Hugging Face data set
    size: int
    version: str
    format: str = ''  # a key of readers.READERS
    field: str = ''
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one worker reads at once: spans of files that have format, field and split in common."""

    spans: tuple[readers.Span, ...]
    format: str
    field: str
    split: str | None
    size: int  # in bytes, about

    def documents(self) -> Iterator[readers.Document]:
        """The documents in order, unusable ones included."""
        for span in self.spans:
            yield from readers.read(self.format, span, self.field)


def pieces(files: Iterable[File]) -> list[Piece]:
    """Files as pieces: long ones are cut, short ones grouped."""
    result, group, last, total = [], [], None, 0
    files = list(files)
    cuts = readers.ahead(lambda file: readers.cut(file.format, file.path, file.size), files)
    # The footers of many Parquet files in a bucket take minutes.
    for file, spans in zip(files, tqdm(cuts, 'Opening files', len(files), unit='file', delay=5), strict=True):
        kind = file.format, file.field, file.split
        for span, size in spans:
            if group and (kind != last or total + size > readers.PIECE):
                result.append(Piece(tuple(group), *last, total))
                group, total = [], 0
            group.append(span)
            last, total = kind, total + size
    return [*result, Piece(tuple(group), *last, total)]


def open_part(part: str, field: str = 'text', cache: str = '') -> list[File]:
    """The files of a source that is no mixture.

    `field` names the text in records that have several fields; `cache` is data.cache_dir, where the embedded corpus is kept.
    Raises a DataError if nothing is there, or if it is of a format that cannot be read.
    """
    kind, _, rest = part.partition(':')
    check_bucket(part, rest)
    with _named(part):
        if part == 'stdlib':
            return _tfds_files(part, _stdlib_builder(cache), field)
        if kind == 'tfds':
            return _tfds_files(part, _tfds_builder(part, rest), field)
        if kind == 'hf':
            return _hf_files(part, rest, field)
        found = _listed(rest)
        if not found:
            raise DataError(f'{part}: no file matches')
        return [file._replace(format=_format(kind, file.path), field=field) for file in found]


def _listed(pattern):
    """The files that match a glob, sorted: local paths, or URLs."""
    if not in_bucket(pattern):
        paths = sorted(map(os.path.abspath, filter(os.path.isfile, glob.glob(os.path.expanduser(pattern), recursive=True))))
        return [File(path, os.path.getsize(path), str(os.stat(path).st_mtime)) for path in paths]
    fs, path = url_to_fs(pattern)
    found = sorted((fs.unstrip_protocol(f), info) for f, info in fs.glob(path, detail=True).items() if info['type'] == 'file')
    return [File(url, info['size'] or 0, _version(info)) for url, info in found]


def _version(info):
    names = ('generation', 'md5Hash', 'ETag', 'etag', 'content_md5', 'mtime', 'LastModified', 'updated', 'created')
    return next((str(info[name]) for name in names if info.get(name)), '')


def cache_dir(path: str = '') -> epath.Path:
    """Where prepared data is kept: `path`, $SPARK_CACHE or ~/.cache/spark."""
    return path_of(path or os.environ.get('SPARK_CACHE') or LOCAL_CACHE, 'data.cache_dir')


@contextlib.contextmanager
def _named(part):
    """Turns what filesystems raise into a DataError that names the source."""
    try:
        yield
    except SparkError:
        raise
    except Exception as e:  # clients of buckets raise exceptions of their own
        where = getattr(e, 'filename', None)
        raise DataError(f'{part}: {f"{where}: " if where else ""}{getattr(e, "strerror", None) or e}') from e


def _format(kind, file):
    """The format of a file: a key of readers.READERS."""
    if kind == 'array_record':
        return kind
    name, suffix = os.path.splitext(file)
    zipped = suffix in readers.ZIPPED
    suffix = os.path.splitext(name)[1] if zipped else suffix
    found = kind if kind != 'text' else {'.txt': 'text', '.jsonl': 'jsonl', '.parquet': 'parquet'}.get(suffix)
    if found is None or (found == 'parquet' and zipped):
        raise DataError(f'{file}: want .txt, .jsonl or .parquet, or .gz or .zst of the first two')
    return found


# ---- Data sets that may have splits of their own. One with a single split has none: it is split as files are.


def _stdlib_builder(cache):
    from spark.data.stdlib_corpus.stdlib_corpus_dataset_builder import Builder

    home = cache_dir(cache)
    if in_bucket(home):  # where ArrayRecord files cannot be written
        home = path_of(LOCAL_CACHE)
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
        is_directory = in_bucket(name) or os.path.isdir(directory)
        return tfds.builder_from_directory(directory) if is_directory else tfds.builder(name)
    except Exception as e:
        reason = ' '.join(str(e).partition('Available datasets')[0].split())[:200]  # there are a thousand
        raise DataError(f'{part}: {reason} Want the name of a TFDS data set, or the directory of a prepared one.') from e


def _tfds_files(part, builder, field):
    directory, info = str(builder.data_path), builder.info
    found = {name: split for name, split in info.splits.items() if split.num_examples}
    splits = _own_splits(part, found, f'not prepared in {directory}; prepare it with `tfds build --file_format=array_record`')
    if info.file_format.value != 'array_record':
        raise DataError(
            f'{part}: its files are {info.file_format.value}; convert them with `tfds build --file_format=array_record`, or '
            f'python -m tensorflow_datasets.scripts.convert_format --dataset_dir={directory} --out_file_format=array_record'
        )
    texts = [name for name, feature in info.features.items() if type(feature).__name__ == 'Text']
    if field not in texts and len(texts) != 1:
        raise DataError(f'{part}: want a feature `{field}`, or a single one of type Text; it has {texts or "none"}')
    field = f'{directory}#{field if field in texts else texts[0]}'
    there = {os.path.basename(file.path): file for file in _listed(f'{glob.escape(directory)}/*')}
    paths = [(split, str(path)) for name, split in splits.items() for path in sorted(found[name].filepaths)]
    if missing := [path for _, path in paths if os.path.basename(path) not in there]:
        raise DataError(f'{part}: {missing[0]} is missing')
    return [there[os.path.basename(path)]._replace(format='tfds', field=field, split=split) for split, path in paths]


def _hf_files(part, name, field):
    data = {split: rows for split, rows in readers.hf_dataset(name).items() if len(rows)}
    splits = _own_splits(part, data, 'holds no documents')
    for rows in data.values():
        if field not in rows.column_names:
            raise DataError(f'{part}: has no column {field!r}; it has {", ".join(rows.column_names)}')
    file = lambda key, split: File(f'{name}#{key}', data[key].data.nbytes, data[key]._fingerprint, 'hf', field, split)
    return [file(key, split) for key, split in splits.items()]


def _own_splits(part: str, found: dict[str, Any], if_none: str) -> dict[str, str | None]:
    """{the name of a split of a data set that is used: our split}."""
    if not found:
        raise DataError(f'{part}: {if_none}')
    if len(found) == 1:
        return dict.fromkeys(found)
    if not (splits := {name: name for name in found if name in SPLITS}):
        raise DataError(f'{part}: has the splits {", ".join(found)}; want {", ".join(SPLITS)}, or a single one')
    if others := ', '.join(name for name in found if name not in splits):
        _note(f'{part}: these splits are not used: {others}')
    return splits


@functools.cache
def _note(text):
    print(f'Note: {text}', file=sys.stderr, flush=True)


def texts(source: str, split: str, cfg: DataConfig) -> Iterator[str]:
    """The documents of a split of a source, one part after another. Raises a DataError at the first unusable one."""
    for part in dict.fromkeys(name for phase in parse(source) for name in phase.weights):
        for piece in pieces(open_part(part, cfg.text_field, cfg.cache_dir)):
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
