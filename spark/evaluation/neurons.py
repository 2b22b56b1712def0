"""A page to browse what the neurons of one layer mean: how often each fires, the text that drives it hardest, what it promotes.

One self-contained HTML file: no server, no network.
"""

import base64
import contextlib
import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from spark.data import pipeline
from spark.errors import DataError
from spark.nn.ffn import FFN
from spark.nn.layers import METRICS, sow
from spark.nn.transformer import by_layer

CONTEXTS = 5  # per neuron, each from another row of text
AROUND = 16  # tokens shown before and after the one that drives the neuron most
PROMOTED = 8  # output tokens per neuron


def collect(model, split, layer):
    """What drives the neurons of a layer on a split.

    Args:
      model: an `evaluate.Model`.
      split: 'train', 'validation' or 'test'.
      layer: its number.

    Returns:
      A dict of numpy arrays, F neurons: 'fired' (F): tokens with a positive activation σ1(s); 'tokens': how many there were;
      'value' (F, CONTEXTS): the largest activation of a row of text, descending, ≤ 0 where there is none; 'window'
      (F, CONTEXTS, 2 · AROUND + 1): the activations around it; 'ids': the same of token ids, −1 outside of the document.
    """
    cfg, trainer = model.cfg, model.trainer
    F, W = cfg.model.ffn.d_ff, 2 * AROUND + 1
    everywhere = NamedSharding(trainer.mesh, PartitionSpec())

    @functools.partial(jax.jit, donate_argnums=2, out_shardings=everywhere)
    def step(params, batch, best):
        a_BxLxF = activations(trainer.model, params, batch, layer)
        a_BxLxF = jnp.where((batch['segments'] > 0)[..., None], a_BxLxF, 0)
        at_BxF = jnp.argmax(a_BxLxF, axis=1)
        # The window around each row's strongest token, per neuron; what is outside of its document is cut.
        places_BxFxW = at_BxF[..., None] + jnp.arange(-AROUND, AROUND + 1)
        inside = (places_BxFxW >= 0) & (places_BxFxW < a_BxLxF.shape[1])
        places_BxFxW = jnp.where(inside, places_BxFxW, 0)
        rows = jnp.arange(len(a_BxLxF))[:, None, None]
        of_BxL = lambda x: x[rows, places_BxFxW]
        middle = of_BxL(batch['segments'])[..., AROUND : AROUND + 1]
        inside &= of_BxL(batch['segments']) == middle
        new = {
            'value': jnp.max(a_BxLxF, axis=1),
            'window': jnp.where(inside, a_BxLxF[rows, places_BxFxW, jnp.arange(F)[:, None]], 0),
            'ids': jnp.where(inside, of_BxL(batch['tokens']), -1),
        }
        # Those of this batch's rows and of the best so far, the best again.
        every = {name: jnp.concatenate([best[name], jnp.moveaxis(x, 0, 1)], axis=1) for name, x in new.items()}
        _, order = jax.lax.top_k(every['value'], CONTEXTS)
        pick = lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
        kept = {name: pick(x) for name, x in every.items()}
        fired = best['fired'] + jnp.sum(a_BxLxF > 0, axis=(0, 1))
        return kept | {'fired': fired, 'tokens': best['tokens'] + jnp.sum(batch['segments'] > 0)}

    best = {
        'value': np.zeros((F, CONTEXTS), np.float32),
        'window': np.zeros((F, CONTEXTS, W), np.float32),
        'ids': np.full((F, CONTEXTS, W), -1, np.int32),
        'fired': np.zeros(F, np.int32),
        'tokens': np.zeros((), np.int32),
    }
    best = jax.device_put(best, everywhere)
    dataset = pipeline.eval_dataset(cfg.data, split, model.tokenizer)
    with trainer.context(), contextlib.closing(iter(dataset)) as batches:
        for batch in tqdm(batches, desc=f'neurons of layer {layer}', unit='batch', leave=False):
            best = step(model.params, trainer.put(batch), best)
    best = jax.device_get(best)
    if not best['tokens']:
        raise DataError(f'{split}: no text to look at')
    return best


