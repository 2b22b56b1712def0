"""Where a store is prepared makes no difference to it."""

import os
import stat

import pytest

from spark.data import launchers, prepare
from spark.errors import ConfigError, DataError
from tests.data.test_prepare import config, contents, corpus, small_pieces
from tests.sweeps.test_execute import FAKE

__all__ = ['corpus', 'small_pieces']  # fixtures


def test_processes_give_what_this_process_gives(tmp_path, corpus):
    """Also when a worker raises, or is killed."""
    source, _ = corpus
    for n in 1, 2:
        prepare.prepare(config(), source, tmp_path / str(n), launchers.local(n))
    assert contents(tmp_path / '1') == contents(tmp_path / '2')
    assert list(launchers.local(2)(len, [])) == []
    with pytest.raises(DataError, match='killed'):
        list(launchers.local(2)(os._exit, [1, 1]))
    with pytest.raises(ZeroDivisionError):
        list(launchers.local(2)(divide_by_zero, [1, 2]))


def divide_by_zero(n):
    return n // 0


# Starts two jobs of an array, or one job.
SBATCH = '''#!/bin/sh
id=$(date +%N)
script=$(cat "$1")
case "$script" in *--array*) tasks="0 1";; *) tasks="";; esac
for task in $tasks; do
    (SLURM_JOB_ID=$id$task SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$task sh -c "$script") >/dev/null 2>&1 &
done
[ "$tasks" ] || (SLURM_JOB_ID=$id sh -c "$script") >/dev/null 2>&1 &
echo "Submitted batch job $id"
'''


def test_slurm(tmp_path, corpus, monkeypatch):
    """The real submitit, against sbatch and srun that start the job on this machine."""
    submitit = pytest.importorskip('submitit')
    (tmp_path / 'bin').mkdir()
    for name, text in {**FAKE, 'sbatch': SBATCH, 'scancel': f'#!/bin/sh\necho $1 >> {tmp_path}/cancelled\n'}.items():
        (tmp_path / 'bin' / name).write_text(text)
        (tmp_path / 'bin' / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    as_completed = submitit.helpers.as_completed
    monkeypatch.setattr(submitit.helpers, 'as_completed', lambda jobs: as_completed(jobs, poll_frequency=0.2))
    source, _ = corpus
    folder = tmp_path / 'slurm'
    slurm = launchers.slurm(folder, 2, {'time': 5, 'partition': 'night'})
    (tmp_path / 'data' / '0.jsonl').rename(tmp_path / 'data' / '0.txt')  # another format: another piece
    source = f'text:{tmp_path}/data/*'
    prepare.prepare(config(), source, tmp_path / 'out', slurm)
    prepare.prepare(config(), source, tmp_path / 'local', launchers.local(1))
    assert contents(tmp_path / 'out') == contents(tmp_path / 'local')
    submitted = next(folder.rglob('*.sh')).read_text()
    assert '#SBATCH --partition=night' in submitted and '#SBATCH --array=0-1' in submitted
    with pytest.raises(DataError, match=r'SLURM job \S+: ZeroDivisionError.*; see .*err'):
        list(slurm(divide_by_zero, [1]))
    # Whoever stops waiting cancels the jobs.
    (tmp_path / 'cancelled').unlink(missing_ok=True)
    waiting = slurm(str, [1, 2])
    next(waiting)
    waiting.close()
    assert len((tmp_path / 'cancelled').read_text().split()) == 2
    with pytest.raises(ConfigError, match=r'--launcher=slurm: '):
        list(launchers.slurm(folder, 2, {'tiem': 5})(len, ['a']))
    assert launchers.parameter('time=120') == ('time', 120) and launchers.parameter('qos=a=b') == ('qos', 'a=b')
    with pytest.raises(ConfigError, match='--slurm=time: want NAME=VALUE'):
        launchers.parameter('time')


def test_beam(tmp_path, corpus, small_pieces):
    pytest.importorskip('apache_beam')
    source, _ = corpus
    beam = launchers.beam(['--runner=DirectRunner'])
    prepare.prepare(config(), source, tmp_path / 'out', beam)
    prepare.prepare(config(), source, tmp_path / 'local', launchers.local(1))
    assert contents(tmp_path / 'out') == contents(tmp_path / 'local')
    with pytest.raises(DataError, match=r'--launcher=beam: .*ZeroDivisionError'):
        list(beam(divide_by_zero, [1]))
