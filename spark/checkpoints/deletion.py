"""Deleting checkpoints: old ones, in the background, and what a killed save has left."""

import threading
import types

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from spark.errors import root_cause
from spark.progress import tqdm
from spark.runtime import entries, is_complete


class Deletion:
    """Of the checkpoints in a directory, keeps the newest `keep` (None: all), every multiple of `every`, one per `minutes`.

    One process of a job calls it. What cannot be deleted is a warning. (Orbax's own thread for this ends at the first error, and
    Orbax forgets the checkpoints that it was to delete after a save that failed.)
    """

    def __init__(self, directory: epath.Path, keep: int | None = None, every: int = 0, minutes: float = 0.0):
        self._directory, self._thread = directory, None
        kept = [policies.LatestN(keep)]
        if every:
            kept.append(policies.EveryNSteps(every))
        if minutes:
            kept.append(policies.EveryNSeconds(max(1, round(60 * minutes))))
        self._kept = policies.AnyPreservationPolicy(kept)

    def unfinished(self) -> None:
        """Deletes what a save has left that was killed or failed. No save may be under way."""
        try:
            left = [path for path in entries(self._directory) if _is_unfinished(path)]
        except Exception as e:
            tqdm.write(f'Warning: {self._directory}: what unfinished saves have left cannot be listed: {root_cause(e)}')
            return
        for path in left:
            self._delete(path)

    def old(self) -> None:
        """Starts to delete the checkpoints that are not kept; what comes while that runs is left to the next call."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._delete_old, daemon=True)
            self._thread.start()

    def join(self) -> None:
        """Waits for what `old` has started."""
        if self._thread:
            self._thread.join()

    def _delete_old(self):
        try:
            found = sorted(ocp.path.step.standard_name_format().find_all(self._directory), key=lambda found: found.step)
            infos = [types.SimpleNamespace(step=x.step, time=x.commit_timestamp, metrics=None) for x in found]
            kept = self._kept.should_preserve(infos, context=policies.PreservationContext())
        except Exception as e:
            tqdm.write(f'Warning: {self._directory}: old checkpoints cannot be listed, nothing is deleted: {root_cause(e)}')
            return
        for x, keep in zip(found, kept, strict=True):
            if not keep:
                self._delete(self._directory / str(x.step))

    def _delete(self, path):
        try:
            path.rmtree()
        except Exception as e:
            tqdm.write(f'Warning: {path}: cannot be deleted: {root_cause(e)}; it is left for later')


def _is_unfinished(path):
    return not is_complete(path) if path.name.isdecimal() else '.orbax-checkpoint-tmp' in path.name
