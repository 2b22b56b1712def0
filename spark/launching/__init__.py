"""Hands a run over to an engine that starts it on other machines (xpk, gcloud, slurm), or starts it on this one (local).

An engine is a module with its PROGRAM, the OPTIONS of --set with their defaults (None: required), and `commands(job, root)`,
the commands that launch a job of the git repository `root`. The job runs an exact git revision with exact versions of packages;
what of it is started again, and how often, says `restart`.
"""

import pathlib
import re
import shlex
import shutil
import subprocess
import tempfile

from spark.errors import ConfigError
from spark.launching import gcloud, slurm, xpk
from spark.launching.job import Job

HIDDEN = 'HIDDEN'  # printed instead of the value of an environment variable
ENGINES = {'slurm': slurm, 'gcloud': gcloud, 'xpk': xpk}


def parse_options(via: str, settings: list[str]) -> dict[str, str]:
    """The options of an engine from NAME=VALUE texts, without empty ones."""
    known = ENGINES[via].OPTIONS if via in ENGINES else {}
    given = {}
    for text in settings:
        name, equals, value = text.partition('=')
        if not equals or name not in known:
            raise ConfigError(f'--set={text}: want NAME=VALUE of {", ".join(known) or "nothing"} for --via={via}')
        given[name] = value
    for name, default in known.items():
        if default is None and name not in given:
            raise ConfigError(f'--set={name}=…: missing; --via={via} needs it')
    return {name: default for name, default in known.items() if default} | given


def parse_env(settings: list[str]) -> dict[str, str]:
    """Environment variables from NAME=VALUE texts."""
    for text in settings:
        if not re.match(r'[A-Za-z_]\w*=', text):
            raise ConfigError(f'--env={text}: want NAME=VALUE')
    return dict(text.split('=', 1) for text in settings)


def launch(via: str, job: Job, root: pathlib.Path, dry_run: bool = False) -> None:
    """Prints and runs the commands that launch a job, one after the other; if `dry_run`, only prints them.

    Values of the job's environment may be secrets. They are not printed, and only this user can read the files that hold them.
    """
    with tempfile.TemporaryDirectory(prefix=f'{job.name}-') as staging:  # nobody else can know or enter it
        _launch(via, job._replace(staging=staging), root, dry_run)


def _launch(via, job, root, dry_run):
    commands = ENGINES[via].commands(job, root)
    shown = ENGINES[via].commands(job._replace(env=dict.fromkeys(job.env, HIDDEN)), root)
    for program in ('uv', ENGINES[via].PROGRAM):
        if not dry_run and not shutil.which(program) and any(program in words for words, _ in commands):
            how = ' (pip install uv)' if program == 'uv' else ''
            raise ConfigError(f'--via={via}: {program} is not on the PATH{how}; --dry_run prints what would run')
    for (words, script), told in zip(commands, shown, strict=True):
        print(shlex.join(told.words), flush=True)
        if dry_run:
            print(f'\n{told.script}' if script else '', end='')
            continue
        if script:
            path = pathlib.Path(words[-1])
            path.touch(0o600)
            path.chmod(0o600)  # also one of an earlier launch
            path.write_text(script)
        if code := subprocess.run(words).returncode:
            raise ConfigError(f'--via={via}: {words[0]} ended with exit code {code}')
