"""Storage that is full or read-only for a while: nothing is torn, nothing is lost, and it is said what is wrong."""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metamixer_ray import reporting
from metamixer_ray.checkpoint import Progress, Snapshot, peer_files, read_peer, take_snapshot
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import DataConfig, load_splits
from metamixer_ray.errors import ConfigError, StorageFailed
from metamixer_ray.folder import RunFolder
from metamixer_ray.patience import insist
from metamixer_ray.reporting import EpochReporter, tell
from metamixer_ray.runs import write_run
from metamixer_ray.tracking import Console
from metamixer_ray.tracking.journal import Journal
from metamixer_ray.uploads import UNWRITTEN, Uploads
from tests.e2e.waiting import wait_for
from tests.faults.disk import Disk
from tests.faults.told import Told


def snapshot(epoch: int) -> Snapshot:
    """A peer of 400 kB."""
    network = nn.Linear(250, 400)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return take_snapshot(0, network, optimizer, Progress(epoch=epoch), {})


def test_checkpoints_wait_for_room_and_the_newest_comes_first(disk: Disk) -> None:
    told: list[str] = []
    where = disk.place / "run"
    where.mkdir()
    uploads = Uploads("the disk", 100.0, told.append)
    # A part of a file has room, which is where torch keeps the reason to itself.
    disk.fill(leave=100_000)
    with ThreadPoolExecutor(1) as background:
        first = uploads.begin()
        written = [background.submit(uploads.carry_out, first, lambda: snapshot(1).write(where))]
        # Training comes here although the one before isn't written, and goes on.
        second = uploads.begin()
        written.append(background.submit(uploads.carry_out, second, lambda: snapshot(2).write(where)))
        assert written[0].result(20) is False
        assert wait_for(second.settled.is_set, 20)
        assert not written[1].done()
        disk.free()
        assert written[1].result(60) is True
    assert read_peer(where, 0)["progress"]["epoch"] == 2
    assert "checkpoints can't be written to the disk ([Errno 28] No space left on device" in told[0]
    assert "; free some space there); training goes on" in told[0]


def test_a_slow_storage_is_waited_for(tmp_path: Path) -> None:
    uploads, goes_on = Uploads("the disk", 100.0, print), threading.Event()
    with ThreadPoolExecutor(2) as background:
        first = background.submit(uploads.carry_out, uploads.begin(), lambda: goes_on.wait(60))
        second = background.submit(uploads.begin)
        assert not wait_for(second.done, 0.5)
        goes_on.set()
        assert first.result(20) is True
        assert not second.result(20).superseded.is_set()


def test_patience_ends(disk: Disk) -> None:
    told: list[str] = []
    uploads = Uploads("the disk", 1.5, told.append)
    disk.writable(False)
    with pytest.raises(
        StorageFailed,
        match=r"^no checkpoint could be written to the disk for 1.5 seconds, which is --storage-patience: .*"
        r"Read-only file system.*; make it writable$",
    ):
        uploads.carry_out(uploads.begin(), lambda: snapshot(1).write(disk.place))
    assert len(told) >= 2, "it was tried more than once"


def test_rows_are_never_torn(disk: Disk) -> None:
    folder = RunFolder(str(disk.place))
    journal = Journal(folder.filesystem, folder.path("metrics.jsonl"))
    rows = [{"epoch": epoch, "text": "x" * 6000} for epoch in (1, 2, 3)]
    journal.append(rows[0])
    # The next row doesn't fit: its first part does.
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        journal.append(rows[1])
    disk.free()
    for row in rows[1:]:
        journal.append(row)
    again = Journal(folder.filesystem, folder.path("metrics.jsonl"))
    assert [row["epoch"] for row in again.rows()] == [1, 2, 3]


def epoch_report(epoch: int) -> list[dict[str, Any]]:
    """What the only worker reports of an epoch."""
    numbers = {"seconds": 1.0, "elapsed": 1.0, "images_per_second": 1.0, "step": epoch, "skipped_steps": 0}
    report = {"event": "epoch", "epoch": epoch, "peer": 0, "replica": 0, "split": "test", "train": {"loss": 1.0}}
    report |= {"checkpoint": None, "leaving": False, "skipped_in_a_row": 0}
    return [{**report, **numbers, "scores": None, "test": None, "exchange": {}}]


