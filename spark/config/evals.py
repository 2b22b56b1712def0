"""The entries of train.evals, each of which is a line of text: 'NAME field=value …'."""

import shlex
from collections.abc import Iterable
from typing import Literal

import pydantic
from pydantic import Field


class EvalConfig(pydantic.BaseModel):
    """An evaluation of a run while it trains; only the name must be there. Its metrics are eval/NAME/…"""

    model_config = pydantic.ConfigDict(frozen=True, extra='forbid')

    name: str = Field(pattern=r'^[A-Za-z0-9_.-]+$')
    every: int = Field(0, ge=0)  # steps between evaluations; 0: only after the last step, after which every entry is evaluated
    split: Literal['validation', 'test', 'train'] = 'validation'
    source: str = ''  # other text, as data.eval_source; empty: that of the run
    batches: int = Field(0, ge=0)  # 0: the whole split
    # One of these three may be in place of, or beside, the losses.
    statistics: bool = False  # of the lookups, layer by layer, as scripts/evaluate.py has them
    metrics: str = ''  # MODULE:FUNCTION, a function (model, params, batch) → {name: sum over the tokens of the batch}
    tasks: str = ''  # of lm-evaluation-harness, separated by commas; no text is read then
    task_path: str = ''  # a directory of task files
    limit: int = Field(0, ge=0)  # documents per task; 0: all

    @property
    def label(self) -> str:
        """What its metrics begin with."""
        return f'eval/{self.name}'


def eval_entries(texts: Iterable[str]) -> list[EvalConfig]:
    """The entries of train.evals; a ValueError says in one line what is wrong with one."""
    found = [_entry(text) for text in texts]
    names = [entry.name for entry in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f'{twice[0]!r} once')
    return found


def problem(texts: Iterable[str]) -> str:
    """What would be right; '' if nothing is wrong."""
    try:
        eval_entries(texts)
    except ValueError as e:
        return str(e)
    return ''


def _entry(text):
    try:
        name, *words = shlex.split(text)
    except ValueError:
        raise ValueError(f"'NAME field=value …' in place of {text!r}") from None
    fields = dict(word.partition('=')[::2] for word in words)
    known = [field for field in EvalConfig.model_fields if field != 'name']
    if wrong := [word for word in words if '=' not in word or word.partition('=')[0] not in known]:
        raise ValueError(f'field=value in place of {wrong[0]!r}, where field is one of {", ".join(known)}')
    if len(fields) < len(words):
        raise ValueError(f'each field once in {text!r}')
    try:
        entry = EvalConfig.model_validate_strings({'name': name, **fields})
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        said = first['msg'].removeprefix('Input should be ').replace('String should match pattern', 'of')
        raise ValueError(f'{first["loc"][0]} of {text!r} to be {said}') from None
    for first, second in [('statistics', 'metrics'), ('statistics', 'tasks'), ('metrics', 'tasks')]:
        if getattr(entry, first) and getattr(entry, second):
            raise ValueError(f'{first} and {second} in entries of their own, in place of {text!r}')
    for fields_, has in [(('split', 'source', 'batches'), not entry.tasks), (('task_path', 'limit'), entry.tasks)]:
        if not has and (unread := [field for field in fields_ if field in fields]):
            raise ValueError(f'no {unread[0]} in {text!r}: it is {"not " * (not entry.tasks)}an entry with tasks')
    if entry.source and entry.split == 'train':
        raise ValueError(f"split 'validation' or 'test' with a source, in place of {text!r}")
    return entry