def activations(model, params, batch, layer):
    """σ1 of the scores of a layer's neurons, (B, L, F)."""

    def interceptor(method, args, kwargs, context):
        out = method(*args, **kwargs)
        if context.method_name == 'activate' and isinstance(context.module, FFN):
            sow(context.module, 'activations', out)
        return out

    with nn.intercept_methods(interceptor):
        _, state = model.apply(params, batch['tokens'], batch['positions'], batch['segments'], mutable=[METRICS])
    a_TxF = by_layer(model.cfg, state[METRICS], 'ffn', 'activations')[layer]
    return a_TxF.reshape(*batch['tokens'].shape, -1)


def promoted(cfg, params, layer):
    """(F, PROMOTED) ids of the tokens whose logits a neuron's value row raises most: on its own, straight to the output.

    The row goes through the scales of the norms between it and the output embedding; their division by the rms, the same for
    all tokens, does not change the order.
    """
    n = len(cfg.pattern)
    p = params['params']
    group, i = layer // n, layer % n
    V_FxD = p['groups'][f'ffn_{i}']['V'][group]
    scale_D = (1 + p['groups'][f'post_ffn_{i}']['scale'][group]) * (1 + p['final_norm']['scale'])
    return jax.lax.top_k((V_FxD * scale_D) @ p['embedding'].T, PROMOTED)[1]


def pieces(tokenizer, ids):
    """The text of each token, so that together they are the text of all; bytes of one character count for its last token."""
    texts, before = [], ''
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        whole = i == len(ids) - 1 or not text.endswith('\ufffd')
        texts.append(text[len(before) :] if whole else '')
        before = text if whole else before
    return texts


def write(model, split, layer, path, picture=None):
    """Writes the page of a layer and returns its path; `picture`, a PNG of the layers' activity, is put into it."""
    best = collect(model, split, layer)
    cfg, tokenizer = model.cfg.model, model.tokenizer
    with model.trainer.context():
        ids = np.asarray(jax.jit(functools.partial(promoted, cfg, layer=layer))(model.params))
    word = functools.cache(lambda i: tokenizer.decode([i]) or f'⟨{i}⟩')
    neurons = []
    for f in tqdm(range(cfg.ffn.d_ff), desc='writing', unit='neuron', leave=False):
        contexts = []
        for value, window, tokens in zip(best['value'][f], best['window'][f], best['ids'][f], strict=True):
            if value > 0:
                inside = tokens >= 0
                texts = pieces(tokenizer, [int(t) for t in tokens[inside]])
                shades = [round(float(a / value), 2) if a > 0 else 0 for a in window[inside]]
                at = int(inside[:AROUND].sum())
                contexts.append({'value': round(float(value), 3), 'text': texts, 'shade': shades, 'at': at})
        neurons.append({
            'neuron': f, 'fires': float(best['fired'][f] / best['tokens']), 'max': round(float(best['value'][f, 0]), 3),
            'promotes': [word(int(i)) for i in ids[f]], 'contexts': contexts,
        })  # fmt: skip
    facts = {
        'layer': layer, 'step': model.step, 'split': split, 'tokens': int(best['tokens']), 'd_ff': cfg.ffn.d_ff,
        'k': cfg.ffn.k, 'kind': cfg.ffn.kind, 'n_layers': cfg.n_layers,
    }  # fmt: skip
    data = json.dumps({'facts': facts, 'neurons': neurons}, ensure_ascii=False, separators=(',', ':'))
    page = pathlib.Path(__file__).with_name('neurons.html').read_text('utf-8')
    # `<` cannot be taken for the end of the script, whatever the text holds.
    page = page.replace('"DATA"', data.replace('<', '\\u003c'))
    shown = base64.b64encode(picture.read_bytes()).decode() if picture else ''
    page = page.replace('PICTURE', f'data:image/png;base64,{shown}' if shown else '')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, 'utf-8')
    return path