@pytest.fixture
def reporter(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[EpochReporter, Told, Path]:
    """The reporter of a training of four epochs that is recorded on the disk, what it told, and the live file."""
    monkeypatch.setattr(reporting, "SHORT_PATIENCE", 0.0)
    told, live = Told(), tmp_path / "live.jsonl"
    uri = str(disk.place / "run")
    return EpochReporter(uri, ("resnet8",), str(live), 2, 4, told, patience=60.0), told, live


def test_rows_wait_for_a_disk_that_can_be_written(reporter: tuple[EpochReporter, Told, Path], disk: Disk) -> None:
    rows, told, live = reporter
    path = disk.place / "run" / "metrics.jsonl"

    def epochs(file: Path) -> list[int]:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [line.get("row", line)["epoch"] for line in lines]

    rows.after_report(None, epoch_report(1), None)
    # An epoch without a checkpoint isn't on record: it may have to be trained again.
    (disk.place / "run" / "checkpoint-epoch0002").mkdir()
    unwritten = {"checkpoint": "checkpoint-epoch0002", UNWRITTEN: True}
    for _ in range(2):
        # Once more, as after a restart.
        rows.after_report(None, [{**told, **unwritten} for told in epoch_report(2)], None)
    assert epochs(path) == [1]
    disk.writable(False)
    rows.after_report(None, epoch_report(3), None)
    assert (epochs(path), epochs(live)) == ([1], [1])
    (wrong,) = told.texts
    assert wrong is not None
    assert "metrics.jsonl in" in wrong
    assert "Read-only file system" in wrong
    # Restarted workers say all of it again.
    again = [told for epoch in (1, 2, 3) for told in epoch_report(epoch)]
    rows.after_report(None, [{"event": "restored", "reports": again, "warnings": [], "checkpoint": None}], None)
    # The last row is waited for.
    timer = threading.Timer(1.5, disk.writable, [True])
    timer.start()
    rows.after_report(None, epoch_report(4), None)
    timer.join()
    assert (epochs(path), epochs(live)) == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert told.texts[1:] == [None]


def test_whoever_waits_for_the_last_row_hears_that_it_is_to_end(
    reporter: tuple[EpochReporter, Told, Path], disk: Disk
) -> None:
    rows, _, live = reporter
    rows.patience = 1000.0
    disk.writable(False)
    live.with_name(reporting.STOP).touch()
    with pytest.raises(StorageFailed, match=r"metrics.jsonl in .* can't be written: .*; make it writable"):
        rows.after_report(None, epoch_report(4), None)


def make(checkpoint: Path) -> None:
    """The files of one peer."""
    checkpoint.mkdir(parents=True)
    for name in peer_files(0):
        (checkpoint / name).touch()


def test_a_folder_that_is_another_on_each_machine_is_refused(
    reporter: tuple[EpochReporter, Told, Path], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _, _ = reporter
    monkeypatch.setattr(reporting, "SIGHT_SECONDS", 0.5)
    run, report = (
        disk.place / "run",
        {"event": "checkpoint", "checkpoint": "checkpoint-epoch0001", "leaving": False, "skipped_in_a_row": 0},
    )
    with pytest.raises(ConfigError, match=r"--storage .*run isn't one place for all machines: .*epoch0001/peer0\.pt"):
        rows.after_report(None, [report], None)
    make(run / "checkpoint-epoch0001")
    rows.after_report(None, [report], None)
    # Once it was seen, a folder that comes late or is moved away ends nothing.
    rows.after_report(None, [{**report, "checkpoint": "checkpoint-epoch0002"}], None)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-epoch0001"]


def test_a_checkpoint_without_a_peers_file_is_none(reporter: tuple[EpochReporter, Told, Path], disk: Disk) -> None:
    rows, said, _ = reporter
    run = disk.place / "run"

    def reported(name: str, **second: bool) -> list[str]:
        """Two workers report the checkpoint, the second one says this of its part; which are there then."""
        make(run / name)
        first = {"event": "checkpoint", "checkpoint": name, "leaving": False, "skipped_in_a_row": 0}
        rows.after_report(None, [first, {**first, **second}], None)
        return sorted(path.name for path in run.glob("checkpoint-*"))

    whole = ["checkpoint-epoch0001", "checkpoint-epoch0002"]
    assert [reported(name) for name in whole] == [whole[:1], whole]
    assert said.texts == [None, None]
    for number in (3, 4, 5):
        assert reported(f"checkpoint-epoch000{number}", **{UNWRITTEN: True}) == whole
    assert said.texts == [None, None], "only a whole checkpoint ends a trouble with checkpoints"
    with pytest.raises(StorageFailed, match=r"full; the last whole checkpoint is checkpoint-epoch0002"):
        rows.after_exception(None, {0: StorageFailed("full")})
    # What can't be deleted ends nothing, and goes later.
    (run / "checkpoint-epoch0006").mkdir()
    disk.writable(False)
    rows.after_report(
        None,
        [{"event": "checkpoint", "checkpoint": "checkpoint-epoch0006", "leaving": False, "skipped_in_a_row": 0}],
        None,
    )
    disk.writable(True)
    assert reported("checkpoint-epoch0007") == ["checkpoint-epoch0006", "checkpoint-epoch0007"]


def test_what_a_killed_attempt_left_is_no_checkpoint_to_keep(
    reporter: tuple[EpochReporter, Told, Path], disk: Disk
) -> None:
    rows, _, _ = reporter
    run = disk.place / "run"
    for name in ("checkpoint-epoch0001", "checkpoint-epoch0002", "checkpoint-epoch0002-step000100"):
        make(run / name)
    restored = {"event": "restored", "reports": [], "warnings": ["torn"], "checkpoint": "checkpoint-epoch0002"}
    rows.after_report(None, [restored], None)
    left = {}
    for step in (50, 150, 200):
        name = f"checkpoint-epoch0002-step{step:06d}"
        make(run / name)
        rows.after_report(
            None, [{"event": "checkpoint", "checkpoint": name, "leaving": False, "skipped_in_a_row": 0}], None
        )
        left[step] = sorted(path.name.removeprefix("checkpoint-epoch0002") for path in run.glob("checkpoint-*"))
    # That of step 100 is left alone while workers may be at work on it.
    assert left == {
        50: ["", "-step000050", "-step000100"],
        150: ["-step000050", "-step000150"],
        200: ["-step000150", "-step000200"],
    }


@pytest.mark.parametrize("make_other", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_keeps_no_older_checkpoints(
    reporter: tuple[EpochReporter, Told, Path], disk: Disk, make_other: Callable[[Path], Any]
) -> None:
    rows, _, _ = reporter
    names = [f"checkpoint-epoch000{number}" for number in range(1, 5)]
    run = disk.place / "run"
    for name in names:
        make(run / name)
    (run / names[0] / "peer0.json").unlink()
    make_other(run / names[0] / "peer0.json")
    restored = {"event": "restored", "reports": [], "warnings": [], "checkpoint": names[1]}
    rows.after_report(None, [restored], None)
    for name in names[2:]:
        rows.after_report(
            None, [{"event": "checkpoint", "checkpoint": name, "leaving": False, "skipped_in_a_row": 0}], None
        )
    assert sorted(path.name for path in run.glob("checkpoint-*")) == names[2:]


def test_an_event_on_a_full_disk_is_left_out_and_not_torn(disk: Disk) -> None:
    live = disk.place / "live.jsonl"
    tell(str(live), {"event": "one", "text": "x" * 3000})
    disk.fill()
    tell(str(live), {"event": "two", "text": "x" * 3000})
    disk.free()
    tell(str(live), {"event": "three"})
    assert [json.loads(line)["event"] for line in live.read_text().splitlines()] == ["one", "three"]


def test_too_little_room_for_decoded_images_is_said_before_they_are_decoded(disk: Disk) -> None:
    disk.fill(leave=400_000)
    config = DataConfig(data="digits", cache_dir=str(disk.place))
    with pytest.raises(
        ConfigError, match=r"--cache-dir .*disk: .*2.21 MB are needed, \d+ kB free\); give a folder with room"
    ):
        load_splits(config)
    assert not [path for path in disk.place.rglob("*") if path.is_file() and path.name not in ("ballast", "lock")]
    disk.free()
    disk.writable(False)
    with pytest.raises(ConfigError, match=r"--cache-dir .*disk: .*Read-only file system"):
        load_splits(config)


def test_a_folder_for_runs_that_cannot_be_written_is_refused_at_once(disk: Disk) -> None:
    config = TrainConfig()
    disk.writable(False)
    with pytest.raises(ConfigError, match=r"--storage .*disk/a can't be written: .*; make it writable"):
        write_run(RunFolder(str(disk.place / "a")), config, {})
    with pytest.raises(ConfigError, match=r"--storage .*disk can't be written: .*; make it writable"):
        RunFolder(str(disk.place)).create()
    disk.writable(True)
    disk.fill()
    with pytest.raises(ConfigError, match=r"--storage .* can't be written: .*No space left.*; free some space there"):
        write_run(RunFolder(str(disk.place)), config, {})


def test_what_a_person_waits_for_is_tried_again(disk: Disk) -> None:
    told: list[str] = []
    folder = RunFolder(str(disk.place))
    disk.fill()
    timer = threading.Timer(1.5, disk.free)
    timer.start()
    insist(lambda: folder.write("summary.json", "{}"), "summary.json can't be written", 60.0, told.append)
    timer.join()
    assert folder.read("summary.json") == b"{}"
    assert len(told) == 1
    assert "summary.json can't be written ([Errno 28] No space left on device; free some space there)" in told[0]
    # Who keeps the log on the same disk is no worse off, and reads it afterwards.
    with (disk.place / "train.log").open("w") as log:
        disk.fill()
        timer = threading.Timer(1.5, disk.free)
        timer.start()
        insist(lambda: folder.write("log.json", "{}"), "log.json can't be written", 60.0, Console(stream=log).warn)
        timer.join()
    assert folder.read("log.json") == b"{}"
    assert b"log.json can't be written ([Errno 28]" in (folder.read("train.log") or b"")
    disk.writable(False)
    with pytest.raises(StorageFailed, match=r"^summary.json can't be written: .*; make it writable$"):
        insist(lambda: folder.write("summary.json", "{}"), "summary.json can't be written", 0.0, told.append)
