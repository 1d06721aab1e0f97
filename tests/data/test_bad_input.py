import errno
import logging
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metamixer_ray.data import DataConfig, Splits
from metamixer_ray.errors import ConfigError, DataError, Unreachable, UserError
from metamixer_ray.patience import persistently
from tests.data.drawing import drawn_set, encoded, picture, pixels, write_parquet

Load = Callable[..., Splits]
GOOD = [encoded(picture(i)) for i in range(12)]
LABELS = [i % 3 for i in range(12)]


def folder_with(path: Path, row: int, image: Any = "as it is", label: Any = "as it is", **options: Any) -> Path:
    """A drawn set whose training row ``row`` has another image or label."""
    images, labels = list(GOOD), list(LABELS)
    if image != "as it is":
        images[row] = image
    if label != "as it is":
        labels[row] = label
    drawn_set(path, **options)
    write_parquet(path / "train.parquet", images, labels, **options)
    return path


ROWS = [
    ({"image": b"not an image"}, "the image cannot be decoded"),
    ({"image": b""}, "the image cannot be decoded"),
    ({"image": GOOD[0][:-40]}, "the image cannot be decoded"),
    ({"image": None}, "no image bytes are stored here"),
    ({"image": encoded(Image.new("1", (20_000, 20_000)))}, "too large to be decoded safely"),
    ({"image": encoded(Image.new("1", (4097, 4097)))}, "the image is 4097 x 4097 pixels, .*give --image-size N"),
    ({"image": encoded(Image.new("1", (3, 3)))}, "the image is 3 x 3 pixels, .*give --image-size N"),
    ({"label": None}, "the label is null"),
    ({"label": -1}, "the label is -1, which isn't a class number"),
    ({"label": 3}, "the label is 3, but the classes are 0 to 2"),
]


@pytest.mark.parametrize("data", ["x" * 300, f"/{'x' * 300}/*", f"{'x' * 300}.parquet", "~nobody-of-this-name/images"])
def test_images_that_no_path_leads_to_are_refused(tmp_path: Path, load: Load, data: str) -> None:
    with pytest.raises(UserError, match=r"^--data "):
        load(data)
    drawn_set(tmp_path / "set")
    with pytest.raises(UserError, match=r"^--"):
        load(tmp_path / "set" / "train.parquet", test_data=data)


