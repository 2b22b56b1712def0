"""A flaky read is not damage: what fails for a while is tried again, and nothing is moved unless damage was seen twice."""


import http.server
import itertools
import socket
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from spark import storage
from spark.checkpoints import reading
from spark.checkpoints.manager import DAMAGED_DIR, Checkpoints
from spark.checkpoints.reading import by_first_process
from spark.errors import CheckpointError, ConfigError, DamagedCheckpointError, DataError, SparkError, UnreadableError
from spark.storage import accessed, checked, insistently
from tests.checkpoints.test_manager import abstract, assert_same, copy, restore, saved, tree  # noqa: F401

RESTORE = ocp.PyTreeCheckpointHandler.restore
OUT_OF_MEMORY = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.')


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were waited, which nobody waits."""
    waited = []
    monkeypatch.setattr(storage.time, 'sleep', waited.append)
    monkeypatch.setattr(storage, 'LOOK_AGAIN', 5)
    return waited


def fail(monkeypatch, error, times):
    """Makes so many first reads of a state fail."""
    reads = itertools.count(1)

    def flaky(*args, **kwargs):
        if next(reads) <= times:
            raise error
        return RESTORE(*args, **kwargs)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, 'restore', flaky)


ONCE = OSError('503'), ValueError('UNAVAILABLE: 503'), ValueError('DATA_LOSS: one bad packet')


@pytest.mark.parametrize('error', ONCE, ids=str)
def test_what_fails_once_costs_nothing(copy, monkeypatch, pauses, capfd, error):  # noqa: F811
    fail(monkeypatch, error, 1)
    step, state, _ = restore(copy)
    assert step == 2 and not (copy / DAMAGED_DIR).exists()
    assert_same(state, tree(2))
    said = capfd.readouterr()
    if '503' in str(error):
        assert 'trying again in 1 s' in said.out + said.err and pauses == [1]
    else:
        assert 'reading it once more in 5 s' in said.out + said.err and pauses == [5]


def test_a_failure_that_stays_moves_nothing(copy, monkeypatch, pauses):  # noqa: F811
    fail(monkeypatch, OSError('503'), 99)
    with pytest.raises(UnreadableError, match=r'2: cannot be read: OSError: 503; tried 5 times; no damage was seen') as e:
        restore(copy)
    assert e.value.exit_code == 124 and pauses == list(storage.PAUSES)
    assert sorted(p.name for p in (copy / 'checkpoints').iterdir()) == ['1', '2'] and not (copy / DAMAGED_DIR).exists()


@pytest.mark.parametrize('error', [OUT_OF_MEMORY, MemoryError()], ids=lambda e: type(e).__name__)
def test_out_of_memory_is_told_as_such(copy, monkeypatch, pauses, error):  # noqa: F811
    fail(monkeypatch, error, 99)
    with pytest.raises(ConfigError, match=r'checkpoints/2: cannot be read: .*: out of memory; nothing was changed'):
        restore(copy)
    assert not pauses and not (copy / DAMAGED_DIR).exists()


def test_a_piece_that_cannot_be_read_at_once(copy, monkeypatch, pauses):  # noqa: F811
    array = Checkpoints(copy / 'checkpoints').stored(2, abstract(tree()['params']))['w']
    store, fails = array._store, [ValueError('ABORTED: All 32 retry attempts failed: 503')] * 2

    class Flaky:
        def __getitem__(self, block):
            return self

        def read(self):
            return self

        def result(self):
            if fails:
                raise fails.pop()
            return store[:].read().result()

    array._store = Flaky()
    assert_same(array[:], tree(2)['params']['w'])
    assert pauses == [1, 4]


class Handler(http.server.BaseHTTPRequestHandler):
    code = 200

    def do_GET(self):
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(('code', 'kind'), [(404, DamagedCheckpointError), (400, CheckpointError), (403, CheckpointError),
                                            (429, UnreadableError), (500, UnreadableError), (503, UnreadableError)])  # fmt: skip
def test_what_a_bucket_answers(code, kind):
    """As TensorStore tells it, which raises a ValueError for everything: only what is not there is damage."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('', (Handler,), {'code': code}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    retries = {'max_retries': 1, 'initial_delay': '1ms', 'max_delay': '1ms'}
    spec = {'driver': 'zarr', 'kvstore': f'http://127.0.0.1:{server.server_port}/', 'context': {'http_request_retries': retries}}
    with pytest.raises(SparkError, match='x: ValueError: ') as e:
        checked(lambda: ts.open(spec).result(), 'x', CheckpointError, DamagedCheckpointError)
    assert type(e.value) is kind
    server.shutdown()
    server.server_close()


