"""Evaluate a checkpoint of any run, dense or Spark: loss, what its lookups do, FLOPs, tasks. The run directory holds the config.

    python scripts/evaluate.py --workdir=DIR [--step=N] [--split=test] [--json=FILE] [--plots] [--neurons=LAYER]
        [--tasks=hellaswag,arc_easy,…]

Prints tables. --plots and --neurons leave pictures and a page to browse in DIR/evaluation/; --tasks runs lm-evaluation-harness,
with --split=none nothing else.
Exit codes: 0 done, 2 bad usage, 4 data or task unreadable, 5 no such checkpoint.
"""

from absl import flags

from spark import errors
from spark.runtime import run_directory, use_huge_pages, write_json

WORKDIR = flags.DEFINE_string('workdir', None, 'The run directory.')
STEP = flags.DEFINE_integer('step', None, 'Which checkpoint; default the newest.', lower_bound=0)
SPLIT = flags.DEFINE_enum('split', 'test', ['train', 'validation', 'test', 'none'], 'Which text; none for tasks alone.')
SOURCE = flags.DEFINE_string('source', '', 'Held-out text instead of the run\'s own, such as text:GLOB; see data.source.')
BATCH = flags.DEFINE_integer('batch_size', 0, 'Rows at a time; default those of the training.', lower_bound=0)
CONTEXT = flags.DEFINE_integer('context', None, 'Tokens that FLOPs are counted for; default data.seq_len.', lower_bound=1)
PLOTS = flags.DEFINE_bool('plots', False, 'Also draw activity, scores and attended keys.')
LAYER = flags.DEFINE_integer('layer', None, 'Layer whose scores are drawn; default the middle one.', lower_bound=0)
NEURONS = flags.DEFINE_integer('neurons', None, 'Also write a page to browse this layer\'s neurons.', lower_bound=0)
TASKS = flags.DEFINE_list('tasks', [], 'Tasks or groups of lm-evaluation-harness.')
TASK_PATH = flags.DEFINE_string('task_path', None, 'A directory with task files of your own; they may run code.')
LIMIT = flags.DEFINE_integer('limit', None, 'Documents per task; default all.', lower_bound=1)
FEWSHOT = flags.DEFINE_integer('fewshot', None, 'Examples in the context; default as the task says.', lower_bound=0)
JSON = flags.DEFINE_string('json', None, 'Also write the report to this file.')


def main():
    if not WORKDIR.value:
        raise errors.ConfigError('--workdir is missing; see --help')
    workdir = run_directory(WORKDIR.value)
    if SPLIT.value == 'none' and (PLOTS.value or NEURONS.value is not None or not TASKS.value):
        raise errors.ConfigError('--split=none: there is nothing to do without --tasks, and nothing to draw without a split')
    if str(workdir).startswith('gs://') and (PLOTS.value or NEURONS.value is not None):
        raise errors.ConfigError('--plots, --neurons: want a --workdir on this machine; copy the run, or mount its bucket')
    # Imported here, so that usage errors are told before jax starts.
    from spark.evaluation import evaluate

    model = evaluate.load(workdir, STEP.value, SOURCE.value, BATCH.value)
    n_layers = model.cfg.model.n_layers
    for name, flag in [('layer', LAYER), ('neurons', NEURONS)]:
        if flag.value is not None and flag.value >= n_layers:
            raise errors.ConfigError(f'--{name}={flag.value}: want a layer from 0 to {n_layers - 1}')
    if TASKS.value:
        tasks = harness()
        manager = tasks.load(TASKS.value, TASK_PATH.value)
    report = {'workdir': str(workdir), 'step': model.step}
    if SPLIT.value != 'none':
        report |= split_report(model, workdir / 'evaluation' / f'{SPLIT.value}_{model.step}')
    if TASKS.value:
        report['tasks'], table = tasks.run(model, TASKS.value, manager, limit=LIMIT.value, fewshot=FEWSHOT.value)
        print(table)
    if JSON.value:
        write_json(JSON.value, report)