@pytest.mark.parametrize("options", [{}, {"data_root": "root", "data": "fashion-mnist"}])
def test_places_that_do_not_answer_for_a_while_are_asked_again(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    """By whoever looks for the images of a training that is under way."""
    monkeypatch.chdir(tmp_path)
    drawn_set(Path("set"))
    failures = iter([OSError(errno.ESTALE, os.strerror(errno.ESTALE), "set")] * 2)
    stat = Path.stat

    def away(self: Path, **how: bool) -> os.stat_result:
        for error in failures:
            raise error
        return stat(self, **how)

    monkeypatch.setattr(Path, "stat", away)
    told: list[OSError] = []
    waits = iter([None, None, True])
    with pytest.raises(UserError) if options else nullcontext():
        persistently(lambda: load(**{"data": "set", **options}), 60.0, told.append, lambda _: next(waits))
    assert told
    assert all(isinstance(error, Unreachable) for error in told)


@pytest.mark.parametrize(("fault", "message"), ROWS)
def test_a_bad_row_is_named_with_its_file_and_the_remedy(tmp_path: Path, load: Load, fault: dict, message: str) -> None:
    with pytest.raises(DataError, match=rf"train\.parquet, row 8: .*{message}.*--on-bad-image skip"):
        load(folder_with(tmp_path / "set", 8, **fault))


@pytest.mark.parametrize(("fault", "message"), ROWS)
def test_a_bad_row_can_be_skipped(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture, fault: dict, message: str
) -> None:
    with caplog.at_level(logging.WARNING):
        splits = load(folder_with(tmp_path / "set", 8, **fault), on_bad_image="skip")
    assert splits.skipped == 1
    assert "1 bad ones left out" in splits.description
    assert splits.train.labels.tolist() == LABELS[:8] + LABELS[9:]
    assert np.array_equal(splits.train.images[8].numpy(), pixels(9))
    assert any("row 8" in text and re.search(message, text) for text in caplog.messages)
    assert any("left out 1 of 12" in text for text in caplog.messages)
    again = load(tmp_path / "set", on_bad_image="skip")
    assert again.skipped == 1, "the count is kept with the decoded images"


def test_only_the_first_few_skipped_rows_are_logged(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    drawn_set(tmp_path / "set", test=3)
    write_parquet(tmp_path / "set/train.parquet", [b"x"] * 50 + GOOD, [0] * 50 + LABELS)
    splits = load(tmp_path / "set", on_bad_image="skip")
    assert splits.skipped == 50
    assert sum("cannot be decoded" in text for text in caplog.messages) == 5


def test_skipping_everything_is_an_error(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set")
    write_parquet(tmp_path / "set/train.parquet", [b"x"] * 5, [0] * 5)
    with pytest.raises(DataError, match=r"none of the 5 train images can be used; the first: .*row 0"):
        load(tmp_path / "set", on_bad_image="skip")


def test_test_labels_are_held_to_the_training_classes(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set", names=None)
    write_parquet(tmp_path / "set/test.parquet", GOOD[:4], [0, 1, 2, 3], names=None)
    with pytest.raises(DataError, match=r"test\.parquet, row 3: the label is 3, but the classes are 0 to 2"):
        load(tmp_path / "set")


def test_a_test_part_without_labels_says_what_to_do(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set")
    write_parquet(tmp_path / "set/test.parquet", GOOD[:4], [-1] * 4)
    with pytest.raises(DataError, match=r"row 0: the label is -1.*give --test-data with labels"):
        load(tmp_path / "set")


def test_labels_that_are_no_class_numbers(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set", names=None)
    write_parquet(tmp_path / "set/train.parquet", GOOD, [10_000 + i for i in range(12)], names=None)
    with pytest.raises(DataError, match=r"labels reach 10011 with only 12 images.*--label-column"):
        load(tmp_path / "set")


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_part(tmp_path: Path, load: Load, part: str) -> None:
    drawn_set(tmp_path / "set")
    write_parquet(tmp_path / f"set/{part}.parquet", [], [])
    with pytest.raises(DataError, match=rf"{part}\.parquet: the {part} part holds no images"):
        load(tmp_path / "set")


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_a_zero_byte_or_truncated_file(tmp_path: Path, load: Load, keep: int) -> None:
    path = drawn_set(tmp_path / "set") / "train.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(DataError, match=r"train\.parquet: not a whole Parquet file.*again"):
        load(tmp_path / "set")


def test_a_file_damaged_in_the_middle(tmp_path: Path, load: Load) -> None:
    path = drawn_set(tmp_path / "set") / "train.parquet"
    whole = bytearray(path.read_bytes())
    whole[4:600] = bytes(596)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"train\.parquet"):
        load(tmp_path / "set")


def test_mixed_sizes_name_the_option(tmp_path: Path, load: Load) -> None:
    path = folder_with(tmp_path / "set", 5, image=encoded(picture(5, size=9)))
    with pytest.raises(DataError, match=r"row 5: the image is 9 x 9 pixels, but .*row 0 is 8 x 8; give --image-size"):
        load(path)
    with pytest.raises(DataError, match="--image-size"):
        load(path, on_bad_image="skip")
    splits = load(path, image_size=8)
    assert splits.train.images.shape == (12, 3, 8, 8)
    assert np.array_equal(splits.train.images[4].numpy(), pixels(4))


def test_parts_of_different_size_name_the_option(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set")
    write_parquet(tmp_path / "set/test.parquet", [encoded(picture(i, size=9)) for i in range(3)], [0, 1, 2])
    with pytest.raises(DataError, match=r"8 pixels a side, test images 9; give --image-size"):
        load(tmp_path / "set")


def test_images_that_are_not_square_name_the_option(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set")
    wide = [encoded(picture(i, size=9).crop((0, 0, 9, 6))) for i in range(6)]
    write_parquet(tmp_path / "set/train.parquet", wide, [0, 1, 2] * 2)
    with pytest.raises(DataError, match=r"row 0: the image is 9 x 6 pixels, not square; give --image-size"):
        load(tmp_path / "set")
    assert load(tmp_path / "set", image_size=6).train.images.shape == (6, 3, 6, 6)


def test_a_set_of_images_too_large_to_keep_their_size_names_the_option(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set")
    write_parquet(tmp_path / "set/train.parquet", [encoded(Image.new("1", (4097, 4097)))] * 3, [0, 1, 2])
    for options in ({}, {"on_bad_image": "skip"}):
        with pytest.raises(DataError, match=r"row 0: the image is 4097 x 4097 pixels, .*give --image-size N"):
            load(tmp_path / "set", **options)
    assert load(tmp_path / "set", image_size=8).train.image_size == 8


def test_a_set_of_one_class(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set")
    write_parquet(tmp_path / "set/train.parquet", GOOD, [1] * 12)
    with pytest.raises(DataError, match="one class only"):
        load(tmp_path / "set")


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"image_size": 0}, "--image-size"),
        ({"validation_fraction": 1.0}, "--validation-fraction"),
        ({"validation_fraction": -0.1}, "--validation-fraction"),
        ({"train_limit": 0}, "--train-limit"),
        ({"split_seed": -1}, "--split-seed"),
        ({"loader_processes": -1}, "--loader-processes"),
    ],
)
def test_options_out_of_range(options: dict, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        DataConfig(**options)
