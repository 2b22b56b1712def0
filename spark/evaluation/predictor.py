"""The best linear predictor of rank r, fitted to a trained layer's own neurons: a baseline for the recall of Spark's predictor.

It predicts the contributions c (see `selection`) of all neurons from the input x of the FFN, by reduced-rank regression. Of all
matrices B of rank r, the squared error E‖c − c̄ − B(x − x̄)‖² is least for the least-squares solution B* = Cov(c, x)·Cov(x)⁻¹,
truncated to the r directions in which its predictions vary most. With the inputs whitened by W = Cov(x)^−½ these are the first r
right singular vectors P of M = Cov(c, x)·W, and B = M·P·Pᵀ·W. It ranks neurons by a linear function of rank r, as Spark's
predictor does, but sees all dimensions of x instead of the first r, and the layer was not trained with it.
"""

import functools
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spark.evaluation import selection
from spark.evaluation.strips import by_strips, over_devices
from spark.nn.ffn import FFN
from spark.nn.layers import METRICS, sow
from spark.nn.runs import runs
from spark.nn.transformer import Transformer, by_layer
from spark.training.step import Trainer

TOKENS_PER_DIMENSION = 100  # of d_model, for the fit


def fitted(trainer: Trainer, params: dict, batches: Iterable) -> dict:
    """`params` with a fitted predictor in each layer, where `selection.of_ffn` finds it. Call it inside of `trainer.context()`.

    It is fitted to as many of the host batches as TOKENS_PER_DIMENSION ask for.
    """
    cfg, total = trainer.cfg.model, None
    replicated = NamedSharding(trainer.mesh, PartitionSpec())
    step = jax.jit(functools.partial(_moments, trainer.model), out_shardings=replicated)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    for batch in batches:
        sums = step(params, trainer.put(batch))
        total = sums if total is None else add(total, sums)
        if total['n'][0] >= TOKENS_PER_DIMENSION * cfg.d_model:
            break
    layers, found = [], dict(params['params'])
    for i, layer in enumerate(cfg.per_layer):
        F = layer.ffn.d_ff  # zeros fill up what is by neuron
        of_neurons = lambda name, x, F=F: x[..., :F] if name in ('c', 'xc') else x
        moments = {name: np.asarray(of_neurons(name, x[i]), np.float64) for name, x in total.items()}
        layers.append(solve(moments, layer.ffn.r))
    for run in runs(cfg):
        groups = dict(found[run.name])
        for i in range(len(run.layers)):
            own = jax.tree.map(lambda *x: np.stack(x), *layers[run.where(i)])
            groups[f'ffn_{i}'] = groups[f'ffn_{i}'] | {selection.FITTED: jax.device_put(own, replicated)}
        found[run.name] = groups
    return params | {'params': found}


def solve(moments: dict[str, np.ndarray | float], r: int) -> dict[str, np.ndarray]:
    """{'constant' (F), 'down' (D, r), 'up' (r, F)}: c ≈ constant + x·down·up, from n, Σx, Σc, Σxᵀx (D, D) and Σxᵀc (D, F)."""
    n, x_D, c_F = moments['n'], moments['x'] / moments['n'], moments['c'] / moments['n']
    values, Q = np.linalg.eigh(moments['xx'] / n - np.outer(x_D, x_D))
    seen = values > 1e-6 * values[-1]  # a direction in which the inputs do not vary predicts nothing
    whiten_DxE = Q[:, seen] / np.sqrt(values[seen])
    M_ExF = whiten_DxE.T @ (moments['xc'] / n - np.outer(x_D, c_F))
    _, P = np.linalg.eigh(M_ExF @ M_ExF.T)
    P_Exr = P[:, ::-1][:, :r]
    down, up = whiten_DxE @ P_Exr, P_Exr.T @ M_ExF
    found = {'constant': c_F - x_D @ down @ up, 'down': down, 'up': up}
    return {name: x.astype(np.float32) for name, x in found.items()}


def _moments(model: Transformer, params: dict, batch: dict) -> dict[str, jax.Array]:
    """The sums over a batch that `solve` takes, by layer."""

    def interceptor(method, args, kwargs, context):
        out, module = method(*args, **kwargs), context.module
        if isinstance(module, FFN) and context.method_name == '__call__':
            for name, x in _of_layer(module, args[0], batch['segments']).items():
                sow(module, f'fit_{name}', x)
        return out

    with nn.intercept_methods(interceptor):
        rows = batch['tokens'], batch['positions'], batch['segments']
        _, state = model.apply(params, *rows, mutable=[METRICS])
    return {name: by_layer(model.cfg, state[METRICS], 'ffn', f'fit_{name}') for name in ('n', 'x', 'c', 'xx', 'xc')}


def _of_layer(module, x_BxLxD, segments_BxL):
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
    return over_devices(count, (x_BxLxD, segments_BxL, *tables), (tokens, tokens, *[()] * len(tables)))
