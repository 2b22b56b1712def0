"""A grid or a search of training runs: its axes, its points, and the directory that it belongs to.

    OUT/sweep.json      the base config and the axes
    OUT/runs/NAME/      one run directory each, as scripts/train.py leaves it
    OUT/logs/NAME.log   the output of the run; NAME.json its exit code; with SLURM, NAME.job its job number
"""

import csv
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import pydantic

from spark import config, flops
from spark.data.tokenizer import tokenizer_for
from spark.errors import ConfigError
from spark.runtime import Path, entries, in_bucket, write_json
from spark.sweeps.search import Range, Search, points

# No choice of these changes the parameter count, but for the few scales of qk_norm. So runs that differ only in them are compared
# at equal parameters.
_NAMES = ('kind', 'k', 'k_schedule', 'r', 'gate', 'topk', 'groups', 'ddof', 'shrink', 'recall', 'huber', 'cap_first', 'qk_norm')
LOOKUP_FIELDS = {'model.layers', *(f'model.{half}.{name}' for half in ('ffn', 'attention') for name in _NAMES)}
LONGEST = 200  # name of a run; file systems take 255


class Run(NamedTuple):
    """One point of a grid: the name of its directory, its config, and what was adjusted to make the config valid."""

    name: str
    cfg: config.ExperimentConfig
    adjustments: str = ''


def parse_axes(axes: Iterable[str]) -> dict[str, list | Range]:
    """{field: values} of strings 'FIELD=v1,v2,…'; values may be quoted as in CSV, the parts of a tuple are joined by '+'.

    Numbers may also be a range, 'FIELD=low:high' or 'FIELD=log:low:high'.
    """
    parsed = {}
    for axis in axes:
        field, equals, text = axis.partition('=')
        if not equals or not text:
            raise ConfigError(f'--axis={axis}: want FIELD=value,value,…')
        kind = config.field_type(field, f'--axis={axis}')
        if field in parsed:
            raise ConfigError(f'--axis={axis}: {field} is an axis already')
        if kind in (int, float) and ':' in text:
            parsed[field] = _parse_range(axis, kind, text)
            continue
        values = [_parse_value(axis, kind, value.strip()) for value in next(csv.reader([text]))]
        parsed[field] = list(dict.fromkeys(values))
    if not parsed:
        raise ConfigError('--axis is missing: want at least one FIELD=value,value,…')
    return parsed


def _parse_range(axis, kind, text):
    *log, low, high = text.split(':')
    low, high = (_parse_value(axis, kind, end.strip()) for end in (low, high))
    if log not in ([], ['log']) or not -math.inf < low < high < math.inf or (log and low <= 0):
        raise ConfigError(f'--axis={axis}: want LOW:HIGH, or log:LOW:HIGH with LOW above 0')
    return Range(low, high, bool(log))


def _parse_value(axis, kind, text):
    try:
        adapter = pydantic.TypeAdapter(kind)
        if getattr(kind, '__origin__', None) is tuple:
            return adapter.validate_python(tuple(text.split('+')))
        return adapter.validate_strings(text)
    except pydantic.ValidationError as e:
        message = e.errors()[0]['msg'].replace('Input should be', 'want')
        raise ConfigError(f'--axis={axis}: {text!r}: {message}') from None


def expand(base: config.ExperimentConfig, axes: dict[str, list | Range], search: Search | None = None) -> list[Run]:
    """The runs of the product of `axes` over a base config, or of a search's points in it.

    Points that become equal once adjusted (see `_adjust`) are one run.
    The parameter counts of points that differ only in LOOKUP_FIELDS must be within 1 %.
    """
    if base.train.stop_at or 'train.stop_at' in axes:
        raise ConfigError('train.stop_at: want 0 in a sweep, whose runs stop at its --rungs')
    runs, models, counts = {}, {}, {}
    short = short_names(axes)
    if not search and (field := next((f for f, values in axes.items() if isinstance(values, Range)), None)):
        want = 'want FIELD=value,value,…, or a search, such as --search=sobol:16'
        raise ConfigError(f'--axis={field}={axes[field]}: a grid has no ranges: {want}')
    for point in points(axes, search) if search else itertools.product(*axes.values()):
        cfg, adjustments = _adjust(base, dict(zip(axes, point, strict=True)))
        values = config.fields(cfg)
        name = _short('_'.join(f'{short[field]}-{_file_name(values[field])}' for field in axes))
        run = runs.setdefault(name, Run(name, cfg, adjustments))
        if run.cfg != cfg:
            raise ConfigError(f'--axis: two points of the grid would share the name {name}')
        one = models.setdefault(cfg.model_copy(update={'model': cfg.model.per_layer}), name)
        if one != name:
            want = f'want an axis that model.layers = {cfg.model.layers!r} leaves open'
            raise ConfigError(f'--axis: {one} and {name} are the same run: {want}')
        other_fields = tuple((f, values[f]) for f in axes if f not in LOOKUP_FIELDS and f != 'seed')
        counts.setdefault(other_fields, []).append((flops.parameters(tokenizer_for(cfg)[1].model), name))
    for (least, small), (most, large) in ((min(group), max(group)) for group in counts.values()):
        if most > 1.01 * least:
            raise ConfigError(f'parameters differ by {most / least - 1:.1%}: {small} has {least:,}, {large} has {most:,}; '
                              'leave model.ffn.d_ff to the sweep')  # fmt: skip
    return list(runs.values())


