"""Where metrics go: metrics.jsonl and TensorBoard, written together."""

import contextlib
import json
import math
import os

import tensorboardX
from etils import epath
from tqdm import tqdm

from spark.errors import CheckpointError
from spark.runtime import write_text


class MetricsWriter:
    """Appends one JSON object per call to WORKDIR/metrics.jsonl, and its numbers to WORKDIR/tensorboard.

    A run that resumes at `step` drops the records after that step, and does not write again those that are kept: no step
    appears twice. In a bucket, where files cannot be appended to, `flush` writes the whole file again. Every method raises a
    CheckpointError if the files cannot be written.
    """

    def __init__(self, workdir: epath.Path, step: int):
        self._path = workdir / 'metrics.jsonl'
        kept = [r for r in _records(self._path) if r['step'] <= step]
        self._written = {(r['step'], r['split']) for r in kept}
        self._lines = [json.dumps(r) + '\n' for r in kept]
        with self._write_errors():
            write_text(self._path, ''.join(self._lines), CheckpointError)
            self._file = None if '://' in str(workdir) else open(self._path, 'a', buffering=1)
            self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1 if step else None)

    def write(self, step: int, split: str, values: dict) -> None:
        """Writes a record of numbers, and of lists of numbers (one per layer)."""
        if (step, split) in self._written:
            return
        self._written.add((step, split))
        safe = {name: v if not isinstance(v, float) or math.isfinite(v) else str(v) for name, v in values.items()}
        line = json.dumps({'step': step, 'split': split, **safe}) + '\n'
        with self._write_errors():
            if self._file:
                self._file.write(line)
            else:
                self._lines.append(line)
            for name, value in values.items():
                for suffix, v in enumerate(value) if isinstance(value, list) else [('', value)]:
                    self._board.add_scalar(f'{split}/{name}' + (f'/{suffix}' if suffix != '' else ''), v, step)

    def flush(self) -> None:
        """Makes what was written visible to others, and safe from a crash of the machine."""
        with self._write_errors():
            if self._file:
                os.fsync(self._file.fileno())
            else:
                write_text(self._path, ''.join(self._lines), CheckpointError)
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes both."""
        try:
            self.flush()
        finally:
            if self._file:
                self._file.close()
            self._board.close()

    @contextlib.contextmanager
    def _write_errors(self):
        try:
            yield
        except OSError as e:
            raise CheckpointError(f'{self._path}: cannot be written: {e.strerror or e}; checkpoints are as they were') from e


def last_step(workdir: epath.Path) -> int:
    """The last step in WORKDIR/metrics.jsonl; 0 if there is none."""
    return max((r['step'] for r in _records(workdir / 'metrics.jsonl')), default=0)


def _records(path):
    """The records of a metrics.jsonl. A torn last line, as a killed process leaves it, is dropped silently."""
    try:
        lines = path.read_bytes().decode(errors='replace').splitlines() if path.exists() else []
    except OSError as e:
        raise CheckpointError(f'{path}: cannot be read: {e.strerror or e}') from e
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get('step'), int) and 'split' in record:
                records.append(record)
    if len(records) < len(lines) - 1:
        tqdm.write(f'Warning: {path}: skipped {len(lines) - len(records)} of {len(lines)} lines, which are malformed')
    return records
