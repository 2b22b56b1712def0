"""Reading and writing in a job of several processes, which agree on the outcome."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from spark.errors import CheckpointError, ConfigError, DamagedCheckpointError, DataError, SparkError, UnreadableError
from spark.storage import accessed, checked

T = TypeVar('T')
# In the order of precedence: if one process of a job finds damage and storage fails another, all try again.
KINDS = (DamagedCheckpointError, UnreadableError, CheckpointError, DataError, ConfigError, SparkError)
BLOCK = 8192  # bytes: what is broadcast is a multiple of it, so that hardly more than one program is compiled


def together(act: Callable[[], T], what: str, *kinds: Any) -> T:
    """`storage.checked`, in all processes of a job: if it fails in one, all raise an error of the same kind."""
    return agreed(lambda: checked(act, what, *kinds), what)


def agreed(act: Callable[[], T], what: str) -> T:
    """The result of `act`, which judges its exceptions itself: if it fails in one process, all raise an error of that kind."""
    result, error = None, None
    try:
        result = act()
    except Exception as e:
        error = e
    worst = kind = _kind(error)
    if jax.process_count() > 1:
        worst = int(multihost_utils.process_allgather(np.int32(kind)).max())
    try:
        if worst > kind:
            raise KINDS[worst - 1](f'{what} in another process')
        if error:
            raise error
        return result
    finally:
        del error  # whose traceback refers to this frame: without the cycle, what was read is freed with it


def by_first_process(act: Callable[[], T], what: str) -> T:
    """`storage.accessed`, in the first process of a job, for which the others wait: all return its result, which is of JSON.

    If it raises, all raise an error of the same kind, with its message.
    """
    if jax.process_count() == 1:
        return accessed(act, what)
    error, text = None, b''
    if jax.process_index() == 0:
        try:
            told = json.dumps((0, accessed(act, what)))
        except Exception as e:
            error, told = e, json.dumps((_kind(e), str(e)))
        text = told.encode()
    size = BLOCK * int(multihost_utils.broadcast_one_to_all(np.int32(-(-len(text) // BLOCK))))
    answer = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(size), np.uint8))
    kind, result = json.loads(np.asarray(answer).tobytes())
    if kind:
        raise error or KINDS[kind - 1](result)
    return result


def _kind(error):
    """1 + the index in KINDS; 0 for None."""
    known = (i for i, kind in enumerate(KINDS, 1) if isinstance(error, kind))
    return next(known, len(KINDS)) if error else 0
