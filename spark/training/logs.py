"""What the loop reports while it runs: metrics, one step late; where the time goes; profiler traces."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from spark import config, devices, flops
from spark.errors import NotFiniteError, root_cause, show_traceback
from spark.progress import tqdm
from spark.runtime import received_signals
from spark.training import distillation, guard, loss
from spark.training.step import Trainer, TrainState
from spark.training.trackers import MetricsWriter

SLOW_DATA = 0.05  # a larger share of the time that is spent waiting for data is shown with the progress


class Clock:
    """Wall time, and how much of it went to something other than training steps."""

    def __init__(self):
        self._start = time.perf_counter()
        self.seconds = dict.fromkeys(('start', 'compile', 'data', 'evaluate', 'checkpoint'), 0.0)

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Adds the time inside to 'start', 'compile', 'data', 'evaluate' or 'checkpoint'."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def report(self) -> dict[str, float]:
        """{'goodput': share of the wall time that was left to training steps, 'seconds_NAME': by name}.

        Waiting for data counts as lost, although the device may still run the step before.
        """
        wall = time.perf_counter() - self._start
        seconds = {f'seconds_{name}': round(s, 2) for name, s in self.seconds.items()}
        return {'goodput': 1 - sum(self.seconds.values()) / wall, **seconds}


class Profiler:
    """Writes traces of a few steps into WORKDIR/profile: from train.profile_step on, and after each SIGUSR1."""

    def __init__(self, cfg: config.TrainConfig, workdir: epath.Path, stack: contextlib.ExitStack):
        self._cfg, self._directory, self._last = cfg, workdir / 'profile', None
        self._requests = stack.enter_context(received_signals(numbers=[signal.SIGUSR1]))
        stack.callback(lambda: self._last is None or self._try(jax.profiler.stop_trace))

    def before(self, step: int) -> None:
        """Starts a trace if one is due at this step."""
        if self._last is None and (self._requests or step == self._cfg.profile_step):
            self._requests.clear()
            if self._try(lambda: jax.profiler.start_trace(str(self._directory))):
                self._last = step + self._cfg.profile_steps - 1

    def after(self, step: int, state: TrainState) -> None:
        """Ends the trace after its last step."""
        if self._last is not None and step >= self._last:
            self._last = None
            jax.block_until_ready(state)
            if self._try(jax.profiler.stop_trace) and jax.process_index() == 0:
                tqdm.write(f'Trace of {self._cfg.profile_steps} steps: {self._directory}')

    def _try(self, act):
        """Whether that succeeded; no run ends for a trace."""
        try:
            act()
        except Exception as e:
            tqdm.write(f'Warning: {self._directory}: no trace: {root_cause(e)}')
            return False
        return True


class Log:
    """Turns a step's sums on the device into metrics one step later, so that reading them never holds up the next step.

    `params_before` returns (the parameters before a bad update, words about them), to find what is not finite.
    """

    def __init__(
        self, trainer: Trainer, writer: MetricsWriter | None, bar: tqdm, step: int, clock: Clock,
        params_before: Callable[[], tuple[dict, str]],
    ):  # fmt: skip
        self._trainer, self._writer, self._bar, self._clock = trainer, writer, bar, clock
        self._params_before, self._pending = params_before, None
        self._logged_step, self._logged_time, self._logged_data = step, time.perf_counter(), clock.seconds['data']
        self.seconds, self.tokens, self.last_loss = 0.0, 0, None
        cfg = trainer.cfg
        chip = devices.chip(trainer.mesh.devices.flat[0])
        per_token = {'mfu': flops.model_flops_per_token(cfg.model, cfg.data.seq_len)}
        if trainer.teacher:  # apart: only what the model itself computes is progress
            per_token['teacher_mfu'] = distillation.flops_per_token(cfg, trainer.teacher.cfg)
        peak = chip.flops * trainer.mesh.size if chip else None
        self._utilisation_per_speed = {name: n / peak for name, n in per_token.items() if peak}

    def push(self, step: int, sums: dict, batch: dict, due: bool) -> None:
        """Takes the sums of a step over a batch of host arrays. The next `flush` checks them, and writes them if `due`."""
        self._pending = step, sums, batch, due

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Excludes the time inside from training speed; the clock adds it to `name`."""
        start = time.perf_counter()
        with self._clock.during(name):
            yield
        self._logged_time += time.perf_counter() - start

    def flush(self) -> None:
        """Waits for the pushed step. Raises a NotFiniteError if its update was one bad update too many."""
        if self._pending is None:
            return
        (step, sums, batch, due), self._pending = self._pending, None
        in_a_row = int(jax.device_get(sums['in_a_row']))
        if not (due or in_a_row):
            return
        sums = jax.device_get(sums)
        metrics = loss.per_token(self._trainer.cfg.model, sums)
        metrics |= {'grad_norm': float(sums['grad_norm']), 'updates_left_out': int(sums['left_out'])}
        metrics |= {'learning_rate': float(sums['learning_rate']), 'batch_crc': int(sums['batch_crc'])}
        metrics |= {name: float(sums[name]) for name in ('k', 'attention_k') if name in sums}
        self.last_loss = metrics['loss']
        if in_a_row:
            self._bad_update(step, metrics, batch, in_a_row)
        if due:
            self._write(step, metrics)

    def _bad_update(self, step, metrics, batch, in_a_row):
        max_skips = self._trainer.cfg.train.max_skips
        what = f'step {step}: loss {metrics["loss"]}, gradient norm {metrics["grad_norm"]}, batch {metrics["batch_crc"]:08x}'
        if in_a_row > max_skips:
            cause = self._cause(step, metrics, batch)
            raise NotFiniteError(f'{what}; {cause}; nothing was saved since the last good checkpoint')
        self._bar.write(f'{what}: update skipped, {in_a_row} of {max_skips} in a row')

    def _cause(self, step, metrics, batch):
        if np.isfinite([metrics['loss'], metrics['grad_norm']]).all():
            return f'a spike, more than train.spike = {self._trainer.cfg.train.spike} times the mean of gradient norms'
        if np.isfinite(metrics['loss']) and not np.isfinite(metrics.get('kd', 0)):
            return 'the loss of the targets is finite, the divergence from train.teacher is not: look at the teacher'
        try:
            with jax.transfer_guard('allow'):
                params, about_them = self._params_before()
                return about_them + guard.first_not_finite(self._trainer, params, batch, step)
        except Exception as e:  # for example when memory is short: step and batch are reported all the same
            show_traceback(e)
            return f'could not locate the first module that is not finite ({type(e).__name__})'

    def _write(self, step, metrics):
        cfg, now = self._trainer.cfg, time.perf_counter()
        tokens = (step - self._logged_step) * cfg.data.batch_size * cfg.data.seq_len
        seconds, data = now - self._logged_time, self._clock.seconds['data']
        speed, waited = tokens / seconds, (data - self._logged_data) / seconds
        self.seconds += seconds
        self.tokens += tokens
        self._logged_step, self._logged_time, self._logged_data = step, now, data
        metrics['tokens_per_second'] = round(speed, 1)
        metrics |= {'tokens_per_second_per_device': round(speed / self._trainer.mesh.size, 1), **self._clock.report()}
        shown = {'loss': f'{metrics["loss"]:.4f}', 'tok/s': f'{speed:,.0f}'}
        for name, utilisation in self._utilisation_per_speed.items():
            metrics[name] = speed * utilisation
            shown[name] = f'{metrics[name]:.1%}'
        if waited > SLOW_DATA:
            shown['data'] = f'{waited:.0%}'
        self._bar.set_postfix(shown, refresh=False)
        self._bar.line()
        if self._writer:
            self._writer.write(step, 'train', metrics)
