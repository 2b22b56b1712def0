"""An emulator of Cloud Storage that a test starts: real clients talk to it over HTTP."""

import contextlib
import socket

import pytest


@contextlib.contextmanager
def started(monkeypatch):
    """Yields 'gs://bkt', a bucket in memory, for gcsfs and TensorStore in this process and in those that it starts."""
    server_module = pytest.importorskip('gcp_storage_emulator.server')
    from gcp_storage_emulator.handlers import objects

    download = objects.download

    def with_generation(request, response, storage, *args, **kw):
        """Cloud Storage sends the generation of an object with every part of it; TensorStore wants it, the emulator lacks it."""
        with contextlib.suppress(Exception):
            found = storage.get_file_obj(request.params['bucket_name'], request.params['object_id'])
            response['x-goog-generation'] = found['generation']
        return download(request, response, storage, *args, **kw)

    monkeypatch.setattr(objects, 'download', with_generation)
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    server = server_module.create_server('localhost', port, in_memory=True, default_bucket='bkt')
    server.start()
    url = f'http://localhost:{port}'
    for name, value in [
        ('STORAGE_EMULATOR_HOST', url), ('TENSORSTORE_GCS_HTTP_URL', url), ('GCE_METADATA_HOST', 'localhost:1'),
        ('FSSPEC_GCS_TOKEN', 'anon'), ('FSSPEC_GS_TOKEN', 'anon'), ('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false'),
    ]:  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        yield 'gs://bkt'
    finally:
        server.stop()
