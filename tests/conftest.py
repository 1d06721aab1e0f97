"""What all tests share: a home of their own, one Ray cluster per session, and how they are shared out."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# Before anything of the project or of Ray is imported: nothing a test does may touch the person's own runs.
torch.set_num_threads(1)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)
# How long an example takes says nothing on a machine that others use too.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


CLUSTERED = re.compile(r"tests/(e2e/|faults/test_\w+_ray\.py)")
SWEEPS = ("test_autoscaling.py", "test_tune.py")


class RayApart(LoadScopeScheduling):  # type: ignore[misc]
    """Of the two processes that run the tests, each begins with a share of those that need a Ray cluster, trainings or
    sweeps, and has one cluster for all of them; the rest are shared out by file.

    What ``--dist loadgroup`` is for, but xdist 3.8 finds no groups under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if not CLUSTERED.match(file):
            return file
        return "sweeps" if file.endswith(SWEEPS) else "trainings"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayApart:
    """See xdist's hook of that name."""
    config.option.loadscopereorder = False
    return RayApart(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first."""
    items.sort(key=lambda item: not CLUSTERED.match(item.nodeid))


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A project home of the session; the cache of decoded images is shared by all its tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAMIXER_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("METAMIXER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("METAMIXER_STORAGE", raising=False)
        yield


@pytest.fixture(scope="session")
def ray_cluster(ray_nodes: Any) -> str:
    """The address of the session's Ray cluster."""
    address: str = ray_nodes.address
    return address


@pytest.fixture(scope="session")
def ray_nodes(_home: None) -> Iterator[Any]:
    """One Ray cluster for the whole session, two nodes of one CPU with the labels kind=a and kind=b."""
    import ray
    from ray.cluster_utils import Cluster

    from metamixer_ray.config import PlacementConfig
    from metamixer_ray.placement import connect

    # A process per training that looks out for preemption notices, which there are none of here.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=1, labels={"kind": "a"}, include_dashboard=False)
        cluster.add_node(num_cpus=1, labels={"kind": "b"})
        connect(PlacementConfig(address=cluster.address))
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="session")
def uninterrupted(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ``tiny.EPOCHS`` epochs that nothing happened to."""
    from metamixer_ray import train
    from tests.e2e import tiny

    storage = tmp_path_factory.mktemp("uninterrupted")
    train(tiny.config(storage, name="calm", epochs=tiny.EPOCHS))
    return storage / "runs" / "calm"
