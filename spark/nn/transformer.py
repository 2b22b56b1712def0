"""A decoder with Gemma-2's block (arXiv 2408.00118), dense or Spark by its config."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from spark.config import ModelConfig
from spark.nn.attention import Attention, visible_to
from spark.nn.block import Hidden, Integers, block, embed, logits
from spark.nn.ffn import FFN
from spark.nn.layers import CARRIED, METRICS, RMSNorm, by_token
from spark.nn.runs import ks, runs, scheduled
from spark.ops.topk import THRESHOLD

STEP = 'step'  # the collection of the one variable of that name

# What the forward pass saves for the backward pass; the rest is recomputed. Thresholds are always saved: they are one number per
# token or query, and recomputing them takes a pass over all scores.
_policies = jax.checkpoint_policies
_thresholds = _policies.save_only_these_names(THRESHOLD)
REMAT = {  # 'none' saves everything
    'full': _thresholds,
    'dots': _policies.save_from_both_policies(_policies.dots_saveable, _thresholds),
    # as 'dots', without the scores of attention:
    'dots_no_batch': _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _thresholds),
}


class Group(nn.Module):
    """The layers of one `pattern`, each with its own config."""

    layers: tuple[ModelConfig, ...]
    dtype: DTypeLike
    platform: str

    @nn.compact
    def __call__(self, x_BxLxD: Hidden, positions_BxL: Integers, visible: list, ks: list):
        """`visible` and `ks` are by place; of the k of both halves, None is that of the config."""
        for i, cfg in enumerate(self.layers):
            norm = lambda name, x, i=i: RMSNorm(name=f'{name}_{i}')(x)
            attention = Attention(cfg.attention, self.dtype, self.platform, name=f'attention_{i}')
            ffn = FFN(cfg.ffn, self.dtype, self.platform, name=f'ffn_{i}')
            attend = lambda x, f=attention, i=i: f(x, positions_BxL, visible[i], ks[i]['attention'])
            x_BxLxD = block(x_BxLxD, norm, attend, lambda x, f=ffn, i=i: f(x, ks[i]['ffn']))
            x_BxLxD = nn.with_logical_constraint(x_BxLxD, ('batch', 'length', None))
        return x_BxLxD, None


class Transformer(nn.Module):
    """Tokens to hidden states (`__call__`), hidden states to logits (`logits`); the embedding is tied.

    The two are separate so that the loss can compute the logits of a part of the vocabulary at a time. Layers are scanned in
    groups of one `pattern`, so a deep model compiles as fast as a shallow one; where their structure changes, another scan begins
    (`nn/runs.py`). Parameters are float32; the computation is in `dtype`, by the kernels of `platform` ('cpu', 'gpu', 'tpu').
    Where k follows a schedule, the variables are those of `with_step`.
    """

    cfg: ModelConfig
    dtype: DTypeLike = jnp.float32
    platform: str = 'cpu'

    def setup(self):
        cfg = self.cfg
        init = nn.with_logical_partitioning(nn.initializers.normal(cfg.d_model**-0.5), ('vocab', 'embed'))
        self.embedding = self.param('embedding', init, (cfg.vocab_size, cfg.d_model), jnp.float32)
        for run in runs(cfg):
            scan = nn.scan(
                Group if cfg.remat == 'none' else nn.remat(Group, policy=REMAT[cfg.remat], prevent_cse=False),
                length=run.length,
                variable_axes={'params': 0, METRICS: 0},
                variable_carry=CARRIED,
                split_rngs={'params': True},
                in_axes=(nn.broadcast, nn.broadcast, 0),
                metadata_params={nn.PARTITION_NAME: 'layers'},
            )
            setattr(self, run.name, scan(run.layers, self.dtype, self.platform))
        self.final_norm = RMSNorm(width(cfg) ** -0.5 - 1)  # muP: wider models begin with smaller logits; by_path.py has the rates

    def __call__(self, tokens_BxL: Integers, positions_BxL: Integers, segments_BxL: Integers) -> Hidden:
        """Hidden states after the final norm.

        Positions count from the beginning of a document. A token sees only tokens of its own segment: documents packed into a row
        have different segments, padding has segment 0. With `documents = 'joined'` both are ignored: the row is one document.
        """
        if self.cfg.attention.documents == 'joined':
            segments_BxL = jnp.minimum(segments_BxL, 1)
            positions_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
        # The lookup runs where the shards of the embedding are, and its result then moves to the rows' devices; the gradient goes
        # the opposite way. Without these constraints the partitioner all-gathers the tokens of all replicas for the gradient.
        shard = nn.with_logical_constraint
        tokens = shard(tokens_BxL, ('replicas', None))
        x_BxLxD = shard(jnp.take(self.embedding, tokens, axis=0).astype(self.dtype), ('replicas', None, 'embed'))
        x_BxLxD = shard(embed(x_BxLxD, self.dtype), ('batch', 'length', None))
        rows = positions_BxL, segments_BxL, self.dtype, self.platform
        visible = functools.cache(lambda *lookup: visible_to(*lookup, *rows))  # one mask for all layers that see alike
        k_of = self._ks()
        for run in runs(self.cfg):
            seen, own = [], []
            for i, (layer, varies) in enumerate(zip(run.layers, run.varies, strict=True)):
                seen.append(visible(layer.attention, self.cfg.windows[i], varies['attention']))
                own.append({half: k_of[half][run.where(i)] if array else None for half, array in varies.items()})
            x_BxLxD, _ = getattr(self, run.name)(x_BxLxD, positions_BxL, seen, own)
        return self.final_norm(x_BxLxD)

    def _ks(self):
        """{half: the k of each layer}."""
        step = 0 if self.is_initializing() else self.get_variable(STEP, 'step')
        return {half: jnp.asarray(ks(self.cfg, half, step)) for half in ('ffn', 'attention')}

    def logits(self, x_BxLxD: Hidden, E_VxD: Float[Array, 'V D'] | None = None) -> Float[Array, 'B L V']:
        """Float32 logits of hidden states, for the whole vocabulary or for some rows of the embedding."""
        B, L, _ = x_BxLxD.shape
        E_VxD = (self.embedding if E_VxD is None else E_VxD).astype(self.dtype)

        def unembed(x_BxLxD):
            y_BxLxV = jnp.matmul(by_token(x_BxLxD), E_VxD.T, preferred_element_type=jnp.float32).reshape(B, L, -1)
            return nn.with_logical_constraint(y_BxLxV, ('batch', 'length', 'vocab'))

        return logits(x_BxLxD, unembed, self.cfg.logit_cap)


def width(cfg: ModelConfig) -> float:
    """How many times wider than its base width a model is."""
    return cfg.d_model / cfg.base_width if cfg.base_width else 1.0


def abstract_params(cfg: ModelConfig) -> dict:
    """The shapes of a Transformer's parameters, as `init` returns them, without memory for them."""
    token = jnp.zeros((1, 1), jnp.int32)
    init = Transformer(with_impl(cfg, ffn='auto', attention='auto')).init  # kernels that this machine lacks change no parameter
    return meta.unbox(jax.eval_shape(init, jax.random.key(0), token, token, token))


