"""Flags of scripts/train.py, with which scripts/launch.py checks a job, too."""

from absl import flags
from ml_collections import ConfigDict

from spark.errors import ConfigError

flags.disclaim_key_flags()  # --help shows them as those of the script
FIELDS = ('restore_from', 'branch_from')  # flags that set a field of `train`
NAMES = (*FIELDS, 'extend', 'json')


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines --restore_from, --branch_from, --extend and --json."""
    text = lambda name, what: flags.DEFINE_string(name, None, what, values)
    text('restore_from', 'A run, or a checkpoints/STEP of one, whose weights a new run starts from.')
    text('branch_from', 'A run, or a checkpoints/STEP of one, that a new run goes on from, with optimizer and place in the data.')
    what = 'Go on with other train.steps or learning rates than the run in --workdir had.'
    flags.DEFINE_bool('extend', False, what, values)
    text('json', 'Also write the summary to this file.')


def apply(config: ConfigDict, values: flags.FlagValues = flags.FLAGS) -> ConfigDict:
    """The config, in which the flags have set their fields."""
    for name in FIELDS:
        if values[name].value is not None:
            config.train[name] = values[name].value
    return config


def parse(arguments: list[str]) -> flags.FlagValues:
    """The flags that `define` defines, as a launch hands them on. Raises a ConfigError for anything else."""
    values = flags.FlagValues()
    define(values)
    try:
        _, *unknown = values(['--', *arguments])
    except flags.Error as e:
        raise ConfigError(f'after --: {e}; want {_names(values)}; --config.x.y=value stands before it') from None
    if unknown:
        raise ConfigError(f'after --: {unknown[0]!r}: want {_names(values)}')
    return values


def _names(values):
    return ', '.join(f'--{name}' for name in values)
