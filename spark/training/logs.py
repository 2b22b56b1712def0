"""What the loop tells while it runs: metrics one step late, and traces of the profiler."""

import contextlib
import signal
import time

import jax
import numpy as np

from spark import devices, flops
from spark.data import pipeline
from spark.errors import NotFiniteError
from spark.training import guard, loss, optimizer


class Profiler:
    """Traces of a few steps into WORKDIR/profile: from train.profile_step on, and whenever a SIGUSR1 comes."""

    def __init__(self, cfg, workdir):
        self._cfg, self._directory, self._asked, self._last = cfg, workdir / 'profile', False, None

    def __enter__(self):
        def ask(*_):
            self._asked = True

        try:
            self._previous = signal.signal(signal.SIGUSR1, ask)
        except ValueError:  # not the main thread
            self._previous = None
        return self

    def __exit__(self, *_):
        if self._last is not None:
            jax.profiler.stop_trace()
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)

    def before(self, step):
        """Starts a trace if one is due at this step."""
        if self._last is None and (self._asked or step == self._cfg.profile_step):
            self._asked, self._last = False, step + self._cfg.profile_steps - 1
            jax.profiler.start_trace(str(self._directory))

    def after(self, step, state):
        """Ends the trace with its last step."""
        if self._last is not None and step >= self._last:
            self._last = None
            jax.block_until_ready(state)
            jax.profiler.stop_trace()


class Log:
    """Turns device sums into metrics one step late, so that reading them never holds up the next step.

    params_before: a function from nothing to (parameters before the bad update, words), to look for what is not finite.
    """

    def __init__(self, trainer, writer, bar, step, clock, params_before):
        self._trainer, self._writer, self._bar, self._pending, self._clock = trainer, writer, bar, None, clock
        self._params_before = params_before
        self._since_step, self._mark = step, time.perf_counter()
        self.seconds, self.tokens, self.last_loss = 0.0, 0, None
        cfg = trainer.cfg
        chip = devices.chip(trainer.mesh.devices.flat[0])
        per_token = flops.model_flops_per_token(cfg.model, cfg.data.seq_len)
        self._utilisation_per_speed = per_token / (chip.flops * trainer.mesh.size) if chip else None
        self._schedule = optimizer.schedule(cfg.optimizer, cfg.train.steps)

    def push(self, step, sums, batch, due):
        """Device sums of a step over a batch (host arrays), to be checked by the next `flush`, and written if `due`."""
        self._pending = step, sums, batch, due

    @contextlib.contextmanager
    def paused(self, name):
        """Time in here is not training; it goes to `name` of the clock."""
        start = time.perf_counter()
        with self._clock.during(name):
            yield
        self._mark += time.perf_counter() - start

    def flush(self):
        """Waits for the pushed step. Raises NotFiniteError if it was one bad update too many."""
        if self._pending is None:
            return
        step, sums, batch, due = self._pending
        self._pending = None
        crc, train = batch[pipeline.HASH], self._trainer.cfg.train
        in_a_row = int(jax.device_get(sums['in_a_row']))
        if not (due or in_a_row):
            return
        sums = jax.device_get(sums)
        report = loss.per_token(self._trainer.cfg.model, sums) | {'grad_norm': float(sums['grad_norm'])}
        report['updates_left_out'] = int(sums['left_out'])
        self.last_loss = report['loss']
        if in_a_row:
            said = f'step {step}: loss {report["loss"]}, gradient norm {report["grad_norm"]}, batch {crc:08x}'
            if in_a_row > train.max_skips:
                raise NotFiniteError(f'{said}; {self._blame(report, batch)}; nothing was saved since the last good checkpoint')
            self._bar.write(f'{said}: update left out, {in_a_row} of {train.max_skips} in a row')
        if not due:
            return
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        cfg = self._trainer.cfg
        tokens = (step - self._since_step) * cfg.data.batch_size * cfg.data.seq_len
        self._since_step = step
        self.seconds += elapsed
        self.tokens += tokens
        speed = tokens / elapsed
        report['learning_rate'] = float(self._schedule(step - 1 - report['updates_left_out']))
        report |= {'batch_crc': crc, 'tokens_per_second': round(speed, 1)}
        report |= {'tokens_per_second_per_device': round(speed / self._trainer.mesh.size, 1), **self._clock.report()}
        shown = {'loss': f'{report["loss"]:.4f}', 'tok/s': f'{speed:,.0f}'}
        if self._utilisation_per_speed:
            report['mfu'] = speed * self._utilisation_per_speed
            shown['mfu'] = f'{report["mfu"]:.1%}'
        self._bar.set_postfix(shown, refresh=False)
        if self._writer:
            self._writer.write(step, 'train', report)

    def _blame(self, report, batch):
        if np.isfinite([report['loss'], report['grad_norm']]).all():
            return f'a spike, more than train.spike = {self._trainer.cfg.train.spike} times the mean of gradient norms'
        try:
            params, said = self._params_before()
            return said + guard.origin(self._trainer, params, batch)
        except Exception as e:  # as when memory is short: what is known is said all the same
            return f'where it came from could not be found ({type(e).__name__})'
