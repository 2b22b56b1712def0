"""What can go wrong for a user, each with its exit code; and the wrapper that turns it into one line."""

import sys

from absl import flags


class SparkError(Exception):
    """A failure that is told to the user in one line and ends the process with `exit_code`."""

    exit_code = 1


class ConfigError(SparkError):
    """A wrong config field, flag or combination."""

    exit_code = 2


class NotFiniteError(SparkError):
    """The loss is NaN or infinite."""

    exit_code = 3


class DataError(SparkError):
    """Data that cannot be read, decoded or that ends too early."""

    exit_code = 4


class CheckpointError(SparkError):
    """A checkpoint that cannot be used for this run."""

    exit_code = 5


class Preempted(SparkError):
    """The process was asked to stop; its state is saved and the same command goes on from there."""

    exit_code = 75


def run(main, argv=None):
    """Parses absl flags, calls `main()` and exits: 0, or the error's code after one line on stderr."""
    try:
        rest = flags.FLAGS(sys.argv if argv is None else argv)
        if len(rest) > 1:
            raise ConfigError(f'unexpected argument {rest[1]!r}: flags look like --name=value; see --help')
        main()
    except SparkError as e:
        _say(e, e.exit_code)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
        # While flags are parsed these are the user's mistakes; later on they are ours and keep their traceback.
        if flags.FLAGS.is_parsed():
            raise
        _say(e, ConfigError.exit_code)


def _say(error, code):
    print(' '.join(f'{type(error).__name__}: {error}'.split()), file=sys.stderr, flush=True)
    sys.exit(code)
