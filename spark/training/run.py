"""Training, top to bottom: set up, restore or start; then batch, step, log, evaluate, save, stop; report."""

import contextlib
import json
import math
import operator
import os
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from spark import config
from spark.checkpoints.manager import Checkpoints
from spark.checkpoints.period import Period
from spark.checkpoints.reading import agreed, by_first_process, together
from spark.data import documents, rows
from spark.data.tokenizer import tokenizer_for
from spark.errors import ConfigError, DataError, Preempted, Stopped, translated_xla_errors
from spark.progress import tqdm
from spark.runtime import revision, stop_requests
from spark.storage import insistently
from spark.training import by_path, directory, distillation, environment, optimizer, services, start, trackers
from spark.training.evals import Evaluations, said
from spark.training.feed import Batches, Feed
from spark.training.logs import Clock, Log, Profiler
from spark.training.step import Trainer, TrainState
from spark.training.watchdog import Watchdog

CACHE_DIR = 'JAX_COMPILATION_CACHE_DIR'


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
        self.about = {'config': cfg.model_dump(mode='json'), **revision()}
        with self.clock.during('start'):
            self.tokenizer, self.cfg = agreed(lambda: tokenizer_for(cfg), 'data.tokenizer: cannot be read')
            config.check_devices(self.cfg, jax.device_count())
            self.trainer = Trainer(self.cfg, teacher=distillation.model_of(self.cfg, jax.device_count()))
            self._first(lambda: (directory.check(workdir, cfg, extend), services.check(cfg.train.trackers))[0])
            # All data is opened before anything is compiled: a missing held-out split must not show only after the training.
            # A source that is not prepared is prepared now, before the watchdog looks on: that may take hours.
            opened = lambda: Feed(self.cfg, self.trainer.local_rows, batches, held_out)
            self.feed = insistently(lambda: together(opened, 'data.source: cannot be read', DataError))
            self.feed.check()
            found = lambda: Evaluations(self.cfg, self.trainer, self.tokenizer, self.feed)
            self.evaluations = agreed(found, 'train.evals: cannot be evaluated')
            self.stop = stack.enter_context(stop_requests())
            self.watchdog = stack.enter_context(Watchdog(cfg.train.stall_seconds))
            self.profiler = Profiler(cfg.train, workdir, stack)
            if cfg.train.cache == 'on' or (cfg.train.cache == 'auto' and jax.default_backend() != 'cpu'):
                jax.config.update('jax_compilation_cache_dir', os.environ.get(CACHE_DIR) or str(workdir / 'xla_cache'))
            directory.hold(workdir, holder or stack)
            kept = cfg.train.keep, cfg.train.keep_every, cfg.train.keep_every_minutes
            self.checkpoints = Checkpoints(workdir / 'checkpoints', *kept)
            stack.enter_context(self.trainer.context())
            origin, saved = self._restore_or_start(cfg)
            self.teacher, self.taught_by = distillation.load(self.trainer, saved)
            self._first(lambda: self._claim(cfg, extend, origin))  # by a start that worked
            self.period = Period(cfg.train.save_every_minutes, self.step)
            if origin:
                self._save()  # from here on a branch needs no other run
                self.checkpoints.wait()
            self.feed.open(self.step)
            stack.callback(self.feed.close)
            stack.push(self._close_writer)
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
        self.end = end = min(cfg.stop_at or cfg.steps, cfg.steps)
        if not self.evaluated:  # the run was stopped during this evaluation
            self.evaluate()
        while self.step < end and not self.stop_requested():
            self.checkpoints.check()
            self.profiler.before(self.step + 1)
            batch, on_devices = self.next_batch()
            with jax.transfer_guard('disallow'):  # nothing waits for the device by accident
                self.state, sums = self.train_step(self.state, on_devices, *self.teacher)
                self.step += 1
                self.log.flush()  # the step before, while this one runs
            last = self.step == cfg.steps
            save = self.step == end or (cfg.save_every > 0 and self.step % cfg.save_every == 0)
            save_now = self.period.due(self.step) or save  # when a period ends must not show in the metrics
            self.evaluated = last or not self._due()
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
        with self.clock.during('data'):
            batch = self.feed.next(self.step)
            return batch, self.trainer.put({name: np.asarray(batch[name], np.int32) for name in rows.NAMES})

    def evaluate(self) -> None:
        """Evaluates what is due at this step; `evaluated` stays False if interrupted."""
        with self.log.paused('evaluate'):
            for evaluation in self._due():
                report = self._evaluate(evaluation)
                if report is None:
                    return
                self.bar.write(f'step {self.step}: {evaluation.label} {said(report)}')
        self.evaluated = True

    def _due(self):
        return self.evaluations.due(self.step, self.step == self.end)

    def save(self) -> None:
        """Starts to save the state and the number of rows seen."""
        with self.log.paused('checkpoint'):
            self.watchdog.alive('saving', slow=True)
            self._first(lambda: self.writer.flush())
            self._save()

    def _save(self):
        self.watchdog.alive('saving', slow=True)
        teacher = {'teacher': self.taught_by} if self.taught_by else {}
        self.checkpoints.save(self.step, self.state, {'data': self.feed.place(), 'evaluated': self.evaluated, **teacher})
        self.saved = self.step
        self.period.restart(self.step)

    def stop_requested(self, activity: str = 'stepping', slow: bool = False) -> bool:
        """Feeds the watchdog; returns True if the run was asked to stop."""
        self.watchdog.alive(activity, slow)
        return self.stop()

    def report(self) -> dict[str, Any]:
        """Evaluates both held-out splits, or train.final_eval batches of each, and train.evals; the summary of the run."""
        reports, limit, origin = {}, self.cfg.train.final_eval, self.workdir / start.ORIGIN
        for evaluation in (*self.evaluations.final, *self.evaluations.entries):
            if evaluation.label in self.feed.held_out:
                length = operator.length_hint(self.feed.held_out[evaluation.label], limit)
                print(f'Evaluating the {evaluation.label} split: {min(limit or length, length) or "all"} batches …', flush=True)
            with self.clock.during('evaluate'):
                reports[evaluation.label] = report = self._evaluate(evaluation)
            if report is None:
                raise self._preempted()
            if evaluation in self.evaluations.entries:
                print(f'{evaluation.label}: {said(report)}', flush=True)
        self._first(lambda: self.writer.flush())
        self.checkpoints.finish(self.save)
        # gzip is the yardstick that everyone has. On a large split it would take longer than it is worth.
        test, texts, log = reports['test'], self.feed.held_out['test'], self.log
        small = not limit and 0 < test['bytes'] <= 64 << 20 and isinstance(texts, rows.EvalBatches)
        test['gzip_bits_per_byte'] = 8 * documents.gzip_size(texts.texts(self.tokenizer)) / test['bytes'] if small else None
        summary = {
            'steps': self.step,
            'parameters': self.trainer.n_params,
            'devices': self._devices(),
            'train_seconds': round(log.seconds, 2),
            'tokens_per_second': round(log.tokens / log.seconds, 1) if log.tokens else None,
            'train_loss': log.last_loss,
            **reports,
            **self.clock.report(),
            'origin': self._first(lambda: json.loads(origin.read_text()) if origin.exists() else None),
            **({'teacher': self.taught_by} if self.taught_by else {}),
            **self.about,
        }
        if self.writer:
            self.writer.finish(summary)
        return summary

    def _close_writer(self, kind, error, trace):
        del error, trace
        if self.writer:
            self.writer.close('finished' if kind is None else 'stopped' if issubclass(kind, Preempted | Stopped) else 'failed')

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
        self.writer = trackers.MetricsWriter(self.workdir, self.step, cfg.train.trackers, self.about)
        self.writer.describe(**{name: f'```\n{json.dumps(value, indent=2)}\n```' for name, value in self.about.items()})

    def _restore_or_start(self, cfg):
        """Sets step, state, evaluated, saved and the place in the data.

        (The run directory from which a new branch comes, or None; what was saved with the state, or {}.)
        """
        self.watchdog.alive('restoring', slow=True)
        origin, data = None, {}
        if restored := self.checkpoints.restore_newest(self.trainer.abstract_state):
            self.step, self.state, data = restored
            if self.step > cfg.train.steps:
                raise ConfigError(f'train.steps = {cfg.train.steps}: want at least {self.step}, which {self.workdir} has reached')
            print(f'Resuming from step {self.step} in {self.workdir}', flush=True)
        else:
            save_every = self.cfg.train.save_every
            self._first(lambda: start.check_nothing_lost(self.workdir, self.checkpoints.last_saved(), save_every))
            if cfg.train.branch_from:
                self.step, self.state, data, origin = start.branch(self.trainer, cfg)
            else:
                self.step, self.state = 0, start.initial_state(self.trainer)
        self.evaluated, self.saved = data.get('evaluated', True), self.step if restored else None
        if data:
            self.feed.go_to(data['data'], origin or self.workdir, self.step)
        return origin, data

    def _evaluate(self, evaluation):
        """Evaluates the parameters, and their mean if there is one, and writes the metrics; returns None if interrupted."""
        stop = lambda: self.stop_requested('evaluating', slow=True)
        run = lambda params, label: evaluation.run(self.trainer.variables(params, self.state.step), label, stop)
        report = run(self.state.params, evaluation.label)
        if report is not None and self.cfg.optimizer.ema:
            mean = run(self.state.ema, f'{evaluation.label}, ema')
            of_mean = lambda: {f'ema_{name}': x for name, x in mean.items() if name not in ('tokens', 'bytes')}
            report = None if mean is None else report | of_mean()
        if report is not None and self.writer:
            self.writer.write(self.step, evaluation.label, report)
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
