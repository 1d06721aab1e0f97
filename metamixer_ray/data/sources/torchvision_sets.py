"""The classic sets by name, fetched and read by torchvision."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metamixer_ray.data.sources.base import Part, Source, Split, array_chunks
from metamixer_ray.errors import ConfigError, DataError, Unreachable
from metamixer_ray.settings_text import brief


@dataclass(frozen=True)
class _Set:
    load: Callable[[str, Split, bool], Any]
    """(root, split, download) -> the torchvision data set."""
    layout: tuple[str, ...]
    """What must be in the root, as torchvision lays it out."""


def _cifar10(root: str, split: Split, download: bool) -> Any:
    from torchvision.datasets import CIFAR10

    return CIFAR10(root, train=split == "train", download=download)


def _cifar100(root: str, split: Split, download: bool) -> Any:
    from torchvision.datasets import CIFAR100

    return CIFAR100(root, train=split == "train", download=download)


def _fashion_mnist(root: str, split: Split, download: bool) -> Any:
    from torchvision.datasets import FashionMNIST

    return FashionMNIST(root, train=split == "train", download=download)


def _svhn(root: str, split: Split, download: bool) -> Any:
    from torchvision.datasets import SVHN

    return SVHN(root, split=split, download=download)


def _stl10(root: str, split: Split, download: bool) -> Any:
    from torchvision.datasets import STL10

    return STL10(root, split=split, download=download)


TORCHVISION_SETS: dict[str, _Set] = {
    "cifar10": _Set(_cifar10, ("cifar-10-batches-py",)),
    "cifar100": _Set(_cifar100, ("cifar-100-python",)),
    "fashion-mnist": _Set(_fashion_mnist, ("FashionMNIST/raw",)),
    "svhn": _Set(_svhn, ("train_32x32.mat", "test_32x32.mat")),
    "stl10": _Set(_stl10, ("stl10_binary",)),
}


def open_torchvision(name: str, *, data_root: str | None, cache_dir: Path) -> Source:
    """A torchvision set: from ``data_root`` when given, else downloaded into the cache folder.

    What torchvision downloads is verified by checksum, so the name alone identifies it; files under
    ``data_root`` are the user's, so their sizes and times are part of the identity.

    Raises:
        DataError: ``data_root`` doesn't hold the set, or (when opened) the download failed or a file is damaged.
        ConfigError: ``data_root`` is no folder's name.
        Unreachable: it can't be looked into.
    """
    entry = TORCHVISION_SETS[name]
    identity: list[Any] = [name]
    if data_root is not None:
        root, stamps = _look_into(data_root, entry.layout)
        if not stamps:
            raise DataError(
                f"--data-root {data_root}: {name} is not there; expected {' and '.join(entry.layout)} in "
                "that folder, as torchvision unpacks them. Leave --data-root out to download the set"
            )
        identity += stamps
    else:
        root = cache_dir / "downloads"

    def open_part(split: Split) -> Part:
        if data_root is None:
            root.mkdir(parents=True, exist_ok=True)
        try:
            images, labels, classes = unpack(entry.load(str(root), split, data_root is None))
        except (MemoryError, ImportError):
            raise  # not of the files
        except Exception as error:  # files without a checksum may hold anything, and torchvision then raises anything
            reason = " ".join(str(error).split()) or type(error).__name__
            if data_root is not None:
                message = f"--data-root {data_root}: {name} is incomplete or damaged there ({reason}); unpack it again"
            else:
                there = " and ".join(str(root / part) for part in entry.layout)
                message = (
                    f"{name} could not be downloaded or read ({reason}). If there is no network here, put it in a "
                    f"folder ({' and '.join(entry.layout)}, as torchvision unpacks them) and give "
                    f"--data-root FOLDER; if there is, remove {there}, and it is downloaded again"
                )
            raise DataError(message) from error
        where = f"{name} ({split})"
        return Part(array_chunks(images, labels, where), rows=len(images), where=where, classes=classes)

    return Source(name=name, identity=identity, open=open_part)


def unpack(loaded: Any) -> tuple[NDArray[np.uint8], list[int], tuple[str, ...]]:
    """Images uint8 [N, H, W, 3] or [N, H, W], labels and class names of a torchvision set, whose kinds differ.

    SVHN and STL-10 keep channels first and call labels ``labels``; SVHN has no class names.

    Raises:
        ValueError: there are more images than labels, or fewer.
    """
    images = np.asarray(loaded.data)
    if images.ndim == 4 and images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    labels = np.asarray(loaded.targets if hasattr(loaded, "targets") else loaded.labels).tolist()
    if len(labels) != len(images):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels")
    classes = getattr(loaded, "classes", None) or [str(number) for number in range(max(labels) + 1)]
    return images, labels, tuple(classes)


def _look_into(data_root: str, layout: tuple[str, ...]) -> tuple[Path, list[list[object]]]:
    """The folder, and path, size and modification time of each file in it that belongs to the set."""
    try:
        root = Path(data_root).expanduser().resolve()
        files = sorted(file for part in layout for file in _files(root / part))
        return root, [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except (OSError, ValueError, RuntimeError) as error:  # such as one too long, or with a NUL, or in a circle of links
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        # Storage may recover, a wrong name doesn't.
        raise (Unreachable if isinstance(error, OSError) else ConfigError)(
            f"--data-root {brief(data_root)}: the folder can't be looked into ({reason}); give one that can be read, "
            "or leave --data-root out to download the set"
        ) from error


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
