"""Grids of training runs: what to run, and running it. What came out of them is in results.py.

    OUT/sweep.json      the base config and the axes
    OUT/runs/NAME/      one run directory each, as scripts/train.py leaves it
    OUT/logs/NAME.log   what the run printed; NAME.json how it ended; with SLURM, NAME.job its number
"""

import csv
import dataclasses
import itertools
import json
import os
import re
import subprocess

import filelock
import pydantic
from tqdm import tqdm

from spark import config, flops
from spark.config import ATTENTION_KINDS, FFN_KINDS, matched_d_ff
from spark.data import pipeline
from spark.errors import ConfigError, Preempted
from spark.runtime import stop_signals, write_json

# What may differ between runs whose parameter counts are compared: no choice of a lookup changes the count.
LOOKUP = {f'model.{half}.{name}' for half in ('ffn', 'attention') for name in ('kind', 'k', 'r', 'topk', 'huber')}


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of a grid: its directory's name, its ExperimentConfig, and what the sweep changed to make it fit."""

    name: str
    cfg: config.ExperimentConfig
    adjusted: str = ''


def parse_axes(axes):
    """{field: values} of strings 'FIELD=v1,v2,…'; values may be quoted as in CSV, a tuple's parts are joined by '+'."""
    parsed = {}
    for axis in axes:
        field, equals, text = axis.partition('=')
        if not equals or not text:
            raise ConfigError(f'--axis={axis}: want FIELD=value,value,…')
        kind = config.field_type(field, f'--axis={axis}')
        values = [_parse_value(axis, kind, value.strip()) for value in next(csv.reader([text]))]
        if field in parsed:
            raise ConfigError(f'--axis={axis}: {field} is an axis already')
        parsed[field] = list(dict.fromkeys(values))
    if not parsed:
        raise ConfigError('--axis is missing: want at least one FIELD=value,value,…')
    return parsed


def grid(base, axes):
    """The Runs of the product of `axes` over the ExperimentConfig `base`, each fitted to its kinds (see `_fit`).

    Raises:
      ConfigError: a point is not a valid config, or parameter counts differ by more than 1 % where only a lookup's kind, k or
        r does.
    """
    runs, counts = {}, {}
    short = short_names(axes)
    for point in itertools.product(*axes.values()):
        chosen = dict(zip(axes, point, strict=True))
        cfg, adjusted = _fit(base, chosen)
        values = config.fields(cfg)
        name = '_'.join(f'{short[field]}-{_safe(values[field])}' for field in axes)
        same = runs.setdefault(name, Run(name, cfg, adjusted))
        if same.cfg != cfg:
            raise ConfigError(f'--axis: two points of the grid would share the name {name}')
        others = tuple((f, values[f]) for f in axes if f not in LOOKUP and f != 'seed')
        counts.setdefault(others, []).append((flops.parameters(pipeline.tokenizer_for(cfg)[1].model), name))
    for (least, small), (most, large) in ((min(group), max(group)) for group in counts.values()):
        if most > 1.01 * least:
            raise ConfigError(f'parameters differ by {most / least - 1:.1%}: {small} has {least:,}, {large} has {most:,}; '
                              'leave model.ffn.d_ff to the sweep')  # fmt: skip
    return list(runs.values())


def claim(out, base, axes, runs):
    """Makes `out` the directory of this sweep; a ConfigError names the fields in which it is another's.

    Axes may get more values later; the base config and the set of axes stay.
    """
    path = out / 'sweep.json'
    if path.exists():
        try:
            before = json.loads(path.read_text())
            theirs = config.ExperimentConfig.model_validate_json(json.dumps(before['config']))
            their_axes = set(before['axes'])
        except (ValueError, KeyError, TypeError) as e:
            raise ConfigError(f'{path}: not the record of a sweep: {" ".join(str(e).split())}') from None
        if their_axes != set(axes):
            raise ConfigError(f'--out={out} belongs to a sweep over {", ".join(sorted(their_axes))}: choose another directory')
        if different := config.differences(theirs, base, ignore=axes):
            raise ConfigError(f'--out={out} belongs to a sweep with {different}: choose another directory')
    for run in runs:
        there = out / 'runs' / run.name / 'config.json'
        if there.exists() and (different := config.differences(config.load(there), run.cfg)):
            raise ConfigError(f'{there.parent} belongs to a run with {different}: choose another --out')
    try:
        (out / 'logs').mkdir(parents=True, exist_ok=True)
        if not path.exists():
            strangers = sorted(p.name for p in out.iterdir() if p.name not in ('logs', '.lock'))
            if strangers:
                raise ConfigError(f'--out={out} holds {strangers[0]!r} but no sweep.json: choose another directory')
        write_json(path, {'config': json.loads(base.model_dump_json()), 'axes': axes})
    except OSError as e:
        raise ConfigError(f'--out={out}: {e.strerror or e}') from None


