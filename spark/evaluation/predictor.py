"""Linear predictors that are fitted to a trained layer's own neurons: baselines for the recall of Spark's predictor.

They predict the contributions c (see `selection`) of all neurons from the input x of the FFN, by reduced-rank regression. Of all
matrices B of rank r, the squared error E‖c − c̄ − B(x − x̄)‖² is least for the least-squares solution B* = Cov(c, x)·Cov(x)⁻¹,
truncated to the r directions in which its predictions vary most. With the inputs whitened by W = Cov(x)^−½ these are the first r
right singular vectors P of M = Cov(c, x)·W, and B = M·P·Pᵀ·W. It ranks neurons by a linear function of rank r, as Spark's
predictor does, but sees all dimensions of x instead of the first r, and the layer was not trained with it. It is best in squared
error, not in recall: another of its rank may rank better. Of rank 0 there is the mean c̄, one ranking of neurons for all tokens.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spark.errors import ConfigError
from spark.evaluation import selection
from spark.evaluation.strips import by_strips, over_devices
from spark.nn.ffn import FFN
from spark.nn.layers import CARRIED
from spark.nn.runs import Run, runs
from spark.progress import tqdm
from spark.training.step import Trainer

TOKENS_PER_DIMENSION = 100  # of d_model, for the fit
SUMS = 2 << 30  # bytes of sums that a device holds: as many layers as fit are fitted in a pass over the text


def wanted(trainer: Trainer) -> int:
    """How many tokens a fit takes, if there are so many."""
    return TOKENS_PER_DIMENSION * trainer.cfg.model.d_model


def fitted(trainer: Trainer, params: dict, batches: Iterable, share: float = 1.0) -> tuple[dict, int]:
    """(`params` with fitted predictors in each layer, where `selection.of_ffn` finds them; the number of tokens of the fit).

    It takes as many of the host batches as `wanted` asks for, once in each pass; a `share` of their tokens is not padding. Call
    it inside of `trainer.context()`.
    """
    cfg, (B, L) = trainer.cfg.model, trainer.abstract_batch()['tokens'].shape
    n_batches, D = math.ceil(wanted(trainer) / (B * L * share)), cfg.d_model
    replicated = NamedSharding(trainer.mesh, PartitionSpec())
    size = lambda run: sum(4 * D * (D + layer.ffn.d_ff) for layer in run.layers)
    at_once = {run.name: max(min(SUMS // size(run), run.length), 1) for run in runs(cfg)}
    passes = [(run, first) for run in runs(cfg) for first in range(0, run.length, at_once[run.name])]
    print(
        f'Fitting predictors: {len(passes)} × up to {n_batches} batches, '
        f'{max(size(run) * at_once[run.name] for run in runs(cfg)) / 1e9:.2g} GB of sums a device; '
        f'then {2 * cfg.n_layers} eigendecompositions of {D} × {D}',
        flush=True,
    )
    steps = {run.name: adder(trainer, run) for run in runs(cfg)}
    layers, tokens, found = {}, 0, dict(params['params'])
    with tqdm(total=cfg.n_layers, desc='fitting predictors', unit='layer', leave=False) as bar:
        for run, first in passes:
            n = at_once[run.name]
            sums = jax.jit(lambda run=run, n=n: zeros(trainer, run, n), out_shardings=replicated)()
            with contextlib.closing(iter(batches)) as rows:
                for batch in tqdm(itertools.islice(rows, n_batches), desc='text for the fit', unit='batch', leave=False):
                    sums = steps[run.name](params, trainer.put(batch), np.int32(first), sums)
            if not (tokens := int(sums['ffn_0']['n'][0])):
                raise ConfigError('--fit_predictor: no row is left to fit to; want more text, or a smaller --length')
            for g in range(min(n, run.length - first)):
                for i, layer in enumerate(run.layers):
                    moments = {name: np.asarray(x[g], np.float64) for name, x in sums[f'ffn_{i}'].items()}
                    layers.setdefault((run.name, f'ffn_{i}'), []).append(solve(moments, layer.ffn.r))
                    bar.update()
    for (run, ffn), own in layers.items():
        stacked = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *own), replicated)
        found[run] = found[run] | {ffn: found[run][ffn] | {selection.FITTED: stacked}}
    return params | {'params': found}, tokens


def solve(moments: dict[str, np.ndarray | float], r: int) -> dict[str, np.ndarray]:
    """{'constant' (F), 'down' (D, r), 'up' (r, F), 'mean' (F)}, from n, Σx, Σc, Σxᵀx (D, D) and Σxᵀc (D, F).

    c ≈ constant + x·down·up; without an input, c ≈ mean.
    """
    n, x_D, c_F = moments['n'], moments['x'] / moments['n'], moments['c'] / moments['n']
    values, Q = np.linalg.eigh(moments['xx'] / n - np.outer(x_D, x_D))
    seen = values > 1e-6 * values[-1]  # a direction in which the inputs do not vary predicts nothing
    whiten_DxE = Q[:, seen] / np.sqrt(values[seen])
    M_ExF = whiten_DxE.T @ (moments['xc'] / n - np.outer(x_D, c_F))
    _, P = np.linalg.eigh(M_ExF @ M_ExF.T)
    P_Exr = P[:, ::-1][:, :r]
    down, up = whiten_DxE @ P_Exr, P_Exr.T @ M_ExF
    found = {'constant': c_F - x_D @ down @ up, 'down': down, 'up': up, 'mean': c_F}
    return {name: x.astype(np.float32) for name, x in found.items()}


def zeros(trainer: Trainer, run: Run, n: int) -> dict[str, dict[str, jax.Array]]:
    """Sums that `solve` takes, of n groups of a run of layers, by the name of the FFN in a group."""
    D, found = trainer.cfg.model.d_model, {}
    for i, layer in enumerate(run.layers):
        F = layer.ffn.d_ff
        shapes = {'n': (n,), 'x': (n, D), 'c': (n, F), 'xx': (n, D, D), 'xc': (n, D, F)}
        found[f'ffn_{i}'] = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return found


def adder(trainer: Trainer, run: Run) -> jax.stages.Wrapped:
    """A jitted function of parameters, a batch, a group `first` and `zeros`: the sums with those of the run's groups from it on.

    The sums go through the layers as a carry, so that a device holds those of the groups in question and of no other.
    """

    def step(params, batch, first, sums):
        def interceptor(method, args, kwargs, context):
            out, module = method(*args, **kwargs), context.module
            mine = isinstance(module, FFN) and context.method_name == '__call__' and module.has_variable(CARRIED, 'group')
            if mine:
                group, sums = module.get_variable(CARRIED, 'group'), module.get_variable(CARRIED, 'sums')
                add = lambda sums, at, new: jax.tree.map(lambda a, b: a.at[at].add(b), sums, new)
                at, n = group - first, len(sums['n'])
                count, arrays = _of_layer(module, args[0], batch['segments'])
                here = lambda sums, at, *arrays: add(sums, at, count(*arrays))
                sums = jax.lax.cond((at >= 0) & (at < n), here, lambda sums, *_: sums, sums, at, *arrays)
                module.put_variable(CARRIED, 'group', group + 1)
                module.put_variable(CARRIED, 'sums', sums)
            return out

        carried = {name: {'group': jnp.zeros((), jnp.int32), 'sums': own} for name, own in sums.items()}
        rows = batch['tokens'], batch['positions'], batch['segments']
        with nn.intercept_methods(interceptor):
            _, state = trainer.model.apply(params | {CARRIED: {run.name: carried}}, *rows, mutable=[CARRIED])
        return {name: own['sums'] for name, own in state[CARRIED][run.name].items()}

    return jax.jit(step, out_shardings=NamedSharding(trainer.mesh, PartitionSpec()), donate_argnums=3)


def _of_layer(module, x_BxLxD, segments_BxL):
    """(f, arrays): f(*arrays) are the sums over the tokens of a batch."""
    K, norms_F = selection.tables_of(module)

    def count(x_BxLxD, segments_BxL, norms_F, *keys):
        x_TxD, segments_T = x_BxLxD.reshape(-1, x_BxLxD.shape[-1]), segments_BxL.reshape(-1)

        def strip(rows, own):
            real = (own & (rows(segments_T) > 0)).astype(jnp.float32)
            x, named = rows(x_TxD), dict(zip(K, keys, strict=True))
            c = selection.contributions(module.cfg, named, norms_F, x, selection.predicted(module.cfg, named, x)) * real[:, None]
            x = x.astype(jnp.float32) * real[:, None]
            return {'n': jnp.sum(real), 'x': jnp.sum(x, axis=0), 'c': jnp.sum(c, axis=0), 'xx': x.T @ x, 'xc': x.T @ c}

        return by_strips(strip, len(x_TxD), module.cfg.d_ff)

    tokens, tables = ('batch', 'length'), (norms_F, *K.values())
    axes = tokens, tokens, *[()] * len(tables)
    return lambda *arrays: over_devices(count, arrays, axes), (x_BxLxD, segments_BxL, *tables)
