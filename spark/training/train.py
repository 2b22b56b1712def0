"""Training, top to bottom: what to train, where, on what; restore or start; step, log, evaluate, save; report."""

import contextlib
import itertools
import os
import signal
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta
from tqdm import tqdm

from spark import config
from spark.data import pipeline
from spark.errors import ConfigError, DataError, NotFiniteError, Preempted
from spark.nn.transformer import Transformer, compute_dtype
from spark.runtime import stopping, write_text
from spark.training import loss, metrics, optimizer, sharding
from spark.training.checkpoint import Checkpoints

CACHE_DIR = 'JAX_COMPILATION_CACHE_DIR'


@flax.struct.dataclass
class TrainState:
    """What a step maps to its successor: () int32 step, parameters (float32), optimizer state."""

    step: jax.Array
    params: dict
    opt_state: tuple


class Trainer:
    """The compiled parts of a run on a mesh: initial state, train step, eval step.

    Args:
      cfg: an ExperimentConfig with model.vocab_size filled in.
      devices: to run on; None for all.
    """

    def __init__(self, cfg, devices=None):
        self.cfg = cfg
        self.mesh = sharding.make_mesh(cfg, devices)
        platform = self.mesh.devices.flat[0].platform
        self.model = Transformer(cfg.model, compute_dtype(cfg.model, platform), platform)
        self.tx = optimizer.make_optimizer(cfg.optimizer, cfg.train.steps)
        boxed = jax.eval_shape(self._init, jax.random.key(0))
        self.state_shardings = sharding.shardings(self.mesh, boxed)
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), meta.unbox(boxed), self.state_shardings
        )
        self.n_params = sum(x.size for x in jax.tree.leaves(self.abstract_state.params))
        self._rows = sharding.batch_sharding(self.mesh)
        self.train_step = jax.jit(
            self._train_step,
            in_shardings=(self.state_shardings, self._rows),
            out_shardings=(self.state_shardings, None),
            donate_argnums=0,
        )
        self.eval_step = jax.jit(
            lambda params, batch: loss.forward(self.model, params, batch, pieces=cfg.train.loss_pieces),
            in_shardings=(self.state_shardings.params, self._rows),
        )

    @contextlib.contextmanager
    def context(self):
        """Everything is traced and run inside this: the mesh, and the table of logical axes."""
        with jax.set_mesh(self.mesh), sharding.logical_rules():
            yield

    def init_state(self, seed):
        """The state at step 0, born sharded."""
        init = jax.jit(lambda key: meta.unbox(self._init(key)), out_shardings=self.state_shardings)
        return init(jax.random.key(seed))

    def put(self, batch):
        """A batch as global arrays, of which each device gets its part."""
        put = lambda x: jax.make_array_from_callback(x.shape, self._rows, lambda part: x[part])
        return {name: put(x) for name, x in batch.items() if name != pipeline.HASH}

    def abstract_batch(self):
        """Shapes, dtypes and shardings of a batch, for compiling ahead of time."""
        shape = (self.cfg.data.batch_size, self.cfg.data.seq_len)
        one = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._rows)
        return dict.fromkeys(('tokens', 'targets', 'positions', 'segments', 'bytes'), one)

    def _init(self, key):
        token = jnp.zeros((1, 1), jnp.int32)
        params = self.model.init(key, token, token, token)
        return TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(params))

    def _train_step(self, state, batch):
        cfg = self.cfg

        def objective(params, rows):
            sums = loss.forward(self.model, params, rows, pieces=cfg.train.loss_pieces, count=cfg.train.activity)
            return sums['nll'] + cfg.optimizer.z_loss * sums['log_z2'], sums

        gradient = jax.grad(objective, has_aux=True)
        n = cfg.train.accumulate
        if n == 1:
            grads, sums = gradient(state.params, batch)
        else:
            # Every device keeps its rows: microbatch i takes each n-th row.
            cut = lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
            micro = jax.tree.map(cut, batch)
            first = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], micro))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
            add = lambda total, rows: (jax.tree.map(jnp.add, total, gradient(state.params, rows)), None)
            (grads, sums), _ = jax.lax.scan(add, zero, micro)
        grads = jax.tree.map(lambda g: g / sums['tokens'], grads)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        sums['grad_norm'] = optax.global_norm(grads)
        return TrainState(state.step + 1, params, opt_state), sums


