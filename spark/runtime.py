"""What the process asks of the operating system: huge pages before jax starts, and a say in how it is stopped."""

import contextlib
import os
import signal
import sys


def use_huge_pages():
    """Starts the program anew with glibc's huge pages, once, on a Linux machine that computes on its CPU.

    XLA:CPU allocates its temporaries for every execution, and the kernel hands them out page by page: with 2 MB pages a
    training step of the tiny model takes about two thirds of the time. The results are the same.
    """
    tunables = os.environ.get('GLIBC_TUNABLES')
    chip = any(map(os.path.exists, ('/dev/nvidiactl', '/dev/accel0', '/dev/vfio/0')))
    if sys.platform != 'linux' or tunables is not None or (chip and os.environ.get('JAX_PLATFORMS') != 'cpu'):
        return
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def stop_signals(handle):
    """Yields a list of the SIGTERM and SIGINT that came; `handle(n)` is called at the n-th. Outside of the main thread: never."""
    received = []

    def handler(number, frame):
        del frame
        received.append(number)
        handle(len(received))

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: the caller handles signals
        before = {}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
