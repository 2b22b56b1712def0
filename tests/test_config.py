"""A wrong config is one line that names the field, the value and what is allowed."""

import json
import re

import pydantic
import pytest

from spark import config
from spark.config import AttentionConfig, ExperimentConfig, FFNConfig, check_devices, fields, load, template, validate
from spark.errors import ConfigError
from tests.helpers import ROOT, shipped, small

DENSE = {'model.attention.kind': 'dense', 'model.attention.k': 0, 'model.attention.r': 0}
WRONG = [
    ({'train.spike': 0.5, 'train.max_skips': 2}, 'train.spike = 0.5: want more than 1'),
    ({'train.spike': 3.0}, 'train.max_skips = 0: want at least 1'),
    ({'train.keep': 2**31}, 'train.keep = 2147483648: want less than 2³¹'),
    ({'model.ffn.r': 0}, "model.ffn.r = 0: want at least 1: kind 'spark'"),
    ({'model.pattern': ()}, 'model.pattern = (): want at least one of'),
    ({'model.ffn.k': 0}, 'model.ffn.k = 0: want 1 … d_ff = 96'),
    ({'model.ffn.k': 97}, 'model.ffn.k = 97: want 1 … d_ff = 96'),
    ({'model.ffn.r': 32}, 'model.ffn.r = 32: want 1 … d_model − 1 = 31'),
    ({'model.ffn.kind': 'sparke'}, "model.ffn.kind = 'sparke': want 'gated', 'relu'"),
    ({'model.ffn.kind': 'gated'}, "model.ffn.k = 8: want 0: kind 'gated' has no top-k"),
    ({'model.ffn.kind': 'topk'}, "model.ffn.r = 16: want 0: kind 'topk' has no predictor"),
    ({'model.ffn.topk': 'exact', 'model.ffn.huber': 0.1}, 'model.ffn.huber = 0.1: want 0'),
    ({'model.ffn.shrink': False, 'model.ffn.huber': 0.1}, 'model.ffn.huber = 0.1: want 0'),
    ({'model.ffn.topk': 'exact', 'model.ffn.recall': 0.5}, 'model.ffn.recall = 0.5: want 0.95, the default'),
    ({'model.ffn.kind': 'relu', 'model.ffn.k': 0, 'model.ffn.r': 0, 'model.ffn.shrink': False}, 'model.ffn.shrink = False: want'),
    ({'model.ffn.kind': 'topk', 'model.ffn.r': 0, 'model.ffn.gate': 'none'}, "model.ffn.gate = 'none': want '', the default: "),
    ({'model.ffn.kind': 'spark_low_rank', 'model.ffn.gate': 'sigmoid'}, "model.ffn.gate = 'sigmoid': want '', the default: "),
    ({'model.ffn.gate': 'tanh'}, "model.ffn.gate = 'tanh': want '', 'identity'"),
    ({'model.ffn.topk': 'exact', 'model.ffn.ddof': 0}, 'model.ffn.ddof = 0: want -1, the default'),
    ({'model.ffn.kind': 'gated', 'model.ffn.k': 0, 'model.ffn.r': 0, 'model.ffn.groups': 2}, 'model.ffn.groups = 2: want 1, the'),
    ({'model.ffn.groups': 5}, 'model.ffn.groups = 5: want a divisor of d_ff = 96'),
    ({'model.ffn.groups': 12}, 'model.ffn.k = 8: want at least groups = 12'),
    ({'model.ffn.topk': 'exact', 'model.ffn.groups': 3}, "model.ffn.k = 8: want a multiple of groups = 3 for topk 'exact'"),
    ({'model.attention.gate': 'none'}, "model.attention.gate = 'none': want '', 'identity'"),
    ({'model.attention.kind': 'topk', 'model.attention.r': 0, 'model.attention.gate': 'sigmoid'}, 'model.attention.gate = '),
    ({'model.attention.kind': 'topk'}, "model.attention.r = 4: want 0: kind 'topk' has no predictor"),
    ({'model.attention.logit_cap': 0.0, 'model.attention.cap_first': True}, 'model.attention.cap_first = True: want False'),
    (DENSE | {'model.attention.ddof': 0}, "model.attention.ddof = 0: want -1, the default: kind 'dense' has no top-k"),
    ({'model.attention.n_kv_heads': 3}, 'model.attention.n_kv_heads = 3: want a divisor of n_heads = 4'),
    ({'model.attention.head_dim': 7}, 'model.attention.head_dim = 7: want an even number'),
    ({'model.attention.r': 3}, 'model.attention.r = 3: want an even number in 2 … head_dim − 2 = 6'),
    ({'model.attention.r': 8}, 'model.attention.r = 8: want an even number'),
    ({'model.attention.k': 0}, 'model.attention.k = 0: want at least 1'),
    ({'model.attention.kind': 'dense'}, "model.attention.k = 4: want 0: kind 'dense'"),
    ({'model.attention.window': 0}, 'model.attention.window = 0: want at least 1'),
    ({'model.pattern': ('global',)}, 'model.attention.window = 7: want 0'),
    ({'model.attention.impl': 'pallas', 'model.attention.block': 96}, 'model.attention.block = 96: want a multiple of 128'),
    ({'model.n_layers': 3}, 'model.n_layers = 3: want a multiple of len(model.pattern) = 2'),
    ({'model.remat': 'some'}, "model.remat = 'some': want 'none', 'full'"),
    ({'train.accumulate': 3}, 'train.accumulate = 3: want a divisor of data.batch_size = 8'),
    ({'train.loss_pieces': 5}, 'train.loss_pieces = 5: want a divisor of model.vocab_size = 264'),
    ({'optimizer.warmup_steps': 10}, 'optimizer.warmup_steps = 10: want less than train.steps = 10'),
    ({'optimizer.lr': -1.0}, 'optimizer.lr = -1.0: want greater than 0'),
    ({'mesh.data': 0}, 'mesh.data = 0: want at least 1, or -1'),
    ({'data.holdout': 0.5}, 'data.holdout = 0.5: want less than 0.5'),
]


