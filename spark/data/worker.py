"""What a worker does to prepare a token store: tokenizes a piece of the source, and writes a file of an array."""

import dataclasses
import functools
import hashlib
import io
import json
from typing import Any

import numpy as np
from etils import epath

from spark.data import documents, readers, store, tokenizer
from spark.errors import DataError, root_cause
from spark.runtime import write_bytes, write_json

LISTED = 100  # unusable documents that the manifest names


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

    def report(self, n: int) -> dict[str, Any] | None:
        """What tokenize wrote to N.json; None if that is damaged."""
        try:
            return json.loads(self.path(f'{n:06}.json').read_bytes())
        except ValueError:
            return None

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
