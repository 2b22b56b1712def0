"""What a compiled program tells: collectives in loops, buffers and their lines, FLOPs; and real slices, with libtpu."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from spark import flops
from spark.compiling import aot, hlo
from spark.config import FFNConfig
from spark.nn.ffn import FFN
from spark.training import sharding
from spark.training.step import Trainer
from tests.helpers import ROOT, small

libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='wants libtpu')


@pytest.fixture(scope='module')
def mesh():
    return sharding.make_mesh(small(**{'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.model': 2}))


def compiled_text(mesh, f, *arguments):
    """Of f on (shape, PartitionSpec) arguments in float32, with its result replicated."""
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in arguments]
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(f, out_shardings=everywhere).lower(*structs).compile().as_text()


@pytest.mark.parametrize(
    ('spec', 'axes'),
    [('model', 'model'), ('fsdp', 'fsdp'), (('data', 'fsdp'), 'data × fsdp'), (('data', 'fsdp', 'model'), 'data × fsdp × model')],
)
def test_a_gather_is_found_with_its_axes_and_bytes(mesh, spec, axes):
    text = compiled_text(mesh, lambda x: jnp.sin(x), ((64, 16), PartitionSpec(spec)))
    assert hlo.collectives(text, mesh) == [{'kind': 'all-gather', 'axes': axes, 'count': 1, 'bytes': 64 * 16 * 4}]


def test_collectives_in_loops_count_by_their_trips(mesh):
    def f(x, w):
        step = lambda x, w: (jnp.tanh(x @ w), None)  # the contracted axis is split: a sum over 'model' at every step
        return jax.lax.scan(step, x, w)[0]

    split = PartitionSpec(None, 'model')
    text = compiled_text(mesh, f, ((4, 32), split), ((5, 32, 32), PartitionSpec(None, 'model', None)))
    found = {(c['kind'], c['axes']): c for c in hlo.collectives(text, mesh)}
    reduced = found['all-reduce', 'model']
    assert reduced['count'] >= 5 and reduced['bytes'] >= 5 * 4 * 32 * 4 / 2


def test_traffic_counts_slices_and_trips():
    """Of n layers of tanh(x @ w): at least x and w read and x written, at most a few times that, and not all of w per layer."""

    def traffic(n):
        step = lambda x, w: (jnp.tanh(x @ w), None)
        structs = jax.ShapeDtypeStruct((256, 256), jnp.float32), jax.ShapeDtypeStruct((n, 256, 256), jnp.float32)
        compiled = jax.jit(lambda x, w: jax.lax.scan(step, x, w)[0]).lower(*structs).compile()
        return hlo.traffic(compiled.as_text()) / (256 * 256 * 4)

    assert 3 * 10 <= traffic(10) < 9 * 10
    assert traffic(40) == pytest.approx(4 * traffic(10), rel=0.1)


def test_what_lies_in_the_core_is_no_traffic():
    line = '  %a = (f32[8]{0:S(1)}, bf16[4,2]{1,0:T(8,128)(2,1)}, f32[2]{0:T(128)S(1)}) fusion(%x), kind=kLoop, calls=%f'
    assert hlo._operation(line).size == 4 * 2 * 2


def test_groups_are_read_in_every_form():
    pairs = frozenset(map(frozenset, [(0, 4), (1, 5), (2, 6), (3, 7)]))
    for text in ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', 'replica_groups=[4,2]<=[2,4]T(1,0)',
                 "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}",
                 "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}"):  # fmt: skip
        assert hlo._members(text + ', use_global') == pairs
    assert hlo._members('replica_groups=[2,4]<=[8]') == frozenset(map(frozenset, [range(4), range(4, 8)]))


UNROLLED = '''
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %limit = s32[] constant(8)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %sent = f32[8]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %kernel = f32[8]{0} custom-call(%x), frontend_attributes={kernel_metadata={
"metadata":"of several lines"
}}, metadata={op_name="kernel"}
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %sent)
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %x)
  ROOT %loop = (s32[], f32[8]{0}) while(%start), condition=%cond, body=%body
}
'''


def test_an_unrolled_ring(mesh):
    """Eight steps, two at a time."""
    assert hlo.collectives(UNROLLED, mesh) == [{'kind': 'collective-permute', 'axes': 'model', 'count': 4, 'bytes': 4 * 8 * 4}]


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_flops_of_the_traced_step_are_those_counted_by_part(remat):
    """All scores are computed and masked, so each token pays for a whole row of keys; the backward pass is twice the forward."""
    L = 32
    cfg = small('dense', **{'model.attention.window': L, 'model.remat': remat, 'train.loss_pieces': 1})
    trainer = Trainer(cfg, jax.devices()[:1])
    parts = flops.flops_per_token(cfg.model, L)
    forward = flops.group(parts)
    expected = 3 * forward['total'] + (forward['body'] if remat == 'full' else 0)
    found = aot.matmul_flops(trainer) / (cfg.data.batch_size * L)
    # Of a rematerialised layer nobody needs the last matmul again.
    assert found == pytest.approx(expected, rel=0.001 if remat == 'none' else 0.08)


@pytest.mark.parametrize(('impl', 'L', 'block', 'window'), [('blockwise', 256, 16, 64), ('pallas', 2048, 128, 512)])
def test_flops_of_blocks_are_those_of_the_keys_that_are_seen(impl, L, block, window):
    more = {'data.seq_len': L, 'model.attention.block': block, 'model.attention.impl': impl, 'model.attention.window': window}
    per_token = {}
    for kind in ('dense', 'spark'):
        # The CPU kernels of the FFN compute active neurons only, in no product of XLA.
        cfg = small(kind, **more, **{'model.ffn.impl': 'masked'})
        per_token[kind] = aot.matmul_flops(Trainer(cfg, jax.devices()[:1])) / (cfg.data.batch_size * L)
        model = sum(flops.flops_per_token(cfg.model, L, 'training').values())
        # Blocks at the edges are computed whole, and backward scores once more, or twice (3/2 of the model's FLOPs).
        assert model < per_token[kind] < (1.4 if impl == 'blockwise' else 1.7) * model, kind


def test_the_largest_buffers_name_their_lines():
    cfg = small(**{'model.vocab_size': 4096, 'mesh.data': 1})
    trainer, compiled = aot.compile_step(cfg, jax.devices()[:1])
    rows = hlo.largest_buffers(compiled.as_text(), 5)
    sizes = [row['bytes'] for row in rows]
    assert sizes[0] == 8 * 32 * 4096 * 4 and sizes == sorted(sizes, reverse=True)
    m = aot.memory(compiled, jax.devices()[0])
    assert m['hbm'] is None and m['peak'] >= m['arguments'] > 3 * 4 * trainer.n_params


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_topk_over_a_sharded_d_ff_reduces_two_scalars_per_token(mesh, groups):
    """And gathers no activations: over 'model' goes that and the sum that gives the output, in the forward pass.

    Groups of neurons that lie on one device reduce nothing.
    """
    tokens, D = 16, 32  # per device
    module = FFN(FFNConfig(kind='spark', d_ff=8192, k=640, r=16, groups=groups), jnp.float32)
    x = jax.ShapeDtypeStruct((4, tokens, D), jnp.float32, sharding=jax.NamedSharding(mesh, sharding.spec(('batch', 'length'))))
    boxed = jax.eval_shape(module.init, jax.random.key(0), x)
    place = lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s)
    params = jax.tree.map(place, meta.unbox(boxed), sharding.shardings(mesh, boxed))
    with jax.set_mesh(mesh), sharding.logical_rules():
        text = jax.jit(module.apply).lower(params, x).compile().as_text()
    over_model = [c for c in hlo.collectives(text, mesh) if 'model' in c['axes']]
    assert [(c['kind'], c['axes'], c['bytes']) for c in over_model] == [
        ('all-reduce', 'model', 4 * tokens * (2 * (groups == 1) + D))
    ]


def compile_script(*arguments, timeout=550):
    """In a process of its own: jax's profiler crashes in one that has loaded libtpu without a chip."""
    command = [sys.executable, str(ROOT / 'scripts' / 'compile.py'), *arguments]
    env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


