"""What a run writes about itself: metrics.jsonl and TensorBoard together; and the FLOPs behind utilisation."""

import contextlib
import json
import math
import os
import time

import tensorboardX
from tqdm import tqdm

from spark.errors import CheckpointError
from spark.runtime import write_text


class Clock:
    """Wall time since it was made, and what of it went to other things than steps."""

    def __init__(self):
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(('start', 'compile', 'data', 'evaluate', 'checkpoint'), 0.0)

    @contextlib.contextmanager
    def during(self, name):
        """Time in here goes to 'start', 'compile', 'data', 'evaluate' or 'checkpoint'."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def report(self):
        """{'goodput': share of the wall time that was left to steps, 'seconds_…': by name}.

        Waiting for data is not taken off: the device has a step to do meanwhile.
        """
        wall = time.perf_counter() - self._start
        lost = sum(s for name, s in self._seconds.items() if name != 'data')
        return {'goodput': 1 - lost / wall} | {f'seconds_{name}': round(s, 2) for name, s in self._seconds.items()}


class MetricsWriter:
    """Appends one JSON object per call to WORKDIR/metrics.jsonl, and its numbers to WORKDIR/tensorboard.

    Opening it at a step drops what a lost continuation wrote after that step, and what is there is not written again, so that
    none appears twice. In a bucket, where nothing can be appended, the file is written anew by `flush`.

    Raises:
      CheckpointError: of any method, if the files cannot be written.
    """

    def __init__(self, workdir, step):
        self._path = workdir / 'metrics.jsonl'
        kept = [r for r in _records(self._path) if r['step'] <= step]
        self._written = {(r['step'], r['split']) for r in kept}
        remote = '://' in str(workdir)
        with self._told():
            self._lines = [json.dumps(r) + '\n' for r in kept]
            write_text(self._path, ''.join(self._lines), CheckpointError)
            self._file = None if remote else open(self._path, 'a', buffering=1)
            self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1 if step else None)

    def write(self, step, split, values):
        """values: numbers, and lists of numbers (one per layer)."""
        if (step, split) in self._written:
            return
        self._written.add((step, split))
        safe = {name: v if not isinstance(v, float) or math.isfinite(v) else str(v) for name, v in values.items()}
        line = json.dumps({'step': step, 'split': split, **safe}) + '\n'
        with self._told():
            if self._file:
                self._file.write(line)
            else:
                self._lines.append(line)
            for name, value in values.items():
                for suffix, v in enumerate(value) if isinstance(value, list) else [('', value)]:
                    self._board.add_scalar(f'{split}/{name}' + (f'/{suffix}' if suffix != '' else ''), v, step)

    def flush(self):
        """What was written is where others can read it, and stays if the machine stops."""
        with self._told():
            if self._file:
                os.fsync(self._file.fileno())
            else:
                write_text(self._path, ''.join(self._lines), CheckpointError)
            self._board.flush()

    def close(self):
        """Flushes both."""
        try:
            self.flush()
        finally:
            if self._file:
                self._file.close()
            self._board.close()

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except OSError as e:
            raise CheckpointError(f'{self._path}: cannot be written: {e.strerror or e}; checkpoints are as they were') from e


def last_step(workdir):
    """The last step that WORKDIR/metrics.jsonl tells of; 0 for none."""
    return max((r['step'] for r in _records(workdir / 'metrics.jsonl')), default=0)


def _records(path):
    """The whole lines of a metrics.jsonl, but for the torn last one of a killed process."""
    try:
        lines = path.read_bytes().decode(errors='replace').splitlines() if path.exists() else []
    except OSError as e:
        raise CheckpointError(f'{path}: cannot be read: {e.strerror or e}') from e
    records = [r for line in lines if isinstance(r := _parse(line), dict) and isinstance(r.get('step'), int) and 'split' in r]
    if len(records) < len(lines) - 1:
        tqdm.write(f'Warning: {path}: {len(lines) - len(records)} of {len(lines)} lines are not records, and are left out')
    return records


def _parse(line):
    """A record, or None for the torn last line of a killed process."""
    try:
        return json.loads(line)
    except ValueError:
        return None
