"""The data of a run: batches to train on, from where it is, and held-out splits."""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from spark.config import ExperimentConfig, eval_entries
from spark.data import rows
from spark.errors import CheckpointError, ConfigError, DataError, SparkError
from spark.progress import tqdm

Batches = Iterable[dict] | Callable[[int], Iterable[dict]]


class Feed:
    """The rows of data.source, unless there are `batches` of one's own, and the held-out batches by split.

    `local_rows` are the rows of a batch that this process holds. The place in the data is the number of rows seen.
    """

    def __init__(
        self, cfg: ExperimentConfig, local_rows: np.ndarray, batches: Batches | None = None,
        held_out: dict[str, Iterable[dict]] | None = None,
    ):  # fmt: skip
        self._cfg, self._local_rows, self._own, self.stores = cfg, local_rows, batches, {}
        self._rows = rows.TrainRows(cfg.data, cfg.seed, self.stores) if batches is None else None
        self.held_out = held_out or {split: self.split(split) for split in ('validation', 'test')}
        self.evals = [(entry, None if entry.tasks else self._of(entry)) for entry in eval_entries(cfg.train.evals)]
        self.source = 'batches' if self._rows is None else cfg.data.source
        self.rows_seen, self._batches = 0, None

    def split(self, name: str) -> rows.EvalBatches:
        """The batches of a split of the data of the config."""
        return rows.EvalBatches(self._cfg.data, name, self._local_rows, self.stores)

    def _of(self, entry):
        """The batches of an entry of train.evals."""
        if entry.source:
            data = self._cfg.data.model_copy(update={'eval_source': entry.source})
            return rows.EvalBatches(data, entry.split, self._local_rows)
        if entry.split == 'train' and self._own is not None:
            raise ConfigError(f"train.evals: {entry.name}: split='train': want 'validation' or 'test' with batches of one's own")
        if entry.split == 'train' and not entry.batches:
            raise ConfigError(f"train.evals: {entry.name}: split='train': want batches=N: it is as long as the training data")
        return self.held_out[entry.split] if entry.split in self.held_out else self.split(entry.split)

    def check(self) -> None:
        """Raises an error if a held-out split is missing, or if the processes of a job would train on different data."""
        if self.held_out.keys() != {'validation', 'test'}:
            raise ConfigError(f'held_out has {", ".join(self.held_out)}: want validation and test')
        self._digest = _digest(self._rows, self.held_out)

    def place(self) -> dict[str, Any]:
        """What a checkpoint remembers."""
        return {'rows': self.rows_seen, 'digest': self._digest, 'batch_size': self._cfg.data.batch_size}

    def go_to(self, place: dict[str, Any], workdir: epath.Path, step: int) -> None:
        """Goes on where the run in `workdir` was at a step. Raises an error if the data are not those that it had."""
        if 'rows' not in place:
            raise CheckpointError(
                f'{workdir}: was saved by an older version, which kept the state of an iterator as the place in the data; '
                f'start a new run from its weights with --restore_from={workdir}'
            )
        if self._rows is not None and self._rows.changes() and place['batch_size'] != self._cfg.data.batch_size:
            want = f'want the {place["batch_size"]} that the run had, since data.source changes at steps'
            raise ConfigError(f'data.batch_size = {self._cfg.data.batch_size}: {want}')
        if place['digest'] != self._digest:
            changed = f'{self.source}: is not what the run had until step {step}: another source, or files that changed'
            if not self._cfg.data.allow_changed:
                raise DataError(f'{changed}; restore them, or go on with what there is by --config.data.allow_changed=True')
            print(f'Warning: {changed}', flush=True)
        self.rows_seen = place['rows']

    def open(self, step: int) -> None:
        """Opens the batches from the place on, at a step."""
        if self._rows is not None:
            self._batches = self._rows.batches(self.rows_seen, self._local_rows)
        elif callable(self._own):
            self._batches = iter(self._own(step))
        else:
            self._batches = iter(self._own)
            seen = itertools.islice(self._batches, step)
            for _ in tqdm(seen, desc='skipping', unit='batch', leave=False, disable=not step):
                pass

    def next(self, step: int) -> dict[str, np.ndarray]:
        """The next batch, after a step. Raises a DataError if there is none, or if it cannot be read."""
        try:
            batch = next(self._batches)
        except StopIteration:
            after = f' after data.epochs = {self._cfg.data.epochs}' if self._rows is not None else ''
            raise DataError(f'{self.source}: exhausted at step {step}{after}') from None
        except SparkError:
            raise
        except Exception as e:  # raised by a worker
            raise DataError(f'{self.source}: cannot be read at step {step}: {type(e).__name__}: {e}') from e
        if missing := [name for name in rows.NAMES if name not in batch]:
            raise DataError(f'{self.source}: batch {step} has no {missing[0]}; want {", ".join(rows.NAMES)}')
        self.rows_seen += self._cfg.data.batch_size
        return batch

    def close(self) -> None:
        """Stops the threads that read batches."""
        if hasattr(self._batches, 'close'):
            self._batches.close()


def _digest(train, held_out):
    """Identifies the data of a run, as far as it comes from token stores; None of batches of one's own."""
    found = [] if train is None else [train.digest]
    found += [split.store.digest for data in held_out.values() if isinstance(data, rows.EvalBatches) for split in data.splits]
    if not found:
        return None
    digest = hashlib.sha256(' '.join(found).encode()).hexdigest()
    if jax.process_count() > 1:
        everywhere = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint32))
        if (everywhere != everywhere[0]).any():
            raise DataError('data.source: the processes of this job read different data: want the same files on all machines')
    return digest
