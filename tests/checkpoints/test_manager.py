"""Checkpoints: what is restored is what was saved, or an error says what is not."""

import gc
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spark.checkpoints import manager
from spark.checkpoints.checksums import checksums
from spark.checkpoints.manager import DAMAGED_DIR, Checkpoints
from spark.errors import CheckpointError, DamagedCheckpointError, UnreadableError
from spark.training.start import open_source

PLACE = {'data': {'rows': 24, 'digest': 'b5'}, 'evaluated': True}


def tree(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {'w': draw(64, 48), 'groups': {'b': draw(7)}}
    return {'step': jnp.asarray(seed, jnp.int32), 'params': params, 'm': [draw(5), draw(64)]}


def abstract(like):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A run directory with the checkpoints 1 and 2."""
    workdir = tmp_path_factory.mktemp('run')
    (workdir / 'config.json').touch()
    checkpoints = Checkpoints(workdir / 'checkpoints')
    for step in (1, 2):
        checkpoints.save(step, tree(step), PLACE | {'step': step})
    checkpoints.close()
    return workdir


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / 'run')
    return tmp_path / 'run'


def restore(workdir, like=None):
    checkpoints = Checkpoints(workdir / 'checkpoints')
    try:
        return checkpoints.restore_newest(abstract(tree() if like is None else like))
    finally:
        checkpoints.close()


def test_the_newest_comes_back(saved):
    step, state, place = restore(saved)
    assert step == 2 and place == PLACE | {'step': 2}
    assert_same(state, tree(2))


def damages(path, places):
    """(name, how) for what can happen to a file of a checkpoint; a bit flips at some places from 0, its first byte, to 1."""
    size = path.stat().st_size

    def flip(at):
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << at % 8
        path.write_bytes(data)

    yield 'deleted', path.unlink
    if size:
        yield 'emptied', lambda: path.write_bytes(b'')
        yield 'cut', lambda: path.write_bytes(path.read_bytes()[: size // 2])
        yield 'grown', lambda: path.write_bytes(path.read_bytes() + b'\0' * 7)
        for at in sorted({min(int(place * size), size - 1) for place in places}):
            yield f'flipped at {at} of {size}', lambda at=at: flip(at)


@pytest.mark.parametrize('places', [(0, 1 / 3, 1), pytest.param((0, 1 / 4, 1 / 2, 3 / 4, 1), marks=pytest.mark.soak)], ids=len)
def test_any_damage_is_found_or_does_no_harm(saved, tmp_path, capfd, places):
    """Every file of the newest checkpoint: the one before is used, or what comes back is what was saved."""
    files = [p.relative_to(saved) for p in (saved / 'checkpoints' / '2').rglob('*') if p.is_file()]
    assert len(files) > 5
    fell_back = set()
    for file in files:
        for i, (name, _) in enumerate(damages(saved / file, places)):
            workdir = tmp_path / 'run'
            shutil.copytree(saved, workdir)
            list(damages(workdir / file, places))[i][1]()
            step, state, place = restore(workdir)
            assert_same(state, tree(step))
            assert place == PLACE | {'step': step}, (file, name)
            said = capfd.readouterr()
            if step == 1:
                fell_back.add(file)
                assert f'Warning: {workdir}/checkpoints/2: ' in said.out + said.err and '1 steps are lost' in said.out + said.err
                assert [p.name for p in (workdir / DAMAGED_DIR).iterdir()] == ['2']
                assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['1']
            shutil.rmtree(workdir)
    assert len(fell_back) >= 4, fell_back


def test_another_name_does_not_make_it_another_step(copy):
    (copy / 'checkpoints' / '2').rename(copy / 'checkpoints' / '30')
    checkpoints = Checkpoints(copy / 'checkpoints')
    with pytest.raises(DamagedCheckpointError, match='30: is the checkpoint of step 2 under another name'):
        checkpoints.restore(30, abstract(tree()))
    assert checkpoints.restore_newest(abstract(tree()))[0] == 1
    checkpoints.close()


def test_none_is_left(copy):
    for step in ('1', '2'):
        shutil.rmtree(copy / 'checkpoints' / step / 'state')
    with pytest.raises(DamagedCheckpointError, match=r'checkpoints/2: .*; no checkpoint is left of 2'):
        restore(copy)
    assert not (copy / DAMAGED_DIR).exists()  # nothing is moved where nothing is gained


def test_a_bit_of_an_array_is_named(copy):
    """Written anew with one bit changed, as a disk's controller might: only the checksum can tell."""
    changed = tree(2)
    changed['params']['w'] = changed['params']['w'].at[3, 4].multiply(-1)
    other = copy.parent / 'other'
    other.mkdir()
    (other / 'config.json').touch()
    checkpoints = Checkpoints(other / 'checkpoints')
    checkpoints.save(2, changed, PLACE)
    checkpoints.close()
    shutil.rmtree(copy / 'checkpoints' / '2' / 'state')
    shutil.copytree(other / 'checkpoints' / '2' / 'state', copy / 'checkpoints' / '2' / 'state')
    checkpoints = Checkpoints(copy / 'checkpoints')
    with pytest.raises(DamagedCheckpointError, match=r'2: params\.w has checksum [0-9a-f]{8}, saved was [0-9a-f]{8}$'):
        checkpoints.restore(2, abstract(tree()))
    with pytest.raises(DamagedCheckpointError, match=r'params\.w has checksum'):
        checkpoints.restore_params(2, abstract(tree()['params']))
    part = checkpoints.restore_params(2, abstract({'groups': tree()['params']['groups']}))
    assert_same(part, {'groups': tree(2)['params']['groups']})
    checkpoints.close()


def test_another_model_is_told_by_its_paths(saved):
    other = tree()
    other['params']['w'] = other['params']['w'].T
    other['params']['new'] = other['params'].pop('groups')
    other['m'][0] = other['m'][0].astype(jnp.bfloat16)
    with pytest.raises(CheckpointError) as e:
        restore(saved, other)
    assert not isinstance(e.value, DamagedCheckpointError)
    for words in (
        'checkpoints/2 is of another model: ', 'params.new.b is missing', 'params.groups.b is extra',
        'params.w is float32[64, 48], want float32[48, 64]', 'm.0 is float32[5], want bfloat16[5]',
    ):  # fmt: skip
        assert words in str(e.value)
    checkpoints = Checkpoints(saved / 'checkpoints')
    with pytest.raises(CheckpointError, match=r'params\.c is missing'):
        checkpoints.restore_params(2, abstract({'c': jnp.zeros(3)}))
    checkpoints.close()


def until_noticed(checkpoints):
    deadline = time.monotonic() + 60
    while checkpoints._saving is not None and time.monotonic() < deadline:
        checkpoints.check()


def test_saves_that_fail_in_the_background(copy, monkeypatch, capfd):
    """Each is said at the next step; the third in a row is an error, and one that succeeds begins the count anew."""
    checkpoints = Checkpoints(copy / 'checkpoints')

    def broken(*_, **__):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(ocp.StandardCheckpointHandler, 'finalize', broken)
        for step, n in [(3, 1), (4, 2)]:
            checkpoints.save(step, tree(step), PLACE)
            until_noticed(checkpoints)
            said = capfd.readouterr()
            words = f'the save of step {step} failed: No space left on device; earlier checkpoints are as'
            assert f'Warning: {copy}/checkpoints: {words}' in said.out and f'this was save {n} of 3' in said.out
            checkpoints.check()  # said once
            assert not capfd.readouterr().out and not checkpoints.wait()
    checkpoints.save(5, tree(5), PLACE)
    assert checkpoints.wait() and checkpoints.steps() == [1, 2, 5]
    monkeypatch.setattr(ocp.StandardCheckpointHandler, 'finalize', broken)
    for step in (6, 7, 8):
        checkpoints.save(step, tree(step), PLACE)
        if step < 8:
            until_noticed(checkpoints)
    with pytest.raises(CheckpointError, match=r'the save of step 8 failed: .*No space left on device'):
        until_noticed(checkpoints)
    monkeypatch.undo()
    checkpoints.close()
    assert restore(copy)[0] == 5


def test_a_save_that_cannot_start_in_one_of_two_processes(copy, monkeypatch, capfd):
    """It is one of three that may fail; what it left is deleted; the processes agree in `wait`, once a save."""
    checkpoints, agreed = Checkpoints(copy / 'checkpoints'), []
    agree = lambda kind: agreed.append(kind) or kind
    monkeypatch.setattr('spark.checkpoints.reading.multihost_utils.process_allgather', agree)
    monkeypatch.setattr(manager, 'exit_now', lambda e: pytest.fail(f'exits: {e}'))

    def full(step, **_):
        (copy / 'checkpoints' / f'{step}.orbax-checkpoint-tmp').mkdir()
        raise errors.pop(0)

    errors = [OSError(28, 'No space left on device'), FileNotFoundError('gone')]  # as Orbax may raise them in one process
    monkeypatch.setattr(checkpoints._manager, 'save', full)
    monkeypatch.setattr(manager.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(manager, 'by_first_process', lambda act, what: act())
    for n, words in [(1, 'save of step 3 failed: No space left'), (2, 'save of step 4 failed: FileNotFoundError: gone')]:
        checkpoints.save(2 + n, tree(3), PLACE)
        assert not checkpoints.wait() and len(agreed) == n
        said = capfd.readouterr().out
        assert words in said and f'this was save {n} of 3' in said
        assert sorted(p.name for p in (copy / 'checkpoints').iterdir()) == ['1', '2']
    monkeypatch.undo()
    checkpoints.close()


@pytest.mark.parametrize('fails', [1, 9])
def test_storage_that_fails_when_a_save_starts(copy, monkeypatch, capfd, fails):
    """Once: it is asked again. For long: this is a save that failed."""
    checkpoints, left = Checkpoints(copy / 'checkpoints'), [OSError('503')] * fails
    exists = type(checkpoints.directory).exists
    monkeypatch.setattr('spark.storage.time.sleep', lambda s: None)

    def flaky(path):
        if path.name == 'config.json' and left:
            raise left.pop()
        return exists(path)

    monkeypatch.setattr(type(checkpoints.directory), 'exists', flaky)
    checkpoints.save(3, tree(3), PLACE)
    assert checkpoints.wait() == (fails == 1)
    assert ('the save of step 3: OSError: 503; tried 5 times' in capfd.readouterr().out) == (fails > 1)
    checkpoints.close()


def test_the_last_save_is_repeated(copy, monkeypatch):
    """After a pause, as often as saves may fail; what a failed attempt has left is no obstacle."""
    checkpoints, waited, fails = Checkpoints(copy / 'checkpoints'), [], [28, 28]
    finalize = ocp.StandardCheckpointHandler.finalize

    def flaky(*args, **kwargs):
        if fails:
            raise OSError(fails.pop(), 'No space left on device')
        return finalize(*args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, 'finalize', flaky)
    monkeypatch.setattr('spark.checkpoints.manager.time.sleep', waited.append)
    save = lambda: checkpoints.save(3, tree(3), PLACE)
    save()
    checkpoints.finish(save)
    assert len(waited) == 2 and not fails
    checkpoints.close()
    assert restore(copy)[0] == 3
    fails += [28] * 3
    checkpoints = Checkpoints(copy / 'checkpoints')
    save = lambda: checkpoints.save(4, tree(4), PLACE)
    save()
    with pytest.raises(CheckpointError, match='the save of step 4 failed'):
        checkpoints.finish(save)
    checkpoints.close()


def test_what_fails_after_a_complete_save_is_no_failed_save(copy, monkeypatch, capfd):
    """last_saved.json, or what Orbax does last: the checkpoint is there, and the run comes to its end."""
    checkpoints, fails = Checkpoints(copy / 'checkpoints'), [OSError(5, 'Input/output error')]
    write = type(checkpoints.directory).write_bytes

    def flaky(path, data):
        if path.name.startswith('last_saved') and fails:
            raise fails.pop()
        return write(path, data)

    monkeypatch.setattr(type(checkpoints.directory), 'write_bytes', flaky)
    save = lambda step: lambda: checkpoints.save(step, tree(step), PLACE)
    save(3)()
    checkpoints.finish(save(3))
    assert not fails and 'Warning' in (said := capfd.readouterr().out) and 'that may fail' not in said
    finished = checkpoints._manager.wait_until_finished

    def late():
        finished()
        raise RuntimeError('a barrier')

    save(4)()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, 'wait_until_finished', late)
        checkpoints.finish(save(4))
    save(4)()  # as a process repeats it whose peers have failed
    checkpoints.finish(save(4))
    assert checkpoints.last_saved() == 4 and 'that may fail' not in capfd.readouterr().out
    monkeypatch.undo()
    checkpoints.close()
    assert restore(copy)[0] == 4


def test_storage_that_fails_when_checkpoints_are_opened(copy, monkeypatch):
    """Once: it is asked again. For long, or where a source is looked for: the job ends so that it starts again."""
    waited, left, cls = [], [1], type(epath.Path(copy))
    iterdir, is_dir = cls.iterdir, cls.is_dir
    monkeypatch.setattr('spark.storage.time.sleep', waited.append)

    def flaky(function):
        def inner(path, *args):
            if path.name == 'checkpoints' and left and left.pop():
                raise OSError(5, 'Input/output error')
            return function(path, *args)

        return inner

    for name, function in (('iterdir', iterdir), ('is_dir', is_dir)):
        monkeypatch.setattr(cls, name, flaky(function))
    Checkpoints(copy / 'checkpoints').close()
    assert waited == [1]
    for open_ in (lambda: Checkpoints(copy / 'checkpoints'), lambda: open_source('train.restore_from', str(copy))):
        left.extend([1] * 99)
        with pytest.raises(UnreadableError, match='Input/output error') as e:
            open_()
        assert e.value.exit_code == 124
        left.clear()


def test_a_damaged_state_is_freed(copy, monkeypatch):
    """Before the checkpoint before it is restored, which needs the same memory."""
    held, restored = [], manager.Checkpoints._restore
    size = lambda: sum(x.shape == (64, 48) for x in jax.live_arrays())
    before, verify = size(), manager.Checkpoints._verify

    def damaged(self, step, tree, saved):
        if step == 2:
            raise DamagedCheckpointError('a bit')
        verify(self, step, tree, saved)

    monkeypatch.setattr(manager.Checkpoints, '_verify', damaged)
    spy = lambda *args: (held.append(size() - before), restored(*args))[1]
    monkeypatch.setattr(manager.Checkpoints, '_restore', spy)
    gc.disable()
    try:
        assert restore(copy)[0] == 1
    finally:
        gc.enable()
    assert held == [0, 0, 0]


def test_a_directory_that_is_gone(copy):
    checkpoints = Checkpoints(copy / 'checkpoints')
    shutil.rmtree(copy)
    for step in (3, 4, 5):
        checkpoints.save(step, tree(3), PLACE)
    with pytest.raises(CheckpointError, match='the run directory has vanished'):
        checkpoints.wait()
    assert not copy.exists()


def test_checksums_do_not_depend_on_the_mesh():
    mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
    x = tree(4)['params']['w']
    split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for spec in [(), ('a',), (None, 'b'), ('b', 'a')]]
    assert {checksums([y])['0'] for y in [x, *split]} == {checksums([x])['0']}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 6), st.integers(0, 31), st.sampled_from(['float32', 'int32', 'bfloat16', 'uint8']))
