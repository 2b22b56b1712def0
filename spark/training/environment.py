"""The versions that a run has: WORKDIR/environment.json. They may change on resume, but not unnoticed."""

import importlib.metadata
import json
import platform

from etils import epath

from spark.runtime import write_json

FILE = 'environment.json'
# These are told first: they compute the run and read its checkpoints.
FIRST = ('python', 'jax', 'jaxlib', 'libtpu', 'orbax-checkpoint', 'flax', 'optax', 'tensorstore', 'numpy')


def versions() -> dict[str, str]:
    """The version of Python and of every installed package, by name."""
    found = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name}
    return {'python': platform.python_version(), **dict(sorted(found.items(), key=lambda item: item[0].lower()))}


def record(workdir: epath.Path) -> None:
    """Writes them to a run directory, in the first process; if the run had others, says which."""
    path, now = workdir / FILE, versions()
    try:
        before = json.loads(path.read_text())
    except Exception:  # a run of an older version has none; and none is worth ending a run
        before = None
    if before == now:
        return
    if isinstance(before, dict):
        names = [name for name in dict.fromkeys((*FIRST, *before)) if before.get(name) != now.get(name)]
        changed = [f'{name} {before.get(name)}, now {now.get(name)}' for name in names]
        more = f' and {len(changed) - 8} more' if len(changed) > 8 else ''
        if changed:
            print(f'Warning: this run had {"; ".join(changed[:8])}{more}', flush=True)
    write_json(path, now)
