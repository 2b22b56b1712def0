"""Updates that must not happen: what makes one bad, and the module that a bad one came from."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from spark.nn.layers import METRICS
from spark.training import loss

WARM = 32  # good updates before gradient norms have a mean to be compared with
DECAY = 0.98  # of that mean


@flax.struct.dataclass
class Guard:
    """What a run remembers of its updates; all ()."""

    left_out: jax.Array  # int32, updates that did not happen
    in_a_row: jax.Array  # int32, of these, those since the last good one
    good: jax.Array  # int32
    mean_norm: jax.Array  # float32, running mean of the good ones' gradient norms

    @classmethod
    def new(cls):
        """Of a run that has not begun."""
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, zero, zero, jnp.zeros((), jnp.float32))


def judge(cfg, guard, objective, norm):
    """Is an update good: its loss and gradient norm finite, and no spike as `cfg` has it?

    After more than cfg.max_skips bad ones in a row none is good any more, so that the state stays as it was before them until
    the loop has noticed.

    Args:
      cfg: a TrainConfig.
      guard: a Guard.
      objective, norm: () float32, of the update's loss and gradient.

    Returns:
      (() bool, the next Guard).
    """
    good = jnp.isfinite(objective) & jnp.isfinite(norm) & (guard.in_a_row <= cfg.max_skips)
    if cfg.spike:
        good &= (guard.good < WARM) | (norm <= cfg.spike * guard.mean_norm)
    mean = jnp.where(guard.good == 0, norm, DECAY * guard.mean_norm + (1 - DECAY) * norm)
    bad = 1 - good.astype(jnp.int32)
    return good, Guard(
        guard.left_out + bad, jnp.where(good, 0, guard.in_a_row + 1), guard.good + 1 - bad, jnp.where(good, mean, guard.mean_norm)
    )


def origin(trainer, params, batch):
    """Where the first number that is not finite appears, in a few words: a parameter, a module's output, the loss, a gradient.

    Runs forward and backward once more, as the train step does, and looks at every module.

    Args:
      trainer: a Trainer, inside its context.
      params: before the update.
      batch: host arrays, as of spark.data.pipeline.
    """
    n, order = trainer.cfg.train.accumulate, []
    probe = jax.jit(lambda params, rows: _probe(trainer, params, rows, order))
    for i in range(n):
        rows = trainer.put({name: x[i::n] for name, x in batch.items() if isinstance(x, np.ndarray)})
        of_params, of_modules, of_loss, of_gradients = jax.device_get(probe(params, rows))
        bad = [path for path, ok in of_params.items() if not ok.all()]
        if bad:
            return f'the parameter {".".join(bad[0])} itself is not finite'
        bad = [_place(trainer.cfg.model, path, of_modules[path], order.index(path)) for path in order]
        if any(bad):
            return f'first not finite: the output of {min(filter(None, bad))[-1]}'
        if not of_loss:
            return 'every module is finite, the loss is not: look at the logits'
        # Backward the last layer comes first.
        bad = [_place(trainer.cfg.model, path, ok, 0, last=True) for path, ok in of_gradients.items()]
        if any(bad):
            return f'forward all is finite; backward first not: the gradient of {max(filter(None, bad))[-1]}'
    return 'every module and every gradient by itself is finite'


def _probe(trainer, params, rows, order):
    """What is finite: {path: flags} of parameters, of modules, of the loss, {path: flags} of gradients.

    What is scanned has one flag per group of layers. `order` gets the paths of modules as they run.
    """

    def note(call, args, kwargs, context):
        y, module = call(*args, **kwargs), context.module
        if module.path and context.method_name == '__call__' and isinstance(y, jax.Array):
            module.sow(METRICS, 'finite', jnp.all(jnp.isfinite(y)), reduce_fn=lambda _, new: new, init_fn=lambda: None)
            if module.path not in order:
                order.append(module.path)
        return y

    def objective(params):
        with nn.intercept_methods(note):
            places = rows['tokens'], rows['positions'], rows['segments']
            hidden, seen = trainer.model.apply(params, *places, mutable=[METRICS])
        pieces = trainer.cfg.train.loss_pieces
        nll, log_z, _ = loss.cross_entropy(trainer.model, params, hidden, rows['targets'], pieces)
        kept = jnp.where(rows['segments'] > 0, nll + trainer.cfg.optimizer.z_loss * log_z**2, 0)
        return jnp.sum(kept), seen[METRICS]

    (total, seen), gradients = jax.value_and_grad(objective, has_aux=True)(params)
    named = lambda tree: {tuple(entry.key for entry in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    each = lambda path, x: jnp.all(jnp.isfinite(x), axis=tuple(range(path[0] == 'groups', x.ndim)))
    finite = lambda tree: {path: each(path, x) for path, x in named(tree['params']).items()}
    of_modules = {path[:-1]: ok for path, ok in named(seen).items() if path[-1] == 'finite'}
    return finite(params), of_modules, jnp.isfinite(total), finite(gradients)


def _place(cfg, path, ok, place, last=False):
    """(layer, place, words) of the first (last) group in which a module or parameter is not finite; None if it is in all."""
    if ok.all():
        return None
    if path[0] != 'groups':
        return -1 if path == ('embedding',) else cfg.n_layers, place, path[0]
    name, _, i = path[1].rpartition('_')
    layer = int(np.flatnonzero(~ok)[-1 if last else 0]) * len(cfg.pattern) + int(i)
    return layer, place, f'{" ".join([name, *path[2:]])} in layer {layer} of {cfg.n_layers}'
