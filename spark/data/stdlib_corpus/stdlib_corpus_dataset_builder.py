"""The embedded corpus as a TFDS builder: the Python standard library's own source, always there, no network.

About 700 files and 11 MB without tests and generated documentation, split by file. It needs no TensorFlow.
"""

import hashlib
import pathlib
import platform
import sysconfig
import tokenize

import tensorflow_datasets as tfds

SKIPPED = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'pydoc_data', '__pycache__'}


class Builder(tfds.core.GeneratorBasedBuilder):
    """Features `path` and `text`; 90 % train, 5 % validation, 5 % test, chosen by the hash of the path."""

    VERSION = tfds.core.Version('1.0.0')
    # One config per interpreter version: each has a standard library of its own.
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=f'py{platform.python_version()}')]  # noqa: RUF012

    def _info(self):
        features = tfds.features.FeaturesDict({'path': tfds.features.Text(), 'text': tfds.features.Text()})
        return self.dataset_info_from_configs(
            features=features, description=__doc__, disable_shuffling=True, license='PSF-2.0'
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        root = pathlib.Path(sysconfig.get_path('stdlib'))
        files = {'train': [], 'validation': [], 'test': []}
        for path in sorted(root.rglob('*.py')):
            name = path.relative_to(root)
            if SKIPPED.isdisjoint(name.parts) and path.stat().st_size:
                share = int(hashlib.sha256(name.as_posix().encode()).hexdigest()[:8], 16) / 16**8
                split = 'test' if share < 0.05 else 'validation' if share < 0.1 else 'train'
                files[split].append((name.as_posix(), path))
        return {split: self._generate_examples(paths) for split, paths in files.items()}

    def _generate_examples(self, files):
        for index, (name, path) in enumerate(files):
            # A handful of files declare another encoding; the tokenizer sees text.
            with tokenize.open(path) as f:
                yield index, {'path': name, 'text': f.read()}
