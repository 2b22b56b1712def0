"""Reading from storage: what is damage, what is only a bad moment, and trying again."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from spark.errors import CheckpointError, ConfigError, DamagedError, SparkError, root_cause
from spark.progress import tqdm

T = TypeVar('T')
PAUSES = (1, 4, 16, 60)  # seconds before another attempt
# What decoders raise. TensorStore raises a ValueError for everything, which begins with the name of a status.
DECODING = (ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, NotImplementedError)
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
DAMAGE = ('NOT_FOUND', 'DATA_LOSS', 'FAILED_PRECONDITION', 'OUT_OF_RANGE', 'INVALID_ARGUMENT', 'UNIMPLEMENTED')


class UnreadableError(CheckpointError):
    """Storage that does not answer, or refuses. It says nothing about what is stored."""


# What reading raises, in the order of precedence: if one process of a job finds damage and storage fails another, all try again.
KINDS = (DamagedError, UnreadableError, CheckpointError, ConfigError)


def checked(read: Callable[[], T], what: str) -> T:
    """The result of `read`, whose exceptions become errors that name `what` was read.

    A DamagedError for what is missing or cannot be decoded, a ConfigError if memory is short, an UnreadableError for the rest.
    """
    try:
        return read()
    except SparkError:
        raise
    except Exception as e:
        cause = e
        while cause.__cause__:
            cause = cause.__cause__
        status, _, message = str(cause).partition(': ')
        if isinstance(cause, MemoryError) or ('RESOURCE_EXHAUSTED' in str(cause) and 'memory' in message.lower()):
            advice = 'the checkpoint is as it was; raise mesh.fsdp or use more devices'
            raise ConfigError(f'{what}: out of memory while it is read: {root_cause(e)}; {advice}') from e
        damage = status in DAMAGE or not re.fullmatch('[A-Z_]+', status)
        if isinstance(cause, MISSING) or (isinstance(cause, DECODING) and damage):
            raise DamagedError(f'{what}: cannot be restored: {root_cause(e)}') from e
        raise UnreadableError(f'{what}: cannot be read: {root_cause(e)}') from e


def together(read: Callable[[], T], what: str) -> T:
    """`checked`, in all processes of a job: if it fails in one, all raise an error of the same kind."""
    result, error = None, None
    try:
        result = checked(read, what)
    except KINDS as e:
        error = e
    kind = 1 + next(i for i, kind in enumerate(KINDS) if isinstance(error, kind)) if error else 0
    worst = kind
    if jax.process_count() > 1:
        worst = int(multihost_utils.process_allgather(np.int32(kind)).max())
    if worst > kind:
        raise KINDS[worst - 1](f'{what}: cannot be read in another process')
    if error:
        raise error
    return result


def insistently(read: Callable[[], T]) -> T:
    """The result of `read`, called again after a pause where storage fails, and once more where it finds damage.

    So a DamagedError that it raises has been seen twice. An UnreadableError is raised after the last of PAUSES.
    """
    pauses, damaged = iter(PAUSES), False
    while True:
        try:
            return read()
        except DamagedError:
            if damaged:
                raise
            damaged = True
        except UnreadableError as e:
            if (pause := next(pauses, None)) is None:
                raise UnreadableError(f'{e}; tried {len(PAUSES) + 1} times; no damage was seen, nothing was changed') from e
            tqdm.write(f'Warning: {e}; trying again in {pause} s')
            time.sleep(pause)