# At these widths the TPU compiler takes a third of the time.
NARROW = [f'--config.{name}={value}' for name, value in {
    'model.d_model': 128, 'model.ffn.d_ff': 256, 'model.ffn.k': 16, 'model.ffn.r': 64,
}.items()]  # fmt: skip


def test_a_phase_says_what_and_how_long(capsys):
    with pytest.raises(ZeroDivisionError), aot.phase('Compiling', every=0.01):
        time.sleep(0.1)
        _ = 1 / 0
    assert capsys.readouterr().out.startswith('Compiling …\nCompiling … 0 s\n')


def test_evaluation_is_compiled_too():
    """The same programs that run: with the optimizer's state while training, and without; and microbatches keep it small."""
    cfg = small(**{'mesh.data': 1, 'model.vocab_size': 4096, 'data.seq_len': 256})
    found = aot.evaluation(cfg, jax.devices()[:1])
    params = 4 * Trainer(cfg, jax.devices()[:1]).n_params
    assert 3 * params < found['while training']['arguments'] < 3.5 * params
    assert params < found['evaluate.py']['arguments'] < 1.5 * params
    train = cfg.train.model_copy(update={'accumulate': 4})
    parts = aot.evaluation(cfg.model_copy(update={'train': train}), jax.devices()[:1])
    for name in found:
        assert parts[name]['temporaries'] < 0.5 * found[name]['temporaries']


