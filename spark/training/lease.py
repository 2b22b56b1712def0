"""One job at a time on a run directory: a lease that the job renews in the background, and loses when it has died.

WORKDIR/lease says which process has it. Nobody's clock is compared with another's: a lease has expired when somebody has watched
it for LOST_AFTER seconds and it was not renewed. Nobody needs to watch one whose process is known to be dead.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import tensorstore as ts
from etils import epath

from spark.errors import ConfigError, exit_now
from spark.storage import accessed, kvstore

NAME = 'lease'
PROC = pathlib.Path('/proc')
RENEWED_EVERY, LOST_AFTER = 10.0, 60.0  # seconds


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
    """Inside, this process has the run directory to itself. Raises a ConfigError that names the process which has it.

    If another process takes the lease, since this one stood still for long, or if a user has removed it for one, this process
    ends with that error.
    """
    me = {'id': uuid.uuid4().hex, 'host': socket.gethostname(), 'pid': os.getpid(), 'since': time.time(), **_process(os.getpid())}
    what = f'--workdir={workdir}'
    lease = _Lease(workdir, accessed(lambda: ts.KvStore.open(kvstore(workdir)).result(), what), me)
    accessed(lease.take, what)
    ended = threading.Event()
    renewal = threading.Thread(target=lease.renew, args=(ended,), daemon=True, name='lease')
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join(RENEWED_EVERY)
        if not renewal.is_alive():  # else the storage does not answer, and the lease expires
            lease.release()


class _Lease:
    """The file of a lease. It is only ever replaced in the generation in which it was read."""

    def __init__(self, workdir: epath.Path, store: ts.KvStore, me: dict[str, Any]):
        self._workdir, self._store, self._me, self._generation = workdir, store, me, None

    def take(self) -> None:
        """Takes the lease, once no other process has it. Raises a ConfigError if one does."""
        watched, since = None, time.monotonic()
        while True:
            other, generation = self._read()
            expired = generation == watched and time.monotonic() - since > LOST_AFTER
            if other.get('id') == self._me['id']:  # the write succeeded, but its answer was lost
                self._generation = generation
                return
            alive = _is_alive(other) if other else False
            if alive is False or expired:
                if self._write(generation):
                    return
                continue  # another process was faster
            if alive or (watched and generation != watched):
                raise ConfigError(f'--workdir={self._workdir}: {_name(other)} uses it; stop that one, or choose another')
            if not watched:
                watched, since = generation, time.monotonic()
                print(f'{_name(other)} had {self._workdir}; waiting up to {LOST_AFTER:.0f} s for a sign of life', flush=True)
            time.sleep(1)

    def renew(self, ended: threading.Event) -> None:
        """Renews the lease until `ended` is set; ends the process if that is no longer possible."""
        while not ended.wait(RENEWED_EVERY):
            with contextlib.suppress(Exception):  # the storage may answer next time
                if self._write(self._generation):
                    continue
                other, generation = self._read()
                if other.get('id') == self._me['id']:
                    self._generation = generation
                elif other:
                    exit_now(ConfigError(f'--workdir={self._workdir}: {_name(other)} took it while this one stood still'))
                elif (self._workdir / 'config.json').exists():  # else the next save says that the directory has vanished
                    exit_now(ConfigError(f'--workdir={self._workdir}: its lease was removed, so that another process takes it'))

    def release(self) -> None:
        """Gives the lease back, if this process has it."""
        with contextlib.suppress(Exception):
            self._store.write(NAME, None, if_equal=self._generation).result(timeout=RENEWED_EVERY)

    def _read(self):
        """(who has the lease, the generation of the file)."""
        found = self._store.read(NAME).result()
        try:
            who = json.loads(found.value) if found.state == 'value' else {}
        except ValueError:
            who = {}
        return who if isinstance(who, dict) else {}, found.stamp.generation

    def _write(self, generation):
        """Writes the lease anew, unless the file is no longer in this generation; whether that was done."""
        text = json.dumps({**self._me, 'renewed': time.time()})
        if written := self._store.write(NAME, text, if_equal=generation).result(timeout=LOST_AFTER).generation:
            self._generation = written
        return bool(written)


def _process(pid):
    """What tells a process of this machine from all others, as far as the system says; its job in SLURM, and the life of that."""
    found = {'slurm': [os.environ[name] for name in ('SLURM_CLUSTER_NAME', 'SLURM_JOB_ID') if name in os.environ]}
    found['life'] = os.environ.get('SLURM_RESTART_COUNT', '0')
    with contextlib.suppress(OSError):
        found['machine'] = [(PROC / 'sys/kernel/random/boot_id').read_text().strip(), os.readlink(PROC / 'self/ns/pid')]
        found['started'] = _started(pid)
    return found


def _started(pid):
    """When a process of this machine started; None if there is none, or it is a zombie."""
    try:
        state, *fields = (PROC / str(pid) / 'stat').read_text().rpartition(')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in 'ZX' else fields[18]


def _is_alive(other):
    """Is another process alive? None if that cannot be told from here."""
    here = _process(os.getpid())
    if here.get('machine') and here['machine'] == other.get('machine'):
        started = _started(other.get('pid'))
        if started is None and not (PROC / '1').exists():  # hidepid=2: other users' processes are not shown
            return None
        return started == other.get('started')
    # SLURM starts a job again when all its processes have ended.
    if len(here['slurm']) == 2 and here['slurm'] == other.get('slurm') and here['life'] != other.get('life'):
        return False
    return None


def _name(other):
    """'process 12 on host a, for 3 min'."""
    age = time.time() - other.get('since', time.time())
    age = f'{age:.0f} s' if age < 120 else f'{age / 60:.0f} min' if age < 7200 else f'{age / 3600:.0f} h'
    return f'process {other.get("pid")} on host {other.get("host")}, started {age} ago,'
