"""Training, top to bottom: set up, restore or start; then batch, step, log, evaluate, save, stop; report."""

import contextlib
import hashlib
import itertools
import json
import math
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from spark import config
from spark.checkpoints.manager import Checkpoints
from spark.checkpoints.period import Period
from spark.checkpoints.reading import agreed, by_first_process, together
from spark.data import documents, rows
from spark.data.tokenizer import tokenizer_for
from spark.errors import CheckpointError, ConfigError, DataError, Preempted, SparkError, Stopped, translated_xla_errors
from spark.progress import tqdm
from spark.runtime import revision, stop_requests
from spark.storage import insistently
from spark.training import by_path, directory, environment, optimizer, start, trackers
from spark.training.logs import Clock, Log, Profiler
from spark.training.step import Trainer, TrainState, evaluate
from spark.training.watchdog import Watchdog

CACHE_DIR = 'JAX_COMPILATION_CACHE_DIR'
Batches = Iterable[dict] | Callable[[int], Iterable[dict]]


def train(
    cfg: config.ExperimentConfig, workdir: epath.PathLike, batches: Batches | None = None,
    held_out: dict[str, Iterable[dict]] | None = None, extend: bool = False, holder: contextlib.ExitStack | None = None,
) -> tuple[dict, Trainer, TrainState]:  # fmt: skip
    """Trains to cfg.train.steps, from the newest checkpoint in `workdir` if there is one; (summary, trainer, final state).

    Args:
      cfg: the config.
      workdir: the run directory.
      batches: training data in place of data.source: an iterable of batches as `data.rows.read` describes them, of which each
        process gives all rows, or those of `Trainer.local_rows`. On resume the batches that were seen are skipped; or it is a
        function of their number that returns the others.
      held_out: batches of 'validation' and 'test' in place of those of data.eval_source or data.source, to iterate repeatedly.
      extend: may the steps and the learning rate (`config.SCHEDULE`) differ from those that the run in `workdir` had?
      holder: keeps other jobs off `workdir` until it is closed; by default until this function returns.

    Raises a SparkError with the exit code of what went wrong; with the state saved, Preempted after SIGTERM
    and Stopped at train.stop_at.
    """
    # XLA's errors are translated before anything is closed, since closing may wait for processes that have died.
    with contextlib.ExitStack() as stack, translated_xla_errors():
        run = Run(cfg, epath.Path(workdir), stack, batches, held_out, extend, holder)
        run.loop()
        return run.report(), run.trainer, run.state


