"""Checkpoints: Orbax saves the training state asynchronously, with the position in the data and checksums of every array."""

import contextlib
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from spark.checkpoints.checksums import by_path, checksums, json_crc
from spark.checkpoints.deletion import Deletion
from spark.checkpoints.reading import by_first_process, together
from spark.checkpoints.stored import StoredArray
from spark.config import ExperimentConfig
from spark.errors import CheckpointError, ConfigError, DamagedCheckpointError, SparkError, exit_now, root_cause
from spark.progress import tqdm
from spark.runtime import absolute, in_bucket, is_complete, write_json, write_text
from spark.storage import PAUSES, Verdict, accessed, insistently, verdict

CHUNK = 16 << 20  # bytes: a larger array is stored in chunks of this size, and no chunk spans two of its stacked layers
DAMAGED_DIR = 'damaged'  # damaged checkpoints are moved to WORKDIR/damaged
LAST_SAVED = 'last_saved.json'  # {"step": the newest step whose save was completed, or 0}
MAX_FAILURES = 3  # saves that fail in a row


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step):
        """Always False. Orbax would ask with the step, but `runtime.stop_requests` synchronizes on a count of its own."""
        del step
        return False


class Checkpoints:
    """The checkpoints in WORKDIR/checkpoints.

    A run that saves calls `begin`. Of its checkpoints it keeps the newest `keep` (None: all), every multiple of `keep_every`
    (0: no more), and one per `keep_minutes` (0: no more); the others are deleted in the background.

    A save that fails, anywhere in a job, is a warning. Where three have failed in a row, `wait` raises an UnreadableError if
    storage did not answer, else a CheckpointError; a job of several processes ends then, since Orbax's threads may wait for one
    another for long. `wait` is the one place where the processes agree about a save.
    """

    def __init__(self, directory: epath.PathLike, keep: int | None = None, keep_every: int = 0, keep_minutes: float = 0.0):
        self.directory = epath.Path(directory)
        self._saving, self._failures = None, 0  # (step, a function that waits for its save and returns the error or None)
        self._deletion = Deletion(self._path(), keep, keep_every, keep_minutes)
        # If a directory cannot be created, Orbax's other threads wait for it for minutes, and the process cannot end. In a job
        # of several processes the others would wait for ever if it were not created in the background.
        options = ocp.CheckpointManagerOptions(
            async_options=ocp.AsyncOptions(create_directories_asynchronously=jax.process_count() > 1),
            single_host_load_and_broadcast=True,  # all processes see the same steps
        )
        what, root = f'{self.directory}: cannot be opened', self._path()
        if not in_bucket(root):  # first, since in Orbax the other processes would wait for one that raises an error
            by_first_process(lambda: root.mkdir(parents=True, exist_ok=True), what)
        self._manager = accessed(lambda: _Manager(root, options=options), what, CheckpointError)

    def steps(self) -> list[int]:
        """The saved steps, ascending. Those that this object has deleted may be among them."""
        return sorted(map(int, self._manager.all_steps()))  # as another process tells them they are int32

    def last_saved(self) -> int | None:
        """The newest step that a run is known to have saved here, 0 if it has saved none; None if nothing is known."""
        return last_saved(self.directory.parent)

    def begin(self, step: int) -> None:
        """Called by the first process of a run that has restored this step, or starts at 0, before it saves.

        Deletes what a killed save has left, and the checkpoints that are no longer kept.
        """
        self._remember(step)
        self._deletion.unfinished()
        self._deletion.old()

    def save(self, step: int, state: Any, data: Any) -> None:
        """Starts to save a tree of arrays, and `data`: JSON values. Returns once the arrays are copied.

        Waits for an unfinished save first.
        """
        self.wait()
        metadata = {'step': step, 'data': data, 'checksums': checksums(state), 'crc': json_crc(data)}
        chunked = ocp.args.StandardSave(state, save_args=jax.tree.map(_save_args, state))
        items = ocp.args.Composite(state=chunked, data=ocp.args.JsonSave(metadata))
        error = None
        try:
            # Whether `directory` exists says nothing: a write that was under way creates it again.
            if not by_first_process((self.directory.parent / 'config.json').exists, f'{self.directory}: the save of step {step}'):
                raise CheckpointError(f'{_failed(self.directory, step)}: the run directory has vanished')
            self._manager.save(step, args=items, force=True)
        except jax.errors.JaxRuntimeError:  # of the step that computes the state
            raise
        except Exception as e:
            error = e
        self._saving = step, functools.cache(lambda: self._ended(step, error))

    def check(self) -> None:
        """Notices that a save has ended in the background; does not wait for one that is under way."""
        if self._saving and not self._manager.is_saving_in_progress():
            self._saving[1]()
            if jax.process_count() == 1:  # several agree when they come to the next save
                self.wait()

    def wait(self) -> bool:
        """Waits for a save under way. Whether the last one succeeded, in all processes."""
        saving, self._saving = self._saving, None
        if not saving:
            return not self._failures
        step, ended = saving
        try:
            together(lambda: _raised(ended()), _failed(self.directory, step), CheckpointError)
            self._failures = 0
            return True
        except SparkError as e:
            failure = type(e)(f'{e}; earlier checkpoints are as they were')
            failure.__cause__ = e
        self._failures += 1
        if jax.process_index() == 0:
            self._deletion.unfinished()
        if self._failures >= MAX_FAILURES:
            if jax.process_count() > 1:
                exit_now(failure)
            raise failure
        tqdm.write(f'Warning: {failure}; this was save {self._failures} of {MAX_FAILURES} that may fail in a row')
        return False

    def finish(self, save: Callable[[], None]) -> None:
        """Waits for the last save of a run. If it failed, calls `save` to repeat it, after a pause."""
        while not self.wait():
            time.sleep(PAUSES[self._failures])
            save()

    def close(self) -> None:
        """Waits for a save and a deletion under way, and ends Orbax's threads."""
        if self._saving and (error := self._saving[1]()):
            tqdm.write(f'Warning: {_failed(self.directory, self._saving[0])}: {root_cause(error)}')
        self._deletion.join()
        self._manager.close()

    def _ended(self, step, error):
        """Waits, in this process, for the end of a save, which an `error` may have kept from starting; its error or None."""
        try:
            try:
                if error:
                    raise error
                self._manager.wait_until_finished()  # unlike Orbax's check_for_errors, this also raises errors of finalizing
            except Exception:
                # Whatever failed then, the checkpoint counts: it has its name when every process has written its part.
                if not (self._path(step).exists() and is_complete(self._path(step))):
                    raise
        except Exception as e:
            return e
        if jax.process_index() == 0:
            try:
                self._remember(step)
            except CheckpointError as e:
                tqdm.write(f'Warning: {e}; step {step} is saved all the same')
            self._deletion.old()
        return None

    def _remember(self, step):
        write_json(self.directory.parent / LAST_SAVED, {'step': step}, CheckpointError)

    def restore_newest(self, abstract_state: Any) -> tuple[int, Any, Any] | None:
        """(step, state, data) of the newest undamaged checkpoint; None if there are no checkpoints.

        Newer ones that are damaged are moved to WORKDIR/damaged, with a warning. Raises as `restore` does.
        """
        steps, restored, damaged = self.steps(), None, []
        for step in reversed(steps):
            try:
                restored = step, *self.restore(step, abstract_state)
                break
            except DamagedCheckpointError as e:
                damaged.append((step, str(e)))  # not `e`, whose traceback holds the whole state
        if damaged and not restored:
            raise DamagedCheckpointError(f'{damaged[0][1]}; no checkpoint is left' + f' of {len(steps)}' * (len(steps) > 1))
        for step, error in damaged:
            self._move_damaged(step)
            lost = step - restored[0]
            tqdm.write(f'Warning: {error}. It was moved to {DAMAGED_DIR}/; {lost} steps are lost and trained again')
        return restored

    def restore(self, step: int, abstract: Any, partial: bool = False) -> tuple[Any, Any]:
        """(state, data) of a step.

        `abstract` is a tree of shapes, dtypes and shardings; if `partial`, it is a part of the state, maybe with other dtypes.
        Raises a DamagedCheckpointError if it cannot be decoded or a checksum differs, an UnreadableError if storage does not
        answer, and another CheckpointError if it is of another model.
        """
        return insistently(lambda: self._restore(step, abstract, partial))

    def _restore(self, step, abstract, partial):
        def read():
            metadata = self._metadata(step, abstract, partial)
            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
            args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
            return metadata, ocp.PyTreeCheckpointHandler().restore(self._path(step) / 'state', args=args)

        # All processes restore this checkpoint, or none does.
        metadata, restored = together(read, *self._reading(step))
        self._verify(step, restored, metadata['checksums'])
        return restored, metadata['data']

    def restore_params(self, step: int, abstract_params: Any, name: str = 'params') -> Any:
        """The parameters of a step, or those of them that `abstract_params` names; raises as `restore` does.

        `name` is the field of the state: 'params', or 'ema' for the mean of the parameters.
        """
        return self.restore(step, {name: abstract_params}, partial=True)[0][name]

    def stored(
        self, step: int, abstract_params: Any, tick: Callable[[int], None] = lambda n: None, name: str = 'params'
    ) -> Any:
        """The same as a tree of `StoredArray`, to read piece by piece; raises as `restore` does.

        `abstract_params` has the dtypes to cast to; `tick` is called with the number of elements of each piece that was read.
        """
        tree = {name: abstract_params}
        saved = accessed(lambda: self._metadata(step, tree, partial=True), *self._reading(step))['checksums']
        state = self._path(step) / 'state'
        arrays = [StoredArray(state, path, x.dtype, saved[path], tick) for path, x in by_path(tree).items()]
        return jax.tree.unflatten(jax.tree.structure(tree), arrays)[name]

    def _metadata(self, step, abstract, partial=False):
        """{'data': position in the data, 'checksums': {path: int}} of a step, if it was saved from a tree like `abstract`."""
        if not self._path(step).exists():
            raise CheckpointError(f'{self._path(step)}: no such checkpoint; there are {self.steps()}')
        metadata = json.loads((self._path(step) / 'data' / 'metadata').read_text())
        with self._decoding(step):
            saved_step, data, saved_checksums, crc = (metadata[name] for name in ('step', 'data', 'checksums', 'crc'))
        if saved_step != step:
            raise DamagedCheckpointError(f'{self.directory}/{step}: is the checkpoint of step {saved_step} under another name')
        if crc != json_crc(data):
            raise DamagedCheckpointError(
                f'{self.directory}/{step}: the position in the data has checksum {json_crc(data)}, saved was {crc}'
            )
        self._compare(step, abstract, partial)
        return {'data': data, 'checksums': saved_checksums}

    def _compare(self, step, abstract, partial):
        """Raises a CheckpointError with the paths at which a tree differs from what was saved; a partial one may lack some."""
        with self._decoding(step):
            metadata = ocp.PyTreeCheckpointHandler().metadata(self._path(step) / 'state')
        saved = {path: (tuple(x.shape), np.dtype(x.dtype)) for path, x in by_path(metadata.tree).items()}
        wanted = {path: (tuple(x.shape), np.dtype(x.dtype)) for path, x in by_path(abstract).items()}
        show = lambda shape, dtype: f'{dtype}{list(shape)}'
        differences = [f'{path} is missing' for path in wanted if path not in saved]
        if not partial:
            differences += [f'{path} is extra' for path in saved if path not in wanted]
        for path, (shape, dtype) in wanted.items():
            if path in saved and (saved[path][0] != shape or (not partial and saved[path][1] != dtype)):
                differences.append(f'{path} is {show(*saved[path])}, want {show(shape, dtype)}')
        if differences:
            more = f' and {len(differences) - 4} more' if len(differences) > 4 else ''
            raise CheckpointError(f'{self.directory}/{step} is of another model: {"; ".join(differences[:4])}{more}')

    def _verify(self, step, tree, saved):
        """Raises a DamagedCheckpointError that names the first array whose checksum is not the saved one."""
        found = checksums(tree)
        if wrong := [name for name in found if found[name] != saved.get(name)]:
            name, more = wrong[0], f' ({len(wrong)} arrays differ)' if len(wrong) > 1 else ''
            raise DamagedCheckpointError(
                f'{self.directory}/{step}: {name} has checksum {found[name]:08x}, saved was {saved.get(name, 0):08x}{more}'
            )

    def _move_damaged(self, step):
        target = self.directory.parent / DAMAGED_DIR

        def move():
            if jax.process_index() == 0:
                target.mkdir(exist_ok=True)
                if in_bucket(target):  # where a directory is there when something is in it, and nothing can move to one before
                    write_text(target / 'README', 'Checkpoints that could not be restored.\n', CheckpointError)
                names = (f'{step}' + f'-{i}' * (i > 0) for i in range(1000))
                self._path(step).rename(next(target / name for name in names if not (target / name).exists()))

        together(move, f'{self.directory}/{step}: is damaged and cannot be moved to {target}', CheckpointError)
        self._manager.reload()

    def _reading(self, step):
        """How `checked` names what goes wrong when a step is read."""
        return f'{self.directory}/{step}: cannot be read', CheckpointError, DamagedCheckpointError

    @contextlib.contextmanager
    def _decoding(self, step):
        """Inside, what was read is decoded, and nothing else is done that raises a LookupError, TypeError or ValueError."""
        try:
            yield
        except (LookupError, TypeError, ValueError) as e:
            if verdict(e) is not Verdict.PROGRAM:
                raise
            raise DamagedCheckpointError(f'{self.directory}/{step}: cannot be decoded: {root_cause(e)}') from e

    def _path(self, step=''):
        return absolute(self.directory) / str(step)


