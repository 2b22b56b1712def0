"""Every shipped config makes a training step that lowers and compiles, at its own widths and depth, for eight devices."""

import math

import jax
import pytest

from spark.config import check_devices, differences, validate
from spark.data.tokenizer import tokenizer_for
from spark.errors import ConfigError
from spark.training.step import Trainer
from tests.helpers import shipped
from tests.test_config import CONFIGS


def lowered(name, variant):
    c = shipped(name, variant)
    if name.startswith('gemma2'):
        c.mesh.fsdp, c.mesh.model, c.data.batch_size, c.data.seq_len = 4, 2, 16, 512
    cfg = validate(c)
    if not cfg.model.vocab_size:
        cfg = tokenizer_for(cfg)[1]
    trainer = Trainer(cfg, jax.devices()[: 8 if name.startswith('gemma2') else 1])
    with trainer.context():
        return trainer, trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch())


def held(trainer):
    """Bytes of a device's part of the state."""
    leaves = jax.tree.leaves(trainer.abstract_state)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


SMALL = [case for case in CONFIGS if not case[0].startswith('gemma2')]
GEMMA = [case for case in CONFIGS if case not in SMALL]
marked = lambda mark, cases: [pytest.param(*case, marks=mark) for case in cases]


@pytest.mark.parametrize(('name', 'variant'), [*SMALL, GEMMA[1], *marked(pytest.mark.slow, [GEMMA[0], *GEMMA[2:]])])
def test_shipped_configs_lower(name, variant):
    """Every matrix is split over all devices, and every array of the state is overwritten in place."""
    trainer, step = lowered(name, variant)
    state = jax.tree.leaves(trainer.abstract_state)
    assert step.as_text().count('tf.aliasing_output') == len(state)
    whole = sum(x.size * x.dtype.itemsize for x in state)
    assert held(trainer) == pytest.approx(whole / trainer.mesh.size, rel=0.01)


COMPILED = marked(pytest.mark.slow, [*SMALL, *GEMMA[:2]]) + marked(pytest.mark.soak, GEMMA[2:])


@pytest.mark.parametrize(('name', 'variant'), COMPILED)
def test_shipped_configs_compile(name, variant):
    """The program takes the state and a batch, and gives the state back where it lay."""
    trainer, step = lowered(name, variant)
    memory = step.compile().memory_analysis()
    batch = trainer.cfg.data.batch_size * trainer.cfg.data.seq_len * 5 * 4 // trainer.mesh.size
    assert memory.argument_size_in_bytes == pytest.approx(held(trainer) + batch, rel=1e-3)
    assert memory.alias_size_in_bytes == pytest.approx(held(trainer), rel=1e-3)


WHERE = [f'{chips}x{kind}' for kind in ('v5e', 'v6e', 'v5p') for chips in (64, 256, 1024)] + ['64xh100']


@pytest.mark.parametrize('size', ['2b', '9b', '27b'])
def test_every_size_divides_over_the_chips_that_it_names(size):
    """And trains the same function everywhere: the same rows in a step, the same model."""
    base = validate(shipped(f'gemma2_{size}.py', 'spark'))
    for where in WHERE[size == '27b' :]:  # 64 v5e are too few for 27B
        cfg = validate(shipped(f'gemma2_{size}.py', f'spark,{where}'))
        check_devices(cfg, int(where.split('x')[0]))
        assert not differences(base, cfg, ignore=('mesh', 'train.accumulate'))
    for wrong in ['64xv7', *WHERE[: size == '27b']]:
        with pytest.raises(ConfigError, match=f"'{wrong}': want one of (64xv5e, )?256xv5e, "):
            shipped(f'gemma2_{size}.py', f'spark,{wrong}')
