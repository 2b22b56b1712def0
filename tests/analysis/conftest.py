"""Small trained runs that the tests of this folder share."""

import pytest

from spark.training.train import train
from tests.helpers import small, write_corpus


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """kind → (run directory, its summary): six steps on 30 text files; the last batch of the test split is partial."""
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
