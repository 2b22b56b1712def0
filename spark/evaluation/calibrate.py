"""The k at which a trained model really keeps a share of its neurons, for comparisons at equal measured activity."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from spark.errors import ConfigError
from spark.nn.ffn import FFN, activations
from spark.nn.layers import METRICS, sow
from spark.nn.transformer import activity, observable
from spark.progress import tqdm
from spark.training.step import Trainer


def k_measured(trainer: Trainer, params: dict, batch: dict, share: float) -> tuple[int, float]:
    """(The k whose measured activity, the mean over a host batch's layers and tokens, is nearest to `share`; that activity).

    A statistical top-k keeps k of Gaussian scores only, and another number of others. It is found by bisection: activity grows
    with k, and one compiled program takes any k. Call it inside of `trainer.context()`.
    """
    cfg = trainer.cfg.model.ffn
    if not cfg.traits.topk or cfg.topk != 'statistical':
        raise ConfigError(f"model.ffn.topk = {cfg.topk!r}, kind {cfg.kind!r}: want a statistical top-k; others keep k itself")
    if trainer.cfg.model.layers:
        raise ConfigError(f'model.layers = {trainer.cfg.model.layers!r}: want layers that are alike, since one k is looked for')
    if not 1 / cfg.d_ff <= share <= 1:
        raise ConfigError(f'a share of {share} of the neurons: want 1 / d_ff = {1 / cfg.d_ff:.2g} … 1')
    model, batch = observable(trainer.model), trainer.put(batch)

    @jax.jit
    def measured(params, batch, k):
        def interceptor(method, args, kwargs, context):
            if not (isinstance(context.module, FFN) and context.method_name == 'activate'):
                return method(*args, **kwargs)
            a, active = activations(cfg, *args, k=k)
            sow(context.module, 'active', jnp.sum(active, axis=-1, dtype=jnp.float32))
            return a

        with nn.intercept_methods(interceptor):
            rows = batch['tokens'], batch['positions'], batch['segments']
            _, state = model.apply(params, *rows, mutable=[METRICS])
        real = batch['segments'] > 0
        return jnp.sum(activity(model.cfg, state[METRICS])['active'] * real) / jnp.sum(real) / model.cfg.n_layers

    found = lambda k: float(measured(params, batch, jnp.float32(k))) / cfg.d_ff
    low, high = cfg.groups, cfg.d_ff
    with tqdm(total=(high - low).bit_length(), desc='k', leave=False) as bar:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if found(middle) < share else (low, middle)
            bar.update()
    return min(((k, found(k)) for k in (low, high)), key=lambda pair: abs(pair[1] - share))
