"""The page of a layer's neurons: what it says is what the model does, and a real browser shows it."""

import jax
import numpy as np
import pytest

from spark.data.rows import EvalBatches
from spark.data.tokenizer import ByteTokenizer, load
from spark.evaluation import evaluate, neurons
from spark.nn.layers import RMSNorm
from tests.helpers import browser, model_and_params, small

LAYER = 2
EVIL = '</script><b id="evil">bold</b> & "quoted" \\ 漢字\n'


@pytest.fixture(scope='module')
def model(trained, tmp_path_factory):
    """A trained model, to be looked at on text that would break a careless page."""
    text = tmp_path_factory.mktemp('text') / 'evil.txt'
    text.write_text(''.join(f'{EVIL}spark sparse {i} ' for i in range(60)))
    return evaluate.load(trained('spark')[0], source=f'text:{text}')


def test_the_strongest_contexts_are_those_of_the_model(model):
    best = neurons.collect(model, 'test', LAYER)
    cfg, trainer = model.cfg, model.trainer
    act = jax.jit(lambda p, b: neurons.activations(trainer.model, p, b, LAYER))
    rows = {'a': [], 'ids': [], 'segments': []}
    with trainer.context():
        for batch in EvalBatches(cfg.data, 'test'):
            rows['a'].append(np.asarray(act(model.params, trainer.put(batch))))
            rows['ids'].append(batch['tokens'])
            rows['segments'].append(batch['segments'])
    a, ids, segments = (np.concatenate(x) for x in rows.values())
    a = np.where(segments[..., None] > 0, a, 0)
    assert best['tokens'] == (segments > 0).sum() and len(a) > neurons.CONTEXTS
    np.testing.assert_array_equal(best['fired'], (a > 0).sum((0, 1)))
    np.testing.assert_allclose(best['value'], -np.sort(-a.max(1), axis=0)[: neurons.CONTEXTS].T, rtol=1e-6)
    for f in range(0, cfg.model.ffn.d_ff, 7):
        row = np.argmax(a[..., f].max(1))
        at = np.argmax(a[row, :, f])
        for i, place in enumerate(range(at - neurons.AROUND, at + neurons.AROUND + 1)):
            inside = 0 <= place < a.shape[1] and segments[row, place] == segments[row, at]
            if best['value'][f, 0] > 0:
                assert best['ids'][f, 0, i] == (ids[row, place] if inside else -1)
                assert best['window'][f, 0, i] == pytest.approx(a[row, place, f] if inside else 0, rel=1e-6)


def test_promoted_tokens_are_those_that_the_value_row_raises():
    cfg = small(**{'model.logit_cap': 0.0})
    model, params = model_and_params(cfg)
    scales = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(scales), x.shape) if x.ndim < 3 else x, params)
    ids = neurons.promoted(cfg.model, params, LAYER + 1)
    groups = params['params']['groups']
    rows = groups['ffn_1']['V'][1]
    x = RMSNorm().apply({'params': {'scale': groups['post_ffn_1']['scale'][1]}}, rows)
    x = RMSNorm().apply({'params': params['params']['final_norm']}, x)
    logits = model.apply(params, x[None], method='logits')[0]
    np.testing.assert_array_equal(ids, jax.lax.top_k(logits, neurons.PROMOTED)[1])


@pytest.mark.parametrize('tokenizer', [ByteTokenizer(), load('sentencepiece:stdlib_2048.model')], ids=['bytes', 'sentencepiece'])
def test_pieces_make_up_the_text(tokenizer):
    text = ' for 漢字 in é:\n\treturn  "x"'
    ids = [int(i) for i in tokenizer.encode(text)]
    texts = neurons.pieces(tokenizer, ids)
    assert len(texts) == len(ids) and ''.join(texts) == text == tokenizer.decode(ids)
    assert '漢' in texts and '\ufffd' not in ''.join(texts)
    assert neurons.pieces(tokenizer, ids[:-1])[:5] == texts[:5]


@pytest.fixture(scope='module')
def page(model, tmp_path_factory):
    """The page in headless Chromium: a selenium driver."""
    directory = tmp_path_factory.mktemp('page')
    picture = directory / 'activity.png'
    picture.write_bytes(b'\x89PNG\r\n\x1a\n')
    path = neurons.write(model, 'test', LAYER, directory / 'neurons.html', picture)
    with browser(path, directory) as chrome:
        yield chrome


def rows(page):
    """The first cell of every row, as numbers."""
    return [int(cell.text) for cell in page.find_elements('css selector', 'tbody tr > td:first-child')]


def search(page, text):
    field = page.find_element('id', 'search')
    field.clear()
    page.execute_script("arguments[0].dispatchEvent(new Event('input'))", field)
    field.send_keys(text)
    return page.find_element('id', 'count').text


def test_a_browser_shows_sorts_and_searches(page, model):
    d_ff = model.cfg.model.ffn.d_ff
    best = neurons.collect(model, 'test', LAYER)
    assert page.find_element('tag name', 'h1').text == 'Neurons of layer 2 (of 4)'
    assert f'{(best["fired"] == 0).sum()} never fired' in page.find_element('class name', 'facts').text
    by_rate = sorted(range(d_ff), key=lambda f: (-best['fired'][f], f))
    assert rows(page) == by_rate[:25]
    assert len(page.find_elements('css selector', '#rates rect')) == d_ff
    assert page.find_element('id', 'picture').get_attribute('src').startswith('data:image/png;base64,')

    heads = {th.get_attribute('data-key'): th for th in page.find_elements('tag name', 'th')}
    heads['neuron'].click()
    assert rows(page) == list(range(25))
    page.find_element('id', 'next').click()
    assert rows(page) == list(range(25, 50))
    heads['max'].click()
    assert rows(page)[0] == int(np.argmax(best['value'][:, 0].round(3)))
    assert heads['max'].get_attribute('aria-sort') == 'descending'
    heads['max'].click()
    assert heads['max'].get_attribute('aria-sort') == 'ascending'

    assert search(page, '37') == f'1 of {d_ff} neurons' and rows(page) == [37]
    found = int(search(page, '漢字').split()[0])
    assert 0 < found <= d_ff and '漢字' in page.find_element('tag name', 'tbody').text
    assert search(page, 'not in this text') == f'0 of {d_ff} neurons'
    assert search(page, '').startswith(str(d_ff))


def test_a_click_on_the_activity_plot_leads_to_the_neuron(page, model):
    bar = page.find_elements('css selector', '#rates rect')[3]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", bar)
    bar.click()
    chosen = page.find_element('css selector', 'tr.chosen')
    assert chosen.get_attribute('id') == f'neuron-{bar.get_attribute("data-neuron")}'
    shaded = chosen.find_elements('css selector', '.context b')
    assert shaded and 'rgba(213, 94, 0, 0.8)' in shaded[0].get_attribute('style')
    address, neuron = page.current_url, bar.get_attribute('data-neuron')
    assert f'neuron={neuron}' in address
    page.get('about:blank')
    page.get(address)  # a link to one neuron
    assert page.find_element('css selector', 'tr.chosen').get_attribute('id') == f'neuron-{neuron}'


def test_text_stays_text(page):
    assert not page.find_elements('id', 'evil')
    search(page, '</script>')
    assert '</script><b id="evil">' in page.find_element('tag name', 'tbody').get_attribute('textContent')
    assert not [entry for entry in page.get_log('browser') if entry['level'] == 'SEVERE']
