"""Training, top to bottom: what to train, where, on what; restore or start; step, log, evaluate, save; report."""

import contextlib
import functools
import os
import threading

import jax
from etils import epath
from tqdm import tqdm

from spark import config
from spark.checkpoints.manager import ASIDE, Checkpoints
from spark.data import pipeline
from spark.errors import CheckpointError, ConfigError, DataError, Preempted, SparkError, StalledError, leave
from spark.runtime import stopping, write_text
from spark.training import trackers
from spark.training.logs import Log, Profiler
from spark.training.step import Trainer, evaluate
from spark.training.watchdog import Watchdog

CACHE_DIR = 'JAX_COMPILATION_CACHE_DIR'


def train(cfg, workdir):
    """Trains to cfg.train.steps, going on from the newest checkpoint in `workdir` (an epath.Path) if there is one.

    Returns:
      (summary, trainer, state): `summary` is a dict of what a person wants to know, `state` the final TrainState.

    Raises:
      SparkError: with the exit code of what went wrong; Preempted after SIGTERM, with the state saved.
    """
    with contextlib.ExitStack() as stack:
        clock, asked = trackers.Clock(), cfg
        stack.enter_context(startup := contextlib.ExitStack())
        startup.enter_context(clock.during('start'))
        stop = stack.enter_context(stopping())
        dog = stack.enter_context(Watchdog(cfg.train.stall_seconds))
        profiler = stack.enter_context(Profiler(cfg.train, workdir))
        tokenizer, cfg = pipeline.tokenizer_for(cfg)
        first = jax.process_index() == 0
        config.check_devices(cfg, jax.device_count())
        # All data is opened before anything is compiled: a held-out split that is missing must not show after the training.
        dataset = pipeline.train_dataset(cfg.data, cfg.seed, tokenizer)
        held_out = {split: pipeline.eval_dataset(cfg.data, split, tokenizer) for split in ('validation', 'test')}
        claim(workdir, asked)
        if cfg.train.cache == 'on' or (cfg.train.cache == 'auto' and jax.default_backend() != 'cpu'):
            jax.config.update('jax_compilation_cache_dir', os.environ.get(CACHE_DIR) or str(workdir / 'xla_cache'))
        stack.push(_in_words)
        trainer = Trainer(cfg)
        checkpoints = Checkpoints(workdir / 'checkpoints', cfg.train.keep, cfg.train.keep_every)
        stack.enter_context(trainer.context())
        batches = iter(dataset)
        stack.callback(batches.close)
        dog.alive('restoring', rare=True)
        if restored := checkpoints.restore_newest(trainer.abstract_state):
            step, state, place = restored
            batches.set_state(place['data'])
            evaluated = place['evaluated']
            print(f'Going on from step {step} in {workdir}', flush=True)
        else:
            _nothing_lost(workdir, cfg.train.save_every)
            state, step, evaluated = new_state(trainer), 0, True
        writer = trackers.MetricsWriter(workdir, step) if first else None
        if writer:
            stack.callback(writer.close)
        stack.callback(checkpoints.close)

        startup.close()
        saved = step if restored else None
        if step < cfg.train.steps:
            print(f'Compiling a step of {trainer.n_params:,} parameters for {trainer.mesh.size} × {_kind()} …', flush=True)
            dog.alive('compiling', rare=True)
            with clock.during('compile'):
                compiled = _unless(stop, lambda: _compile(trainer))
            if compiled is None:
                left = _preempted(step, cfg, workdir)
                left.at_once = True
                raise left

        def to_blame():
            dog.alive('looking for what is not finite', rare=True)  # it reads a checkpoint maybe, and compiles
            return params_before(trainer, checkpoints, state)

        bar = tqdm(total=cfg.train.steps, initial=step, desc='train', unit='step', disable=not first)
        stack.callback(bar.close)
        log = Log(trainer, writer, bar, step, clock, to_blame)

        def save():
            nonlocal saved
            dog.alive('saving', rare=True)
            checkpoints.save(step, state, {'data': batches.get_state(), 'evaluated': evaluated})
            saved = step

        def validate():
            """Has the validation split been evaluated, or was this run stopped meanwhile?"""
            with log.paused('evaluate'):
                report = evaluate(
                    trainer, state.params, held_out['validation'], 'validation', cfg.train.eval_batches, stop=told_in_evaluation
                )
            if report is None:
                return False
            if writer:
                writer.write(step, 'validation', report)
            bar.write(f'step {step}: validation loss {report["loss"]:.4f}')
            return True

        def told(doing='stepping', rare=False):
            """Has this run been told to stop? It is asked whenever something moved."""
            dog.alive(doing, rare)
            return stop()

        told_in_evaluation = functools.partial(told, 'evaluating', rare=True)
        stack.push(_in_words)  # before anything is closed, which may wait for the other processes
        if not evaluated:  # it was stopped in the midst of that
            evaluated = validate()
        while step < cfg.train.steps and not told():
            checkpoints.check()
            profiler.before(step + 1)
            with clock.during('data'):
                batch = _next(batches, cfg, step)
                rows = trainer.put(batch)
            with jax.transfer_guard('disallow'):  # whatever waits for the device does so on purpose
                state, sums = compiled(state, rows)
            step += 1
            log.flush()  # the step before, while this one runs
            saving = step % cfg.train.save_every == 0 or step == cfg.train.steps
            log.push(step, sums, batch, saving or step % cfg.train.log_every == 0)
            bar.update()
            profiler.after(step, state)
            evaluated = not (cfg.train.eval_every and step % cfg.train.eval_every == 0 and step < cfg.train.steps)
            if saving or not evaluated:
                log.flush()  # raises before a state behind a bad update could be saved
            if not evaluated:
                evaluated = validate()
            if saving:
                with log.paused('checkpoint'):
                    if writer:
                        writer.flush()
                    save()
        log.flush()
        if step < cfg.train.steps:
            if saved != step:
                save()
            raise _preempted(step, cfg, workdir)
        bar.close()
        reports = {}
        for split, split_dataset in held_out.items():
            with clock.during('evaluate'):
                reports[split] = evaluate(trainer, state.params, split_dataset, split, stop=told_in_evaluation)
            if reports[split] is None:
                raise _preempted(step, cfg, workdir)
            if writer:
                writer.write(step, split, reports[split])
        # The yardstick that everyone has; on a large split it would take longer than it says.
        size = reports['test']['bytes']
        reports['test']['gzip_bits_per_byte'] = 8 * pipeline.gzip_size(cfg.data, 'test') / size if size <= 64 << 20 else None
        summary = _summary(step, trainer, log) | reports | clock.report()
    return summary, trainer, state


