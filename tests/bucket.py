"""Emulators of Cloud Storage (gs://) and S3 (s3://), each in a process of its own: real clients talk to them over HTTP.

The clients (gcsfs, s3fs, TensorStore) start threads, which disturb other tests. So tests run scripts in processes with the
`environment` of a bucket, and look at what lies in it with the methods here, which are plain HTTP.

`python -m tests.bucket gs|s3` serves gs://bkt or s3://bkt until it is ended, and prints its port and the `environment`.
"""

import contextlib
import html
import http.server
import importlib.util
import json
import logging
import random
import re
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest

from tests.helpers import ROOT


class Bucket:
    """gs://bkt of an emulator at a port of this machine, and the variables by which clients find it."""

    url, needs, authorization = 'gs://bkt', ('gcp_storage_emulator', 'gcsfs'), ''

    def __init__(self, port: int):
        self._server = f'http://localhost:{port}'

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which clients find the emulator."""
        return {
            'STORAGE_EMULATOR_HOST': self._server, 'TENSORSTORE_GCS_HTTP_URL': self._server, 'FSSPEC_GCS_TOKEN': 'anon',
            'FSSPEC_GS_TOKEN': 'anon', 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'anon', 'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
        }  # fmt: skip

    def names(self, prefix: str = '') -> list[str]:
        """The names of the objects that start with a prefix."""
        query = urllib.parse.urlencode({'prefix': prefix})
        return [item['name'] for item in json.loads(self._ask(f'/storage/v1/b/bkt/o?{query}')).get('items', [])]

    def read(self, name: str) -> bytes:
        """An object."""
        return self._ask(f'/storage/v1/b/bkt/o/{urllib.parse.quote(name, safe="")}?alt=media')

    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces an object."""
        self._ask(f'/upload/storage/v1/b/bkt/o?{urllib.parse.urlencode({"uploadType": "media", "name": name})}', data, 'POST')

    def remove(self, name: str) -> None:
        """Deletes an object."""
        self._ask(f'/storage/v1/b/bkt/o/{urllib.parse.quote(name, safe="")}', method='DELETE')

    def fail(self, share: float = 0.0, times: int = 0, name: str = '') -> int:
        """From now on, this share of the requests and the next `times` are answered with 503; of those about a name, a regex.

        Returns how many were since the last call.
        """
        query = urllib.parse.urlencode({'share': share, 'times': times, 'name': name})
        return int(self._ask(f'/faults?{query}', b'', 'POST'))

    def _ask(self, path, data=None, method='GET'):
        headers = {'Authorization': self.authorization, 'Content-Type': 'application/octet-stream'}
        with urllib.request.urlopen(urllib.request.Request(self._server + path, data, headers, method=method)) as answer:
            return answer.read()


class S3Bucket(Bucket):
    """s3://bkt of an emulator."""

    # An object is not for everybody, but the emulator does not check a signature.
    url, needs, authorization = 's3://bkt', ('moto', 's3fs'), 'AWS id:signature'

    @property
    def environment(self) -> dict[str, str]:
        keys = {'AWS_ACCESS_KEY_ID': 'id', 'AWS_SECRET_ACCESS_KEY': 'key', 'AWS_EC2_METADATA_DISABLED': 'true'}
        return {'AWS_ENDPOINT_URL': self._server, 'AWS_REGION': 'us-east-1', 'AWS_DEFAULT_REGION': 'us-east-1', **keys}

    def names(self, prefix: str = '') -> list[str]:
        listing = self._ask(f'/bkt?{urllib.parse.urlencode({"list-type": 2, "prefix": prefix})}').decode()
        return [html.unescape(name) for name in re.findall('<Key>(.*?)</Key>', listing)]

    def read(self, name: str) -> bytes:
        return self._ask(f'/bkt/{urllib.parse.quote(name)}')

    def write(self, name: str, data: bytes) -> None:
        self._ask(f'/bkt/{urllib.parse.quote(name)}', data, 'PUT')

    def remove(self, name: str) -> None:
        self._ask(f'/bkt/{urllib.parse.quote(name)}', method='DELETE')


