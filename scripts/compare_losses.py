"""Train a config at two git revisions and tell whether the losses are bitwise equal: the proof of a refactoring.

    python scripts/compare_losses.py OLD_REV NEW_REV [--config=configs/tiny.py[:VARIANT]] [--steps=20]

Both revisions train with this Python in temporary worktrees, in about two minutes each on two cores. `loss` and `grad_norm` of
every step, and the losses of validation and test, are compared. C++ kernels are not: both sides use those of this checkout.
Exit codes: 0 equal, 1 different, 2 a revision that does not exist or cannot be trained.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl import flags

from spark import errors

CONFIG = flags.DEFINE_string('config', 'configs/tiny.py', 'PATH[:VARIANT] of a config that both revisions have.')
STEPS = flags.DEFINE_integer('steps', 20, 'How long to train.', lower_bound=2)
ROOT = pathlib.Path(__file__).resolve().parent.parent


def git(*words: str) -> None:
    """Runs git in this repository; a ConfigError if it fails."""
    if (done := subprocess.run(['git', '-C', str(ROOT), *words], capture_output=True, text=True)).returncode:
        raise errors.ConfigError(f'git {" ".join(words)}: {done.stderr.strip()}')


def train(revision: str, scratch: pathlib.Path) -> dict:
    """{(step, split, metric): value} of a run at a revision, in the directory `scratch`."""
    tree, workdir = scratch / 'tree', scratch / 'run'
    overrides = {'train.steps': STEPS.value, 'train.log_every': 1, 'optimizer.warmup_steps': STEPS.value // 4, 'sample.tokens': 0}
    words = [f'--config={CONFIG.value}', f'--workdir={workdir}', *(f'--config.{name}={n}' for name, n in overrides.items())]
    git('worktree', 'add', '--quiet', '--detach', str(tree), revision)
    try:
        for kernels in (ROOT / 'spark' / 'kernels').glob('_cpu*.so'):
            shutil.copy(kernels, tree / 'spark' / 'kernels')
        env = os.environ | {'PYTHONPATH': str(tree)}
        code = subprocess.run([sys.executable, 'scripts/train.py', *words], cwd=tree, env=env).returncode
    finally:
        git('worktree', 'remove', '--force', str(tree))
    if code:
        raise errors.ConfigError(f'{revision} cannot be trained: scripts/train.py ended with exit code {code}')
    records = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return {(r['step'], r['split'], name): r[name] for r in records for name in ('loss', 'grad_norm') if name in r}


def main(*revisions: str) -> None:
    for revision in revisions:
        git('rev-parse', '--verify', '--quiet', f'{revision}^{{commit}}')
    with tempfile.TemporaryDirectory() as scratch:
        old, new = (train(revision, pathlib.Path(scratch) / str(i)) for i, revision in enumerate(revisions))
    steps = {(step, 'train', 'loss') for step in range(1, STEPS.value + 1)}
    if missing := steps - (old.keys() & new.keys()):
        raise errors.ConfigError(f'{len(missing)} of {len(steps)} steps have no training loss at both revisions')
    both = sorted(old.keys() & new.keys())
    different = [key for key in both if old[key] != new[key]]
    for step, split, name in different[:10]:
        print(f'step {step}, {split} {name}: {old[step, split, name]!r} became {new[step, split, name]!r}')
    verdict = f'{len(different)} differ' if different else 'bitwise equal'
    print(f'{len(both)} values of {STEPS.value} steps compared: {verdict}')
    sys.exit(1 if different else 0)


if __name__ == '__main__':
    errors.run(main, arguments=['OLD_REV', 'NEW_REV'])
