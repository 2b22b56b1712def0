"""What differs by layer (`ModelConfig.layers`), and k by step (`k_schedule`). docs/levers.md explains both languages."""

import functools
import re
from typing import NamedTuple

import pydantic
from pydantic_core import PydanticCustomError

from spark.config.kinds import adapted

ALL_KEYS = 2**31 - 1  # a k that no number of keys exceeds

_WORD = re.compile(r'(?:(local|global|\d+(?:-\d*)?):)?(ffn|attention)\.(\w+)=(\S+)')
_SCHEDULE = re.compile(r'(all|\d+):(\d+)(?: (linear|cosine):(\d+))?')


class Schedule(NamedTuple):
    """k is `start` for so many `steps`; then it falls from `top` to its value in `length` more, by a line or half a cosine."""

    start: int
    top: int
    steps: int
    form: str = 'linear'
    length: int = 1

    @property
    def end(self) -> int:
        """The first update with k itself."""
        return self.steps + self.length


def schedule(text: str, k: int, most: int) -> Schedule | None:
    """The Schedule of 'START:STEPS [FORM:STEPS]' that ends at k, where 'all' is `most`; None if it is something else.

    A fall from `most` jumps to half of it first. There the threshold is the mean of the scores, while close below `most` it lies
    standard deviations under it, and a soft one would add these to every score.
    """
    if not (m := _SCHEDULE.fullmatch(text)):
        return None
    start = most if m[1] == 'all' else int(m[1])
    found = Schedule(start, max(most // 2, k) if start == most else start, int(m[2]), *([m[3], int(m[4])] if m[3] else []))
    falls_from_all_keys = start == ALL_KEYS > k and found.length > 1
    fits = k <= start <= most and 1 <= found.length < 2**21 and found.end < 2**31
    return found if fits and not falls_from_all_keys else None


@functools.lru_cache
def per_layer(cfg: pydantic.BaseModel) -> tuple[pydantic.BaseModel, ...]:
    """For each layer of a ModelConfig that of a model in which all layers are like it. Errors are of one line, for `Section`."""
    if not cfg.layers:
        return (cfg,) * cfg.n_layers
    try:
        changes = _changes(cfg.layers, [cfg.pattern[i % len(cfg.pattern)] for i in range(cfg.n_layers)])
        halves = lambda i, texts: {
            half: _changed(f'in layer {i} {half}', getattr(cfg, half), x, cfg.d_model) for half, x in texts.items()
        }
        return tuple(cfg.model_copy(update={'layers': '', **halves(i, texts)}) for i, texts in enumerate(changes))
    except ValueError as e:
        raise PydanticCustomError('wrong_value', '{line}', {'line': f'layers = {cfg.layers!r}: {e}'}) from None


def _changes(text, spans):
    """For each layer {'ffn' or 'attention': {field: text of its value}}; the last word that names a layer's field counts."""
    found = [{'ffn': {}, 'attention': {}} for _ in spans]
    for word in text.split():
        if not (m := _WORD.fullmatch(word)):
            raise ValueError(f'{word!r}: want LAYERS:HALF.FIELD=VALUE, such as 0-9:ffn.k=64 or attention.kind=dense/spark')
        selected, half, field, values = m[1], m[2], m[3], m[4].split('/')
        layers = _selected(selected, spans)
        if not layers or len(layers) % len(values):
            names = f'{len(layers)} of the {len(spans)} layers'
            raise ValueError(f'{word!r}: {len(values)} values for {names}: want as many, or a divisor of it')
        for n, i in enumerate(layers):
            found[i][half][field] = values[n % len(values)]
    return found


def without_unread(raw: dict, model: pydantic.BaseModel) -> str:
    """`layers` of a ModelConfig's fields less the words about what no kind of their layers reads; `raw` are values for `model`.

    As they are where any of them is wrong, which validation tells.
    """
    try:
        spans = [raw['pattern'][i % len(raw['pattern'])] for i in range(raw['n_layers'])]
        own = _changes(raw['layers'], spans)

        def is_read(word):
            selected, half, field, _ = _WORD.fullmatch(word).groups()
            of = ({name: x for name, x in own[i][half].items() if name in ('kind', 'topk')} for i in _selected(selected, spans))
            return any(field not in getattr(model, half).model_copy(update=raw[half] | chosen).unread for chosen in of)

        return ' '.join(filter(is_read, raw['layers'].split()))
    except (ValueError, KeyError, ZeroDivisionError):
        return raw['layers']


def _selected(selected, spans):
    if selected is None or selected in ('local', 'global'):
        return [i for i, span in enumerate(spans) if selected in (None, span)]
    first, to, last = selected.partition('-')
    last = int(last) if last else len(spans) - 1 if to else int(first)
    return list(range(int(first), last + 1)) if last < len(spans) else []


def _changed(label, section, texts, d_model):
    """A section with other values. What they leave open follows from the kind, as in a sweep over kinds."""
    if not texts:
        return section
    fields = type(section).model_fields
    own = [name for name in fields if name not in (*section.COMMON, 'k_schedule')]
    if unknown := [name for name in texts if name not in own]:
        raise ValueError(f'{label}.{unknown[0]}: want one of {", ".join(own)}')
    values = {name: _value(f'{label}.{name}', fields[name].annotation, text) for name, text in texts.items() if name != 'k'}
    raw = adapted(section, values, d_model) | values
    most = raw.get('d_ff', ALL_KEYS)
    raw |= {'k': _k(label, texts['k'], most)} if 'k' in texts else {}
    start, colon, rest = raw['k_schedule'].partition(':')
    if start.isdecimal():  # of all layers: one that keeps more does not begin with less
        raw['k_schedule'] = f'{max(min(int(start), most), raw["k"])}{colon}{rest}'
    try:
        return type(section).model_validate(raw)
    except pydantic.ValidationError as e:
        error = e.errors()[0]
        line = error['msg'] if error['type'] == 'wrong_value' else _told(error['loc'][0], error)
        raise ValueError(f'{label}.{line}') from None


def _value(label, kind, text):
    try:
        return pydantic.TypeAdapter(kind).validate_strings(text)
    except pydantic.ValidationError as e:
        raise ValueError(_told(label, e.errors()[0])) from None


def _told(name, error):
    return f'{name} = {error["input"]!r}: {error["msg"].replace("Input should be", "want")}'


def _k(label, text, most):
    if text == 'all':
        return most
    if text.isdecimal():
        return int(text)
    if most < ALL_KEYS and re.fullmatch(r'\d+(\.\d+)?%', text) and float(text[:-1]) > 0:
        return max(round(float(text[:-1]) / 100 * most), 1)
    share = ' or a share of the neurons such as 8%' if most < ALL_KEYS else ''
    raise ValueError(f"{label}.k = {text!r}: want a number, 'all'{share}")
