"""Real processes of scripts/train.py: a config that takes seconds, starting them, and telling whether two runs are the same."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.helpers import KINDS, ROOT, SMALL, records, write_corpus


def write_config(directory, kind='spark', **overrides):
    """DIRECTORY/config.py, of a model of one group and a corpus in the directory; overrides by dotted name."""
    own = {'model.n_layers': 2, 'data.source': write_corpus(directory), 'sample.prompt': 'spark'}
    path = directory / 'config.py'
    path.write_text(f"""
from spark.config import template


def get_config():
    c = template()
    c.update_from_flattened_dict({SMALL | KINDS[kind] | own | overrides!r})
    return c
""")
    return path


def script(name, *args):
    """The words that start scripts/NAME."""
    return [sys.executable, str(ROOT / 'scripts' / name), *map(str, args)]


def environment(directory, **more):
    """Variables of a process that has one device, and whose prepared corpora lie in the directory."""
    inherited = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS' and not k.startswith('JAX_COORD')}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return inherited | {'SPARK_CACHE': str(directory / 'cache'), 'PYTHONPATH': path} | more


def start(config, workdir, *args, processes=1, devices=1, wrap=(), **env):
    """scripts/train.py in so many processes with so many virtual devices in all; `wrap` are words before the command."""
    words = [*wrap, *script('train.py', f'--config={config}', f'--workdir={workdir}', *args)]
    env = environment(config.parent, XLA_FLAGS=f'--xla_force_host_platform_device_count={devices // processes}', **env)
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    pipes, started = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}, []
    for i in range(processes):
        job = {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': str(processes), 'JAX_PROCESS_ID': str(i)}
        started.append(subprocess.Popen(words, env=env | (job if processes > 1 else {}), **pipes))
    return started


def end(started, code=0):
    """Waits for what `start` started, all of which must end with `code`; [(stdout, stderr)]."""
    said = [p.communicate(timeout=300) for p in started]
    assert [p.returncode for p in started] == [code] * len(started), said
    return said


def run(*args, code=0, **more):
    """`start` to the end; [(stdout, stderr)]."""
    return end(start(*args, **more), code)


def error(said):
    """The one line of an error in a process' stderr; there must be no more, and no traceback."""
    lines = [line for line in said.replace('\r', '\n').splitlines() if 'Error: ' in line or line.startswith('Preempted: ')]
    assert len(lines) == 1 and 'Traceback' not in said, said
    return lines[0]


def saved(workdir, step):
    """{path: numpy array} of a checkpoint, and its place in the data."""
    path = (workdir / 'checkpoints' / str(step)).absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path / 'state').item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(path / 'state', args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    arrays = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(restored)}
    return arrays, json.loads((path / 'data' / 'metadata').read_text())['data']


def assert_same_run(a, b, step):
    """Every record, with the checksum of every batch, and the whole saved state and place in the data, bit for bit."""
    assert records(a) == records(b)
    (ours, our_place), (theirs, their_place) = saved(a, step), saved(b, step)
    assert our_place == their_place and ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
