"""Finding a run's newest whole checkpoint again, whatever was left half-written or damaged beside it."""

import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from metamixer_ray.checkpoint import Progress, put_back, read_peer, read_told
from metamixer_ray.config import TrainConfig, identity
from metamixer_ray.data import Splits
from metamixer_ray.errors import CheckpointError, TornCheckpoint
from metamixer_ray.folder import RunFolder, checkpoint_names
from metamixer_ray.mesh import gather_json
from metamixer_ray.networks import StagedNetwork
from metamixer_ray.peer import Peer

# A kill came while a later start overwrote the checkpoint. On a GPU, whose sums have no fixed order, both differ.
MIXED = "its peers' files were written before and after a restart"


class Checkpoints(Protocol):
    """Where a training's checkpoints are."""

    def checkpoints(self) -> list[str]:
        """Their names, newest first."""

    def recorded(self) -> int:
        """How many epochs are on record: there were that many whole checkpoints at least."""

    def fetch(self, name: str, peers: Sequence[int]) -> Path:
        """A local folder with the files of ``peers`` of one of them, as far as they are there."""


def checkpoint_identity(config: TrainConfig, splits: Splits) -> dict[str, Any]:
    """What a checkpoint belongs to: the settings that decide the weights, and the very images."""
    return {**identity(config), "data_fingerprint": splits.fingerprint}


@dataclass(frozen=True)
class Restored:
    """Where a training goes on from: what was wrong with newer checkpoints stands in ``warnings``."""

    progress: Progress
    name: str | None
    """Of the checkpoint; None where nothing was kept yet, and all starts anew."""
    warnings: list[str]


def restore(peer: Peer, kept: Checkpoints) -> Restored:
    """Put the newest checkpoint that is whole for all peers back into this one's. All ranks call it together.

    Raises:
        CheckpointError: it belongs to another configuration or version, or none is whole although epochs are on record.
    """
    mesh, identified = peer.mesh, checkpoint_identity(peer.config, peer.splits)
    world = peer.config.workers
    names, recorded, attempt = _shared([kept.checkpoints(), kept.recorded(), uuid.uuid4().hex], world)[0]
    passed_over: list[str] = []
    for name in names:
        peers = [mesh.peer] if peer.stale is None else list(range(mesh.peers))
        folder = kept.fetch(name, peers)
        saved, problem = _read(folder, mesh.peer, identified)
        # A checkpoint is whole only where all peers find theirs.
        torn = problem is None or isinstance(problem, TornCheckpoint)
        found = _shared([None if problem is None else str(problem), torn, _attempt(saved)], world)
        for told, theirs_torn, _ in found:
            if not theirs_torn:
                raise CheckpointError(told)
        problems = [told for told, *_ in found if told is not None]
        if not problems and _mixed(by for *_, by in found):
            problems = [MIXED]
        if problems:
            passed_over.append(f"{name} is not whole: {problems[0]}")
            continue
        progress = put_back(saved, peer.network.network, peer.optimizer, peer.learnt, peer.stepper)
        if peer.stale is not None:
            peer.stale.refresh(read_told(folder, mesh.peers, identified))
        return Restored(
            replace(progress, attempt=attempt), name, [f"{told}; going on from {name}" for told in passed_over]
        )
    if recorded:
        why = passed_over[0] if passed_over else "there is none"
        raise CheckpointError(
            f"{recorded} epochs are on record, but there is no whole checkpoint to go on from ({why}); "
            "choose another --name to train anew"
        )
    return Restored(Progress(attempt=attempt), None, [f"{told}; starting anew" for told in passed_over])


def _read(folder: Path, peer: int, identified: Mapping[str, Any]) -> tuple[dict[str, Any], CheckpointError | None]:
    """A peer's part of a checkpoint, and what is wrong with it."""
    try:
        return read_peer(folder, peer, identified), None
    except CheckpointError as error:
        return {}, error


def _attempt(saved: Mapping[str, Any]) -> str:
    """Which start of the workers a peer's part was written in; what isn't progress is refused when it is put back."""
    progress = saved.get("progress")
    return str(progress.get("attempt")) if isinstance(progress, Mapping) else ""


def _mixed(attempts: Iterable[str]) -> bool:
    """Whether a checkpoint's parts, each with the start it was written in, are of several."""
    return len(set(attempts)) > 1


def _shared(value: Any, world: int) -> list[Any]:
    """What every rank gave, by rank."""
    return gather_json(value) if world > 1 else [value]


def newest_checkpoint(
    folder: RunFolder, peers: int, scratch: Path, expected: Mapping[str, Any] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Content (per peer) of the newest checkpoint of which every file is whole, and what was wrong with newer ones.

    Args:
        scratch: where checkpoints are copied to when the folder isn't local.
        expected: what they must belong to, see :func:`checkpoint_identity`; None takes any.

    Raises:
        CheckpointError: it belongs to another configuration or version; or there is none, and what is wrong with the
            newest.
    """
    problems: list[str] = []
    for name in checkpoint_names(folder):
        local = folder.fetch(name, scratch / name)
        try:
            peers_content = [read_peer(local, peer, expected) for peer in range(peers)]
            if _mixed(map(_attempt, peers_content)):
                raise TornCheckpoint(f"{local}: {MIXED}")
        except TornCheckpoint as error:
            problems.append(str(error))
        else:
            return peers_content, [f"{problem}; {name} is used instead" for problem in problems]
    raise CheckpointError(problems[0] if problems else f"there is no checkpoint in {folder}; was this run trained?")


def load_trained(networks: Sequence[StagedNetwork], folder: RunFolder, expected: Mapping[str, Any] | None) -> list[str]:
    """Give ``networks`` (one per peer) the weights of a run's newest whole checkpoint.

    Returns:
        What was wrong with newer ones: the weights are then older than they should be, which a person must be told.

    Raises:
        CheckpointError: see :func:`newest_checkpoint`; or it is of other networks.
    """
    with tempfile.TemporaryDirectory(prefix="metamixer_ray-") as scratch:
        peers, problems = newest_checkpoint(folder, len(networks), Path(scratch), expected)
        for network, saved in zip(networks, peers, strict=True):
            try:
                network.network.load_state_dict(saved["network"])
            except (KeyError, TypeError, AttributeError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise CheckpointError(f"the checkpoint in {folder} is of another network: {reason}") from None
    return problems
