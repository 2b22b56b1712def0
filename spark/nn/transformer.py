"""A decoder with Gemma-2's block (arXiv 2408.00118), dense or Spark by its config."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from spark.config import ModelConfig
from spark.nn.attention import Attention, visible_to
from spark.nn.ffn import FFN
from spark.nn.layers import METRICS, RMSNorm, by_token, softcap
from spark.ops.topk import THRESHOLD

# What the forward pass leaves for the backward pass; the rest is computed again. Thresholds always stay: they are one number
# per token or query, and save the pass over the scores that makes them.
_policies = jax.checkpoint_policies
_thresholds = _policies.save_only_these_names(THRESHOLD)
REMAT = {
    'none': None,  # everything is kept
    'full': _thresholds,
    'dots': _policies.save_from_both_policies(_policies.dots_saveable, _thresholds),
    # … but not attention's scores:
    'dots_no_batch': _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _thresholds),
}


class Group(nn.Module):
    """One pass through `pattern`: each layer is attention, then FFN, with a norm before and after both."""

    cfg: ModelConfig
    dtype: jnp.dtype
    platform: str

    @nn.compact
    def __call__(self, x_BxLxD, positions_BxL, visible):
        for i, span in enumerate(self.cfg.pattern):
            norm = lambda name, i=i: RMSNorm(name=f'{name}_{i}')
            attention = Attention(self.cfg.attention, self.dtype, self.platform, name=f'attention_{i}')
            ffn = FFN(self.cfg.ffn, self.dtype, name=f'ffn_{i}')
            y = attention(norm('pre_attention')(x_BxLxD), positions_BxL, visible[span])
            x_BxLxD = x_BxLxD + norm('post_attention')(y)
            x_BxLxD = x_BxLxD + norm('post_ffn')(ffn(norm('pre_ffn')(x_BxLxD)))
            x_BxLxD = nn.with_logical_constraint(x_BxLxD, ('batch', 'length', None))
        return x_BxLxD, None


class Transformer(nn.Module):
    """Tokens to hidden states (`__call__`), hidden states to logits (`logits`); the embedding is tied.

    The two are apart so that the loss can compute logits a piece at a time. Layers are scanned in groups of one
    `pattern`, so a deep model compiles as fast as a shallow one. Parameters are float32, computation is in `dtype`,
    by the kernels of `platform` ('cpu', 'gpu', 'tpu').
    """

    cfg: ModelConfig
    dtype: jnp.dtype = jnp.float32
    platform: str = 'cpu'

    def setup(self):
        cfg = self.cfg
        init = nn.with_logical_partitioning(nn.initializers.normal(cfg.d_model**-0.5), ('vocab', 'embed'))
        self.embedding = self.param('embedding', init, (cfg.vocab_size, cfg.d_model), jnp.float32)
        group = Group
        if cfg.remat != 'none':
            group = nn.remat(Group, policy=REMAT[cfg.remat], prevent_cse=False)
        self.groups = nn.scan(
            group,
            length=cfg.n_layers // len(cfg.pattern),
            variable_axes={'params': 0, METRICS: 0},
            split_rngs={'params': True},
            in_axes=nn.broadcast,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )(cfg, self.dtype, self.platform)
        self.final_norm = RMSNorm()

    def __call__(self, tokens_BxL, positions_BxL, segments_BxL):
        """Hidden states (B, L, D) after the final norm.

        Args:
          tokens_BxL: int32 ids.
          positions_BxL: int32, place of each token in its document.
          segments_BxL: int32, tokens see only tokens of the same segment: documents packed into a row have different
            ones, and padding has 0. With documents 'joined' a row is one document, whatever the two say.
        """
        if self.cfg.attention.documents == 'joined':
            segments_BxL = jnp.minimum(segments_BxL, 1)
            positions_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
        # Looked up where the slices of the embedding are, and then brought to the rows: so is the gradient, the other way round,
        # where it is left to the partitioner to gather all tokens of all replicas.
        split = nn.with_logical_constraint
        tokens = split(tokens_BxL, ('replicas', None))
        x_BxLxD = split(jnp.take(self.embedding, tokens, axis=0).astype(self.dtype), ('replicas', None, 'embed'))
        x_BxLxD = x_BxLxD * jnp.asarray(self.cfg.d_model**0.5, self.dtype)
        x_BxLxD = nn.with_logical_constraint(x_BxLxD, ('batch', 'length', None))
        spans = {'local': self.cfg.attention.window, 'global': 0}
        visible = {
            span: visible_to(self.cfg.attention, window, positions_BxL, segments_BxL)
            for span, window in spans.items()
            if span in self.cfg.pattern
        }
        x_BxLxD, _ = self.groups(x_BxLxD, positions_BxL, visible)
        return self.final_norm(x_BxLxD)

    def logits(self, x_BxLxD, E_VxD=None):
        """Float32 logits (B, L, V) of hidden states, for the whole vocabulary or some rows of the embedding."""
        B, L, _ = x_BxLxD.shape
        E_VxD = (self.embedding if E_VxD is None else E_VxD).astype(self.dtype)
        y_BxLxV = jnp.matmul(by_token(x_BxLxD), E_VxD.T, preferred_element_type=jnp.float32).reshape(B, L, -1)
        return softcap(nn.with_logical_constraint(y_BxLxV, ('batch', 'length', 'vocab')), self.cfg.logit_cap)


def by_layer(cfg, metrics, half, name):
    """What `half` ('ffn' or 'attention') of each layer sowed as `name`: (n_layers, …), in the order of the layers.

    Args:
      cfg: the ModelConfig.
      metrics: the METRICS collection of `Transformer.apply(…, mutable=[METRICS])`.
      half, name: see above.
    """
    # (groups, len(pattern), …) → (n_layers, …)
    x = jnp.stack([metrics['groups'][f'{half}_{i}'][name] for i in range(len(cfg.pattern))], axis=1)
    return x.reshape(cfg.n_layers, *x.shape[2:])


def activity(cfg, metrics):
    """Counts sown by a forward pass, per layer and token; arguments as in `by_layer`.

    Returns:
      {'active': (n_layers, B, L) neurons that fired, unless kind 'gated', which has no zeros to count;
       'attended': (n_layers, B, L) keys attended, mean over the heads}.
    """
    attended = by_layer(cfg, metrics, 'attention', 'attended')  # (n_layers, B, kv heads, queries per kv head × L)
    n, B = attended.shape[:2]
    counts = {'attended': jnp.mean(attended.reshape(n, B, cfg.attention.n_heads, -1), axis=2)}
    if cfg.ffn.kind != 'gated':
        counts['active'] = by_layer(cfg, metrics, 'ffn', 'active').reshape(counts['attended'].shape)
    return counts


def compute_dtype(cfg, platform):
    """The jnp dtype of ModelConfig.dtype on a platform ('cpu', 'tpu', 'gpu')."""
    # XLA:CPU runs bfloat16 matmuls at a small fraction of its float32 speed.
    auto = jnp.float32 if platform == 'cpu' else jnp.bfloat16
    return auto if cfg.dtype == 'auto' else jnp.dtype(cfg.dtype)