@libtpu
def test_a_slice_that_is_not_there(tmp_path):
    done = compile_script(f'--config={ROOT}/configs/tiny.py', '--topology=v5e:2x2', f'--json={tmp_path}/r.json', *NARROW)
    assert done.returncode == 0, done.stderr
    for words in ('Compiling for 4 × TPU v5 lite', 'of 16 GiB: fits', '| memory traffic |', '| all-reduce | data |',
                  'largest buffers', 'lookup.py:', 'peak of evaluation'):  # fmt: skip
        assert words in done.stdout
    assert not done.stderr  # libtpu looks for no chip and complains of none


@libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_said(tmp_path):
    big = {'model.d_model': 4096, 'model.ffn.d_ff': 100000, 'model.n_layers': 8, 'data.batch_size': 4}
    big = [f'--config.{name}={value}' for name, value in big.items()]
    words = f'--config={ROOT}/configs/tiny.py', '--topology=v5e:2x2', f'--json={tmp_path}/r.json', '--noevaluation'
    done = compile_script(*words, *big)
    assert json.loads((tmp_path / 'r.json').read_text())['fits'] is False
    assert done.returncode == 2 and 'lower data.batch_size' in done.stderr.splitlines()[-1], done.stderr


def test_a_search_finds_the_largest_batch_of_every_policy_that_fits(monkeypatch):
    """Memory as a formula: rows of the batch times what the policy keeps, of 16 bytes; one device."""
    keeps = {'none': 5, 'dots': 3, 'dots_no_batch': 2, 'full': 1}
    peak = lambda cfg, _: (None, cfg.data.batch_size * keeps[cfg.model.remat])
    monkeypatch.setattr(aot, 'compile_step', peak)
    monkeypatch.setattr(aot, 'memory', lambda compiled, device: {'peak': compiled, 'hbm': 16})
    said = []
    found = aot.search(small(**{'mesh.data': 1}), jax.devices()[:1], said.append)
    assert [(row['remat'], row['batch_size']) for row in found] == [('none', 2), ('dots', 4), ('dots_no_batch', 8), ('full', 16)]
    monkeypatch.setattr(aot, 'memory', lambda compiled, device: {'peak': compiled, 'hbm': 2})
    found = aot.search(small(**{'mesh.data': 1}), jax.devices()[:1], said.append)
    assert [row['remat'] for row in found] == ['dots_no_batch', 'full']
    assert 'none: does not fit' in said


