"""Progress on a terminal is a bar; in a log file it is lines."""

import io
import re
import sys
import types

import pytest

from spark import progress
from tests.helpers import ROOT


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to move."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, 'time', clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_file_gets_whole_lines_and_few_of_them(monkeypatch, clock):
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    for _ in progress.tqdm(range(1000), desc='short', mininterval=0):
        pass
    assert sys.stderr.getvalue() == ''
    with progress.tqdm(total=30, desc='long', unit='batch', mininterval=0) as bar, progress.tqdm(total=3, desc='inner') as inner:
        for _ in range(30):
            clock.now += 1
            bar.set_postfix(loss=2.5)
            bar.update()
            inner.update(0)
            bar.write('a message', file=sys.stderr)
    said = sys.stderr.getvalue()
    assert not re.search('[\r\x1b\x08]', said) and said.endswith('\n') and '\n\n' not in said
    lines = [line for line in said.splitlines() if line.startswith('long: ')]
    assert 2 <= len(lines) <= 3 and re.fullmatch(r'long: \d+ of 30 \[\d\d:\d\d<\S+, +\S+ ?batch/s, loss=2\.5\]', lines[0]), lines
    assert said.count('a message') == 30


def test_lines_on_request(monkeypatch, clock):
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    with progress.tqdm(total=9, desc='train', seconds=float('inf')) as bar:
        for _ in range(9):
            clock.now += 100
            bar.update()
            if bar.n % 3 == 0:
                bar.line()
    assert [line.split(' [')[0] for line in sys.stderr.getvalue().splitlines()] == [f'train: {n} of 9' for n in (3, 6, 9)]
    progress.tqdm(total=1, disable=True).line()
    assert len(sys.stderr.getvalue().splitlines()) == 3


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    with progress.tqdm(total=2, desc='train', seconds=float('inf')) as bar:
        bar.update(2)
        bar.line()
    assert '\rtrain: 100%|' in sys.stderr.getvalue() and 'of 2' not in sys.stderr.getvalue()


def test_every_bar_of_the_project_is_one_of_these():
    """What only writes messages, as tqdm.write does, shows no bar."""
    for path in [*(ROOT / 'spark').rglob('*.py'), *(ROOT / 'scripts').glob('*.py')]:
        if re.search('^(from|import) tqdm', path.read_text(), re.MULTILINE) and path != ROOT / 'spark' / 'progress.py':
            assert not re.search(r'tqdm\(|trange\(', path.read_text()), path