def _summary(step, trainer, log):
    """What a person wants to know of the training itself."""
    return {
        'steps': step,
        'parameters': trainer.n_params,
        'devices': f'{trainer.mesh.size} × {_kind()}',
        'train_seconds': round(log.seconds, 2),
        'tokens_per_second': round(log.tokens / log.seconds, 1) if log.tokens else None,
        'train_loss': log.last_loss,
    }


def new_state(trainer):
    """The state at step 0: random, or with the weights of train.restore_from."""
    state, old = trainer.init_state(trainer.cfg.seed), trainer.cfg.train.restore_from
    return state.replace(params=old_weights(old, trainer.abstract_state.params)) if old else state


def params_before(trainer, checkpoints, state):
    """(parameters before a bad update, words): the state's, if that was left out, or the newest checkpoint's, or the first."""
    if trainer.guarded:
        return state.params, ''
    checkpoints.wait()
    step = max(checkpoints.steps(), default=0)
    params = checkpoints.restore_params(step, trainer.abstract_state.params) if step else new_state(trainer).params
    return params, f'with the parameters of step {step}, '


def old_weights(directory, params):
    """The parameters of a run directory's newest checkpoint, or of one of its checkpoints/STEP, for a new run.

    Args:
      directory: as text; here or in a bucket.
      params: shapes, dtypes and shardings.

    Raises:
      CheckpointError: there is none, it is damaged, or of another model.
    """
    path = epath.Path(directory)
    named = path.parent.name == 'checkpoints' and path.name.isdigit()
    root = path.parent if named else path / 'checkpoints'
    checkpoints = Checkpoints(root) if root.exists() else None
    steps = checkpoints.steps() if checkpoints else []
    step = int(path.name) if named else max(steps, default=None)
    if step not in steps:
        raise CheckpointError(f'train.restore_from = {directory!r}: want a run directory, or a checkpoints/STEP of one')
    print(f'Starting from the parameters of {root}/{step}', flush=True)
    restored = checkpoints.restore_params(step, params)
    checkpoints.close()
    return restored


