"""Bad updates: how they are detected, and which module they came from."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from spark.config import TrainConfig
from spark.nn.layers import METRICS
from spark.nn.runs import runs
from spark.training import loss

WARM = 32  # good updates before gradient norms are compared with their running mean
DECAY = 0.98  # of the running mean


@flax.struct.dataclass
class Guard:
    """What a run remembers of its updates: int32 counts, and a float32 mean; all scalars."""

    left_out: jax.Array  # bad updates, which were left out
    in_a_row: jax.Array  # bad updates since the last good one
    good: jax.Array  # good updates
    mean_norm: jax.Array  # running mean of the gradient norms of good updates

    @classmethod
    def new(cls) -> 'Guard':
        """The guard of a new run."""
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, zero, zero, jnp.zeros((), jnp.float32))


def judge(cfg: TrainConfig, guard: Guard, objective: jax.Array, norm: jax.Array) -> tuple[jax.Array, Guard]:
    """(whether an update is good, the next Guard): its loss and gradient norm must be finite, and the norm must not be a spike.

    After more than cfg.max_skips bad updates in a row, every update is rejected: the loop reads verdicts one step late, and the
    state must not change until it stops.
    """
    good = jnp.isfinite(objective) & jnp.isfinite(norm) & (guard.in_a_row <= cfg.max_skips)
    if cfg.spike:
        good &= (guard.good < WARM) | (norm <= cfg.spike * guard.mean_norm)
    mean = jnp.where(guard.good == 0, norm, DECAY * guard.mean_norm + (1 - DECAY) * norm)
    bad = 1 - good.astype(jnp.int32)
    return good, Guard(
        guard.left_out + bad, jnp.where(good, 0, guard.in_a_row + 1), guard.good + 1 - bad, jnp.where(good, mean, guard.mean_norm)
    )


def first_not_finite(trainer: Any, params: dict, batch: dict, step: int = 1) -> str:
    """Says where the first number that is not finite appears: in a parameter, a module's output, the loss or a gradient.

    Repeats the forward and backward pass of update `step` on `params`, those before it, and a batch of host arrays, and checks
    every module. Runs inside the context of the Trainer.
    """
    n, order = trainer.cfg.train.accumulate, []
    probe = jax.jit(lambda params, rows: _probe(trainer, params, step, rows, order))
    for i in range(n):
        rows = trainer.put({name: x[i::n] for name, x in batch.items()}, trainer.cfg.data.batch_size // n)
        of_params, of_modules, of_loss, of_gradients = jax.device_get(probe(params, rows))
        if bad := [path for path, ok in of_params.items() if not ok.all()]:
            return f'the parameter {".".join(bad[0])} itself is not finite'
        if bad := _not_finite(trainer.cfg.model, {path: of_modules[path] for path in order}):
            return f'first not finite: the output of {bad[0][-1]}'
        if not of_loss:
            return 'every module is finite, the loss is not: look at the logits'
        # The backward pass begins at the last layer.
        if bad := _not_finite(trainer.cfg.model, of_gradients, last=True):
            return f'the forward pass is finite; first not finite in backward: the gradient of {bad[-1][-1]}'
    return 'every module and every gradient by itself is finite'


def _probe(trainer, params, step, rows, order):
    """What is finite: {path: flags} of parameters, {path: flags} of modules' outputs, the loss, {path: flags} of gradients.

    Scanned layers have one flag per group. The paths of modules are appended to `order` as they run.
    """

    def note(call, args, kwargs, context):
        y, module = call(*args, **kwargs), context.module
        if module.path and context.method_name == '__call__' and isinstance(y, jax.Array):
            module.sow(METRICS, 'finite', jnp.all(jnp.isfinite(y)), reduce_fn=lambda _, new: new, init_fn=lambda: None)
            if module.path not in order:
                order.append(module.path)
        return y

    def objective(params):
        variables = trainer.variables(params, step)
        with nn.intercept_methods(note):
            hidden, sown = trainer.model.apply(variables, rows['tokens'], rows['positions'], rows['segments'], mutable=[METRICS])
        nll, log_z, _ = loss.cross_entropy(trainer.model, params, hidden, rows['targets'], trainer.cfg.train.loss_pieces)
        kept = jnp.where(rows['segments'] > 0, nll + trainer.cfg.optimizer.z_loss * log_z**2, 0)
        return jnp.sum(kept), sown[METRICS]

    (total, sown), gradients = jax.value_and_grad(objective, has_aux=True)(params)
    named = lambda tree: {tuple(entry.key for entry in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    each = lambda path, x: jnp.all(jnp.isfinite(x), axis=tuple(range(path[0].startswith('groups'), x.ndim)))
    finite = lambda tree: {path: each(path, x) for path, x in named(tree['params']).items()}
    of_modules = {path[:-1]: ok for path, ok in named(sown).items() if path[-1] == 'finite'}
    return finite(params), of_modules, jnp.isfinite(total), finite(gradients)


def _not_finite(cfg, flags, last=False):
    """[(layer, order, name)] of the modules or parameters that are not finite, at the first (or last) such layer; sorted."""
    found = []
    for order, (path, ok) in enumerate(flags.items()):
        if ok.all():
            continue
        if path[0].startswith('groups'):
            name, _, i = path[1].rpartition('_')
            run = next(run for run in runs(cfg) if run.name == path[0])
            layer = run.first + int(np.flatnonzero(~ok)[-1 if last else 0]) * len(cfg.pattern) + int(i)
            found.append((layer, order, f'{" ".join([name, *path[2:]])} in layer {layer} of {cfg.n_layers}'))
        else:
            found.append((-1 if path == ('embedding',) else cfg.n_layers, order, path[0]))
    return sorted(found)
