"""Packaging of spark: distribution `spark-transformer`, import `spark`."""

import importlib.util
import os
import pathlib
import sys
import tempfile
import textwrap

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

AOT = ['jax[tpu]']  # libtpu, in the version that this jax wants: it compiles for TPUs that are not there
BEAM = ['apache-beam>=2.77']
EVAL = ['lm-eval>=0.4.9']
GCS = ['gcsfs>=2024.2']
S3 = ['s3fs>=2024.2']
HF = ['datasets>=2.20']
SLURM = ['submitit>=1.5.2']
WANDB = ['wandb>=0.19']
MLFLOW = ['mlflow-skinny>=3.1', 'sqlalchemy>=2', 'alembic>=1.13']  # the client, and what it needs for a file of SQLite
TEST = ['pytest>=8', 'pytest-xdist>=3.5', 'hypothesis>=6.100', 'beartype>=0.21', 'ruff>=0.6', 'selenium>=4.20']
TEST += [*AOT, *EVAL, *GCS, *HF, *MLFLOW, *SLURM, *WANDB, 'gcp-storage-emulator>=2024.8']


CPU = pathlib.Path('spark/kernels/cpu')


class BuildKernels(build_ext):
    """Builds the CPU kernels. If that fails, the install goes on, says so, and leaves the reason for `kernels.cpu` to report."""

    error = None

    def build_extension(self, ext):
        """Keeps the compiler's first error, which the compiler writes to file descriptor 2 and no exception carries."""
        stderr = os.dup(2)
        with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as log:
            os.dup2(log.fileno(), 2)
            try:
                jaxlib = importlib.util.find_spec('jaxlib')
                if jaxlib is None:
                    raise CompileError('jaxlib, whose headers they need, is not installed')
                # -isystem hides the warnings of XLA's headers.
                ext.extra_compile_args += ['-isystem', os.path.join(jaxlib.submodule_search_locations[0], 'include')]
                super().build_extension(ext)
            except Exception as error:
                self.error = str(error)
                raise  # setuptools goes on, because the extension is optional
            finally:
                os.dup2(stderr, 2)
                log.seek(0)
                output = log.read()
                sys.stderr.write(output)
                if self.error:
                    errors = [line for line in output.splitlines() if 'error' in line]
                    self.error = textwrap.shorten(errors[0] if errors else self.error, 200)

    def run(self):
        super().run()
        library = pathlib.Path(self.get_ext_fullpath('spark.kernels._cpu'))
        report = library.with_name('cpu_build_error.txt')
        report.unlink(missing_ok=True)
        if self.error is None:
            return
        library.unlink(missing_ok=True)  # built from older sources
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(f'{self.error}\n', encoding='utf-8')
        try:
            terminal = open('/dev/tty', 'w', errors='replace')  # because pip hides what a build prints unless it fails
        except OSError:
            terminal = sys.stderr
        print(f'\nWARNING: spark runs without its CPU kernels, more slowly. Their build failed: {self.error}', file=terminal)


KERNELS = Extension(
    'spark.kernels._cpu',
    sources=[str(path) for path in sorted(CPU.glob('*.cc'))],
    depends=[str(path) for path in sorted(CPU.glob('*.h'))],
    # Python's default flags include -fwrapv, which makes the AVX2 kernels twice as slow.
    extra_compile_args=['-std=gnu++17', '-O3', '-g0', '-fno-wrapv', '-ffp-contract=fast', '-Wall', '-Wextra'],
    language='c++',
    optional=True,  # a failed build does not stop the install
)

setup(
    name='spark-transformer',
    version='0.1.0',
    description='Spark Transformers in JAX/Flax: sparse FFN and attention by statistical top-k',
    long_description=open('README.md', encoding='utf-8').read(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['spark', 'spark.*']),
    package_data={'spark.data': ['*.model'], 'spark.evaluation': ['*.html'], 'spark.sweeps': ['*.html'],
                  'spark.kernels': ['cpu/*.cc', 'cpu/*.h']},
    ext_modules=[KERNELS],
    cmdclass={'build_ext': BuildKernels},
    install_requires=[
        'jax>=0.10',
        'flax>=0.12.2',  # older versions fail under jax 0.10 with rematerialisation
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12',
        'tensorstore>=0.1.78',  # Orbax's format, read piece by piece
        'grain>=0.2.16',  # older versions restore a window shuffle wrongly
        'array_record>=0.8',
        'tensorflow-datasets>=4.9.10',  # older versions fail with the newest protobuf
        'pyarrow>=16',
        'fsspec>=2023.5',
        'importlib_resources>=6',  # tensorflow-datasets imports it without declaring it
        'ml_collections>=1.1',
        'absl-py>=2.1',
        'etils[epath]>=1.14',
        'pydantic>=2.7',
        'filelock>=3.16',
        'jaxtyping>=0.3.6',  # shapes in annotations; the tests check them
        'numpy>=2.0',
        'scipy>=1.15',  # whose Sobol sequences take `rng`
        'matplotlib>=3.8',
        'tqdm>=4.66',
        'tensorboardX>=2.6',
        'sentencepiece>=0.2.2',  # in older versions an empty model file kills the process
        'tokenizers>=0.20',
    ],
    extras_require={
        'test': TEST,
        'cuda': ['jax[cuda12]'],
        'tpu': ['jax[tpu]'],
        'gcs': GCS,
        'aot': AOT,
        'beam': BEAM,
        'eval': EVAL,
        'hf': HF,
        's3': S3,
        'slurm': SLURM,
        'wandb': WANDB,
        'mlflow': MLFLOW,
        'parity': ['torch>=2.6', 'safetensors'],
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
