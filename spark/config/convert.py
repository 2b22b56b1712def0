"""From config files, flags and run directories to a checked `ExperimentConfig`, and back to text."""

import contextlib
import difflib
import importlib.util
import json
import pathlib
from collections.abc import Collection, Iterable
from typing import Any

import pydantic
from etils import epath
from ml_collections import ConfigDict, config_dict, config_flags

from spark.config.schema import AS_BEGUN, ExperimentConfig
from spark.errors import ConfigError

RETIRED = (('data', 'shuffle_rows'),)  # fields that older runs wrote


def template(section: type[pydantic.BaseModel] = ExperimentConfig) -> ConfigDict:
    """A ConfigDict with every field at its default; a field without a default is a placeholder of its type.

    A config file starts from it and states what differs. Any field can be overridden on the command line.
    """
    template_ = ConfigDict()
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            template_[name] = template(field.annotation)
        elif field.is_required():
            template_[name] = config_dict.placeholder(field.annotation)
        else:
            template_[name] = field.default
    return template_


def from_file(path: str | pathlib.Path, variant: str | None = None) -> ConfigDict:
    """What `get_config(variant)` of the Python file at `path` returns; None: `get_config()`."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([] if variant is None else [variant]))


def check_flags(argv: list[str]) -> None:
    """Raises a ConfigError for a --config whose file is missing, or a --config.FIELD that does not exist."""
    for arg, following in zip(argv, [*argv, ''][1:], strict=True):
        name, equals, value = arg.lstrip('-').partition('=')
        if not arg.startswith('-'):
            continue
        if name == 'config':
            value = value if equals else following  # absl takes both --config=PATH and --config PATH
            path = pathlib.Path(value.split(':')[0])
            if not path.is_file():
                files = [str(p) for p in path.parent.glob('*.py')]
                raise ConfigError(f'--config={value}: no such file{nearest(str(path), files)}')
        if name.startswith('config.'):
            field_type(name.partition('.')[2], f'--{name}')


def given(flag: Any) -> tuple[str, dict[str, Any]]:
    """What the command line says of a parsed --config: PATH[:VARIANT], and the values of --config.FIELD."""
    return config_flags.get_config_filename(flag), dict(config_flags.get_override_values(flag))


def field_type(name: str, label: str) -> Any:
    """The annotation of a field's dotted name; a ConfigError that starts with `label` if there is no such field."""
    section = ExperimentConfig
    for part in name.split('.'):
        known = getattr(section, 'model_fields', {})
        if part not in known:
            raise ConfigError(f'{label}: {_no_such_field(part, known)}')
        section = known[part].annotation
    return section


def validate(config: ConfigDict | dict) -> ExperimentConfig:
    """A checked `ExperimentConfig`; a ConfigError of one line names a wrong field, its value and what would be right."""
    raw = _without_placeholders(config.to_dict() if isinstance(config, ConfigDict) else config)
    try:
        return ExperimentConfig.model_validate(raw)
    except pydantic.ValidationError as e:
        raise ConfigError(_one_line(e)) from None


def load(path: pathlib.Path | epath.Path) -> ExperimentConfig:
    """The `ExperimentConfig` that a run wrote to config.json."""
    try:
        text = path.read_text()
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # whatever it is, pydantic tells it better
            raw = json.loads(text)
            for section, field in RETIRED:
                raw.get(section, {}).pop(field, None)
            if (ffn := raw.get('model', {}).get('ffn', {})).get('topk', 'statistical') != 'statistical':
                ffn.setdefault('shrink', False)  # before there was a choice, exact and approx kept the scores themselves
            if 'schedule' not in (optimizer := raw.get('optimizer', {'schedule': ''})):
                optimizer['warmup_from_zero'] = True  # before there was a choice
            text = json.dumps(raw)
        return ExperimentConfig.model_validate_json(text)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f'{path}: {getattr(e, "strerror", None) or e}; want the config.json of a run') from None
    except pydantic.ValidationError as e:
        raise ConfigError(f'{path}: {_one_line(e)}') from None


def fields(cfg: pydantic.BaseModel, prefix: str = '') -> dict[str, Any]:
    """The value of every leaf of a config, by its dotted name."""
    leaves = {}
    for name in type(cfg).model_fields:
        value = getattr(cfg, name)
        nested = isinstance(value, pydantic.BaseModel)
        leaves |= fields(value, f'{prefix}{name}.') if nested else {prefix + name: value}
    return leaves


def differences(old: ExperimentConfig, new: ExperimentConfig, ignore: Collection[str] = ()) -> str:
    """'a.b = 1, now 2; …' for the fields that differ; '' if none does. `ignore` names fields and sections.

    Of AS_BEGUN the default does not count as a difference: see `training.directory.as_begun`.
    """
    old, new = fields(old), fields(new)
    ignored = lambda f: any(f == name or f.startswith(f'{name}.') for name in ignore) or (f in AS_BEGUN and not new[f])
    return '; '.join(f'{f} = {old[f]!r}, now {new[f]!r}' for f in new if old[f] != new[f] and not ignored(f))


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest of the known names, or ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean {close[0]}?' if close else ''


def _without_placeholders(raw):
    if not isinstance(raw, dict):
        return raw
    return {name: _without_placeholders(value) for name, value in raw.items() if value is not None}


def _no_such_field(name, known):
    if not known:
        return f'no such field {name!r} inside of a value'
    return f'no such field{nearest(name, known) or "."} Known: {", ".join(known)}'


def _one_line(validation_error):
    """The first error of a pydantic.ValidationError, and how many more there are."""
    errors = validation_error.errors()
    # A misspelt field often shows up twice, as unknown and as missing: name the misspelling.
    first = min(errors, key=lambda e: e['type'] != 'extra_forbidden')
    name = '.'.join(map(str, first['loc']))
    if first['type'] == 'extra_forbidden':
        section = ExperimentConfig
        for part in first['loc'][:-1]:
            section = section.model_fields[part].annotation
        line = f'{name}: {_no_such_field(str(first["loc"][-1]), section.model_fields)}'
    elif first['type'] == 'wrong_value':  # of `Section._check`
        line = '.'.join([*map(str, first['loc']), first['msg']])
    elif first['type'] == 'missing':
        line = f'{name}: missing; this field has no default'
    else:
        given = repr(first['input'])
        given = given if len(given) < 200 else f'{given[:200]} …'
        message = first['msg'][0].lower() + first['msg'][1:]
        line = (f'{name} = {given}: ' if name else '') + message.replace('input should be', 'want')
    return line + (f' (and {len(errors) - 1} more)' if len(errors) > 1 else '')
