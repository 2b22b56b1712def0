"""Eight virtual CPU devices, one compilation cache for all tests and the processes they start, small configs."""

import os
import pathlib
import tempfile

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(tempfile.gettempdir()) / 'spark-test-xla-cache'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """kind → (run directory, its summary): six steps on 30 text files; the last batch of the test split is partial."""
    from spark.training.run import train
    from tests.helpers import small, write_corpus

    done = {}

    def make(kind):
        if kind not in done:
            directory = tmp_path_factory.mktemp(kind)
            data = {'data.source': write_corpus(directory), 'data.cache_dir': str(directory / 'cache'), 'model.vocab_size': 0}
            summary, _, _ = train(small(kind, **data, **{'train.steps': 6, 'train.save_every': 3}), directory / 'run')
            done[kind] = directory / 'run', summary
        return done[kind]

    return make


@pytest.fixture(scope='module', params=['spark', 'dense'])
def run(request, trained):
    """Of either kind."""
    return trained(request.param)
