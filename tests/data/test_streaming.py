"""Streamed sets against decoded ones, and against themselves under other circumstances."""

import gc
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metamixer_ray.data import (
    Batch,
    BatchOrder,
    DataConfig,
    Splits,
    decoding,
    eval_batches,
    load_splits,
    train_batches,
)
from metamixer_ray.data.streaming import StreamedSet
from metamixer_ray.errors import ConfigError, DataError
from tests.data.drawing import drawn_set, encoded, picture, write_parquet

Load = Callable[..., Splits]


def jpeg(number: int, width: int = 40, height: int = 30) -> bytes:
    """A smooth random image."""
    return encoded(picture(number, 5).resize((width, height), Image.Resampling.BICUBIC), "JPEG")


def jpeg_set(folder: Path, train: int = 90, test: int = 21, classes: int = 5, **options: Any) -> Path:
    """Two training files and a test file of JPEGs; image i has label i % classes."""
    names = [f"c{c}" for c in range(classes)]
    cut = train // 3
    for name, numbers in (("train-0", range(cut)), ("train-1", range(cut, train)), ("test", range(1000, 1000 + test))):
        images = [jpeg(i) for i in numbers]
        write_parquet(folder / f"{name}.parquet", images, [i % 1000 % classes for i in numbers], names=names, **options)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jpeg_set(tmp_path_factory.mktemp("jpegs") / "set")


def config_of(folder: Path | str, **options: Any) -> DataConfig:
    return DataConfig(data=str(folder), **{"streaming": "yes", "image_size": 16, "stream_window": 24} | options)


def order_of(splits: Splits, replicas: int = 1, quadruples: bool = True, seed: int = 3) -> BatchOrder:
    labels, layout = splits.train.labels, splits.train.layout
    return BatchOrder(labels, batch_size=16, replicas=replicas, quadruples=quadruples, seed=seed, layout=layout)


def train(config: DataConfig, *, replica: int = 0, replicas: int = 1, first: int = 0, epoch: int = 2) -> list[Batch]:
    splits = load_splits(config)
    order = order_of(splits, replicas)
    iterator = train_batches(splits.train, order, config, seed=3, epoch=epoch, replica=replica, first_step=first)
    return list(iterator)


def same(a: Batch, b: Batch) -> bool:
    pairs = ((a.images, b.images), (a.labels, b.labels), (a.indices, b.indices))
    return a.step == b.step and a.replaced == b.replaced and all(torch.equal(x, y) for x, y in pairs)


