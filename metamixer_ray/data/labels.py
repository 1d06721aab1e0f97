"""What may stand in a label column, and what an error says of a row that cannot be used."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metamixer_ray.data.sources.base import Split
from metamixer_ray.errors import DataError

OnBadImage = Literal["error", "skip"]
MOST_CLASSES = 2**31


def label_problem(label: object, classes: tuple[str, ...] | None, *, hint: str = "") -> str | None:
    """Why ``label`` is no class number, or None if it is one; ``hint`` is added where it is negative."""
    if label is None:
        return "the label is null"
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        return f"the label is {label!r}, not an integer"
    if not 0 <= label < MOST_CLASSES:
        return f"the label is {label}, which isn't a class number from 0{hint}"
    if classes is not None and label >= len(classes):
        return f"the label is {label}, but the classes are 0 to {len(classes) - 1}"
    return None


def missing_labels_hint(split: Split, *, any_before: bool) -> str:
    """For a negative label: what to do if the test part has no labels at all."""
    return "" if any_before or split == "train" else "; if no label here is, give --test-data with labels"


def bad_row(place: str, problem: str) -> DataError:
    """The error for a row that cannot be used."""
    return DataError(
        f"{place}: {problem}. Mend or remove it, or give --on-bad-image skip to leave out what cannot be used"
    )


def numbered_classes(labels: NDArray[np.int64], where: str) -> tuple[str, ...]:
    """Names for classes that have none: their numbers, up to the highest of ``labels``.

    Raises:
        DataError: the labels cannot be class numbers.
    """
    count = int(labels.max()) + 1
    if count > max(len(labels), 2):
        raise DataError(
            f"{where}: labels reach {count - 1} with only {len(labels)} images, so they aren't class numbers from 0; "
            "name another column by --label-column, or number the classes from 0"
        )
    return tuple(str(number) for number in range(count))


def check_same_classes(names: tuple[str, ...] | None, classes: tuple[str, ...] | None, where: str) -> None:
    """
    Raises:
        DataError: the test part's class names are not the training part's.
    """
    if names is None or classes is None or names == classes:
        return
    if len(names) != len(classes):
        difference = f"{len(names)} instead of {len(classes)}"
    else:
        number = next(i for i, pair in enumerate(zip(names, classes, strict=True)) if pair[0] != pair[1])
        difference = f"class {number} is {names[number]} instead of {classes[number]}"
    raise DataError(
        f"{where}: its class names differ from the training part's ({difference}), so equal labels would mean "
        "different classes; give both parts of one data set"
    )


def no_images(where: str, split: Split) -> DataError:
    """The error for an empty part."""
    return DataError(f"{where}: the {split} part holds no images; check what --data and --test-data name")
