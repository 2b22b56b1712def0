"""Train a model; after any interruption, run the same command again to resume.

    python scripts/train.py --config=configs/tiny.py[:VARIANT] --workdir=DIR [--config.x.y=value …] [--json=FILE]
    python scripts/train.py … --workdir=DIR --extend --config.train.steps=N        # a run of DIR that goes on to step N
    python scripts/train.py … --workdir=NEW --branch_from=DIR/checkpoints/STEP …   # another run that goes on from there

Leaves DIR/config.json, metrics.jsonl, tensorboard/, checkpoints/, summary.json. Exit codes: 0 done, 2 bad config,
3 loss not finite, 4 data unreadable or exhausted, 5 checkpoint unusable or not to be written, 75 preempted (state saved; run
again), 124 stalled, or storage does not answer.
"""

import atexit
import contextlib
import os
import signal
import sys

for _number in (signal.SIGINT, signal.SIGTERM):
    # Until train() sets its own handlers there is nothing to save.
    signal.signal(_number, lambda *_: os._exit(75))
    # Registered first, so called last: Python then drops its handlers, and a late signal would change the exit code.
    atexit.register(signal.signal, _number, signal.SIG_IGN)

from absl import flags
from ml_collections import config_flags

from spark import config, distributed, errors
from spark.runtime import run_directory, use_huge_pages, write_json
from spark.training import flags as start

CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, with an optional variant: PATH[:VARIANT].')
WORKDIR = flags.DEFINE_string('workdir', None, 'The run directory, or gs://…: a new one, or that of a run to resume.')
start.define()


def main() -> None:
    cfg = config.validate(start.apply(CONFIG.value))

    # Imported here, so that a wrong config is reported before JAX starts.
    import jax

    distributed.initialize()

    from spark.training.run import train

    workdir = run_directory(WORKDIR.value)
    with contextlib.ExitStack() as holder:
        summary, trainer, state = train(cfg, workdir, extend=flags.FLAGS.extend, holder=holder)
        write_summary(workdir, summary | {'sample': None})  # whatever becomes of the sample, the run is done
        if jax.process_count() == 1:
            sample = continuation(trainer, state)
            write_summary(workdir, summary | {'sample': sample})
        else:  # if it failed in one process, the others would wait for that one
            sample = None
            print(f'No sample by several processes; see scripts/generate.py --workdir={workdir}', file=sys.stderr, flush=True)
    if jax.process_index() == 0:
        print(table(cfg, summary | {'sample': sample}))


def write_summary(workdir, summary) -> None:
    """Writes summary.json, and the file of --json."""
    from spark.checkpoints.reading import by_first_process

    for path in filter(None, (workdir / 'summary.json', flags.FLAGS.json)):
        by_first_process(lambda path=path: write_json(path, summary), f'{path}')


def continuation(trainer, state) -> str | None:
    """sample.prompt and what the model writes after it; None if the config asks for no sample, or if that fails."""
    if not trainer.cfg.sample.tokens:
        return None
    try:
        return _continuation(trainer, state)
    except Exception as e:  # such as a model that generation does not know, or memory that is short
        errors.show_traceback(e)
        print(f'Warning: no sample: {" ".join(errors.root_cause(e).split())}', file=sys.stderr, flush=True)
        return None


def _continuation(trainer, state):
    import jax

    from spark.data.tokenizer import of_config
    from spark.inference import decoder, layout, sampling
    from spark.nn.runs import at_step

    cfg = trainer.cfg
    text = of_config(cfg.data)
    prompt = jax.numpy.asarray(text.start([cfg.sample.prompt]))
    with jax.set_mesh(trainer.mesh):  # but no rules for activations, since a single row cannot be sharded
        dtype, model = jax.numpy.dtype(trainer.model.dtype).name, at_step(cfg.model, cfg.train.steps)
        serving = layout.Serving(model, dtype, platform=trainer.model.platform)
        weights = jax.jit(lambda params: layout.from_params(serving, params))(state.params)
        options = {'n': cfg.sample.tokens, 'sampling': sampling.Sampling(cfg.sample.temperature)}
        tokens = decoder.generate(serving, weights, prompt, jax.random.key(cfg.seed), **options)
    return cfg.sample.prompt + text.decode(jax.device_get(tokens)[0])


def table(cfg: config.ExperimentConfig, summary: dict) -> str:
    """The summary as a Markdown table."""
    from spark.config.layers import ALL_KEYS
    from spark.nn.runs import at_step

    test, layers = summary['test'], at_step(cfg.model, summary['steps']).per_layer
    listed = lambda values: ', '.join(dict.fromkeys(values))
    kinds = lambda half: listed(getattr(layer, half).kind for layer in layers)
    shares = listed(f'{layer.ffn.k / layer.ffn.d_ff:.1%}' for layer in layers if layer.ffn.k)
    ks = listed(str(layer.attention.k) for layer in layers if layer.attention.k).replace(str(ALL_KEYS), 'all')
    speed, gz = summary['tokens_per_second'], test['gzip_bits_per_byte']
    rows = [
        ('parameters', f'{summary["parameters"]:,}', f'FFN {kinds("ffn")}, attention {kinds("attention")}'),
        ('steps', f'{summary["steps"]:,}', f'on {summary["devices"]}'),
        ('training', f'{summary["train_seconds"]:.0f} s', f'{speed:,.0f} tokens/s' if speed else 'nothing left to do'),
        ('validation loss', f'{summary["validation"]["loss"]:.4f}', 'nats per token'),
        ('test loss', f'{test["loss"]:.4f}', f'perplexity {test["perplexity"]:.2f}'),
        ('test bits per byte', f'{test["bits_per_byte"]:.3f}', f'gzip -9: {gz:.3f}' if gz else ''),
    ]
    if 'active' in test:
        rows.append(('active neurons', f'{test["active"]:.1%}', f'k / d_ff = {shares}' if shares else f'of {cfg.model.ffn.d_ff}'))
    rows.append(('attended keys', f'{test["attended"]:.1f}', f'k = {ks}' if ks else 'all visible ones'))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    line = lambda cells: '| ' + ' | '.join(f'{cell:<{w}}' for cell, w in zip(cells, widths, strict=True)) + ' |'
    lines = ['', line([''] * 3), '|' + '|'.join('-' * (w + 2) for w in widths) + '|', *map(line, rows)]
    if summary['sample']:
        lines += ['', f'A continuation of {cfg.sample.prompt!r}:', summary['sample']]
    return '\n'.join(lines)


if __name__ == '__main__':
    use_huge_pages()
    errors.run(main, check=config.check_flags, required=[CONFIG, WORKDIR])
