"""Whether a job will find what its config names, seen from here, before anything is submitted."""

import os
import pathlib
import subprocess

from etils import epath

from spark.config import ExperimentConfig
from spark.data import documents, store, tokenizer
from spark.errors import ConfigError
from spark.launching.job import Job
from spark.runtime import check_bucket, in_bucket


def check_names(cfg: ExperimentConfig, job: Job, root: pathlib.Path, shared: bool, mount: str = '') -> None:
    """Raises an error that names the tokenizer, source, or run to start from that the job will not find.

    Args:
      cfg: the config.
      job: the job, of a revision of the git repository `root`.
      root: that repository.
      shared: whether the job's hosts have the file system of this machine.
      mount: the option of the engine that gives them another one; its paths are not looked for.
    """
    os.environ.update(job.env)  # TFDS_DATA_DIR and the keys of buckets, as the job will have them
    mounted = mount in job.options

    def is_there(label, path):
        """Can it be looked for from here? An error if the job's hosts will not have it."""
        if in_bucket(path):
            check_bucket(label, path)
            return True
        if not os.path.isabs(os.path.expanduser(path)):
            known = ['git', '-C', str(root), 'cat-file', '-e', f'{job.revision}:{path}']
            if subprocess.run(known, capture_output=True).returncode:
                raise ConfigError(f'{label}: want an absolute path, a bucket, or a file of the revision {job.revision[:12]}')
            return True
        if not shared and not mounted:
            option = f', or --set={mount}=… and a path in it' if mount else ''
            raise ConfigError(f'{label}: is on this machine, where the job does not run; want gs://…{option}')
        return shared

    _, _, name = cfg.data.tokenizer.partition(':')
    shipped = pathlib.Path(tokenizer.__file__).parent / name
    if not name or shipped.is_file() or is_there(f'data.tokenizer = {cfg.data.tokenizer!r}', name):
        tokenizer.of_config(cfg.data)
    for source in filter(None, (cfg.data.source, cfg.data.eval_source)):
        for part in dict.fromkeys(part for phase in documents.parse(source) for part in phase.weights):
            _check_part(cfg, part, is_there, shared or mounted)
    for field, path in [('restore_from', cfg.train.restore_from), ('branch_from', cfg.train.branch_from)]:
        label = f'train.{field} = {path!r}'
        if path and is_there(label, path) and not _holds_something(path):
            raise ConfigError(f'{label}: is not there; want a run directory, or a checkpoints/STEP of one')


def _check_part(cfg, part, is_there, local):
    """Raises an error if a part of a source cannot be opened."""
    kind, _, rest = part.partition(':')
    if kind == 'tfds' and not in_bucket(rest) and not os.path.isabs(os.path.expanduser(rest)):
        if not local and not in_bucket(os.environ.get('TFDS_DATA_DIR', '')):
            raise ConfigError(f'{part}: want --env=TFDS_DATA_DIR=gs://…, where it is prepared, or the directory in its place')
        documents.open_part(part, cfg.data.text_field, cfg.data.cache_dir)
    elif kind == 'tokens' and is_there(part, rest):
        store.Store(rest)
    elif kind in (*documents.FILES, 'tfds') and is_there(part, rest):
        documents.open_part(part, cfg.data.text_field, cfg.data.cache_dir)


def _holds_something(path):
    try:
        return any(True for _ in epath.Path(path).expanduser().iterdir())
    except Exception:  # clients of buckets raise exceptions of their own
        return False


def extras(cfg: ExperimentConfig, workdir: str, accelerator: str, env: dict[str, str]) -> tuple[str, ...]:
    """The extras of the package that a job needs: for its devices ('tpu', 'cuda' or ''), buckets and sources."""
    sources = f'{cfg.data.source} {cfg.data.eval_source}'
    paths = ' '.join([workdir, sources, cfg.data.tokenizer, cfg.train.restore_from, cfg.train.branch_from, *env.values()])
    wanted = {accelerator: bool(accelerator), 'gcs': 'gs://' in paths, 's3': 's3://' in paths, 'hf': 'hf:' in sources}
    return tuple(extra for extra, is_needed in wanted.items() if is_needed)
