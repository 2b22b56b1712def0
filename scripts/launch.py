"""Launch a training job on a cluster, on TPU VMs, or in several processes on this machine.

    python scripts/launch.py --config=PATH[:VARIANT] --workdir=gs://BUCKET/RUN --via=xpk|gcloud|slurm|local \
        [--topology=v5e-256] [--processes=N] [--set=NAME=VALUE …] [--env=NAME=VALUE …] [--restarts=N] [--dry_run] \
        [--config.x.y=value …] [-- FLAGS]

Other machines run the committed revision, which is copied there, with the versions of packages resolved now. A run
that was preempted (75), stalled (124) or crashed starts again, at most N times without a new checkpoint; 2 … 5 end it.
What stands after -- goes to scripts/train.py: --restore_from, --branch_from, --extend, --json. --dry_run prints the commands,
without the values of --env. The config is checked first, against the devices too, and that what it names is there.
Exit codes: 0 launched (local: done), 2 bad config, or an engine that fails, 4 data or a tokenizer that is not there, 75 stopped
(local); otherwise that of scripts/train.py (local).
"""

import os
import pathlib
import re
import shlex
import sys

from absl import flags
from etils import epath
from ml_collections import config_flags

from spark import config, errors
from spark.runtime import in_bucket
from spark.training import flags as start

CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, with an optional variant: PATH[:VARIANT].')
WORKDIR = flags.DEFINE_string('workdir', None, 'The run directory that all hosts see: gs://… or a shared file system.')
VIA = flags.DEFINE_enum('via', 'local', ['local', 'slurm', 'gcloud', 'xpk'], 'What starts the run.')
TOPOLOGY = flags.DEFINE_string('topology', None, 'For gcloud and xpk: of each slice, such as v5e-256 or v5e:16x16.')
PROCESSES = flags.DEFINE_integer('processes', 1, 'For local: the number of processes.', lower_bound=1)
RESTARTS = flags.DEFINE_integer('restarts', 5, 'How often to start again without a new checkpoint.', lower_bound=0)
SET = flags.DEFINE_multi_string('set', [], 'NAME=VALUE for the engine, such as zone=…, cluster=…, nodes=4, partition=….')
ENV = flags.DEFINE_multi_string('env', [], 'NAME=VALUE, an environment variable of the job, such as TFDS_DATA_DIR=gs://….')
NAME = flags.DEFINE_string('name', None, 'The name of the job; default: made from the workdir.')
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print the commands, and run nothing.')
ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    handed = start.parse(TRAIN_FLAGS)
    cfg = config.validate(start.apply(CONFIG.value, handed))
    workdir = WORKDIR.value if in_bucket(WORKDIR.value) else str(pathlib.Path(WORKDIR.value).expanduser().absolute())
    if VIA.value == 'local':
        run_here(workdir)
    else:
        submit(cfg, workdir, handed.extend)


def run_here(workdir: str) -> None:
    """Trains in processes of this machine; train.py itself checks the rest."""
    from spark.launching import HIDDEN, job, local, parse_env, parse_options

    if TOPOLOGY.value:
        raise errors.ConfigError(f'--topology={TOPOLOGY.value}: not for --via=local')
    parse_options('local', SET.value)
    os.environ.update(env := parse_env(ENV.value))
    file, variant = config_file()
    words = [sys.executable, str(ROOT / 'scripts' / 'train.py'), *train_arguments(file, variant, workdir)]
    if DRY_RUN.value:
        print(f'{PROCESSES.value} ×', *(f'{name}={HIDDEN}' for name in env), shlex.join(words))
        return
    sys.exit(local.run(words, PROCESSES.value, job.git_revision(ROOT, allow_changes=True), workdir, RESTARTS.value))


def submit(cfg: config.ExperimentConfig, workdir: str, extend: bool) -> None:
    """Hands the job over to an engine, after all checks that can be made from here."""
    from spark.launching import ENGINES, check, job, launch, parse_env, parse_options
    from spark.training import directory

    via, env = VIA.value, parse_env(ENV.value)
    on_tpu, mount = via in ('gcloud', 'xpk'), getattr(ENGINES[via], 'MOUNT', '')
    if on_tpu != bool(TOPOLOGY.value):
        want = 'want such as v5e-256' if on_tpu else f'not for --via={via}'
        raise errors.ConfigError(f'--topology={TOPOLOGY.value}: {want}')
    if PROCESSES.value != 1:
        raise errors.ConfigError(f'--processes={PROCESSES.value}: only for --via=local; --via={via} starts one per host')
    options = parse_options(via, SET.value)
    if on_tpu:
        accelerator, devices = 'tpu', job.parse_topology(TOPOLOGY.value)[2] * cfg.mesh.slices
    else:
        accelerator, devices = 'cuda' if 'gpu' in options.get('gres', '') else '', ENGINES['slurm'].devices(options)
    config.check_devices(cfg, devices)
    if via == 'gcloud' and cfg.mesh.slices > 1:
        raise errors.ConfigError(f'mesh.slices = {cfg.mesh.slices}: --via=gcloud starts one slice; --via=xpk starts several')
    if on_tpu and not in_bucket(workdir) and mount not in options:
        want = f'want gs://BUCKET/…, or --set={mount}=… and an absolute path that all hosts see'
        raise errors.ConfigError(f'--workdir={WORKDIR.value}: {want}')
    revision = job.git_revision(ROOT)
    file, variant = config_file()
    if not pathlib.Path(file).resolve().is_relative_to(ROOT):
        want = f'want a file of the repository {ROOT}, which is copied to the other machines'
        raise errors.ConfigError(f'--config={file}{variant}: {want}')
    train = train_arguments(str(pathlib.Path(file).resolve().relative_to(ROOT)), variant, workdir)
    name = NAME.value or re.sub('[^a-z0-9]+', '-', pathlib.Path(workdir).name.lower()).strip('-')[:39] or 'spark'
    needed = check.extras(cfg, workdir, accelerator, env)
    settings = TOPOLOGY.value, cfg.mesh.slices, options, env, needed, RESTARTS.value
    launched = job.Job(name, train, workdir, revision, *settings)
    check.check_names(cfg, launched, ROOT, shared=not on_tpu, mount=mount)
    if in_bucket(workdir):
        check.check_bucket_exists(workdir)
    if in_bucket(workdir) or not on_tpu:
        directory.check(epath.Path(workdir), cfg, extend)
    launch(via, launched, ROOT, DRY_RUN.value)


def check_flags(argv: list[str]) -> None:
    """Raises a ConfigError for a flag of train.py that does not stand after --, and as `config.check_flags` does."""
    config.check_flags(argv)
    for arg in argv:
        if (name := arg.lstrip('-').partition('=')[0]) in start.NAMES and arg.startswith('-'):
            raise errors.ConfigError(f'--{name}: want it after --, since it is a flag of scripts/train.py: … -- {arg}')


def config_file() -> tuple[str, str]:
    """PATH and :VARIANT of --config."""
    file, colon, variant = config.given(flags.FLAGS['config'])[0].partition(':')
    return file, colon + variant


def train_arguments(file: str, variant: str, workdir: str) -> list[str]:
    """The arguments of scripts/train.py."""
    fields = [f'--config.{field}={value}' for field, value in config.given(flags.FLAGS['config'])[1].items()]
    return [f'--config={file}{variant}', *fields, f'--workdir={workdir}', *TRAIN_FLAGS]


if __name__ == '__main__':
    end = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    TRAIN_FLAGS = sys.argv[end + 1 :]
    del sys.argv[end:]
    errors.run(main, check=check_flags, required=[CONFIG, WORKDIR])
