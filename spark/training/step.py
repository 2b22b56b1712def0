"""The compiled parts of a run: initial state, train step, evaluation."""

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta

from spark.checkpoints.checksums import checksum
from spark.config import ExperimentConfig, ModelConfig
from spark.errors import DataError
from spark.nn.runs import ks, scheduled
from spark.nn.transformer import Transformer, compute_dtype, width, with_step
from spark.progress import tqdm
from spark.training import by_path, loss, optimizer, sharding
from spark.training.guard import Guard, judge


@flax.struct.dataclass
class TrainState:
    """What a training step updates."""

    step: jax.Array  # int32 scalar
    params: dict  # float32
    opt_state: Any
    guard: Guard  # counts bad updates


@flax.struct.dataclass
class AveragedState(TrainState):
    """The state where optimizer.ema is set. It is another class, so that the tree without a mean is as it always was."""

    ema: dict  # a mean of the parameters after each update


class Trainer:
    """The compiled parts of a run on a mesh of some devices (None: all); model.vocab_size of the config must be filled in.

    With a `teacher` (`distillation.model_of`), a step takes its parameters, like those of `abstract_teacher`, after the batch.
    """

    def __init__(
        self, cfg: ExperimentConfig, devices: Sequence[jax.Device] | None = None, teacher: ModelConfig | None = None
    ):  # fmt: skip
        self.cfg = cfg
        self.mesh = sharding.make_mesh(cfg, devices)
        platform = self.mesh.devices.flat[0].platform
        self.model = Transformer(cfg.model, compute_dtype(cfg.model, platform), platform)
        self.schedule = optimizer.schedule(cfg.optimizer, cfg.train.steps)
        boxed = jax.eval_shape(functools.partial(_init_params, self.model), jax.random.key(0))
        self.settings = by_path.settings(cfg.optimizer, meta.unbox(boxed), width(cfg.model))
        self.tx = optimizer.make_optimizer(cfg.optimizer, cfg.train.steps, self.settings)
        state = jax.eval_shape(self._init, jax.random.key(0))
        self.abstract_state = self._split_as(boxed, state)
        self.state_shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        self.teacher, self.abstract_teacher = None, None
        if teacher:
            self.teacher = Transformer(teacher, compute_dtype(teacher, platform), platform)
            boxed = jax.eval_shape(functools.partial(_init_params, self.teacher), jax.random.key(0))
            self.abstract_teacher = self._split_as(boxed, meta.unbox(boxed))
        self.n_params = sum(x.size for x in jax.tree.leaves(self.abstract_state.params))
        self._batch_sharding = jax.NamedSharding(self.mesh, sharding.spec(('batch', 'length')))
        self.local_rows = self._held(cfg.data.batch_size)  # nothing else of a batch must be read in this process
        # Does the step skip bad updates? That makes XLA sum gradients over slices in float32, a quarter more bytes on the slow
        # network. So several slices skip only if train.max_skips asks for it; a run still stops before it saves a bad state.
        self.guarded = cfg.train.max_skips > 0 or cfg.mesh.slices == 1
        self.train_step = jax.jit(
            self._train_step,
            in_shardings=(self.state_shardings, self._batch_sharding, *self._of_teacher(lambda x: x.sharding)),
            out_shardings=(self.state_shardings, None),
            donate_argnums=0,
        )
        self.eval_step = self.eval_step_with()

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Sets the mesh and the table of logical axes. Everything must be traced and run inside."""
        with jax.set_mesh(self.mesh), sharding.logical_rules():
            yield

    def init_state(self, seed: int) -> TrainState:
        """The state at step 0; it is created sharded."""
        return jax.jit(self._init, out_shardings=self.state_shardings)(jax.random.key(seed))

    def variables(self, params: dict, step: Any) -> dict:
        """What the model and `eval_step` take: the parameters, and the step where k follows a schedule; see `with_step`."""
        return with_step(self.cfg.model, params, step)

    def eval_step_with(self, own: Callable[[dict, dict], dict] | None = None) -> jax.stages.Wrapped:
        """Evaluation of `variables` on a batch: the sums of `loss.forward`, and 'own', those that `own` returns of both."""
        return jax.jit(
            lambda variables, batch: self._eval_step(variables, batch, own),
            in_shardings=(self.variables(self.state_shardings.params, self.state_shardings.step), self._batch_sharding),
        )

    def compile_train_step(self) -> jax.stages.Compiled:
        """The train step, compiled ahead of time."""
        return self.train_step.lower(*self.abstract_inputs()).compile()

    def put(self, batch: dict, size: int = 0) -> dict[str, jax.Array]:
        """Host arrays, of all rows or of those that this process holds, as global arrays of `size` rows (0: data.batch_size)."""
        size = size or self.cfg.data.batch_size

        def put(x):
            held = np.arange(size) if len(x) == size else self._held(size)
            if len(x) != len(held):
                raise DataError(f'a batch has {len(x)} rows: want {size}, or the {len(held)} that this process holds')

            def part(index):
                rows, columns = index
                start, stop, _ = rows.indices(size)
                first = np.searchsorted(held, start)
                return x[first : first + stop - start, columns]

            return jax.make_array_from_callback((size, *x.shape[1:]), self._batch_sharding, part)

        return {name: put(x) for name, x in batch.items()}

    def _held(self, size):
        """The rows of a batch of `size` rows that the devices of this process hold."""
        index = self._batch_sharding.addressable_devices_indices_map((size, self.cfg.data.seq_len)).values()
        return np.unique(np.concatenate([np.arange(size)[rows] for rows, _ in index]))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch, for compiling ahead of time."""
        shape = (self.cfg.data.batch_size, self.cfg.data.seq_len)
        one = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._batch_sharding)
        return dict.fromkeys(('tokens', 'targets', 'positions', 'segments', 'bytes'), one)

    def abstract_inputs(self) -> tuple:
        """Shapes, dtypes and shardings of what a step takes."""
        return self.abstract_state, self.abstract_batch(), *self._of_teacher(lambda x: x)

    def _of_teacher(self, f):
        return [jax.tree.map(f, self.abstract_teacher)] if self.teacher else []

    def _split_as(self, boxed, tree):
        """A tree of shapes with shardings, where `boxed` are parameters: see `sharding.like_params`."""
        split = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        return jax.tree.map(split, tree, sharding.like_params(self.mesh, boxed, tree))

    def _init(self, key):
        params = meta.unbox(_init_params(self.model, key))
        state = jnp.zeros((), jnp.int32), params, self.tx.init(params), Guard.new()
        return AveragedState(*state, params) if self.cfg.optimizer.ema else TrainState(*state)

    def _eval_step(self, variables, batch, own):
        def forward(rows):
            sums = loss.forward(self.model, variables, rows, pieces=self.cfg.train.loss_pieces)
            return sums | {'own': own(variables, rows)} if own else sums

        return _over_microbatches(forward, batch, self.cfg.train.accumulate)

    def _train_step(self, state, batch, taught_by=None):
        cfg, teacher = self.cfg, None
        if self.teacher:
            teacher = loss.Teacher(self.teacher, taught_by, cfg.train.kd_temperature, cfg.train.kd_top)

        def objective(params, rows):
            options = {'pieces': cfg.train.loss_pieces, 'count': cfg.train.activity, 'teacher': teacher}
            sums = loss.forward(self.model, self.variables(params, state.step + 1), rows, **options)
            return loss.objective(cfg, sums), sums

        gradient = jax.grad(objective, has_aux=True)
        grads, sums = _over_microbatches(lambda rows: gradient(state.params, rows), batch, cfg.train.accumulate)
        grads = by_path.without_frozen(self.settings, jax.tree.map(lambda g: g / sums['tokens'], grads))
        norm = optax.tree.norm(grads)
        good, guard = judge(cfg.train, state.guard, loss.objective(cfg, sums), norm)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        new = {'params': optax.apply_updates(state.params, updates), 'opt_state': opt_state}
        if cfg.optimizer.ema:
            new['ema'] = optimizer.average(cfg.optimizer.ema, state.guard.good, state.ema, new['params'])
        if self.guarded:  # a select rather than a product, since 0 · NaN is NaN
            old = {name: getattr(state, name) for name in new}
            new = jax.tree.map(lambda old, new: jnp.where(good, new, old), old, new)
        sums |= {'grad_norm': norm, 'left_out': guard.left_out, 'in_a_row': guard.in_a_row}
        for half in scheduled(cfg.model):
            has = np.array([getattr(layer, half).traits.topk for layer in cfg.model.per_layer])
            now = ks(cfg.model, half, state.step + 1)[has]
            now = jnp.minimum(now, cfg.data.seq_len) if half == 'attention' else now  # 'all' keys are those of a row
            sums['k' if half == 'ffn' else 'attention_k'] = jnp.mean(now.astype(jnp.float32))
        sums['learning_rate'] = self.schedule(state.step - state.guard.left_out)
        sums['batch_crc'] = _batch_checksum(batch['tokens'], norm)
        return state.replace(step=state.step + 1, guard=guard, **new), sums


