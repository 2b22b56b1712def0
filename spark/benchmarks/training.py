"""Whole training steps: Spark against dense, the cost of surviving faults, and compile time by depth."""

import itertools
import pathlib
import statistics
import tempfile
import time
from unittest import mock

import jax

from spark import config
from spark.benchmarks.timing import Rows, interleaved, peak_mb, row
from spark.checkpoints.manager import Checkpoints
from spark.data import rows
from spark.data.tokenizer import tokenizer_for
from spark.nn.transformer import with_impl
from spark.training import step as training_step
from spark.training.watchdog import Watchdog


class _Steps:
    """Calls of the train step on one device and one batch of the corpus; `state` is the newest."""

    def __init__(self, cfg):
        _, self.cfg = tokenizer_for(cfg)
        self.trainer = training_step.Trainer(self.cfg, jax.devices()[:1])
        batches = rows.TrainRows(self.cfg.data, self.cfg.seed).batches(0)
        with self.trainer.context():
            self.state, self.batch = self.trainer.init_state(self.cfg.seed), self.trainer.put(next(batches))
        batches.close()

    def __call__(self, n=1):
        with self.trainer.context():
            for _ in range(n):
                self.state, sums = self.trainer.train_step(self.state, self.batch)
        return sums


def _of_30m(cfg):
    """`cfg` at a shape of 33 million parameters with the proportions of 2B, on rows of 1024 tokens."""
    raw, sparse = cfg.model_dump(), cfg.model.ffn.kind == 'spark'
    raw['model'] |= {'d_model': 512, 'n_layers': 8}
    raw['model']['ffn'] |= {'d_ff': 3072, 'k': 246, 'r': 228} if sparse else {'d_ff': 2048}
    raw['model']['attention'] |= {'n_heads': 4, 'n_kv_heads': 2, 'head_dim': 128, 'window': 512}
    raw['model']['attention'] |= {'k': 128, 'r': 64} if sparse else {}
    raw['data'] |= {'seq_len': 1024, 'batch_size': 4}
    return config.validate(raw)


def train_step_30m(spark: config.ExperimentConfig, dense: config.ExperimentConfig, repeats: int = 5) -> Rows:
    """`train_step` for a larger model."""
    return train_step(_of_30m(spark), _of_30m(dense), repeats)


def train_step(spark: config.ExperimentConfig, dense: config.ExperimentConfig, repeats: int = 11) -> Rows:
    """A training step, Spark against the faster of dense ones: attention as its config has it, or all scores at once.

    Fails if a step after the first compiles anything.
    """
    full = dense.model_copy(update={'model': with_impl(dense.model, attention='full')})
    steps = {'spark': _Steps(spark), 'dense': _Steps(dense), 'dense_full': _Steps(full)}
    ms = interleaved(steps, repeats)
    ms['dense'] = min(ms['dense'], ms['dense_full'])
    compiled = {name: step.trainer.train_step._cache_size() for name, step in steps.items()}
    assert set(compiled.values()) == {1}, f'a step after the first was compiled again: {compiled}'
    tokens = spark.data.batch_size * spark.data.seq_len
    details = {f'{name}_tokens_per_second': 1e3 * tokens / t for name, t in ms.items()}
    details |= {'time_ratio': ms['spark'] / ms['dense'], 'compilations': compiled}
    details |= {f'{name}_peak_mb': peak_mb(_Steps, cfg) for name, cfg in (('spark', spark), ('dense', dense))}
    return [row('train_step: Spark against dense', ms['spark'], ms['dense'], **details)]


def faults(cfg: config.ExperimentConfig, repeats: int = 11) -> Rows:
    """Ten steps with a checkpoint, written to its end, against ten without; one step with and without watchdog and guard."""
    step = _Steps(cfg)
    with mock.patch.object(training_step, 'judge', lambda cfg, guard, *_: (True, guard)):
        unguarded = _Steps(cfg)
        unguarded()  # compiles with the patch
    numbers, blocked = itertools.count(), []
    with tempfile.TemporaryDirectory() as directory, Watchdog(300) as dog:
        (pathlib.Path(directory) / 'config.json').touch()
        checkpoints = Checkpoints(pathlib.Path(directory) / 'checkpoints', keep=1)

        def saving():
            jax.block_until_ready(step())
            start = time.perf_counter()
            checkpoints.save(next(numbers), step.state, {})
            blocked.append(1e3 * (time.perf_counter() - start))
            sums = step(9)
            checkpoints.wait()
            return sums

        def watched():
            dog.alive()
            return step()

        ms = interleaved({'plain': lambda: step(10), 'saving': saving}, repeats)
        ms |= interleaved({'step': step, 'watched': watched, 'unguarded': unguarded}, repeats)
        checkpoints.close()
    cost = ms['saving'] - ms['plain']
    size = sum(x.nbytes for x in jax.tree.leaves(step.state)) / 1e6
    details = {'state_mb': size, 'blocked_ms': statistics.median(blocked), 'cost_ms': cost, 'share_at_one_in_300_s': cost / 300e3}
    return [
        row('ten steps: one checkpoint against none', ms['saving'], ms['plain'], **details),
        row('a step: watchdog against none', ms['watched'], ms['step']),
        row('a step: an update that can be left out against one that cannot', ms['step'], ms['unguarded']),
    ]


def compile_time(cfg: config.ExperimentConfig, repeats: int = 5) -> Rows:
    """Lowering and compiling the train step without a cache: 26 layers against 4, at widths far below those of `cfg`."""
    jax.config.update('jax_enable_compilation_cache', False)

    def compile_layers(n):
        raw = cfg.model_dump()
        raw['model'] |= {'n_layers': n, 'd_model': 64, 'vocab_size': 512}
        raw['model']['ffn'] |= {'d_ff': 192, 'k': 16, 'r': 32}
        raw['model']['attention'] |= {'n_heads': 4, 'n_kv_heads': 2, 'head_dim': 16, 'k': 16, 'r': 8, 'window': 32}
        raw['data'] |= {'seq_len': 64, 'batch_size': 4}
        raw['train']['loss_pieces'] = raw['mesh']['fsdp'] = 1
        trainer = training_step.Trainer(config.validate(raw), jax.devices()[:1])
        with trainer.context():
            trainer.compile_train_step()

    ms = interleaved({n: lambda n=n: compile_layers(n) for n in (26, 4)}, repeats)
    return [row('compile: 26 layers against 4', ms[26], ms[4], time_ratio=ms[26] / ms[4])]