def command(train, config_path, overrides, base, run, out):
    """The words of the shell command that trains a run.

    Args:
      train: the words before the flags, such as ['python', 'scripts/train.py'].
      config_path: PATH[:VARIANT].
      overrides: {field: value} of the command line that made `base`.
      base, run, out: the sweep's.
    """
    theirs, ours = config.fields(base), config.fields(run.cfg)
    changed = overrides | {field: value for field, value in ours.items() if value != theirs[field]}
    flags = [f'--config.{field}={value}' for field, value in changed.items()]
    return [*train, f'--config={config_path}', f'--workdir={out / "runs" / run.name}', *flags]


def finished(out, run):
    """Has the run of this name left its summary?"""
    return (out / 'runs' / run.name / 'summary.json').exists()


def execute(words, out, name, tick=lambda: None):
    """Runs a command with its output appended to OUT/logs/NAME.log, and leaves its end in NAME.json; returns the exit code.

    A first SIGTERM or SIGINT is handed on, so that the run saves its state. `tick` is called twice a second.

    Raises:
      Preempted: after such a signal.
      filelock.Timeout: another process is at this run.
    """
    log = out / 'logs' / f'{name}.log'
    record = log.with_suffix('.json')
    with filelock.FileLock(log.with_suffix('.lock'), timeout=0), log.open('ab') as output:
        start = output.tell()
        # Its own session, so that a Ctrl-C reaches it through here, once.
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        with stop_signals(lambda n: process.terminate() if n == 1 else process.kill()) as signals:
            while True:
                try:
                    code = process.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        said = log.read_bytes()[start:].decode('utf-8', 'replace').replace('\r', '\n').split('\n')
        last = next((line for line in reversed(said) if 'Error: ' in line), next((s for s in reversed(said) if s.strip()), ''))
        record.write_text(json.dumps({'exit_code': code, 'message': last if code else ''}) + '\n')
    if signals or code == Preempted.exit_code:
        raise Preempted(f'stopped in {name} of {out}; run the same command to go on')
    return code


def run_locally(runs, commands, out):
    """Trains what is not finished, one after another, with one progress bar over all steps.

    Raises:
      Preempted: after a signal, with the state of the current run saved.
    """
    steps = {run.name: run.cfg.train.steps for run in runs}
    done = sum(steps[run.name] for run in runs if finished(out, run))
    with tqdm(total=sum(steps.values()), initial=done, desc='sweep', unit='step') as bar:
        for i, run in enumerate(runs):
            if finished(out, run):
                continue
            before = bar.n

            def tick(i=i, run=run, before=before):
                step, loss = latest(out / 'runs' / run.name)
                bar.n = before + step
                bar.set_postfix_str(f'run {i + 1} of {len(runs)}: {run.name}' + (f', loss {loss:.3f}' if loss else ''))

            tick()
            try:
                code = execute(commands[run.name], out, run.name, tick)
            except filelock.Timeout:
                bar.write(f'{run.name}: another process is at it')
                continue
            bar.n = before + steps[run.name]
            bar.refresh()
            if code:
                bar.write(f'{run.name}: failed with exit code {code}, see {out}/logs/{run.name}.log')


