"""Tokenizers give the text back, and the ids of their own libraries; a wrong file is named."""

import io
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from spark.data.tokenizer import load, train_sentencepiece
from spark.errors import ConfigError, DataError

TEXT = 'def f(x):\n\treturn  x + 1234 # naïve 漢字 \r\n\n'
CORPUS = [f'def g{i}(x):\n    return x + {i}  # naïve\n' * 20 for i in range(50)]
# How Llama 3 and Qwen cut a text into words.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace('{1,3}', '')


def byte_level(words, specials, **kw):
    """A tokenizer.json as those of Llama 3, Qwen and GPT-2."""
    model = tokenizers.Tokenizer(models.BPE(**kw))
    split = pre_tokenizers.Split(tokenizers.Regex(words), 'isolated')
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    model.add_special_tokens(specials)
    return model


def gemma():
    """A tokenizer.json as that of Gemma: ▁ for spaces, bytes for unknown characters, BOS and EOS among the words."""
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
    model.normalizer = normalizers.Replace(' ', '▁')
    model.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    names = ['<pad>', '<eos>', '<bos>', '<unk>', *(f'<0x{i:02X}>' for i in range(256))]
    model.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=names, show_progress=False))
    file = json.loads(model.to_str())
    file['added_tokens'] = file['added_tokens'][:4]
    return tokenizers.Tokenizer.from_str(json.dumps(file))


