"""Compiling the train step for accelerators that are not there, and reading what the compiler made of it.

libtpu compiles for a named slice on any machine. From the compiled program: bytes per chip, the collectives with the trip counts
of the loops they sit in, and the largest buffers with the lines of source they come from. From the traced program: FLOPs.
"""

import collections
import math
import os
import re
from typing import NamedTuple

import jax
import numpy as np

from spark import config
from spark.analysis import flops
from spark.errors import ConfigError
from spark.training import metrics
from spark.training.train import Trainer

# Bytes of memory per device, by the start of jax's device_kind (vendors' data sheets; a tpu7x device is half a chip).
HBM = {'TPU v4': 32 << 30, 'TPU v5 lite': 16 << 30, 'TPU v5': 95 << 30, 'TPU v6 lite': 32 << 30, 'TPU7x': 96 << 30}
# Bytes per second that a device reads from its memory (vendors' data sheets).
BANDWIDTH = {'TPU v4': 1.23e12, 'TPU v5 lite': 0.82e12, 'TPU v5': 2.77e12, 'TPU v6 lite': 1.64e12, 'TPU7x': 3.69e12}
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BYTES = {'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8}  # others: 1
_CALLS = ('body', 'calls', 'to_apply', 'branch_computations', 'true_computation', 'false_computation')


_SLICES = ('dynamic-slice', 'slice', 'gather')
_NO_WORK = ('parameter', 'get-tuple-element', 'bitcast', 'constant', 'tuple', 'while', 'conditional', 'call', 'after-all',
            'partition-id', 'iota', 'send', 'recv')  # fmt: skip


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
    model_flops = sum(flops.flops_per_token(cfg.model, cfg.data.seq_len, 'training').values()) * tokens
    return {
        'devices': len(devices_), 'device_kind': devices_[0].device_kind, 'mesh': dict(trainer.mesh.shape), 'tokens': tokens,
        'parameters': trainer.n_params, 'memory': memory(compiled, devices_[0]),
        'model_flops': model_flops, 'traced_flops': matmul_flops(trainer), 'traffic': traffic(text),
        'peak_flops': metrics.peak_flops(devices_[0]), 'bandwidth': _of(BANDWIDTH, devices_[0]),
        'collectives': collectives(text, trainer.mesh, cfg.mesh.slices), 'buffers': largest_buffers(text),
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
    m = compiled.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return {'arguments': m.argument_size_in_bytes, 'temporaries': m.temp_size_in_bytes, 'peak': peak, 'hbm': _of(HBM, device)}


def _of(table, device):
    return next((n for kind, n in table.items() if device.device_kind.startswith(kind)), None)


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


def collectives(text, mesh, slices=1):
    """[{'kind', 'axes', 'count', 'bytes'}] per step and device of a compiled program's text, the largest first.

    bytes: what an all-gather gives, and what a reduce-scatter or all-reduce is given. A ring of collective-permutes, into which
    the compiler cuts a gather or scatter to overlap it with a matmul, counts as what is sent. Loops count by their trips;
    one whose length depends on data counts once. Of several slices, `text` is the program of each; what is sent between them
    counts under the name of what it is a part of.
    """
    computations, entry = _computations(text)
    sizes = mesh.shape | {'data': mesh.shape['data'] // slices}
    groups = {axes: _groups_of(sizes, axes) for axes in _subsets(mesh.axis_names)}
    found = {}  # by channel: one that the compiler spreads over a loop beside it is written again inside of that loop
    for name, times in _times(computations, entry).items():
        for line in computations[name]:
            sent = re.search(r' send\(.*_xla_host_transfer_rendezvous="([a-z-]+)', line)
            if sent:
                found[line] = times, times * _sizes(line.partition(' send(')[0])[0], sent[1], 'data, between slices'
                continue
            match = re.match(rf'\s*(?:ROOT )?%(\S+) = (.*?) ({"|".join(COLLECTIVES)})(-start)?\(', line)
            if not match:
                continue
            shapes = _sizes(match[2])
            # What is started gives its operands and buffers along with its results.
            size, members = max(shapes) if match[4] else sum(shapes), _members(line)
            axes = next((axes for axes, g in groups.items() if g == members), None) if members else _ring(line, sizes)
            if match[3] == 'reduce-scatter' and members:
                size *= len(next(iter(members)))
            channel = re.search(r'channel_id=(\d+)', line)
            row = times, times * size, match[3], ' × '.join(axes) if axes else '?'
            key = channel[1] if channel else match[1]
            found[key] = min(found.get(key, row), row)
    totals, counts = collections.Counter(), collections.Counter()
    for times, size, kind, axes in found.values():
        totals[kind, axes] += size
        counts[kind, axes] += times
    return [{'kind': kind, 'axes': axes, 'count': counts[kind, axes], 'bytes': n} for (kind, axes), n in totals.most_common()]


def traffic(text):
    """Bytes that a step reads from and writes to a device's memory, by the operands and results of the program's operations.

    Loops count by their trips, what an operation slices by the slice, what it updates in place by the update, and what lies in
    the memory of the core not at all. A kernel counts each operand once. A figure of the program, not of the caches of a chip.
    """
    computations, entry = _computations(text)
    total = 0
    for name, times in _times(computations, entry, through=[c for c in _CALLS if c not in ('calls', 'to_apply')]).items():
        rows = [row for line in computations[name] if (row := _operation(line))]
        size = {row.name: row.size for row in rows}
        total += times * sum(_moved(row, size, computations) for row in rows)
    return total


class _Operation(NamedTuple):
    name: str
    size: int  # of its results, in memory
    kind: str
    operands: list[str]
    line: str


def _operation(line):
    match = re.match(r'\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)', line)
    if not match:
        return None
    types = ' '.join(re.findall(r'\w+\[[\d,]*\](?:\{[^S}]*\})?(?!\{)', match[2]))  # a layout with S(…): in the core
    return _Operation(match[1], sum(_sizes(types)), match[3], re.findall(r'%([\w.-]+)', match[4].partition(')')[0]), line)


def _moved(row, size, computations):
    """Bytes that an operation moves, where size[name] is that of each operand."""
    if row.kind in _NO_WORK or row.kind.endswith('-done'):
        return 0
    if row.kind.endswith('-start'):
        return row.size  # gives its operands along with its results
    reads = [size.get(name, 0) for name in row.operands]
    if row.kind in _SLICES:
        return 2 * row.size
    if row.kind == 'dynamic-update-slice':
        return 2 * reads[1]
    called = re.search(r'calls=%([\w.-]+)', row.line) if row.kind == 'fusion' else None
    if not called or called[1] not in computations:
        return row.size + sum(reads)
    inside = [inner for line in computations[called[1]] if (inner := _operation(line))]
    written = row.size
    for inner in inside:
        if inner.kind != 'parameter':
            continue
        number = int(re.search(r'parameter\((\d+)\)', inner.line)[1])
        users = [user for user in inside if inner.name in user.operands]
        if number < len(reads) and users and all(user.kind in _SLICES and user.operands[0] == inner.name for user in users):
            reads[number] = min(reads[number], sum(user.size for user in users))
        elif number < len(reads) and any(u.kind == 'dynamic-update-slice' and u.operands[0] == inner.name for u in users):
            update = next(u for u in users if u.kind == 'dynamic-update-slice').operands[1]
            fresh = next((other.size for other in inside if other.name == update), 0)
            written, reads[number] = written - reads[number] + fresh, 0
    return max(written, 0) + sum(reads)


def _sizes(types):
    """Bytes of each array in a line's types."""
    arrays = re.findall(r'(\w+)\[([\d,]*)\]', types)
    return [math.prod(map(int, filter(None, dims.split(',')))) * _BYTES.get(kind, 1) for kind, dims in arrays]


def largest_buffers(text, n=12):
    """[{'bytes', 'shape', 'operation', 'source'}] of the n largest arrays that operations outside of fusions make."""
    computations, entry = _computations(text)
    source = _sources(text)
    found = {}
    for name in _times(computations, entry, through=[c for c in _CALLS if c not in ('calls', 'to_apply')]):
        for line in computations[name]:
            match = re.match(r'\s*(?:ROOT )?%(\S+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(', line)
            if not match or match[4] in ('parameter', 'get-tuple-element', 'bitcast', 'constant', 'tuple', 'while'):
                continue
            size = math.prod(map(int, filter(None, match[3].split(',')))) * _BYTES.get(match[2], 1)
            operation = re.search(r'op_name="([^"]*)"', line)
            frame = re.search(r'stack_frame_id=(\d+)', line)
            row = {'bytes': size, 'shape': f'{match[2]}[{match[3]}]', 'operation': operation[1] if operation else match[4],
                   'source': source.get(int(frame[1]), '') if frame else ''}  # fmt: skip
            found.setdefault((row['shape'], row['source']), row)
    return sorted(found.values(), key=lambda row: -row['bytes'])[:n]


def _computations(text):
    """{name: its lines}, and the name of the entry."""
    computations, entry, lines = {}, None, None
    for line in text.splitlines():
        header = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
        if header:
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line == '}':  # what a line of a kernel's metadata may start with, too
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


def _times(computations, entry, through=_CALLS):
    """{computation: how often a step runs it}."""
    times = collections.Counter()

    def visit(name, n):
        times[name] += n
        for line in computations[name]:
            for kind, one, several in re.findall(rf'({"|".join(through)})=(?:%([\w.-]+)|\{{([^}}]*)\}})', line):
                for called in [one] if one else re.findall(r'%([\w.-]+)', several):
                    if called in computations:
                        visit(called, n * (_trips(computations, line) if kind == 'body' else 1))

    visit(entry, 1)
    return times


def _trips(computations, line):
    """Of a while loop that counts from 0 to a constant; 1 for any other."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    condition, body = (computations.get(re.search(rf'{part}=%([\w.-]+)', line)[1], []) for part in ('condition', 'body'))
    limits = [int(m[1]) for c in condition if (m := re.search(r'constant\((\d+)\)', c))]
    index = [m[1] for c in condition if (m := re.search(r'get-tuple-element\(.*index=(\d+)', c))]
    if len(limits) != 1 or len(index) != 1 or not any('direction=LT' in c for c in condition):
        return 1
    # The step is more than 1 where the compiler has unrolled the loop.
    defined = {m[1]: m[2] for c in body if (m := re.match(r'\s*(?:ROOT )?%(\S+) = \S+ (.*)', c))}
    root = next((c for c in body if c.lstrip().startswith('ROOT')), '')
    operands = re.findall(r'%([\w.-]+)', root.partition(' tuple(')[2].partition(')')[0])
    new = defined.get(operands[int(index[0])], '') if int(index[0]) < len(operands) else ''
    terms = re.findall(r'%([\w.-]+)', new.partition(')')[0]) if new.startswith('add(') else []
    steps = [int(m[1]) for t in terms if (m := re.match(r'constant\((\d+)\)', defined.get(t, '')))]
    return -(-limits[0] // (steps[0] if steps and steps[0] else 1))


def _subsets(names):
    return [tuple(n for i, n in enumerate(names) if mask >> i & 1) for mask in range(1, 1 << len(names))]


def _groups_of(sizes, axes):
    """Which devices, by their place in a mesh of {axis: size}, talk to each other over some of its axes."""
    place = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    order = [i for i, name in enumerate(sizes) if name not in axes]
    order += [i for i, name in enumerate(sizes) if name in axes]
    size = math.prod(sizes[name] for name in axes)
    return frozenset(map(frozenset, place.transpose(order).reshape(-1, size).tolist()))


def _members(line):
    """The replica groups of a collective, in any of the forms that the compiler writes them."""
    numbers = lambda s: tuple(map(int, s.split(',')))
    if m := re.search(r'replica_groups=\{(\{[\d,{}]*\})\}', line):
        return frozenset(frozenset(map(int, g.split(','))) for g in re.findall(r'\{([\d,]+)\}', m[1]))
    if m := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
        x = np.arange(math.prod(numbers(m[2]))).reshape(numbers(m[2]))
        x = (x.transpose(numbers(m[3])) if m[3] else x).reshape(numbers(m[1]))
        return frozenset(map(frozenset, x.tolist()))
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", m[1])}
        chosen = re.findall(r"'(\w+)'", m[4])
        x = np.arange(math.prod(sizes.values()))
        x = (x.reshape(numbers(m[2])).transpose(numbers(m[3])) if m[2] else x).reshape(tuple(sizes.values()))
        order = [i for i, n in enumerate(sizes) if n not in chosen] + [i for i, n in enumerate(sizes) if n in chosen]
        return frozenset(map(frozenset, x.transpose(order).reshape(-1, math.prod(sizes[n] for n in chosen)).tolist()))
    return None


def _ring(line, sizes):
    """The axes along which all pairs of a collective-permute differ."""
    pairs = re.findall(r'\{(\d+),(\d+)\}', line.partition('source_target_pairs=')[2])
    shape = tuple(sizes.values())
    different = set()
    for a, b in pairs:
        at = zip(sizes, np.unravel_index(int(a), shape), np.unravel_index(int(b), shape), strict=True)
        different |= {name for name, i, j in at if i != j}
    return tuple(name for name in sizes if name in different) or None


def _sources(text):
    """{stack frame: 'file:line'} of the tables at the head of a compiled program's text, by the innermost frame."""
    table = lambda name: text.partition(f'\n{name}\n')[2].partition('\n\n')[0].splitlines()
    files = dict(re.findall(r'^(\d+) "(.*)"$', '\n'.join(table('FileNames')), re.MULTILINE))
    places = {m[1]: f'{files.get(m[2], "?")}:{m[3]}' for row in table('FileLocations')
              if (m := re.match(r'(\d+) \{file_name_id=(\d+) .*?line=(\d+)', row))}  # fmt: skip
    frames = (re.match(r'(\d+) \{file_location_id=(\d+)', row) for row in table('StackFrames'))
    return {int(m[1]): places.get(m[2], '') for m in frames if m}
