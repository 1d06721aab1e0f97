"""What a cluster's autoscaler may start. Ray (2.60) keeps that to itself, so it is asked for, or read where it is kept.

Without it a cluster that has scaled down to nothing looks like one that can never hold a training.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metamixer_ray.capacity import Node
from metamixer_ray.errors import ConfigError

VARIABLE = "METAMIXER_GROWS_TO"
# Where `ray up` leaves the launcher's file on the head node, which is where the drivers of jobs run.
LAUNCHER_FILE = "~/ray_bootstrap_config.yaml"
_RESOURCES = ("CPU", "GPU")


@dataclass(frozen=True)
class NodeType:
    """Nodes that are alike, and how many of them there may be at once."""

    most: int
    node: Node


@dataclass(frozen=True)
class Growth:
    """All that an autoscaler may start; ``most`` bounds the nodes of all types together, None doesn't."""

    types: tuple[NodeType, ...] = ()
    most: int | None = None


def startable(asked: Sequence[str]) -> Growth:
    """What the autoscaler may start: what ``--grows-to`` says, else $METAMIXER_GROWS_TO, else the launcher's file.

    Raises:
        ConfigError: what is said can't be read.
    """
    if asked:
        return Growth(tuple(parse(text, "--grows-to") for text in asked))
    if said := os.environ.get(VARIABLE, "").split():
        return Growth(tuple(parse(text, f"${VARIABLE}") for text in said))
    return launched(Path(os.path.expanduser(LAUNCHER_FILE)))


def parse(text: str, source: str) -> NodeType:
    """``8xGPU=1,CPU=4,accelerator-type=T4``: up to eight nodes with one GPU, four CPUs and a label each.

    Raises:
        ConfigError: names ``source``.
    """
    count, _, rest = text.partition("x")
    pairs = [part.partition("=") for part in rest.split(",")]
    try:
        resources = {name: float(value) for name, _, value in pairs if name in _RESOURCES}
        if (
            not resources
            or not all(value for _, _, value in pairs)
            or any(n.isupper() for n, _, _ in pairs if n not in resources)
        ):
            raise ValueError
        labels = {name: value for name, _, value in pairs if name not in resources}
        return NodeType(int(count), _node(resources, labels))
    except ValueError:
        raise ConfigError(
            f"{source} {text!r}: write nodes x resources and labels of each, "
            "such as 8xGPU=1,CPU=4 or 2xGPU=1,CPU=8,accelerator-type=T4"
        ) from None


def launched(path: Path) -> Growth:
    """The worker node types of a launcher's file; nothing if there is no such file, or it is something else."""
    try:
        config = yaml.safe_load(path.read_text())
        types, head = dict(config["available_node_types"]), config["head_node_type"]
        most = int(config.get("max_workers", 2))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError):
        return Growth()
    found = []
    for name, kind in types.items():
        try:
            if name != head:
                node = _node(kind["resources"], kind.get("labels"))
                found.append(NodeType(min(most, int(kind.get("max_workers", most))), node))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # a type that says nothing of its resources
    return Growth(tuple(found), most)


def at_most(nodes: Sequence[Node], growth: Growth) -> list[Node]:
    """All nodes there can be at once: those that are up, and those that may come; a node counts once.

    Where not all types can be there in full, the larger nodes are.

    Args:
        nodes: those that are up, some of them perhaps already started by the autoscaler.
        growth: what it may start.
    """
    others = list(nodes)
    up: list[Node] = []
    coming: list[Node] = []
    # Those with labels first: others would take any node of their size.
    for kind in sorted(growth.types, key=lambda kind: -len(kind.node.labels)):
        for _ in range(kind.most):
            alike = next((node for node in others if _is_of(node, kind.node)), None)
            if alike is None:
                coming.append(kind.node)
            else:
                others.remove(alike)
                up.append(alike)
    if growth.most is not None:
        coming.sort(key=lambda node: (-node.gpus, -node.cpus))
        coming = coming[: max(0, growth.most - len(up))]
    return others + up + coming


def _is_of(node: Node, kind: Node) -> bool:
    """Whether a node that is up may be one of a kind: as large, and with its labels (Ray adds others)."""
    return (node.cpus, node.gpus) == (kind.cpus, kind.gpus) and kind.labels.items() <= node.labels.items()


def _node(resources: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> Node:
    return Node(cpus=float(resources.get("CPU", 0)), gpus=float(resources.get("GPU", 0)), labels=labels or {})