def llama2():
    """A SentencePiece model as that of Llama 2, which puts a space before each text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type='bpe', vocab_size=320, byte_fallback=True, minloglevel=2,
        normalization_rule_name='identity', remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """The kinds of tokenizers, trained here: {kind: DataConfig.tokenizer}."""
    directory = tmp_path_factory.mktemp('tokenizers')
    hf = {
        'gemma': gemma(),
        'llama3': byte_level(LLAMA3, ['<|begin_of_text|>', '<|end_of_text|>'], ignore_merges=True),
        'qwen': byte_level(QWEN, ['<|endoftext|>', '<|im_start|>']),
    }
    hf['qwen'].normalizer = normalizers.NFC()
    hf['llama3'].enable_truncation(4)  # must not apply
    hf['llama3'].post_processor = tokenizers.processors.TemplateProcessing(
        single='<|begin_of_text|> $A', special_tokens=[('<|begin_of_text|>', hf['llama3'].token_to_id('<|begin_of_text|>'))]
    )
    for name, model in hf.items():
        model.save(str(directory / f'{name}.json'))
    (directory / 'llama2.model').write_bytes(llama2())
    (directory / 'gemma.model').write_bytes(train_sentencepiece(CORPUS, 320))
    found = {'bytes': 'bytes', 'shipped': 'sentencepiece:stdlib_2048.model'}
    found |= {f'{name}, sentencepiece': f'sentencepiece:{directory}/{name}.model' for name in ('llama2', 'gemma')}
    return found | {f'{name}, hf': f'hf:{directory}/{name}.json' for name in hf}


KINDS = ['bytes', 'shipped', 'llama2, sentencepiece', 'gemma, sentencepiece', 'gemma, hf', 'llama3, hf', 'qwen, hf']
CHARACTERS = st.characters(exclude_categories=['Cs'], exclude_characters='▁')
TEXTS = st.text(st.one_of(CHARACTERS, st.sampled_from(" \n\r\t'dDréx1漢👍🏽\0")))


@pytest.mark.parametrize('kind', KINDS)
def test_round_trip(files, kind):
    tokenizer = load(files[kind])
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == TEXT
    assert 0 <= ids.min() and max(ids.max(), tokenizer.bos, tokenizer.eos) < tokenizer.vocab_size


@pytest.mark.parametrize('kind', KINDS)
def test_any_text_as_the_library_has_it(files, kind):
    tokenizer = load(files[kind])
    if kind.endswith('hf'):
        library = tokenizers.Tokenizer.from_file(files[kind].removeprefix('hf:'))
        library.no_truncation()
        library.encode_special_tokens = True
        encode = lambda text: library.encode(text, add_special_tokens=False).ids
    elif kind == 'bytes':
        encode = lambda text: list(text.encode())
    else:
        encode = tokenizer._model.encode_as_ids
    normalized = library.normalizer.normalize_str if kind.startswith('qwen') else lambda text: text

    @hypothesis.given(TEXTS)
    @hypothesis.settings(max_examples=60, deadline=None)
    def holds(text):
        ids = tokenizer.encode(text)
        assert ids.tolist() == encode(text) and ids.dtype == np.int32
        assert tokenizer.decode(ids) == normalized(text)

    holds()


@pytest.mark.parametrize('kind', KINDS)
def test_a_text_is_no_control_token(files, kind):
    """However it is spelled; but a BOS that the text itself starts with is the one that it gets."""
    tokenizer = load(files[kind])
    names = ['</s>', '<s>', '<bos>', '<eos>', '<|endoftext|>', '<|begin_of_text|>', '<|im_start|>', '<|end_of_text|>', '<pad>']
    for text in (f'a{name}b {name} {name}' for name in names):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos, tokenizer.eos} & set(ids.tolist())
        started, twice = tokenizer.start([text, ''])
        assert started.tolist() == [tokenizer.bos, *ids] and twice.tolist() == [tokenizer.bos]
    if kind != 'bytes':
        literal = {'gemma, hf': '<bos>', 'llama3, hf': '<|begin_of_text|>', 'qwen, hf': '<|endoftext|>'}.get(kind, '<s>')
        one, two = tokenizer.start([f'{literal}text', 'text'])
        assert one.tolist() == two.tolist()


@pytest.mark.parametrize('kind', KINDS)
def test_a_long_line_without_white_space(files, kind):
    """One word of a megabyte: no tokenizer of these kinds takes quadratic time, which would be minutes."""
    text = 'abcdefgh漢' * 100_000
    assert load(files[kind]).decode(load(files[kind]).encode(text)) == text


def test_special_tokens_by_name(files):
    sp, qwen = files['gemma, sentencepiece'], files['qwen, hf']
    assert [load(sp).bos, load(sp).eos] == [1, 2]
    assert [load(sp, 'none').bos, load(sp, '', 'none').eos] == [2, 1]  # one stands for both
    assert load(sp, '</s>', '<s>').bos == 2
    assert load(sp).fingerprint not in {load(sp, 'none').fingerprint, load(sp, '', 'none').fingerprint}
    named = load(qwen, '<|im_start|>', '<|endoftext|>')
    assert named.bos == named.eos + 1 and load(qwen).bos == load(qwen).eos == named.eos
    assert load('bytes', 'none').bos == 257
    literal = load(qwen, 'none', '<|im_start|>').start(['<|im_start|>a'])[0]  # it has no BOS that a text could start with
    assert len(literal) > 3
    for spec, names, message in [
        (sp, ('none', 'none'), 'want at least one of them'),
        (sp, ('<bos>', ''), "defines no piece '<bos>'; name one of its control pieces, or 'none'"),
        (sp, ('x', ''), r'data\.bos = .*text can spell it'),
        (qwen, ('<bos>', ''), 'has no such token; name one of its special tokens'),
        (qwen, ('', 'x'), r"data\.eos = 'x': text can spell it"),
        ('bytes', ('<s>', ''), "want '' or 'none'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load(spec, *names)


def test_which_pair_is_not_guessed(tmp_path):
    both = byte_level(QWEN, ['<s>', '</s>', '<|endoftext|>'])
    both.save(str(tmp_path / 'tokenizer.json'))
    spec, beside = f'hf:{tmp_path}/tokenizer.json', tmp_path / 'tokenizer_config.json'
    with pytest.raises(ConfigError, match=r'several pairs .*<s> and </s>, <\|endoftext\|> .*: name them in data\.bos and'):
        load(spec)
    assert load(spec, 'none', '</s>').bos == load(spec, '<s>', '</s>').eos == both.token_to_id('</s>')
    beside.write_text(json.dumps({'bos_token': None, 'eos_token': {'content': '<|endoftext|>', 'special': True}}))
    assert load(spec).bos == load(spec).eos == both.token_to_id('<|endoftext|>')
    assert load(spec, '<s>').bos == both.token_to_id('<s>')
    beside.write_text(json.dumps({'bos_token': '<s>', 'eos_token': '<|im_end|>'}))
    with pytest.raises(ConfigError, match=r"data\.eos = '<\|im_end\|>'.*has no such token"):
        load(spec)
    for junk in 'junk', '[]', '{"bos_token": {}, "eos_token": {"a": 1}}':
        beside.write_text(junk)
        with pytest.raises(DataError, match=r'tokenizer_config\.json is damaged'):
            load(spec)


def test_a_model_whose_words_are_its_special_tokens(tmp_path):
    """Text that spells EOS would become it, which no setting of the library prevents."""
    model = tokenizers.Tokenizer(models.Unigram([('<unk>', 0.0), ('<s>', 0.0), ('</s>', 0.0), *((c, -9.0) for c in '</s>a')], 0))
    model.add_special_tokens(['<s>', '</s>'])
    model.save(str(tmp_path / 'x.json'))
    with pytest.raises(ConfigError, match='text can spell it'):
        load(f'hf:{tmp_path}/x.json')


@pytest.mark.parametrize(
    ('spec', 'content', 'error', 'message'),
    [
        ('sentencepiece:{}/missing.model', None, DataError, 'No such file'),
        ('sentencepiece:{}/x', b'junk', DataError, 'not a SentencePiece model'),
        ('sentencepiece:{}/x', b'', (DataError, ConfigError), 'not a SentencePiece model|defines no BOS'),
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
    with pytest.raises(ConfigError, match='has none of the usual pairs of special tokens'):
        load(f'hf:{tmp_path}/x')


def test_a_vocabulary_that_cannot_be_reached_is_said():
    with pytest.raises(ConfigError, match='vocab_size = 5000'):
        train_sentencepiece(['abc'], 5000)