def split_report(model, out):
    """Evaluates the split, prints its tables and leaves in `out` what was asked for."""
    from spark.evaluation import evaluate, neurons, plots

    cfg = model.cfg.model
    report, sums = evaluate.evaluate(model, SPLIT.value)
    report['flops'] = evaluate.flops_report(cfg, CONTEXT.value or model.cfg.data.seq_len, report['layers'])
    print(tables(report))
    if PLOTS.value or NEURONS.value is not None:
        middle = cfg.n_layers // 2 if NEURONS.value is None else NEURONS.value
        pictures = plots.draw(cfg, report, sums, middle if LAYER.value is None else LAYER.value, out)
        print('', *pictures, sep='\n')
    if NEURONS.value is not None:
        print(neurons.write(model, SPLIT.value, NEURONS.value, out / f'neurons_{NEURONS.value}.html', pictures[0]))
    return report


def harness():
    """spark.evaluation.tasks, if lm-eval is installed."""
    try:
        from spark.evaluation import tasks
    except ImportError as e:
        raise errors.ConfigError(f"--tasks needs lm-eval: pip install 'spark-transformer[eval]' ({e})") from None
    return tasks


def tables(report):
    """The report in Markdown: the text as a whole, a row per layer, a row per part of the FLOPs."""
    ends = report['without_ends']
    bits = lambda losses: f'{losses["bits_per_byte"]:.4f}' if 'bits_per_byte' in losses else '–'
    lines = [
        f'Step {report["step"]} on the {report["split"]} split: {report["tokens"]:,} tokens, {report["documents"]:,} documents, '
        f'{report["bytes"]:,} bytes',
        '',
        '|  | loss | perplexity | bits/byte |',
        '|---|---|---|---|',
        f'| all tokens | {report["loss"]:.4f} | {report["perplexity"]:.3f} | {bits(report)} |',
        f'| without document ends | {ends["loss"]:.4f} | {ends["perplexity"]:.3f} | {bits(ends)} |',
        '',
        '| layer | active mean | p95 | max | recall | precision | KS | dead | Gini | keys mean | max | recall | precision | KS |',
        '|' + '---|' * 14,
    ]
    columns = [
        ('active_mean', '.1%'), ('active_p95', '.1%'), ('active_max', '.1%'),
        ('recall', '.3f'), ('precision', '.3f'), ('ks', '.3f'), ('dead', 'd'), ('gini', '.2f'),
        ('attended_mean', '.1f'), ('attended_max', '.0f'),
        ('attention_recall', '.3f'), ('attention_precision', '.3f'), ('attention_ks', '.3f'),
    ]  # fmt: skip
    for layer in report['layers']:
        cells = [format(layer[name], style) if name in layer else '–' for name, style in columns]
        lines.append(f'| {layer["layer"]} {layer["span"]} | ' + ' | '.join(cells) + ' |')
    lines += ['', f'FLOPs per token, millions, at a context of {report["flops"]["context"]} tokens:', '']
    decode = report['flops']['decode']
    sparse = decode['measured'] != decode['dense']
    ways = ('dense', 'configured', 'measured') if sparse else ('measured',)
    columns = [*((phase, way) for phase in ('prefill', 'decode') for way in ways), ('training', 'configured')]
    lines += ['| part | ' + ' | '.join(f'{phase}, {way}' for phase, way in columns) + ' |', '|' + '---|' * (len(columns) + 1)]
    names = {'total': 'all', 'body': 'all but the head'}
    for part in [*report['flops']['decode']['dense']]:
        cells = [f'{report["flops"][phase][way][part] / 1e6:,.3f}' for phase, way in columns]
        lines.append(f'| {names.get(part, part)} | ' + ' | '.join(cells) + ' |')
    ratio = lambda part: decode['dense'][part] / decode['measured'][part]
    if sparse:
        lines += ['', f'Dense over this model, decoding: FFN {ratio("ffn"):.2f}×, attention {ratio("attention"):.2f}×, '
                  f'all but the head {ratio("body"):.2f}×.']  # fmt: skip
    return '\n'.join(lines)


if __name__ == '__main__':
    use_huge_pages()
    errors.run(main)
