"""Scripts in forks of a process that has imported everything: a case takes milliseconds instead of seconds.

`python -m tests.forks` reads one JSON object per line, {argv, stops, stdout, stderr, env, seconds}, runs scripts/ARGV[0] with the
rest of argv in a fork, where each of `stops`, such as 'spark.training.step:Trainer.init_state', ends the process with 0, and
answers with the exit code.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys

from tests.helpers import ROOT

MODULES = (
    'spark.training.run', 'spark.evaluation.evaluate', 'spark.sweeps.grid', 'spark.evaluation.tasks', 'spark.inference.decoder',
    'spark.data.stdlib_corpus.stdlib_corpus_dataset_builder', 'ml_collections.config_flags',
)  # fmt: skip


class Forks:
    """A server, and `run(*argv)` in a fork of it."""

    def __init__(self, directory):
        env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'GLIBC_TUNABLES')}
        env |= {'PYTHONPATH': str(ROOT), 'SPARK_CACHE': str(directory / 'cache'), 'GLIBC_TUNABLES': '', 'HF_HUB_OFFLINE': '1'}
        command = [sys.executable, '-m', 'tests.forks']
        # Relative paths that a case makes up lie in the directory, too.
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
        self._server = subprocess.Popen(command, env=env, cwd=directory, **pipes)
        self._files = directory / 'stdout', directory / 'stderr'

    def run(self, *argv, stops=(), seconds=60):
        """(exit code, stdout and stderr together); a code below 0 is a signal's, −SIGALRM if it ran out of time."""
        output, _ = self._files
        return self._ask(argv, stops, seconds, output, output), output.read_text(errors='replace')

    def script(self, *argv, seconds=120, **env):
        """Like subprocess.run of scripts/ARGV[0]: a CompletedProcess with text."""
        code = self._ask(argv, (), seconds, *self._files, env)
        return subprocess.CompletedProcess(argv, code, *(path.read_text(errors='replace') for path in self._files))

    def _ask(self, argv, stops, seconds, stdout, stderr, env=None):
        case = {'argv': [str(a) for a in argv], 'stops': stops, 'seconds': seconds, 'env': env or {},
                'stdout': str(stdout), 'stderr': str(stderr)}  # fmt: skip
        self._server.stdin.write(json.dumps(case) + '\n')
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self):
        """Ends the server."""
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


def _child(case):
    signal.alarm(case['seconds'])
    os.environ.update(case['env'])
    for fd, name in [(1, 'stdout'), (2, 'stderr')]:
        os.dup2(os.open(case[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def stop(*_, **__):
        raise SystemExit(0)

    for name in case['stops']:
        module, _, path = name.partition(':')
        *parents, last = path.split('.')
        owner = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, stop)
    script = ROOT / 'scripts' / case['argv'][0]
    sys.argv = [str(script), *case['argv'][1:]]
    try:
        runpy.run_path(str(script), run_name='__main__')
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve():
    """Until stdin ends."""
    for name in MODULES:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), 'w')
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


if __name__ == '__main__':
    serve()
