"""An object store that speaks S3, on this machine."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.waiting import wait_for
from tests.ports import answers, free_port

SECRET = "a-secret-key"


@contextmanager
def object_store() -> Iterator[str]:
    """The URI of a folder in it, there for as long as the context; key and secret are in it."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_for(lambda: answers(port), 60), "the object store did not come up"
        options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        yield f"s3://someone:{SECRET}@bucket/runs?{options}"
    finally:
        process.kill()
        process.wait()
