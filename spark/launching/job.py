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


class Job(NamedTuple):
    """A run to launch."""

    name: str
    train: list[str]  # the arguments of scripts/train.py
    workdir: str
    revision: str
    topology: str | None
    slices: int
    options: dict[str, str]

    @property
    def archive(self) -> str:
        """Where the revision is unpacked on this machine."""
        return f'/tmp/{self.name}-{self.revision[:12]}'


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
    return match[1], f'{name}-{int(devices / per_unit)}', devices


def git_revision(root: pathlib.Path, allow_changes: bool = False) -> str:
    """The commit that is checked out in `root`; a ConfigError if files differ from it, since those would not be launched."""
    git = lambda *words: subprocess.run(['git', '-C', str(root), *words], capture_output=True, text=True)
    head = git('rev-parse', 'HEAD')
    if head.returncode:
        raise ConfigError(f'{root}: not a git repository; only a committed revision can be launched')
    if not allow_changes and (changed := git('status', '--porcelain').stdout.splitlines()):
        raise ConfigError(f'{changed[0][3:]} differs from the revision {head.stdout[:12]} that would run: commit it first')
    return head.stdout.strip()


def unpack(job: Job, root: pathlib.Path, directory: str) -> Command:
    """The command that unpacks the job's revision into a directory."""
    target, archive = shlex.quote(directory), shlex.join(['git', '-C', str(root), 'archive', job.revision])
    return Command(['bash', '-c', f'mkdir -p {target} && {archive} | tar -x -C {target}'])


def train_line(job: Job) -> str:
    """The line of shell that trains, with the revision for the summary."""
    return f'env PYTHONPATH=. SPARK_REVISION={job.revision} python scripts/train.py {shlex.join(job.train)}'


def restart_loop(job: Job) -> str:
    """The line of bash that trains, and again after every preemption."""
    return f'while true; do code=0; {train_line(job)} || code=$?; [ $code -eq 75 ] || exit $code; done'
