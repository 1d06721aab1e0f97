import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metamixer_ray.data import Batch, BatchOrder, DataConfig, Splits, eval_batches, load_splits, train_batches
from metamixer_ray.data.streaming.streamed_set import stand_in
from metamixer_ray.errors import DataError
from tests.data.drawing import drawn_set, encoded, picture, pixels, write_parquet

Load = Callable[..., Splits]
GOOD = [encoded(picture(i)) for i in range(24)]
LABELS = [i % 3 for i in range(24)]


def folder_with(path: Path, bad: dict[int, Any], labels: list[Any] = LABELS, part: str = "train") -> Path:
    """A drawn set in which some images of one part are replaced."""
    images = [bad.get(i, good) for i, good in enumerate(GOOD)]
    drawn_set(path, train=24)
    write_parquet(path / f"{part}.parquet", images, labels)
    return path


def config_of(folder: Path, **options: Any) -> DataConfig:
    defaults = {"streaming": "yes", "image_size": 8, "stream_window": 12, "augment": "none"}
    return DataConfig(data=str(folder), **defaults | options)


def train(config: DataConfig, quadruples: bool = True, replica: int = 0, replicas: int = 1) -> list[Batch]:
    images = load_splits(config).train
    order = BatchOrder(
        images.labels, batch_size=8, replicas=replicas, quadruples=quadruples, seed=1, layout=images.layout
    )
    return list(train_batches(images, order, config, seed=1, epoch=0, replica=replica))


