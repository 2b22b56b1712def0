"""Whether a job will find what its config names, seen from here, before anything is submitted."""

import contextlib
import glob
import os
import pathlib
import subprocess
import tempfile

from etils import epath

from spark.config import ExperimentConfig, eval_entries
from spark.data import documents, store, tokenizer
from spark.errors import ConfigError, root_cause
from spark.launching import restart
from spark.launching.job import Job, unpack
from spark.runtime import check_bucket, entries, in_bucket, is_complete, locate, path_of

# The variables of a job that its data and buckets are found with. Others, such as paths of credentials, hold on its hosts alone.
LEAD_TO_DATA = (
    'TFDS_DATA_DIR', 'STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL', 'AWS_ENDPOINT_URL', 'AWS_REGION', 'AWS_DEFAULT_REGION',
    'AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN',
)  # fmt: skip


def check_names(cfg: ExperimentConfig, job: Job, root: pathlib.Path, shared: bool, mount: str = '') -> None:
    """Raises an error that names the tokenizer, source, or run to start from that the job will not find.

    Args:
      cfg: the config.
      job: the job, of a revision of the git repository `root`.
      root: that repository.
      shared: whether the job's hosts have the file system of this machine.
      mount: the option of the engine that gives them another one; its paths are not looked for.
    """

    def is_there(label, path):
        """Can it be looked for from here? An error if the job's hosts will not have it."""
        if in_bucket(path):
            check_bucket(label, path)
            return True
        if not os.path.isabs(os.path.expanduser(path)):
            if not glob.glob(path, recursive=True):
                raise ConfigError(f'{label}: want an absolute path, a bucket, or a file of the revision {job.revision[:12]}')
            return True
        if not shared and mount not in job.options:
            option = f', or --set={mount}=… and a path in it' if mount else ''
            raise ConfigError(f'{label}: is on this machine, where the job does not run; want gs://…{option}')
        return shared

    with _as_there(job, root):
        _, _, name = cfg.data.tokenizer.partition(':')
        shipped = pathlib.Path(tokenizer.__file__).parent / name
        if not name or shipped.is_file() or is_there(f'data.tokenizer = {cfg.data.tokenizer!r}', name):
            tokenizer.of_config(cfg.data)
        prepared = (os.environ if shared else job.env).get('TFDS_DATA_DIR') or ('~/tensorflow_datasets' if shared else '')
        for source in filter(None, _sources(cfg)):
            for part in dict.fromkeys(part for phase in documents.parse(source) for part in phase.weights):
                _check_part(cfg, part, is_there, prepared)
        origins = [('teacher', cfg.train.teacher)]
        if restart.newest_step(job.workdir) < 0:  # else the job goes on from there
            origins += [('restore_from', cfg.train.restore_from), ('branch_from', cfg.train.branch_from)]
        for field, path in origins:
            label = f'train.{field} = {path!r}'
            if path and is_there(label, path):
                _check_origin(label, path)


def _sources(cfg):
    """What the config names as text; '' for some."""
    return [cfg.data.source, cfg.data.eval_source, *(entry.source for entry in eval_entries(cfg.train.evals))]


@contextlib.contextmanager
def _as_there(job, root):
    """Inside, the working directory is the revision, as the job's is, and the environment leads to the job's data."""
    before = {name: os.environ.get(name) for name in LEAD_TO_DATA if name in job.env}
    with tempfile.TemporaryDirectory() as revision:
        subprocess.run(unpack(job, root, revision).words, check=True)
        os.environ.update({name: job.env[name] for name in before})
        try:
            with contextlib.chdir(revision):
                yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                os.environ.update({name: value} if value is not None else {})


def _check_part(cfg, part, is_there, prepared):
    """Raises an error if a part of a source cannot be opened; `prepared` is where the job's hosts have TFDS data sets."""
    kind, _, rest = part.partition(':')
    home = os.path.expanduser(rest)
    if kind == 'tfds' and not (in_bucket(rest) or os.path.isabs(home) or os.path.isdir(home)):
        if not prepared:
            raise ConfigError(f'{part}: want --env=TFDS_DATA_DIR=gs://…, where it is prepared, or the directory in its place')
        if is_there(f'{part}: TFDS_DATA_DIR={prepared}', prepared):
            documents.open_part(part, cfg.data.text_field, cfg.data.cache_dir)
    elif kind == 'tokens' and is_there(part, rest):
        store.Store(rest)
    elif kind in (*documents.FILES, 'tfds') and is_there(part, rest):
        documents.open_part(part, cfg.data.text_field, cfg.data.cache_dir)


def _check_origin(label, path):
    """Raises an error if there is no checkpoint that a run could start from."""
    named = path_of(path, label)
    try:
        run, step = locate(named)
        steps = sorted(int(p.name) for p in entries(epath.Path(run) / 'checkpoints') if p.name.isdecimal() and is_complete(p))
    except Exception as e:  # clients of buckets raise exceptions of their own
        raise ConfigError(f'{label}: cannot be read: {root_cause(e)}') from None
    if not steps:
        raise ConfigError(f'{label}: is not there; want a run directory, or a checkpoints/STEP of one')
    if step not in (None, *steps):
        raise ConfigError(f'{label}: has no step {step}; there are {", ".join(map(str, steps))}')


def check_bucket_exists(workdir: str) -> None:
    """Raises an error if there is no such bucket; a warning if that cannot be seen from here, as without the right to list it."""
    bucket = '/'.join(workdir.split('/')[:3])
    try:
        next(iter(epath.Path(bucket).iterdir()), None)
    except FileNotFoundError:
        raise ConfigError(f'--workdir={workdir}: there is no bucket {bucket}') from None
    except Exception as e:  # clients of buckets raise exceptions of their own
        print(f'Warning: {bucket}: cannot be listed from here: {root_cause(e)}', flush=True)


def extras(cfg: ExperimentConfig, workdir: str, accelerator: str, env: dict[str, str]) -> tuple[str, ...]:
    """The extras of the package that a job needs: for its devices ('tpu', 'cuda' or ''), buckets and sources."""
    sources = ' '.join(_sources(cfg))
    origins = cfg.train.restore_from, cfg.train.branch_from, cfg.train.teacher
    paths = ' '.join([workdir, sources, cfg.data.tokenizer, *origins, *env.values()])
    wanted = {accelerator: bool(accelerator), 'gcs': 'gs://' in paths, 's3': 's3://' in paths, 'hf': 'hf:' in sources}
    wanted |= {'eval': any(entry.tasks for entry in eval_entries(cfg.train.evals)), **dict.fromkeys(cfg.train.trackers, True)}
    return tuple(extra for extra, is_needed in wanted.items() if is_needed)
