"""Finding a run's newest whole checkpoint again, whatever was left half-written or damaged beside it."""

import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from metamixer_ray.checkpoint import Progress, put_back, read_peer, read_told
from metamixer_ray.config import TrainConfig, identity
from metamixer_ray.data import Splits
from metamixer_ray.errors import CheckpointError, TornCheckpoint, UnreadableCheckpoint
from metamixer_ray.folder import RunFolder, checkpoint_names
from metamixer_ray.mesh import gather_json
from metamixer_ray.networks import StagedNetwork
from metamixer_ray.patience import persistently
from metamixer_ray.peer import Peer

T = TypeVar("T")

# A kill came while a later start overwrote the checkpoint. On a GPU, whose sums have no fixed order, both differ.
MIXED = "its peers' files were written before and after a restart"
# For so long (seconds) a checkpoint that storage doesn't give is asked for before an older one is looked at: going on
# from that costs time, and no bits. The other ranks wait in a collective meanwhile, which has its own end.
BRIEF_PATIENCE = 5.0


class Checkpoints(Protocol):
    """Where a training's checkpoints are, and how patient with it one is."""

    def persist(self, work: Callable[[], T], what: str) -> T:
        """What ``work`` returns, which reads ``what`` from storage that may fail for a while."""

    def checkpoints(self) -> list[str]:
        """Their names, newest first."""

    def recorded(self) -> int:
        """How many epochs are on record: there were that many whole checkpoints at least."""

    def fetch(self, name: str, peers: Sequence[int]) -> Path:
        """A local folder with the files of ``peers`` of one of them, as far as they are there.

        Raises:
            OSError: storage doesn't give them for now.
        """


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
        StorageFailed: storage gives none of those that may be whole, for as long as there is patience.
    """
    world = peer.config.workers
    names, recorded, attempt = _shared([kept.checkpoints(), kept.recorded(), uuid.uuid4().hex], world)[0]
    part, name, passed_over = kept.persist(lambda: _newest_whole(peer, kept, names), "the run's checkpoints")
    if name is not None:
        progress = put_back(part.saved, peer.network.network, peer.optimizer, peer.learnt, peer.stepper)
        if peer.stale is not None:
            peer.stale.refresh(part.told)
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


@dataclass(frozen=True)
class _Part:
    """A peer's part of a checkpoint: what it saved, and what the others had of each, where they have copies."""

    saved: dict[str, Any] = field(default_factory=dict)
    told: dict[int, torch.Tensor] = field(default_factory=dict)


def _newest_whole(peer: Peer, kept: Checkpoints, names: Sequence[str]) -> tuple[_Part, str | None, list[str]]:
    """This peer's part of the newest checkpoint that is whole for all, its name (None: there is none), and what was
    wrong with newer ones. All ranks call it together.

    Raises:
        CheckpointError: it belongs to another configuration or version.
        OSError: on all ranks, when none is left, and storage doesn't give one that may be whole.
    """
    passed_over, unreadable = list[str](), list[str]()
    for name in names:
        part, problem = _read(peer, kept, name)
        # A checkpoint is whole only where all peers find theirs.
        torn = problem is None or isinstance(problem, TornCheckpoint)
        later = isinstance(problem, UnreadableCheckpoint)
        told = None if problem is None else str(problem)
        found = _shared([told, torn, later, _attempt(part.saved)], peer.config.workers)
        for theirs, is_torn, *_ in found:
            if not is_torn:
                raise CheckpointError(theirs)
        problems = [theirs for theirs, *_ in found if theirs is not None]
        if not problems and _mixed(by for *_, by in found):
            problems = [MIXED]
        if not problems:
            return part, name, passed_over
        passed_over.append(f"{name} is not whole: {problems[0]}")
        unreadable += [theirs for theirs, _, may_be_whole, _ in found if may_be_whole]
    if unreadable:
        raise OSError(unreadable[0])
    return _Part(), None, passed_over


def _read(peer: Peer, kept: Checkpoints, name: str) -> tuple[_Part, CheckpointError | None]:
    """This peer's part of a checkpoint, and what is wrong with it."""
    mesh, identified = peer.mesh, checkpoint_identity(peer.config, peer.splits)

    def read() -> _Part:
        folder = kept.fetch(name, [mesh.peer] if peer.stale is None else list(range(mesh.peers)))
        saved = read_peer(folder, mesh.peer, identified)
        return _Part(saved, {} if peer.stale is None else read_told(folder, mesh.peers, identified))

    try:
        return _briefly(read), None
    except CheckpointError as error:
        return _Part(), error


def _briefly(read: Callable[[], T]) -> T:
    """What ``read`` returns, if need be at a later try.

    Raises:
        UnreadableCheckpoint: storage doesn't give it.
    """
    try:
        return persistently(read, BRIEF_PATIENCE)
    except OSError as error:
        place = error.filename or "it"
        raise UnreadableCheckpoint(f"{place} can't be read ({error.strerror or error})") from error


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
    folder: RunFolder,
    peers: int,
    scratch: Path,
    expected: Mapping[str, Any] | None = None,
    *,
    insisting: bool = False,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Content (per peer) of the newest checkpoint of which every file is whole, and what was wrong with newer ones.

    Args:
        scratch: where checkpoints are copied to when the folder isn't local.
        expected: what they must belong to, see :func:`checkpoint_identity`; None takes any.
        insisting: an older one isn't taken where storage doesn't give a newer one.

    Raises:
        CheckpointError: it belongs to another configuration or version; or there is none, and what is wrong with the
            newest.
        OSError: storage doesn't say which there are, or, ``insisting``, doesn't give one of them.
    """
    problems: list[str] = []
    for name in checkpoint_names(folder):
        read = partial(_read_peers, folder, name, peers, scratch / name, expected)
        try:
            peers_content = read() if insisting else _briefly(read)
            if _mixed(map(_attempt, peers_content)):
                raise TornCheckpoint(f"{folder}/{name}: {MIXED}")
        except UnreadableCheckpoint as error:
            problems.append(f"{name} is not whole: {error}")
        except TornCheckpoint as error:
            problems.append(str(error))
        else:
            return peers_content, [f"{problem}; {name} is used instead" for problem in problems]
    raise CheckpointError(problems[0] if problems else f"there is no checkpoint in {folder}; was this run trained?")


def _read_peers(
    folder: RunFolder, name: str, peers: int, scratch: Path, expected: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    local = folder.fetch(name, scratch)
    return [read_peer(local, peer, expected) for peer in range(peers)]


def load_trained(
    networks: Sequence[StagedNetwork],
    folder: RunFolder,
    expected: Mapping[str, Any] | None,
    *,
    insisting: bool = False,
) -> list[str]:
    """Give ``networks`` (one per peer) the weights of a run's newest whole checkpoint.

    Returns:
        What was wrong with newer ones: the weights are then older than they should be, which a person must be told.

    Raises:
        CheckpointError: see :func:`newest_checkpoint`; or it is of other networks.
        OSError: see :func:`newest_checkpoint`.
    """
    with tempfile.TemporaryDirectory(prefix="metamixer_ray-") as scratch:
        peers, problems = newest_checkpoint(folder, len(networks), Path(scratch), expected, insisting=insisting)
        for network, saved in zip(networks, peers, strict=True):
            try:
                network.network.load_state_dict(saved["network"])
            except (KeyError, TypeError, AttributeError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise CheckpointError(f"the checkpoint in {folder} is of another network: {reason}") from None
    return problems