def gemma2_report(path, topology, variant='spark', **more):
    """The report on Gemma-2 2B with these fields, which must fit."""
    flags = [f'--config.{name}={value}' for name, value in more.items()]
    config = f'--config={ROOT}/configs/gemma2_2b.py:{variant}'
    done = compile_script(config, f'--topology={topology}', f'--json={path}', '--noevaluation', *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


# Gemma-2 with fewer and narrower layers, which the TPU compiler takes in half a minute.
SMALL_GEMMA = {
    'model.n_layers': 2, 'model.d_model': 512, 'model.ffn.d_ff': 1536, 'model.ffn.k': 123, 'model.ffn.r': 256,
    'model.attention.n_heads': 4, 'model.attention.n_kv_heads': 4, 'model.attention.head_dim': 128, 'model.attention.r': 64,
    'model.vocab_size': 32768, 'train.loss_pieces': 8,
}  # fmt: skip


@libtpu
@pytest.mark.slow
def test_a_chip_holds_no_logits_and_no_layers_and_moves_each_parameter_thrice(tmp_path):
    """As deep as 2B. The logits of a row alone would take as much, and the activations of all layers twelve times as much."""
    L, deep = 2048, SMALL_GEMMA | {'model.n_layers': 26}
    found = gemma2_report(tmp_path / 'r.json', 'v5e:2x2', **deep, **{'data.seq_len': L, 'data.batch_size': 4, 'mesh.fsdp': 4})
    assert found['memory']['temporaries'] < L * 32768 * 4
    moved = sum(row['bytes'] for row in found['collectives'])
    assert moved < 1.4 * 3 * 2 * found['parameters']  # gathered twice, scattered once, in bfloat16


@libtpu
@pytest.mark.soak
@pytest.mark.parametrize('variant', ['spark', 'dense'])
def test_gemma2_2b_fits_the_slice_of_its_header_as_lean_as_maxtext(variant, tmp_path):
    """256 v5e chips as shipped; and 16 with 1 × 2048 tokens each, where MaxText takes 1.96 GB and 4.03 of temporaries."""
    m = gemma2_report(tmp_path / 'r.json', 'v5e:16x16', variant)['memory']
    assert m['peak'] < m['hbm']
    small_slice = {'data.seq_len': 2048, 'data.batch_size': 16, 'mesh.fsdp': 16}
    found = gemma2_report(tmp_path / 'r.json', 'v5e:4x4', variant, **small_slice)
    assert found['memory']['arguments'] < 1.97e9 and found['memory']['temporaries'] < 4.03e9
    moved = sum(row['bytes'] for row in found['collectives'])
    assert moved < 1.4 * 3 * 2 * found['parameters']


TOPOLOGIES = {  # of one slice
    '64xv5e': 'v5e:8x8', '256xv5e': 'v5e:16x16', '1024xv5e': 'v5e:16x16', '64xv6e': 'v6e:8x8', '256xv6e': 'v6e:16x16',
    '1024xv6e': 'v6e:16x16', '64xv5p': 'v5p:4x4x4', '256xv5p': 'v5p:4x8x8', '1024xv5p': 'v5p:8x8x16',
}  # fmt: skip


@libtpu
@pytest.mark.soak
@pytest.mark.parametrize('where', TOPOLOGIES)
@pytest.mark.parametrize('size', ['2b', '9b', '27b'])
def test_every_size_fits_the_slices_that_it_names(size, where, tmp_path):
    """Training and evaluation; Spark, since a dense model takes less."""
    if (size, where) == ('27b', '64xv5e'):
        pytest.skip('does not fit')
    command = [f'--config={ROOT}/configs/gemma2_{size}.py:spark,{where}', f'--topology={TOPOLOGIES[where]}']
    done = compile_script(*command, timeout=3600)
    assert done.returncode == 0 and done.stdout.count('GiB: fits') == 3, done.stderr


LOWER = '''
import importlib.util, jax, jax.numpy as jnp, sys
from spark.config import from_file, validate
from spark.nn.transformer import Transformer
from spark.training.step import Trainer
trainer = Trainer(validate(from_file(sys.argv[1], 'spark,64xh100')))
trainer.model = Transformer(trainer.cfg.model, jnp.bfloat16, 'gpu')
with trainer.context():
    traced = trainer.train_step.trace(trainer.abstract_state, trainer.abstract_batch())
    print(len(traced.lower(lowering_platforms=('cuda',)).as_text()), trainer.mesh.size)
'''


@pytest.mark.soak
@pytest.mark.parametrize('size', ['2b', '9b', '27b'])
def test_every_size_lowers_for_eight_times_eight_h100(size):
    env = os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '--xla_force_host_platform_device_count=64'}
    command = [sys.executable, '-c', LOWER, str(ROOT / 'configs' / f'gemma2_{size}.py')]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.split()[1] == '64', done.stderr


