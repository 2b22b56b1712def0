"""Where metrics go: metrics.jsonl and TensorBoard, written together, and from here to the `services` that a run asks for."""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence

import tensorboardX
from etils import epath
from tensorboardX import record_writer

from spark.errors import CheckpointError, root_cause
from spark.progress import tqdm
from spark.runtime import entries, in_bucket, write_bytes, write_text
from spark.training import services

PART = 1 << 20  # bytes of a part of a file in a bucket
FLUSH_SECONDS = 60  # between writes of metrics to a bucket, of TensorBoard anywhere, and after a write that failed


class MetricsWriter:
    """Appends one JSON object per call to WORKDIR/metrics.jsonl, and its numbers to WORKDIR/tensorboard and to other trackers.

    A run that resumes at `step` drops the records after that step, and does not write again those that are kept: no step
    appears twice. In a bucket, where files cannot be appended to, metrics.jsonl grows by parts (`metric_files`).

    What cannot be written is kept for the next time, with a warning. Only `flush` raises a CheckpointError: a run calls it before
    it saves, insistently, so that no checkpoint is without its metrics.
    """

    def __init__(self, workdir: epath.Path, step: int, names: Sequence[str] = (), about: dict | None = None):
        self._path, self._in_bucket, self._due = workdir / 'metrics.jsonl', in_bucket(workdir), 0.0
        reached = {r['split']: r['step'] for r in recorded(workdir)} if names else {}
        self._services = [services.Service(name, workdir, about or {}, reached) for name in names]
        with self._write_errors():
            last, lines, found = self._dropped_after(workdir, step)
            self._written = {(r['step'], r['split']) for r in found}
            for service in self._services:
                service.replay((r['step'], r['split'], _values(r)) for r in found)
            if self._in_bucket:
                self._file = _Parts(self._path, last, ''.join(lines).encode())
            else:
                write_text(_part(self._path, last), ''.join(lines), CheckpointError)
                self._file = _Appended(_part(self._path, last))
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
        key = {'step': step, 'split': split}  # which stand first, and which no value replaces
        line = json.dumps(key | safe | key) + '\n'
        self._file.write(line.encode())
        if time.monotonic() > self._due:
            flushed = self._try_to_flush()
            self._due = time.monotonic() + FLUSH_SECONDS * (self._in_bucket or not flushed)
        numbers = dict(_numbers(values))
        with self._write_errors():
            for name, x in numbers.items():
                self._board.add_scalar(f'{split}/{name}', x, step)
        for service in self._services:
            service.write(step, split, numbers)

    def describe(self, **texts: str) -> None:
        """Writes texts about the run to TensorBoard."""
        for name, text in texts.items():
            self._board.add_text(name, text)

    def flush(self) -> None:
        """Makes the metrics that were written visible to others, and safe from a crash of the machine."""
        self._due = time.monotonic() + FLUSH_SECONDS * self._in_bucket
        with self._write_errors():
            self._file.flush()
            self._file.sync()

    def _try_to_flush(self):
        """Whether that succeeded; else there is a warning."""
        try:
            self._file.flush()
        except Exception as e:
            tqdm.write(f'Warning: {self._path}: {getattr(e, "strerror", None) or root_cause(e)}')
            return False
        return True

    def finish(self, summary: dict) -> None:
        """Hands the summary, the table of evaluations and the curves on to other trackers."""
        for service in self._services:  # which reads the records, in its thread: what fails there ends no run
            service.finish(summary, lambda: list(recorded(self._path.parent)))

    def close(self, outcome: str = 'finished') -> None:
        """Closes all. A run that comes to its end has called `flush` before; else it is 'stopped' or 'failed'."""
        try:
            self._try_to_flush()
            with self._write_errors():
                self._file.close()
                self._board.close()
        finally:
            services.close(self._services, outcome)

    @contextlib.contextmanager
    def _write_errors(self):
        try:
            yield
        except OSError as e:
            raise CheckpointError(f'{self._path}: cannot be written: {e.strerror or e}; checkpoints are as they were') from e


class _Appended:
    """A local file that grows. What could not be written comes first the next time."""

    def __init__(self, path: epath.Path):
        self._file, self._left = open(path, 'ab', buffering=0), bytearray()

    def write(self, data: bytes) -> None:
        self._left += data

    def flush(self) -> None:
        while self._left:
            del self._left[: self._file.write(self._left)]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Parts:
    """A file that grows in a bucket: PATH, PATH.00001, …; only the last part is written again, until it has PART bytes."""

    def __init__(self, path: epath.Path, number: int = 0, content: bytes = b''):
        self._path, self._number, self._content, self._changed = path, number, bytearray(content), True

    def write(self, data: bytes) -> None:
        self._content += data
        self._changed = True

    def flush(self) -> None:
        if self._changed:
            write_bytes(_part(self._path, self._number), bytes(self._content), CheckpointError)
            self._changed = False
            if len(self._content) >= PART:
                self._number, self._content = self._number + 1, bytearray()

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Board(_Parts):
    """No run ends for a chart: an exception would end tensorboardX's thread, and the loop would wait for it."""

    def flush(self) -> None:
        try:
            super().flush()
        except CheckpointError as e:
            tqdm.write(f'Warning: {e}')

    def close(self) -> None:
        self.flush()


class _Boards:
    """In place of tensorboardX's own writers to buckets, which send the whole file each time and need clients of their own."""

    open = staticmethod(lambda path: _Board(epath.Path(path)))
    directory_check = staticmethod(lambda path: None)


for _scheme in ('gs', 's3'):
    record_writer.register_writer_factory(_scheme, _Boards)


def metric_files(workdir: epath.PathLike) -> list[epath.Path]:
    """The files that together are WORKDIR/metrics.jsonl, in order: in a bucket there are more, metrics.jsonl.00001, …"""
    found = entries(epath.Path(workdir))
    return sorted((path for path in found if re.fullmatch(r'metrics\.jsonl(\.\d{5,})?', path.name)), key=_number)


def last_step(workdir: epath.Path) -> int:
    """The last step in WORKDIR/metrics.jsonl; 0 if there is none."""
    newest_first = (_records(path) for path in reversed(metric_files(workdir)))
    return next((max(r['step'] for r in records) for records in newest_first if records), 0)


def recorded(workdir: epath.PathLike) -> Iterator[dict]:
    """The records of metrics.jsonl."""
    for path in metric_files(workdir):
        yield from _records(path)


def _numbers(values):
    """(name, number) of what a record holds; the numbers of a list are NAME/0, NAME/1, …"""
    for name, value in values.items():
        if isinstance(value, list):
            yield from ((f'{name}/{i}', x) for i, x in enumerate(value))
        else:
            yield name, value


def _values(record):
    """The numbers of a record of metrics.jsonl, in which those that are not finite are text."""
    values = {name: float(v) if isinstance(v, str) else v for name, v in record.items() if name not in ('step', 'split')}
    return dict(_numbers(values))


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
