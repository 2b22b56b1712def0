"""The page of a sweep in a real browser: all runs, sorted and filtered, with the plots, without a network."""

import re

import pytest

from spark.sweeps import results
from tests.helpers import browser
from tests.sweeps.test_results import result

EVIL = '</script><b id="evil">bold</b> & "quoted" 漢字'


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp('sweep')
    axes = {'model.ffn.k': [4, 8, 16, 128], 'optimizer.lr': [1e-3, 1e-2], 'model.pattern': [('local', 'global')]}
    rows = [
        results.Row(f'k-{k}_lr-{lr}', {'model.ffn.k': k, 'optimizer.lr': lr, 'model.pattern': ('local', 'global')}, 'done',
                    result(3 + 1 / k + lr, 1.0 + k / 8, active=k / 128))
        for k in axes['model.ffn.k'] for lr in axes['optimizer.lr']
    ]  # fmt: skip
    rows[1] = rows[1]._replace(status=f'failed, exit code 1: {EVIL}', result={})
    rows[2] = rows[2]._replace(status='stopped at step 5: validation loss 4.1000, place 7 of 8', result={})
    path = results.write(directory, rows, axes)[-1]
    assert path.name == 'results.html' and not re.search(r'(src|href)="?http|//cdn|@import', path.read_text())
    alone = directory / 'elsewhere' / 'page.html'
    alone.parent.mkdir()
    alone.write_bytes(path.read_bytes())  # it needs no other file
    with browser(alone, directory) as chrome:
        yield chrome


def runs(page):
    return [cell.text for cell in page.find_elements('css selector', 'tbody tr > td:first-child')]


def keep(page, text):
    """The runs that a filter leaves."""
    field = page.find_element('id', 'filter')
    page.execute_script("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", field, text)
    return runs(page)


def test_rows_are_filtered(page):
    assert len(keep(page, '')) == 8 and page.find_element('id', 'count').text == '8 of 8 runs'
    assert keep(page, 'k>=16 lr<0.01') == ['k-16_lr-0.001', 'k-128_lr-0.001']
    assert keep(page, 'model.ffn.k=8') == ['k-8_lr-0.001', 'k-8_lr-0.01']  # 8 and not 128; the whole name of the field, too
    assert keep(page, 'status!=done') == ['k-4_lr-0.01', 'k-8_lr-0.001']
    assert keep(page, 'stopped') == ['k-8_lr-0.001'] and keep(page, '漢字') == ['k-4_lr-0.01']
    assert keep(page, 'test_loss<3.01') == ['k-128_lr-0.001']  # runs without a loss are left out
    assert keep(page, 'pattern=local+global k!=4 k!=8 k!=16') == ['k-128_lr-0.001', 'k-128_lr-0.01']
    assert len(keep(page, 'kk=8')) == 8 and page.find_element('id', 'count').text == 'no such column'


def test_rows_are_sorted(page):
    keep(page, '')
    heads = {th.text: th for th in page.find_elements('css selector', 'th')}
    assert list(heads)[:5] == ['run', 'k', 'lr', 'pattern', 'status'] and heads['k'].get_attribute('title') == 'model.ffn.k'
    heads['test_loss'].click()
    assert runs(page)[0] == 'k-128_lr-0.001' and set(runs(page)[-2:]) == {'k-4_lr-0.01', 'k-8_lr-0.001'}
    heads['test_loss'].click()
    assert heads['test_loss'].get_attribute('aria-sort') == 'descending'
    assert runs(page)[0] == 'k-4_lr-0.001' and set(runs(page)[-2:]) == {'k-4_lr-0.01', 'k-8_lr-0.001'}
    heads['k'].click()
    assert [r.split('_')[0] for r in runs(page)] == [f'k-{k}' for k in (4, 8, 16, 128) for _ in range(2)]
    assert page.find_element('css selector', 'tr.best td').text == 'k-128_lr-0.001'


def test_pictures_are_inside_and_text_stays_text(page):
    images = page.find_elements('css selector', '#pictures img')
    assert len(images) == 3 and all(image.get_attribute('src').startswith('data:image/png;base64,') for image in images)
    assert all(page.execute_script('return arguments[0].naturalWidth', image) > 100 for image in images)
    assert not page.find_elements('id', 'evil')
    keep(page, 'failed')
    assert EVIL in page.find_element('tag name', 'tbody').get_attribute('textContent')
    assert not [entry for entry in page.get_log('browser') if entry['level'] == 'SEVERE']
