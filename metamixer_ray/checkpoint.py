"""What a peer needs to go on: weights, optimizer, and how far it is. No random state, since none is ever kept.

A checkpoint folder holds, per peer, ``peer0.pt`` (tensors and numbers only, loaded with ``weights_only``) and
``peer0.json``, its manifest: the configuration it belongs to, where it stopped, and the hash of the file.
"""

import errno
import hashlib
import json
import math
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from metamixer_ray.config import completed
from metamixer_ray.errors import CheckpointError, TornCheckpoint
from metamixer_ray.stepping import Stepper
from metamixer_ray.tracking.files import sync, sync_folder

FORMAT = 2
# In a manifest: the checksum of all else in it, so that a changed setting isn't taken for another configuration.
CHECK = "checksum"


@dataclass(kw_only=True)
class Progress:
    """How far a training is. ``epoch`` counts from 0; ``step`` is the next step inside that epoch."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    elapsed: float = 0.0
    """Seconds of training and evaluation so far, over all attempts."""
    epoch_seconds: float = 0.0
    """Seconds spent in the running epoch."""
    sums: dict[str, float] = field(default_factory=dict)
    """Running sums of the epoch's metrics."""
    reports: list[str] = field(default_factory=list)
    """What this peer reported at the end of each finished epoch, as JSON: text costs nothing to copy."""
    evaluation_seconds: float = math.inf
    """What the last evaluation took; before the first nobody knows."""
    attempt: str = ""
    """Which start of the workers this is, the same for all ranks: what two of them wrote is not one checkpoint."""


def peer_files(peer: int) -> tuple[str, str]:
    """Names of a peer's file of tensors and of its manifest."""
    return f"peer{peer}.pt", f"peer{peer}.json"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within, a file of a checkpoint is read.

    Raises:
        TornCheckpoint: it is missing, is none (a pipe has no end), or is kept from us: what no further try would mend.
        OSError: storage doesn't give it, which may pass; names the file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise TornCheckpoint(f"{path} is no file but a folder, a pipe or a device")
        yield
    except FileNotFoundError:
        raise TornCheckpoint(f"{path} is missing from the checkpoint") from None
    except (NotADirectoryError, PermissionError) as error:
        raise TornCheckpoint(f"{path} can't be read ({error.strerror})") from None
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def _make_way(path: Path) -> None:
    """Remove what is in a file's place. Where it is no file, whoever goes on has passed it over, and opening it would
    fail, or wait in a pipe for ever."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A peer as it was at one moment, in copies of its own: training goes on while this is written.

    Attributes:
        content: what ``peerN.pt`` holds: ``network``, ``optimizer``, ``stepper``, ``progress``, ``distiller`` where
            that learns, and ``told`` where others have a copy of the network.
        identity: the settings and images it belongs to.
    """

    peer: int
    content: Mapping[str, Any]
    identity: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """The peer's two files; the manifest last, so that a torn write is never taken for whole.

        Raises:
            OSError: the folder can't be written, or has no room.
        """
        weights, manifest_file = (folder / name for name in peer_files(self.peer))
        for path in (weights, manifest_file):
            _make_way(path)
        try:
            with weights.open("xb") as file:
                torch.save(dict(self.content), file)
                sync(file)
        except RuntimeError as error:
            # torch says of a full disk that a position is unexpected, and keeps the reason to itself.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        manifest = {
            "format": FORMAT,
            "peer": self.peer,
            "epoch": self.content["progress"]["epoch"],
            "step": self.content["progress"]["step"],
            "total_steps": self.content["progress"]["total_steps"],
            "skipped_in_a_row": self.content["progress"]["skipped_in_a_row"],
            "sha256": _hash(weights),
            "identity": dict(self.identity),
        }
        with manifest_file.open("x") as file:
            file.write(json.dumps({**manifest, CHECK: _checksum(manifest)}, indent=1))
            sync(file)
        # Rows outlive a power cut, and older checkpoints are deleted for this one: it must outlive it, too.
        sync_folder(folder)


def take_snapshot(
    peer: int,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: Mapping[str, Any],
    distiller: nn.Module | None = None,
    told: torch.Tensor | None = None,
    stepper: Stepper | None = None,
) -> Snapshot:
    """Copy all that a peer needs to go on: its tensors to new ones on the CPU.

    Args:
        distiller: what the distiller learns itself, if anything. It stands apart from the network, which alone is
            evaluated and exported.
        told: what others have of the network, where they have a copy.
        stepper: takes the optimizer's steps.
    """
    content: dict[str, Any] = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
    }
    if stepper is not None:
        content["stepper"] = stepper.state_dict()
    if distiller is not None:
        content["distiller"] = distiller.state_dict()
    if told is not None:
        content["told"] = told
    return Snapshot(peer=peer, content=_copied(content), identity=dict(identity))