def submit(runs, commands, out, parameters):
    """Submits what is not finished to SLURM through submitit, one job per run; {run name: job id}.

    Args:
      runs, commands, out: see `run_locally`.
      parameters: {name: value} of `submitit.SlurmExecutor.update_parameters`, such as time, partition, gpus_per_node.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("--launcher=slurm needs submitit: pip install 'spark-transformer[slurm]'") from None
    jobs = {}
    try:
        executor = submitit.SlurmExecutor(folder=out.absolute() / 'slurm')
        executor.update_parameters(**{'job_name': out.name, **parameters})
        for run in runs:
            ticket = out / 'logs' / f'{run.name}.job'
            if finished(out, run):
                continue
            if ticket.exists():
                earlier = submitit.SlurmJob(folder=out.absolute() / 'slurm', job_id=ticket.read_text().strip())
                if not earlier.done():
                    print(f'{run.name}: job {earlier.job_id} has not ended')
                    continue
            job = executor.submit(execute, commands[run.name], out.absolute(), run.name)
            ticket.write_text(f'{job.job_id}\n')
            jobs[run.name] = job.job_id
    except Exception as e:  # submitit raises what it likes
        raise ConfigError(f'--launcher=slurm: {type(e).__name__}: {e}') from None
    return jobs


def latest(workdir):
    """(step, loss) of the last complete line of training metrics in a run directory; (0, None) before there is one."""
    try:
        with (workdir / 'metrics.jsonl').open('rb') as f:
            f.seek(max(f.seek(0, os.SEEK_END) - 20_000, 0))
            for line in reversed(f.read().split(b'\n')[:-1]):
                record = json.loads(line)
                if record['split'] == 'train':
                    return record['step'], record['loss'] if isinstance(record['loss'], float) else None
    except (OSError, ValueError, KeyError):
        pass
    return 0, None


def _parse_value(axis, kind, text):
    try:
        adapter = pydantic.TypeAdapter(kind)
        if getattr(kind, '__origin__', None) is tuple:
            return adapter.validate_python(tuple(text.split('+')))
        return adapter.validate_strings(text)
    except pydantic.ValidationError as e:
        message = e.errors()[0]['msg'].replace('Input should be', 'want')
        raise ConfigError(f'--axis={axis}: {text!r}: {message}') from None


def _fit(base, chosen):
    """(ExperimentConfig, note): `base` with the chosen values, and what they drag along.

    Another FFN kind gets the d_ff of equal parameters and the same share of active neurons; k and r are 0 in kinds that
    have none, whatever an axis says, so a grid over kinds and k does not need to leave points out.
    """
    raw = base.model_dump()
    for field, value in chosen.items():
        *sections, name = field.split('.')
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value
    f, a, was = raw['model']['ffn'], raw['model']['attention'], base.model.ffn
    note = []
    if f['kind'] != was.kind and 'model.ffn.d_ff' not in chosen:
        f['d_ff'] = matched_d_ff(was.d_ff, was.kind, f['kind'])
        if f['d_ff'] != was.d_ff:
            note.append(f'd_ff {was.d_ff} → {f["d_ff"]}')
    kind = FFN_KINDS[f['kind']]
    if kind.topk and 'model.ffn.k' not in chosen:
        f['k'] = round(was.k * f['d_ff'] / was.d_ff)
    if not kind.topk:
        f |= {'k': 0, 'topk': 'statistical', 'huber': 0.0}
    if not kind.predictor:
        f['r'] = 0
    kind = ATTENTION_KINDS[a['kind']]
    a |= {name: 0 for name, has in [('k', kind.topk), ('r', kind.predictor)] if not has}
    changed = [(half, name, was_, now) for half, was_, now in [('ffn', was, f), ('attention', base.model.attention, a)]
               for name in ('k', 'r')]  # fmt: skip
    for half, name, before, now in changed:
        wanted = chosen.get(f'model.{half}.{name}', getattr(before, name))
        if now[name] != wanted:
            note.append(f'{half}.{name} {wanted} → {now[name]}')
    return config.validate(raw), ', '.join(note)


def short_names(axes):
    """{field: the shortest end of its dotted name that no other axis shares}."""
    names = {}
    for field in axes:
        parts = field.split('.')
        ends = ['.'.join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        names[field] = next(end for end in ends if sum(f == end or f.endswith('.' + end) for f in axes) == 1)
    return names


def _safe(value):
    text = '+'.join(value) if isinstance(value, tuple) else str(value)
    return re.sub(r'[^A-Za-z0-9.+-]+', '_', text).strip('._') or '_'