def encode_numbers(folder: Path, labels: list[int], row_group: int) -> None:
    """Images whose single colour tells which they are, so that a test can see what a batch holds."""
    images = [encoded(Image.new("RGB", (4, 4), (i // 256, i % 256, labels[i]))) for i in range(len(labels))]
    write_parquet(folder / "train.parquet", images, labels, names=None, row_group=row_group)
    write_parquet(folder / "test.parquet", images[:9], labels[:9], names=None, row_group=row_group)


@pytest.mark.parametrize("augment", ["auto", "none", "crop-flip", "trivial"])
def test_the_number_of_processes_changes_nothing(folder: Path, augment: str) -> None:
    reference = train(config_of(folder, augment=augment))
    assert [batch.step for batch in reference] == list(range(6))
    for processes in (1, 2):
        others = train(config_of(folder, augment=augment, loader_processes=processes))
        assert all(same(a, b) for a, b in zip(reference, others, strict=True))


@pytest.mark.parametrize("processes", [0, 2])
def test_resuming_within_an_epoch_continues_it(folder: Path, processes: int) -> None:
    whole = train(config_of(folder))
    for first in (1, 3, 5, 6):
        rest = train(config_of(folder, loader_processes=processes), first=first)
        assert all(same(a, b) for a, b in zip(whole[first:], rest, strict=True))


@pytest.mark.parametrize("augment", ["auto", "crop-flip", "rand"])
def test_replicas_share_what_one_would_see(tmp_path: Path, augment: str) -> None:
    folder = jpeg_set(tmp_path / "set", train=96, classes=4)
    config = config_of(folder, augment=augment)
    for whole, left, right in zip(
        train(config), train(config, replicas=2), train(config, replicas=2, replica=1), strict=True
    ):
        assert torch.equal(whole.images, torch.cat([left.images, right.images]))
        assert torch.equal(whole.indices, torch.cat([left.indices, right.indices]))


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
def test_pixels_are_those_of_a_decoded_set_where_nothing_is_resized_at_random(folder: Path, augment: str) -> None:
    config = config_of(folder, augment=augment)
    streamed, decoded = load_splits(config), load_splits(config_of(folder, augment=augment, streaming="no"))
    for batch in train_batches(streamed.train, order_of(streamed), config, seed=3, epoch=0, replica=0):
        from metamixer_ray.data import augmentation

        images = decoded.train.take(batch.indices)
        draws = augmentation.draw(augment, size=16, rows=len(images), seed=3, epoch=0, step=batch.step)  # type: ignore[arg-type]
        assert torch.equal(batch.images, augmentation.apply(images, draws, augment))  # type: ignore[arg-type]
    pairs = zip(
        eval_batches(streamed.test, batch_size=4, replica=0, replicas=1),
        eval_batches(decoded.test, batch_size=4, replica=0, replicas=1),
        strict=True,
    )
    assert all(same(a, b) for a, b in pairs)
    assert streamed.classes == decoded.classes
    assert torch.equal(streamed.test.take(torch.tensor([5, 0, 5])), decoded.test.take(torch.tensor([5, 0, 5])))


def test_statistics_are_the_decoded_sets_where_the_sample_is_everything(folder: Path) -> None:
    streamed, decoded = load_splits(config_of(folder)), load_splits(config_of(folder, streaming="no"))
    assert streamed.mean == decoded.mean
    assert streamed.std == decoded.std


def test_statistics_are_the_same_of_images_so_large_that_they_come_one_by_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = load_splits(config_of(folder))
    monkeypatch.setattr(decoding, "PIECE_BYTES", 1)
    alone = load_splits(config_of(folder, cache_dir=str(tmp_path / "other")))
    assert alone.mean == together.mean
    assert alone.std == together.std


def test_every_image_comes_once_and_is_the_one_that_its_index_names(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 50)).tolist()
    encode_numbers(tmp_path / "set", labels, row_group=11)
    config = config_of(tmp_path / "set", augment="none", image_size=4, stream_window=60)
    batches = train(config)
    for batch in batches:
        colour = batch.images[:, :, 0, 0].long()
        assert torch.equal(colour[:, 0] * 256 + colour[:, 1], batch.indices)
        assert torch.equal(colour[:, 2], batch.labels)
        quadruples = batch.labels.view(-1, 4)
        assert torch.equal(quadruples[:, 0], quadruples[:, 1])
        assert torch.equal(quadruples[:, 2], quadruples[:, 3])
        assert (quadruples[:, 0] != quadruples[:, 2]).all()
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(300))


def test_validation_and_limit_are_those_of_a_decoded_set(folder: Path) -> None:
    options: dict[str, Any] = {"validation_fraction": 0.2, "train_limit": 40, "augment": "none"}
    streamed = load_splits(config_of(folder, **options))
    decoded = load_splits(config_of(folder, streaming="no", **options))
    assert streamed.validation is not None
    assert decoded.validation is not None
    for ours, theirs in ((streamed.train, decoded.train), (streamed.validation, decoded.validation)):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.take(torch.arange(len(ours))), theirs.take(torch.arange(len(theirs))))
    seen = np.concatenate([batch.indices.numpy() for batch in train(config_of(folder, **options))])
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_evaluation_sees_every_image_once_in_fixed_order(folder: Path, processes: int, replicas: int) -> None:
    images = load_splits(config_of(folder, loader_processes=processes)).test
    shares = [list(eval_batches(images, batch_size=4, replica=r, replicas=replicas)) for r in range(replicas)]
    for replica, share in enumerate(shares):
        rows = [row for batch in share for row in batch.indices.tolist()]
        assert rows == list(range(replica, 21, replicas))
        for batch in share:
            assert torch.equal(batch.images, images.take(batch.indices))
            assert torch.equal(batch.labels, images.labels[batch.indices])
    assert len({len(share) for share in shares}) == 1


def test_a_uri_is_read_through_its_file_system(folder: Path) -> None:
    local, remote = train(config_of(folder)), train(config_of(f"file://{folder}"))
    assert all(same(a, b) for a, b in zip(local, remote, strict=True))
    assert load_splits(config_of(folder)).fingerprint == load_splits(config_of(f"file://{folder}")).fingerprint


def test_memory_holds_a_window_and_a_half(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).integers(0, 10, 2000).tolist()
    encode_numbers(tmp_path / "set", labels, row_group=20)
    splits = load_splits(config_of(tmp_path / "set", image_size=4, stream_window=200))
    assert isinstance(splits.train, StreamedSet)
    parts = order_of(splits).epoch(0)
    feed = splits.train.feed(parts, ahead=splits.train.layout.ahead)
    held = [feed.held for _ in feed]
    assert feed.most_held <= 300
    assert max(held) > 200, "the next window is read before it is needed"
    assert feed.held == 0
    careful = splits.train.feed(parts, ahead=0)
    assert len(list(careful)) == len(parts)
    # A window and one row group, one more read in advance, a batch of the window before, and the images that wait: one
    # of a class and a couple.
    assert careful.most_held <= 200 + 20 + 20 + 16 + 10 + 2


def test_a_resumed_epoch_reads_only_what_it_needs(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).integers(0, 10, 2000).tolist()
    encode_numbers(tmp_path / "set", labels, row_group=20)
    splits = load_splits(config_of(tmp_path / "set", image_size=4, stream_window=200))
    assert isinstance(splits.train, StreamedSet)
    parts = order_of(splits).epoch(0)
    read: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        read.append(arguments[1])
        return original(*arguments, **options)

    original = splits.train._row_groups.read
    splits.train._row_groups.read = counted  # type: ignore[method-assign]
    last = parts[-(len(parts) // 10) :]
    list(splits.train.feed(last, ahead=300))
    wanted = {int(group) for part in last for group in splits.train.layout.groups[part]}
    assert sorted(read) == sorted(wanted)
    assert len(wanted) <= 25, "a tenth of the epoch is one window of 10 row groups, and what waited for it"


def test_only_large_parquet_is_streamed(folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from metamixer_ray.data.streaming import choice

    def streamed(**options: Any) -> bool:
        return isinstance(load(folder, **options).train, StreamedSet)

    assert not streamed(image_size=16)
    monkeypatch.setattr(choice, "STREAM_ABOVE_GB", (3 * 111 * 16 * 16 - 1) / 1e9)
    assert streamed(image_size=16)
    assert not streamed(image_size=15)
    assert not streamed(image_size=16, streaming="no")
    with pytest.raises(ConfigError, match=r"111 images of about 40 x 30 pixels .*--image-size N"):
        load(folder)


def test_what_cannot_be_streamed(folder: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match=r"--streaming yes: only Parquet .*digits"):
        load("digits", streaming="yes", image_size=16)
    with pytest.raises(ConfigError, match=r"--streaming yes: .*--image-size N"):
        load(folder, streaming="yes")
    with pytest.raises(ConfigError, match="--stream-window 0"):
        DataConfig(stream_window=0)


def test_row_groups_beyond_memory(folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from metamixer_ray.data.streaming import choice

    class Memory:
        total = 20_000

    monkeypatch.setattr(choice.psutil, "virtual_memory", Memory)
    with pytest.raises(DataError, match=r"row groups of up to 7 images .*--stream-window 24.*smaller row groups"):
        load(folder, streaming="yes", image_size=16, stream_window=24)


def test_labels_and_layout_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metamixer_ray.data.streaming import index

    first = load_splits(config_of(folder))
    kept = list((tmp_path / "cache").glob("set-*/*.npz"))
    assert sorted(path.name for path in kept) == ["test.npz", "train.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(index, "_make", None)
        assert load_splits(config_of(folder)).fingerprint == first.fingerprint
    for path in kept:
        path.write_bytes(path.read_bytes()[:-30])
    again = load_splits(config_of(folder))
    assert again.fingerprint == first.fingerprint
    assert again.mean == first.mean


def test_another_file_is_another_fingerprint(tmp_path: Path) -> None:
    folder = drawn_set(tmp_path / "set", train=60)
    prints = [load_splits(config_of(folder)).fingerprint]
    prints.append(load_splits(config_of(folder, streaming="no")).fingerprint)
    prints.append(load_splits(config_of(folder, train_limit=30)).fingerprint)
    images, labels = [encoded(picture(i)) for i in range(60)], [i % 3 for i in range(60)]
    for changed, row_group in (([*labels[1:], 0], 7), (labels, 8)):
        write_parquet(folder / "train.parquet", images, changed, row_group=row_group)
        prints.append(load_splits(config_of(folder)).fingerprint)
    (folder / "train.parquet").rename(folder / "train-0.parquet")
    prints.append(load_splits(config_of(folder)).fingerprint)
    assert len(set(prints)) == len(prints)


def test_a_file_replaced_during_training_is_noticed(tmp_path: Path) -> None:
    folder = jpeg_set(tmp_path / "set")
    config = config_of(folder)
    splits = load_splits(config)
    jpeg_set(folder, row_group=6)
    with pytest.raises(DataError, match=r"train-\d\.parquet: the file has changed since training began"):
        list(train_batches(splits.train, order_of(splits), config, seed=3, epoch=0, replica=0))
    assert [thread for thread in threading.enumerate() if thread.name.startswith("row-groups")] == []


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("consumed", [1, 6])
def test_nothing_outlives_its_iterator(folder: Path, processes: int, consumed: int) -> None:
    before = set(multiprocessing.active_children())
    config = config_of(folder, loader_processes=processes)
    splits = load_splits(config)
    iterator = train_batches(splits.train, order_of(splits), config, seed=3, epoch=0, replica=0)
    for _ in range(consumed):
        next(iterator)
    del iterator
    gc.collect()
    assert set(multiprocessing.active_children()) == before
    assert [t.name for t in threading.enumerate() if t.name.startswith(("row-groups", "batches"))] == []


def test_a_streamed_set_can_be_sent(folder: Path) -> None:
    images = load_splits(config_of(folder, validation_fraction=0.2)).train
    expected = images.take(torch.tensor([3, 1]))
    copy = pickle.loads(pickle.dumps(images))
    assert torch.equal(copy.take(torch.tensor([3, 1])), expected)
    assert torch.equal(copy.labels, images.labels)


def test_the_description_says_what_it_costs(folder: Path) -> None:
    description = load_splits(config_of(folder)).description
    assert description.startswith("set: 90 training, 21 test images of 16 x 16 pixels, 5 classes, streamed with up to ")
