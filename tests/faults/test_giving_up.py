"""When workers that fail again and again are given up."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from metamixer_ray import fitting
from metamixer_ray.checkpoint import CHECK, peer_files
from metamixer_ray.errors import ProcessKilled, StorageFailed
from metamixer_ray.flags import Diverged, diverged
from metamixer_ray.folder import RunFolder
from metamixer_ray.reporting import HOPELESS, HOPELESS_DEATHS, STOP, EpochReporter
from metamixer_ray.starting import PeersTrainer
from tests.faults.told import Told

DEAD, EVICTED, CUT, BROKEN, HELPLESS, SILENT = (
    ActorDiedError(),
    OutOfMemoryError("4 worker(s) were killed due to the node running low on memory."),
    RuntimeError("[pair.cc:561] Connection closed by peer [::1]:1"),
    OSError("worn out"),
    ProcessKilled("a loader process was killed"),
    WorkerHealthCheckTimeoutError("A worker health check has been hanging for 61 seconds"),
)


@pytest.fixture
def reporter(tmp_path: Path) -> EpochReporter:
    live = tmp_path / "live.jsonl"
    return EpochReporter(str(tmp_path / "run"), ("resnet8",) * 2, str(live), 2, 4, Told(), patience=0.0)


@pytest.mark.parametrize(
    ("failures", "allowed"),
    [
        ({0: BROKEN}, HOPELESS),
        ({0: CUT, 1: BROKEN}, HOPELESS),
        ({0: DEAD}, HOPELESS_DEATHS),
        ({0: EVICTED, 1: BROKEN}, HOPELESS_DEATHS),
        ({0: CUT}, HOPELESS_DEATHS),
        ({0: DEAD, 1: BROKEN}, HOPELESS_DEATHS),
        ({0: HELPLESS, 1: BROKEN}, HOPELESS_DEATHS),
        ({0: SILENT}, HOPELESS_DEATHS),
    ],
    ids=[
        "code",
        "code and cut",
        "death",
        "no memory",
        "cut",
        "death and what it led to",
        "a loader process",
        "no answer",
    ],
)
def test_what_code_raises_is_given_up_sooner_than_deaths(
    reporter: EpochReporter, failures: dict[int, Exception], allowed: int
) -> None:
    for _ in range(2):
        for _ in range(allowed - 1):
            reporter.after_exception(None, failures)
        # Any checkpoint is progress.
        reporter.after_report(
            None, [{"event": "checkpoint", "checkpoint": None, "leaving": False, "skipped_in_a_row": 0}], None
        )
    for _ in range(allowed - 1):
        reporter.after_exception(None, failures)
    with pytest.raises(RuntimeError, match=rf"failed {allowed} times in a row without any progress"):
        reporter.after_exception(None, failures)


def test_neither_makes_up_for_the_other(reporter: EpochReporter) -> None:
    for _ in range(HOPELESS - 1):
        reporter.after_exception(None, {0: BROKEN})
        reporter.after_exception(None, {0: DEAD})
    with pytest.raises(RuntimeError, match="last: OSError: worn out"):
        reporter.after_exception(None, {0: BROKEN})


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def written(reporter: EpochReporter, steps: int, *skipped: int) -> None:
    """Have a checkpoint on disk after so many steps, of which each peer says how many were skipped in a row before it,
    and report it."""
    name = f"checkpoint-epoch{steps:04d}"
    folder = Path(reporter.folder_uri) / name
    folder.mkdir(parents=True)
    for peer, count in enumerate(skipped):
        weights, manifest = peer_files(peer)
        (folder / weights).write_bytes(b"weights")
        said = {"format": 2, "peer": peer, "sha256": "", "identity": {}}
        (folder / manifest).write_text(json.dumps({**said, "total_steps": steps, "skipped_in_a_row": count}))
    report = {"event": "checkpoint", "checkpoint": name, "leaving": False}
    reporter.after_report(None, [{**report, "skipped_in_a_row": count} for count in skipped], None)


def diverge(reporter: EpochReporter, learnt: int) -> str:
    """Give up after so many steps that were learnt, and twenty that were skipped; what is said of checkpoints."""
    error = pickle.loads(pickle.dumps(diverged(20, learnt, 1, reporter.peers)))
    with pytest.raises(Diverged) as caught:
        reporter.after_exception(None, {0: error})
    return str(caught.value).partition("\n")[2]


def test_the_last_good_checkpoint_outlives_those_that_may_be_spoilt(reporter: EpochReporter) -> None:
    folder = Path(reporter.folder_uri)
    # One peer alone skips steps without an exchange.
    for steps, skipped in [(10, (0, 0)), (20, (0, 0)), (30, (0, 3)), (34, (0, 7)), (38, (0, 11))]:
        written(reporter, steps, *skipped)
    assert kept(folder) == [f"checkpoint-epoch{steps:04d}" for steps in (10, 20, 30, 34, 38)]
    # What an attempt that was killed left behind is no better.
    (folder / "checkpoint-epoch0038" / peer_files(0)[1]).write_text(f'{{"{CHECK}": ""}}')
    assert diverge(reporter, 27) == "the last good checkpoint is checkpoint-epoch0020"
    assert kept(folder) == ["checkpoint-epoch0010", "checkpoint-epoch0020"]


def test_the_step_before_those_that_were_skipped_may_be_what_spoilt_them(reporter: EpochReporter) -> None:
    for steps, skipped in [(10, 0), (20, 0), (30, 10)]:
        written(reporter, steps, skipped, skipped)
    assert diverge(reporter, 20) == "the last good checkpoint is checkpoint-epoch0010"
    assert kept(Path(reporter.folder_uri)) == ["checkpoint-epoch0010"]


def test_spoilt_ones_displace_no_good_ones_when_skipping_ends(reporter: EpochReporter) -> None:
    for steps, skipped in [(10, 0), (20, 0), (24, 4), (50, 0)]:
        written(reporter, steps, skipped, skipped)
    assert kept(Path(reporter.folder_uri)) == ["checkpoint-epoch0020", "checkpoint-epoch0050"]
    assert diverge(reporter, 50) == "the last good checkpoint is checkpoint-epoch0020"
    assert kept(Path(reporter.folder_uri)) == ["checkpoint-epoch0020"]


def test_after_a_restart_spoilt_ones_are_known_by_what_they_say(reporter: EpochReporter) -> None:
    for steps, skipped in [(10, 0), (20, 0), (24, 4)]:
        written(reporter, steps, skipped, skipped)
    restored = {"event": "restored", "warnings": [], "reports": [], "checkpoint": "checkpoint-epoch0024"}
    reporter.after_report(None, [restored] * 2, None)
    written(reporter, 50, 0, 0)
    assert kept(Path(reporter.folder_uri)) == ["checkpoint-epoch0020", "checkpoint-epoch0050"]


def test_what_an_earlier_attempt_left_later_on_is_no_better(reporter: EpochReporter) -> None:
    for steps, skipped in [(10, 0), (20, 0), (34, 4), (60, 0)]:
        written(reporter, steps, skipped, skipped)
    # That of step 60 was passed over when this attempt began, and is still there.
    assert diverge(reporter, 30) == "the last good checkpoint is checkpoint-epoch0020"
    assert kept(Path(reporter.folder_uri)) == ["checkpoint-epoch0020"]


def test_a_checkpoint_before_an_evaluation_displaces_no_other(reporter: EpochReporter) -> None:
    """It has the weights of the one after it, and where those are spoilt, both are."""
    folder, steps = Path(reporter.folder_uri), 100

    def take(event: str, epoch: int, name: str, learnt: int) -> None:
        (folder / name).mkdir(parents=True)
        for peer in range(2):
            weights, manifest = peer_files(peer)
            (folder / name / weights).write_bytes(b"weights")
            said = {"format": 2, "peer": peer, "sha256": "", "identity": {}}
            (folder / name / manifest).write_text(json.dumps({**said, "total_steps": learnt, "skipped_in_a_row": 0}))
        report = {"event": event, "checkpoint": name, "leaving": False, "skipped_in_a_row": 0, "split": "test"}
        numbers = {"epoch": epoch, "step": learnt, "seconds": 1.0, "elapsed": 1.0, "images_per_second": 1.0}
        nothing = {"scores": None, "test": None, "exchange": {}, "skipped_steps": 0, "replica": 0, "train": {"loss": 1}}
        reporter.after_report(None, [{**report, **numbers, **nothing, "peer": peer} for peer in range(2)], None)

    for epoch in (1, 2, 3):
        take("checkpoint", epoch, f"checkpoint-epoch{epoch - 1:04d}-step{steps:06d}", steps * epoch)
        take("epoch", epoch, f"checkpoint-epoch{epoch:04d}", steps * epoch)
    assert kept(folder) == ["checkpoint-epoch0002", "checkpoint-epoch0003"]
    # Amid the fourth evaluation, a restart.
    take("checkpoint", 4, f"checkpoint-epoch0003-step{steps:06d}", 4 * steps)
    restored = {
        "event": "restored",
        "warnings": [],
        "reports": [],
        "checkpoint": f"checkpoint-epoch0003-step{steps:06d}",
    }
    reporter.after_report(None, [restored] * 2, None)
    take("epoch", 4, "checkpoint-epoch0004", 4 * steps)
    assert kept(folder) == ["checkpoint-epoch0003", "checkpoint-epoch0004"]
    assert diverge(reporter, 4 * steps) == "the last good checkpoint is checkpoint-epoch0003"
    assert kept(folder) == ["checkpoint-epoch0003"]


def test_what_is_no_manifest_spoils_no_other_checkpoint(reporter: EpochReporter) -> None:
    for steps in (10, 20):
        written(reporter, steps, 0, 0)
    manifest = Path(reporter.folder_uri) / "checkpoint-epoch0020" / peer_files(0)[1]
    manifest.unlink()
    manifest.mkdir()
    assert diverge(reporter, 25) == "the last good checkpoint is checkpoint-epoch0010"
    assert kept(Path(reporter.folder_uri)) == ["checkpoint-epoch0010"]


@pytest.mark.parametrize("skipped", [4, 0])
def test_nothing_is_deleted_where_nothing_better_is_left(reporter: EpochReporter, skipped: int) -> None:
    written(reporter, 20, skipped, skipped)
    assert diverge(reporter, 20 - skipped) == "there is none from before; those that are there may be spoilt"
    assert kept(Path(reporter.folder_uri)) == ["checkpoint-epoch0020"]


def test_divergence_is_told_also_where_checkpoints_cannot_be_looked_at(reporter: EpochReporter) -> None:
    written(reporter, 20, 0, 0)
    folder = Path(reporter.folder_uri)
    shutil.rmtree(folder)
    folder.touch()
    assert diverge(reporter, 25) == (
        "the last whole checkpoint is checkpoint-epoch0020; what was written after 25 steps or later may be spoilt"
    )


class Dying:
    """A trainer whose controller dies again and again, which may be told of."""

    def __init__(self, told: Callable[[], object] = lambda: None, how: Exception = DEAD) -> None:
        self.told, self.how, self.starts = told, how, 0

    def fit(self) -> None:
        self.starts += 1
        self.told()
        raise self.how


def go_on(trainer: Dying, place: Path, monkeypatch: pytest.MonkeyPatch, names: Callable[..., list[str]]) -> list[str]:
    """Outlive its controllers in a folder with those checkpoints; what is warned of."""
    live, warnings = place / "live.jsonl", list[str]()
    live.touch()
    monkeypatch.setattr(fitting, "checkpoint_names", names)
    with pytest.raises((RayActorError, OutOfMemoryError, StorageFailed)):
        fitting.outlive_controllers(
            cast(PeersTrainer, trainer), RunFolder(str(place / "run")), live, patience=100.0, warn=warnings.append
        )
    return warnings


@pytest.mark.parametrize(("how", "told"), [(DEAD, "controller died"), (EVICTED, r"died \(4 worker\(s\) were killed")])
def test_controllers_that_die_without_a_checkpoint_in_between_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Exception, told: str
) -> None:
    trainer = Dying(how=how)
    assert not go_on(trainer, tmp_path, monkeypatch, lambda _: ["checkpoint-epoch0001"])
    assert trainer.starts == HOPELESS_DEATHS
    lines = (tmp_path / "live.jsonl").read_text().splitlines()
    assert len([line for line in lines if re.search(told, json.loads(line)["message"])]) == len(lines) > 0


def test_a_training_that_is_stopped_is_started_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Dying((tmp_path / STOP).touch)
    go_on(trainer, tmp_path, monkeypatch, lambda _: [])
    assert trainer.starts == 1


@pytest.mark.parametrize("how", ["stopped", "left"])
def test_nor_is_one_that_waits_for_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """By whoever stops it, or as in a notebook by who went on to other things."""
    looks = []

    def names(_: RunFolder) -> list[str]:
        looks.append(None)
        if len(looks) == 3:
            (tmp_path / STOP).touch() if how == "stopped" else (tmp_path / "live.jsonl").unlink()
        if len(looks) > 1:
            raise OSError("no answer")
        return []

    trainer = Dying()
    (warning,) = go_on(trainer, tmp_path, monkeypatch, names)
    assert warning == f"{tmp_path}/run can't be read (no answer); it is tried again for 100 seconds"
    assert (trainer.starts, len(looks)) == (1, 3)