def evaluate(trainer, params, dataset, label='eval', limit=0):
    """`loss.per_token` over a dataset of batches, or the first `limit` of them if that is not 0; summed in float64."""
    with contextlib.closing(iter(dataset)) as batches:
        shown = tqdm(itertools.islice(batches, limit or None), desc=label, leave=False, disable=jax.process_index() != 0)
        results = [trainer.eval_step(params, trainer.put(batch)) for batch in shown]
    if not results:
        raise DataError(f'{label}: no batches to evaluate on')
    sums = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *jax.device_get(results))
    return loss.per_token(trainer.cfg.model, sums) | {'tokens': int(sums['tokens']), 'bytes': int(sums['bytes'])}


def train(cfg, workdir):
    """Trains to cfg.train.steps, going on from the newest checkpoint in `workdir` (an epath.Path) if there is one.

    Returns:
      (summary, trainer, state): `summary` is a dict of what a person wants to know, `state` the final TrainState.

    Raises:
      SparkError: with the exit code of what went wrong; Preempted after SIGTERM, with the state saved.
    """
    with contextlib.ExitStack() as stack:
        clock, asked = metrics.Clock(), cfg
        stack.enter_context(startup := contextlib.ExitStack())
        startup.enter_context(clock.during('start'))
        stop = stack.enter_context(stopping())
        profiler = stack.enter_context(_Profiler(cfg.train, workdir))
        tokenizer, cfg = pipeline.tokenizer_for(cfg)
        first = jax.process_index() == 0
        config.check_devices(cfg, jax.device_count())
        # All data is opened before anything is compiled: a held-out split that is missing must not show after the training.
        dataset = pipeline.train_dataset(cfg.data, cfg.seed, tokenizer)
        held_out = {split: pipeline.eval_dataset(cfg.data, split, tokenizer) for split in ('validation', 'test')}
        claim(workdir, asked)
        if cfg.train.cache == 'on' or (cfg.train.cache == 'auto' and jax.default_backend() != 'cpu'):
            jax.config.update('jax_compilation_cache_dir', os.environ.get(CACHE_DIR) or str(workdir / 'xla_cache'))
        trainer = Trainer(cfg)
        checkpoints = Checkpoints(workdir / 'checkpoints', cfg.train.keep, cfg.train.keep_every)
        stack.enter_context(trainer.context())
        batches = iter(dataset)
        stack.callback(batches.close)
        if steps := checkpoints.steps():
            state, data_state = checkpoints.restore(steps[-1], trainer.abstract_state)
            batches.set_state(data_state)
            step = steps[-1]
            print(f'Going on from step {step} in {workdir}', flush=True)
        else:
            state, step = trainer.init_state(cfg.seed), 0
        writer = metrics.MetricsWriter(workdir, step) if first else None
        if writer:
            stack.callback(writer.close)
        stack.callback(checkpoints.close)

        startup.close()
        compiled = None
        if step < cfg.train.steps:
            print(f'Compiling a step of {trainer.n_params:,} parameters for {trainer.mesh.size} × {_kind()} …', flush=True)
            with clock.during('compile'):
                compiled = trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch()).compile()
        saved = step if steps else None
        bar = tqdm(total=cfg.train.steps, initial=step, desc='train', unit='step', disable=not first)
        stack.callback(bar.close)
        log = _Log(trainer, writer, bar, step, clock)
        while step < cfg.train.steps and not stop(step):
            profiler.before(step + 1)
            try:
                with clock.during('data'):
                    batch = next(batches)
                    rows = trainer.put(batch)
            except StopIteration:
                raise DataError(f'{cfg.data.source}: exhausted at step {step} after data.epochs = {cfg.data.epochs}') from None
            with jax.transfer_guard('disallow'):  # whatever waits for the device does so on purpose
                state, sums = compiled(state, rows)
            step += 1
            log.flush()  # the step before, while this one runs
            saving = step % cfg.train.save_every == 0 or step == cfg.train.steps
            due = step % cfg.train.log_every == 0 or step == cfg.train.steps
            if due or saving:
                log.push(step, sums, batch[pipeline.HASH], due)
            bar.update()
            profiler.after(step, state)
            evaluating = cfg.train.eval_every and step % cfg.train.eval_every == 0 and step < cfg.train.steps
            if evaluating or saving:
                log.flush()  # raises before a state that is not finite could be saved
            if evaluating:
                with log.paused('evaluate'):
                    report = evaluate(trainer, state.params, held_out['validation'], 'validation', cfg.train.eval_batches)
                    if writer:
                        writer.write(step, 'validation', report)
                    bar.write(f'step {step}: validation loss {report["loss"]:.4f}')
            if saving:
                with log.paused('checkpoint'):
                    checkpoints.save(step, state, batches.get_state())
                    if writer:
                        writer.flush()
                saved = step
        log.flush()
        if step < cfg.train.steps:
            if saved != step:
                checkpoints.save(step, state, batches.get_state())
            raise Preempted(f'stopped at step {step} of {cfg.train.steps}, saved in {workdir}; run the same command to go on')
        bar.close()
        summary = {
            'steps': step,
            'parameters': trainer.n_params,
            'devices': f'{trainer.mesh.size} × {_kind()}',
            'train_seconds': round(log.seconds, 2),
            'tokens_per_second': round(log.tokens / log.seconds, 1) if log.tokens else None,
            'train_loss': log.last_loss,
        }
        for split, split_dataset in held_out.items():
            with clock.during('evaluate'):
                summary[split] = evaluate(trainer, state.params, split_dataset, split)
            if writer:
                writer.write(step, split, summary[split])
        size = summary['test']['bytes']
        # The yardstick that everyone has; on a large split it would take longer than it says.
        summary['test']['gzip_bits_per_byte'] = 8 * pipeline.gzip_size(cfg.data, 'test') / size if size <= 64 << 20 else None
        summary |= clock.report()
    return summary, trainer, state


