"""Finding a run's newest whole checkpoint again, whatever a kill left half-written beside it."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metamixer_ray.checkpoint import read_peer
from metamixer_ray.config import TrainConfig, identity
from metamixer_ray.data import Splits
from metamixer_ray.errors import CheckpointError
from metamixer_ray.folder import RunFolder
from metamixer_ray.networks import StagedNetwork

# Ray Train's record of the checkpoints in a run folder. It is rewritten in place, so a kill can leave half of it.
SNAPSHOT = "checkpoint_manager_snapshot.json"

_NAME = re.compile(r"checkpoint-epoch(\d+)(?:-step(\d+))?")


def checkpoint_identity(config: TrainConfig, splits: Splits) -> dict[str, Any]:
    """What a checkpoint belongs to: the settings that decide the weights, and the very images."""
    return {**identity(config), "data_fingerprint": splits.fingerprint}


def newest_checkpoint(
    folder: RunFolder, peers: int, scratch: Path, expected: Mapping[str, Any] | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """Name and content (per peer) of the newest checkpoint of which every file is whole.

    Args:
        scratch: where checkpoints are copied to when the folder isn't local.
        expected: what they must belong to, see :func:`checkpoint_identity`; None takes any.

    Raises:
        CheckpointError: there is none; tells what is wrong with the newest.
    """
    found = [(match, name) for name in folder.children() if (match := _NAME.fullmatch(name))]
    found.sort(key=lambda f: (int(f[0][1]), int(f[0][2] or 0)), reverse=True)
    problem = f"there is no checkpoint in {folder}; was this run trained at all?"
    for index, (_, name) in enumerate(found):
        local = folder.fetch(name, scratch / name)
        try:
            return name, [read_peer(local, peer, expected) for peer in range(peers)]
        except CheckpointError as error:
            problem = str(error) if index == 0 else problem
    raise CheckpointError(problem)


def load_trained(networks: Sequence[StagedNetwork], folder: RunFolder, expected: Mapping[str, Any] | None) -> None:
    """Give ``networks`` (one per peer) the weights of a run's newest whole checkpoint.

    Raises:
        CheckpointError: see :func:`newest_checkpoint`.
    """
    with tempfile.TemporaryDirectory(prefix="metamixer_ray-") as scratch:
        _, peers = newest_checkpoint(folder, len(networks), Path(scratch), expected)
        for network, saved in zip(networks, peers, strict=True):
            network.network.load_state_dict(saved["network"])


def repair_snapshot(folder: RunFolder, peers: int) -> str | None:
    """Put a half-written snapshot aside.

    Returns:
        The checkpoint to start from instead; None where there is a whole snapshot, or no checkpoint.
    """
    content = folder.read(SNAPSHOT)
    if content is not None:
        try:
            json.loads(content)
        except ValueError:
            folder.write(f"{SNAPSHOT}.torn", content)
            folder.filesystem.delete_file(folder.path(SNAPSHOT))
        else:
            return None
    with tempfile.TemporaryDirectory(prefix="metamixer_ray-") as scratch:
        try:
            return newest_checkpoint(folder, peers, Path(scratch))[0]
        except CheckpointError:
            return None