class Run:
    """A run: its step, state and data iterator, whether it is evaluated and saved, and where it reports; `stack` closes it."""

    def __init__(
        self, cfg: config.ExperimentConfig, workdir: epath.Path, stack: contextlib.ExitStack,
        batches: Batches | None = None, held_out: dict[str, Iterable[dict]] | None = None, extend: bool = False,
        holder: contextlib.ExitStack | None = None,
    ):  # fmt: skip
        self.workdir, self.clock, self.writer = workdir, Clock(), None  # the first process has a writer
        cfg = directory.as_begun(workdir, cfg)
        self.about = {'config': cfg.model_dump(mode='json'), **revision()}
        with self.clock.during('start'):
            self.tokenizer, self.cfg = agreed(lambda: tokenizer_for(cfg), 'data.tokenizer: cannot be read')
            config.check_devices(self.cfg, jax.device_count())
            self.trainer = Trainer(self.cfg)
            self._first(lambda: directory.check(workdir, cfg, extend))
            # All data is opened before anything is compiled: a missing held-out split must not show only after the training.
            # A source that is not prepared is prepared now, before the watchdog looks on: that may take hours.
            opened = lambda: self._open_data(batches, held_out)
            self.rows, self.held_out = insistently(lambda: together(opened, 'data.source: cannot be read', DataError))
            if self.held_out.keys() != {'validation', 'test'}:
                raise ConfigError(f'held_out has {", ".join(self.held_out)}: want validation and test')
            self.digest = _digest(self.rows, self.held_out)
            self.stop = stack.enter_context(stop_requests())
            self.watchdog = stack.enter_context(Watchdog(cfg.train.stall_seconds))
            self.profiler = Profiler(cfg.train, workdir, stack)
            if cfg.train.cache == 'on' or (cfg.train.cache == 'auto' and jax.default_backend() != 'cpu'):
                jax.config.update('jax_compilation_cache_dir', os.environ.get(CACHE_DIR) or str(workdir / 'xla_cache'))
            directory.hold(workdir, holder or stack)
            kept = cfg.train.keep, cfg.train.keep_every, cfg.train.keep_every_minutes
            self.checkpoints = Checkpoints(workdir / 'checkpoints', *kept)
            stack.enter_context(self.trainer.context())
            origin = self._restore_or_start(cfg)
            self._first(lambda: self._claim(cfg, extend, origin))  # by a start that worked
            self.period = Period(cfg.train.save_every_minutes, self.step)
            if origin:
                self._save()  # from here on a branch needs no other run
                self.checkpoints.wait()
            self.batches = self._open_batches(batches)
            if hasattr(self.batches, 'close'):
                stack.callback(self.batches.close)
            if self.writer:
                stack.callback(self.writer.close)
            stack.callback(self.checkpoints.close)
        if self.step < cfg.train.steps:
            print(f'Compiling a step of {self.trainer.n_params:,} parameters for {self._devices()} …', flush=True)
            print(f'{optimizer.title(self.cfg.optimizer, cfg.train.steps)}\n{by_path.table(self.trainer.settings)}', flush=True)
            self.watchdog.alive('compiling', slow=True)
            with self.clock.during('compile'):
                self.train_step = self.trainer.compile_train_step()
        options = {'disable': jax.process_index() != 0, 'seconds': math.inf}  # without a terminal, a line for each record
        self.bar = tqdm(total=cfg.train.steps, initial=self.step, desc='train', unit='step', **options)
        stack.callback(self.bar.close)
        self.log = Log(self.trainer, self.writer, self.bar, self.step, self.clock, self._params_before)

    def loop(self) -> None:
        """Trains to the last step. Raises Preempted, with the state saved, if asked to stop, and Stopped at train.stop_at."""
        cfg = self.cfg.train
        end = min(cfg.stop_at or cfg.steps, cfg.steps)
        if not self.evaluated:  # the run was stopped during this evaluation
            self.evaluate()
        while self.step < end and not self.stop_requested():
            self.checkpoints.check()
            self.profiler.before(self.step + 1)
            batch, on_devices = self.next_batch()
            with jax.transfer_guard('disallow'):  # nothing waits for the device by accident
                self.state, sums = self.train_step(self.state, on_devices)
                self.step += 1
                self.log.flush()  # the step before, while this one runs
            last = self.step == cfg.steps
            save = self.step == end or (cfg.save_every > 0 and self.step % cfg.save_every == 0)
            save_now = self.period.due(self.step) or save  # when a period ends must not show in the metrics
            self.evaluated = last or not (self.step == end or (cfg.eval_every and self.step % cfg.eval_every == 0))
            self.log.push(self.step, sums, batch, save or self.step % cfg.log_every == 0)
            self.bar.update()
            self.profiler.after(self.step, self.state)
            if save_now or not self.evaluated:
                self.log.flush()  # raises before a state after a bad update could be saved
            if not self.evaluated:
                self.evaluate()
            if save_now:
                self.save()
        self.log.flush()
        if self.step < cfg.steps:
            if self.saved != self.step:
                self.save()
            raise self._preempted()
        self.bar.close()

    def next_batch(self) -> tuple[dict, dict]:
        """The next batch, as host arrays and as global arrays."""
        source = 'batches' if self.rows is None else self.cfg.data.source
        with self.clock.during('data'):
            try:
                batch = next(self.batches)
            except StopIteration:
                after = f' after data.epochs = {self.cfg.data.epochs}' if self.rows is not None else ''
                raise DataError(f'{source}: exhausted at step {self.step}{after}') from None
            except SparkError:
                raise
            except Exception as e:  # raised by a worker
                raise DataError(f'{source}: cannot be read at step {self.step}: {type(e).__name__}: {e}') from e
            if missing := [name for name in rows.NAMES if name not in batch]:
                raise DataError(f'{source}: batch {self.step} has no {missing[0]}; want {", ".join(rows.NAMES)}')
            self.rows_seen += self.cfg.data.batch_size
            return batch, self.trainer.put({name: np.asarray(batch[name], np.int32) for name in rows.NAMES})

    def evaluate(self) -> None:
        """Evaluates the validation split; `evaluated` stays False if interrupted."""
        with self.log.paused('evaluate'):
            report = self._evaluate('validation', self.cfg.train.eval_batches)
        if report:
            self.evaluated = True
            mean = f', of the mean of the parameters {report["ema_loss"]:.4f}' if 'ema_loss' in report else ''
            self.bar.write(f'step {self.step}: validation loss {report["loss"]:.4f}{mean}')

    def save(self) -> None:
        """Starts to save the state and the number of rows seen."""
        with self.log.paused('checkpoint'):
            self.watchdog.alive('saving', slow=True)
            self._first(lambda: self.writer.flush())
            self._save()

    def _save(self):
        self.watchdog.alive('saving', slow=True)
        place = {'rows': self.rows_seen, 'digest': self.digest, 'batch_size': self.cfg.data.batch_size}
        self.checkpoints.save(self.step, self.state, {'data': place, 'evaluated': self.evaluated})
        self.saved = self.step
        self.period.restart(self.step)

    def stop_requested(self, activity: str = 'stepping', slow: bool = False) -> bool:
        """Feeds the watchdog; returns True if the run was asked to stop."""
        self.watchdog.alive(activity, slow)
        return self.stop()

    def report(self) -> dict[str, Any]:
        """Evaluates both held-out splits, or train.final_eval batches of each; the summary of the run."""
        reports, limit, origin = {}, self.cfg.train.final_eval, self.workdir / start.ORIGIN
        for split, data in self.held_out.items():
            length = operator.length_hint(data, limit)
            print(f'Evaluating the {split} split: {min(limit or length, length) or "all"} batches …', flush=True)
            with self.clock.during('evaluate'):
                reports[split] = self._evaluate(split, limit)
            if reports[split] is None:
                raise self._preempted()
        self._first(lambda: self.writer.flush())
        self.checkpoints.finish(self.save)
        # gzip is the yardstick that everyone has. On a large split it would take longer than it is worth.
        test, texts, log = reports['test'], self.held_out['test'], self.log
        small = not limit and 0 < test['bytes'] <= 64 << 20 and isinstance(texts, rows.EvalBatches)
        test['gzip_bits_per_byte'] = 8 * documents.gzip_size(texts.texts(self.tokenizer)) / test['bytes'] if small else None
        return {
            'steps': self.step,
            'parameters': self.trainer.n_params,
            'devices': self._devices(),
            'train_seconds': round(log.seconds, 2),
            'tokens_per_second': round(log.tokens / log.seconds, 1) if log.tokens else None,
            'train_loss': log.last_loss,
            **reports,
            **self.clock.report(),
            'origin': self._first(lambda: json.loads(origin.read_text()) if origin.exists() else None),
            **self.about,
        }

    def _first(self, act):
        """What is done with the run directory, by the first process; all have its result, or its error."""
        return by_first_process(act, f'--workdir={self.workdir}')

    def _claim(self, cfg, extend, origin):
        """Begins to write to the run directory; `origin` is that from which a new branch comes."""
        directory.claim(self.workdir, cfg, extend)
        environment.record(self.workdir)
        self.checkpoints.begin(self.saved or 0)
        if origin:
            start.record(self.workdir, origin, self.step)
        self.writer = trackers.MetricsWriter(self.workdir, self.step)
        self.writer.describe(**{name: f'```\n{json.dumps(value, indent=2)}\n```' for name, value in self.about.items()})

    def _restore_or_start(self, cfg):
        """Sets step, state, evaluated, saved and rows_seen; the run directory from which a new branch comes, or None."""
        self.watchdog.alive('restoring', slow=True)
        origin = None
        if restored := self.checkpoints.restore_newest(self.trainer.abstract_state):
            self.step, self.state, data = restored
            self.rows_seen = self._place_in_data(data['data'], self.workdir)
            self.evaluated, self.saved = data['evaluated'], self.step
            if self.step > cfg.train.steps:
                raise ConfigError(f'train.steps = {cfg.train.steps}: want at least {self.step}, which {self.workdir} has reached')
            print(f'Resuming from step {self.step} in {self.workdir}', flush=True)
        else:
            save_every = self.cfg.train.save_every
            self._first(lambda: start.check_nothing_lost(self.workdir, self.checkpoints.last_saved(), save_every))
            if cfg.train.branch_from:
                self.step, self.state, data, origin = start.branch(self.trainer, cfg)
                self.rows_seen, self.evaluated, self.saved = self._place_in_data(data['data'], origin), data['evaluated'], None
            else:
                self.step, self.state = 0, start.initial_state(self.trainer)
                self.rows_seen, self.evaluated, self.saved = 0, True, None
        return origin

    def _place_in_data(self, saved, workdir):
        """The number of rows seen, as the run in `workdir` saved it. Raises an error if the data are not those that it had."""
        if 'rows' not in saved:
            raise CheckpointError(
                f'{workdir}: was saved by an older version, which kept the state of an iterator as the place in the data; '
                f'start a new run from its weights with --restore_from={workdir}'
            )
        if self.rows is not None and self.rows.changes() and saved['batch_size'] != self.cfg.data.batch_size:
            want = f'want the {saved["batch_size"]} that the run had, since data.source changes at steps'
            raise ConfigError(f'data.batch_size = {self.cfg.data.batch_size}: {want}')
        if saved['digest'] != self.digest:
            source = 'batches' if self.rows is None else self.cfg.data.source
            changed = f'{source}: is not what the run had until step {self.step}: another source, or files that changed'
            if not self.cfg.data.allow_changed:
                raise DataError(f'{changed}; restore them, or go on with what there is by --config.data.allow_changed=True')
            print(f'Warning: {changed}', flush=True)
        return saved['rows']

    def _open_data(self, batches, held_out):
        """The rows to train on, unless there are batches of one's own, and the held-out batches by split."""
        opened, data = {}, self.cfg.data
        train = rows.TrainRows(data, self.cfg.seed, opened) if batches is None else None
        held_out = held_out or {
            split: rows.EvalBatches(data, split, self.trainer.local_rows, opened) for split in ('validation', 'test')
        }
        return train, held_out

    def _open_batches(self, batches):
        """An iterator over the batches that are not seen yet."""
        if batches is None:
            return self.rows.batches(self.rows_seen, self.trainer.local_rows)
        if callable(batches):
            return iter(batches(self.step))
        iterator = iter(batches)
        for _ in tqdm(itertools.islice(iterator, self.step), desc='skipping', unit='batch', leave=False, disable=not self.step):
            pass
        return iterator

    def _evaluate(self, split, limit=0):
        """Evaluates a held-out split and writes its metrics; returns None if interrupted."""
        stop = lambda: self.stop_requested('evaluating', slow=True)
        report = evaluate(self.trainer, self.state.params, self.held_out[split], split, limit, stop=stop)
        if report and self.cfg.optimizer.ema:
            mean = evaluate(self.trainer, self.state.ema, self.held_out[split], f'{split}, ema', limit, stop=stop)
            report = mean and report | {f'ema_{name}': mean[name] for name in ('loss', 'perplexity', 'bits_per_byte')}
        if report and self.writer:
            self.writer.write(self.step, split, report)
        return report

    def _params_before(self):
        """(the parameters before a bad update, a description of where they come from)."""
        self.watchdog.alive('looking for what is not finite', slow=True)  # it may read a checkpoint, and compiles
        if self.trainer.guarded:
            return self.state.params, ''  # the update was skipped
        self.checkpoints.wait()
        if step := max(self.checkpoints.steps(), default=0):
            params = self.checkpoints.restore_params(step, self.trainer.abstract_state.params)
        else:
            params = start.initial_state(self.trainer).params
        return params, f'with the parameters of step {step}, '

    def _preempted(self):
        self.checkpoints.finish(self.save)
        cfg, where = self.cfg.train, f'at step {self.step} of {self.cfg.train.steps}, saved in {self.workdir}'
        if 0 < cfg.stop_at <= self.step < cfg.steps and self.evaluated:
            return Stopped(f'{where}, by train.stop_at = {cfg.stop_at}; a higher one, or 0, goes on')
        return Preempted(f'stopped {where}; run the same command to go on')

    def _devices(self):
        return f'{self.trainer.mesh.size} × {jax.devices()[0].device_kind}'


def _digest(train, held_out):
    """Identifies the data of a run, as far as it comes from token stores; None of batches of one's own.

    Raises a DataError if the processes of a job would train on different data.
    """
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