def test_damage_is_seen_twice(pauses):
    """Also when storage fails in between."""
    errors = [DamagedCheckpointError('a'), UnreadableError('b'), DamagedCheckpointError('c')]

    def read():
        raise errors.pop(0)

    with pytest.raises(DamagedCheckpointError, match='c'):
        insistently(read)
    assert not errors and pauses == [storage.LOOK_AGAIN, 1]


@pytest.mark.parametrize('error', [
    TypeError('argument'), AttributeError('no such'), NotImplementedError(), ValueError('sharding is not divisible'),
    KeyError('params'), ValueError('I/O operation on closed file'), ValueError('Bad Request: b/x'), PermissionError(13, 'no'),
], ids=repr)  # fmt: skip
def test_what_is_no_damage_ends_a_run_at_once(copy, monkeypatch, pauses, error):  # noqa: F811
    """An error of the program would come twice, too; and nothing passes that a user must mend."""
    fail(monkeypatch, error, 99)
    with pytest.raises(CheckpointError, match=f'2: cannot be read: .*{error.args[-1] if error.args else ""}') as e:
        restore(copy)
    assert type(e.value) is CheckpointError and not pauses and not (copy / DAMAGED_DIR).exists()


@pytest.mark.parametrize(('error', 'passes'), [
    (OSError(5, 'Input/output error'), True), (OSError('503'), True), (ValueError('UNAVAILABLE: 503'), True),
    (socket.gaierror(-3, 'Temporary failure in name resolution'), True), (TimeoutError(), True),
    (ValueError("FAILED_PRECONDITION: Transport endpoint is not connected [os_error_code='107']"), True),
    (RuntimeError('the client gave up'), True), (OSError(28, 'No space left on device'), False),
    (PermissionError(13, 'no'), False), (OSError('Forbidden: b/run'), False), (FileNotFoundError('b'), False),
    (ValueError('no JSON'), False),
], ids=repr)  # fmt: skip
def test_what_a_start_tries_again(pauses, error, passes):
    """Storage that fails for long ends a job so that it starts again; what a user must mend ends it."""

    def wrapped():
        try:
            raise error
        except Exception as e:
            raise ConfigError('config.json: cannot be written') from None if passes else e

    for act in (lambda: (_ for _ in ()).throw(error), wrapped):
        pauses.clear()
        with pytest.raises(UnreadableError if passes else ConfigError) as e:
            accessed(act, '--workdir=x')
        assert e.value.exit_code == (124 if passes else 2) and pauses == list(storage.PAUSES) * passes


@pytest.mark.parametrize('error', [
    DamagedCheckpointError('a'), ConfigError(''), DataError('\N{BRAIN}' * 9000), OSError(13, 'no'), TypeError(),
], ids=lambda e: type(e).__name__)  # fmt: skip
def test_all_processes_end_as_the_first(monkeypatch, error):
    """With its error, also one without words, or with many; or they have its result."""
    sent = []
    monkeypatch.setattr(reading.jax, 'process_count', lambda: 2)

    def broadcast(x):
        if index:
            assert np.shape(sent[0]) == np.shape(x)  # else JAX refuses it
            return sent.pop(0)
        sent.append(x)
        return x

    monkeypatch.setattr(reading.multihost_utils, 'broadcast_one_to_all', broadcast)
    monkeypatch.setattr(reading.jax, 'process_index', lambda: index)
    monkeypatch.setattr(storage.time, 'sleep', lambda s: None)
    for act in (lambda: (_ for _ in ()).throw(error), lambda: ['\N{BRAIN}' * 9000, 3]):
        said = []
        for index in (0, 1):
            try:
                said.append(by_first_process(act if not index else pytest.fail, 'x'))
            except Exception as e:
                said.append((type(e) if isinstance(e, SparkError) else SparkError, str(e)))
        assert said[0] == said[1]
    assert said[0][1] == 3
