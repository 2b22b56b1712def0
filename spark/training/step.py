"""The compiled parts of a run: initial state, train step, evaluation."""

import contextlib
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta
from tqdm import tqdm

from spark.data import pipeline
from spark.errors import DataError
from spark.nn.transformer import Transformer, compute_dtype
from spark.training import loss, optimizer, sharding
from spark.training.guard import Guard, judge


@flax.struct.dataclass
class TrainState:
    """What a step maps to its successor: () int32 step, parameters (float32), optimizer state, and a memory of bad updates."""

    step: jax.Array
    params: dict
    opt_state: tuple
    guard: Guard


class Trainer:
    """The compiled parts of a run on a mesh: initial state, train step, eval step.

    Args:
      cfg: an ExperimentConfig with model.vocab_size filled in.
      devices: to run on; None for all.
    """

    def __init__(self, cfg, devices=None):
        self.cfg = cfg
        self.mesh = sharding.make_mesh(cfg, devices)
        platform = self.mesh.devices.flat[0].platform
        self.model = Transformer(cfg.model, compute_dtype(cfg.model, platform), platform)
        self.tx = optimizer.make_optimizer(cfg.optimizer, cfg.train.steps)
        boxed = jax.eval_shape(self._init, jax.random.key(0))
        self.state_shardings = sharding.shardings(self.mesh, boxed)
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), meta.unbox(boxed), self.state_shardings
        )
        self.n_params = sum(x.size for x in jax.tree.leaves(self.abstract_state.params))
        self._rows = sharding.batch_sharding(self.mesh)
        # Are bad updates left out? That makes XLA sum gradients over slices in float32, a quarter more bytes on the slow network,
        # so there it is spared if none may be: the run stops all the same, before a bad state is saved.
        self.guarded = cfg.train.max_skips > 0 or cfg.mesh.slices == 1
        self.train_step = jax.jit(
            self._train_step,
            in_shardings=(self.state_shardings, self._rows),
            out_shardings=(self.state_shardings, None),
            donate_argnums=0,
        )
        self.eval_step = jax.jit(
            lambda params, batch: loss.forward(self.model, params, batch, pieces=cfg.train.loss_pieces),
            in_shardings=(self.state_shardings.params, self._rows),
        )

    @contextlib.contextmanager
    def context(self):
        """Everything is traced and run inside this: the mesh, and the table of logical axes."""
        with jax.set_mesh(self.mesh), sharding.logical_rules():
            yield

    def init_state(self, seed):
        """The state at step 0, born sharded."""
        init = jax.jit(lambda key: meta.unbox(self._init(key)), out_shardings=self.state_shardings)
        return init(jax.random.key(seed))

    def put(self, batch):
        """A batch as global arrays, of which each device gets its part."""
        put = lambda x: jax.make_array_from_callback(x.shape, self._rows, lambda part: x[part])
        return {name: put(x) for name, x in batch.items() if name != pipeline.HASH}

    def abstract_batch(self):
        """Shapes, dtypes and shardings of a batch, for compiling ahead of time."""
        shape = (self.cfg.data.batch_size, self.cfg.data.seq_len)
        one = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._rows)
        return dict.fromkeys(('tokens', 'targets', 'positions', 'segments', 'bytes'), one)

    def _init(self, key):
        token = jnp.zeros((1, 1), jnp.int32)
        params = self.model.init(key, token, token, token)
        return TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(params), Guard.new())

    def _train_step(self, state, batch):
        cfg = self.cfg

        def objective(params, rows):
            sums = loss.forward(self.model, params, rows, pieces=cfg.train.loss_pieces, count=cfg.train.activity)
            return sums['nll'] + cfg.optimizer.z_loss * sums['log_z2'], sums

        gradient = jax.grad(objective, has_aux=True)
        n = cfg.train.accumulate
        if n == 1:
            grads, sums = gradient(state.params, batch)
        else:
            # Every device keeps its rows: microbatch i takes each n-th row.
            cut = lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
            micro = jax.tree.map(cut, batch)
            first = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], micro))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
            add = lambda total, rows: (jax.tree.map(jnp.add, total, gradient(state.params, rows)), None)
            (grads, sums), _ = jax.lax.scan(add, zero, micro)
        grads = jax.tree.map(lambda g: g / sums['tokens'], grads)
        norm = optax.tree.norm(grads)
        good, guard = judge(cfg.train, state.guard, sums['nll'] + cfg.optimizer.z_loss * sums['log_z2'], norm)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        before, after = (state.params, state.opt_state), (optax.apply_updates(state.params, updates), opt_state)
        # A select, since 0 · NaN is NaN.
        if self.guarded:
            after = jax.tree.map(lambda old, new: jnp.where(good, new, old), before, after)
        params, opt_state = after
        sums |= {'grad_norm': norm, 'left_out': guard.left_out, 'in_a_row': guard.in_a_row}
        return TrainState(state.step + 1, params, opt_state, guard), sums


def evaluate(trainer, params, dataset, label='eval', limit=0, stop=lambda: False):
    """`loss.per_token` over a dataset of batches, or the first `limit` of them if that is not 0; summed in float64.

    None if `stop()`, asked before each batch, says so.
    """
    with contextlib.closing(iter(dataset)) as batches:
        shown = tqdm(itertools.islice(batches, limit or None), desc=label, leave=False, disable=jax.process_index() != 0)
        results = []
        for batch in shown:
            if stop():
                return None
            results.append(trainer.eval_step(params, trainer.put(batch)))
    if not results:
        raise DataError(f'{label}: no batches to evaluate on')
    sums = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *jax.device_get(results))
    return loss.per_token(trainer.cfg.model, sums) | {'tokens': int(sums['tokens']), 'bytes': int(sums['bytes'])}
