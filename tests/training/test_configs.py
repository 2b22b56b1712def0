"""Every shipped config makes a training step that compiles, at its own widths and depth, for eight devices."""

import jax
import pytest

from spark.config import validate
from spark.data import pipeline
from spark.training.step import Trainer
from tests.helpers import shipped
from tests.test_config import CONFIGS


def lowered(name, variant):
    c = shipped(name, variant)
    if name.startswith('gemma2'):
        c.mesh.fsdp, c.mesh.model, c.data.batch_size, c.data.seq_len = 4, 2, 16, 512
    cfg = validate(c)
    if not cfg.model.vocab_size:
        cfg = pipeline.tokenizer_for(cfg)[1]
    trainer = Trainer(cfg, jax.devices()[: 8 if name.startswith('gemma2') else 1])
    with trainer.context():
        return trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch())


@pytest.mark.parametrize(('name', 'variant'), CONFIGS)
def test_shipped_configs_lower(name, variant):
    assert 'while' in lowered(name, variant).as_text()


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'variant'), CONFIGS)
def test_shipped_configs_compile(name, variant):
    memory = lowered(name, variant).compile().memory_analysis()
    assert memory.argument_size_in_bytes > 0