@contextlib.contextmanager
def started(kind: type[Bucket] = Bucket) -> Iterator[Bucket]:
    """Yields an empty bucket in memory; skips the test where the emulator or the client is not installed."""
    for module in kind.needs:
        if not importlib.util.find_spec(module):
            pytest.skip(f'{module} is not installed')
    scheme = kind.url.partition(':')[0]
    with subprocess.Popen([sys.executable, '-m', 'tests.bucket', scheme], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield kind(int(server.stdout.readline()))
        finally:
            server.kill()


def serve_s3() -> None:
    """Serves s3://bkt on a port of its own choice, which it prints."""
    from moto.server import ThreadedMotoServer

    logging.disable(logging.CRITICAL)
    server = ThreadedMotoServer('localhost', 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    S3Bucket(port)._ask('/bkt', method='PUT')
    announce(S3Bucket, port)
    threading.Event().wait()


def serve_gs() -> None:
    """Serves gs://bkt on a port of its own choice, which it prints. Adds to the emulator what it lacks and clients want."""
    from gcp_storage_emulator import server, settings
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    logging.disable(logging.CRITICAL)
    emulator = server.create_server('localhost', 0, in_memory=True, default_bucket='bkt')

    def generation(name):
        with contextlib.suppress(NotFound):
            return emulator._storage.get_file_obj('bkt', name)['generation']
        return '0'

    def move(request, response, storage):
        """The emulator answers 501; gcsfs then copies and deletes, with a warning per object."""
        name, target = request.params['object_id'], request.params['target']
        try:
            response.json(objects._copy(request.base_url, storage, 'bkt', name, 'bkt', target))
            storage.delete_file('bkt', name)
        except NotFound:
            response.status = http.HTTPStatus.NOT_FOUND

    def conditional(handler):
        """A write or a deletion that names the generation that it replaces; the emulator does it in any case."""

        def checked(request, response, storage):
            named = [request.params.get('object_id'), *request.query.get('name', [])]
            name = next(filter(None, named), None) or request.data['meta']['name']  # of a multipart upload
            if request.query.get('ifGenerationMatch', [generation(name)])[0] == generation(name):
                handler(request, response, storage)
            else:
                response.status = http.HTTPStatus.PRECONDITION_FAILED

        return checked

    def with_generation(handler):
        """Every part of an object comes with its generation, which TensorStore compares."""

        def answered(request, response, storage):
            response['x-goog-generation'] = generation(request.params['object_id'])
            handler(request, response, storage)

        return answered

    faults, chance = {'share': 0.0, 'times': 0, 'name': '', 'count': 0}, random.Random(0)

    def set_faults(request, response, storage):
        """See `Bucket.fail`."""
        response.write_file(str(faults['count']))
        asked = {name: values[0] for name, values in request.query.items()}
        faults.update(share=float(asked['share']), times=int(asked['times']), name=asked.get('name', ''), count=0)

    def fails(request):
        """Is this request to be answered with 503? It counts then."""
        if not re.search(faults['name'], urllib.parse.unquote(request.full_url)):
            return False
        found = faults['times'] > 0 or chance.random() < faults['share']
        faults['times'] -= faults['times'] > 0
        faults['count'] += found
        return found

    def alone(handler):
        """Requests are read side by side, since a client may be slow or stopped, and handled one after another."""

        def called(request, response, storage):
            _ = request.data
            with lock:
                if fails(request):
                    response.status = http.HTTPStatus.SERVICE_UNAVAILABLE
                else:
                    handler(request, response, storage)

        return called

    lock, http.server.HTTPServer = threading.Lock(), http.server.ThreadingHTTPServer
    objects.download = with_generation(objects.download)  # `objects.get` calls it, too
    changed = {'download': objects.download, 'insert': conditional(objects.insert), 'delete': conditional(objects.delete)}
    handlers = lambda of: {method: alone(changed.get(handler.__name__, handler)) for method, handler in of.items()}
    moves = rf'^{settings.API_ENDPOINT}/b/bkt/o/(?P<object_id>.+)/moveTo/o/(?P<target>.+)$'
    own = (moves, {'POST': alone(move)}), (r'^/faults$', {'POST': set_faults})
    server.HANDLERS = (*own, *((route, handlers(of)) for route, of in server.HANDLERS))
    http.server.ThreadingHTTPServer.handle_error = lambda *_: None  # a client that has hung up
    emulator.start()
    announce(Bucket, emulator._api._httpd.server_port)
    threading.Event().wait()


def announce(kind: type[Bucket], port: int) -> None:
    """Prints the port, and a line NAME=VALUE for each variable by which clients find the bucket."""
    print(port, *(f'{name}={value}' for name, value in kind(port).environment.items()), sep='\n', flush=True)


if __name__ == '__main__':
    {'gs': serve_gs, 's3': serve_s3}[sys.argv[1]]()
