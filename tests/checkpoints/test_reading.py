"""A flaky read is not damage: what fails for a while is tried again, and nothing is moved unless damage was seen twice."""

import http.server
import itertools
import threading

import jax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from spark.checkpoints import reading
from spark.checkpoints.manager import DAMAGED_DIR, Checkpoints
from spark.checkpoints.reading import UnreadableError, checked, insistently
from spark.errors import CheckpointError, ConfigError, DamagedError
from tests.checkpoints.test_manager import abstract, assert_same, copy, restore, saved, tree  # noqa: F401

RESTORE = ocp.PyTreeCheckpointHandler.restore
OUT_OF_MEMORY = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.')


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were waited, which nobody waits."""
    waited = []
    monkeypatch.setattr(reading.time, 'sleep', waited.append)
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
    assert ('trying again in 1 s' in said.out + said.err) == bool(pauses) == ('503' in str(error))


def test_a_failure_that_stays_moves_nothing(copy, monkeypatch, pauses):  # noqa: F811
    fail(monkeypatch, OSError('503'), 99)
    with pytest.raises(CheckpointError, match=r'2: cannot be read: OSError: 503; tried 5 times; no damage was seen') as e:
        restore(copy)
    assert not isinstance(e.value, DamagedError) and pauses == list(reading.PAUSES)
    assert sorted(p.name for p in (copy / 'checkpoints').iterdir()) == ['1', '2'] and not (copy / DAMAGED_DIR).exists()


@pytest.mark.parametrize('error', [OUT_OF_MEMORY, MemoryError()], ids=lambda e: type(e).__name__)
def test_out_of_memory_is_told_as_such(copy, monkeypatch, pauses, error):  # noqa: F811
    fail(monkeypatch, error, 99)
    with pytest.raises(ConfigError, match=r'checkpoints/2: out of memory while it is read: .*the checkpoint is as it was'):
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


@pytest.mark.parametrize('code', [404, 403, 429, 500, 503])
def test_what_a_bucket_answers(code):
    """As TensorStore tells it, which raises a ValueError for everything: only what is not there is damage."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('', (Handler,), {'code': code}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    retries = {'max_retries': 1, 'initial_delay': '1ms', 'max_delay': '1ms'}
    spec = {'driver': 'zarr', 'kvstore': f'http://127.0.0.1:{server.server_port}/', 'context': {'http_request_retries': retries}}
    with pytest.raises(DamagedError if code == 404 else UnreadableError, match='x: cannot be'):
        checked(lambda: ts.open(spec).result(), 'x')
    server.shutdown()
    server.server_close()


def test_damage_is_seen_twice(pauses):
    """Also when storage fails in between."""
    errors = [DamagedError('a'), UnreadableError('b'), DamagedError('c')]

    def read():
        raise errors.pop(0)

    with pytest.raises(DamagedError, match='c'):
        insistently(read)
    assert not errors and pauses == [1]