def with_step(cfg: ModelConfig, params: dict, step: Any) -> dict:
    """The variables of a model in update `step`, of which 1 is the first; a checkpoint has the number of its last one.

    Where no k follows a schedule these are `params`, without a step. The leaves may be of any kind, such as shardings.
    """
    return params | {STEP: {'step': step}} if scheduled(cfg) else params


def by_layer(cfg: ModelConfig, metrics: dict, half: str, name: str) -> Shaped[Array, 'n_layers ...']:
    """What `half` ('ffn' or 'attention') of each layer sowed as `name`, in the order of the layers.

    `metrics` is the METRICS collection of `Transformer.apply(…, mutable=[METRICS])`. Layers that sowed nothing have zeros, and
    zeros fill up what others have more of.
    """
    found = [(run, [metrics[run.name].get(f'{half}_{i}', {}).get(name) for i in range(len(run.layers))]) for run in runs(cfg)]
    shape = tuple(map(max, zip(*(x.shape[1:] for _, places in found for x in places if x is not None), strict=True)))

    def filled(x, length):
        x = jnp.zeros((length, *shape)) if x is None else x
        more = [(0, n - m) for n, m in zip((length, *shape), x.shape, strict=True)]
        return x if x.shape[1:] == shape else jnp.pad(x, more)

    # (groups, len(pattern), …) → (n_layers, …)
    stacked = [jnp.stack([filled(x, run.length) for x in places], axis=1) for run, places in found]
    return jnp.concatenate([x.reshape(x.shape[0] * x.shape[1], *shape) for x in stacked])


def activity(cfg: ModelConfig, metrics: dict) -> dict[str, Float[Array, 'n_layers B L']]:
    """Counts sown by a forward pass, per layer and token; arguments as in `by_layer`.

    'attended' counts keys, as the mean over heads. 'active' counts neurons; only models with a sparse FFN have it, in whose other
    layers every neuron is active.
    """
    attended = by_layer(cfg, metrics, 'attention', 'attended')  # (n_layers, B, kv heads, queries per kv head × L)
    n, B = attended.shape[:2]
    counts = {'attended': jnp.mean(attended.reshape(n, B, cfg.attention.n_heads, -1), axis=2)}
    dense = np.array([0 if layer.ffn.traits.sparse else layer.ffn.d_ff for layer in cfg.per_layer])
    if not dense.all():
        active = by_layer(cfg, metrics, 'ffn', 'active').reshape(counts['attended'].shape)
        counts['active'] = active + dense[:, None, None] if dense.any() else active
    return counts


def observable(model: Transformer) -> Transformer:
    """The same model, whose FFNs call `activate` with the scores of all neurons. Kernels that compute active ones only do not."""
    return model.clone(cfg=with_impl(model.cfg, ffn='masked'))


def with_impl(cfg: ModelConfig, **impl: str) -> ModelConfig:
    """`cfg` with another `impl` of some halves, by 'ffn' and 'attention': the same model, computed otherwise."""
    return cfg.model_copy(update={half: getattr(cfg, half).model_copy(update={'impl': name}) for half, name in impl.items()})


def compute_dtype(cfg: ModelConfig, platform: str) -> DTypeLike:
    """The dtype that ModelConfig.dtype stands for on a platform ('cpu', 'tpu', 'gpu')."""
    # XLA:CPU runs bfloat16 matmuls at a small fraction of its float32 speed.
    auto = jnp.float32 if platform == 'cpu' else jnp.bfloat16
    return auto if cfg.dtype == 'auto' else jnp.dtype(cfg.dtype)
