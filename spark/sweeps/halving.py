"""Successive halving (arXiv 1502.07943): all points train to a rung, and the best of them go on from their checkpoints.

What happens next follows from the runs' own metrics alone, so a killed sweep goes on where it was, whoever trains the runs.
"""

import json
import math
from typing import NamedTuple

from spark import config
from spark.errors import ConfigError
from spark.runtime import Path
from spark.sweeps import execute
from spark.sweeps.grid import Run
from spark.training.trackers import metric_files


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

    The runs of a point, one for each seed, are judged together. One that fails before a rung counts as the worst there.
    """
    alive, stopped = {}, {}
    for run in runs:
        values = config.fields(run.cfg)
        alive.setdefault(tuple(values[field] for field in axes if field != 'seed'), []).append(run)
    losses = {run.name: _losses(out, run) for run in runs if halving.rungs}
    for step in halving.rungs:
        left = [run for group in alive.values() for run in group if step not in losses[run.name]]
        if any(execute.failure(out, run.name) is None for run in left):
            return Stage(step, left, stopped)
        of = {point: sum(losses[run.name].get(step, math.inf) for run in group) / len(group) for point, group in alive.items()}
        ranked = sorted(alive, key=of.__getitem__)
        best = ranked[: max(1, len(ranked) // halving.eta)]
        for place, point in enumerate(ranked, start=1):
            why = f'stopped at step {step}: validation loss {of[point]:.4f}, place {place} of {len(ranked)}'
            stopped |= {run.name: why for run in alive[point] if point not in best}
        alive = {point: group for point, group in alive.items() if point in best}
    return Stage(0, [run for group in alive.values() for run in group], stopped)


def _losses(out, run):
    """{step: validation loss} of what a run has evaluated."""
    found = {}
    for path in metric_files(out / 'runs' / run.name):
        for line in path.read_bytes().split(b'\n')[:-1]:  # the last line of a killed run may be half written
            record = json.loads(line)
            if record['split'] == 'validation':
                found[record['step']] = record['loss'] if isinstance(record['loss'], float) else math.inf
    return found
