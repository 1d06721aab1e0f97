"""Whether workers fit on nodes: a pure question, answered before anything waits."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metamixer_ray.capacity import Node, WorkerResources, check_labels, lacking_room, room, worker_share
from metamixer_ray.config import TrainConfig, from_settings
from metamixer_ray.errors import ConfigError

nodes_of = st.lists(st.builds(Node, cpus=st.integers(1, 64).map(float), gpus=st.integers(0, 8).map(float)), min_size=1)


def _config(peers: int, replicas: int = 1, **settings: object) -> TrainConfig:
    return from_settings({"peers": ["resnet8"] * peers, "replicas": replicas, "distiller": "none", **settings})


@given(nodes_of, st.integers(1, 16), st.integers(1, 3))
def test_the_default_share_always_fits_and_no_larger_one_would(nodes: list[Node], peers: int, replicas: int) -> None:
    resources = worker_share(_config(peers, replicas, gpus_per_worker=0), nodes, grows=False)
    assert room(nodes, resources.cpus, 0) >= peers * replicas
    assert 0 < resources.cpus <= 4
    larger = resources.cpus + 1 if resources.cpus >= 1 else resources.cpus + 0.01
    assert larger > 4 or room(nodes, larger, 0) < peers * replicas
    assert resources.threads == max(1, int(resources.cpus))


def test_a_worker_lies_on_one_node() -> None:
    two_small = [Node(cpus=1), Node(cpus=1)]
    # Three shares of 0.66 are fewer than two CPUs, and yet only two of them fit.
    assert room(two_small, 0.66, 0) == 2
    assert worker_share(_config(3), two_small, grows=False).cpus == 0.5


def test_gpus_are_taken_where_there_are_any() -> None:
    nodes = [Node(cpus=16, gpus=2), Node(cpus=16, gpus=2)]
    assert worker_share(_config(4), nodes, grows=False) == WorkerResources(4.0, 1.0, 4)
    assert worker_share(_config(4), nodes, grows=False).backend == "nccl"
    shared = worker_share(_config(8, gpus_per_worker=0.5), nodes, grows=False)
    assert (shared.gpus, shared.backend) == (0.5, "gloo")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cpus_per_worker": 1.0}, r"need 3 CPUs; the cluster has 2 CPUs in all: .*--cpus-per-worker 0.66"),
        ({"gpus_per_worker": 1.0}, r"need 3 GPUs; the cluster has 0 GPUs in all: .*--gpus-per-worker 0$"),
    ],
)
def test_what_never_fits_is_told_with_what_would(settings: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        worker_share(_config(3, **settings), [Node(cpus=2)], grows=False)


def test_labels_that_no_node_has() -> None:
    nodes = [Node(cpus=2, labels={"kind": "a"}), Node(cpus=2, labels={"kind": "b"})]
    one_each = WorkerResources(1.0, 0.0, 1)
    check_labels([{"kind": "a"}, {"kind": "b"}, {}], 2, nodes, one_each)
    with pytest.raises(ConfigError, match=r"--peer-labels kind=c: .*kind=a, kind=b"):
        check_labels([{"kind": "a"}, {"kind": "c"}], 1, nodes, one_each)
    with pytest.raises(ConfigError, match=r"--peer-labels kind=a: .* 3 workers"):
        check_labels([{"kind": "a"}], 3, nodes, one_each)


def test_a_share_of_a_gpu_lies_on_one_gpu() -> None:
    two = [Node(cpus=16, gpus=2)]
    assert [room(two, 1.0, gpus) for gpus in (1.0, 0.66, 0.5, 0.4, 0.33)] == [2, 2, 4, 4, 6]
    assert room([Node(cpus=16, gpus=1)] * 2, 1.0, 2.0) == 0
    with pytest.raises(ConfigError, match=r"need 3 GPUs; the cluster has 2 GPUs in all: .*--gpus-per-worker 0.5,"):
        worker_share(_config(3), two, grows=False)
    with pytest.raises(ConfigError, match=r"--gpus-per-worker 0.5,"):
        worker_share(_config(3, gpus_per_worker=0.66), two, grows=False)
    with pytest.raises(ConfigError, match=r"--gpus-per-worker 1.5: give a whole number"):
        worker_share(_config(1, gpus_per_worker=1.5), two, grows=False)


@given(gpus=st.integers(1, 8), nodes=st.integers(1, 3), workers=st.integers(1, 40))
def test_the_share_that_is_suggested_fits(gpus: int, nodes: int, workers: int) -> None:
    there = [Node(cpus=64, gpus=gpus)] * nodes
    try:
        worker_share(_config(workers, gpus_per_worker=1.0, cpus_per_worker=0.1), there, grows=False)
    except ConfigError as error:
        assert workers > gpus * nodes
        suggested = float(re.search(r"--gpus-per-worker ([\d.]+),", str(error))[1])
        worker_share(_config(workers, gpus_per_worker=suggested, cpus_per_worker=0.1), there, grows=False)
    else:
        assert workers <= gpus * nodes


def test_what_there_is_no_room_for_is_told_by_worker_and_label() -> None:
    one_gpu = WorkerResources(4.0, 1.0, 4)
    a100, t4 = {"type": "A100"}, {"type": "T4"}
    free = [Node(cpus=8, gpus=1, labels=a100), Node(cpus=3, gpus=1, labels=t4)]
    assert lacking_room([], 1, free, one_gpu) is None
    assert lacking_room([], 4, free, one_gpu) == "room for 3 of 4 workers with 1 GPU and 4 CPU each"
    assert lacking_room([a100, {}], 2, free, one_gpu) == "room for 1 of 2 workers with 1 GPU and 4 CPU each"
    # The second node has a GPU, and not the CPUs beside it.
    told = lacking_room([a100, t4, t4], 6, free, one_gpu)
    assert told == (
        "room for 1 of 2 workers with 1 GPU and 4 CPU each on nodes with type=A100; "
        "room for 4 of 4 workers with 1 GPU and 4 CPU each on nodes with type=T4"
    )


@given(nodes_of, st.integers(1, 16), st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_nothing_is_lacking_exactly_where_there_is_room(
    nodes: list[Node], workers: int, cpus: float, gpus: float
) -> None:
    lacking = lacking_room([], workers, nodes, WorkerResources(cpus, gpus, 1))
    assert (lacking is None) == (room(nodes, cpus, gpus) >= workers)
