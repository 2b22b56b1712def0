"""Reads the text (HLO) of a compiled program. A loop counts as often as it runs, or once if its length depends on data."""

import collections
import itertools
import math
import re
from typing import NamedTuple

import jax
import numpy as np

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BYTES = {'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8}  # others: 1
_CONTROL_FLOW = ('body', 'branch_computations', 'true_computation', 'false_computation')  # calls, except those of fusions
_SLICES = ('dynamic-slice', 'slice', 'gather')
_NO_WORK = ('parameter', 'get-tuple-element', 'bitcast', 'constant', 'tuple', 'while', 'conditional', 'call', 'after-all',
            'partition-id', 'iota', 'send', 'recv')  # fmt: skip


def collectives(text: str, mesh: jax.sharding.Mesh, slices: int = 1) -> list[dict]:
    """[{'kind', 'axes', 'count', 'bytes'}] per step and device, the largest first.

    'bytes' is the size of the result of an all-gather, of the operand of a reduce-scatter or all-reduce, and of what
    collective-permutes send: the compiler makes rings of them, to overlap a gather or scatter with a matmul. With several slices,
    `text` is the program of one of them, and transfers between slices count as the kind of collective that they are part of.
    """
    computations, entry = _computations(text)
    sizes = mesh.shape | {'data': mesh.shape['data'] // slices}
    subsets = [axes for n in range(len(sizes)) for axes in itertools.combinations(mesh.axis_names, n + 1)]
    groups = {axes: _groups_of(sizes, axes) for axes in subsets}
    found = {}  # by channel, since a collective that is overlapped with a loop appears a second time inside the loop
    for name, times in _times(computations, entry).items():
        for line in computations[name]:
            if sent := re.search(r' send\(.*_xla_host_transfer_rendezvous="([a-z-]+)', line):
                found[line] = times, times * _sizes(line.partition(' send(')[0])[0], sent[1], 'data, between slices'
                continue
            if not (match := re.match(rf'\s*(?:ROOT )?%(\S+) = (.*?) ({"|".join(COLLECTIVES)})(-start)?\(', line)):
                continue
            shapes = _sizes(match[2])
            # The result of a …-start also contains its operands and buffers.
            size, members = max(shapes) if match[4] else sum(shapes), _members(line)
            axes = next((axes for axes, g in groups.items() if g == members), None) if members else _ring(line, sizes)
            if match[3] == 'reduce-scatter' and members:
                size *= len(next(iter(members)))
            row = times, times * size, match[3], ' × '.join(axes) if axes else '?'
            channel = re.search(r'channel_id=(\d+)', line) or match
            found[channel[1]] = min(found.get(channel[1], row), row)
    totals, counts = collections.Counter(), collections.Counter()
    for times, size, kind, axes in found.values():
        totals[kind, axes] += size
        counts[kind, axes] += times
    return [{'kind': kind, 'axes': axes, 'count': counts[kind, axes], 'bytes': n} for (kind, axes), n in totals.most_common()]


def traffic(text: str) -> int:
    """Bytes that a step reads from and writes to the memory of a device: the operands and results of its operations.

    A sliced operand counts as the slice, an update in place as the update, an array in the core's own memory not at all, and an
    operand of a kernel once. Caches are not modelled.
    """
    computations, entry = _computations(text)
    total = 0
    for name, times in _times(computations, entry, through=_CONTROL_FLOW).items():
        operations = [op for line in computations[name] if (op := _operation(line))]
        size = {op.name: op.size for op in operations}
        total += times * sum(_moved(op, size, computations) for op in operations)
    return total


class _Operation(NamedTuple):
    name: str
    size: int  # bytes of its results in the memory of the device
    kind: str
    operands: list[str]
    line: str


def _operation(line):
    if not (match := re.match(r'\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)', line)):
        return None
    # Without the types whose layout has S(…): those arrays are in the core.
    types = ' '.join(re.findall(r'\w+\[[\d,]*\](?:\{[^S}]*\})?(?!\{)', match[2]))
    return _Operation(match[1], sum(_sizes(types)), match[3], re.findall(r'%([\w.-]+)', match[4].partition(')')[0]), line)


def _moved(op, size, computations):
    """Bytes that an operation moves; size[name] is that of each operand."""
    if op.kind in _NO_WORK or op.kind.endswith('-done'):
        return 0
    if op.kind.endswith('-start'):
        return op.size  # the result contains the operands
    reads = [size.get(name, 0) for name in op.operands]
    if op.kind in _SLICES:
        return 2 * op.size
    if op.kind == 'dynamic-update-slice':
        return 2 * reads[1]
    called = re.search(r'calls=%([\w.-]+)', op.line) if op.kind == 'fusion' else None
    if not called or called[1] not in computations:
        return op.size + sum(reads)
    inner_ops = [inner for line in computations[called[1]] if (inner := _operation(line))]
    sizes, written = {inner.name: inner.size for inner in inner_ops}, op.size
    for inner in inner_ops:
        if inner.kind != 'parameter':
            continue
        number = int(re.search(r'parameter\((\d+)\)', inner.line)[1])
        users = [user for user in inner_ops if inner.name in user.operands]
        updates = [u.operands[1] for u in users if u.kind == 'dynamic-update-slice' and u.operands[0] == inner.name]
        if number < len(reads) and users and all(user.kind in _SLICES and user.operands[0] == inner.name for user in users):
            reads[number] = min(reads[number], sum(user.size for user in users))
        elif number < len(reads) and updates:
            written, reads[number] = written - reads[number] + sizes.get(updates[0], 0), 0
    return max(written, 0) + sum(reads)


def _sizes(types):
    """Bytes of each array in the types of a line."""
    arrays = re.findall(r'(\w+)\[([\d,]*)\]', types)
    return [math.prod(map(int, filter(None, dims.split(',')))) * _BYTES.get(kind, 1) for kind, dims in arrays]


def largest_buffers(text: str, n: int = 12) -> list[dict]:
    """[{'bytes', 'shape', 'operation', 'source'}] of the n largest results of operations that are not inside a fusion."""
    computations, entry = _computations(text)
    source = _sources(text)
    found = {}
    for name in _times(computations, entry, through=_CONTROL_FLOW):
        for line in computations[name]:
            match = re.match(r'\s*(?:ROOT )?%\S+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(', line)
            if not match or match[2] in ('parameter', 'get-tuple-element', 'bitcast', 'constant', 'tuple', 'while'):
                continue
            operation = re.search(r'op_name="([^"]*)"', line)
            frame = re.search(r'stack_frame_id=(\d+)', line)
            row = {'bytes': _sizes(match[1])[0], 'shape': match[1], 'operation': operation[1] if operation else match[2],
                   'source': source.get(int(frame[1]), '') if frame else ''}  # fmt: skip
            found.setdefault((row['shape'], row['source']), row)
    return sorted(found.values(), key=lambda row: -row['bytes'])[:n]


def _computations(text):
    """{name: its lines} of the computations of a program, and the name of its entry."""
    computations, entry, lines = {}, None, None
    for line in text.splitlines():
        if header := re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line == '}':  # the metadata of a kernel may have lines that only start with it
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


def _times(computations, entry, through=(*_CONTROL_FLOW, 'calls', 'to_apply')):
    """{computation: how often a step runs it}, of those that the entry reaches through calls of these kinds."""
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
    """How often the body of a while loop runs, if it counts from 0 to a constant; 1 for any other loop."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition, body = (computations.get(re.search(rf'{part}=%([\w.-]+)', line)[1], []) for part in ('condition', 'body'))
    limits = [int(m[1]) for c in condition if (m := re.search(r'constant\((\d+)\)', c))]
    index = [m[1] for c in condition if (m := re.search(r'get-tuple-element\(.*index=(\d+)', c))]
    if len(limits) != 1 or len(index) != 1 or not any('direction=LT' in c for c in condition):
        return 1
    # The compiler may have unrolled the loop, so that the counter grows by more than 1.
    defined = {m[1]: m[2] for c in body if (m := re.match(r'\s*(?:ROOT )?%(\S+) = \S+ (.*)', c))}
    root = next((c for c in body if c.lstrip().startswith('ROOT')), '')
    operands = re.findall(r'%([\w.-]+)', root.partition(' tuple(')[2].partition(')')[0])
    new = defined.get(operands[int(index[0])], '') if int(index[0]) < len(operands) else ''
    terms = re.findall(r'%([\w.-]+)', new.partition(')')[0]) if new.startswith('add(') else []
    steps = [int(m[1]) for t in terms if (m := re.match(r'constant\((\d+)\)', defined.get(t, '')))]
    return -(-limits[0] // (steps[0] if steps and steps[0] else 1))


def _groups_of(sizes, axes, numbers=None):
    """The groups that a collective over these axes of a mesh {axis: size} forms; `numbers`: its devices, in order if None."""
    numbers = np.arange(math.prod(sizes.values())) if numbers is None else numbers
    axes_last = sorted(range(len(sizes)), key=lambda i: list(sizes)[i] in axes)
    numbers = numbers.reshape(tuple(sizes.values())).transpose(axes_last)
    return frozenset(map(frozenset, numbers.reshape(-1, math.prod(sizes[name] for name in axes)).tolist()))


def _members(line):
    """The replica groups of a collective, in any of the compiler's notations; None if the line has none."""
    numbers = lambda s: tuple(map(int, s.split(',')))

    def iota(shape, order):
        x = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
        return x.transpose(numbers(order)) if order else x

    if m := re.search(r'replica_groups=\{(\{[\d,{}]*\})\}', line):
        return frozenset(frozenset(map(int, g.split(','))) for g in re.findall(r'\{([\d,]+)\}', m[1]))
    if m := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
        return frozenset(map(frozenset, iota(m[2], m[3]).reshape(numbers(m[1])).tolist()))
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", m[1])}
        return _groups_of(sizes, re.findall(r"'(\w+)'", m[4]), iota(m[2], m[3]) if m[2] else None)
    return None


def _ring(line, sizes):
    """The mesh axes along which the pairs of a collective-permute differ."""
    pairs = re.findall(r'\{(\d+),(\d+)\}', line.partition('source_target_pairs=')[2])
    coordinates = np.unravel_index(np.array(pairs, int).reshape(-1, 2), tuple(sizes.values()))
    return tuple(name for name, x in zip(sizes, coordinates, strict=True) if (x[:, 0] != x[:, 1]).any()) or None


def _sources(text):
    """{stack frame: 'file:line' of its innermost call}, from the tables at the head of the text."""
    table = lambda name: text.partition(f'\n{name}\n')[2].partition('\n\n')[0].splitlines()
    files = dict(re.findall(r'^(\d+) "(.*)"$', '\n'.join(table('FileNames')), re.MULTILINE))
    places = {m[1]: f'{files.get(m[2], "?")}:{m[3]}' for row in table('FileLocations')
              if (m := re.match(r'(\d+) \{file_name_id=(\d+) .*?line=(\d+)', row))}  # fmt: skip
    frames = (re.match(r'(\d+) \{file_location_id=(\d+)', row) for row in table('StackFrames'))
    return {int(m[1]): places.get(m[2], '') for m in frames if m}