def _nothing_lost(workdir, save_every):
    """Raises a CheckpointError if this run was further than its checkpoints say: it must not silently start from scratch."""
    if (workdir / ASIDE).exists():
        raise CheckpointError(f'{workdir}/checkpoints: none is left, and damaged ones lie in {ASIDE}/')
    # By the second save the first one is on the disk.
    if (reached := trackers.last_step(workdir)) > 2 * save_every:
        raise CheckpointError(f'{workdir}/checkpoints: there is none, but metrics.jsonl goes to step {reached}')


def _compile(trainer):
    with trainer.context():
        return trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch()).compile()


def _unless(stop, work):
    """work(), or None as soon as `stop()`: in a thread, so that a signal is heard while XLA compiles."""
    if jax.process_count() > 1:  # which stop together, at a step
        return work()
    done, result = threading.Event(), []

    def run():
        try:
            result.append((work(), None))
        except BaseException as e:
            result.append((None, e))
        done.set()

    threading.Thread(target=run, daemon=True).start()
    while not done.wait(0.1):
        if stop():
            return None
    value, error = result[0]
    if error:
        raise error
    return value


def _next(batches, cfg, step):
    try:
        return next(batches)
    except StopIteration:
        raise DataError(f'{cfg.data.source}: exhausted at step {step} after data.epochs = {cfg.data.epochs}') from None
    except SparkError:
        raise
    except Exception as e:  # of a worker
        raise DataError(f'{cfg.data.source}: cannot be read at step {step}: {type(e).__name__}: {e}') from e


def _in_words(kind, error, _):
    """For ExitStack.push: raises what XLA raised in words for people."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return
    said = str(error).splitlines()[0]
    if 'RESOURCE_EXHAUSTED' in said:
        raise ConfigError(
            f'out of memory: {said}; less takes more train.accumulate or train.loss_pieces, model.remat, mesh.fsdp; '
            'scripts/compile.py tells how much a config takes'
        ) from error
    if jax.process_count() > 1:
        leave(StalledError(f'a collective failed, as when another process has ended: {said}; the last checkpoint is as it was'))


def _preempted(step, cfg, workdir):
    return Preempted(f'stopped at step {step} of {cfg.train.steps}, saved in {workdir}; run the same command to go on')


def claim(workdir, cfg):
    """Makes `workdir` this config's; a ConfigError names the fields in which it is another's, or a file that is no run's.

    What `config.RESUMABLE` names may change while a run goes on.
    """
    path = workdir / 'config.json'
    if path.exists():
        before = config.load(path)
        if different := config.differences(before, cfg, ignore=config.RESUMABLE):
            raise ConfigError(f'--workdir={workdir} belongs to a run with {different}: choose another directory')
        if (changed := config.differences(before, cfg)) and jax.process_index() == 0:
            print(f'This run had {changed}', flush=True)
            write_text(path, cfg.model_dump_json(indent=2) + '\n')
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


def _kind():
    return jax.devices()[0].device_kind
