"""Storage, on disks and in buckets: what passes, what is damage, what is a mistake; trying again; directories for TensorStore."""

import enum
import errno
import json
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

from etils import epath

from spark.errors import ConfigError, DamagedError, SparkError, UnreadableError, out_of_memory, root_cause
from spark.progress import tqdm
from spark.runtime import absolute, in_bucket

T = TypeVar('T')
PAUSES = (1, 4, 16, 60)  # seconds before another attempt
LOOK_AGAIN = 5  # seconds before damage is believed
PASSING = (
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EPIPE,
)  # fmt: skip
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# TensorStore raises a ValueError for everything. It begins with the name of a status, but for one.
DAMAGED = ('NOT_FOUND', 'DATA_LOSS', 'FAILED_PRECONDITION', 'OUT_OF_RANGE', 'UNIMPLEMENTED')
REFUSED = ('PERMISSION_DENIED', 'UNAUTHENTICATED', 'ALREADY_EXISTS')
DECODING = (json.JSONDecodeError, UnicodeDecodeError, EOFError)


class Verdict(enum.Enum):
    """What an exception says about storage."""

    PASSES = enum.auto()  # storage does not answer: it may do so later, and nothing is known of what is stored
    DAMAGE = enum.auto()  # what is stored is missing, or cannot be decoded
    MISTAKE = enum.auto()  # a user must mend it: a wrong path, a missing right, a full disk
    PROGRAM = enum.auto()  # what Python raises where code is wrong
    UNKNOWN = enum.auto()  # clients of buckets raise exceptions of their own, and so do decoders


def verdict(error: BaseException) -> Verdict:
    """What an exception, or its innermost cause, says: one of a filesystem, a bucket's client, TensorStore or a decoder."""
    error = _innermost(error)
    text = str(error)
    if code := _http_code(error, text):
        passes = code >= 500 or code in (408, 429)
        return Verdict.PASSES if passes else Verdict.DAMAGE if code in (404, 416) else Verdict.MISTAKE
    if number := _os_code(error, text):
        passes, missing = number in PASSING, number in MISSING
        return Verdict.PASSES if passes else Verdict.DAMAGE if missing else Verdict.MISTAKE
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, *DECODING)):
        return Verdict.DAMAGE
    # gcsfs says so for 403, 412 and 400.
    if isinstance(error, (PermissionError, FileExistsError)) or text.startswith(('Forbidden', 'Bad Request')):
        return Verdict.MISTAKE
    if isinstance(error, ValueError) and (status := re.match('[A-Z_]{5,}(?=: )', text)):
        damaged, refused = status[0] in DAMAGED, status[0] in REFUSED
        return Verdict.DAMAGE if damaged else Verdict.MISTAKE if refused else Verdict.PASSES
    if isinstance(error, ValueError) and 'tensorstore_spec=' in text:
        return Verdict.DAMAGE
    program = ValueError, LookupError, TypeError, AttributeError, AssertionError, NotImplementedError, SparkError
    return Verdict.PROGRAM if isinstance(error, program) else Verdict.UNKNOWN


def _innermost(error):
    """What an error was made of, also if a SparkError hides it."""
    while deeper := error.__cause__ or (error.__context__ if isinstance(error, SparkError) else None):
        error = deeper
    return error


def _http_code(error, text):
    """What a server answered, as gcsfs and TensorStore tell it; None if that is not known."""
    code = getattr(error, 'code', None)
    if isinstance(code, int | str) and str(code).isdecimal():
        return int(code)
    return int(found[1]) if (found := re.search(r'\[HTTP code (\d+)\]', text)) else None


def _os_code(error, text):
    """The errno of an operating system's error. Python's clients put other numbers there, and TensorStore has it in its text."""
    if isinstance(error, OSError) and type(error).__module__ == 'builtins':
        return error.errno
    return int(found[1]) if (found := re.search(r"\[os_error_code='(\d+)'\]", text)) else None


def checked(act: Callable[[], T], what: str, mistake: type[SparkError] = ConfigError,
            damaged: Callable[[str], SparkError] | None = None) -> T:  # fmt: skip
    """The result of `act`, which reads or writes files; its exceptions become errors that begin with `what`.

    An UnreadableError if storage does not answer, or fails in an unknown way. What `damaged` makes of a message for damage, or a
    `mistake` if there is no `damaged`; a `mistake` for the rest. A ConfigError blames no user for errors of the program: they
    stay as they are. So do SparkErrors for other reasons than storage.
    """
    try:
        return act()
    except Exception as e:
        cause, found = _innermost(e), verdict(e)
        passes = found in (Verdict.PASSES, Verdict.UNKNOWN)
        if isinstance(e, UnreadableError) or (isinstance(e, SparkError) and not passes):
            raise
        message = f'{what}: {_said(e)}'
        if passes and out_of_memory(cause):
            raise ConfigError(f'{message}: out of memory; nothing was changed; raise mesh.fsdp or use more devices') from None
        if passes:
            raise UnreadableError(message) from None
        if found is Verdict.DAMAGE and damaged:
            raise damaged(message) from None
        if found is Verdict.PROGRAM and mistake is ConfigError and not isinstance(cause, ValueError | LookupError):
            raise
        raise mistake(message) from None


def _said(error):
    """'Permission denied', or 'Type: message' of an error's innermost cause."""
    return getattr(error, 'strerror', None) or root_cause(error)


def insistently(act: Callable[[], T]) -> T:
    """The result of `act`, called again after a pause: where storage fails, and once where it finds damage.

    So a DamagedError that it raises has been seen twice. An UnreadableError is raised after the last of PAUSES.
    """
    pauses, damaged = iter(PAUSES), False
    while True:
        try:
            return act()
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


def accessed(act: Callable[[], T], what: str, mistake: type[SparkError] = ConfigError,
             damaged: Callable[[str], SparkError] | None = None) -> T:  # fmt: skip
    """`checked`, `insistently`: `act` may be called again."""
    return insistently(lambda: checked(act, what, mistake, damaged))


def kvstore(path: epath.PathLike) -> str | dict[str, str]:
    """A directory for TensorStore. $AWS_ENDPOINT_URL, another server than Amazon's, holds for s3:// as in other clients."""
    path = str(absolute(epath.Path(path)))
    if path.startswith('s3://') and (endpoint := os.environ.get('AWS_ENDPOINT_URL')):
        bucket, _, key = path.removeprefix('s3://').partition('/')
        region = os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION') or 'us-east-1'
        return {'driver': 's3', 'bucket': bucket, 'path': f'{key}/', 'endpoint': endpoint, 'aws_region': region}
    return f'{path}/' if in_bucket(path) else f'file://{path}/'
