"""One HTML file to browse a layer's neurons: how often each is active, which text activates it most, which tokens it promotes."""

import base64
import contextlib
import functools
import json
import pathlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spark.config import ModelConfig
from spark.data import rows
from spark.evaluation.evaluate import Model
from spark.nn.ffn import FFN
from spark.nn.layers import CARRIED
from spark.nn.runs import place
from spark.nn.transformer import Transformer, observable
from spark.progress import tqdm
from spark.runtime import Path

CONTEXTS = 5  # per neuron, each from another row of text
AROUND = 16  # tokens shown before and after the strongest activation
PROMOTED = 8  # output tokens per neuron


def collect(model: Model, split: str, layer: int) -> dict[str, np.ndarray]:
    """The strongest activations of each of the F neurons of a layer on a split.

    'fired' (F): tokens with a positive activation σ1(s); 'tokens' (): all tokens;
    'value' (F, CONTEXTS): the largest activations, one per row of text, descending; ≤ 0 if there are fewer;
    'window' (F, CONTEXTS, 2 · AROUND + 1): the activations around them; 'ids': the token ids there, −1 outside the document.
    """
    trainer = model.trainer
    F, W = model.cfg.model.per_layer[layer].ffn.d_ff, 2 * AROUND + 1
    best = {
        'value': np.zeros((F, CONTEXTS), np.float32),
        'window': np.zeros((F, CONTEXTS, W), np.float32),
        'ids': np.full((F, CONTEXTS, W), -1, np.int32),
        'fired': np.zeros(F, np.int32),
        'tokens': np.zeros((), np.int32),
    }
    replicated = NamedSharding(trainer.mesh, PartitionSpec())
    update = jax.jit(functools.partial(_update, trainer.model, layer), donate_argnums=2, out_shardings=replicated)
    best = jax.device_put(best, replicated)
    dataset = rows.EvalBatches(model.cfg.data, split, trainer.local_rows)
    with trainer.context(), contextlib.closing(iter(dataset)) as batches:
        for batch in tqdm(batches, desc=f'neurons of layer {layer}', total=len(dataset), unit='batch', leave=False):
            best = update(model.params, trainer.put(batch), best)
    best = jax.device_get(best)
    return best


def _update(model, layer, params, batch, best):
    """`best` of `collect` with the rows of one more batch."""
    real_BxL = batch['segments'] > 0
    a_BxLxF = jnp.where(real_BxL[..., None], activations(model, params, batch, layer), 0)
    candidates = {name: jnp.concatenate([best[name], x_FxBx], axis=1) for name, x_FxBx in _strongest(a_BxLxF, batch).items()}
    _, order = jax.lax.top_k(candidates['value'], CONTEXTS)
    pick = lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
    counts = {'fired': best['fired'] + jnp.sum(a_BxLxF > 0, axis=(0, 1)), 'tokens': best['tokens'] + jnp.sum(real_BxL)}
    return {name: pick(x) for name, x in candidates.items()} | counts


def _strongest(a_BxLxF, batch):
    """The largest activation of each neuron in each row, and a window around it: 'value' (F, B), 'window', 'ids' (F, B, W)."""
    B, L, F = a_BxLxF.shape
    peak_BxF = jnp.argmax(a_BxLxF, axis=1)
    index_BxFxW = peak_BxF[..., None] + jnp.arange(-AROUND, AROUND + 1)
    inside_BxFxW = (index_BxFxW >= 0) & (index_BxFxW < L)
    index_BxFxW = jnp.where(inside_BxFxW, index_BxFxW, 0)
    rows = jnp.arange(B)[:, None, None]
    segments_BxFxW = batch['segments'][rows, index_BxFxW]
    inside_BxFxW &= segments_BxFxW == segments_BxFxW[..., AROUND, None]  # only the document of the peak
    window_BxFxW = jnp.where(inside_BxFxW, a_BxLxF[rows, index_BxFxW, jnp.arange(F)[:, None]], 0)
    ids_BxFxW = jnp.where(inside_BxFxW, batch['tokens'][rows, index_BxFxW], -1)
    return {'value': jnp.max(a_BxLxF, axis=1).T, 'window': window_BxFxW.swapaxes(0, 1), 'ids': ids_BxFxW.swapaxes(0, 1)}


