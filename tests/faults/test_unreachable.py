"""An object store that doesn't answer for a while: what is streamed and what a sweep records wait for it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs

from metamixer_ray.data import DataConfig, load_splits
from metamixer_ray.data.cache import writing
from metamixer_ray.data.sources import parquet
from metamixer_ray.errors import DataError, StorageFailed, Unreachable
from metamixer_ray.folder import RunFolder
from metamixer_ray.sweeps.ledger import Ledger
from tests.e2e.object_store import folder_of, object_store
from tests.e2e.waiting import wait_for
from tests.faults.road import Road
from tests.faults.test_files_that_change import batches, bitmaps, config_of


@dataclass
class Store:
    """An object store, the road to it, and the URI of a folder that goes by it."""

    road: Road
    uri: str

    def put(self, name: str, content: bytes) -> None:
        filesystem, root = fs.FileSystem.from_uri(self.uri)
        filesystem.create_dir(root, recursive=True)
        with filesystem.open_output_stream(f"{root}/{name}") as stream:
            stream.write(content)

    @contextmanager
    def silent(self, until: Callable[[], object]) -> Iterator[None]:
        """From now on it answers nobody."""
        self.road.close()
        seen: list[bool] = []

        def reopen() -> None:
            seen.append(wait_for(lambda: bool(until())))
            self.road.open()

        reopening = threading.Thread(target=reopen)
        reopening.start()
        try:
            yield
        finally:
            reopening.join()
        assert seen == [True]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with object_store() as port:
        yield port


@pytest.fixture
def store(port: int) -> Store:
    road = Road(port)
    return Store(road, folder_of(road.port))


@pytest.fixture
def streamed(store: Store, tmp_path: Path) -> DataConfig:
    """A set in the store."""
    for part, first in (("train", 0), ("test", 1000)):
        store.put(f"{part}.parquet", bitmaps(tmp_path / f"set/{part}.parquet", first).read_bytes())
    return config_of(store.uri, "yes", tmp_path / "cache")


def test_what_is_streamed_waits(
    store: Store, streamed: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = load_splits(streamed)
    local = config_of(tmp_path / "set", "yes", tmp_path / "cache")
    coming = batches(splits, streamed)
    seen = [next(coming)]
    # Longer than pyarrow itself asks again.
    with store.silent(until=lambda: "cannot be reached" in caplog.text):
        seen += coming
    for there, here in zip(seen, batches(load_splits(local), local), strict=True):
        assert torch.equal(there.images, here.images)


def test_a_damaged_file_is_told_from_a_silent_store(store: Store, streamed: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "set/train.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=4, compression="none", write_page_checksum=True)
    group = pq.read_metadata(path).row_group(1)
    (found,) = (c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "image.bytes")
    content = bytearray(path.read_bytes())
    content[(found.dictionary_page_offset or found.data_page_offset) + found.total_compressed_size - 1] ^= 1
    store.put("train.parquet", bytes(content))
    with pytest.raises(DataError, match=r"train\.parquet: .*(CRC|checksum).*again") as raised:
        list(batches(load_splits(streamed), streamed))
    assert not isinstance(raised.value, OSError)


def test_one_that_stays_silent_is_named(store: Store, streamed: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = load_splits(streamed)
    monkeypatch.setattr(parquet, "SILENCE_SECONDS", 0.0)
    store.road.close()
    with pytest.raises(Unreachable, match=r"runs/train\.parquet: cannot be reached"):
        list(batches(splits, streamed))
    with pytest.raises(Unreachable, match=r"--data s3://.* cannot be reached .*; check the address"):
        load_splits(streamed)


def test_a_silent_store_is_not_taken_for_a_cache_without_room(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="nobody answers"), writing(tmp_path):
        raise Unreachable("nobody answers")


def test_the_record_of_a_trial_waits(store: Store) -> None:
    told: list[str] = []
    ledger = Ledger(RunFolder(store.uri), 60.0, told.append)
    with store.silent(until=lambda: told):
        ledger.add({"lr": 0.1}, "first")
    assert [trial.settings for trial in Ledger(RunFolder(store.uri)).trials()] == [{"lr": 0.1}]
    (said,) = told
    assert "the record of trial 0000 can't be written" in said
    store.road.close()
    with pytest.raises(StorageFailed, match=r"the records in .* can't be read"):
        Ledger(RunFolder(store.uri))