@pytest.mark.parametrize(('overrides', 'message'), WRONG)
def test_wrong_values(overrides, message):
    with pytest.raises(ConfigError) as e:
        small(**overrides)
    assert str(e.value).startswith(message), e.value
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(('topk', 'shrink'), [('exact', False), ('approx', False), ('statistical', True)])
def test_older_runs_keep_the_form_that_they_were_trained_with(tmp_path, topk, shrink):
    raw = small(**{'model.ffn.topk': topk}).model_dump(mode='json')
    del raw['model']['ffn']['shrink'], raw['model']['ffn']['recall']
    (tmp_path / 'config.json').write_text(json.dumps(raw))
    assert load(tmp_path / 'config.json') == small(**{'model.ffn.topk': topk, 'model.ffn.shrink': shrink})


def test_a_section_refuses_what_it_can_know_by_itself():
    heads = {'n_heads': 2, 'n_kv_heads': 1, 'head_dim': 8}
    spark = {'kind': 'spark', 'k': 2}
    for section, wrong in [(FFNConfig, spark | {'d_ff': 8}), (AttentionConfig, spark | heads)]:
        with pytest.raises(pydantic.ValidationError, match='r = 0: want '):
            section(**wrong)
        section(**wrong, r=2)


def test_unknown_missing_and_mistyped_fields():
    raw = small().model_dump()
    raw['model']['ffn']['kk'] = 3
    with pytest.raises(ConfigError, match=r'^model\.ffn\.kk: no such field; did you mean k\? Known: kind, d_ff'):
        validate(raw)
    raw = small().model_dump()
    raw['optimiser'] = raw.pop('optimizer')
    with pytest.raises(ConfigError, match=r'^optimiser: no such field; did you mean optimizer\?.*and 1 more'):
        validate(raw)
    raw = small().model_dump()
    raw['model']['d_model'] = '32'
    with pytest.raises(ConfigError, match=r"^model\.d_model = '32': want a valid integer"):
        validate(raw)
    raw['model']['d_model'], raw['xyz'] = 32, 1
    with pytest.raises(ConfigError, match=r'^xyz: no such field\. Known: seed, model'):
        validate(raw)
    with pytest.raises(ConfigError, match=r'^--config\.model\.ffn\.k\.x: no such field .x. inside of a value'):
        config.check_flags(['--config.model.ffn.k.x=3'])
    with pytest.raises(ConfigError, match=r'^model\.d_model: missing'):
        validate(template())


def test_a_config_may_follow_its_flag():
    path = str(ROOT / 'configs' / 'tiny.py')
    for argv in (['--config', f'{path}:dense'], [f'-config={path}'], ['--config.train.steps', '7'], ['--config', path, '--x']):
        config.check_flags(argv)
    for argv in (['--config', f'{path}y:dense'], [f'--config={path}y:dense']):
        with pytest.raises(ConfigError, match=rf'^--config={path}y:dense: no such file; did you mean {path}\?'):
            config.check_flags(argv)
    with pytest.raises(ConfigError, match=r'^--config=: no such file'):
        config.check_flags(['--config'])


