"""Tokenizers give the text back; a wrong file is named."""

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from spark.data.tokenizer import load, train_sentencepiece
from spark.errors import ConfigError, DataError

TEXT = 'def f(x):\n\treturn  x + 1234 # naïve 漢字 \r\n\n'


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A SentencePiece model and a tokenizer.json, trained here."""
    directory = tmp_path_factory.mktemp('tokenizers')
    corpus = [f'def g{i}(x):\n    return x + {i}\n' * 20 for i in range(50)]
    (directory / 'a.model').write_bytes(train_sentencepiece(corpus, 300))
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    hf.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=300, special_tokens=['<s>', '</s>'], initial_alphabet=alphabet))
    hf.enable_truncation(4)  # must not apply
    hf.save(str(directory / 'tokenizer.json'))
    return {'bytes': 'bytes', 'sentencepiece': f'sentencepiece:{directory}/a.model', 'hf': f'hf:{directory}/tokenizer.json'}


@pytest.mark.parametrize('kind', ['bytes', 'sentencepiece', 'hf'])
def test_round_trip(files, kind):
    tokenizer = load(files[kind])
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == TEXT
    assert 0 <= ids.min() and max(ids.max(), tokenizer.bos, tokenizer.eos) < tokenizer.vocab_size


@hypothesis.given(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='▁')))
@hypothesis.settings(max_examples=100, deadline=None)
def test_the_shipped_model_is_lossless(text):
    tokenizer = load('sentencepiece:stdlib_2048.model')
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ('spec', 'content', 'error', 'message'),
    [
        ('sentencepiece:{}/missing.model', None, DataError, 'No such file'),
        ('sentencepiece:{}/x', b'junk', DataError, 'not a SentencePiece model'),
        ('sentencepiece:{}/x', b'', DataError, 'not a SentencePiece model|defines no BOS'),
        ('hf:{}/x', b'{}', DataError, r'not a tokenizer\.json'),
        ('hf:{}/x', b'\xff', DataError, r'not a tokenizer\.json'),
        ('hf:', None, ConfigError, 'want bytes, sentencepiece:FILE or hf:FILE'),
        ('bpe', None, ConfigError, 'want bytes, sentencepiece:FILE or hf:FILE'),
    ],
)
def test_wrong_files(tmp_path, spec, content, error, message):
    if content is not None:
        (tmp_path / 'x').write_bytes(content)
    with pytest.raises(error, match=message):
        load(spec.format(tmp_path))


def test_specials_must_exist(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({'a': 0}, unk_token='a')).save(str(tmp_path / 'x'))
    with pytest.raises(DataError, match='has none of the tokens <bos>'):
        load(f'hf:{tmp_path}/x')


def test_a_vocabulary_that_cannot_be_reached_is_said():
    with pytest.raises(ConfigError, match='vocab_size = 5000'):
        train_sentencepiece(['abc'], 5000)
