"""Launch a training job on a cluster, on TPU VMs, or in several processes on this machine.

    python scripts/launch.py --config=PATH[:VARIANT] --workdir=gs://BUCKET/RUN --via=xpk|gcloud|slurm|local \
        [--topology=v5e-256] [--processes=N] [--set=NAME=VALUE …] [--config.x.y=value …] [--dry_run]

Other machines run the committed revision, which is copied there. A run that was preempted (exit code 75) is started again.
--dry_run prints the commands. The config is checked first, also against the number of devices. Exit codes: 0 launched (local:
done), 2 bad config, or an engine that fails, 75 stopped (local); otherwise that of scripts/train.py (local).
"""

import pathlib
import re
import shlex
import sys

from absl import flags
from ml_collections import config_flags

from spark import config, errors

CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, with an optional variant: PATH[:VARIANT].')
WORKDIR = flags.DEFINE_string('workdir', None, 'The run directory that all hosts see: gs://… or a shared file system.')
VIA = flags.DEFINE_enum('via', 'local', ['local', 'slurm', 'gcloud', 'xpk'], 'What starts the run.')
TOPOLOGY = flags.DEFINE_string('topology', None, 'For gcloud and xpk: of each slice, such as v5e-256 or v5e:16x16.')
PROCESSES = flags.DEFINE_integer('processes', 1, 'For local: the number of processes.', lower_bound=1)
RESTARTS = flags.DEFINE_integer('restarts', 100, 'For local: how often to start again after a preemption.', lower_bound=0)
SET = flags.DEFINE_multi_string('set', [], 'NAME=VALUE for the engine, such as zone=…, cluster=…, nodes=4, partition=….')
NAME = flags.DEFINE_string('name', None, 'The name of the job; default: made from the workdir.')
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print the commands, and run nothing.')
ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    cfg = config.validate(CONFIG.value)
    from spark.launching import job, launch, local, parse_options

    via = VIA.value
    on_tpu = via in ('gcloud', 'xpk')
    if on_tpu != bool(TOPOLOGY.value):
        want = 'want such as v5e-256' if on_tpu else f'not for --via={via}'
        raise errors.ConfigError(f'--topology={TOPOLOGY.value}: {want}')
    if via != 'local' and PROCESSES.value != 1:
        raise errors.ConfigError(f'--processes={PROCESSES.value}: only for --via=local; --via={via} starts one per host')
    if on_tpu and not WORKDIR.value.startswith(('gs://', '/')):
        raise errors.ConfigError(f'--workdir={WORKDIR.value}: want gs://BUCKET/…, or an absolute path that all hosts see')
    options = parse_options(via, SET.value)
    if on_tpu:
        config.check_devices(cfg, job.parse_topology(TOPOLOGY.value)[2] * cfg.mesh.slices)
    if via == 'gcloud' and cfg.mesh.slices > 1:
        raise errors.ConfigError(f'mesh.slices = {cfg.mesh.slices}: --via=gcloud starts one slice; --via=xpk starts several')
    revision = job.git_revision(ROOT, allow_changes=via == 'local')
    workdir = WORKDIR.value if '://' in WORKDIR.value else str(pathlib.Path(WORKDIR.value).expanduser().absolute())
    name = NAME.value or re.sub('[^a-z0-9]+', '-', pathlib.Path(workdir).name.lower()).strip('-')[:39] or 'spark'
    train = [arg for arg in sys.argv[1:] if re.match('--?config[.]', arg)] + [f'--workdir={workdir}']
    given = next(arg.partition('=')[2] for arg in sys.argv if re.match('--?config=', arg))
    if via != 'local' and not pathlib.Path(given.partition(':')[0]).resolve().is_relative_to(ROOT):
        raise errors.ConfigError(f'--config={given}: want a file of the repository {ROOT}, which is copied to the other machines')
    train.insert(0, f'--config={given if via == "local" else pathlib.Path(given).resolve().relative_to(ROOT)}')
    if via == 'local':
        words = [sys.executable, str(ROOT / 'scripts' / 'train.py'), *train]
        if DRY_RUN.value:
            print(f'{PROCESSES.value} × {shlex.join(words)}')
            return
        sys.exit(local.run(words, PROCESSES.value, revision, RESTARTS.value))
    launch(via, job.Job(name, train, workdir, revision, TOPOLOGY.value, cfg.mesh.slices, options), ROOT, DRY_RUN.value)


if __name__ == '__main__':
    errors.run(main, check=config.check_flags, required=[CONFIG, WORKDIR])
