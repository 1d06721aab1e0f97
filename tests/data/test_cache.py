import logging
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metamixer_ray.data import DataConfig, DecodedSet, Splits, cache, channel_sums, decoding, load_splits
from metamixer_ray.data.channel_sums import ChannelSums
from metamixer_ray.errors import ConfigError, DataError
from tests.data.drawing import drawn_set, encoded, picture, pixels, write_parquet

Load = Callable[..., Splits]
FORK = multiprocessing.get_context("fork")


def prepared(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*/*.arrow"))


def decodings(caplog: pytest.LogCaptureFixture) -> int:
    return sum(text.startswith("decoding") for text in caplog.messages)


def test_images_are_decoded_once(tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = load(drawn_set(tmp_path / "set"))
    assert decodings(caplog) == 2
    second = load(tmp_path / "set")
    assert decodings(caplog) == 2
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.train.images, second.train.images)
    assert sorted(p.name for p in prepared(tmp_path)[0].parent.iterdir()) == ["lock", "test.arrow", "train.arrow"]


def test_whatever_changes_the_images_changes_the_cache(tmp_path: Path, load: Load) -> None:
    folder = drawn_set(tmp_path / "set")
    load(folder)
    for count, options in enumerate(
        [{"image_size": 6}, {"on_bad_image": "skip"}, {"label_column": "label"}, {"image_column": "image"}], start=2
    ):
        load(folder, **options)
        assert len(prepared(tmp_path)) == 2 * count
    load(folder, train_limit=6, validation_fraction=0.5, split_seed=3, augment="none", loader_processes=2)
    assert len(prepared(tmp_path)) == 10, "what only selects or orders images needs no decoding"


def test_a_changed_file_is_decoded_anew(tmp_path: Path, load: Load) -> None:
    folder = drawn_set(tmp_path / "set")
    before = load(folder)
    os.utime(folder / "train.parquet", ns=(1, 1))
    touched = load(folder)
    assert len(prepared(tmp_path)) == 4
    assert touched.fingerprint == before.fingerprint, "the same pixels on another node or day are the same data"
    write_parquet(folder / "train.parquet", [encoded(picture(i + 1)) for i in range(30)], [i % 3 for i in range(30)])
    changed = load(folder)
    assert changed.fingerprint != before.fingerprint
    assert np.array_equal(changed.train.images[0].numpy(), pixels(1))


def test_fingerprint_tells_selections_apart(tmp_path: Path, load: Load) -> None:
    folder = drawn_set(tmp_path / "set")
    options = [{}, {"train_limit": 9}, {"train_limit": 12}, {"validation_fraction": 0.2}, {"split_seed": 1}]
    assert len({load(folder, **option).fingerprint for option in options}) == len(options)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_images_lie_on_the_mapped_file(tmp_path: Path, load: Load) -> None:
    splits = load("digits", image_size=32)
    for images, file in ((splits.train, "train.arrow"), (splits.test, "test.arrow")):
        address = images.images.data_ptr()
        (line,) = [
            line
            for line in Path("/proc/self/maps").read_text().splitlines()
            if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
        ]
        assert line.endswith(file)
        assert images.images.is_contiguous()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_all_images_takes_no_memory_of_the_process(load: Load) -> None:
    def anonymous_bytes() -> int:
        (line,) = [li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    load("digits", image_size=96)
    before = anonymous_bytes()
    images = load("digits", image_size=96, validation_fraction=0.0).train.images
    assert int(images.sum(dtype=torch.int64)) > 0
    assert images.nbytes > 35e6
    assert anonymous_bytes() - before < images.nbytes / 3


def test_a_set_travels_between_processes_as_its_file_name(tmp_path: Path, load: Load) -> None:
    splits = load("digits", validation_fraction=0.1, image_size=32)
    for images in (splits.train, splits.test):
        message = pickle.dumps(images)
        assert len(message) < 200_000 < images.images.nbytes
        copy = pickle.loads(message)
        assert torch.equal(copy.images, images.images)
        assert torch.equal(copy.labels, images.labels)
    message = pickle.dumps(splits.test)
    for path in prepared(tmp_path):
        path.unlink()
    with pytest.raises(DataError, match="the prepared images are gone"):
        pickle.loads(message)


def test_a_set_in_memory_can_be_sent_too() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    copy = pickle.loads(pickle.dumps(DecodedSet(images, torch.tensor([1, 0]))))
    assert torch.equal(copy.images, images)


def _load_and_count(config: DataConfig, gate: object, results: object) -> None:
    class Count(logging.Handler):
        decoded = 0

        def emit(self, record: logging.LogRecord) -> None:
            self.decoded += record.getMessage().startswith("decoding")

    handler = Count()
    logger = logging.getLogger("metamixer_ray")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    gate.wait()  # type: ignore[attr-defined]
    splits = load_splits(config)
    results.put((handler.decoded, splits.fingerprint, int(splits.train.images.sum())))  # type: ignore[attr-defined]


def test_two_processes_prepare_one_cache_once(tmp_path: Path) -> None:
    folder = drawn_set(tmp_path / "set", train=600, size=32)
    gate, results = FORK.Barrier(3), FORK.Queue()
    config = DataConfig(data=str(folder))
    racers = [FORK.Process(target=_load_and_count, args=(config, gate, results)) for _ in range(3)]
    for racer in racers:
        racer.start()
    answers = [results.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(decoded for decoded, _, _ in answers) == [0, 0, 2]
    assert len({answer[1:] for answer in answers}) == 1


def test_what_a_killed_process_left_is_never_used(tmp_path: Path, load: Load) -> None:
    image = encoded(picture(0, 160))
    folder = tmp_path / "set"
    write_parquet(folder / "train.parquet", [image] * 2000, [i % 3 for i in range(2000)], row_group=500)
    write_parquet(folder / "test.parquet", [image] * 3, [0, 1, 2])
    victim = FORK.Process(target=load_splits, args=(DataConfig(data=str(folder), image_size=16),))
    victim.start()
    deadline = time.monotonic() + 60
    while not [p for p in (tmp_path / "cache").glob("*/.train.*.raw") if p.stat().st_size]:
        assert time.monotonic() < deadline
        assert victim.is_alive()
        time.sleep(0.002)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert prepared(tmp_path) == []
    assert len(list((tmp_path / "cache").glob("*/.train.*"))) == 1
    splits = load(folder, image_size=16)
    assert len(splits.train) == 2000
    assert list((tmp_path / "cache").glob("*/.t*")) == [], "the next one cleans up"


@pytest.mark.parametrize("damage", ["truncated", "empty", "another key", "garbage"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, load: Load, damage: str) -> None:
    folder = drawn_set(tmp_path / "set")
    expected = load(folder).train.images.clone()
    path = prepared(tmp_path)[1]
    assert path.name == "train.arrow"
    whole = path.read_bytes()
    path.unlink()  # not overwritten: tensors of this process still lie on it
    if damage == "another key":
        key = pa.ipc.open_file(pa.BufferReader(whole)).schema.metadata[b"metamixer_ray"].split(b'"key": "')[1][:32]
        path.write_bytes(whole.replace(key, b"0" * 32))
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * 5000}[damage])
    assert torch.equal(load(folder).train.images, expected)


