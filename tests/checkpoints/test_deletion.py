"""Which checkpoints stay, and what a killed save has left."""

import json

import pytest
from etils import epath

from spark.checkpoints.deletion import Deletion
from spark.checkpoints.manager import LAST_SAVED, Checkpoints
from tests.checkpoints.test_manager import PLACE, tree

MINUTE = 60 * 10**9  # nanoseconds


@pytest.fixture
def six(tmp_path):
    """A run directory with the checkpoints 1 … 6, a minute apart."""
    (tmp_path / 'config.json').touch()
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    for step in range(1, 7):
        checkpoints.save(step, tree(step), PLACE)
    checkpoints.close()
    for step in range(1, 7):
        path = tmp_path / 'checkpoints' / str(step) / '_CHECKPOINT_METADATA'
        path.write_text(json.dumps(json.loads(path.read_text()) | {'commit_timestamp_nsecs': step * MINUTE}))
    return tmp_path


def names(workdir):
    return sorted(p.name for p in (workdir / 'checkpoints').iterdir())


@pytest.mark.parametrize(
    ('kept', 'want'),
    [((2,), '56'), ((None,), '123456'), ((1, 3), '36'), ((1, 0, 2.0), '1356'), ((1, 0, 0.01), '123456'), ((9,), '123456')],
    ids=str,
)  # fmt: skip
def test_what_is_kept(six, kept, want):
    deletion = Deletion(epath.Path(six / 'checkpoints'), *kept)
    deletion.old()
    deletion.join()
    assert names(six) == list(want)


def test_a_run_begins_by_tidying_up(six):
    """A save that was killed leaves something; a lower `keep` holds at once; who only reads deletes nothing."""
    left = six / 'checkpoints' / '7.orbax-checkpoint-tmp'
    (left / 'state').mkdir(parents=True)
    (six / LAST_SAVED).unlink(missing_ok=True)
    reader = Checkpoints(six / 'checkpoints', 1)
    assert reader.last_saved() is None
    reader.close()
    assert left.exists() and len(names(six)) == 7
    run = Checkpoints(six / 'checkpoints', 1)
    run.begin(6)
    run.close()
    assert names(six) == ['6'] and run.last_saved() == 6


def test_what_cannot_be_deleted_is_a_warning_and_comes_again(six, monkeypatch, capfd):
    run = Checkpoints(six / 'checkpoints', 1)
    rmtree = type(run.directory).rmtree

    def refuse(path, *args, **kwargs):
        if path.name == '3':
            raise OSError(5, 'Input/output error')
        rmtree(path, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(type(run.directory), 'rmtree', refuse)
        run.begin(6)
        run._deletion.join()
    said = capfd.readouterr()
    assert f'Warning: {six}/checkpoints/3: cannot be deleted: OSError: [Errno 5] Input/output error' in said.out + said.err
    assert names(six) == ['3', '6']
    run.save(7, tree(7), PLACE)
    run.wait()
    run.close()
    assert names(six) == ['7'] and run.last_saved() == 7
