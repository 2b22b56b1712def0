"""A SLURM cluster that a test starts: munged, slurmctld, and two nodes on this machine; the real commands talk to it."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import pytest

PROGRAMS = ('munged', 'mungekey', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol', 'runuser')
NODES = ('n1', 'n2')

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
MpiDefault=none
# The second is also how long a requeued job waits.
AuthInfo=socket={home}/munge/socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=30
GresTypes=gpu
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def ports(n):
    """Free ones."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(('localhost', 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def started(home: pathlib.Path, monkeypatch):
    """Starts the daemons with their files in `home`, and points SLURM's commands at them; skips where they cannot run."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f'no SLURM: {", ".join(missing)} of slurm-wlm and munge is not installed')
    if os.getuid():
        pytest.skip('no SLURM: its daemons switch users, and want root')
    controller, *own = ports(1 + len(NODES))
    host = socket.gethostname()
    lines = [CONFIG.format(host=host, controller=controller, home=home)]
    for node, port in zip(NODES, own, strict=True):
        lines.append(f'NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:2 State=UNKNOWN')
    (home / 'slurm.conf').write_text('\n'.join(lines) + '\n')
    # SLURM counts them as GPUs, and jax sees none.
    (home / 'gres.conf').write_text('AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n')
    monkeypatch.setenv('SLURM_CONF', str(home / 'slurm.conf'))
    for name in [name for name in os.environ if name.startswith(('SLURM_STEP', 'SLURM_JOB', 'SBATCH'))]:
        monkeypatch.delenv(name)
    (home / 'state').mkdir()
    pid = _start_munge(home / 'munge')
    daemons = [['slurmctld', '-D'], *(['slurmd', '-D', '-N', node] for node in NODES)]
    running = [subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for words in daemons]
    try:
        ready = f'{len(NODES)} idle'
        wait(lambda: ready in said('sinfo', '-h', '-o', '%D %t'), f'no SLURM: its nodes do not start; see {home}/*.log')
        yield
    finally:
        said('scancel', '--full', '-u', 'root')
        with contextlib.suppress(pytest.fail.Exception):
            wait(lambda: not said('squeue', '-h'), 'jobs do not end')
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(60)
        os.kill(pid, signal.SIGTERM)


def _start_munge(home):
    home.mkdir()
    for directory in [home, *home.parents]:  # its user must reach the socket, and everyone else, too
        with contextlib.suppress(PermissionError):
            directory.chmod(directory.stat().st_mode | 0o011)
    home.chmod(0o755)
    subprocess.run(['mungekey', '--create', f'--keyfile={home}/key'], check=True)
    shutil.chown(home, 'munge', 'munge')
    shutil.chown(home / 'key', 'munge', 'munge')
    files = {'socket': 'socket', 'key-file': 'key', 'log-file': 'log', 'pid-file': 'pid', 'seed-file': 'seed'}
    flags = [f'--{name}={home}/{file}' for name, file in files.items()]
    found = subprocess.run(['runuser', '-u', 'munge', '--', 'munged', '--force', *flags], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f'no SLURM: munged does not start: {found.stderr.strip()[:300]}')
    return int((home / 'pid').read_text())


def said(*words):
    """What a command prints."""
    return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout


def wait(condition, message, seconds=60):
    """Until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.skip(message) if message.startswith('no SLURM') else pytest.fail(message)
        time.sleep(0.3)
