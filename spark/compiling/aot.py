"""Compiles training and evaluation for TPUs that this machine does not have: libtpu compiles for any slice, by its name."""

import contextlib
import functools
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from spark import config, flops
from spark.compiling import hlo
from spark.devices import chip as chip_of
from spark.errors import ConfigError, quiet_libtpu
from spark.evaluation.evaluate import step_for
from spark.nn.runs import at_step
from spark.training import distillation
from spark.training.step import Trainer


class TooBig(ConfigError):
    """A program that needs more GiB per chip than the chip has."""

    def __init__(self, needed: float, available: float, what: str = 'the step'):
        super().__init__(
            f'{what} needs {needed:.2f} GiB per chip, but a chip has {available:.2f}; lower data.batch_size, raise '
            "train.accumulate, mesh.fsdp or mesh.model, or set model.remat='full' (--search finds what fits)"
        )


@contextlib.contextmanager
def phase(what: str, every: float = 30.0) -> Iterator[None]:
    """Prints what is being done, and for how long it has been done, every so many seconds and at the end."""
    start, done, say = time.monotonic(), threading.Event(), functools.partial(print, flush=True)
    elapsed = lambda: f'{time.monotonic() - start:.0f} s'

    def tell():
        while not done.wait(every):
            say(f'{what} … {elapsed()}')

    say(f'{what} …')
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    say(f'{what}: {elapsed()}')


def devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of slices such as 'v5e:16x16', which need not be here; a ConfigError if libtpu is not, or knows none."""
    # libtpu must not look for chips or a cloud: there are none, and several processes may compile at once.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    quiet_libtpu()
    from jax.experimental import topologies

    cores = {'chip_config_name': 'megacore'} if topology.startswith('v4') else {}  # a device is a chip, not a core
    try:
        return list(topologies.get_topology_desc(platform='tpu', topology_name=topology, num_slices=slices, **cores).devices)
    except Exception as e:
        raise ConfigError(
            f'--topology={topology}: {" ".join(str(e).split())[:200]}; want such as v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:4x4, '
            "tpu7x:2x2x1, and libtpu: pip install 'spark-transformer[aot]'"
        ) from None


def compile_step(cfg: config.ExperimentConfig, devices: Sequence[jax.Device]) -> tuple[Trainer, jax.stages.Compiled]:
    """The trainer of a config, and the same train step that training runs, compiled; a ConfigError if the compiler fails."""
    trainer = Trainer(cfg, devices, distillation.model_of(cfg, len(devices)))
    with trainer.context(), _translated_errors('the step'):
        return trainer, trainer.compile_train_step()


def evaluation(cfg: config.ExperimentConfig, devices: Sequence[jax.Device]) -> dict[str, dict]:
    """`memory` of evaluation: {'while training': beside the state of the optimizer, 'evaluate.py': by itself}."""
    trainer, device = Trainer(cfg, devices, distillation.model_of(cfg, len(devices))), devices[0]
    params = trainer.variables(trainer.abstract_state.params, trainer.abstract_state.step)
    with phase('Compiling evaluation while training'), trainer.context(), _translated_errors('evaluation while training'):
        while_training = memory(trainer.eval_step.lower(params, trainer.abstract_batch()).compile(), device)
    held = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    rest = held((trainer.abstract_state, trainer.abstract_teacher)) - held(params)
    while_training |= {name: while_training[name] + rest for name in ('arguments', 'peak')}
    data = cfg.data.model_copy(update={'batch_size': cfg.data.batch_size // cfg.train.accumulate})
    train = cfg.train.model_copy(update={'accumulate': 1})
    model = at_step(cfg.model, cfg.train.steps)
    trainer = Trainer(cfg.model_copy(update={'data': data, 'train': train, 'model': model}), devices)
    with phase('Compiling evaluate.py'), trainer.context(), _translated_errors('evaluate.py'):
        step, sums = step_for(trainer, eos=0)
        by_itself = memory(step.lower(trainer.abstract_state.params, trainer.abstract_batch(), sums).compile(), device)
    return {'while training': while_training, 'evaluate.py': by_itself}


@contextlib.contextmanager
def _translated_errors(what):
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise ConfigError(f'the compiler fails on {what}: {str(e).splitlines()[0][:300]}') from e
        sizes = re.search(r'\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)', str(e))
        raise TooBig(*(map(float, sizes.groups()) if sizes else (math.inf, math.nan)), what) from None


def report(cfg: config.ExperimentConfig, devices: Sequence[jax.Device]) -> tuple[dict, str]:
    """The report that `scripts/compile.py` prints, and the text of the compiled train step."""
    with phase('Compiling the train step'):
        trainer, compiled = compile_step(cfg, devices)
    with phase('Reading the program'):
        text, device = compiled.as_text(), devices[0]
        tokens = cfg.data.batch_size * cfg.data.seq_len
        model_flops, chip = flops.model_flops_per_token(cfg.model, cfg.data.seq_len) * tokens, chip_of(device)
        return {
            'devices': len(devices), 'device_kind': device.device_kind, 'mesh': dict(trainer.mesh.shape), 'tokens': tokens,
            'parameters': trainer.n_params, 'memory': memory(compiled, device),
            'model_flops': model_flops, 'traced_flops': matmul_flops(trainer), 'traffic': hlo.traffic(text),
            'peak_flops': chip and chip.flops, 'bandwidth': chip and chip.bandwidth,
            'collectives': hlo.collectives(text, trainer.mesh, cfg.mesh.slices), 'buffers': hlo.largest_buffers(text),
        }, text  # fmt: skip


def search(cfg: config.ExperimentConfig, devices: Sequence[jax.Device], say: Callable[[str], object] = print) -> list[dict]:
    """For each rematerialisation policy, from the cheapest to compute, the largest power-of-two rows per device that fit.

    Returns [{'remat', 'batch_size', 'peak': bytes}]; a policy under which not even one row per device fits is omitted.
    """
    found = []
    sizes = config.check_devices(cfg, len(devices))
    rows_per_step = sizes['data'] * sizes['fsdp'] * cfg.train.accumulate  # with one row per device
    for remat in ('none', 'dots', 'dots_no_batch', 'full'):
        best, model = None, cfg.model.model_copy(update={'remat': remat})
        for rows in (1, 2, 4, 8, 16, 32, 64):
            data = cfg.data.model_copy(update={'batch_size': rows * rows_per_step})
            candidate = cfg.model_copy(update={'model': model, 'data': data})
            try:
                usage = memory(compile_step(candidate, devices)[1], devices[0])
                check_fit(usage)
            except TooBig:
                break
            except ConfigError as e:  # the compiler may fail at this size alone
                say(f'{remat}: batch_size {data.batch_size}: {e}')
                continue
            best = {'remat': remat, 'batch_size': data.batch_size, 'peak': usage['peak']}
        say(f'{remat}: ' + (f'batch_size {best["batch_size"]}, peak {best["peak"] / 1e9:.2f} GB' if best else 'does not fit'))
        found += [best] if best else []
    return found


def memory(compiled: jax.stages.Compiled, device: jax.Device) -> dict:
    """Bytes per device: arguments (donated ones too), temporaries, peak, and the memory of the device, None if unknown."""
    m, chip = compiled.memory_analysis(), chip_of(device)
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return {'arguments': m.argument_size_in_bytes, 'temporaries': m.temp_size_in_bytes, 'peak': peak, 'hbm': chip and chip.memory}


def check_fit(usage: dict, what: str = 'the step') -> None:
    """Raises TooBig if the peak, of `memory`, is above what the device has."""
    if usage['hbm'] and usage['peak'] > usage['hbm']:
        raise TooBig(usage['peak'] / 2**30, usage['hbm'] / 2**30, what)


def matmul_flops(trainer: Trainer) -> int | float:
    """FLOPs of the matmuls of a step on all devices, with rematerialisation; loops over blocks count at their mean length."""
    with trainer.context():
        jaxpr = trainer.train_step.trace(*trainer.abstract_inputs()).jaxpr
    cfg = trainer.cfg
    a, L = cfg.model.attention, cfg.data.seq_len
    b = min(a.block, L)

    def trips(scope):
        """Blocks of keys that a block of queries sees, the mean over the row, in the attention layer named in `scope`."""
        layer = re.search(r'attention_(\d+)', scope)
        window = a.window if layer and cfg.model.pattern[int(layer[1])] == 'local' else L
        return float(np.mean([i + 1 - max(i * b - window + 1, 0) // b for i in range(-(-L // b))]))

    return _flops(jaxpr.jaxpr, trips)


def _flops(jaxpr, trips, scope='', in_kernel=False):
    """Matmul FLOPs of a jaxpr; trips(scope) is the length of a loop that depends on data, by the modules that it is in."""
    total = 0
    for eqn in jaxpr.eqns:
        here = f'{scope}/{eqn.source_info.name_stack}'
        times, inner = 1, list(jaxprs_in_params(eqn.params))
        match eqn.primitive.name:
            case 'dot_general':
                (contract, _), _ = eqn.params['dimension_numbers']
                lhs = eqn.invars[0].aval.shape
                total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
            case 'scan':
                times = eqn.params['length']
            case 'while' if not in_kernel:
                times = trips(here)
            case 'shard_map':
                times = eqn.params['mesh'].size
            case 'pallas_call' if 'fused_ffn' in eqn.params['name']:  # whose estimate is exact
                total, inner = total + eqn.params['cost_estimate'].flops, []
            case 'pallas_call':
                *outer, _ = eqn.params['grid_mapping'].grid  # the last axis runs over blocks of keys
                times = math.prod(outer) * trips(here)
            case 'cond' if not in_kernel:
                inner = inner[:1]  # the false branch is the usual one: no query is without a key
        total += times * sum(_flops(p, trips, here, in_kernel or eqn.primitive.name == 'pallas_call') for p in inner)
    return total
