"""FLOPs per token, part by part, dense and Spark (arXiv 2506.06644, table 1), and the number of parameters.

Both halves of a layer are one lookup among n entries, so one formula gives both:

    2 · (scored width · n  +  rest width · kept  +  value width · kept)

The predictor scores all n entries; the rest of the key and the value count for kept entries only. Only matmuls are counted, a
multiply and an add each: elementwise work (norms, GELU, softmax, the threshold's 2n) is about 1 %.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from spark.config import ModelConfig, adapted

PHASES = ('training', 'prefill', 'decode')
Measured = int | float | np.number | Sequence | np.ndarray | None


def flops_per_token(
    cfg: ModelConfig, context: int, phase: str = 'decode', active: Measured = None, attended: Measured = None
) -> dict[str, float]:
    """FLOPs per token by part, summed over the layers.

    K2 and V are the rest of the key, and the values, of kept entries. 'ffn.predictor' (with a learned projection, if there is
    one; without a predictor, all of K1 or K) and 'attention.scores' score all entries, 'attention.projections' are q, k, v and
    output, and 'head' is the output head.

    Args:
      cfg: with vocab_size filled in.
      context: in 'decode' the token is the last of this many, of which a local layer sees its window; otherwise the result is
        the mean over the tokens of a document of this length.
      phase: 'training' counts forward and backward, three times the forward pass, which computes every entry of a lookup and
        masks; 'prefill' and 'decode' count kept entries only.
      active: measured neurons per token, a number or one per layer; None or NaN: k, or d_ff in a kind without top-k.
      attended: measured keys per query, a number or one per layer; None or NaN: min(k, visible keys).
    """
    if phase not in PHASES:
        raise ValueError(f'phase {phase!r}: want one of {", ".join(PHASES)}')
    D = cfg.d_model
    per_layer = lambda measured: np.broadcast_to(np.nan if measured is None else measured, cfg.n_layers)
    total = Counter()
    layers = zip(cfg.per_layer, cfg.windows, per_layer(active), per_layer(attended), strict=True)
    for layer, window, active_, attended_ in layers:
        f, a = layer.ffn, layer.attention
        positions = np.array([context]) if phase == 'decode' else np.arange(1, context + 1)
        visible = np.minimum(positions, window or context)
        keys = np.mean(visible)
        kept_keys = np.mean(np.minimum(visible, a.k)) if a.traits.topk else keys
        kept_keys = kept_keys if np.isnan(attended_) else attended_
        kept_neurons = (f.k or f.d_ff) if np.isnan(active_) else active_
        if phase == 'training':
            kept_keys, kept_neurons = keys, f.d_ff

        rest = D - f.r if f.traits.second else 0  # r is 0 without a predictor
        total['ffn.predictor'] += 2 * (f.r or D) * f.d_ff + 2 * D * f.r * f.traits.projected
        total['ffn.K2'] += 2 * rest * kept_neurons
        total['ffn.V'] += 2 * D * kept_neurons

        scored, rest = (a.r, a.head_dim - a.r) if a.traits.predictor else (a.head_dim, 0)
        total['attention.projections'] += 2 * D * a.head_dim * (2 * a.n_heads + 2 * a.n_kv_heads)
        total['attention.scores'] += 2 * a.n_heads * scored * keys
        total['attention.K2'] += 2 * a.n_heads * rest * kept_keys
        total['attention.V'] += 2 * a.n_heads * a.head_dim * kept_keys
    total['head'] = 2 * D * cfg.vocab_size
    return {part: float(n) * (3 if phase == 'training' else 1) for part, n in total.items()}


def model_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per trained token; `mfu` in metrics.jsonl and compile.py both use it.

    Counted are matmuls, as in phase 'training': all entries of a lookup, but in attention only the keys that causality and the
    window leave, the mean over one document of seq_len tokens. The tied embedding counts once, as the output head.
    Rematerialisation does not count.
    """
    return sum(flops_per_token(cfg, seq_len, 'training').values())


def group(parts: dict[str, float]) -> dict[str, float]:
    """Sums of parts: 'ffn', 'attention' (scores and values), 'projections', 'head', 'body' (all but the head), 'total'."""
    add = lambda *prefixes: sum(n for part, n in parts.items() if part.startswith(prefixes))
    projections = parts['attention.projections']
    groups = {'ffn': add('ffn'), 'attention': add('attention') - projections, 'projections': projections, 'head': parts['head']}
    return groups | {'body': add('ffn', 'attention'), 'total': add('')}


def dense_twin(cfg: ModelConfig) -> ModelConfig:
    """The ModelConfig with a gated FFN of equal parameters and dense attention."""
    d_ff = [adapted(layer.ffn, {'kind': 'gated', 'gate': ''}, cfg.d_model)['d_ff'] for layer in cfg.per_layer]
    dense = cfg.attention.model_copy(update=adapted(cfg.attention, {'kind': 'dense'}, cfg.d_model))
    layers = f'ffn.d_ff={"/".join(map(str, d_ff))}' if len(set(d_ff)) > 1 else ''
    return cfg.model_copy(update={'ffn': type(cfg.ffn)(kind='gated', d_ff=d_ff[0]), 'attention': dense, 'layers': layers})


def parameters(cfg: ModelConfig) -> int:
    """The number of parameters, the tied embedding once."""
    D, a = cfg.d_model, cfg.attention
    ffn = sum(layer.ffn.traits.parameters(D, layer.ffn.d_ff, layer.ffn.r) for layer in cfg.per_layer)
    attention = D * a.head_dim * (2 * a.n_heads + 2 * a.n_kv_heads)
    qk_norms = sum(2 * a.head_dim * layer.attention.qk_norm for layer in cfg.per_layer)
    return cfg.vocab_size * D + D + ffn + qk_norms + cfg.n_layers * (attention + 4 * D)