def _adjust(base, chosen):
    """`base` with the chosen fields and what follows from them, as (config, a note of what was adjusted).

    An FFN that would have other parameters gets the d_ff of equal ones and the same share of active neurons. What a kind, an
    operator, an optimizer or a schedule does not read has its default whatever an axis says, so that a grid over kinds and k
    need not leave points out.
    """
    raw = base.model_dump()
    for field, value in chosen.items():
        *sections, name = field.split('.')
        functools.reduce(dict.__getitem__, sections, raw)[name] = value
    notes = []
    for half in ('ffn', 'attention'):
        before, prefix = getattr(base.model, half), f'model.{half}.'
        values = {field.removeprefix(prefix): value for field, value in chosen.items() if field.startswith(prefix)}
        after = raw['model'][half] = config.adapted(before, values, raw['model']['d_model'])
        if half == 'ffn' and 'd_ff' not in values and after['d_ff'] != before.d_ff:
            notes.append(f'd_ff {before.d_ff} → {after["d_ff"]}')
        for name in _NAMES[1:]:
            wanted = values.get(name, getattr(before, name, None))
            if after.get(name) != wanted:
                notes.append(f'{half}.{name} {wanted!r} → {after[name]!r}')
    layers, raw['model']['layers'] = raw['model']['layers'], config.without_unread(raw['model'], base.model)
    if (words := raw['model']['layers']).split() != layers.split():
        notes.append(f'layers {layers!r} → {words!r}')
    optimizer = raw['optimizer']
    for name in config.OptimizerConfig.model_construct(**optimizer).unread:
        default = config.OptimizerConfig.model_fields[name].default
        if optimizer[name] != default:
            notes.append(f'{name} {optimizer[name]} → {default}')
            optimizer[name] = default
    return config.validate(raw), ', '.join(notes)


def occurring(axes: dict[str, list | Range], runs: list[Run]) -> dict[str, list]:
    """The values of each axis: those of a list, or those of the runs in a range."""
    of = [config.fields(run.cfg) for run in runs]
    return {f: sorted({v[f] for v in of}) if isinstance(values, Range) else values for f, values in axes.items()}


def short_names(fields: Collection[str]) -> dict[str, str]:
    """{field: the shortest end of its dotted name that no other field has}."""
    names = {}
    for field in fields:
        ends = itertools.accumulate(reversed(field.split('.')), lambda end, part: f'{part}.{end}')
        names[field] = next(end for end in ends if sum(f == end or f.endswith('.' + end) for f in fields) == 1)
    return names


def _file_name(value):
    text = ('+'.join(value) if isinstance(value, tuple) else str(value)).replace('%', 'pct')  # 8% is not 8
    return re.sub(r'[^A-Za-z0-9.+-]+', '_', text).strip('._') or '_'


def _short(name):
    """What fits a file system with an ending after it: the end of a long name becomes a hash of the whole."""
    return name if len(name) <= LONGEST else f'{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}'


def prepare_directory(
    out: Path, base: config.ExperimentConfig, axes: dict[str, list | Range], runs: list[Run], how: dict | None = None
) -> None:
    """Creates the directory of a sweep, or checks that an existing one is of the same sweep.

    Axes of a grid may only get more values. `how` says what else must stay as it is, by name.
    """
    path, how = out / 'sweep.json', how or {}
    if path.exists():
        try:
            recorded = json.loads(path.read_text())
            recorded_base = config.ExperimentConfig.model_validate_json(json.dumps(config.upgraded(recorded['config'])))
            recorded_axes, recorded_how = list(recorded['axes']), recorded.get('how', {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            reason = ' '.join(str(getattr(e, 'strerror', None) or e).split())
            raise ConfigError(
                f'{path}: not the record of a sweep ({reason}): choose another --out; or delete this file and move {out}/runs '
                'away, to start the sweep anew'
            ) from None
        if recorded_axes != list(axes):  # the names of the runs follow their order
            want = 'want --axis in this order' if set(recorded_axes) == set(axes) else 'choose another directory'
            raise ConfigError(f'--out={out} belongs to a sweep over {", ".join(recorded_axes)}: {want}')
        if different := config.differences(recorded_base, base, ignore=axes):
            raise ConfigError(f'--out={out} belongs to a sweep with {different}: choose another directory')
        for name in {**recorded_how, **how}:
            if how.get(name) != recorded_how.get(name):
                was = f'{name} = {recorded_how.get(name)}, now {how.get(name)}'
                raise ConfigError(f'--out={out} belongs to a sweep with {was}: choose another directory')
    for run in runs:
        recorded = out / 'runs' / run.name / 'config.json'
        if recorded.exists() and (different := config.differences(config.load(recorded), run.cfg, ['train.stop_at'])):
            raise ConfigError(f'{recorded.parent} belongs to a run with {different}: choose another --out')
    try:
        if not in_bucket(out):
            (out / 'logs').mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if others := sorted(p.name for p in entries(out) if p.name not in ('logs', '.lock')):
                raise ConfigError(f'--out={out} holds {others[0]!r} but no sweep.json: choose another directory')
        write_json(path, {'config': json.loads(base.model_dump_json()), 'axes': occurring(axes, runs), 'how': how})
    except OSError as e:
        raise ConfigError(f'--out={out}: {e.strerror or e}') from None