def test_a_pool_of_processes_prepares_the_same(tmp_path: Path, load: Load) -> None:
    folder = drawn_set(tmp_path / "set", train=4100, test=3, size=4, row_group=1000)
    alone = load(folder)
    pooled = load(folder, processes=2, cache_dir=str(tmp_path / "other"))
    assert alone.fingerprint == pooled.fingerprint


def test_an_error_in_a_pool_stops_it_and_leaves_nothing(tmp_path: Path, load: Load) -> None:
    before = set(multiprocessing.active_children())
    folder = drawn_set(tmp_path / "set", test=3, size=4)
    images = [encoded(picture(i % 9, 4)) for i in range(4100)]
    images[3000] = b"broken"
    write_parquet(folder / "train.parquet", images, [i % 3 for i in range(4100)], row_group=1000)
    with pytest.raises(DataError, match="row 3000"):
        load(folder, processes=2)
    assert set(multiprocessing.active_children()) == before
    assert [p.name for p in (tmp_path / "cache").glob("*/*")] == ["lock"]


def test_large_images_decoded_in_pieces_are_the_same(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = drawn_set(tmp_path / "set")
    alone = load(folder)
    monkeypatch.setattr(decoding, "PIECE_BYTES", 1)
    monkeypatch.setattr(channel_sums, "BLOCK_BYTES", 1)
    pieces = load(folder, cache_dir=str(tmp_path / "other"))
    assert pieces.fingerprint == alone.fingerprint
    assert (pieces.mean, pieces.std) == (alone.mean, alone.std)
    assert torch.equal(pieces.train.images, alone.train.images)


@given(
    shape=st.tuples(st.integers(1, 5), st.just(3), st.integers(1, 7), st.integers(1, 7)),
    limit=st.integers(1, 400),
    seed=st.integers(0, 2**32 - 1),
)
def test_channel_sums_are_exact_whatever_the_blocks(shape: tuple[int, ...], limit: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    sums = ChannelSums()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel_sums, "BLOCK_BYTES", limit)
        sums.add(images)
    for channel, mean, std in zip(images.transpose(1, 0, 2, 3), sums.mean(), sums.std(), strict=True):
        values = [int(value) for value in channel.flat]
        count, total = len(values), sum(values)
        assert mean == total / (count * 255)
        variance = count * sum(value * value for value in values) - total**2
        assert std == (variance**0.5 / (count * 255) or 1.0)


def test_a_disk_too_small_is_told_by_the_first_image(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = drawn_set(tmp_path / "set")
    write_parquet(folder / "train.parquet", [b"broken", encoded(picture(0)), b"broken"], [0, 1, 2])
    with pytest.raises(DataError, match="row 0"):
        load(folder)
    usage = cache.shutil.disk_usage(tmp_path)._replace(free=2 * 3 * 3 * 8 * 8 - 1)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    write_parquet(folder / "train.parquet", [encoded(picture(0)), b"broken", b"broken"], [0, 1, 2])
    with pytest.raises(ConfigError, match=r"--cache-dir .*1\.15 kB are needed.*free"):
        load(folder)


def test_the_folder_is_found(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    load("digits", cache_dir=str(tmp_path / "given"))
    assert len(list((tmp_path / "given").glob("digits-*/*.arrow"))) == 2
    assert prepared(tmp_path) == []
    monkeypatch.delenv("METAMIXER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load("digits")
    assert len(list((tmp_path / "home/.cache/metamixer_ray").glob("digits-*/*.arrow"))) == 2


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, load: Load) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"--cache-dir .*METAMIXER_CACHE"):
        load("digits", cache_dir=str(tmp_path / "file"))
