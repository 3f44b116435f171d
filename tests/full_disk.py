"""A disk that is full, for the tests: no file may grow."""

import resource
from contextlib import contextmanager


@contextmanager
def limited(size):
    """Files cannot grow beyond so many bytes meanwhile: EFBIG, 'File too large'."""
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, was[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