@libtpu
@pytest.mark.parametrize(
    'topology',
    [
        pytest.param('v6e:2x2', marks=pytest.mark.slow),
        *(pytest.param(chip, marks=pytest.mark.soak) for chip in ('v4:2x2x1', 'v5p:2x2x1', 'tpu7x:2x2x1')),
    ],
)
def test_every_kind_of_chip(topology):
    done = compile_script(f'--config={ROOT}/configs/tiny.py', f'--topology={topology}', '--noevaluation', *NARROW)
    assert done.returncode == 0 and 'GiB: fits' in done.stdout, done.stderr


BETWEEN_SLICES = [
    pytest.param('v5e:2x2', SMALL_GEMMA, 1024, 4, 2, marks=pytest.mark.soak),
    pytest.param('v5e:4x4', {'model.n_layers': 2, 'model.vocab_size': 32768, 'train.loss_pieces': 4}, 2048, 16, 4,
                 marks=pytest.mark.soak),
]  # fmt: skip


@libtpu
@pytest.mark.parametrize(('topology', 'model', 'L', 'chips', 'context'), BETWEEN_SLICES)
def test_between_slices_goes_each_gradient_once(topology, model, L, chips, context, tmp_path):
    """Of the embedding, one of the lookup and one of the logits; a row that is split gathers keys and values alone."""

    def report(**more):
        found = gemma2_report(tmp_path / 'r.json', topology, **model, **{'data.seq_len': L}, **more)
        return found, lambda axes: sum(c['bytes'] for c in found['collectives'] if c['axes'] == axes)

    found, moved = report(**{'mesh.slices': 2, 'mesh.data': 2, 'mesh.fsdp': chips, 'data.batch_size': 2 * chips})
    assert found['devices'] == 2 * chips
    m = found['config']['model']
    embedding = m['vocab_size'] * m['d_model']
    ideal = (2 * 4 * embedding + 2 * (found['parameters'] - embedding)) / chips  # float32 and bfloat16, of each chip's part
    assert moved('data, between slices') < 1.1 * ideal
    rows = chips // context
    found, moved = report(**{'mesh.context': context, 'mesh.fsdp': rows, 'data.batch_size': rows})
    keys_and_values = 2 * m['attention']['n_kv_heads'] * L * m['attention']['head_dim'] * 2
    # In each layer, forward, backward's second forward, and the sum of the gradients.
    assert moved('context') < 2 * 4 * keys_and_values


@libtpu
@pytest.mark.slow
def test_a_topology_that_no_slice_has():
    done = compile_script(f'--config={ROOT}/configs/tiny.py', '--topology=v5e:3x7')
    assert done.returncode == 2 and '--topology=v5e:3x7' in done.stderr.splitlines()[-1]


@libtpu
def test_unknown_topologies():
    done = compile_script(f'--config={ROOT}/configs/tiny.py', '--topology=v9:2x2')
    assert done.returncode == 2 and '--topology=v9:2x2: ' in done.stderr and 'want such as v4:2x2x2' in done.stderr
