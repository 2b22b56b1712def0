"""Storage: what is damage, what is only a bad moment, trying again, and agreeing on it in all processes of a job."""

import errno
import json
import re
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from spark.errors import CheckpointError, ConfigError, DamagedError, DataError, SparkError, StalledError, root_cause
from spark.progress import tqdm

T = TypeVar('T')
PAUSES = (1, 4, 16, 60)  # seconds before another attempt
LOOK_AGAIN = 5  # seconds before damage is believed
# What decoders raise. TensorStore raises a ValueError for everything, which begins with the name of a status.
DECODING = (ValueError, LookupError, EOFError)
# What the program raises, such as another version of Orbax than the one that saved.
PROGRAM = (TypeError, AttributeError, AssertionError, NotImplementedError)
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
DAMAGE = ('NOT_FOUND', 'DATA_LOSS', 'FAILED_PRECONDITION', 'OUT_OF_RANGE', 'INVALID_ARGUMENT', 'UNIMPLEMENTED')
REFUSED = (*MISSING, PermissionError, FileExistsError)
PASSING = (
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EPIPE,
)  # fmt: skip


class UnreadableError(CheckpointError):
    """Storage that does not answer, or refuses. It says nothing about what is stored, and a job may start again later."""

    exit_code = StalledError.exit_code
    tried = False  # for long


# In the order of precedence: if one process of a job finds damage and storage fails another, all try again.
KINDS = (DamagedError, UnreadableError, CheckpointError, DataError, ConfigError, SparkError)


def checked(read: Callable[[], T], what: str) -> T:
    """The result of `read`, whose exceptions become errors that name `what` was read.

    A DamagedError for what is missing or cannot be decoded, a ConfigError if memory is short, a CheckpointError for an error of
    the program, an UnreadableError for the rest.
    """
    try:
        return read()
    except SparkError:
        raise
    except Exception as e:
        cause = e
        while cause.__cause__:
            cause = cause.__cause__
        if isinstance(cause, MemoryError) or re.search('RESOURCE_EXHAUSTED.*: .*memory', str(cause), re.IGNORECASE):
            advice = 'the checkpoint is as it was; raise mesh.fsdp or use more devices'
            raise ConfigError(f'{what}: out of memory while it is read: {root_cause(e)}; {advice}') from e
        if isinstance(cause, MISSING) or (isinstance(cause, DECODING) and _status(cause) in ('', *DAMAGE)):
            raise DamagedError(f'{what}: cannot be restored: {root_cause(e)}') from e
        if isinstance(cause, PROGRAM):
            advice = 'it is as it was; do these versions of packages know it?'
            raise CheckpointError(f'{what}: cannot be restored: {root_cause(e)}; {advice}') from e
        raise UnreadableError(f'{what}: cannot be read: {root_cause(e)}') from e


def accessed(act: Callable[[], T], what: str) -> T:
    """The result of `act`, which reads or writes files and may do so again; it is called `insistently`.

    An UnreadableError if storage fails for long, and a ConfigError for what a user must mend: a wrong path, a missing right, a
    full disk. Both name `what`. SparkErrors for other reasons, and errors of the program, stay as they are.
    """

    def attempt():
        try:
            return act()
        except Exception as e:
            cause = e
            while cause.__cause__ or cause.__context__:
                cause = cause.__cause__ or cause.__context__
            if isinstance(e, (UnreadableError, *PROGRAM)) or (isinstance(e, SparkError) and not _may_pass(cause)):
                raise
            kind = UnreadableError if _may_pass(cause) else ConfigError
            raise kind(f'{what}: {getattr(e, "strerror", None) or root_cause(e)}') from None

    return insistently(attempt)


def _may_pass(error):
    """Whether it is worth trying again after an error of a filesystem or of a bucket's client."""
    if isinstance(error, (SparkError, *PROGRAM, *REFUSED)):
        return False
    if isinstance(error, DECODING):
        return _status(error) not in ('', *DAMAGE, 'PERMISSION_DENIED', 'UNAUTHENTICATED')
    if isinstance(error, OSError) and error.errno:
        return error.errno in PASSING
    code = getattr(error, 'code', None)  # of gcsfs, which raises an OSError('Forbidden…') for 403
    refused = isinstance(code, int) and 400 <= code < 500 and code not in (408, 429)
    return not refused and not str(error).startswith('Forbidden')


def _status(error):
    """The name of TensorStore's status, or ''."""
    name = str(error).partition(': ')[0]
    return name if re.fullmatch('[A-Z_]+', name) else ''


def together(read: Callable[[], T], what: str) -> T:
    """`checked`, in all processes of a job: if it fails in one, all raise an error of the same kind."""
    result, error = None, None
    try:
        result = checked(read, what)
    except SparkError as e:
        error = e
    worst = kind = _kind(error)
    if jax.process_count() > 1:
        worst = int(multihost_utils.process_allgather(np.int32(kind)).max())
    if worst > kind:
        raise KINDS[worst - 1](f'{what}: cannot be read in another process')
    if error:
        raise error
    return result


def by_first_process(act: Callable[[], T], what: str) -> T:
    """`accessed`, in the first process of a job, for which the others wait: all return its result, which is small and of JSON.

    If it raises, all raise an error of the same kind, with its message.
    """
    if jax.process_count() == 1:
        return accessed(act, what)
    error, answer = None, np.zeros(8192, np.uint8)
    if jax.process_index() == 0:
        try:
            told = 0, accessed(act, what)
        except Exception as e:
            error, told = e, (_kind(e), str(e)[:1000])
        text = np.frombuffer(json.dumps(told).encode(), np.uint8)
        answer[: text.size] = text
    kind, result = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(answer)).tobytes().rstrip(b'\0'))
    if kind:
        raise error or KINDS[kind - 1](result)
    return result


def _kind(error):
    """1 + the index in KINDS; 0 for None."""
    known = (i for i, kind in enumerate(KINDS, 1) if isinstance(error, kind))
    return next(known, len(KINDS)) if error else 0


def insistently(read: Callable[[], T]) -> T:
    """The result of `read`, called again after a pause: where storage fails, and once where it finds damage.

    So a DamagedError that it raises has been seen twice. An UnreadableError is raised after the last of PAUSES.
    """
    pauses, damaged = iter(PAUSES), False
    while True:
        try:
            return read()
        except DamagedError as e:
            if damaged:
                raise
            damaged = True
            tqdm.write(f'Warning: {e}; reading it once more in {LOOK_AGAIN} s')
            time.sleep(LOOK_AGAIN)  # what a cache or a replica gave may be gone then
        except UnreadableError as e:
            if e.tried:
                raise
            if (pause := next(pauses, None)) is None:
                last = UnreadableError(f'{e}; tried {len(PAUSES) + 1} times; no damage was seen, nothing was changed')
                last.tried = True
                raise last from e
            tqdm.write(f'Warning: {e}; trying again in {pause} s')
            time.sleep(pause)
