"""Where a store is prepared: on the cores of this machine, as SLURM jobs, or by Apache Beam."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from spark.errors import ConfigError, DataError, root_cause

# Calls a function on each item, in any order and anywhere; yields the indices of items that are done.
Launcher = Callable[[Callable[[Any], None], Sequence[Any]], Iterator[int]]


def local(workers: int = 0) -> Launcher:
    """Processes on this machine; 0: one per core. A single item is done in this process."""

    def launch(function, items):
        n = min(workers or len(os.sched_getaffinity(0)), len(items))
        if n <= 1:
            for i, item in enumerate(items):
                function(item)
                yield i
            return
        context = multiprocessing.get_context('spawn')  # a fork would copy the threads' locks of JAX and TensorStore
        pool = concurrent.futures.ProcessPoolExecutor(n, context, _start_worker)
        try:
            # Workers must not run the main script again, which may have no guard by __name__.
            with mock.patch.multiple(sys.modules['__main__'], __spec__=None, __file__=None, create=True):
                futures = {pool.submit(function, item): i for i, item in enumerate(items)}
            for future in concurrent.futures.as_completed(futures):
                future.result()
                yield futures[future]
        except concurrent.futures.process.BrokenProcessPool:
            raise DataError('a process that prepared data was killed, as when memory is short; run again to go on') from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return launch


def _start_worker():
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # there is a process per core already
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and without a traceback
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def slurm(folder: pathlib.Path, jobs: int, parameters: dict[str, Any]) -> Launcher:
    """SLURM jobs, of which each does every n-th item.

    `folder` must be on a filesystem that the nodes share; `parameters` are those of submitit.SlurmExecutor.update_parameters.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("--launcher=slurm needs submitit: pip install 'spark-transformer[slurm]'") from None

    def launch(function, items):
        groups = [range(i, len(items), jobs) for i in range(min(jobs, len(items)))]
        if not groups:
            return
        try:
            executor = submitit.SlurmExecutor(folder=folder)
            executor.update_parameters(**{'job_name': 'prepare', 'array_parallelism': jobs, **parameters})
            submitted = executor.map_array(_each, [function] * len(groups), [[items[i] for i in group] for group in groups])
        except Exception as e:  # submitit raises exceptions of many kinds
            raise ConfigError(f'--launcher=slurm: {type(e).__name__}: {e}') from None
        ids = {job.job_id: group for job, group in zip(submitted, groups, strict=True)}
        try:
            for job in submitit.helpers.as_completed(submitted):
                if error := job.exception():  # its text contains a traceback
                    lines = str(error).strip().splitlines()
                    why = next((line for line in reversed(lines) if 'Error: ' in line), lines[0])
                    raise DataError(f'SLURM job {job.job_id}: {why}; see {job.paths.stderr}')
                yield from ids[job.job_id]
        except BaseException:  # nobody waits for the other jobs
            for job in submitted:
                with contextlib.suppress(OSError):
                    job.cancel(check=False)
            raise

    return launch


def _each(function, items):
    for item in items:
        function(item)


def parameter(text: str) -> tuple[str, str | int]:
    """NAME=VALUE of --slurm, as a name and a value for submitit."""
    name, equals, value = text.partition('=')
    if not equals:
        raise ConfigError(f'--slurm={text}: want NAME=VALUE')
    return name, int(value) if value.isdigit() else value


def beam(options: Sequence[str]) -> Launcher:
    """An Apache Beam pipeline; `options` choose and configure its runner, as --runner=DataflowRunner."""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ConfigError("--launcher=beam needs Apache Beam: pip install 'spark-transformer[beam]'") from None

    def launch(function, items):
        if not items:
            return
        try:
            with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
                _ = pipeline | apache_beam.Create(list(items)) | apache_beam.Reshuffle() | apache_beam.Map(function)
        except Exception as e:  # whatever a runner raises
            raise DataError(f'--launcher=beam: {root_cause(e)}') from e
        yield from range(len(items))

    return launch
