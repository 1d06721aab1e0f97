"""A tree of class folders: ``train/CLASS/image`` beside ``test/CLASS/image``, as torchvision's ImageFolder
reads it."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from metamixer_ray.data.sources.base import CHUNK_ROWS, Chunk, Part, Source, Split
from metamixer_ray.errors import ConfigError, DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEST_NAMES = ("test", "val", "valid", "validation")


def open_folder(folder: Path, *, test_folder: Path | None, follow_links: bool = False) -> Source:
    """The images under ``folder``; class names are the training part's folder names, sorted.

    The training part is ``folder/train``, or ``folder`` itself when ``test_folder`` is given and there is no
    ``train``. The test part is ``test_folder``, or the first of ``test``, ``val``, ``valid``, ``validation``
    inside ``folder`` that holds class folders. Images may lie deeper inside a class folder; other files are
    ignored.

    Args:
        follow_links: whether links may lead out of ``folder`` and ``test_folder``.

    Raises:
        ConfigError: there is no training or no test part.
        DataError: a class folder without images, a test class that training doesn't have, a link that leads out or
            to nothing, or a folder that can't be read.
    """
    train_root = folder / "train"
    if not train_root.is_dir():
        if test_folder is None or not _class_names(folder):
            raise ConfigError(
                f"--data {folder}: neither Parquet files nor a train/ folder with one folder per class are in there"
            )
        train_root = folder
    test_root = test_folder or _test_root(folder)
    if test_root is None:
        raise ConfigError(
            f"--data {folder}: no test part with class folders (looked for {', '.join(TEST_NAMES)}); "
            "give it by --test-data FOLDER"
        )
    classes = tuple(_class_names(train_root))
    if not classes:
        raise ConfigError(f"--data {folder}: {train_root} holds no class folders")
    roots = {"train": train_root, "test": test_root}
    homes = None if follow_links else [home.resolve() for home in (folder, test_folder) if home is not None]
    listed = {split: _list(root, classes, homes) for split, root in roots.items()}
    identity = [
        "folder",
        *([str(root.resolve()), _stamps(root, listed[split])] for split, root in roots.items()),
    ]

    def open_part(split: Split) -> Part:
        _check_classes(split, roots[split], classes, listed[split])
        files = listed[split]
        return Part(_chunks(files), rows=len(files), where=str(roots[split]), classes=classes)

    return Source(name=folder.resolve().name, identity=identity, open=open_part)


def _test_root(folder: Path) -> Path | None:
    return next((folder / name for name in TEST_NAMES if _class_names(folder / name)), None)


def _class_names(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _list(root: Path, classes: tuple[str, ...], homes: Sequence[Path] | None) -> list[tuple[str, int]]:
    """(path, label) of every image; folders outside ``classes`` get label -1 and are refused when opened.

    Links are followed, but not out of ``homes``, unless that is None; a folder that several lead to is read once per
    class, since a link may lead to a folder that it lies in.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    found = []
    for name in _class_names(root):
        been = set()
        for parent, folders, files in os.walk(root / name, followlinks=True, onerror=_unreadable):
            real = os.path.realpath(parent)
            _check_inside(parent, real, homes)
            if real in been:
                folders.clear()
                continue
            been.add(real)
            folders.sort()
            for file in sorted(files):
                if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                    path = os.path.join(parent, file)
                    if os.path.islink(path):
                        _check_inside(path, os.path.realpath(path), homes)
                    found.append((path, numbers.get(name, -1)))
    return found


def _check_inside(path: str, real: str, homes: Sequence[Path] | None) -> None:
    if homes is not None and not any(Path(real).is_relative_to(home) for home in homes):
        raise DataError(
            f"{path}: a link leads out of the folder, to {real}. Give --follow-links if that is meant to be among the "
            "images, else remove it"
        )


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder can't be read ({error.strerror}); mend or remove it") from error


def _stamps(root: Path, listed: list[tuple[str, int]]) -> list[list[object]]:
    stamps: list[list[object]] = []
    for path, label in listed:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: the image can't be read ({error.strerror}); mend or remove it") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: this is no image but a pipe, a device or a folder; remove it")
        stamps.append([os.path.relpath(path, root), label, status.st_size, status.st_mtime_ns])
    return stamps


def _check_classes(split: Split, root: Path, classes: tuple[str, ...], listed: list[tuple[str, int]]) -> None:
    unknown = sorted(set(_class_names(root)) - set(classes))
    if unknown:
        raise DataError(
            f"{root}: class folder {unknown[0]} is not among the {len(classes)} training classes; "
            "remove it, or name the folders of both parts alike"
        )
    filled = {label for _, label in listed}
    empty = [name for number, name in enumerate(classes) if number not in filled]
    if split == "train" and listed and empty:
        raise DataError(
            f"{root / empty[0]}: the class folder holds no images ({', '.join(EXTENSIONS)}); fill it or remove it"
        )


def _chunks(listed: list[tuple[str, int]]) -> Iterator[Chunk]:
    for start in range(0, len(listed), CHUNK_ROWS):
        rows = listed[start : start + CHUNK_ROWS]
        paths = [path for path, _ in rows]
        yield Chunk(list(paths), [label for _, label in rows], paths)
