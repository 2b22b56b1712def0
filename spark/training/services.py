"""Trackers beside metrics.jsonl and TensorBoard: Weights & Biases and MLflow.

Each runs in a thread of its own, so that none holds up a step, and none ends a run.
"""

import csv
import io
import json
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from spark import errors
from spark.errors import ConfigError, root_cause, show_traceback
from spark.progress import tqdm
from spark.runtime import in_bucket, installed, write_json

PROJECT = 'spark'  # the project or experiment, if the environment names none
PATIENCE = {'finished': 60, 'stopped': 10, 'failed': 60}  # seconds that the end of a run waits for its trackers
PACKAGES = {'wandb': ('wandb',), 'mlflow': ('mlflow', 'sqlalchemy', 'alembic')}  # by the name of the tracker, and of the extra


class WandB:
    """Weights & Biases. $WANDB_MODE, $WANDB_PROJECT, $WANDB_ENTITY, … hold."""

    def __init__(self, workdir: epath.Path):
        self._workdir, self._axes = workdir, set()

    def open(self, run_id: str | None, about: dict) -> str:
        """Begins the run, or goes on with that of an id; its id."""
        import wandb

        where = {} if in_bucket(self._workdir) or 'WANDB_DIR' in os.environ else {'dir': str(self._workdir)}
        where['project'] = os.environ.get('WANDB_PROJECT', PROJECT)
        run_id, quiet = run_id or uuid.uuid4().hex[:8], {'silent': True, 'console': 'off'}
        settings = wandb.Settings(**quiet, disable_git=True, x_disable_meta=True)  # no command line, no diff
        self._run = wandb.init(id=run_id, resume='allow', name=self._workdir.name, config=about, settings=settings, **where)
        return run_id

    def last(self, split: str) -> int:
        """The last step of a split that is known to be there; −1 if none is."""
        return int(self._run.summary.get(f'{split}/step', -1))

    def write(self, step: int, split: str, numbers: dict[str, float]) -> None:
        """Writes numbers of a step. wandb's own count of steps would drop what comes late; this one is an axis of each split."""
        axis = f'{split}/step'
        if axis not in self._axes:
            self._axes.add(axis)
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(f'{split}/*', step_metric=axis)
        self._run.log({axis: step} | {f'{split}/{name}': x for name, x in numbers.items()})

    def finish(self, summary: dict, evaluations: list[dict], curves: bytes) -> None:
        """Writes the summary of a run, the table of its evaluations, and a PNG of its curves."""
        import wandb
        from PIL import Image

        columns, rows = _table(evaluations)
        self._run.summary.update({'final': summary})
        self._run.log({'evaluations': wandb.Table(columns, rows), 'curves': wandb.Image(Image.open(io.BytesIO(curves)))})

    def close(self, outcome: str) -> None:
        """Ends the run: it is 'finished', 'stopped' or 'failed'."""
        self._run.finish(exit_code=int(outcome == 'failed'))


