"""Successive halving (arXiv 1502.07943): all points train to a rung, and the best of them go on from their checkpoints.

What happens next follows from the runs' own metrics alone, so a killed sweep goes on where it was, whoever trains the runs.
"""

import math
from typing import NamedTuple

from spark import config
from spark.checkpoints.manager import last_saved
from spark.errors import ConfigError
from spark.runtime import Path
from spark.sweeps import execute
from spark.sweeps.grid import Run
from spark.training.trackers import recorded


class Halving(NamedTuple):
    """At each rung, a step, one of `eta` points goes on."""

    rungs: tuple[int, ...] = ()
    eta: int = 3

    @property
    def fixed(self) -> dict[str, str]:
        """What must stay as it is in a sweep, because it decides what goes on."""
        return {'rungs': ','.join(map(str, self.rungs)), 'eta': str(self.eta)} if self.rungs else {}


class Stage(NamedTuple):
    """What to train now: `runs`, to a step (0: to their last one). `stopped` says why others do not go on, by name."""

    step: int
    runs: list[Run]
    stopped: dict[str, str]


def parse(rungs: list[str], eta: int, runs: list[Run]) -> Halving:
    """The flags --rungs and --eta; a ConfigError if the rungs do not grow, or are not below the steps of the runs."""
    steps, found = min(run.cfg.train.steps for run in runs), [int(rung) for rung in rungs if rung.isdecimal()]
    if len(found) < len(rungs) or found != sorted(set(found)) or not all(0 < rung < steps for rung in found):
        raise ConfigError(f'--rungs={",".join(rungs)}: want growing steps, between 0 and train.steps = {steps}')
    return Halving(tuple(found), eta)


def stage(out: Path, runs: list[Run], axes: dict, halving: Halving) -> Stage:
    """The first rung that some of its runs have not reached, or the end.

    The runs of a point, one for each seed, are judged together. One whose loss is not finite takes its point out; one that failed
    in another way is still to reach the rung. Where no point is finite, no run is left.
    """
    alive, stopped = {}, {}
    for run in runs:
        values = config.fields(run.cfg)
        alive.setdefault(tuple(values[field] for field in axes if field != 'seed'), []).append(run)
    losses = {run.name: _losses(out, run) for run in runs if halving.rungs}
    for step in halving.rungs:
        missing = [run for group in alive.values() for run in group if step not in losses[run.name]]
        if left := [run for run in missing if not execute.diverged(out, run.name)]:
            return Stage(step, left, stopped)
        of = {point: sum(losses[run.name].get(step, math.inf) for run in group) / len(group) for point, group in alive.items()}
        ranked = sorted(alive, key=of.__getitem__)
        best = [point for point in ranked[: max(1, len(ranked) // halving.eta)] if of[point] < math.inf]
        for place, point in enumerate(ranked, start=1):
            why = f'stopped at step {step}: validation loss {of[point]:.4f}, place {place} of {len(ranked)}'
            stopped |= {run.name: why for run in alive[point] if point not in best}
        alive = {point: group for point, group in alive.items() if point in best}
        if not alive:
            return Stage(step, [], stopped)
    return Stage(0, [run for group in alive.values() for run in group], stopped)


def _losses(out, run):
    """{step: validation loss} of what a run has evaluated and saved. It goes on from there, and forgets what came after."""
    workdir = out / 'runs' / run.name
    saved = last_saved(workdir)
    reached = math.inf if saved is None or execute.is_finished(out, run) else saved
    validation = [r for r in recorded(workdir) if r['split'] == 'validation' and r['step'] <= reached]
    return {r['step']: float(r['loss']) if math.isfinite(float(r['loss'])) else math.inf for r in validation}
