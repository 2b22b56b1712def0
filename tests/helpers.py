"""Small configs and models that the tests share."""

import contextlib
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from spark.config import from_file, template, validate
from spark.nn.transformer import Transformer

ROOT = pathlib.Path(__file__).parent.parent
BOTH = pytest.mark.parametrize('run', ['spark', 'dense'], indirect=True)


def shipped(name, variant=None):
    """The ConfigDict of configs/NAME."""
    return from_file(ROOT / 'configs' / name, variant)


SMALL = {
    'model.d_model': 32, 'model.n_layers': 4, 'model.attention.n_heads': 4, 'model.attention.n_kv_heads': 2,
    'model.attention.head_dim': 8, 'model.attention.window': 7, 'data.seq_len': 32, 'data.batch_size': 8, 'data.holdout': 0.1,
    'optimizer.lr': 1e-2, 'optimizer.warmup_steps': 2, 'train.steps': 10, 'train.log_every': 1, 'train.save_every': 5,
    'sample.tokens': 8,
}  # fmt: skip
KINDS = {
    'dense': {'model.ffn.kind': 'gated', 'model.ffn.d_ff': 64},
    'spark': {
        'model.ffn.kind': 'spark', 'model.ffn.d_ff': 96, 'model.ffn.k': 8, 'model.ffn.r': 16,
        'model.attention.kind': 'spark', 'model.attention.k': 4, 'model.attention.r': 4,
    },
}  # fmt: skip


def small(kind='spark', **overrides):
    """A validated config of a two-group model, d_model 32; kind 'spark' or 'dense'; overrides by dotted name."""
    c = template()
    capped = {'model.vocab_size': 264, 'model.logit_cap': 30.0, 'model.attention.logit_cap': 50.0}
    c.update_from_flattened_dict(SMALL | KINDS[kind] | capped | overrides)
    return validate(c)


def grid(*axes, base=None):
    """(base, parsed axes, runs) of a sweep from strings FIELD=v1,v2 over a small config."""
    from spark.sweeps.grid import expand, parse_axes

    base = base or small()
    parsed = parse_axes(axes)
    return base, parsed, expand(base, parsed)


def write_corpus(directory):
    """30 short text files in `directory`; the glob that matches them."""
    rng = np.random.default_rng(0)
    for i in range(30):
        (directory / f'{i}.txt').write_text(' '.join(rng.choice(['spark', 'sparse', 'top', 'key', '漢字'], 60)))
    return f'text:{directory}/*.txt'


def corpus(directory):
    """Overrides for a run of ten steps on `write_corpus`, which is evaluated on the way."""
    data = {'data.source': write_corpus(directory), 'data.cache_dir': str(directory / 'cache'), 'model.vocab_size': 0}
    return data | {'train.eval_every': 5}


def records(workdir):
    """The lines of a run's metrics.jsonl, without the clock."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    clock = ('tokens_per_second', 'seconds_', 'goodput')
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def model_and_params(cfg, seed=0):
    """The float32 Transformer of a config and random parameters, the same objects at every call."""
    return _model_and_params(cfg.model, seed)


@functools.cache
def _model_and_params(cfg, seed):
    model = Transformer(cfg)
    token = jnp.zeros((1, 1), jnp.int32)
    return model, meta.unbox(jax.jit(model.init)(jax.random.key(seed), token, token, token))


def random_rows(cfg, batch=2, length=24, seed=0):
    """tokens, positions, segments (batch, length) of one document per row."""
    tokens = np.random.default_rng(seed).integers(0, cfg.model.vocab_size, (batch, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens)


@contextlib.contextmanager
def browser(page, directory):
    """A page in headless Chromium: a selenium driver, with a profile in a directory."""
    selenium = pytest.importorskip('selenium.webdriver')
    chromium, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not (chromium and driver):
        pytest.skip('wants chromium and chromedriver')
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    switches = 'headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update'
    for switch in [*switches.split(), 'disable-sync', f'user-data-dir={directory}/profile']:
        options.add_argument(f'--{switch}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    try:
        chrome.get(page.as_uri())
        yield chrome
    finally:
        chrome.quit()