@pytest.fixture
def unsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and std of a sample that happens to hold no bad image, as in a large set."""
    from metamixer_ray.data.streaming import index

    monkeypatch.setattr(index, "_sample_statistics", lambda *_, **__: {"mean": [0.5] * 3, "std": [0.2] * 3})


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(
    ("bad", "problem"), [(b"not an image", "cannot be decoded"), (None, "no image bytes"), (GOOD[0][:-40], "cannot be")]
)
def test_a_bad_image_is_named_with_its_file_and_row(tmp_path: Path, processes: int, bad: Any, problem: str) -> None:
    config = config_of(folder_with(tmp_path / "set", {17: bad}), loader_processes=processes)
    with pytest.raises(DataError, match=rf"^\S+train\.parquet, row 17: .*{problem}.*--on-bad-image skip"):
        train(config)


def test_a_bad_image_in_the_sample_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.parquet, row 17: .*--on-bad-image skip"):
        load_splits(config_of(folder_with(tmp_path / "set", {17: b"x"})))


@pytest.mark.parametrize("processes", [0, 2])
def test_another_of_its_class_stands_in_for_a_bad_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, processes: int
) -> None:
    good = train(config_of(folder_with(tmp_path / "good", {})))
    config = config_of(folder_with(tmp_path / "set", {17: b"x"}), on_bad_image="skip", loader_processes=processes)
    with caplog.at_level(logging.WARNING):
        mended = train(config)
    assert [len(batch.labels) for batch in mended] == [len(batch.labels) for batch in good]
    different = 0
    for before, after in zip(good, mended, strict=True):
        assert torch.equal(after.labels, before.labels), "also where another stands in"
        for row in range(len(after.labels)):
            number = int(after.indices[row])
            assert number != 17
            assert np.array_equal(after.images[row].numpy(), pixels(number))
            different += number != int(before.indices[row])
    assert different == 1
    (replaced,) = [text for batch in mended for text in batch.replaced]
    assert "train.parquet, row 17: the image cannot be decoded" in replaced
    assert any(replaced in text for text in caplog.messages)
    assert "1 bad images were skipped in this pass" in caplog.messages


def test_replicas_and_processes_agree_on_who_stands_in(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "set", dict.fromkeys((2, 9, 17), b"x"))
    config = config_of(folder, on_bad_image="skip", augment="auto")
    again = config_of(folder, on_bad_image="skip", augment="auto", loader_processes=2)
    for whole, other in zip(train(config), train(again), strict=True):
        assert torch.equal(whole.indices, other.indices)
        assert torch.equal(whole.images, other.images)


def test_who_stands_in() -> None:
    labels = np.array([0, 0, 1, 1, 0, 0, 2, 2])
    assert stand_in(0, labels, {0: ""}) == 1
    assert stand_in(1, labels, {1: ""}) == 4
    assert stand_in(5, labels, {5: "", 0: ""}) == 1, "from the end on to the beginning"
    assert stand_in(3, labels, {2: "", 3: ""}) == 4, "no other of its class: the next, with its label"


def test_a_stand_in_of_another_class_brings_its_label(tmp_path: Path) -> None:
    labels = [0] * 22 + [1] * 2
    folder = folder_with(tmp_path / "set", {22: b"x", 23: b"x"}, labels)
    batches = train(config_of(folder, on_bad_image="skip", stream_window=24), quadruples=False)
    for batch in batches:
        assert batch.labels.tolist() == [labels[i] for i in batch.indices.tolist()]
    assert sum(len(batch.replaced) for batch in batches) == 2


def test_evaluation_leaves_bad_images_out(tmp_path: Path, load: Load) -> None:
    folder = folder_with(tmp_path / "set", {3: b"x", 4: None}, part="test")
    images = load_splits(config_of(folder, on_bad_image="skip")).test
    seen = [i for batch in eval_batches(images, batch_size=5, replica=0, replicas=1) for i in batch.indices.tolist()]
    assert seen == [i for i in range(24) if i not in (3, 4)]
    assert images.take(torch.tensor([3, 5])).sum(dim=(1, 2, 3)).tolist()[0] == 0
    with pytest.raises(DataError, match=r"test\.parquet, row 3: .*--on-bad-image skip"):
        list(eval_batches(load_splits(config_of(folder)).test, batch_size=5, replica=0, replicas=1))
    only_bad = images.select(torch.tensor([3, 4]))
    with pytest.raises(DataError, match="none of the 2 images of a batch can be used"):
        list(eval_batches(only_bad, batch_size=5, replica=0, replicas=1))


@pytest.mark.parametrize(("label", "problem"), [(None, "is null"), (-1, "is -1"), (7, "is 7, but the classes are 0")])
def test_a_row_without_a_valid_label(
    tmp_path: Path, label: Any, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_with(tmp_path / "set", {}, [*LABELS[:9], label, *LABELS[10:]])
    with pytest.raises(DataError, match=rf"train\.parquet, row 9: the label {problem}.*--on-bad-image skip"):
        load_splits(config_of(folder))
    splits = load_splits(config_of(folder, on_bad_image="skip"))
    assert splits.skipped == 1
    assert splits.train.labels.tolist() == LABELS[:9] + LABELS[10:]
    assert np.array_equal(splits.train.take(torch.tensor([9]))[0].numpy(), pixels(10))
    assert any("row 9" in text for text in caplog.messages)


@pytest.mark.parametrize("label", [2**31, 2**40, 2**62])
def test_a_label_beyond_all_class_numbers_is_a_bad_row_as_of_decoded_sets(tmp_path: Path, label: int) -> None:
    labels = [*LABELS[:9], label, *LABELS[10:]]
    folder = folder_with(tmp_path / "set", {}, labels)
    for part in ("train", "test"):
        write_parquet(folder / f"{part}.parquet", GOOD, labels if part == "train" else LABELS, names=None)
    for streaming in ("yes", "no"):
        with pytest.raises(
            DataError, match=rf"train\.parquet, row 9: the label is {label}, which isn't a class number"
        ):
            load_splits(config_of(folder, streaming=streaming))
        splits = load_splits(config_of(folder, streaming=streaming, on_bad_image="skip"))
        assert splits.skipped == 1
        assert splits.train.labels.tolist() == LABELS[:9] + LABELS[10:]


def test_the_usual_faults_of_files_and_labels(tmp_path: Path) -> None:
    drawn_set(tmp_path / "empty")
    write_parquet(tmp_path / "empty/test.parquet", [], [])
    with pytest.raises(DataError, match=r"test\.parquet: the test part holds no images"):
        load_splits(config_of(tmp_path / "empty"))
    with pytest.raises(DataError, match="one class only"):
        load_splits(config_of(folder_with(tmp_path / "one", {}, [1] * 24)))
    folder_with(tmp_path / "torn", {})
    path = tmp_path / "torn/train.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"train\.parquet: not a whole Parquet file"):
        load_splits(config_of(tmp_path / "torn"))
    folder_with(tmp_path / "unlabelled", {}, [-1] * 24, part="test")
    with pytest.raises(DataError, match=r"row 0: the label is -1.*give --test-data with labels"):
        load_splits(config_of(tmp_path / "unlabelled"))
    with pytest.raises(DataError, match="none of the 24 test images has a label"):
        load_splits(config_of(tmp_path / "unlabelled", on_bad_image="skip"))
