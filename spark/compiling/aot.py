"""Compiling the train step for accelerators that are not there: does it fit, and what does it compute.

libtpu compiles for a named slice on any machine. `compiling/hlo.py` reads the program that it makes.
"""

import math
import os
import re

import jax
import numpy as np

from spark import config, flops
from spark.compiling import hlo
from spark.devices import chip as chip_of
from spark.errors import ConfigError
from spark.training.step import Trainer


class TooBig(ConfigError):
    """A step that wants `wanted` GiB per chip of `there`."""

    def __init__(self, wanted, there):
        super().__init__(
            f'the step wants {wanted:.2f} GiB per chip, which has {there:.2f}; lower data.batch_size, raise mesh.fsdp or '
            "mesh.model, or set model.remat='full' (--search finds what fits)"
        )


def devices(topology, slices=1):
    """The devices of one or more slices such as 'v5e:16x16', which need not be there.

    Raises:
      ConfigError: libtpu knows no slice of that name, or is not installed.
    """
    # Compiling takes no chip, so that several processes may do it at once, and on a machine that is nowhere in a cloud.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'none')
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    from jax.experimental import topologies

    cores = {'chip_config_name': 'megacore'} if topology.startswith('v4') else {}  # a device is a chip, not a core
    try:
        return list(topologies.get_topology_desc(platform='tpu', topology_name=topology, num_slices=slices, **cores).devices)
    except Exception as e:
        raise ConfigError(
            f'--topology={topology}: {" ".join(str(e).split())[:200]}; want such as v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:4x4, '
            "tpu7x:2x2x1, and libtpu: pip install 'spark-transformer[aot]'"
        ) from None


def compile_step(cfg, devices_):
    """(Trainer, compiled train step): the very step that training runs.

    Raises:
      TooBig: the compiler itself finds that the memory does not do.
      ConfigError: the compiler fails.
    """
    trainer = Trainer(cfg, devices_)
    with trainer.context():
        lowered = trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch())
        try:
            return trainer, lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if 'RESOURCE_EXHAUSTED' not in str(e):
                raise ConfigError(f'the compiler fails on this step: {str(e).splitlines()[0][:300]}') from e
            sizes = re.search(r'\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)', str(e))
            raise TooBig(*map(float, sizes.groups()) if sizes else (math.inf, math.nan)) from None


def report(cfg, devices_):
    """(what `scripts/compile.py` prints, as a dict; the text of the compiled program)."""
    trainer, compiled = compile_step(cfg, devices_)
    text = compiled.as_text()
    tokens = cfg.data.batch_size * cfg.data.seq_len
    model_flops, chip = flops.model_flops_per_token(cfg.model, cfg.data.seq_len) * tokens, chip_of(devices_[0])
    return {
        'devices': len(devices_), 'device_kind': devices_[0].device_kind, 'mesh': dict(trainer.mesh.shape), 'tokens': tokens,
        'parameters': trainer.n_params, 'memory': memory(compiled, devices_[0]),
        'model_flops': model_flops, 'traced_flops': matmul_flops(trainer), 'traffic': hlo.traffic(text),
        'peak_flops': chip and chip.flops, 'bandwidth': chip and chip.bandwidth,
        'collectives': hlo.collectives(text, trainer.mesh, cfg.mesh.slices), 'buffers': hlo.largest_buffers(text),
    }, text  # fmt: skip


def search(cfg, devices_, say=lambda line: None):
    """What fits: for each rematerialisation policy, from the cheapest to compute, the largest power-of-two rows per device.

    Returns:
      [{'remat', 'batch_size', 'peak': bytes}] of those that fit; empty if none does with one row per device.
    """
    found = []
    for remat in ('none', 'dots', 'dots_no_batch', 'full'):
        best = None
        rows = 1
        while rows <= 64:
            shards = math.prod(config.check_devices(cfg, len(devices_))[axis] for axis in ('data', 'fsdp'))
            tried = cfg.model_copy(update={
                'model': cfg.model.model_copy(update={'remat': remat}),
                'data': cfg.data.model_copy(update={'batch_size': rows * shards * cfg.train.accumulate}),
            })  # fmt: skip
            try:
                m = memory(compile_step(tried, devices_)[1], devices_[0])
                check_fit(m)
            except TooBig:
                break
            except ConfigError as e:  # may be a fault of the compiler at this size alone
                say(f'{remat}: batch_size {tried.data.batch_size}: {e}')
                rows *= 2
                continue
            best = {'remat': remat, 'batch_size': tried.data.batch_size, 'peak': m['peak']}
            rows *= 2
        say(f'{remat}: ' + (f'batch_size {best["batch_size"]}, peak {best["peak"] / 1e9:.2f} GB' if best else 'does not fit'))
        found += [best] if best else []
    return found


def memory(compiled, device):
    """Bytes per device: arguments (those given back in place included), temporaries, peak, and the device's own."""
    m, chip = compiled.memory_analysis(), chip_of(device)
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return {'arguments': m.argument_size_in_bytes, 'temporaries': m.temp_size_in_bytes, 'peak': peak, 'hbm': chip and chip.memory}


def check_fit(memory_):
    """TooBig if the peak of `memory` is above what the device has."""
    if memory_['hbm'] and memory_['peak'] > memory_['hbm']:
        raise TooBig(memory_['peak'] / 2**30, memory_['hbm'] / 2**30)


def matmul_flops(trainer):
    """FLOPs of a step's matmuls over all devices, rematerialisation included; attention's loops over blocks at mean length."""
    with trainer.context():
        jaxpr = trainer.train_step.trace(trainer.abstract_state, trainer.abstract_batch()).jaxpr
    cfg = trainer.cfg
    a, L = cfg.model.attention, cfg.data.seq_len
    b = min(a.block, L)
    first = lambda i, window: max(i * b - window + 1, 0) // b if window else 0
    mean = lambda window: float(np.mean([i + 1 - first(i, window) for i in range(-(-L // b))]))

    def trips(where):
        layer = re.search(r'attention_(\d+)', where)
        return mean(a.window if layer and cfg.model.pattern[int(layer[1])] == 'local' else 0)

    return _flops(jaxpr.jaxpr, trips)


def _flops(jaxpr, trips, where='', in_kernel=False):
    """`trips(where)`: of a loop whose length depends on data, by the names of the modules that it is in."""
    total = 0
    for eqn in jaxpr.eqns:
        here = f'{where}/{eqn.source_info.name_stack}'
        times, inner = 1, [p for v in eqn.params.values() for p in (v if isinstance(v, tuple | list) else [v]) if _jaxpr(p)]
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
            case 'pallas_call':
                *outer, _ = eqn.params['grid_mapping'].grid
                times = math.prod(outer) * trips(here)
            case 'cond' if not in_kernel:
                inner = inner[:1]  # the rule is the branch of what is false: no query is without a key
        total += times * sum(_flops(_jaxpr(p), trips, here, in_kernel or eqn.primitive.name == 'pallas_call') for p in inner)
    return total


def _jaxpr(x):
    return getattr(x, 'jaxpr', x) if hasattr(x, 'eqns') or hasattr(getattr(x, 'jaxpr', None), 'eqns') else None
