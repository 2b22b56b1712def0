"""Tokenizers, chosen by one string: bytes | sentencepiece:FILE | hf:FILE; and how to train one.

A tokenizer has `vocab_size`, the ids `bos` and `eos`, `encode`, which adds neither, and `decode`, which drops special tokens.
"""

import io
import pathlib
from collections.abc import Iterable

import numpy as np
import sentencepiece
import tokenizers

from spark.errors import ConfigError, DataError


class ByteTokenizer:
    """UTF-8 bytes: ids 0–255, then BOS 256 and EOS 257."""

    vocab_size, bos, eos = 258, 256, 257

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode('utf-8'), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        return bytes(int(i) for i in ids if i < 256).decode('utf-8', errors='replace')


class SentencePieceTokenizer:
    """A SentencePiece model file, which must define BOS and EOS."""

    def __init__(self, path: pathlib.Path):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as e:
            raise DataError(f'data.tokenizer: {path} is not a SentencePiece model: {e}') from None
        self.vocab_size = self._model.vocab_size()
        self.bos, self.eos = self._model.bos_id(), self._model.eos_id()
        if min(self.bos, self.eos) < 0:
            raise DataError(f'data.tokenizer: {path} defines no BOS or EOS; train it with bos_id and eos_id')

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text), np.int32)

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids if i < self.vocab_size])


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, in which BOS and EOS have one of their usual names."""

    BOS = ('<bos>', '<s>', '<|begin_of_text|>', '<|endoftext|>', '[CLS]')
    EOS = ('<eos>', '</s>', '<|end_of_text|>', '<|endoftext|>', '[SEP]')

    def __init__(self, path: pathlib.Path):
        try:
            self._model = tokenizers.Tokenizer.from_str(path.read_text('utf-8'))
        except Exception as e:  # the library raises Exception itself
            raise DataError(f'data.tokenizer: {path} is not a tokenizer.json: {e}') from None
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        self.bos, self.eos = self._special(path, self.BOS), self._special(path, self.EOS)

    def _special(self, path, names):
        ids = (self._model.token_to_id(name) for name in names)
        found = next((i for i in ids if i is not None), None)
        if found is None:
            raise DataError(f'data.tokenizer: {path} has none of the tokens {", ".join(names)}')
        return found

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


Tokenizer = ByteTokenizer | SentencePieceTokenizer | HFTokenizer


def load(spec: str) -> Tokenizer:
    """The tokenizer that a DataConfig.tokenizer describes."""
    if spec == 'bytes':
        return ByteTokenizer()
    kind, _, name = spec.partition(':')
    kinds = {'sentencepiece': SentencePieceTokenizer, 'hf': HFTokenizer}
    if kind not in kinds or not name:
        raise ConfigError(f'data.tokenizer = {spec!r}: want bytes, sentencepiece:FILE or hf:FILE')
    path = pathlib.Path(name).expanduser()
    # A model that ships with the package is found from any working directory.
    shipped = pathlib.Path(__file__).parent / name
    if not path.exists() and shipped.exists():
        path = shipped
    try:
        return kinds[kind](path)
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f'data.tokenizer = {spec!r}: {getattr(e, "strerror", None) or e}') from None


def train_sentencepiece(texts: Iterable[str], vocab_size: int, max_piece: int = 16) -> bytes:
    """The file of a lossless SentencePiece BPE model.

    White space, line ends and case are kept, digits are split, and characters outside of the vocabulary become bytes.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(s for text in texts for s in _sentences(text)),
            model_writer=model,
            model_type='bpe',
            vocab_size=vocab_size,
            max_sentencepiece_length=max_piece,
            byte_fallback=True,
            normalization_rule_name='identity',
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 16,  # longer ones are skipped
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise ConfigError(f'vocab_size = {vocab_size}: {e}') from None
    return model.getvalue()


def _sentences(text, limit=2000):
    """Cuts a text at line ends into pieces of about `limit` characters; a longer line is cut anywhere."""
    piece = ''
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), limit):
            if len(piece) + len(line) - start > limit and piece:
                yield piece
                piece = ''
            piece += line[start : start + limit]
    if piece:
        yield piece