def activations(model: Transformer, params: dict, batch: dict, layer: int) -> jax.Array:
    """The activations σ1(s) of a layer's neurons, (B, L, F). Those of no other layer are kept."""
    run, group, i = place(model.cfg, layer)
    name, (B, L), F = f'ffn_{i}', batch['tokens'].shape, run.layers[i].ffn.d_ff

    def interceptor(method, args, kwargs, context):
        out, module = method(*args, **kwargs), context.module
        if context.method_name == 'activate' and isinstance(module, FFN) and module.has_variable(CARRIED, 'group'):
            here, kept = module.get_variable(CARRIED, 'group'), module.get_variable(CARRIED, 'activations')
            module.put_variable(CARRIED, 'group', here + 1)
            module.put_variable(CARRIED, 'activations', jnp.where(here == group, out.reshape(B, L, F), kept))
        return out

    start = {'group': jnp.zeros((), jnp.int32), 'activations': jnp.zeros((B, L, F), model.dtype)}
    variables = params | {CARRIED: {run.name: {name: start}}}
    with nn.intercept_methods(interceptor):
        _, state = observable(model).apply(variables, batch['tokens'], batch['positions'], batch['segments'], mutable=[CARRIED])
    return state[CARRIED][run.name][name]['activations']


def promoted(cfg: ModelConfig, params: dict, layer: int) -> jax.Array:
    """(F, PROMOTED) ids of the tokens whose logits each neuron's row of V raises most, if nothing else reached the output.

    The row is scaled by the norms between it and the output embedding. Their division by the rms is left out: it does not
    change the order of tokens.
    """
    p = params['params']
    run, group, i = place(cfg, layer)
    V_FxD = p[run.name][f'ffn_{i}']['V'][group]
    scale_D = (1 + p[run.name][f'post_ffn_{i}']['scale'][group]) * (1 + p['final_norm']['scale'])
    return jax.lax.top_k((V_FxD * scale_D) @ p['embedding'].T, PROMOTED)[1]


def pieces(tokenizer: object, ids: Sequence[int]) -> list[str]:
    """The text of each token; they concatenate to the text of all. A character of several tokens belongs to the last."""
    texts, before = [], ''
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        whole = i == len(ids) - 1 or not text.endswith('\ufffd')
        texts.append(text[len(before) :] if whole else '')
        before = text if whole else before
    return texts


def write(model: Model, split: str, layer: int, path: Path, picture: Path | None = None) -> Path:
    """Writes the page of a layer and returns its path; `picture`, a PNG of the activity by layer, is embedded."""
    best = collect(model, split, layer)
    cfg, tokenizer = model.cfg.model, model.tokenizer
    ffn = cfg.per_layer[layer].ffn
    with model.trainer.context():
        promoted_FxP = np.asarray(jax.jit(functools.partial(promoted, cfg, layer=layer))(model.params))
    word = functools.cache(lambda i: tokenizer.decode([i]) or f'⟨{i}⟩')
    neurons = []
    for f in tqdm(range(ffn.d_ff), desc='writing', unit='neuron', leave=False):
        contexts = zip(best['value'][f], best['window'][f], best['ids'][f], strict=True)
        neurons.append({
            'neuron': f, 'fires': float(best['fired'][f] / best['tokens']), 'max': round(float(best['value'][f, 0]), 3),
            'promotes': [word(int(i)) for i in promoted_FxP[f]],
            'contexts': [_context(tokenizer, *context) for context in contexts if context[0] > 0],
        })  # fmt: skip
    facts = {
        'layer': layer, 'step': model.step, 'split': split, 'tokens': int(best['tokens']), 'd_ff': ffn.d_ff,
        'k': ffn.k, 'kind': ffn.kind, 'n_layers': cfg.n_layers,
    }  # fmt: skip
    data = json.dumps({'facts': facts, 'neurons': neurons}, ensure_ascii=False, separators=(',', ':'))
    page = pathlib.Path(__file__).with_name('neurons.html').read_text('utf-8')
    # Escaped so that no text can end the script element.
    page = page.replace('"DATA"', data.replace('<', '\\u003c'))
    page = page.replace('PICTURE', f'data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}' if picture else '')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page.encode())
    return path


def _context(tokenizer, value, window, ids):
    """One context as the page reads it: the texts of its tokens, how strongly each is shaded, and the index of the peak."""
    inside = ids >= 0
    return {
        'value': round(float(value), 3),
        'text': pieces(tokenizer, [int(t) for t in ids[inside]]),
        'shade': [round(float(a / value), 2) if a > 0 else 0 for a in window[inside]],
        'at': int(inside[:AROUND].sum()),
    }
