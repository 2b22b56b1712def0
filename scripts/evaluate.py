"""Evaluate a checkpoint of any run, dense or Spark: loss, statistics of its lookups, FLOPs, benchmark tasks.

    python scripts/evaluate.py --workdir=DIR [--step=N] [--ema] [--split=test] [--loss_only] [--json=FILE] [--plots] [--history]
        [--length=TOKENS] [--fit_predictor] [--k_measured=SHARE] [--neurons=LAYER] [--tasks=hellaswag,arc_easy,…]

Prints tables. --length=N takes rows of N tokens, also longer ones than in training: see loss and attended keys by position.
--fit_predictor adds what a linear predictor of the same rank and a constant ranking of neurons reach, fitted to the contributions
by least squares. --k_measured=0.08 evaluates at the k at which nearly 8 % of the neurons are active, and says which k that is.
--plots and --neurons write figures and an HTML page of neurons to DIR/evaluation/. --history measures the kept checkpoints before
this one, too, and draws there how well top-k selected at each. --tasks runs tasks of lm-evaluation-harness,
and nothing else with --split=none. The built-in needle_single, needle_multikey and needle_tracking have contexts of any length:
--metadata='{"length": [512, 2048], "depth": [0, 0.5]}'.
Exit codes: 0 done, 2 bad usage, 4 data or task unreadable, 5 no such checkpoint.
"""

import contextlib
import json

from absl import flags

from spark import errors
from spark.runtime import run_directory, use_huge_pages, write_json

WORKDIR = flags.DEFINE_string('workdir', None, 'The run directory.')
STEP = flags.DEFINE_integer('step', None, 'The step of the checkpoint; default the newest.', lower_bound=0)
EMA = flags.DEFINE_bool('ema', False, 'The mean of the parameters, which optimizer.ema keeps.')
SPLIT = flags.DEFINE_enum('split', 'test', ['train', 'validation', 'test', 'none'], 'The text; none with --tasks alone.')
SOURCE = flags.DEFINE_string('source', '', "Held-out text instead of the run's own, such as text:GLOB; see data.source.")
BATCH = flags.DEFINE_integer('batch_size', 0, 'Rows per batch; default those of a microbatch in training.', lower_bound=0)
LENGTH = flags.DEFINE_integer('length', 0, "Tokens in a row; default the run's data.seq_len.", lower_bound=0)
FIT = flags.DEFINE_bool('fit_predictor', False, 'Also fit linear predictors of the same rank to the same neurons.')
SHARE = flags.DEFINE_float('k_measured', None, 'Evaluate at the k at which this share of the neurons is active.')
HISTORY = flags.DEFINE_bool('history', False, 'Also measure the earlier checkpoints, and draw recall over steps.')
CONTEXT = flags.DEFINE_integer('context', None, 'Context, in tokens, of the FLOPs; default --length.', lower_bound=1)
LOSS_ONLY = flags.DEFINE_bool('loss_only', False, 'No statistics and no FLOPs: costs a forward pass.')
PLOTS = flags.DEFINE_bool('plots', False, 'Also draw activity, scores and attended keys.')
LAYER = flags.DEFINE_integer('layer', None, 'The layer whose scores are drawn; default the middle one.', lower_bound=0)
NEURONS = flags.DEFINE_integer('neurons', None, 'Also write an HTML page of the neurons of this layer.', lower_bound=0)
TASKS = flags.DEFINE_list('tasks', [], 'Tasks or groups of lm-evaluation-harness.')
TASK_PATH = flags.DEFINE_string('task_path', None, 'A directory of additional task files; they may run code.')
METADATA = flags.DEFINE_string('metadata', '{}', 'JSON for tasks that build their data, such as {"length": [512, 2048]}.')
LIMIT = flags.DEFINE_integer('limit', None, 'Documents per task; default all.', lower_bound=1)
FEWSHOT = flags.DEFINE_integer('fewshot', None, 'Examples in the context; default as the task asks for.', lower_bound=0)
JSON = flags.DEFINE_string('json', None, 'Also write the report to this file.')


