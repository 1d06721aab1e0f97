"""A user's own Python function as a source: ``--data module:function``."""

import hashlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from metamixer_ray.data.sources.base import Part, Source, Split, array_chunks
from metamixer_ray.errors import ConfigError, DataError

RETURNS = (
    "it must return (train_images, train_labels, test_images, test_labels), the images as uint8 arrays "
    "[N, H, W, 3], [N, H, W, 4], [N, H, W, 1] or [N, H, W] or as lists of PIL images, the labels as integers from 0"
)


def open_function(reference: str) -> Source:
    """Call ``module:function``, which is looked for in the current folder first, and take what it returns.

    The function is called at every start, once per process, since nothing but its result tells whether that
    changed; it must return the same each time.

    Raises:
        ConfigError: there is no such module or function.
        DataError: the function failed, or returned something else than four matching sequences.
    """
    function = _find(reference)
    try:
        returned = function()
    except Exception as error:
        raise DataError(f"--data {reference}: the function failed with {type(error).__name__}: {error}") from error
    if not isinstance(returned, tuple | list) or len(returned) != 4:
        kind = f"{len(returned)} values" if isinstance(returned, tuple | list) else type(returned).__name__
        raise DataError(f"--data {reference}: the function returned {kind}; {RETURNS}")
    parts = {"train": (returned[0], returned[1]), "test": (returned[2], returned[3])}
    # An alpha channel says nothing here, as in the files of other sources.
    parts = {split: (_opaque(images), labels) for split, (images, labels) in parts.items()}
    digest = hashlib.blake2b(digest_size=16)
    for split, (images, labels) in parts.items():
        _check(reference, split, images, labels)
        _add_to_digest(digest, images, labels)

    def open_part(split: Split) -> Part:
        images, labels = parts[split]
        where = f"{reference} ({split})"
        values = np.asarray(labels).tolist()
        return Part(array_chunks(images, values, where), rows=len(images), where=where, classes=None)

    return Source(name=reference.replace(":", "."), identity=["function", digest.hexdigest()], open=open_part)


def _find(reference: str) -> Any:
    module_name, _, name = reference.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise DataError(f"--data {reference}: {module_name} needs a module that is missing: {error}") from error
        raise ConfigError(
            f"--data {reference}: there is no module {error.name} in {here} or among the installed packages"
        ) from error
    except Exception as error:
        raise DataError(
            f"--data {reference}: importing {module_name} failed with {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"--data {reference}: module {module_name} ({module.__file__}) has no function {name}")
    return function


def _opaque(images: Any) -> Any:
    rgba = isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[3] == 4
    return images[..., :3] if rgba else images


def _check(reference: str, split: str, images: Any, labels: Any) -> None:
    if isinstance(images, np.ndarray):
        if (
            images.dtype != np.uint8
            or images.ndim not in (3, 4)
            or (images.ndim == 4 and images.shape[3] not in (1, 3))
        ):
            raise DataError(
                f"--data {reference}: the {split} images are {images.dtype} {list(images.shape)}; {RETURNS}"
            )
    elif not isinstance(images, Sequence) or not all(isinstance(image, Image.Image) for image in images):
        raise DataError(f"--data {reference}: the {split} images are a {type(images).__name__}; {RETURNS}")
    values = np.asarray(labels)
    if values.ndim != 1 or len(values) != len(images):
        raise DataError(
            f"--data {reference}: {len(images)} {split} images but labels of shape {list(values.shape)}; {RETURNS}"
        )


def _add_to_digest(digest: Any, images: Any, labels: Any) -> None:
    if isinstance(images, np.ndarray):
        digest.update(repr((images.shape, images.dtype.str)).encode())
        digest.update(np.ascontiguousarray(images))
    else:
        for image in images:
            digest.update(repr((image.mode, image.size)).encode())
            digest.update(image.tobytes())
    digest.update(repr(np.asarray(labels).tolist()).encode())
