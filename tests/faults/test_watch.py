"""What a soak is judged by must not end before it."""

import shutil
import threading
from pathlib import Path

import pytest

from tests.faults.watch import Watch


def test_it_looks_on_while_folders_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "LOOK_SECONDS", 0.0)
    (tmp_path / "kept").write_bytes(bytes(2**20))
    watch, over = Watch(tmp_path), threading.Event()

    def churn() -> None:
        while not over.is_set():
            for number in range(5):
                (tmp_path / "checkpoint" / f"part{number}").mkdir(parents=True)
            shutil.rmtree(tmp_path / "checkpoint")

    busy = threading.Thread(target=churn)
    busy.start()
    while len(watch.disk) < 30:
        assert watch.goes_on
    over.set()
    busy.join()
    watch.end()
    assert set(watch.disk) == {1.0}


def test_processes_of_which_none_was_seen_are_not_flat(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.end()
    assert [kind.partition(":")[0] for kind in watch.grown()] == list(Watch.OURS)