def main() -> None:
    workdir = run_directory(WORKDIR.value)
    draws = PLOTS.value or NEURONS.value is not None
    if SPLIT.value == 'none' and (draws or not TASKS.value):
        raise errors.ConfigError('--split=none: there is nothing to do without --tasks, and nothing to draw without a split')
    if LOSS_ONLY.value and draws:
        raise errors.ConfigError('--loss_only: --plots and --neurons draw the statistics that it leaves out')
    if FIT.value and (LOSS_ONLY.value or SPLIT.value == 'none'):
        raise errors.ConfigError('--fit_predictor: its recall is a statistic, which --loss_only and --split=none leave out')
    if HISTORY.value and (LOSS_ONLY.value or SPLIT.value == 'none' or SHARE.value is not None):
        raise errors.ConfigError('--history: draws recall, which --loss_only and --split=none leave out, and takes k as it was')
    metadata = parsed_metadata()
    if metadata and not TASKS.value:
        raise errors.ConfigError('--metadata: only --tasks read it')
    # Imported late, so that usage errors come before jax starts.
    from spark.evaluation import evaluate, neurons, plots, tables

    load = lambda step: evaluate.load(workdir, step, SOURCE.value, BATCH.value, LENGTH.value, EMA.value)
    model = load(STEP.value)
    n_layers = model.cfg.model.n_layers
    for name, flag in [('layer', LAYER), ('neurons', NEURONS)]:
        if flag.value is not None and flag.value >= n_layers:
            raise errors.ConfigError(f'--{name}={flag.value}: want a layer from 0 to {n_layers - 1}')
    if TASKS.value:
        try:
            from spark.evaluation import needles, tasks
        except ImportError as e:
            raise errors.ConfigError(f"--tasks needs lm-eval: pip install 'spark-transformer[eval]' ({e})") from None
        loaded = tasks.load(TASKS.value, TASK_PATH.value, metadata, needles.tasks(model.tokenizer, model.cfg.data))
    measured = {}
    if SHARE.value is not None:
        model, active = evaluate.with_k(model, SHARE.value)
        measured = {'k_measured': {'wanted': SHARE.value, 'active': active}}
        print(f'{active:.2%} of the neurons are active at model.ffn.k = {model.cfg.model.ffn.k}; --k_measured={SHARE.value:.2%}')
    ks = [layer.ffn.k for layer in model.cfg.model.per_layer]
    report = {'workdir': str(workdir), 'step': model.step, 'k': ks[0] if len(set(ks)) == 1 else ks, **measured}
    if SPLIT.value != 'none':
        found, sums = evaluate.evaluate(model, SPLIT.value, CONTEXT.value, not LOSS_ONLY.value, FIT.value)
        print(tables.tables(found))
        report |= found
    if draws:
        out = workdir / 'evaluation' / f'{SPLIT.value}_{model.step}'
        layer = next(n for n in (LAYER.value, NEURONS.value, n_layers // 2) if n is not None)
        figures = plots.draw(model.cfg.model, report, sums, layer, out)
        print('', *figures, sep='\n')
        if NEURONS.value is not None:
            print(neurons.write(model, SPLIT.value, NEURONS.value, out / f'neurons_{NEURONS.value}.html', figures[0]))
    if HISTORY.value:
        earlier = [step for step in evaluate.steps(workdir) if step < model.step]
        reports = [evaluate.evaluate(load(step), SPLIT.value, CONTEXT.value, fit=FIT.value)[0] for step in earlier]
        report['history'] = [{'step': r['step'], 'loss': r['loss'], 'layers': r['layers']} for r in (*reports, report)]
        print(plots.recall(report['history'], f'{SPLIT.value} split', workdir / 'evaluation' / f'{SPLIT.value}_recall.png'))
    if TASKS.value:
        report['tasks'], table = tasks.run(model, loaded, limit=LIMIT.value, num_fewshot=FEWSHOT.value)
        print(table)
    if JSON.value:
        write_json(JSON.value, report)


def parsed_metadata() -> dict:
    """The object of --metadata."""
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(METADATA.value), dict):
            return found
    raise errors.ConfigError(f'--metadata={METADATA.value}: want a JSON object, such as {{"length": [512, 2048]}}')


if __name__ == '__main__':
    use_huge_pages()
    errors.run(main, required=[WORKDIR])
