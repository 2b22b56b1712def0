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
    n_batches, P = math.ceil(wanted(trainer) / (B * L * share)), len(cfg.pattern)
    n_groups, size = cfg.n_layers // P, 4 * cfg.d_model * (cfg.d_model + cfg.ffn.d_ff)
    at_once = max(min(SUMS // (P * size), n_groups), 1)
    firsts = range(0, n_groups, at_once)
    print(
        f'Fitting predictors: {len(firsts)} × up to {n_batches} batches, {P * at_once * size / 1e9:.2g} GB of sums a device; '
        f'then {2 * cfg.n_layers} eigendecompositions of {cfg.d_model} × {cfg.d_model}',
        flush=True,
    )
    replicated, step = NamedSharding(trainer.mesh, PartitionSpec()), adder(trainer)
    groups, tokens = [{} for _ in range(P)], 0
    with tqdm(total=cfg.n_layers, desc='fitting predictors', unit='layer', leave=False) as bar:
        for first in firsts:
            sums = jax.jit(lambda: zeros(trainer, at_once), out_shardings=replicated)()
            with contextlib.closing(iter(batches)) as rows:
                for batch in tqdm(itertools.islice(rows, n_batches), desc='text for the fit', unit='batch', leave=False):
                    sums = step(params, trainer.put(batch), np.int32(first), sums)
            if not (tokens := int(sums['ffn_0']['n'][0])):
                raise ConfigError('--fit_predictor: no row is left to fit to; want more text, or a smaller --length')
            for g in range(min(at_once, n_groups - first)):
                for i in range(P):
                    moments = {name: np.asarray(x[g], np.float64) for name, x in sums[f'ffn_{i}'].items()}
                    groups[i][first + g] = solve(moments, cfg.ffn.r)
                    bar.update()
    own = dict(params['params']['groups'])
    for i, layers in enumerate(groups):
        stacked = jax.tree.map(lambda *x: np.stack(x), *(layers[g] for g in range(n_groups)))
        own[f'ffn_{i}'] = own[f'ffn_{i}'] | {selection.FITTED: jax.device_put(stacked, replicated)}
    return params | {'params': params['params'] | {'groups': own}}, tokens


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


def zeros(trainer: Trainer, n: int) -> dict[str, dict[str, jax.Array]]:
    """Sums that `solve` takes, of n groups of layers, by the name of the FFN in a group."""
    D, F = trainer.cfg.model.d_model, trainer.cfg.model.ffn.d_ff
    shapes = {'n': (n,), 'x': (n, D), 'c': (n, F), 'xx': (n, D, D), 'xc': (n, D, F)}
    return {f'ffn_{i}': {name: jnp.zeros(shape) for name, shape in shapes.items()} for i in range(len(trainer.cfg.model.pattern))}


def adder(trainer: Trainer) -> jax.stages.Wrapped:
    """A jitted function of parameters, a batch, a group `first` and `zeros`: the sums with those of the groups from `first` on.

    The sums go through the layers as a carry, so that a device holds those of the groups in question and of no other.
    """

    def step(params, batch, first, sums):
        def interceptor(method, args, kwargs, context):
            out, module = method(*args, **kwargs), context.module
            if isinstance(module, FFN) and context.method_name == '__call__':
                group, sums = module.get_variable(CARRIED, 'group'), module.get_variable(CARRIED, 'sums')
                add = lambda sums, at, new: jax.tree.map(lambda a, b: a.at[at].add(b), sums, new)
                at, n = group - first, len(sums['n'])
                count, arrays = _of_layer(module, *args, batch['segments'])
                here = lambda sums, at, *arrays: add(sums, at, count(*arrays))
                sums = jax.lax.cond((at >= 0) & (at < n), here, lambda sums, *_: sums, sums, at, *arrays)
                module.put_variable(CARRIED, 'group', group + 1)
                module.put_variable(CARRIED, 'sums', sums)
            return out

        carried = {name: {'group': jnp.zeros((), jnp.int32), 'sums': own} for name, own in sums.items()}
        rows = batch['tokens'], batch['positions'], batch['segments']
        with nn.intercept_methods(interceptor):
            _, state = trainer.model.apply(params | {CARRIED: {'groups': carried}}, *rows, mutable=[CARRIED])
        return {name: own['sums'] for name, own in state[CARRIED]['groups'].items()}

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
