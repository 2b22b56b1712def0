"""Eight virtual CPU devices, one compilation cache for all tests and the processes they start, checked shapes, small configs."""

import functools
import importlib
import importlib.metadata
import os
import tempfile

import pytest
from _pytest.mark.expression import Expression

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
# Programs are small and run a few times: compiling them takes most of the time. It takes half as long without LLVM's
# optimization, and half of that without XLA's emitters of fusions, which later versions cannot do without.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment compiles as for a user, with both.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
if os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] == '1' and importlib.metadata.version('jaxlib').startswith('0.10.'):
    os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{tempfile.gettempdir()}/spark-test-xla-cache-{os.getuid()}')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')


import flax.struct
from jaxtyping import install_import_hook

from tests import typecheck


def pytree(cls, dataclass=flax.struct.dataclass):
    """flax.struct.dataclass whose constructor takes anything: JAX rebuilds pytrees with shapes or shardings for leaves."""
    cls = dataclass(cls)
    cls.__no_type_check__ = True
    return cls


# Annotated types and shapes hold for every call that a test makes.
flax.struct.dataclass = pytree
install_import_hook('spark', f'{typecheck.__name__}.check')
importlib.import_module('spark.storage').LOOK_AGAIN = 0  # seconds before damage is believed


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of a file run in one process: its fixtures are made once, and what was compiled is there."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue('dist') == 'load' else None


def asks_for_soak(expression):
    """Does `-m EXPRESSION` choose any test because of its marker `soak`? Not so '', 'not slow' and 'slow and not soak'."""
    if not expression:
        return False
    chooses = lambda *marks: Expression.compile(expression).evaluate(lambda name, **_: name in marks)
    return any(chooses('soak', *others) and not chooses(*others) for others in ((), ('slow',)))


def pytest_collection_modifyitems(config, items):
    """Soak tests run only where they are asked for by name."""
    if not asks_for_soak(config.option.markexpr):
        soak = [item for item in items if item.get_closest_marker('soak')]
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """kind → (run directory, its summary): ten steps on 30 text files; the last batch of the test split is partial."""
    from spark.training.run import train
    from tests.helpers import corpus, small

    @functools.cache
    def make(kind):
        directory = tmp_path_factory.mktemp(kind)
        summary, _, _ = train(small(kind, **corpus(directory)), directory / 'run')
        return directory / 'run', summary

    return make


@pytest.fixture(scope='module', params=['spark'])
def run(request, trained):
    """`trained` of a Spark model; `@BOTH` tests a dense one, too."""
    return trained(request.param)
