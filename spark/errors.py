"""What can go wrong for a user, each with its exit code; and `run`, which turns an error into one line and that code."""

import collections
import contextlib
import glob
import logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import flags

# What XLA's collectives and JAX's coordination say when another process is gone.
PEER_LOST = r'^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b|gloo|nccl|connection (closed|reset|refused)|by peer|heartbeat'

# Set where a library does not answer, whose hooks might hold up the end of the process without limit.
leave_at_once = False


class SparkError(Exception):
    """A failure that is reported to the user in one line; the process then ends with `exit_code`."""

    exit_code = 1


class ConfigError(SparkError):
    """A wrong config field, flag or combination."""

    exit_code = 2


class NotFiniteError(SparkError):
    """The loss or the gradient is NaN or infinite."""

    exit_code = 3


class DataError(SparkError):
    """Data that cannot be read or decoded, or that ends too early."""

    exit_code = 4


class CheckpointError(SparkError):
    """A checkpoint that cannot be used for this run, or cannot be written."""

    exit_code = 5


class DamagedError(SparkError):
    """What is stored is missing or cannot be decoded, or differs from what was written."""


class DamagedCheckpointError(DamagedError, CheckpointError):
    """A checkpoint that is damaged."""


class DamagedStoreError(DamagedError, DataError):
    """A token store that is damaged."""


class StalledError(SparkError):
    """Nothing moved for too long; see training/watchdog.py."""

    exit_code = 124


class UnreadableError(StalledError):
    """Storage that does not answer. It says nothing about what is stored, and a job may start again later."""

    tried = False  # for long


class ProgramError(SparkError):
    """XLA cannot compile or run a program: a fault of a kernel, a compiler or a device."""


class Preempted(SparkError):
    """The process was asked to stop. Its state is saved, and the same command resumes from there."""

    exit_code = 75


class Stopped(SparkError):
    """Training is where train.stop_at ends it, with its state saved: what was asked for, but not a trained model."""

    exit_code = 0


