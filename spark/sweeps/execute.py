"""Training the runs of a sweep: one after another on this machine, or as SLURM jobs."""

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Callable

import filelock

from spark import config
from spark.errors import ConfigError, NotFiniteError, Preempted
from spark.progress import tqdm
from spark.runtime import Path, absolute, in_bucket, received_signals, write_bytes, write_json
from spark.sweeps.grid import Run
from spark.training.trackers import metric_files


def train_command(
    train: list[str], config_path: str, overrides: dict, base: config.ExperimentConfig, run: Run, out: Path, stop_at: int = 0
) -> list[str]:
    """The words of the shell command that trains a run, to a step if there is `stop_at`; `train` are those before the flags.

    `overrides` are the {field: value} of the command line that turned the file at `config_path` (PATH[:VARIANT]) into `base`.
    """
    before, after = config.fields(base), config.fields(run.cfg)
    changed = overrides | {field: value for field, value in after.items() if value != before[field]}
    changed |= {'train.stop_at': stop_at} if stop_at else {}
    flags = [f'--config.{field}={value}' for field, value in changed.items()]
    return [*train, f'--config={config_path}', f'--workdir={out / "runs" / run.name}', *flags]


def is_finished(out: Path, run: Run) -> bool:
    """Has the run written its summary?"""
    return (out / 'runs' / run.name / 'summary.json').exists()


def failure(out: Path, name: str) -> str | None:
    """How the command of a run failed; None if it did not, or was only stopped. Raises a ConfigError if its record is damaged."""
    code, message = _end(out, name)
    return None if code in (0, Preempted.exit_code) else f'failed, exit code {code}: {message}'


def diverged(out: Path, name: str) -> bool:
    """Has the run ended with a loss that is not finite? That tells of its point; other failures tell of machines and storage."""
    return _end(out, name)[0] == NotFiniteError.exit_code


def _end(out, name):
    """(exit code, message) of the command of a run; (0, '') if it has not ended."""
    record = out / 'logs' / f'{name}.json'
    if not record.exists():
        return 0, ''
    try:
        end = json.loads(record.read_text())
        return end['exit_code'], end['message']
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = f'not the record of how a run ended ({type(e).__name__}: {e}): delete it, to go on'
        raise ConfigError(f'{record}: {why}') from None


def execute(command: list[str], out: Path, name: str, tick: Callable[[], None] = lambda: None) -> int:
    """Runs a command and returns its exit code.

    Its output is appended to OUT/logs/NAME.log; its exit code and error message go to NAME.json. A first SIGTERM or SIGINT is
    passed on to the command, so that a training run saves its state; a second one kills it. `tick` is called
    twice a second, or every 10 s if OUT is in a bucket. Raises Preempted if a signal stopped the command, and filelock.Timeout
    if another process is executing this run.
    """
    log = out / 'logs' / f'{name}.log'
    with _appended(log) as output:
        log.with_suffix('.json').unlink(missing_ok=True)  # of an earlier try
        start = output.tell()
        # In a session of its own, so that Ctrl-C does not reach it twice.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        with received_signals(lambda n: process.terminate() if n == 1 else process.kill()) as signals:
            while process.poll() is None:
                tick()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10 if in_bucket(out) else 0.5)
        output.seek(start)
        lines = output.read().decode('utf-8', 'replace').replace('\r', '\n').split('\n')
        last = next((s for s in reversed(lines) if 'Error: ' in s), next((s for s in reversed(lines) if s.strip()), ''))
        code = process.returncode
        record = {'exit_code': code, 'message': last if code else ''}
        write_json(log.with_suffix('.json'), record)
    if signals or code == Preempted.exit_code:
        raise Preempted(f'stopped in {name} of {out}; run the same command to resume')
    return code