def _copied(value: Any) -> Any:
    """The same nested containers with copies of the tensors."""
    if isinstance(value, torch.Tensor):
        # A view of a larger storage would otherwise be saved with all of it.
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def learnt_until(manifest: bytes) -> int | None:
    """After how many steps a peer's part of a checkpoint was written; None if the last of them was skipped for
    non-finite values. What spoilt them may be in it.

    Raises:
        TornCheckpoint: it isn't the manifest that was written.
    """
    told = _parse_manifest(manifest, "the manifest")
    return None if told["skipped_in_a_row"] else told["total_steps"]


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest with all its parts.

    Raises:
        TornCheckpoint: it is missing, or isn't what was written.
        OSError: storage doesn't give it, which may pass.
    """
    with _reading(path):
        return _parse_manifest(path.read_bytes(), path)


def _parse_manifest(text: bytes, path: object) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
        # Those of the first versions have no checksum.
        if manifest.pop(CHECK, None) not in (None, _checksum(manifest)):
            raise TornCheckpoint(f"{path} is not the manifest that was written (its checksum differs): torn or changed")
        if not isinstance(manifest["identity"], dict):
            raise TypeError("identity")
        return {
            "format": manifest["format"],
            "peer": manifest["peer"],
            "sha256": manifest["sha256"],
            "identity": manifest["identity"],
            # Those of the first versions don't tell.
            "total_steps": manifest.get("total_steps", 0),
            "skipped_in_a_row": manifest.get("skipped_in_a_row", 0),
        }
    except TornCheckpoint:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise TornCheckpoint(f"{path} is torn or not a manifest ({type(error).__name__})") from None


def read_peer(
    folder: Path, peer: int, identity: Mapping[str, Any] | None = None, *, mapped: bool = False
) -> dict[str, Any]:
    """Read and verify one peer's file: ``Snapshot.content``, tensors on the CPU.

    Args:
        identity: the settings the checkpoint must belong to; None takes any.
        mapped: leave the tensors in the file until they are looked at. It must stay as it is for as long.

    Raises:
        TornCheckpoint: a file that is missing, cut off or changed, or is none.
        CheckpointError: another format, or another configuration. Both messages say which.
        OSError: storage doesn't give a file, which may pass.
    """
    weights, manifest_path = (folder / name for name in peer_files(peer))
    manifest = _read_manifest(manifest_path)
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{manifest_path} has checkpoint format {manifest['format']}, this version reads {FORMAT}; "
            "use the version that wrote it, or start a new run"
        )
    if manifest["peer"] != peer:
        raise TornCheckpoint(f"{manifest_path} is the manifest of peer {manifest['peer']}")
    with _reading(weights):
        found = _hash(weights)
    if found != manifest["sha256"]:
        raise TornCheckpoint(f"{weights} is not the file that was written (its hash differs): torn or changed")
    theirs = manifest["identity"]
    if identity is not None:
        ours, whole = json.loads(json.dumps(dict(identity))), completed(theirs)
        different = [k for k in {*ours, *theirs} if ours.get(k) != whole.get(k)]
        if different:
            name = sorted(different)[0]
            raise CheckpointError(
                f"{folder} belongs to another configuration: {name} was {whole.get(name)!r} and is now "
                f"{ours.get(name)!r}; resume with the settings in the run's config.yaml, or choose another --name"
            )
    try:
        with _reading(weights):
            loaded: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError, TornCheckpoint):
        raise
    except Exception as error:  # torch has no list of what it raises
        # Its hash is the manifest's all the same: somebody wrote both.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{weights} holds something else than tensors and numbers: {reason}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{weights} holds no peer but a {type(loaded).__name__}")
    return loaded


def _progress(saved: Mapping[str, Any]) -> Progress:
    """How far a training was, as :class:`Snapshot` has it.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    try:
        progress = TypeAdapter(Progress).validate_python(asdict(Progress(**saved)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ValueError(f"progress.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not all(isinstance(json.loads(report), dict) for report in progress.reports):
        raise ValueError("progress.reports: each should be a JSON object")
    return progress


def put_back(
    saved: Mapping[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    distiller: nn.Module | None = None,
    stepper: Stepper | None = None,
) -> Progress:
    """Put what :func:`read_peer` gave back into what it was taken of and return how far that was.

    Raises:
        CheckpointError: it is of another network, another optimizer or another version.
    """
    try:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        if stepper is not None and "stepper" in saved:  # those of the first versions have none
            stepper.load_state_dict(saved["stepper"])
        if distiller is not None:
            distiller.load_state_dict(saved["distiller"])
        return _progress(saved["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the checkpoint doesn't fit this training ({type(error).__name__}: {reason}); "
            "choose another --name to start a new one"
        ) from None


def read_told(folder: Path, peers: int, identity: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    """By peer, what the others had of its network, float32 [n] on the CPU; nothing where nobody had been told yet.

    Raises:
        CheckpointError: see :func:`read_peer`.
    """
    saved = {peer: read_peer(folder, peer, identity, mapped=True) for peer in range(peers)}
    return {peer: content["told"].clone() for peer, content in saved.items() if "told" in content}