def claim(workdir, cfg):
    """Makes `workdir` this config's; a ConfigError names the fields in which it is another's, or a file that is no run's."""
    path = workdir / 'config.json'
    if path.exists():
        if different := config.differences(config.load(path), cfg):
            raise ConfigError(f'--workdir={workdir} belongs to a run with {different}: choose another directory')
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            strangers = sorted(p.name for p in workdir.iterdir() if p.name != 'config.json.tmp')
            if strangers:
                raise ConfigError(f'--workdir={workdir} holds {strangers[0]!r} but no config.json: choose another directory')
            write_text(path, cfg.model_dump_json(indent=2) + '\n')
    except OSError as e:
        raise ConfigError(f'--workdir={workdir}: {e.strerror or e}') from None


class _Profiler:
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


class _Log:
    """Turns device sums into metrics one step late, so that reading them never holds up the next step."""

    def __init__(self, trainer, writer, bar, step, clock):
        self._trainer, self._writer, self._bar, self._pending, self._clock = trainer, writer, bar, None, clock
        self._since_step, self._mark = step, time.perf_counter()
        self.seconds, self.tokens, self.last_loss = 0.0, 0, None
        cfg = trainer.cfg
        per_token = metrics.training_flops_per_token(cfg.model, trainer.n_params, cfg.data.seq_len)
        peak = metrics.peak_flops(trainer.mesh.devices.flat[0])
        self._utilisation_per_speed = per_token / (peak * trainer.mesh.size) if peak else None
        self._schedule = optimizer.schedule(cfg.optimizer, cfg.train.steps)

    def push(self, step, sums, crc, due):
        """Device sums of a step, to be checked by the next `flush`, and written if `due`."""
        self._pending = step, sums, crc, due

    @contextlib.contextmanager
    def paused(self, name):
        """Time in here is not training; it goes to `name` of the clock."""
        start = time.perf_counter()
        with self._clock.during(name):
            yield
        self._mark += time.perf_counter() - start

    def flush(self):
        """Waits for the pushed step. Raises NotFiniteError if its loss or gradient is not finite."""
        if self._pending is None:
            return
        step, sums, crc, due = self._pending
        self._pending = None
        sums = jax.device_get(sums)
        report = loss.per_token(self._trainer.cfg.model, sums) | {'grad_norm': float(sums['grad_norm'])}
        self.last_loss = report['loss']
        if not np.isfinite([report['loss'], report['grad_norm']]).all():
            raise NotFiniteError(
                f'step {step}: loss {report["loss"]}, gradient norm {report["grad_norm"]}, batch {crc:08x}; '
                'nothing was saved since the last good checkpoint'
            )
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
        report |= {'learning_rate': float(self._schedule(step - 1)), 'batch_crc': crc, 'tokens_per_second': round(speed, 1)}
        report |= {'tokens_per_second_per_device': round(speed / self._trainer.mesh.size, 1), **self._clock.report()}
        shown = {'loss': f'{report["loss"]:.4f}', 'tok/s': f'{speed:,.0f}'}
        if self._utilisation_per_speed:
            report['mfu'] = speed * self._utilisation_per_speed
            shown['mfu'] = f'{report["mfu"]:.1%}'
        self._bar.set_postfix(shown, refresh=False)
        if self._writer:
            self._writer.write(step, 'train', report)


def _kind():
    return jax.devices()[0].device_kind
