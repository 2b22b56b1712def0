"""Where a run starts from: other weights, and nothing where something must have been."""

import pytest
from etils import epath

from spark.errors import CheckpointError
from spark.training.run import train
from spark.training.start import check_nothing_lost, initial_state
from spark.training.step import Trainer
from tests.helpers import corpus, small


@pytest.mark.parametrize('suffix', ['', '/', '/checkpoints', '/checkpoints/', '/checkpoints/10', '/checkpoints/10/'])
def test_a_run_is_named_in_any_way(trained, suffix, capsys):
    workdir, _ = trained('spark')
    initial_state(Trainer(small(**{'train.restore_from': f'{workdir}{suffix}', 'model.vocab_size': 258})))
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


def test_nothing_is_lost(tmp_path):
    """A run that was killed before its first save starts over; one that has saved does not, however short it is."""
    workdir = epath.Path(tmp_path)
    check_nothing_lost(workdir, None, 5)
    (workdir / 'metrics.jsonl').write_text('{"step": 11, "split": "train"}\n')
    check_nothing_lost(workdir, 0, 5)
    check_nothing_lost(workdir, None, 0)
    with pytest.raises(CheckpointError, match=r'there is none, but metrics\.jsonl goes to step 11'):
        check_nothing_lost(workdir, None, 5)
    with pytest.raises(CheckpointError, match='there is none, but the run has saved step 1: restore them'):
        check_nothing_lost(workdir, 1, 5)