@pytest.mark.parametrize(
    ('overrides', 'devices', 'message'),
    [
        ({'mesh.fsdp': 3}, 8, 'mesh = data 2 × fsdp 3 × context 1 × model 1: that is 6 devices, but there are 8'),
        ({'mesh.data': 2}, 8, 'mesh = data 2 × fsdp 1 × context 1 × model 1'),
        ({'data.batch_size': 12}, 8, 'data.batch_size = 12: want a multiple of 8'),
        ({'train.accumulate': 2}, 8, 'data.batch_size = 8: want a multiple of 16'),
        ({'mesh.fsdp': 8, 'model.ffn.r': 12}, 8, 'model.ffn.r = 12: want a multiple of mesh.fsdp × context = 8'),
        ({'mesh.model': 4}, 8, 'model.attention.n_kv_heads = 2: want a multiple of mesh.model = 4'),
        ({'mesh.model': 2, 'model.ffn.groups': 3}, 8, 'model.ffn.groups = 3: want 1, or a multiple of mesh.model = 2'),
        ({'mesh.model': 2, 'model.layers': '1:ffn.groups=3'}, 8, "model.layers = '1:ffn.groups=3': want model.ffn.groups in all"),
        ({'mesh.context': 4, 'data.seq_len': 34}, 4, 'data.seq_len = 34: want a multiple of mesh.context = 4'),
        ({'mesh.context': 2, 'model.attention.impl': 'full'}, 2, "model.attention.impl = 'full': want 'auto'"),
        ({'mesh.context': 2, 'model.attention.block': 6}, 2, 'model.attention.block = 6: want a divisor of data.seq_len / '),
        ({'mesh.context': 2, 'model.attention.impl': 'pallas'}, 2, 'data.seq_len / mesh.context = 16: want a multiple of 128'),
        ({'mesh.data': 2, 'mesh.slices': 3}, 2, 'mesh.slices = 3: want a divisor of mesh.data = 2'),
    ],
)
def test_what_does_not_divide_over_the_devices(overrides, devices, message):
    with pytest.raises(ConfigError) as e:
        check_devices(small(**overrides), devices)
    assert str(e.value).startswith(message), e.value


def test_groups_divide_over_the_devices():
    for changes in ({}, {'model.ffn.groups': 4}, {'model.layers': '1:ffn.groups=2'}):
        assert check_devices(small(**changes, **{'mesh.model': 2}), 8)['model'] == 2


def test_view_is_frozen_and_survives_its_file(tmp_path):
    cfg = small()
    with pytest.raises(pydantic.ValidationError):
        cfg.model.ffn.k = 3
    (tmp_path / 'config.json').write_text(cfg.model_dump_json())
    assert load(tmp_path / 'config.json') == cfg
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ConfigError, match=r'config\.json'):
        load(tmp_path / 'config.json')
    with pytest.raises(ConfigError, match=r'want the config\.json of a run'):
        load(tmp_path / 'none.json')


def test_every_option_is_read_somewhere():
    code = ''.join(p.read_text() for d in ('spark', 'scripts') for p in (ROOT / d).rglob('*.py') if p.parent.name != 'config')
    checked = (ROOT / 'spark' / 'config' / 'devices.py').read_text()
    reads = lambda text, name: re.search(rf'\.{name.split(".")[-1]}\b', text)
    unread = [name for name in fields(small()) if not reads(code, name)
              and not (name.startswith('mesh.') and reads(checked, name))]  # fmt: skip
    assert not unread


CONFIGS = [('tiny.py', 'spark'), ('tiny.py', 'dense'), ('ablation.py', 'spark')] + [
    (f'gemma2_{size}.py', v) for size in ('2b', '9b', '27b') for v in ('dense', 'spark', 'spark_ffn', 'spark_attention')
]


def test_every_shipped_config_is_in_the_list():
    assert {p.name for p in (ROOT / 'configs').glob('*.py')} - {'gemma2.py'} == {name for name, _ in CONFIGS}


@pytest.mark.parametrize(('name', 'variant'), CONFIGS)
def test_shipped_configs_are_valid(name, variant):
    cfg = validate(shipped(name, variant))
    assert isinstance(cfg, ExperimentConfig)
    template_names = set(fields(cfg))
    assert template_names == set(_flat(config.template().to_dict()))


def _flat(tree, prefix=''):
    return [n for k, v in tree.items() for n in (_flat(v, f'{prefix}{k}.') if isinstance(v, dict) else [prefix + k])]


@pytest.mark.parametrize('name', ['tiny.py', 'gemma2_2b.py'])
def test_unknown_variant(name):
    with pytest.raises(ConfigError, match="variant 'sparse': want"):
        shipped(name, 'sparse')
