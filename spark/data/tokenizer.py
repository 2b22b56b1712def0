"""Tokenizers, chosen by one string: bytes | sentencepiece:FILE | hf:FILE; and how to train one.

Text never becomes a control token: `</s>` in a document is four characters.
"""

import hashlib
import io
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

from spark.config import DataConfig, ExperimentConfig
from spark.errors import ConfigError, DataError, SparkError, root_cause
from spark.runtime import path_of
from spark.storage import accessed

NONE = 'none'  # the name of a special token that is not used


class Tokenizer:
    """Texts to ids and back.

    `bos` and `eos` are ids; if one of them is 'none', it is the same as the other. `fingerprint` identifies the ids of any text.
    """

    vocab_size: int

    def __init__(self, fingerprint: str, bos: int | None, eos: int | None, literal_bos: str = ''):
        if bos is None and eos is None:
            raise ConfigError("data.bos = 'none', data.eos = 'none': want at least one of them, to tell documents apart")
        self.bos, self.eos = (eos if bos is None else bos), (bos if eos is None else eos)
        self._literal_bos = literal_bos if bos is not None else ''
        self.fingerprint = hashlib.sha256(f'{fingerprint} {self.bos} {self.eos}'.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, without special ones, (n,) int32."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        """The text of ids; special tokens are dropped."""
        raise NotImplementedError

    def start(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text after BOS. A text that spells BOS at its start gets no second one."""
        ids = self.encode_batch([text.removeprefix(self._literal_bos) for text in texts])
        return [np.concatenate([[np.int32(self.bos)], x]) for x in ids]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: ids 0–255, then BOS 256 and EOS 257."""

    vocab_size = 258

    def __init__(self, bos: str = '', eos: str = ''):
        for name, value in [('bos', bos), ('eos', eos)]:
            if value not in ('', NONE):
                raise ConfigError(f"data.{name} = {value!r}: want '' or 'none' with data.tokenizer = 'bytes'")
        super().__init__('bytes', None if bos == NONE else 256, None if eos == NONE else 257)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode('utf-8'), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        return bytes(int(i) for i in ids if i < 256).decode('utf-8', errors='replace')


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file. BOS and EOS are those of the model, unless they are named."""

    def __init__(self, path: epath.Path, bos: str = '', eos: str = ''):
        data = _accessed(path, path.read_bytes)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as e:
            raise DataError(f'data.tokenizer: {path} is not a SentencePiece model: {e}') from None
        self.vocab_size = self._model.vocab_size()
        ids = [self._id(path, *special) for special in (('bos', bos, self._model.bos_id()), ('eos', eos, self._model.eos_id()))]
        super().__init__(hashlib.sha256(data).hexdigest(), *ids, '' if ids[0] is None else self._model.id_to_piece(ids[0]))

    def _id(self, path, field, name, default):
        if name == NONE:
            return None
        found = self._model.piece_to_id(name) if name else default
        if found < 0 or (name and self._model.id_to_piece(found) != name):
            what = f'no piece {name!r}' if name else f'no {field.upper()}'
            raise ConfigError(f"data.{field} = {name!r}: {path} defines {what}; name one of its control pieces, or 'none'")
        if not self._model.is_control(found):
            raise ConfigError(f"data.{field} = {name!r}: text can spell it; name a control piece of {path}, or 'none'")
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(self._model.encode(text), np.int32) for text in texts]

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids if i < self.vocab_size])


class HFTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`.

    BOS and EOS are named by the config, or by a `tokenizer_config.json` in the same directory, or are one of the usual pairs.
    """

    USUAL = (('<bos>', '<eos>'), ('<s>', '</s>'), ('<|begin_of_text|>', '<|end_of_text|>'), ('[CLS]', '[SEP]'),
             ('<|endoftext|>', '<|endoftext|>'))  # fmt: skip

    def __init__(self, path: epath.Path, bos: str = '', eos: str = ''):
        data = _accessed(path, path.read_bytes)
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as e:  # the library raises Exception itself
            raise DataError(f'data.tokenizer: {path} is not a tokenizer.json: {e}') from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        if not (bos and eos):
            usual = self._usual(path)
            bos, eos = bos or usual[0], eos or usual[1]
        ids = [self._id(path, *special) for special in (('bos', bos), ('eos', eos))]
        super().__init__(hashlib.sha256(data).hexdigest(), *ids, bos)

    def _id(self, path, field, name):
        if name == NONE:
            return None
        found = self._model.token_to_id(name)
        if found is None:
            raise ConfigError(f"data.{field} = {name!r}: {path} has no such token; name one of its special tokens, or 'none'")
        added = self._model.get_added_tokens_decoder().get(found)
        # A model of kind Unigram knows its special tokens as words.
        if not (added and added.special) or found in self._model.encode(name, add_special_tokens=False).ids:
            raise ConfigError(f"data.{field} = {name!r}: text can spell it; name a special token of {path}, or 'none'")
        return found

    def _usual(self, path):
        """The names of BOS and EOS that are not in the config."""
        beside = path.parent / 'tokenizer_config.json'
        if _accessed(beside, beside.exists):
            text = _accessed(beside, beside.read_text)
            try:
                names = [json.loads(text).get(key) or NONE for key in ('bos_token', 'eos_token')]
                return [name['content'] if isinstance(name, dict) else name for name in names]
            except (ValueError, AttributeError, KeyError) as e:
                raise DataError(f'data.tokenizer: {beside} is damaged: {e}') from None
        found = [pair for pair in self.USUAL if None not in map(self._model.token_to_id, pair)]
        if len(found) != 1:
            pairs = ', '.join(f'{bos} and {eos}' for bos, eos in found or self.USUAL)
            has = 'has several pairs of special tokens' if found else 'has none of the usual pairs of special tokens'
            raise ConfigError(f"data.tokenizer: {path} {has}, {pairs}: name them in data.bos and data.eos, or say 'none'")
        return found[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # In groups, since what the library returns takes a hundred bytes per token.
        groups = (list(texts[i : i + 64]) for i in range(0, len(texts), 64))
        encoded = (self._model.encode_batch_fast(group, add_special_tokens=False) for group in groups)
        return [np.asarray(x.ids, np.int32) for group in encoded for x in group]

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


def load(spec: str, bos: str = '', eos: str = '') -> Tokenizer:
    """The tokenizer of DataConfig.tokenizer, .bos and .eos; a file may be local or in a bucket."""
    if spec == 'bytes':
        return ByteTokenizer(bos, eos)
    kind, _, name = spec.partition(':')
    kinds = {'sentencepiece': SentencePieceTokenizer, 'hf': HFTokenizer}
    if kind not in kinds or not name:
        raise ConfigError(f'data.tokenizer = {spec!r}: want bytes, sentencepiece:FILE or hf:FILE')
    path = path_of(name, f'data.tokenizer = {spec!r}')
    # A model that ships with the package is found from any working directory.
    shipped = pathlib.Path(__file__).parent / name
    try:
        found = path if _accessed(path, path.exists) or not shipped.exists() else epath.Path(shipped)
        return kinds[kind](found, bos, eos)
    except SparkError:
        raise
    except Exception as e:  # of the libraries
        raise DataError(f'data.tokenizer = {spec!r}: {root_cause(e)}') from None


def _accessed(path, act):
    return accessed(act, f'data.tokenizer: {path}', DataError)


def of_config(cfg: DataConfig) -> Tokenizer:
    """The tokenizer of a DataConfig."""
    return load(cfg.tokenizer, cfg.bos, cfg.eos)


def tokenizer_for(cfg: ExperimentConfig) -> tuple[Tokenizer, ExperimentConfig]:
    """The tokenizer of a config, and the config with model.vocab_size filled in."""
    tokenizer = of_config(cfg.data)
    size = cfg.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f'model.vocab_size = {size}: want 0 or at least {tokenizer.vocab_size}, the size of {cfg.data.tokenizer}'
        )
    if size % cfg.train.loss_pieces:
        raise ConfigError(f'train.loss_pieces = {cfg.train.loss_pieces}: want a divisor of the vocabulary of {size}')
    return tokenizer, cfg.model_copy(update={'model': cfg.model.model_copy(update={'vocab_size': size})})


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