def _init_params(model, key):
    token = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, token, token, token)


def _over_microbatches(f, batch, n):
    """The sum of f(rows) over n parts of a batch. Part i has every n-th row, so that rows stay on their devices."""
    if n == 1:
        return f(batch)
    split = lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
    parts = jax.tree.map(split, batch)
    first = jax.eval_shape(f, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(lambda total, rows: (jax.tree.map(jnp.add, total, f(rows)), None), zero, parts)[0]


def _batch_checksum(tokens_BxL, norm):
    """Identifies a batch in logs, however it is spread over devices: a uint32.

    It is summed after the norm of the gradient. On CPUs, processes run collectives that do not depend on each other in any order,
    and fail if they differ.
    """
    zero = (norm < 0).astype(jnp.uint32)
    return checksum(tokens_BxL, jnp.stack([zero, zero]), jnp.array(tokens_BxL.shape, jnp.uint32))


def evaluate(
    trainer: Trainer, params: dict, dataset: Iterable[dict], label: str = 'eval', limit: int = 0,
    stop: Callable[[], bool] = lambda: False, eval_step: jax.stages.Wrapped | None = None,
) -> dict | None:  # fmt: skip
    """`loss.per_token` of the batches of a dataset, or of the first `limit` of them (0: all), summed in float64 on the host.

    An `eval_step` of `Trainer.eval_step_with` adds the sums of one's own, per token.

    At most two batches are in flight. Returns None if `stop()`, which is called before each batch, is true.
    """
    sums, running = [], []  # `running` is still on the device
    length = operator.length_hint(dataset, limit)
    total = min(limit or length, length) or None
    bar = tqdm(total=total, desc=label, unit='batch', leave=False, disable=jax.process_index() != 0)

    def fetch():
        sums.append(jax.device_get(running.pop(0)))
        bar.update()

    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        batches = iter(dataset)
        if hasattr(batches, 'close'):
            stack.callback(batches.close)
        for batch in itertools.islice(batches, limit or None):
            if stop():
                return None
            running.append((eval_step or trainer.eval_step)(params, trainer.put(batch)))
            if len(running) == 2:
                fetch()  # waits for the batch before, while this one runs
        if not running:
            raise DataError(f'{label}: no batches to evaluate on')
        fetch()
    totals = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *sums)
    own = {name: float(x / totals['tokens']) for name, x in totals.pop('own', {}).items()}
    return loss.per_token(trainer.cfg.model, totals) | {'tokens': int(totals['tokens']), 'bytes': int(totals['bytes'])} | own
