"""Data files that are damaged, replaced, cut off or deleted, before and while they are read: one error that names the
file, never other images."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow import fs

from metamixer_ray import train
from metamixer_ray.capacity import WorkerResources
from metamixer_ray.config import TrainConfig, from_settings, plain_settings
from metamixer_ray.data import Batch, BatchOrder, DataConfig, Splits, load_splits, train_batches
from metamixer_ray.data.sources import open_source
from metamixer_ray.data.sources.locations import RemoteFile
from metamixer_ray.errors import DataError
from metamixer_ray.folder import RunFolder
from metamixer_ray.runs import RUN, check_images, create_run, data_facts, open_run, write_run
from metamixer_ray.sweeps.trial import PeersTrial, SweepPlan
from tests.data.drawing import encoded, picture, write_parquet
from tests.e2e.object_store import folder_of, object_store

ROWS = 64


def bitmaps(path: Path, first: int = 0) -> Path:
    """A file of images that are all of one length, so that other images make a file of the same size."""
    images = [encoded(picture(first + i), "BMP") for i in range(ROWS)]
    write_parquet(path, images, [i % 3 for i in range(ROWS)])
    pq.write_table(pq.read_table(path), path, row_group_size=4, compression="none")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bitmaps(tmp_path / "set/train.parquet")
    bitmaps(tmp_path / "set/test.parquet", 1000)
    return tmp_path / "set"


def config_of(data: Path | str, streaming: str, cache: Path) -> DataConfig:
    options = {"image_size": 8, "stream_window": 8, "augment": "none", "cache_dir": str(cache)}
    return DataConfig(data=str(data), streaming=streaming, **options)  # type: ignore[arg-type]


def batches(splits: Splits, config: DataConfig) -> Iterator[Batch]:
    labels, layout = splits.train.labels, splits.train.layout
    order = BatchOrder(labels, batch_size=4, replicas=1, quadruples=False, seed=1, layout=layout)
    return train_batches(splits.train, order, config, seed=1, epoch=0, replica=0)


def replace_by_equals(path: Path) -> None:
    size = path.stat().st_size
    os.replace(bitmaps(path.with_name("other.tmp"), 5000), path)
    assert path.stat().st_size == size, "nothing but time and pixels tells them apart"


def overwrite(path: Path) -> None:
    other = bitmaps(path.with_name("other.tmp"), 5000)
    path.write_bytes(other.read_bytes())
    other.unlink()


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


CHANGES = (replace_by_equals, overwrite, touch, cut, os.remove)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("consumed", [0, 1])
def test_a_file_that_changes_while_it_is_streamed(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], consumed: int
) -> None:
    config = config_of(folder, "yes", tmp_path / "cache")
    splits = load_splits(config)
    whole = list(batches(splits, config))
    coming = batches(splits, config)
    seen = [next(coming) for _ in range(consumed)]
    change(folder / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: the file has changed since training began.*start anew"):
        seen += coming
    for before, after in zip(whole, seen, strict=False):
        assert torch.equal(before.images, after.images), "what came before the error is what was indexed"


@pytest.mark.parametrize("change", CHANGES)
def test_a_decoded_set_needs_its_files_no_more(folder: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    config = config_of(folder, "no", tmp_path / "cache")
    splits = load_splits(config)
    whole, coming = list(batches(splits, config)), batches(splits, config)
    seen = [next(coming)]
    change(folder / "train.parquet")
    shutil.rmtree(tmp_path / "cache")
    seen += coming
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, seen, strict=True))


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_decoded(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from metamixer_ray.data.sources import parquet

    monkeypatch.setattr(parquet, "CHUNK_ROWS", 16)
    chunks = open_source(config_of(folder, "no", tmp_path / "cache"), tmp_path).open("train").chunks
    next(chunks)
    change(folder / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: the file has changed since training began"):
        list(chunks)


def test_an_object_that_is_replaced_while_it_is_streamed(folder: Path, tmp_path: Path) -> None:
    with object_store() as port:
        uri = folder_of(port)
        store, root = fs.FileSystem.from_uri(uri)
        store.create_dir(root, recursive=True)

        def put(name: str, content: bytes) -> None:
            with store.open_output_stream(f"{root}/{name}") as stream:
                stream.write(content)

        for path in folder.glob("*.parquet"):
            put(path.name, path.read_bytes())
        config = config_of(uri, "yes", tmp_path / "cache")
        splits = load_splits(config)
        local = config_of(folder, "yes", tmp_path / "cache")
        for there, here in zip(batches(splits, config), batches(load_splits(local), local), strict=True):
            assert torch.equal(there.images, here.images), "a store's two ways to tell a time are taken for one"
        put("train.parquet", (folder / "test.parquet").read_bytes() + b" ")
        with pytest.raises(DataError, match=r"runs/train\.parquet: the file has changed since training began"):
            list(batches(splits, config))
        store.delete_file(f"{root}/train.parquet")
        with pytest.raises(DataError, match=r"runs/train\.parquet: the file has changed .* is gone"):
            list(batches(splits, config))


@pytest.mark.parametrize(
    ("listed", "asked", "same"),
    [(1.5, 1.0, True), (1.0, 1.5, True), (1.5, 1.6, False), (1.0, 2.0, False), (None, None, True), (None, 1.0, False)],
)
def test_times_of_whole_seconds_are_compared_by_seconds(listed: float | None, asked: float | None, same: bool) -> None:
    class Store:
        """A file system that tells a time when it lists, and maybe another when it is asked for a file alone."""

        def get_file_info(self, path: str) -> fs.FileInfo:
            return fs.FileInfo(path, fs.FileType.File, size=7, mtime=asked)

    file = RemoteFile(Store(), "a", "a", "a", 7, listed if listed is None else int(listed * 10**9))
    if same:
        file.check_unchanged()
    else:
        with pytest.raises(DataError, match="a: the file has changed"):
            file.check_unchanged()


@pytest.mark.parametrize("streaming", ["no", "yes"])
@pytest.mark.parametrize("column", ["image.bytes", "label"])
def test_a_flipped_bit_in_a_page_is_noticed_by_its_checksum(
    folder: Path, tmp_path: Path, streaming: str, column: str
) -> None:
    path = folder / "train.parquet"
    # Bitmaps have no checksums of their own, and a flipped bit in a label is another label.
    pq.write_table(pq.read_table(path), path, row_group_size=4, compression="none", write_page_checksum=True)
    group = pq.read_metadata(path).row_group(1)
    (found,) = (c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    end = (found.dictionary_page_offset or found.data_page_offset) + found.total_compressed_size
    content = bytearray(path.read_bytes())
    content[end - 1] ^= 1
    path.write_bytes(content)
    config = config_of(folder, streaming, tmp_path / "cache")
    with pytest.raises(DataError, match=r"train\.parquet: .*(CRC|checksum).*again"):
        list(batches(load_splits(config), config))


@pytest.mark.parametrize("streaming", ["no", "yes"])
def test_rows_that_come_twice_are_seen_twice(tmp_path: Path, streaming: str) -> None:
    images = [encoded(picture(i), "BMP") for i in [*range(9), 0, 0, 0]]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"set/{part}.parquet", images, [i % 3 for i in range(9)] + [0] * 3)
    config = config_of(tmp_path / "set", streaming, tmp_path / "cache")
    splits = load_splits(config)
    seen = torch.cat([batch.images for batch in batches(splits, config)])
    first = torch.from_numpy(np.asarray(picture(0)).transpose(2, 0, 1).copy())
    assert len(seen) == 12
    assert int((seen == first).flatten(1).all(dim=1).sum()) == 4, "an epoch shows a row as often as it is there"


SCHEMAS = {
    "a path is no image": ({"image": pa.array(["a.png", "b.png"]), "label": pa.array([0, 1])}, "no image column"),
    "nor is one in a struct": (
        {"image": pa.array([{"path": "a.png"}] * 2), "label": pa.array([0, 1])},
        "no image column",
    ),
    "a label that is no integer": (
        {"image": pa.array([{"bytes": b"x"}] * 2), "label": pa.array([0.0, float("nan")])},
        r"no label column .*label \(double\)",
    ),
    "a list of labels": (
        {"image": pa.array([{"bytes": b"x"}] * 2), "label": pa.array([[0], [1]])},
        "no label column",
    ),
    "no columns": ({"nothing": pa.nulls(2)}, "no image column"),
}


@pytest.mark.parametrize("streaming", ["no", "yes"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_wrong_schema_is_told_with_what_is_there(tmp_path: Path, streaming: str, schema: str) -> None:
    columns, problem = SCHEMAS[schema]
    for part in ("train", "test"):
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / f"set/{part}.parquet")
    with pytest.raises(DataError, match=rf"train\.parquet has {problem}.*Name one by --"):
        load_splits(config_of(tmp_path / "set", streaming, tmp_path / "cache"))


@pytest.mark.parametrize("streaming", ["no", "yes"])
@pytest.mark.parametrize("kind", ["uint64", "int64"])
def test_a_label_beyond_all_numbers(tmp_path: Path, streaming: str, kind: str) -> None:
    bits = pa.array([{"bytes": encoded(picture(i))} for i in range(4)])
    for part in ("train", "test"):
        (tmp_path / "set").mkdir(exist_ok=True)
        labels = pa.array([0, 1, 2, 2 ** (63 if kind == "uint64" else 62)], kind)
        pq.write_table(pa.table({"image": bits, "label": labels}), tmp_path / f"set/{part}.parquet")
    with pytest.raises(DataError, match=r"train\.parquet(, row 3)?: .*label"):
        load_splits(config_of(tmp_path / "set", streaming, tmp_path / "cache"))


def claiming(width: int, height: int, kind: str) -> bytes:
    """A small image whose header claims another size."""
    data = bytearray(encoded(Image.new("RGB", (8, 8)), kind))
    if kind == "PNG":
        import zlib

        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    else:
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
IMAGES = {
    "bomb.png": (claiming(50_000, 50_000, "PNG"), "too large to be decoded safely.*store it with fewer pixels"),
    "bomb.jpeg": (claiming(50_000, 50_000, "JPEG"), "too large to be decoded safely.*store it with fewer pixels"),
    "nothing.png": (claiming(0, 0, "PNG"), "cannot be decoded"),
    "nothing.jpeg": (claiming(0, 0, "JPEG"), "cannot be decoded"),
    "empty": (b"", "cannot be decoded"),
    "program.eps": (POSTSCRIPT, "cannot be decoded"),
}


@pytest.mark.parametrize("streaming", ["no", "yes"])
@pytest.mark.parametrize("image", IMAGES)
def test_images_that_are_bombs_or_nothing(
    tmp_path: Path, streaming: str, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, problem = IMAGES[image]
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    good = [encoded(picture(i)) for i in range(12)]
    for part in ("train", "test"):
        images = [*good[:8], data, *good[9:]] if part == "train" else good
        write_parquet(tmp_path / f"set/{part}.parquet", images, [i % 3 for i in range(12)])
    config = config_of(tmp_path / "set", streaming, tmp_path / "cache")
    with pytest.raises(DataError, match=rf"train\.parquet, row 8: .*{problem}.*--on-bad-image skip"):
        list(batches(load_splits(config), config))
    assert not (tmp_path / "ran").exists(), "no other program sees an image"


@pytest.mark.parametrize("streaming", ["no", "yes"])
def test_an_image_of_one_pixel_is_enlarged(tmp_path: Path, streaming: str) -> None:
    dots = [encoded(Image.new("RGB", (1, 1), (10 * i, 0, 0)), "PNG") for i in range(12)]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"set/{part}.parquet", dots, [i % 3 for i in range(12)])
    config = config_of(tmp_path / "set", streaming, tmp_path / "cache")
    for batch in batches(load_splits(config), config):
        assert batch.images[:, 0].flatten(1).unique(dim=1).flatten().tolist() == [
            10 * i for i in batch.indices.tolist()
        ]


def run_of(folder: Path, tmp_path: Path, **settings: Any) -> TrainConfig:
    """The configuration of a run on those images, of a single peer."""
    data = {"data": str(folder), "image_size": 8, "cache_dir": str(tmp_path / "cache"), "augment": "none"}
    alone = {"peers": ["resnet8"], "mixer": "none", "distiller": "none", "statistics": "none", "batch_size": 16}
    return from_settings({**data, **alone, "storage": str(tmp_path / "runs"), "name": "one", **settings})


def test_a_run_without_a_checkpoint_is_not_resumed_on_other_images(folder: Path, tmp_path: Path) -> None:
    config = run_of(folder, tmp_path)
    first = load_splits(config.dataset)
    run = open_run(config)
    create_run(run, config, first)
    begun = run.folder.read(RUN)
    bitmaps(folder / "train.parquet", 500)
    for option in ("resume", "resume_or_start"):
        with pytest.raises(
            DataError,
            match=r"the images have changed since run 'one' was started .*runs/one.*put back .*another --name",
        ):
            train(run_of(folder, tmp_path, **{option: True}))
    assert run.folder.read(RUN) == begun
    bitmaps(folder / "train.parquet")
    check_images(run.folder, load_splits(config.dataset).fingerprint)


def test_a_run_of_a_version_that_noted_no_images_is_resumed_on_any(folder: Path, tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "runs/one"))
    check_images(run, "any")
    write_run(run, run_of(folder, tmp_path), {"key": "k"})
    check_images(run, "any")


def test_a_trial_is_not_taken_up_again_on_other_images(folder: Path, tmp_path: Path) -> None:
    config = run_of(folder, tmp_path)

    def trial() -> PeersTrial:
        """As it is before its first step."""
        plan = SweepPlan(
            name="sweep",
            key="sweep-key",
            folder=str(tmp_path / "trials"),
            training=plain_settings(config),
            objective="mean",
            split="test",
            resources=WorkerResources(cpus=1.0, gpus=0.0, threads=1),
            facts=data_facts(load_splits(config.dataset)),
            tracking_uri="",
            artifact_location=None,
            parent_run_id=None,
            about="",
            tags={},
            environment={},
        )
        made = PeersTrial.__new__(PeersTrial)
        made.setup({"number": 3, "settings": {}}, plan)
        return made

    for _ in range(2):
        assert trial()._open(config) == []
    bitmaps(folder / "train.parquet", 500)
    with pytest.raises(DataError, match="the images have changed since run '0003' was started"):
        trial()._open(config)
