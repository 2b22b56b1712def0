"""Grids: what they contain and what they refuse."""

import functools
import json

import pytest

from spark import flops
from spark.config import FFN_KINDS
from spark.errors import ConfigError
from spark.sweeps.grid import parse_axes, prepare_directory
from tests.helpers import grid, small


def test_axes_are_read_by_the_type_of_their_field():
    axes = parse_axes(['model.ffn.k=4,8', 'optimizer.lr=1e-3,0.5', 'model.pattern=local+global,global',
                             'train.activity=true', 'data.source="text:a,b",stdlib', 'seed=0,1,1'])  # fmt: skip
    assert axes == {
        'model.ffn.k': [4, 8], 'optimizer.lr': [1e-3, 0.5], 'model.pattern': [('local', 'global'), ('global',)],
        'train.activity': [True], 'data.source': ['text:a,b', 'stdlib'], 'seed': [0, 1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ('axes', 'message'),
    [
        ([], '--axis is missing: want at least one FIELD=value'),
        (['model.ffn.k'], '--axis=model.ffn.k: want FIELD=value,value'),
        (['model.ffn.kk=3'], '--axis=model.ffn.kk=3: no such field; did you mean k?'),
        (['model.ffn.k=3,many'], "--axis=model.ffn.k=3,many: 'many': want a valid integer"),
        (['model.ffn.kind=spark,sparse'], "--axis=model.ffn.kind=spark,sparse: 'sparse': want 'gated'"),
        (['model.pattern=local+far'], "--axis=model.pattern=local+far: 'local+far'"),
        (['seed=0', 'seed=1'], '--axis=seed=1: seed is an axis already'),
        (['model.ffn.k=97'], 'model.ffn.k = 97: want 1 … d_ff = 96'),
        (['model.ffn.kind=spark,gated', 'model.ffn.d_ff=96'], 'parameters differ by '),
    ],
)
def test_wrong_axes_are_told_in_one_line(axes, message):
    with pytest.raises(ConfigError) as e:
        grid(*axes)
    assert str(e.value).startswith(message), e.value
    assert '\n' not in str(e.value)


def test_a_grid_is_a_product_of_valid_configs_with_the_same_parameters():
    base, _, runs = grid('model.ffn.k=4,8', 'model.ffn.r=8,16', 'seed=0,1')
    assert len(runs) == 8 and runs[0].name == 'k-4_r-8_seed-0' and runs[-1].name == 'k-8_r-16_seed-1'
    points = {(run.cfg.model.ffn.k, run.cfg.model.ffn.r, run.cfg.seed) for run in runs}
    assert points == {(k, r, seed) for k in (4, 8) for r in (8, 16) for seed in (0, 1)}
    assert len({flops.parameters(r.cfg.model) for r in runs}) == 1
    assert runs[-1].cfg == base.model_copy(update={'seed': 1})


def test_kinds_are_compared_at_matched_parameters():
    _, _, runs = grid('model.ffn.kind=' + ','.join(FFN_KINDS))
    ffn = {r.name.removeprefix('kind-'): r.cfg.model.ffn for r in runs}
    assert ffn['gated'].d_ff == ffn['gaussian_topk'].d_ff == 64 and ffn['relu'].d_ff == ffn['topk'].d_ff == 96
    assert ffn['spark_projected'].d_ff == 96 - 16 // 2 and ffn['spark_low_rank'].d_ff == 96
    assert (ffn['gated'].k, ffn['gated'].r, ffn['topk'].k, ffn['topk'].r) == (0, 0, 8, 0)
    assert ffn['gaussian_topk'].k == 5  # the share of the neurons stays
    notes = {r.name.removeprefix('kind-'): r.adjustments for r in runs}
    assert notes['spark'] == '' and notes['gated'] == 'd_ff 96 → 64, ffn.k 8 → 0, ffn.r 16 → 0'
    counts = [flops.parameters(r.cfg.model) for r in runs]
    assert max(counts) <= 1.01 * min(counts)


def test_points_that_a_kind_does_not_tell_apart_are_one_run():
    _, _, runs = grid('model.ffn.kind=relu,spark', 'model.ffn.k=4,8', 'model.attention.kind=dense,spark')
    names = [r.name for r in runs]
    assert names == ['ffn.kind-relu_k-0_attention.kind-dense', 'ffn.kind-relu_k-0_attention.kind-spark',
                     'ffn.kind-spark_k-4_attention.kind-dense', 'ffn.kind-spark_k-4_attention.kind-spark',
                     'ffn.kind-spark_k-8_attention.kind-dense', 'ffn.kind-spark_k-8_attention.kind-spark']  # fmt: skip
    assert runs[0].cfg.model.attention.k == runs[0].cfg.model.attention.r == 0


def test_the_form_of_top_k_is_an_axis():
    _, _, runs = grid('model.ffn.kind=relu,spark', 'model.ffn.topk=statistical,approx', 'model.ffn.shrink=true,false',
                      'model.ffn.recall=0.5,0.95')  # fmt: skip
    forms = [(f.kind, f.topk, f.shrink, f.recall) for f in (run.cfg.model.ffn for run in runs)]
    plain = [(kind, 'statistical', shrink, 0.95) for kind, shrink in [('relu', True), ('spark', True), ('spark', False)]]
    assert forms == [*plain, *(('spark', 'approx', shrink, recall) for shrink in (True, False) for recall in (0.5, 0.95))]


def test_layers_and_the_schedule_of_k_are_axes():
    _, _, runs = grid('model.layers=ffn.k=4/8,0-1:ffn.kind=gated 2-:ffn.k=all', 'model.ffn.k_schedule=all:3,all:3 linear:4')
    names = 'layers-ffn.k_4_8_k_schedule-all_3', 'layers-0-1_ffn.kind_gated_2-_ffn.k_all_k_schedule-all_3_linear_4'
    assert (runs[0].name, runs[3].name) == names
    assert [layer.ffn.k for layer in runs[0].cfg.model.per_layer] == [4, 8, 4, 8]
    assert len({flops.parameters(r.cfg.model) for r in runs}) == 1 and runs[1].cfg.model.ffn.k_schedule == 'all:3 linear:4'
    with pytest.raises(ConfigError, match=r"model\.layers = '9:ffn\.k=4': '9:ffn\.k=4': 1 values for 0 of the 4 layers"):
        grid('model.layers=9:ffn.k=4')
    with pytest.raises(ConfigError, match='parameters differ by '):
        grid('model.layers=3:ffn.d_ff=48,ffn.k=4')
    _, _, runs = grid('model.ffn.kind=spark,relu', base=small(**{'model.ffn.k_schedule': 'all:3'}))
    assert [r.cfg.model.ffn.k_schedule for r in runs] == ['all:3', '']


def test_words_for_layers_that_a_kind_does_not_read_are_left_out_and_told():
    base = small(**{'model.layers': '0:ffn.k=all 1:ffn.kind=spark 1:ffn.r=8 1:ffn.k=5 attention.k=3'})
    _, _, runs = grid('model.ffn.kind=spark,gated', 'model.attention.kind=spark,dense', base=base)
    words = '0:ffn.k=all 1:ffn.kind=spark 1:ffn.r=8 1:ffn.k=5', '1:ffn.kind=spark 1:ffn.r=8 1:ffn.k=5'
    assert [r.cfg.model.layers for r in runs] == [f'{words[0]} attention.k=3', words[0], f'{words[1]} attention.k=3', words[1]]
    assert f"layers '{words[0]} attention.k=3' → '{words[1]}'" in runs[-1].adjustments and not runs[0].adjustments


def test_an_axis_that_layers_override_is_refused():
    """Equal models would be compared under different names."""
    base = small(**{'model.layers': 'ffn.k=4/8/12/16'})
    with pytest.raises(ConfigError) as e:
        grid('model.ffn.k=4,8', base=base)
    assert str(e.value) == (
        "--axis: k-4 and k-8 are the same run: want an axis that model.layers = 'ffn.k=4/8/12/16' leaves open"
    )
    with pytest.raises(ConfigError, match='are the same run'):
        grid('model.layers=ffn.k=8,ffn.k=8/8')
    assert len(grid('model.ffn.k=4,8', base=small(**{'model.layers': '0:ffn.k=12'}))[2]) == 2


def test_names_of_runs_differ_and_fit_a_file_system():
    _, _, runs = grid('model.layers=ffn.k=8%,ffn.k=4')
    assert [r.name for r in runs] == ['layers-ffn.k_8pct', 'layers-ffn.k_4']
    assert len(grid('model.layers=ffn.k=16%,ffn.k=16')[2]) == 2
    many = [f'ffn.k={"/".join(["90"] * 99 + [last])}' for last in ('8', '9')]
    _, _, runs = grid(f'model.layers={",".join(many)}', base=small(**{'model.n_layers': 100}))
    first, second = (r.name for r in runs)
    assert first != second and len(first) == len(second) == 200 and first[:190] == second[:190]


def test_every_lever_of_a_lookup_is_an_axis_at_equal_parameters():
    base = small(**{'model.ffn.groups': 4})
    axes = ['model.ffn.kind=spark,topk,relu', 'model.ffn.gate=sigmoid,none']
    _, _, runs = grid(*axes, base=base)
    assert [(f.kind, f.gate, f.d_ff, f.k, f.groups) for f in (run.cfg.model.ffn for run in runs)] == [
        ('spark', 'sigmoid', 96, 8, 4), ('spark', 'none', 128, 11, 4), ('topk', '', 96, 8, 4), ('relu', '', 96, 0, 1),
    ]  # fmt: skip
    assert len({flops.parameters(run.cfg.model) for run in runs}) == 1
    assert runs[-1].adjustments == "ffn.k 8 → 0, ffn.r 16 → 0, ffn.gate 'sigmoid' → '', ffn.groups 4 → 1"
    _, _, runs = grid('model.ffn.topk=statistical,exact,approx', 'model.ffn.ddof=-1,0', base=base)
    assert [(f.topk, f.ddof, f.groups, f.k) for f in (run.cfg.model.ffn for run in runs)] == [
        ('statistical', -1, 4, 8), ('statistical', 0, 4, 8), ('exact', -1, 4, 8), ('approx', -1, 4, 8),
    ]  # fmt: skip
    _, _, runs = grid('model.ffn.topk=statistical,exact', 'model.ffn.groups=1,3', base=small(**{'model.ffn.k_schedule': 'all:3'}))
    assert [(f.topk, f.groups, f.k, f.k_schedule) for f in (run.cfg.model.ffn for run in runs)] == [
        ('statistical', 1, 8, 'all:3'), ('statistical', 3, 8, 'all:3'), ('exact', 1, 8, ''), ('exact', 3, 9, ''),
    ]  # fmt: skip
    assert runs[-1].adjustments == "ffn.k 8 → 9, ffn.k_schedule 'all:3' → ''"
    _, _, runs = grid('model.ffn.kind=spark_projected', 'model.ffn.r=8,16', base=small())
    assert [run.cfg.model.ffn.d_ff for run in runs] == [92, 88]
    attention = 'model.attention.kind=dense,topk,spark,spark_low_rank'
    _, _, runs = grid(attention, 'model.attention.gate=,identity', 'model.attention.cap_first=false,true')
    assert len(runs) == 1 + 2 + 4 + 2 and len({flops.parameters(run.cfg.model) for run in runs}) == 1


def test_other_sizes_may_have_other_parameters():
    _, _, runs = grid('model.d_model=32,64', 'model.ffn.r=8,16')
    assert len({flops.parameters(r.cfg.model) for r in runs}) == 2


def test_a_directory_belongs_to_one_sweep(tmp_path):
    base, axes, runs = grid('model.ffn.k=4,8')
    prepare_directory(tmp_path / 'out', base, axes, runs)
    _, more, more_runs = grid('model.ffn.k=4,8,12')
    prepare_directory(tmp_path / 'out', base, more, more_runs)  # values may be added
    assert json.loads((tmp_path / 'out' / 'sweep.json').read_text())['axes'] == {'model.ffn.k': [4, 8, 12]}
    with pytest.raises(ConfigError, match=r'belongs to a sweep over model\.ffn\.k: choose another'):
        prepare_directory(tmp_path / 'out', base, {**axes, 'seed': [0]}, runs)
    other = small(**{'train.steps': 20, 'seed': 3})
    with pytest.raises(ConfigError, match=r'belongs to a sweep with seed = 0, now 3; train\.steps = 10, now 20: choose another'):
        prepare_directory(tmp_path / 'out', other, axes, runs)
    # The record of a version that had no choice of the warm-up, nor whether exact top-k shrinks.
    raw = json.loads((tmp_path / 'out' / 'sweep.json').read_text())
    old, (before, old_axes, old_runs) = tmp_path / 'old', grid('model.ffn.k=4,8', base=small(**{
        'model.ffn.topk': 'exact', 'model.ffn.shrink': False, 'optimizer.warmup_from_zero': True}))  # fmt: skip
    old.mkdir()
    raw['config'] = json.loads(before.model_dump_json())
    del raw['config']['model']['ffn']['shrink'], raw['config']['optimizer']['schedule']
    del raw['config']['optimizer']['warmup_from_zero']
    (old / 'sweep.json').write_text(json.dumps(raw))
    prepare_directory(old, before, old_axes, old_runs)

    workdir = tmp_path / 'out' / 'runs' / runs[0].name
    workdir.mkdir(parents=True)
    (workdir / 'config.json').write_text(small(**{'model.ffn.k': 4, 'optimizer.lr': 0.5}).model_dump_json())
    with pytest.raises(ConfigError, match=r'k-4 belongs to a run with optimizer\.lr = 0\.5, now 0\.01: choose another --out'):
        prepare_directory(tmp_path / 'out', base, axes, runs)
    texts = '{"axes": ', '{"axes": {}, "config": {"model": []}}'
    damages = [functools.partial(lambda text, path: path.write_text(text), text) for text in texts]
    for damage in (*damages, lambda path: (path.unlink(), path.mkdir())):
        damage(tmp_path / 'out' / 'sweep.json')
        with pytest.raises(ConfigError, match=r'not the record of a sweep \(.*\): choose another --out; or delete this file'):
            prepare_directory(tmp_path / 'out', base, axes, runs)
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'thesis.tex').write_text('mine')
    with pytest.raises(ConfigError, match=r"holds 'thesis\.tex' but no sweep\.json"):
        prepare_directory(tmp_path / 'home', base, axes, runs)