@contextlib.contextmanager
def _appended(log):
    """A file to append to and to read, which no other process has open. In a bucket it appears, whole, at the end."""
    if not in_bucket(log):
        with filelock.FileLock(log.with_suffix('.lock'), timeout=0), open(log, 'ab+') as output:
            yield output
        return
    with tempfile.TemporaryFile() as output:  # no lock: the run directory refuses a second process
        output.write(log.read_bytes() if log.exists() else b'')
        output.flush()
        try:
            yield output
        finally:
            output.seek(0)
            write_bytes(log, output.read())


def run_locally(runs: list[Run], commands: dict[str, list[str]], out: Path, stop_at: int = 0) -> None:
    """Trains unfinished runs, by {run name: command}, one by one, to a step if the commands have `stop_at`.

    Raises Preempted after a signal, with the run's state saved.
    """
    steps = {run.name: stop_at or run.cfg.train.steps for run in runs}
    done = sum(steps[run.name] for run in runs if is_finished(out, run))
    title = f'sweep to step {stop_at}' if stop_at else 'sweep'
    with tqdm(total=sum(steps.values()), initial=done, desc=title, unit='step') as bar:
        for i, run in enumerate(runs):
            if is_finished(out, run):
                continue
            before = bar.n

            def tick(i=i, run=run, before=before):
                step, loss = latest_metrics(out / 'runs' / run.name)
                bar.n = before + step
                bar.set_postfix_str(f'run {i + 1} of {len(runs)}: {run.name}' + (f', loss {loss:.3f}' if loss else ''))

            try:
                code = execute(commands[run.name], out, run.name, tick)
            except filelock.Timeout:
                bar.write(f'{run.name}: another process is training it')
                continue
            bar.n = before + steps[run.name]
            bar.refresh()
            if code:
                bar.write(f'{run.name}: failed with exit code {code}, see {out}/logs/{run.name}.log')


def submit(runs: list[Run], commands: dict[str, list[str]], out: Path, parameters: dict) -> dict[str, str]:
    """Submits the runs that are not finished to SLURM, a job each, with these `parameters` of sbatch: {run name: job id}."""
    try:
        import submitit
    except ImportError:
        raise ConfigError("--launcher=slurm needs submitit: pip install 'spark-transformer[slurm]'") from None
    out = absolute(out)
    # submitit's files are local: those of a sweep in a bucket lie in the working directory.
    jobs, folder = {}, pathlib.Path(f'{out.name}-slurm').absolute() if in_bucket(out) else out / 'slurm'
    try:
        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(**{'job_name': out.name, **parameters})
        for run in runs:
            job_file = out / 'logs' / f'{run.name}.job'
            if is_finished(out, run):
                continue
            if job_file.exists():
                earlier = submitit.SlurmJob(folder=folder, job_id=job_file.read_text().strip())
                if not earlier.done():
                    print(f'{run.name}: job {earlier.job_id} has not ended')
                    continue
            (out / 'logs' / f'{run.name}.json').unlink(missing_ok=True)  # of an earlier try
            job = executor.submit(execute, commands[run.name], out, run.name)
            job_file.write_text(f'{job.job_id}\n')
            jobs[run.name] = job.job_id
    except Exception as e:  # submitit raises exceptions of many kinds
        raise ConfigError(f'--launcher=slurm: {type(e).__name__}: {e}') from None
    return jobs


def latest_metrics(workdir: Path) -> tuple[int, float | None]:
    """(step, loss) of the last complete line of training metrics in a run directory; (0, None) if there is none."""
    # It is shown while a run goes on, whose line may be half written; the clients of buckets raise exceptions of their own.
    with contextlib.suppress(Exception), metric_files(workdir)[-1].open('rb') as f:
        end, size = f.seek(0, os.SEEK_END), 20_000
        while True:  # further back, where evaluations have written much since
            start = f.seek(max(end - size, 0))
            for line in reversed(f.read(end - start).split(b'\n')[bool(start) : -1]):
                record = json.loads(line)
                if record['split'] == 'train':
                    return record['step'], record['loss'] if isinstance(record['loss'], float) else None
            if not start:
                break
            size *= 4
    return 0, None