def test_any_bit_changes_the_checksum(place, bit, dtype):
    x = np.arange(7).astype(jnp.dtype(dtype))
    changed = x.copy()
    changed.view(f'uint{8 * x.itemsize}')[place] ^= 1 << bit % (8 * x.itemsize)
    assert checksums([x])['0'] != checksums([changed])['0']
    swapped = x.copy()
    swapped[[place, (place + 1) % 7]] = swapped[[(place + 1) % 7, place]]
    assert checksums([x])['0'] != checksums([swapped])['0']


@pytest.mark.parametrize('name', ['w', 'stacked'])
def test_an_array_is_read_piece_by_piece(tmp_path, monkeypatch, name):
    """In chunks that no two layers share; the checksums of the pieces add up to the saved one, and a changed bit is found."""
    monkeypatch.setattr('spark.checkpoints.manager.CHUNK', 512)
    (tmp_path / 'config.json').touch()
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in [('w', (60, 6)), ('stacked', (5, 8, 9))]}
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    for step, changed in [(1, params), (2, jax.tree.map(lambda x: x.at[-1, 0].add(1), params))]:
        checkpoints.save(step, {'params': changed}, {})
    checkpoints.close()
    state = tmp_path / 'checkpoints' / '2' / 'state'
    seen = []
    whole = checkpoints.stored(1, abstract(params), tick=seen.append)[name]
    assert whole.shape == params[name].shape and whole.dtype == params[name].dtype
    assert (whole._store.chunk_layout.read_chunk.shape[0] == 1) == (name == 'stacked')
    pieces = [whole[:2], whole[2][None], whole[3:99]]
    np.testing.assert_array_equal(np.concatenate(pieces), params[name])
    assert sum(seen) == params[name].size
    again = checkpoints.stored(1, abstract(params))[name]
    np.testing.assert_array_equal(np.concatenate([again[:2], again[1:]]), np.concatenate([params[name][:2], params[name][1:]]))
    cast = checkpoints.stored(1, abstract(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)))[name]
    np.testing.assert_array_equal(cast[:], params[name].astype(jnp.bfloat16))
    shutil.rmtree(tmp_path / 'checkpoints' / '1' / 'state')
    state.rename(tmp_path / 'checkpoints' / '1' / 'state')
    wrong = Checkpoints(tmp_path / 'checkpoints').stored(1, abstract(params))[name]
    wrong[:3]
    with pytest.raises(DamagedCheckpointError, match=f'params.{name} does not have the checksum that was saved'):
        wrong[3:]
    with pytest.raises(CheckpointError, match=r'params\.w is float32'):
        Checkpoints(tmp_path / 'checkpoints').stored(1, abstract({'w': jnp.zeros(3)}))