def test_what_an_optimizer_or_a_schedule_does_not_read_has_its_default():
    _, _, runs = grid('optimizer.name=adamw,muon,lion', 'optimizer.momentum=0.9,0.95', base=small(**{'optimizer.eps': 1e-6}))
    assert [(r.cfg.optimizer.name, r.cfg.optimizer.momentum, r.cfg.optimizer.eps) for r in runs] == [
        ('adamw', 0.95, 1e-6), ('muon', 0.9, 1e-6), ('muon', 0.95, 1e-6), ('lion', 0.95, 1e-8),
    ]  # fmt: skip
    assert runs[-1].adjustments == 'momentum 0.9 → 0.95, eps 1e-06 → 1e-08'
    base = small(**{'optimizer.final_lr': 0.0})
    _, _, runs = grid('optimizer.schedule=constant,linear,wsd', 'optimizer.decay_share=0.1', base=base)
    assert [r.cfg.optimizer.final_lr for r in runs] == [0.1, 0, 0] and runs[-1].cfg.optimizer.decay_share == 0.1


def test_only_rungs_stop_the_runs_of_a_sweep():
    for axis, base in [('model.ffn.k=2,3', small(**{'train.stop_at': 4})), ('train.stop_at=0,4', small())]:
        with pytest.raises(ConfigError, match=r'^train\.stop_at: want 0 in a sweep, whose runs stop at its --rungs'):
            grid(axis, base=base)
