"""What an autoscaler may start: as it is said, and as a launcher's file has it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metamixer_ray.capacity import Node
from metamixer_ray.errors import ConfigError
from metamixer_ray.growth import LAUNCHER_FILE, Growth, NodeType, at_most, launched, parse, startable

LAUNCHER: dict[str, Any] = {
    "cluster_name": "sweeps",
    "max_workers": 6,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "node_config": {}},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 16, "labels": {"market": "spot"}, "node_config": {}},
        "cpu": {"resources": {"CPU": 16}, "max_workers": 2, "node_config": {}},
    },
}


def test_what_is_said() -> None:
    assert parse("8xGPU=1,CPU=4", "--grows-to") == NodeType(8, Node(cpus=4, gpus=1))
    assert parse("2xCPU=1.5,accelerator-type=T4,market=spot", "--grows-to") == NodeType(
        2, Node(cpus=1.5, labels={"accelerator-type": "T4", "market": "spot"})
    )


@pytest.mark.parametrize(
    "text", ["8", "8xGPU", "xGPU=1", "8xGPU=", "GPU=1", "8xGPUS=1", "8xGPU=one", "8xmarket=spot", ""]
)
def test_what_cannot_be_read_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--grows-to .*: write nodes x resources and labels of each"):
        startable([text])


def test_the_option_comes_before_the_variable_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("METAMIXER_GROWS_TO", raising=False)
    assert startable([]) == Growth()
    Path(LAUNCHER_FILE).expanduser().write_text(yaml.safe_dump(LAUNCHER, sort_keys=False))
    from_file = startable([])
    assert [kind.most for kind in from_file.types] == [6, 2]
    monkeypatch.setenv("METAMIXER_GROWS_TO", "3xCPU=2 1xGPU=4,CPU=8")
    assert startable([]) == Growth((NodeType(3, Node(cpus=2)), NodeType(1, Node(cpus=8, gpus=4))))
    assert startable(["5xCPU=2"]) == Growth((NodeType(5, Node(cpus=2)),))
    monkeypatch.setenv("METAMIXER_GROWS_TO", "many")
    with pytest.raises(ConfigError, match=r"\$METAMIXER_GROWS_TO 'many'"):
        startable([])


def test_a_launcher_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(LAUNCHER, sort_keys=False))
    gpu, cpu = NodeType(6, Node(cpus=8, gpus=1, labels={"market": "spot"})), NodeType(2, Node(cpus=16))
    assert launched(path) == Growth((gpu, cpu), 6)
    # All together six: the larger ones, and those that are up.
    assert at_most([], launched(path)) == [gpu.node] * 6
    assert at_most([cpu.node], launched(path)) == [cpu.node] + [gpu.node] * 5
    silent = {**LAUNCHER["available_node_types"], "cpu": {"node_config": {}}}
    path.write_text(yaml.safe_dump({**LAUNCHER, "available_node_types": silent}))
    assert launched(path) == Growth((gpu,), 6)


@pytest.mark.parametrize("text", ["", "[", "- 1", "available_node_types: 3", "available_node_types: {}", "\x00"])
def test_a_launcher_file_of_another_kind_tells_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    assert launched(path).types == ()
    assert launched(tmp_path / "none.yaml") == Growth()


_NODES = st.builds(Node, cpus=st.sampled_from([1.0, 2.0]), gpus=st.sampled_from([0.0, 1.0]))


@given(up=st.lists(_NODES, max_size=6), types=st.lists(st.builds(NodeType, st.integers(0, 4), _NODES), max_size=3))
def test_a_node_counts_once_whether_it_is_up_or_not(up: list[Node], types: list[NodeType]) -> None:
    """What is up stays, what may come is there, and nothing is there twice."""
    most = at_most(up, Growth(tuple(types)))
    for size in {(node.cpus, node.gpus) for node in (*up, *(kind.node for kind in types))}:
        there = sum((node.cpus, node.gpus) == size for node in up)
        may_be = sum(kind.most for kind in types if (kind.node.cpus, kind.node.gpus) == size)
        assert sum((node.cpus, node.gpus) == size for node in most) == max(there, may_be)


def test_a_node_that_is_up_is_one_of_the_kind_whose_labels_it_has() -> None:
    plain, t4, l4 = (Node(cpus=4, gpus=1, labels=labels) for labels in ({}, {"type": "T4"}, {"type": "L4"}))
    up = Node(cpus=4, gpus=1, labels={"type": "T4", "ray.io/node-id": "1"})
    most = at_most([up], Growth((NodeType(1, plain), NodeType(2, l4), NodeType(2, t4))))
    types = sorted(node.labels.get("type", "") for node in most)
    assert types == ["", "L4", "L4", "T4", "T4"]
