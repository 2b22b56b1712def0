"""Where metrics go: metrics.jsonl and TensorBoard, written together."""

import contextlib
import json
import math
import os
import re
import time

import tensorboardX
from etils import epath
from tensorboardX import record_writer

from spark.errors import CheckpointError, root_cause
from spark.progress import tqdm
from spark.runtime import in_bucket, write_bytes, write_text

PART = 1 << 20  # bytes of a part of a file in a bucket
FLUSH_SECONDS = 60  # between writes of metrics to a bucket, and of TensorBoard anywhere
TRIES = 3  # failed writes of metrics to a bucket in a row that end a run


class MetricsWriter:
    """Appends one JSON object per call to WORKDIR/metrics.jsonl, and its numbers to WORKDIR/tensorboard.

    A run that resumes at `step` drops the records after that step, and does not write again those that are kept: no step
    appears twice. In a bucket, where files cannot be appended to, metrics.jsonl grows by parts (`metric_files`). Every method
    raises a CheckpointError if the files cannot be written.
    """

    def __init__(self, workdir: epath.Path, step: int):
        self._path, self._in_bucket, self._due = workdir / 'metrics.jsonl', in_bucket(workdir), 0.0
        with self._write_errors():
            last, lines, found = self._dropped_after(workdir, step)
            self._written = {(r['step'], r['split']) for r in found}
            if self._in_bucket:
                self._file = _Parts(self._path, last, ''.join(lines).encode())
            else:
                write_text(_part(self._path, last), ''.join(lines), CheckpointError)
                self._file = open(_part(self._path, last), 'ab')
            board = {'purge_step': step + 1 if step else None, 'flush_secs': FLUSH_SECONDS}
            self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), **board)

    def _dropped_after(self, workdir, step):
        """(the number of the part to write on, its lines, all records until `step`); deletes the parts after it."""
        files, found = metric_files(workdir), []
        for i, path in enumerate(files):
            records = _records(path)
            kept = [r for r in records if r['step'] <= step]
            found += kept
            if len(kept) < len(records):
                for after in reversed(files[i + 1 :]):
                    after.unlink()
                break
        number = _number(path) if files else 0
        return number, [json.dumps(r) + '\n' for r in kept] if files else [], found

    def write(self, step: int, split: str, values: dict) -> None:
        """Writes a record of numbers, and of lists of numbers (one per layer)."""
        if (step, split) in self._written:
            return
        self._written.add((step, split))
        safe = {name: v if not isinstance(v, float) or math.isfinite(v) else str(v) for name, v in values.items()}
        line = json.dumps({'step': step, 'split': split, **safe}) + '\n'
        with self._write_errors():
            self._file.write(line.encode())
            if not self._in_bucket:
                self._file.flush()
            elif time.monotonic() > self._due:
                self.flush()
            for name, value in values.items():
                for suffix, v in enumerate(value) if isinstance(value, list) else [('', value)]:
                    self._board.add_scalar(f'{split}/{name}' + (f'/{suffix}' if suffix != '' else ''), v, step)

    def describe(self, **texts: str) -> None:
        """Writes texts about the run to TensorBoard."""
        for name, text in texts.items():
            self._board.add_text(name, text)

    def flush(self) -> None:
        """Makes the metrics that were written visible to others, and safe from a crash of the machine."""
        self._due = time.monotonic() + FLUSH_SECONDS
        with self._write_errors():
            self._file.flush()
            if not self._in_bucket:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes both."""
        try:
            self.flush()
        finally:
            with self._write_errors():
                self._file.close()
                self._board.close()

    @contextlib.contextmanager
    def _write_errors(self):
        try:
            yield
        except OSError as e:
            raise CheckpointError(f'{self._path}: cannot be written: {e.strerror or e}; checkpoints are as they were') from e


class _Parts:
    """A file that grows in a bucket: PATH, PATH.00001, …; only the last part is written again, until it has PART bytes.

    A flush that fails warns, and the next one tries again. The `tries`-th in a row, and the last of all, raise a CheckpointError.
    """

    def __init__(self, path: epath.Path, number: int = 0, content: bytes = b'', tries: float = TRIES):
        self._path, self._number, self._content, self._tries = path, number, bytearray(content), tries
        self._changed, self._failures = True, 0

    def write(self, data: bytes) -> None:
        self._content += data
        self._changed = True

    def flush(self) -> None:
        if not self._changed:
            return
        try:
            write_bytes(_part(self._path, self._number), bytes(self._content), CheckpointError)
        except CheckpointError as e:
            self._failures += 1
            if self._failures >= self._tries:
                raise
            tqdm.write(f'Warning: {e}')
            return
        self._changed, self._failures = False, 0
        if len(self._content) >= PART:
            self._number, self._content = self._number + 1, bytearray()

    def close(self) -> None:
        self._tries = 1 if self._tries < math.inf else math.inf
        self.flush()


class _Boards:
    """In place of tensorboardX's own writers to buckets, which send the whole file each time and need clients of their own."""

    # No run ends for a chart. An exception would end tensorboardX's thread, and the loop would wait for it.
    open = staticmethod(lambda path: _Parts(epath.Path(path), tries=math.inf))
    directory_check = staticmethod(lambda path: None)


for _scheme in ('gs', 's3'):
    record_writer.register_writer_factory(_scheme, _Boards)


def metric_files(workdir: epath.PathLike) -> list[epath.Path]:
    """The files that together are WORKDIR/metrics.jsonl, in order: in a bucket there are more, metrics.jsonl.00001, …"""
    workdir = epath.Path(workdir)
    found = workdir.iterdir() if workdir.exists() else []
    return sorted((path for path in found if re.fullmatch(r'metrics\.jsonl(\.\d{5,})?', path.name)), key=_number)


def last_step(workdir: epath.Path) -> int:
    """The last step in WORKDIR/metrics.jsonl; 0 if there is none."""
    newest_first = (_records(path) for path in reversed(metric_files(workdir)))
    return next((max(r['step'] for r in records) for records in newest_first if records), 0)


def _part(path, number):
    return path.with_name(f'{path.name}.{number:05}') if number else path


def _number(path):
    return int(path.suffix[1:]) if path.suffix[1:].isdigit() else 0


def _records(path):
    """The records of a metrics.jsonl. A torn last line, as a killed process leaves it, is dropped silently."""
    try:
        lines = path.read_bytes().decode(errors='replace').splitlines()
    except Exception as e:  # clients of buckets raise exceptions of their own
        raise CheckpointError(f'{path}: cannot be read: {getattr(e, "strerror", None) or root_cause(e)}') from e
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get('step'), int) and 'split' in record:
                records.append(record)
    if len(records) < len(lines) - 1:
        tqdm.write(f'Warning: {path}: skipped {len(lines) - len(records)} of {len(lines)} lines, which are malformed')
    return records
