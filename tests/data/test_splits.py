from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from metamixer_ray.data import DecodedSet, ImageSet, Splits
from metamixer_ray.errors import ConfigError
from tests.data.drawing import encoded, picture, write_parquet

Load = Callable[..., Splits]


def rows_of(part: ImageSet, whole: ImageSet) -> list[int]:
    """Positions in ``whole`` of the images of ``part``; digits has no two alike images."""
    where = {image.numpy().tobytes(): row for row, image in enumerate(whole.images)}
    return [where[image.numpy().tobytes()] for image in part.images]


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """300, 30 and 3 images of three classes."""
    labels = np.random.default_rng(0).permutation([0] * 300 + [1] * 30 + [2] * 3).tolist()
    write_parquet(tmp_path / "set/train.parquet", [encoded(picture(i, 4)) for i in range(333)], labels, row_group=100)
    write_parquet(tmp_path / "set/test.parquet", [encoded(picture(i, 4)) for i in range(3)], [0, 1, 2])
    return tmp_path / "set"


def test_statistics_are_exact(load: Load) -> None:
    splits = load("digits", image_size=8)
    values = splits.train.images.numpy().astype(np.float64) / 255
    assert splits.mean == pytest.approx(values.mean((0, 2, 3)), abs=1e-14)
    assert splits.std == pytest.approx(values.std((0, 2, 3)), abs=1e-14)
    assert load("digits", image_size=8, train_limit=100).mean == splits.mean


def test_a_channel_that_never_varies_has_a_harmless_deviation(tmp_path: Path, load: Load) -> None:
    from PIL import Image

    images = [encoded(Image.new("RGB", (4, 4), (i, 7, 0))) for i in range(6)]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", images, [0, 1, 2] * 2)
    splits = load(tmp_path)
    assert splits.std[1:] == (1.0, 1.0)
    assert splits.mean[1] == pytest.approx(7 / 255)


def test_validation_is_cut_evenly_and_apart(load: Load) -> None:
    whole = load("digits")
    cut = load("digits", validation_fraction=0.2)
    assert cut.validation is not None
    assert len(cut.validation) == round(0.2 * len(whole.train))
    kept, held_out = rows_of(cut.train, whole.train), rows_of(cut.validation, whole.train)
    assert sorted(kept + held_out) == list(range(len(whole.train)))
    assert kept == sorted(kept)
    assert np.ptp(np.bincount(cut.validation.labels)) <= 2
    assert torch.equal(cut.test.images, whole.test.images)
    assert torch.equal(cut.train.images, whole.train.images[kept])
    assert torch.equal(cut.train.labels, whole.train.labels[kept])


def test_selections_depend_on_the_split_seed_alone(load: Load) -> None:
    whole = load("digits").train

    def rows(split_seed: int) -> tuple[list[int], list[int]]:
        splits = load("digits", validation_fraction=0.1, train_limit=50, split_seed=split_seed)
        assert splits.validation is not None
        return rows_of(splits.train, whole), rows_of(splits.validation, whole)

    assert rows(0) == rows(0)
    assert rows(0)[0] != rows(1)[0]
    assert rows(0)[1] != rows(1)[1]


def test_train_limit_is_exact_even_and_nested(load: Load) -> None:
    whole = load("digits").train
    chosen: set[int] = set()
    for limit in (20, 53, 200, 1438):
        splits = load("digits", train_limit=limit)
        counts = np.bincount(splits.train.labels)
        assert counts.sum() == len(splits.train) == limit
        assert np.abs(counts - limit * np.bincount(whole.labels) / len(whole)).max() < 1
        rows = set(rows_of(splits.train, whole))
        assert chosen <= rows
        chosen = rows


def test_validation_does_not_depend_on_the_limit(load: Load) -> None:
    whole = load("digits").train
    splits = [load("digits", validation_fraction=0.25, train_limit=limit) for limit in (None, 30, 500)]
    held_out = [rows_of(s.validation, whole) for s in splits if s.validation is not None]
    assert held_out[0] == held_out[1] == held_out[2]
    for part in splits:
        assert not set(rows_of(part.train, whole)) & set(held_out[0])


def test_uneven_classes_keep_their_shares_and_at_least_two(uneven: Path, load: Load) -> None:
    assert np.bincount(load(uneven, train_limit=111).train.labels).tolist() == [99, 10, 2]
    assert np.bincount(load(uneven, train_limit=6).train.labels).tolist() == [2, 2, 2]
    assert np.bincount(load(uneven, train_limit=333).train.labels).tolist() == [300, 30, 3]
    cut = load(uneven, validation_fraction=0.9)
    assert cut.validation is not None
    assert np.bincount(cut.train.labels).min() >= 1
    assert len(cut.validation) == 300


def test_limits_that_cannot_be(uneven: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match=r"--train-limit 5: give between 6 \(two for each of the 3 classes\) and 333"):
        load(uneven, train_limit=5)
    with pytest.raises(ConfigError, match=r"--train-limit 334: .* and 333 \(all there are\)"):
        load(uneven, train_limit=334)
    with pytest.raises(ConfigError, match=r"and 300 \(all there are after 33 went to the validation split\)"):
        load(uneven, train_limit=301, validation_fraction=0.1)
    with pytest.raises(ConfigError, match=r"--validation-fraction 0.999: 333 of 333"):
        load(uneven, validation_fraction=0.999)
    with pytest.raises(ConfigError, match=r"--validation-fraction 0.001: 0 of 333"):
        load(uneven, validation_fraction=0.001)


def test_without_a_selection_nothing_is_copied(load: Load) -> None:
    splits = load("digits", image_size=32)
    assert splits.train.images.data_ptr() == splits.train.images.data_ptr()
    cut = load("digits", image_size=32, validation_fraction=0.1)
    assert cut.validation is not None
    assert cut.train.take(torch.tensor([0])).shape == (1, 3, 32, 32)
    assert cut.train._images.data_ptr() == cut.validation._images.data_ptr()


def test_an_image_set_checks_what_it_is_given() -> None:
    images, labels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    part = DecodedSet(images, labels).select(torch.tensor([3, 1])).select(torch.tensor([1]))
    assert len(part) == 1
    assert part.image_size == 2
    with pytest.raises(ValueError, match="uint8"):
        DecodedSet(images.float(), labels)
    with pytest.raises(ValueError, match=r"int64 \[4\]"):
        DecodedSet(images, labels[:3])
    with pytest.raises(ValueError, match=r"int64 \[1\]"):
        DecodedSet(images, labels, torch.tensor([2]))
