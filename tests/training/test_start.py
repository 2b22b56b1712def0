"""Where a run starts from: other weights, and nothing where something must have been."""

from unittest import mock

import pytest
from etils import epath

from spark.checkpoints import manager
from spark.errors import CheckpointError, DataError
from spark.training import start
from spark.training.run import train
from spark.training.start import check_nothing_lost, initial_state
from spark.training.step import Trainer
from tests.helpers import corpus, small


@pytest.mark.parametrize('suffix', ['', '/', '/checkpoints', '/checkpoints/', '/checkpoints/10', '/checkpoints/10/'])
def test_a_run_is_named_in_any_way(trained, suffix, capsys):
    workdir, _ = trained('spark')
    own = {'train.restore_from': f'{workdir}{suffix}', 'data.source': 'text:x', 'model.vocab_size': 258}
    initial_state(Trainer(small(**own)))
    said = capsys.readouterr().out
    assert f'Starting from the parameters of {workdir}/checkpoints/10' in said and 'Warning' not in said


def test_another_tokenizer_of_the_same_size_is_told(trained, tmp_path, capsys):
    """A warning, since the user may have meant it."""
    workdir, _ = trained('spark')
    fields = {'train.restore_from': str(workdir), 'train.steps': 3, 'sample.tokens': 0, 'data.eos': 'none'}
    summary, _, _ = train(small(**corpus(tmp_path), **fields), tmp_path / 'run')
    said = capsys.readouterr().out
    assert summary['steps'] == 3
    names = "data.tokenizer = 'bytes' (bos '', eos 'none') gives other ids than 'bytes'"
    assert f'Warning: {names}, with which {workdir} was trained' in said


@pytest.mark.parametrize('suffix', ['', '/checkpoints/5', '/none'])
def test_where_a_run_lies_is_said_by_the_first_process(trained, suffix, monkeypatch):
    """The others follow it, also where they do not see the path: it would wait for one that has raised an error."""
    (workdir, _), told, cls = trained('spark'), [], type(epath.Path('/'))

    def looking(act, what):
        told.append(act())
        return told[-1]

    def where():
        path, checkpoints, step = start.open_source('train.restore_from', f'{workdir}{suffix}')
        checkpoints.close()
        return path, step

    for module in (start, manager):
        monkeypatch.setattr(module, 'by_first_process', looking)
    if suffix == '/none':
        with pytest.raises(CheckpointError, match='want a run directory'):
            where()
    else:
        assert where() == (epath.Path(workdir), 5 if suffix else 10)
    for module in (start, manager):
        monkeypatch.setattr(module, 'by_first_process', lambda act, what: told.pop(0))
    fake = mock.Mock(manager.Checkpoints, steps=lambda: [5, 10])
    monkeypatch.setattr(manager, 'Checkpoints', lambda directory: (suffix == '/none' or told.pop(0), fake)[1])
    for name in ('exists', 'is_dir'):
        monkeypatch.setattr(cls, name, lambda path: pytest.fail(f'{path}: another process looks'))
    if suffix == '/none':
        with pytest.raises(CheckpointError, match='want a run directory'):
            where()
    else:
        assert where() == (epath.Path(workdir), 5 if suffix else 10)
    assert not told


def test_nothing_is_lost(tmp_path):
    """A run that was killed before its first save starts over; one that has saved does not, however short it is."""
    tmp_path = epath.Path(tmp_path)
    check_nothing_lost(tmp_path, None, 5)
    (tmp_path / 'metrics.jsonl').write_text('{"step": 11, "split": "train"}\n')
    check_nothing_lost(tmp_path, 0, 5)
    check_nothing_lost(tmp_path, None, 0)
    with pytest.raises(CheckpointError, match=r'there is none, but metrics\.jsonl goes to step 11'):
        check_nothing_lost(tmp_path, None, 5)
    with pytest.raises(CheckpointError, match='there is none, but the run has saved step 1: restore them'):
        check_nothing_lost(tmp_path, 1, 5)


@pytest.mark.parametrize('kind', ['sentencepiece', 'hf'])
def test_a_file_that_is_no_tokenizer_is_no_failure_of_storage(tmp_path, kind):
    (tmp_path / 't').write_bytes(b'\x01\x02 no tokenizer')
    with pytest.raises(DataError, match=r'^data\.tokenizer: .*/t is not a ') as e:
        train(small(**{'data.tokenizer': f'{kind}:{tmp_path}/t'}), tmp_path / 'run')
    assert e.value.exit_code == 4 and not (tmp_path / 'run').exists()
