"""Which images ``evaluate --data`` takes: the test part, or all where no part is named so; never any to train on."""

from pathlib import Path

from metamixer_ray.data import load_splits
from metamixer_ray.evaluate import EvaluateOptions
from tests.data.drawing import class_folders, drawn_set


def images_of(data: Path | str, size: int = 8) -> int:
    dataset = EvaluateOptions(run="run", data=str(data)).dataset(size)
    assert dataset is not None
    return len(load_splits(dataset, scored_only=True).test)


def test_a_parquet_file_is_taken_whole(tmp_path: Path) -> None:
    folder = drawn_set(tmp_path / "set", train=30, test=12)
    assert images_of(folder / "train.parquet") == 30
    assert images_of(folder / "test.parquet") == 12


def test_of_several_files_those_of_the_test_part_are_taken(tmp_path: Path) -> None:
    folder = drawn_set(tmp_path / "set", train=30, test=12)
    assert images_of(folder) == images_of(folder / "*.parquet") == 12
    (folder / "train.parquet").unlink()
    assert images_of(folder) == images_of(folder / "*.parquet") == 12
    (folder / "test.parquet").rename(folder / "photos.parquet")
    assert images_of(folder) == 12


def test_trees_with_and_without_parts(tmp_path: Path) -> None:
    class_folders(tmp_path / "plain", 4)
    assert images_of(tmp_path / "plain") == 12
    class_folders(tmp_path / "parts" / "test", 5)
    assert images_of(tmp_path / "parts") == 15
    class_folders(tmp_path / "parts" / "train", 2)
    assert images_of(tmp_path / "parts") == 15


def test_named_sets_and_functions_have_their_own_test_part() -> None:
    assert images_of("digits", 16) == 359
    assert images_of("tests.e2e.own_parts:stripes", 16) > 0