def run(
    main: Callable[..., None], check: Callable[[list[str]], None] | None = None, required: Sequence[flags.FlagHolder] = (),
    arguments: Sequence[str] = (),
) -> NoReturn:  # fmt: skip
    """Parses absl flags, calls `main` and exits: with 0, or with an error's code after one line on stderr.

    `check(argv)` may raise a ConfigError before the flags are parsed, where it can say more than their parser. The `required`
    flags must have a value. `arguments` names what is given without a flag; `main` takes it.
    """
    code = 0
    _silence_libraries()
    try:
        if {'-h', '--help'} & set(sys.argv[1:]):
            print(sys.modules['__main__'].__doc__.strip(), flags.FLAGS.main_module_help(), sep='\n')
        else:
            if check:
                check(sys.argv[1:])
            words = _parse_flags(required, arguments)
            _check_json()
            main(*words)
        sys.stdout.flush()
    except SparkError as e:
        _print_error(e)
        code = e.exit_code
    except KeyboardInterrupt:
        print('Interrupted', file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of stdout has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:  # a fault of the program
        if not leave_at_once:
            raise
        traceback.print_exc()
        code = 1
    if leave_at_once:
        _leave(code)
    sys.exit(code)


def _leave(code):
    """Ends the process without the hooks of libraries, except that of JAX, for which other processes of the job wait."""
    if 'jax' in sys.modules:
        with contextlib.suppress(Exception):
            sys.modules['jax'].distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_json():
    """Raises a ConfigError at once where --json=FILE could not be written in the end."""
    given = lambda name: (name in flags.FLAGS and flags.FLAGS[name].value) or ''
    parent = pathlib.Path(given('json')).expanduser().absolute().parent
    made = [pathlib.Path(given(name)).expanduser().absolute() for name in ('workdir', 'out')]
    if given('json') and '://' not in given('json') and not parent.is_dir() and parent not in made:
        raise ConfigError(f'--json={given("json")}: there is no directory {parent}')


def _silence_libraries():
    """Drops what libraries complain of needlessly: tracebacks for an exception which `run` then reports in one line."""
    quiet_libtpu()
    if _tracebacks():
        return

    def without_traceback(record):
        record.exc_info = None
        return True

    logging.getLogger('absl').addFilter(without_traceback)
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # a traceback for each try; `storage.insistently` writes a line
    # When one array cannot be read or written, asyncio reports all others of the same operation, some only at garbage collection.
    logging.getLogger('asyncio').addFilter(lambda record: 'exception was never retrieved' not in record.getMessage())
    previous, known = sys.unraisablehook, ('Event loop is closed', 'Encountered error while reading array index')
    sys.unraisablehook = lambda args: None if str(args.exc_value).startswith(known) else previous(args)


def quiet_libtpu() -> None:
    """Where there is no TPU, keeps libtpu, installed to compile for one, from looking for it and complaining in six lines."""
    if not any(map(glob.glob, ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*'))):
        os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
        os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-1')  # one that it knows


def _parse_flags(required, arguments):
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow arguments
    _check_given_once(sys.argv[1:])
    try:
        _, *given = flags.FLAGS(sys.argv)
    except (Exception, SystemExit) as e:  # whatever a config file or a flag raises, the user can correct
        raise ConfigError(_flag_error(e)) from e
    if unexpected := given[len(arguments) :]:
        raise ConfigError(f'unexpected argument {unexpected[0]!r}: flags look like --name=value; see --help')
    if len(given) < len(arguments):
        raise ConfigError(f'want {" ".join(arguments)}; see --help')
    if missing := [flag.name for flag in required if not flag.value]:
        raise ConfigError(f'--{missing[0]} is missing; see --help')
    return given


def _check_given_once(argv):
    """Raises a ConfigError for a flag that is given twice, unless it takes several values: the first would be ignored."""
    names = [arg.lstrip('-').partition('=')[0] for arg in argv if arg.startswith('-')]
    names = [name if name in flags.FLAGS else name.removeprefix('no') for name in names]
    for name, times in collections.Counter(names).items():
        known = name in flags.FLAGS
        if times > 1 and (known or name.startswith('config.')) and not (known and isinstance(flags.FLAGS[name], flags.MultiFlag)):
            raise ConfigError(f'--{name} is given {times} times: want it once')


def _flag_error(error):
    message = str(error) if isinstance(error, flags.Error | SparkError) else f'--config: {type(error).__name__}: {error}'
    # If a config file raises, the message contains a traceback: its last place and last line are enough.
    head, traceback, frames = message.partition('Traceback (most recent call last)')
    places = re.findall(r'File "(.+)", line (\d+)', frames)
    return f'{head}{":".join(places[-1])}: {frames.strip().splitlines()[-1]}' if places else head + traceback + frames


@contextlib.contextmanager
def translated_xla_errors() -> Iterator[None]:
    """Turns errors of XLA into errors that tell a user what to do. In a job of several processes they end this one at once."""
    import jax  # not needed to report a wrong flag

    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        message = str(e).splitlines()[0]
        error = ProgramError(f'{root_cause(e)}; SPARK_TRACEBACK=1 shows where')
        if out_of_memory(e):
            error = ConfigError(
                f'out of memory: {message}; to use less memory, raise train.accumulate, train.loss_pieces or mesh.fsdp, or set '
                'model.remat; scripts/compile.py shows how much a config takes'
            )
        elif jax.process_count() > 1 and re.search(PEER_LOST, message, re.IGNORECASE):
            why = 'a collective failed, as when another process has ended'
            error = StalledError(f'{why}: {message}; the last checkpoint is as it was')
        if jax.process_count() == 1:
            raise error from e
        error.__cause__ = e
        exit_now(error)


def out_of_memory(error: BaseException) -> bool:
    """Is memory short, of the machine or of a device? Servers say RESOURCE_EXHAUSTED for other things, too."""
    short = re.search('RESOURCE_EXHAUSTED.*(memory|allocat|hbm)', str(error), re.IGNORECASE | re.DOTALL)
    return isinstance(error, MemoryError) or bool(short)


def exit_now(error: SparkError) -> NoReturn:
    """Reports an error and ends the process at once, without waiting for other threads or for other processes of the job."""
    if sys.stderr.isatty():
        print(file=sys.stderr)  # ends the line of a progress bar
    _print_error(error)
    sys.stdout.flush()
    os._exit(error.exit_code)


def show_traceback(error: BaseException) -> None:
    """Prints where an error came from, with its causes, if SPARK_TRACEBACK=1 asks for it."""
    if not _tracebacks():
        return
    cause = error
    while cause:
        cause.__suppress_context__ = cause.__cause__ is not None
        cause = cause.__cause__ or cause.__context__
    traceback.print_exception(error)


def _tracebacks():
    return os.environ.get('SPARK_TRACEBACK', '') not in ('', '0')


def _print_error(error):
    show_traceback(error)
    print(' '.join(f'{type(error).__name__}: {error}'.split()), file=sys.stderr, flush=True)


def root_cause(error: BaseException) -> str:
    """The innermost cause of an error that libraries have wrapped in others, as 'Type: message', shortened."""
    while error.__cause__:
        error = error.__cause__
    message = f'{type(error).__name__}: {error}'.strip(': ')
    return message if len(message) < 600 else f'{message[:600]} …'
