"""A grid of training runs: its axes, its points, and the directory that it belongs to.

    OUT/sweep.json      the base config and the axes
    OUT/runs/NAME/      one run directory each, as scripts/train.py leaves it
    OUT/logs/NAME.log   the output of the run; NAME.json its exit code; with SLURM, NAME.job its job number
"""

import csv
import functools
import itertools
import json
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import pydantic

from spark import config, flops
from spark.data.tokenizer import tokenizer_for
from spark.errors import ConfigError
from spark.runtime import Path, entries, in_bucket, write_json

# No choice of these changes the parameter count, so runs that differ only in them are compared at equal parameters.
_NAMES = ('kind', 'k', 'r', 'topk', 'shrink', 'recall', 'huber')
LOOKUP_FIELDS = {f'model.{half}.{name}' for half in ('ffn', 'attention') for name in _NAMES}


class Run(NamedTuple):
    """One point of a grid: the name of its directory, its config, and what was adjusted to make the config valid."""

    name: str
    cfg: config.ExperimentConfig
    adjustments: str = ''


def parse_axes(axes: Iterable[str]) -> dict[str, list]:
    """{field: values} of strings 'FIELD=v1,v2,…'; values may be quoted as in CSV, the parts of a tuple are joined by '+'."""
    parsed = {}
    for axis in axes:
        field, equals, text = axis.partition('=')
        if not equals or not text:
            raise ConfigError(f'--axis={axis}: want FIELD=value,value,…')
        kind = config.field_type(field, f'--axis={axis}')
        values = [_parse_value(axis, kind, value.strip()) for value in next(csv.reader([text]))]
        if field in parsed:
            raise ConfigError(f'--axis={axis}: {field} is an axis already')
        parsed[field] = list(dict.fromkeys(values))
    if not parsed:
        raise ConfigError('--axis is missing: want at least one FIELD=value,value,…')
    return parsed


def _parse_value(axis, kind, text):
    try:
        adapter = pydantic.TypeAdapter(kind)
        if getattr(kind, '__origin__', None) is tuple:
            return adapter.validate_python(tuple(text.split('+')))
        return adapter.validate_strings(text)
    except pydantic.ValidationError as e:
        message = e.errors()[0]['msg'].replace('Input should be', 'want')
        raise ConfigError(f'--axis={axis}: {text!r}: {message}') from None


def expand(base: config.ExperimentConfig, axes: dict[str, list]) -> list[Run]:
    """The runs of the product of `axes` over a base config; points that become equal once adjusted (see `_adjust`) are one run.

    The parameter counts of points that differ only in LOOKUP_FIELDS must be within 1 %.
    """
    runs, counts = {}, {}
    short = short_names(axes)
    for point in itertools.product(*axes.values()):
        cfg, adjustments = _adjust(base, dict(zip(axes, point, strict=True)))
        values = config.fields(cfg)
        name = '_'.join(f'{short[field]}-{_file_name(values[field])}' for field in axes)
        run = runs.setdefault(name, Run(name, cfg, adjustments))
        if run.cfg != cfg:
            raise ConfigError(f'--axis: two points of the grid would share the name {name}')
        other_fields = tuple((f, values[f]) for f in axes if f not in LOOKUP_FIELDS and f != 'seed')
        counts.setdefault(other_fields, []).append((flops.parameters(tokenizer_for(cfg)[1].model), name))
    for (least, small), (most, large) in ((min(group), max(group)) for group in counts.values()):
        if most > 1.01 * least:
            raise ConfigError(f'parameters differ by {most / least - 1:.1%}: {small} has {least:,}, {large} has {most:,}; '
                              'leave model.ffn.d_ff to the sweep')  # fmt: skip
    return list(runs.values())


