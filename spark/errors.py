"""What can go wrong for a user, each with its exit code; and the wrapper that turns it into one line."""

import logging
import os
import re
import sys

from absl import flags


class SparkError(Exception):
    """A failure that is told to the user in one line and ends the process with `exit_code`."""

    exit_code = 1
    at_once = False  # whatever other threads are in the midst of, as XLA may be of compiling


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


class DamagedError(CheckpointError):
    """A checkpoint that does not read as it was saved."""


class StalledError(SparkError):
    """Nothing moved for too long; see training/watchdog.py."""

    exit_code = 124


class Preempted(SparkError):
    """The process was asked to stop; its state is saved and the same command goes on from there."""

    exit_code = 75


def run(main, check=None):
    """Parses absl flags, calls `main()` and exits: 0, or the error's code after one line on stderr.

    `check(argv)` may raise a ConfigError before the flags are parsed, where it has better words than their parser.
    """
    _one_line_each()
    try:
        if {'-h', '--help'} & set(sys.argv[1:]):
            print(sys.modules['__main__'].__doc__.strip(), flags.FLAGS.main_module_help(), sep='\n')
        else:
            if check:
                check(sys.argv[1:])
            _parse_flags()
            main()
        sys.stdout.flush()
    except SparkError as e:
        if e.at_once:
            leave(e)
        _say(e)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print('Interrupted', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read what is printed has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _one_line_each():
    """What libraries say of an exception loses its traceback: the error that follows from it is told by `run`."""

    def without_traceback(record):
        record.exc_info = None
        return True

    logging.getLogger('absl').addFilter(without_traceback)
    # Said of every other array that was being written or read when one failed, some of it only if the collector comes by.
    logging.getLogger('asyncio').addFilter(lambda record: 'exception was never retrieved' not in record.getMessage())
    before, known = sys.unraisablehook, ('Event loop is closed', 'Encountered error while reading array index')
    sys.unraisablehook = lambda told: None if str(told.exc_value).startswith(known) else before(told)


def _parse_flags():
    try:
        rest = flags.FLAGS(sys.argv)
    except (Exception, SystemExit) as e:  # whatever a config file or a flag raises while it is read, the user can mend
        raise ConfigError(_about(e)) from e
    if len(rest) > 1:
        raise ConfigError(f'unexpected argument {rest[1]!r}: flags look like --name=value; see --help')


def _about(error):
    said = str(error) if isinstance(error, flags.Error | SparkError) else f'--config: {type(error).__name__}: {error}'
    # A config file that raises is told with a traceback as part of the message: its last place and last line say it.
    head, traceback, frames = said.partition('Traceback (most recent call last)')
    places = re.findall(r'File "(.+)", line (\d+)', frames)
    return f'{head}{":".join(places[-1])}: {frames.strip().splitlines()[-1]}' if places else head + traceback + frames


def leave(error):
    """Says a SparkError and ends the process without waiting for other threads, or for other processes of a job."""
    print(file=sys.stderr)  # a progress bar may still be there
    _say(error)
    sys.stdout.flush()
    os._exit(error.exit_code)


def _say(error):
    print(' '.join(f'{type(error).__name__}: {error}'.split()), file=sys.stderr, flush=True)


def root_cause(error):
    """What an error began with: libraries wrap it in pages."""
    while error._root_cause__:
        error = error._root_cause__
    said = f'{type(error).__name__}: {error}'.strip(': ')
    return said if len(said) < 600 else f'{said[:600]} …'
