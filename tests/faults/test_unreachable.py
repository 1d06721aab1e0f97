"""An object store that doesn't answer for a while: what is streamed and what a sweep records wait for it."""

import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs

from metamixer_ray import patience
from metamixer_ray.data import DataConfig, load_splits
from metamixer_ray.data.cache import writing
from metamixer_ray.data.sources import parquet
from metamixer_ray.data.sources.locations import RemoteFile, find_parquet
from metamixer_ray.data.streaming import index
from metamixer_ray.errors import DataError, StorageFailed, Unreachable
from metamixer_ray.folder import RunFolder
from metamixer_ray.sweeps.ledger import Ledger
from metamixer_ray.sweeps.underway import Underway
from metamixer_ray.train import main
from tests.data.drawing import write_parquet
from tests.e2e.object_store import folder_of, object_store
from tests.e2e.waiting import wait_for
from tests.faults.road import Road
from tests.faults.test_files_that_change import ROWS, batches, bitmaps, config_of


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


def test_a_training_that_begins_meanwhile_says_so_and_ends(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.road.close()
    words = ["--storage", store.uri, "--name", "early", "--peers", "resnet8", "resnet8"]
    for resuming in ([], ["--resume-or-start"]):
        assert main([*words, *resuming]) == 2
        told = capsys.readouterr().err
        assert re.match(r"error: --storage s3://\*\*\*@bucket/runs\S* can't be read: .*503", told), told
        assert "Traceback" not in told


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


class Stumbling:
    """A store of local files of which every ``every``-th read fails, and the next one goes."""

    type_name = "s3"

    def __init__(self, every: int) -> None:
        self._every, self.reads, self.failures = every, 0, 0

    def get_file_info(self, path: str) -> fs.FileInfo:
        return fs.LocalFileSystem().get_file_info(path)

    def open_input_file(self, path: str) -> pa.PythonFile:
        store = self

        class File(io.FileIO):
            def read(self, size: int | None = -1, /) -> bytes:
                store.reads += 1
                if store.reads % store._every == 0:
                    store.failures += 1
                    raise OSError("SlowDown: reduce your request rate")
                return super().read(-1 if size is None else size)

        return pa.PythonFile(File(path), mode="r")


@pytest.mark.parametrize("every", [23, 29])
def test_one_failed_read_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.01)
    # So that it also fails in the midst of a file and of a row group.
    monkeypatch.setattr(parquet, "CHUNK_ROWS", 3)
    # More than pyarrow reads of a file's end at once.
    path, contents = tmp_path / "train.parquet", [bytes([i]) * 20_000 for i in range(ROWS)]
    write_parquet(path, contents, list(range(ROWS)))
    pq.write_table(pq.read_table(path), path, row_group_size=4, compression="none")
    (file,) = find_parquet(str(path), flag="--data")
    plain, store = [file] * 6, Stumbling(every)
    stumbling = [replace(file, filesystem=store)] * 6

    def rows(files: list[RemoteFile]) -> list[tuple[bytes | None, int | None, str]]:
        chunks = parquet._chunks(files, "image", "label")
        return [row for c in chunks for row in zip(c.images, c.labels, c.places, strict=True)]

    assert parquet.survey(stumbling, None, None).rows == 6 * ROWS
    assert parquet.first_image(stumbling, None, None) == contents[0]
    assert [index._read_labels(one, "label")[0].tolist() for one in stumbling] == [list(range(ROWS))] * 6
    assert store.failures > 0
    worse = Stumbling(every // 4)
    assert rows([replace(file, filesystem=worse)] * 6) == rows(plain)
    assert worse.failures > 3


def test_nobody_waits_for_a_store_when_it_is_over(
    store: Store, streamed: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    coming = batches(load_splits(streamed), streamed)
    next(coming)
    store.road.close()
    assert wait_for(lambda: "cannot be reached" in caplog.text)
    # Else this takes half an hour.
    coming.close()  # type: ignore[attr-defined]


def test_what_a_sweep_came_to_waits(store: Store) -> None:
    told: list[str] = []
    sent: list[tuple[bytes, str]] = []
    writer: Any = SimpleNamespace(log_artifact=lambda data, name: sent.append((data, name)))
    sweep: Any = SimpleNamespace(folder=RunFolder(store.uri))
    found: Any = Underway(sweep, cast(Any, None), writer, cast(Any, None), 60.0, told.append)
    with store.silent(until=lambda: told):
        found.keep("best.yaml", "lr: 0.1")
    assert RunFolder(store.uri).read("best.yaml") == b"lr: 0.1"
    assert sent == [(b"lr: 0.1", "best.yaml")]
    assert "best.yaml can't be written" in told[0]


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
