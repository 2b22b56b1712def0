"""What the engines share: a job, its revision, its topology, and the shell lines that train it."""

import math
import pathlib
import re
import shlex
import subprocess
from typing import NamedTuple

from spark.errors import ConfigError

# Google's name of an accelerator, and how many devices jax sees per unit of its number (v4 and v5p count cores, two to a device).
ACCELERATORS = {'v4': ('v4', 0.5), 'v5e': ('v5litepod', 1), 'v5p': ('v5p', 0.5), 'v6e': ('v6e', 1)}

PYTHON = '3.12'  # of TPU VMs, containers, and environments made for a job
LINUX = 'x86_64-manylinux_2_31'  # what packages must run on there; libtpu's have no older one
LOCK = 'requirements.lock'


class Job(NamedTuple):
    """A run to launch."""

    name: str
    train: list[str]  # the arguments of scripts/train.py
    workdir: str
    revision: str
    topology: str | None
    slices: int
    options: dict[str, str]
    env: dict[str, str] = {}  # noqa: RUF012 a NamedTuple's, and nothing changes it
    extras: tuple[str, ...] = ()  # of the package, which the job needs
    restarts: int = 5  # without a new checkpoint
    staging: str = '/tmp'  # a directory for the files of this launch alone

    @property
    def archive(self) -> str:
        """Where the revision is unpacked on this machine."""
        return f'{self.staging}/{self.name}-{self.revision[:12]}'


class Command(NamedTuple):
    """The words of a shell command; a script, if it has one, is first written to the path that is the last word."""

    words: list[str]
    script: str = ''


def parse_topology(text: str) -> tuple[str, str, int]:
    """(kind, accelerator type, devices) of 'v5e-256', as Google counts, or of 'v5e:16x16', as JAX does."""
    match = re.fullmatch(r'(\w+)(?:-(\d+)|:(\d+(?:x\d+)+))', text)
    if not match or match[1] not in ACCELERATORS:
        raise ConfigError(f'--topology={text}: want KIND-N or KIND:AxB of {", ".join(ACCELERATORS)}, such as v5e-256, v5e:16x16')
    name, per_unit = ACCELERATORS[match[1]]
    devices = int(int(match[2]) * per_unit) if match[2] else math.prod(map(int, match[3].split('x')))
    flat = match[1] in ('v5e', 'v6e')  # those of the others are boxes of many shapes
    if not devices or (flat and devices not in (1, 4, 8, 16, 32, 64, 128, 256)):
        raise ConfigError(f'--topology={text}: want ' + ('1, 4, 8, 16, … 256 chips' if flat else 'at least one chip'))
    return match[1], f'{name}-{int(devices / per_unit)}', devices


def git_revision(root: pathlib.Path, allow_changes: bool = False) -> str:
    """The commit that is checked out in `root`; a ConfigError if files differ from it, since those would not be launched."""
    git = lambda *words: subprocess.run(['git', '-C', str(root), *words], capture_output=True, text=True)
    head = git('rev-parse', 'HEAD')
    if head.returncode:
        raise ConfigError(f'{root}: not a git repository; only a committed revision can be launched')
    # New files matter where the code is; elsewhere they are somebody's data and results.
    matters = lambda line: not line.startswith('??') or line[3:].startswith(('spark/', 'scripts/', 'configs/'))
    if not allow_changes and (changed := [*filter(matters, git('status', '--porcelain').stdout.splitlines())]):
        raise ConfigError(f'{changed[0][3:]} differs from the revision {head.stdout[:12]} that would run: commit it first')
    return head.stdout.strip()


def unpack(job: Job, root: pathlib.Path, directory: str) -> Command:
    """The command that unpacks the job's revision into a directory."""
    target, archive = shlex.quote(directory), shlex.join(['git', '-C', str(root), 'archive', job.revision])
    return Command(['bash', '-c', f'mkdir -p {target} && {archive} | tar -x -C {target}'])


def freeze(job: Job, directory: str, platform: str = '') -> Command:
    """The command that resolves what an unpacked revision needs, once: exact versions with their hashes, in LOCK.

    If the file is there, as from an earlier launch, its versions stay.
    """
    extras = [f'--extra={extra}' for extra in job.extras]
    target = [f'--python-version={PYTHON}', *([f'--python-platform={platform}'] if platform else [])]
    resolve = ['uv', 'pip', 'compile', '--quiet', '--generate-hashes', *target, *extras]
    return Command([*resolve, f'{directory}/setup.py', '-o', f'{directory}/{LOCK}'])


def insistently(line: str) -> str:
    """The line of shell that runs another line until it succeeds, at most four times; the package index may not answer."""
    return f'for wait in 0 10 30 90; do sleep $wait; {line} && break; done'


def train_line(job: Job, devices: int, python: str = 'python') -> str:
    """The line of shell that trains, in the unpacked revision."""
    env = {'PYTHONPATH': '.', 'SPARK_REVISION': job.revision, 'SPARK_DEVICES': devices, **job.env}
    told = ' '.join(f'{name}={shlex.quote(str(value))}' for name, value in env.items())
    return f'env {told} {python} scripts/train.py {shlex.join(job.train)}'


def restarted(job: Job, line: str, python: str = 'python', *more: str) -> str:
    """The line of shell that runs another line, again and again as `launching.restart` says."""
    flags = shlex.join([f'--workdir={job.workdir}', f'--restarts={job.restarts}', *more])
    return f'env PYTHONPATH=. {python} -m spark.launching.restart {flags} {line}'
