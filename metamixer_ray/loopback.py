"""A cluster for this machine alone: its ports are on the loopback interface, where no other machine can reach them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants

_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


@contextmanager
def loopback_only() -> Iterator[None]:
    """A cluster that ``ray.init`` starts within listens on the loopback interface only, and so does its workers' gloo.

    It is what Ray does by itself on macOS. What torch's rendezvous listens on can't be chosen: a port of the first
    worker's stays open on all interfaces while it trains.
    """
    # Processes inherit their environment from the cluster's first ones, which are started meanwhile.
    chosen = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        chosen["GLOO_SOCKET_IFNAME"] = _INTERFACE
    before = {name: os.environ.get(name) for name in chosen}
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(chosen)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
