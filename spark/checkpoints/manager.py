"""Checkpoints: the training state and the place in the data, saved together and asynchronously by Orbax, with their checksums."""

import functools
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from tqdm import tqdm

from spark.checkpoints.checksums import by_path, checksums, crc
from spark.checkpoints.stored import Stored
from spark.errors import CheckpointError, DamagedError, root_cause

CHUNK = 16 << 20  # bytes of a larger array that lie together; of layers that are stacked, none share a chunk
ASIDE = 'damaged'  # WORKDIR/damaged holds the checkpoints that do not read as they were saved


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step):
        """Never. Saving asks this with a step; what `runtime.stopping` agrees on with other processes is another count."""
        del step
        return False


class Checkpoints:
    """WORKDIR/checkpoints, beside a config.json: the newest `keep` steps and every multiple of `keep_every`."""

    def __init__(self, directory, keep=None, keep_every=0):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None)
        self._manager = _Manager(directory.absolute(), options=options)
        self.directory, self._saving = directory, False
        # Once per step: parameters may be restored one by one.
        self._beside, self._tree = functools.cache(self._read_beside), functools.cache(self._read_tree)

    def steps(self):
        """The steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step, state, data):
        """Starts saving; returns once the state is copied. Waits for an unfinished save first, and raises its error.

        Args:
          step: an int.
          state: a pytree of arrays.
          data: what JSON can hold, and tuples.
        """
        sums = {name: int(x) for name, x in jax.device_get(checksums(state)).items()}
        data = _with_tuples(data)
        beside = {'step': step, 'data': data, 'checksums': sums, 'crc': crc(data)}
        try:
            if self._vanished():
                raise FileNotFoundError
            chunked = ocp.args.StandardSave(state, save_args=jax.tree.map(_chunks, state))
            items = ocp.args.Composite(state=chunked, data=ocp.args.JsonSave(beside))
            self._manager.save(step, args=items, force=True)
        except Exception as e:
            raise self._failed(f'step {step} cannot be saved', e) from e
        self._saving = True

    def check(self):
        """Raises the error of a save that failed in the background; waits for nothing."""
        if self._saving and not self._manager.is_saving_in_progress():
            self._saving = False
            self.wait()

    def restore_newest(self, state):
        """(step, state, data) of the newest checkpoint that reads as it was saved; None if there is none, damaged or not.

        Newer ones that do not are put aside, with a warning. `state` gives shapes, dtypes and shardings.

        Raises:
          DamagedError: none is left. CheckpointError: they are of another model.
        """
        steps, found, damaged = self.steps(), None, []
        for step in reversed(steps):
            try:
                found = step, *self.restore(step, state)
                break
            except DamagedError as e:
                damaged.append((step, e))
        if damaged and not found:
            raise DamagedError(f'{damaged[0][1]}; no checkpoint is left' + f' of {len(steps)}' * (len(steps) > 1))
        for step, error in damaged:
            self._put_aside(step)
            tqdm.write(f'Warning: {error}. It lies in {ASIDE}/ now; {step - found[0]} steps are lost and trained again')
        return found

    def restore(self, step, state):
        """(state, data) of a step; `state` gives shapes, dtypes and shardings.

        Raises:
          DamagedError: it does not read as it was saved. CheckpointError: the trees differ, by paths.
        """
        path, error, restored, beside = self._path(step), None, None, None
        try:
            beside = self._beside(step)
            self._compare(step, state)
            args = ocp.args.PyTreeRestore(state, restore_args=ocp.checkpoint_utils.construct_restore_args(state))
            restored = ocp.PyTreeCheckpointHandler().restore(path / 'state', args=args)
        except DamagedError as e:
            error = e
        except CheckpointError:
            raise
        except Exception as e:
            error = DamagedError(f'{self.directory}/{step}: cannot be restored: {root_cause(e)}')
        # All processes go on with the same checkpoint, or none does.
        fine = error is None
        if jax.process_count() > 1:
            fine = bool(multihost_utils.process_allgather(np.asarray(fine)).all())
        if not fine:
            raise error or DamagedError(f'{self.directory}/{step}: cannot be restored in another process')
        self._verify(step, restored, beside['checksums'])
        return restored, beside['data']

    def restore_params(self, step, params):
        """The parameters of a step alone, or some of them; `params` gives shapes, dtypes and shardings.

        Raises:
          DamagedError, CheckpointError: as of `restore`.
        """
        item = {'params': params}
        args = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        sums = self._beside(step)['checksums']
        self._compare(step, item, partly=True)
        try:
            restored = ocp.PyTreeCheckpointHandler().restore(self._path(step) / 'state', args=args)
        except Exception as e:
            raise DamagedError(f'{self.directory}/{step}: cannot be restored: {root_cause(e)}') from e
        self._verify(step, restored, sums)
        return restored['params']

    def stored(self, step, params, tick=lambda n: None):
        """`params`, a tree of shapes and dtypes, as `Stored` arrays, cast to those: so a model is read piece by piece.

        Raises:
          DamagedError, CheckpointError: as of `restore`.
        """
        sums, item = self._beside(step)['checksums'], {'params': params}
        self._compare(step, item, partly=True)
        stored = [Stored(self._path(step) / 'state', name, x.dtype, sums[name], tick) for name, x in by_path(item).items()]
        return jax.tree.unflatten(jax.tree.structure(item), stored)['params']

    def close(self):
        """`wait`, and ends the threads."""
        self.wait()
        self._manager.close()

    def wait(self):
        """Waits for a save under way and raises its error."""
        try:
            self._manager.wait_until_finished()  # unlike its check_for_errors this raises what the thread met that ends a save
        except Exception as e:
            raise self._failed('the last save failed', e) from e

    def _path(self, step):
        return self.directory.absolute() / str(step)

    def _vanished(self):
        # Not whether the directory exists: a write that was under way makes it anew.
        return not (self.directory.parent / 'config.json').exists()

    def _failed(self, what, error):
        error = 'the run directory has vanished' if self._vanished() else root_cause(error)
        return CheckpointError(f'{self.directory}: {what}: {error}; earlier checkpoints are as they were')

    def _read_beside(self, step):
        """The JSON that lies beside a state: its checksums, and the place in the data."""
        path = self._path(step) / 'data' / 'metadata'
        if not self._path(step).exists():
            raise CheckpointError(f'{self._path(step)}: no such checkpoint; there are {self.steps()}')
        try:
            beside = json.loads(path.read_text())
            of_step, data, sums, crc = (beside[name] for name in ('step', 'data', 'checksums', 'crc'))
        except Exception as e:
            raise DamagedError(f'{self.directory}/{step}: {path.name} cannot be read: {type(e).__name__}: {e}') from e
        if of_step != step:
            raise DamagedError(f'{self.directory}/{step}: is the checkpoint of step {of_step} under another name')
        if crc != crc(data):
            raise DamagedError(f'{self.directory}/{step}: the place in the data has checksum {crc(data)}, saved was {crc}')
        return {'data': _without_tuples(data), 'checksums': sums}

    def _read_tree(self, step):
        """{path: (shape, dtype)} of the arrays of a state."""
        try:
            metadata = ocp.PyTreeCheckpointHandler().metadata(self._path(step) / 'state')
            return {path: (tuple(x.shape), np.dtype(x.dtype)) for path, x in by_path(metadata.tree).items()}
        except Exception as e:
            raise DamagedError(f'{self.directory}/{step}: cannot be restored: {root_cause(e)}') from e

    def _compare(self, step, tree, partly=False):
        """Raises a CheckpointError with the paths in which a tree, or a part with other dtypes maybe, is not what is saved."""
        saved = self._tree(step)
        wanted = {path: (tuple(x.shape), np.dtype(x.dtype)) for path, x in by_path(tree).items()}
        show = lambda shape, dtype: f'{dtype}{list(shape)}'
        differences = [f'{path} is missing' for path in wanted if path not in saved]
        if partly:
            saved = {path: saved[path] for path in wanted if path in saved}
        differences += [f'{path} is extra' for path in saved if path not in wanted]
        for path, (shape, dtype) in wanted.items():
            if path in saved and (saved[path][0] != shape or (not partly and saved[path][1] != dtype)):
                differences.append(f'{path} is {show(*saved[path])}, want {show(shape, dtype)}')
        if differences:
            more = f' and {len(differences) - 4} more' if len(differences) > 4 else ''
            raise CheckpointError(f'{self.directory}/{step} is of another model: {"; ".join(differences[:4])}{more}')

    def _verify(self, step, tree, sums):
        """A DamagedError that names the first array whose checksum is another."""
        found = {name: int(x) for name, x in jax.device_get(checksums(tree)).items()}
        wrong = [name for name in found if found[name] != sums.get(name)]
        if wrong:
            raise DamagedError(
                f'{self.directory}/{step}: {wrong[0]} has checksum {found[wrong[0]]:08x}, saved was {sums.get(wrong[0], 0):08x}'
                + (f' ({len(wrong)} arrays differ)' if len(wrong) > 1 else '')
            )

    def _put_aside(self, step):
        if jax.process_index() == 0:
            aside = self.directory.parent / ASIDE
            aside.mkdir(exist_ok=True)
            names = (f'{step}' + f'-{i}' * (i > 0) for i in range(1000))
            self._path(step).rename(next(aside / name for name in names if not (aside / name).exists()))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f'put aside {step}')
        self._manager.reload()


def _chunks(x):
    """How an array is cut in the file: what is stacked by layer so that a layer can be read alone."""
    if x.nbytes <= CHUNK:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if x.ndim > 2 else ())


def _with_tuples(x):
    """A value whose tuples JSON cannot tell from lists, for JSON: Grain's iterators compare parts of their state with tuples."""
    if isinstance(x, dict):
        return {name: _with_tuples(v) for name, v in x.items()}
    if isinstance(x, list | tuple):
        items = [_with_tuples(v) for v in x]
        return {'tuple': items} if isinstance(x, tuple) else items
    return x


def _without_tuples(x):
    """The inverse of `_with_tuples`."""
    if isinstance(x, dict):
        return tuple(map(_without_tuples, x['tuple'])) if x.keys() == {'tuple'} else {n: _without_tuples(v) for n, v in x.items()}
    return [_without_tuples(v) for v in x] if isinstance(x, list) else x


def open_checkpoint(workdir, step):
    """(the Checkpoints of a run, the step asked for or the newest)."""
    where = workdir / 'checkpoints'
    checkpoints = Checkpoints(where) if where.is_dir() else None
    steps = checkpoints.steps() if checkpoints else []
    if not steps:
        raise CheckpointError(f'{where}: no checkpoint yet; train first')
    if step is not None and step not in steps:
        raise CheckpointError(f'{where}: no step {step}; there are {", ".join(map(str, steps))}')
    return checkpoints, steps[-1] if step is None else step
