"""Checkpoints: the training state and the place in the data, saved together and asynchronously by Orbax."""

import jax
import orbax.checkpoint as ocp

from spark.errors import CheckpointError


class Checkpoints:
    """WORKDIR/checkpoints: the newest `keep` steps and every multiple of `keep_every`."""

    def __init__(self, directory, keep=None, keep_every=0):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self.directory = directory

    def steps(self):
        """The steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step, state, data_state):
        """Starts saving; returns once the state is copied. Waits for an unfinished save first, and raises its error."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as e:
            raise CheckpointError(f'{self.directory}: step {step} cannot be saved: {e}') from e

    def restore(self, step, state):
        """(state, data state) of a step; `state` gives shapes, dtypes and shardings."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as e:
            raise CheckpointError(f'{self.directory}/{step}: cannot be restored: {e}') from e
        return restored['state'], restored['data']

    def restore_params(self, step, params):
        """The parameters of a step alone; `params` gives shapes, dtypes and shardings."""
        item = {'params': params}
        args = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                return checkpointer.restore(self.directory.absolute() / str(step) / 'state', args=args)['params']
        except Exception as e:
            raise CheckpointError(f'{self.directory}/{step}: cannot be restored: {e}') from e

    def close(self):
        """Waits for a save under way and raises its error."""
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except Exception as e:
            raise CheckpointError(f'{self.directory}: the last save failed: {e}') from e