class MLflow:
    """MLflow. $MLFLOW_TRACKING_URI says where, by default mlflow.db in the run directory; $MLFLOW_EXPERIMENT_NAME holds."""

    def __init__(self, workdir: epath.Path):
        if 'MLFLOW_TRACKING_URI' not in os.environ and in_bucket(workdir):
            raise ConfigError("train.trackers: 'mlflow' wants $MLFLOW_TRACKING_URI, since a bucket holds no data base")
        self._workdir = workdir

    def open(self, run_id: str | None, about: dict) -> str:
        """As `WandB.open`."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for library in ('mlflow', 'alembic'):  # they tell of each table that they create
            logging.getLogger(library).setLevel(logging.ERROR)
        here = os.path.abspath(self._workdir)
        own = 'MLFLOW_TRACKING_URI' not in os.environ
        self._client = MlflowClient(f'sqlite:///{here}/mlflow.db' if own else None)
        self._id = run_id or self._create(f'file://{here}/mlflow' if own else None)
        if run_id:
            self._client.update_run(run_id, status='RUNNING')
        else:
            params = [Param(name, str(value)[:500]) for name, value in _leaves(about)]
            for i in range(0, len(params), 100):  # as many as a server takes at once
                self._client.log_batch(self._id, params=params[i : i + 100])
        self._client.log_dict(self._id, about, 'about.json')
        self._had = dict(self._client.get_run(self._id).data.metrics)
        return self._id

    def _create(self, artifacts):
        name = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifacts)
        return self._client.create_run(experiment, run_name=self._workdir.name).info.run_id

    def last(self, split: str) -> int:
        """As `WandB.last`."""
        return int(self._had.get(f'{split}/step', -1))

    def write(self, step: int, split: str, numbers: dict[str, float]) -> None:
        """Writes numbers of a step."""
        from mlflow.entities import Metric

        # A server refuses a whole record for a name with other characters, such as pass@1.
        plain = lambda name: re.sub(r'[^\w./: -]', '_', name)
        now, named = int(1000 * time.time()), {plain(f'{split}/{name}'): x for name, x in {**numbers, 'step': step}.items()}
        self._client.log_batch(self._id, metrics=[Metric(name, x, now, step) for name, x in named.items()])

    def finish(self, summary: dict, evaluations: list[dict], curves: bytes) -> None:
        """As `WandB.finish`."""
        from PIL import Image

        text, (columns, rows) = io.StringIO(), _table(evaluations)
        csv.writer(text).writerows([columns, *rows])
        self._client.log_text(self._id, text.getvalue(), 'evaluations.csv')
        self._client.log_dict(self._id, summary, 'summary.json')
        self._client.log_image(self._id, Image.open(io.BytesIO(curves)), 'curves.png')

    def close(self, outcome: str) -> None:
        """As `WandB.close`."""
        status = {'finished': 'FINISHED', 'stopped': 'KILLED', 'failed': 'FAILED'}
        self._client.set_terminated(self._id, status[outcome])


KINDS = {'wandb': WandB, 'mlflow': MLflow}


class Service:
    """A tracker in its thread. The first thing that fails is told in one line; what comes later is still tried.

    The run's id there is kept in WORKDIR/NAME.json. What it has is not written again, so that no step falls where a run resumes
    from an older checkpoint: the tracker tells its last step of a split, or else, if it was opened before, `reached` does, those
    of metrics.jsonl.
    """

    def __init__(self, name: str, workdir: epath.Path, about: dict, reached: dict[str, int]):
        self._name, self._tracker, self._opened, self._told = name, KINDS[name](workdir), False, False
        self._given_up = False
        self._path, self._todo, self._last, self._reached = workdir / f'{name}.json', queue.SimpleQueue(), {}, reached
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._do(lambda: self._open(about))
        self._thread.start()

    def write(self, step: int, split: str, numbers: dict[str, float]) -> None:
        """Writes numbers of a step, unless they were written before."""
        self._do(lambda: self._write(step, split, numbers))

    def replay(self, records: Iterable[tuple[int, str, dict[str, float]]]) -> None:
        """As `write` of all records, (step, split, numbers), which may be very many."""

        def act():
            for record in records:
                self._write(*record)

        self._do(act)

    def finish(self, summary: dict, records: Callable[[], list[dict]]) -> None:
        """Writes what there is at the end of a run, of which `records()` are all records."""

        def act():
            found = records()
            self._tracker.finish(summary, [r for r in found if r['split'] != 'train'], curves(found))

        self._do(act)

    def end(self, outcome: str) -> None:
        """Ends the run there, after all that is not written yet."""
        self._do(lambda: self._tracker.close(outcome))
        self._todo.put(None)

    def wait(self, seconds: float) -> None:
        """Waits for the end."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._tell(f'does not answer; about {self._todo.qsize()} writes are missing')

    def _do(self, act):
        if not self._given_up:
            self._todo.put(act)

    def _work(self):
        for act in iter(self._todo.get, None):
            try:
                act()
            except Exception as e:  # whatever a tracker or its server raises
                show_traceback(e)
                self._tell(' '.join(root_cause(e).split()))
            if not self._opened:
                self._given_up = True  # there is nothing to write to
                return

    def _open(self, about):
        saved = json.loads(self._path.read_text())['id'] if self._path.exists() else None
        found = self._tracker.open(saved, about)
        self._opened, self._reached = True, self._reached if saved else {}
        if found != saved:
            write_json(self._path, {'id': found})

    def _write(self, step, split, numbers):
        if split not in self._last:
            told = self._tracker.last(split)
            self._last[split] = told if told >= 0 else self._reached.get(split, -1)
        if step > self._last[split]:
            self._tracker.write(step, split, numbers)
            self._last[split] = step

    def _tell(self, what):
        if not self._told:
            self._told = True
            errors.leave_at_once = True  # what hooks of its library might wait for at the end of the process
            tqdm.write(f'Warning: train.trackers: {self._name}: {what}; metrics.jsonl and TensorBoard have everything')


def close(services: Sequence[Service], outcome: str) -> None:
    """Ends the run in all of them, and waits for them together, but not for long."""
    for service in services:
        service.end(outcome)
    deadline = time.monotonic() + PATIENCE[outcome]
    for service in services:
        service.wait(max(deadline - time.monotonic(), 0))


def check(names: Sequence[str]) -> None:
    """Raises a ConfigError for a tracker whose packages are not installed."""
    for name in names:
        if not all(map(installed, PACKAGES[name])):
            raise ConfigError(f"train.trackers: {name!r} needs pip install 'spark-transformer[{name}]'")


def curves(records: list[dict]) -> bytes:
    """A PNG of the losses of all splits over steps."""
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for split in dict.fromkeys(r['split'] for r in records):
        points = [(r['step'], r['loss']) for r in records if r['split'] == split and isinstance(r.get('loss'), float)]
        if points:
            axes.plot(*zip(*points, strict=True), '-' if split == 'train' else 'o-', label=split)
    axes.set(xlabel='step', ylabel='loss, nats per token')
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format='png', dpi=130)
    return picture.getvalue()


def _table(records):
    """(columns, rows) of records of numbers; lists are left out."""
    rows = [{name: x for name, x in record.items() if not isinstance(x, list)} for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(name) for name in columns] for row in rows]


def _leaves(tree: dict, prefix: str = '') -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f'{prefix}{name}.')
        else:
            yield prefix + name, value
