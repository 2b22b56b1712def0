"""Packaging of spark: distribution `spark-transformer`, import `spark`."""

import importlib.util
import os

from setuptools import Extension, find_packages, setup

AOT = ['jax[tpu]']  # libtpu, in the version that this jax wants: it compiles for TPUs that are not there
EVAL = ['lm-eval>=0.4.9']
SLURM = ['submitit>=1.5.2']
TEST = ['pytest>=8', 'pytest-xdist>=3.5', 'hypothesis>=6.100', 'beartype>=0.21', 'ruff>=0.6', 'selenium>=4.20']
TEST += [*AOT, *EVAL, *SLURM]



def kernels():
    """The CPU kernels, against the headers that jaxlib carries; nothing where they cannot be built, and XLA does their work."""
    jaxlib = importlib.util.find_spec('jaxlib')
    if os.name == 'nt' or jaxlib is None:
        return []
    here = 'spark/kernels/cpu'
    return [Extension(
        'spark.kernels._cpu',
        sources=[f'{here}/{name}.cc' for name in ('ffi', 'portable', 'avx2', 'avx512')],
        depends=[f'{here}/{name}.h' for name in ('begin', 'bodies', 'lookups')],
        include_dirs=[os.path.join(jaxlib.submodule_search_locations[0], 'include')],
        # Python's own flags have -fwrapv, with which indices take the AVX2 kernels twice the time.
        extra_compile_args=['-std=gnu++17', '-O3', '-g0', '-fno-wrapv', '-ffp-contract=fast', '-w'],
        language='c++',
        optional=True,  # without a compiler everything else still installs
    )]  # fmt: skip


setup(
    name='spark-transformer',
    version='0.1.0',
    description='Spark Transformers in JAX/Flax: sparse FFN and attention by statistical top-k',
    long_description=open('README.md', encoding='utf-8').read(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['spark', 'spark.*']),
    package_data={'spark.data': ['*.model'], 'spark.evaluation': ['*.html'], 'spark.kernels': ['cpu/*.cc', 'cpu/*.h']},
    ext_modules=kernels(),
    install_requires=[
        'jax>=0.10',
        'flax>=0.12',
        'optax>=0.2.5',
        'orbax-checkpoint>=0.12',
        'tensorstore>=0.1.78',  # Orbax's format, read piece by piece
        'grain>=0.2.16',  # before it, a window shuffle does not go on where it was
        'array_record>=0.8',
        'tensorflow-datasets>=4.9.10',  # before it, not with the newest protobuf
        'importlib_resources>=6',  # tensorflow-datasets imports it without declaring it
        'ml_collections>=1.1',
        'absl-py>=2.1',
        'etils[epath]>=1.12',
        'pydantic>=2.7',
        'filelock>=3.16',
        'jaxtyping>=0.3.6',  # shapes in annotations; the tests check them
        'numpy>=2.0',
        'scipy>=1.14',
        'matplotlib>=3.8',
        'tqdm>=4.66',
        'tensorboardX>=2.6',
        'sentencepiece>=0.2.2',  # before it, an empty model file kills the process
        'tokenizers>=0.20',
    ],
    extras_require={
        'test': TEST,
        'cuda': ['jax[cuda12]'],
        'tpu': ['jax[tpu]'],
        'gcs': ['gcsfs', 'google-cloud-storage'],
        'aot': AOT,
        'eval': EVAL,
        'slurm': SLURM,
        'parity': ['torch>=2.6', 'safetensors'],
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
