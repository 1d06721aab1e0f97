"""A Ray cluster on this machine whose autoscaler starts worker nodes, and stops those that nobody uses."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.e2e.waiting import wait_for
from tests.ports import answers, free_port

_HEAD = "ray.head.default"
# Where a token lies in the home folder, `ray start` would ask everybody for it. The rest is what launchers set.
_SETTINGS = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "RAY_NODE_TYPE_NAME": _HEAD,
    "RAY_AUTH_MODE": "disabled",
}
_COMMANDS = (
    *("setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)


class AutoscaledCluster:
    """The cluster as one may look at it from outside, without joining it."""

    def __init__(self, address: str, root: int) -> None:
        """``root`` is the process that all others of the cluster stem from."""
        self.address, self.root = address, root
        self._state = GlobalState()
        options = GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        self._state._initialize_global_state(options)

    def worker_nodes(self) -> int:
        """How many nodes are up beside the head."""
        nodes: list[dict[str, Any]] = self._state.node_table()
        return sum(node["Alive"] for node in nodes) - 1


@contextmanager
def autoscaled_cluster(cpus: int, most_nodes: int) -> Iterator[AutoscaledCluster]:
    """A cluster of a head without CPUs and up to ``most_nodes`` worker nodes of ``cpus`` each, none to begin with.

    Ray's own fake provider starts the nodes as processes. ``ray.cluster_utils.AutoscalingCluster`` would do the same,
    but needs a file that the wheel doesn't have, and stops every other Ray of this machine.
    """
    temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path is at most 107 bytes long
    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    worker = {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 0, "max_workers": most_nodes}
    config = {
        "cluster_name": "tests",
        "max_workers": most_nodes,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 10.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            # Nodes count as lost otherwise that have not said anything yet.
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            _HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": worker,
        },
        "head_node_type": _HEAD,
        # Read without a look whether they are there.
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("cluster_synced_files", "initialization_commands", *_COMMANDS)},
    }
    (temporary / "autoscaling.json").write_text(json.dumps(config))
    options = ("--head", "--block", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
    options += (f"--temp-dir={temporary}", f"--autoscaling-config={temporary}/autoscaling.json")
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--disable-usage-stats"],
        env={**os.environ, **_SETTINGS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_for(lambda: answers(port), 60), "Ray's head did not come up"
        yield AutoscaledCluster(address, head.pid)
    finally:
        started = [head, *psutil.Process(head.pid).children(recursive=True)] if head.poll() is None else [head]
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