def open_checkpoint(workdir: epath.PathLike, step: int | None = None) -> tuple[Checkpoints, int]:
    """(the Checkpoints of a run, the step that was asked for or the newest); a CheckpointError if there is none."""
    directory = epath.Path(workdir) / 'checkpoints'
    checkpoints = Checkpoints(directory) if by_first_process(directory.is_dir, f'{directory}') else None
    steps = checkpoints.steps() if checkpoints else []
    if not steps:
        raise CheckpointError(f'{directory}: no checkpoint yet; train first')
    if step is not None and step not in steps:
        raise CheckpointError(f'{directory}: no step {step}; there are {", ".join(map(str, steps))}')
    return checkpoints, steps[-1] if step is None else step


def last_saved(workdir: epath.PathLike) -> int | None:
    """`Checkpoints.last_saved` of a run."""
    path = epath.Path(workdir) / LAST_SAVED
    try:
        return int(json.loads(path.read_text())['step']) if path.exists() else None
    except (ValueError, LookupError, TypeError) as e:
        raise CheckpointError(f'{path}: want {{"step": the newest step that was saved}}: {root_cause(e)}') from e


def field_of_params(cfg: ExperimentConfig, ema: bool) -> str:
    """The field of a saved state that has the parameters, or their mean; a ConfigError if there is no mean."""
    if ema and not cfg.optimizer.ema:
        raise ConfigError('--ema: want a run with optimizer.ema above 0; this one has kept no mean of its parameters')
    return 'ema' if ema else 'params'


def _save_args(x):
    """How an array is stored: a large one in chunks, of which none spans two stacked layers, so that one layer can be read."""
    if x.nbytes <= CHUNK:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if x.ndim > 2 else ())


def _failed(directory, step):
    return f'{directory}: the save of step {step} failed'


def _raised(error):
    """Raises an error that is not None."""
    if error:
        raise error