def _adjust(base, chosen):
    """`base` with the chosen fields and what follows from them, as (config, a note of what was adjusted).

    Another FFN kind gets the d_ff of equal parameters and the same share of active neurons. Where a kind has no k or r, they
    become 0 whatever an axis says, so that a grid over kinds and k need not leave points out. What an optimizer or a schedule
    does not read has its default.
    """
    raw = base.model_dump()
    for field, value in chosen.items():
        *sections, name = field.split('.')
        functools.reduce(dict.__getitem__, sections, raw)[name] = value
    f, a, base_ffn = raw['model']['ffn'], raw['model']['attention'], base.model.ffn
    notes = []
    if f['kind'] != base_ffn.kind and 'model.ffn.d_ff' not in chosen:
        f['d_ff'] = config.matched_d_ff(base_ffn.d_ff, base_ffn.kind, f['kind'])
        if f['d_ff'] != base_ffn.d_ff:
            notes.append(f'd_ff {base_ffn.d_ff} → {f["d_ff"]}')
    kind = config.FFN_KINDS[f['kind']]
    if kind.topk and 'model.ffn.k' not in chosen:
        f['k'] = round(base_ffn.k * f['d_ff'] / base_ffn.d_ff)
    if not kind.topk:
        f |= {'k': 0, 'topk': 'statistical', 'shrink': True, 'huber': 0.0}
    if f['topk'] != 'approx':
        f['recall'] = config.FFNConfig.model_fields['recall'].default
    if not kind.predictor:
        f['r'] = 0
    kind = config.ATTENTION_KINDS[a['kind']]
    a |= {name: 0 for name, has in [('k', kind.topk), ('r', kind.predictor)] if not has}
    for half, before, after in [('ffn', base_ffn, f), ('attention', base.model.attention, a)]:
        for name in ('k', 'r'):
            wanted = chosen.get(f'model.{half}.{name}', getattr(before, name))
            if after[name] != wanted:
                notes.append(f'{half}.{name} {wanted} → {after[name]}')
    optimizer = raw['optimizer']
    for name in config.OptimizerConfig.model_construct(**optimizer).unread:
        default = config.OptimizerConfig.model_fields[name].default
        if optimizer[name] != default:
            notes.append(f'{name} {optimizer[name]} → {default}')
            optimizer[name] = default
    return config.validate(raw), ', '.join(notes)


def short_names(fields: Collection[str]) -> dict[str, str]:
    """{field: the shortest end of its dotted name that no other field has}."""
    names = {}
    for field in fields:
        ends = itertools.accumulate(reversed(field.split('.')), lambda end, part: f'{part}.{end}')
        names[field] = next(end for end in ends if sum(f == end or f.endswith('.' + end) for f in fields) == 1)
    return names


def _file_name(value):
    text = '+'.join(value) if isinstance(value, tuple) else str(value)
    return re.sub(r'[^A-Za-z0-9.+-]+', '_', text).strip('._') or '_'


def prepare_directory(out: Path, base: config.ExperimentConfig, axes: dict[str, list], runs: list[Run]) -> None:
    """Creates the directory of a sweep, or checks that an existing one is of the same sweep: axes may only get more values."""
    path = out / 'sweep.json'
    if path.exists():
        try:
            recorded = json.loads(path.read_text())
            recorded_base = config.ExperimentConfig.model_validate_json(json.dumps(config.upgraded(recorded['config'])))
            recorded_axes = set(recorded['axes'])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            reason = ' '.join(str(getattr(e, 'strerror', None) or e).split())
            raise ConfigError(
                f'{path}: not the record of a sweep ({reason}): choose another --out; or delete this file and move {out}/runs '
                'away, to start the sweep anew'
            ) from None
        if recorded_axes != set(axes):
            raise ConfigError(f'--out={out} belongs to a sweep over {", ".join(sorted(recorded_axes))}: choose another directory')
        if different := config.differences(recorded_base, base, ignore=axes):
            raise ConfigError(f'--out={out} belongs to a sweep with {different}: choose another directory')
    for run in runs:
        recorded = out / 'runs' / run.name / 'config.json'
        if recorded.exists() and (different := config.differences(config.load(recorded), run.cfg)):
            raise ConfigError(f'{recorded.parent} belongs to a run with {different}: choose another --out')
    try:
        if not in_bucket(out):
            (out / 'logs').mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if others := sorted(p.name for p in entries(out) if p.name not in ('logs', '.lock')):
                raise ConfigError(f'--out={out} holds {others[0]!r} but no sweep.json: choose another directory')
        write_json(path, {'config': json.loads(base.model_dump_json()), 'axes': axes})
    except OSError as e:
        raise ConfigError(f'--out={out}: {e.strerror or e}') from None
