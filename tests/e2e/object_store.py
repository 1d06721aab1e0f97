"""An object store that speaks S3, on this machine."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.waiting import wait_for
from tests.ports import answers, free_port

SECRET = "a-secret-key"


def folder_of(port: int) -> str:
    """The URI of a folder in the store that is reached by ``port``; key and secret are in it."""
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    return f"s3://someone:{SECRET}@bucket/runs?{options}"


@contextmanager
def object_store() -> Iterator[int]:
    """Its port, there for as long as the context."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_for(lambda: answers(port), 60), "the object store did not come up"
        yield port
    finally:
        process.kill()
        process.wait()
