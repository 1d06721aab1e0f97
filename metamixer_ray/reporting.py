"""The controller's side: every rank's metrics become one row per epoch, kept and told.

One writer: this callback runs on the Ray Train controller only. The row goes to ``metrics.jsonl`` first, which is the
record of truth; the driver, which lives no shorter than the controller, shows it and sends it to MLflow.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

import ray.train

from metamixer_ray.checkpoint import learnt_until, peer_files
from metamixer_ray.deaths import cause_of, tells_of_a_death
from metamixer_ray.departure import LeavingGroup
from metamixer_ray.errors import ConfigError, DataError, StorageFailed, TornCheckpoint, Unreachable, UserError
from metamixer_ray.flags import Diverged
from metamixer_ray.folder import RunFolder, checkpoint_name, checkpoint_names
from metamixer_ray.masking import masked_uri
from metamixer_ray.patience import persistently, what_helps
from metamixer_ray.tracking import Journal
from metamixer_ray.tracking.files import append_whole
from metamixer_ray.troubles import Troubles
from metamixer_ray.uploads import UNWRITTEN

# Failures in a row without any progress in between, and deaths: the same thing would happen again.
HOPELESS, HOPELESS_DEATHS = 3, 10
# How long the controller tries to write a row that another will follow.
SHORT_PATIENCE = 5.0
# Beside the live file: is there once the controller is to end the training.
STOP, STOP_LOOK_SECONDS = "stop", 0.2
# How long what another machine wrote may take to be seen on this one.
SIGHT_SECONDS = 30.0


def peer_names(peers: Sequence[str]) -> list[str]:
    """Names that tell equal networks apart: ``peer0-resnet14``."""
    return [f"peer{i}-{name}" for i, name in enumerate(peers)]


def before_evaluation(report: Mapping[str, Any]) -> str:
    """The checkpoint that an epoch may have had before its evaluation, from its report."""
    return checkpoint_name(report["epoch"] - 1, report["step"] // report["epoch"])


def assemble_row(reports: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> dict[str, Any]:
    """One row of ``metrics.jsonl`` from the epoch's reports of all ranks (any order)."""
    first = min(reports, key=lambda r: (r["peer"], r["replica"]))
    leaders = sorted((r for r in reports if r["replica"] == 0), key=lambda r: r["peer"])

    def together(key: str) -> dict[str, Any]:
        own = first[key] or {}
        return {"ensemble": own.get("ensemble"), "agreement": own.get("agreement")}

    row: dict[str, Any] = {
        "epoch": first["epoch"],
        "step": first["step"],
        "seconds": max(r["seconds"] for r in reports),
        "elapsed": max(r["elapsed"] for r in reports),
        "images_per_second": min(r["images_per_second"] for r in leaders),
        "split": first["split"],
        "peers": [
            {"name": name, **report["train"], **((report["scores"] or {}).get("own") or {})}
            for name, report in zip(peer_names(peers), leaders, strict=True)
        ],
        **together("scores"),
        "exchange": {key: fmean(r["exchange"][key] for r in reports) for key in first["exchange"]},
        # Steps without an exchange are skipped by their own peer alone.
        "skipped_steps": max(r["skipped_steps"] for r in reports),
    }
    if first["test"] is not None:
        row["test"] = {
            "peers": [
                {"name": name, **report["test"]["own"]} for name, report in zip(peer_names(peers), leaders, strict=True)
            ],
            **together("test"),
        }
    return row


@dataclass
class EpochReporter(ray.train.UserCallback):
    """Writes each epoch's row once: to the journal, and to ``live`` for the driver's console and MLflow. Keeps the
    latest checkpoints, ``keep`` of them.

    Args:
        epochs: of the whole training.
        troubles: hear why rows can't be written, that they can again, and that there is a new whole checkpoint.
        patience: seconds for which the last row is tried again where storage fails. Earlier rows have until then.
    """

    folder_uri: str
    peers: tuple[str, ...]
    live: str
    keep: int
    epochs: int
    troubles: Troubles
    patience: float
    _failures: int = 0
    _deaths: int = 0
    _journal: Journal | None = field(default=None, repr=False)
    _unrecorded: dict[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict, repr=False)
    """By epoch, the reports of all ranks."""
    _in_trouble: bool = False
    _seen: bool = False
    _last: str = "no checkpoint was written since the start"
    _restored: str | None = None
    """From which checkpoint the running attempt goes on."""
    _whole: dict[str, bool] = field(default_factory=dict, repr=False)
    """The checkpoints that this attempt wrote, and whether amid skipped steps."""

    def _tell(self, event: Mapping[str, Any]) -> None:
        tell(self.live, event)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """See :class:`ray.train.UserCallback`."""
        event = metrics[0]["event"]
        if event == "restored":
            for warning in metrics[0]["warnings"]:
                self._tell({"event": "warning", "message": warning})
            # What was reported before a restart, all of it again: no progress, but rows may be missing.
            epochs = zip(*(told["reports"] for told in metrics), strict=True)
            self._unrecorded = {reports[0]["epoch"]: reports for reports in epochs}
            self._record()
            self._restored, self._whole = metrics[0]["checkpoint"], {}
            if (name := self._restored) is not None:
                self._last = f"the last whole checkpoint is {name}"
            return
        self._failures = self._deaths = 0
        if event == "epoch":
            self._unrecorded[metrics[0]["epoch"]] = metrics
        name, whole = metrics[0]["checkpoint"], not any(UNWRITTEN in told for told in metrics)
        if whole and name is not None:
            with suppress(OSError):
                self._see(name)
        if whole:
            # Never more rows than there are epochs in a checkpoint: a restart might have to train them again.
            self._record()
        if name is not None:
            skipped = any(told["skipped_in_a_row"] for told in metrics)
            same = before_evaluation(metrics[0]) if event == "epoch" else None
            self._take(name, whole=whole, amid_skipped=skipped, same=same)
        if whole and event == "checkpoint" and any(told["leaving"] for told in metrics):
            LeavingGroup.leaving = True

    def _take(self, name: str, *, whole: bool, amid_skipped: bool, same: str | None) -> None:
        """Delete the checkpoints that are older than the ``keep`` latest up to ``name``, and what a killed attempt left
        of one; or ``name`` itself, where a rank could not write its part. Those that were written amid skipped steps
        may be spoilt: they displace no others, and go with the next that wasn't; so does ``same``, which has
        the weights of ``name``. What can't be deleted for now is passed over, and is older next time."""
        if whole:
            self._whole[name] = amid_skipped
            self._last = f"the last whole checkpoint is {name}"
            self.troubles.say("checkpoints", None)
        with suppress(OSError):
            folder = RunFolder.again(self.folder_uri)
            if not whole:
                folder.remove_folder(name)
                return
            if amid_skipped:
                return
            before = [old for old in checkpoint_names(folder, until=name) if old != name]
            older = checkpoint_names(folder, until=self._restored) if self._restored else []
            kept = [old for old in before if old != same and self._counts(folder, old, older)][: self.keep - 1]
            for old in before:
                if old not in kept:
                    folder.remove_folder(old)

    def _counts(self, folder: RunFolder, name: str, older: Sequence[str]) -> bool:
        """Whether it is one of the ``keep``: written by this attempt or among the ``older`` ones that it found, and not
        amid skipped steps."""
        if name in self._whole:
            return not self._whole[name]
        if name not in older:
            return False
        try:
            return None not in self._steps(folder, name)
        except (TornCheckpoint, DataError, OSError):
            return True  # passed over by whoever goes on, but perhaps not by a person

    def _go_back(self, learnt_steps: int) -> str:
        """Delete what was written amid the steps skipped last, or just before the first of them, so that nobody goes on
        from it or evaluates it; which checkpoint is the last good one. Where there is none, nothing is deleted."""

        def look() -> str:
            folder = RunFolder.again(self.folder_uri)
            until = {name: self._learnt_until(folder, name) for name in checkpoint_names(folder)}
            good = [name for name, steps in until.items() if steps is not None and steps < learnt_steps]
            if not good:
                return "there is none from before; those that are there may be spoilt"
            for name in takewhile(lambda name: name != good[0], until):
                folder.remove_folder(name)
            return f"the last good checkpoint is {good[0]}"

        try:
            return persistently(look, SHORT_PATIENCE, lambda error: None, self._wait)
        except (OSError, UserError):
            return f"{self._last}; what was written after {learnt_steps} steps or later may be spoilt"

    def _learnt_until(self, folder: RunFolder, name: str) -> int | None:
        """See :func:`learnt_until`; None also where a part of it is torn or missing, or isn't of the others' step."""
        try:
            steps = set(self._steps(folder, name))
        except (TornCheckpoint, DataError):
            return None
        return steps.pop() if len(steps) == 1 else None

    def _steps(self, folder: RunFolder, name: str) -> list[int | None]:
        """:func:`learnt_until` of each peer's part.

        Raises:
            TornCheckpoint: one is torn or missing.
            DataError: one is no file.
            OSError: storage doesn't give one for now.
        """
        manifests = [folder.read(f"{name}/{peer_files(peer)[1]}") for peer in range(len(self.peers))]
        return [learnt_until(manifest or b"") for manifest in manifests]

    def _see(self, name: str) -> None:
        """Once, see from here what the workers wrote: a folder of one name may be another on each machine.

        Raises:
            ConfigError: it isn't here.
        """
        if self._seen:
            return
        folder = RunFolder.again(self.folder_uri)
        files = [f"{name}/{file}" for peer in range(len(self.peers)) for file in peer_files(peer)]
        until = time.monotonic() + SIGHT_SECONDS
        while unseen := [file for file in files if not folder.exists(file)]:
            if time.monotonic() > until:
                raise ConfigError(
                    f"{folder.option} {folder} isn't one place for all machines: the workers wrote {unseen[0]}, and "
                    "it is not to be seen from the machine that controls them; name one that all of them share"
                )
            time.sleep(STOP_LOOK_SECONDS)
        self._seen = True

    def _record(self) -> None:
        """Write the rows of the epochs that are to be recorded, unless they are there already. Those that can't be
        written for now are kept for the next time."""
        over = self.epochs in self._unrecorded
        try:
            persistently(self._write, self.patience if over else SHORT_PATIENCE, self._cannot, self._wait)
        except OSError as error:
            self._cannot(error)
            if over:
                raise StorageFailed(f"{self._place()} can't be written: {what_helps(error)}") from error
            return
        if self._in_trouble:
            self.troubles.say("metrics", None)
            self._in_trouble = False

    def _write(self) -> None:
        if self._journal is None:
            folder = RunFolder.again(self.folder_uri)
            self._journal = Journal(folder.filesystem, folder.path("metrics.jsonl"))
        recorded = {row["epoch"] for row in self._journal.rows()}
        for epoch, reports in list(self._unrecorded.items()):
            if epoch not in recorded:
                row = self._journal.append(assemble_row(reports, self.peers))
                tell(self.live, {"event": "epoch", "row": row})
            del self._unrecorded[epoch]

    def _cannot(self, error: OSError) -> None:
        if not self._in_trouble:
            self.troubles.say(
                "metrics",
                f"{self._place()} can't be written ({what_helps(error)}); training goes on, and epochs are shown and "
                "recorded when it can be",
            )
        self._in_trouble = True

    def _wait(self, seconds: float) -> bool:
        """Wait so long, or until the training is to end, which nobody else looks for meanwhile; whether it is."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if Path(self.live).with_name(STOP).exists():
                return True
            time.sleep(STOP_LOOK_SECONDS)
        return False

    def _place(self) -> str:
        return f"metrics.jsonl in {masked_uri(self.folder_uri)}"

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Say what happened; give up at once on what a person must mend, or when there is no progress."""
        causes = [cause_of(error) for error in worker_exceptions.values()]
        for cause in causes:
            if isinstance(cause, Diverged):
                raise Diverged(f"{cause}\n{self._go_back(cause.learnt_steps)}")
            if isinstance(cause, StorageFailed | Unreachable):
                raise StorageFailed(f"{cause}; {self._last}")
            if isinstance(cause, UserError):
                raise cause
        told = "; ".join(sorted({f"{type(c).__name__}: {first_line(c)}" for c in causes}))
        if tells_of_a_death(causes):
            self._deaths += 1
        else:
            self._failures += 1
        if self._failures >= HOPELESS or self._deaths >= HOPELESS_DEATHS:
            times = self._failures + self._deaths
            raise RuntimeError(f"the workers failed {times} times in a row without any progress; last: {told}")
        self._tell({"event": "failure", "message": f"a worker failed ({told})"})


def tell(live: str | Path, event: Mapping[str, Any]) -> None:
    """Add an event to the file that the driver's console follows. What a full disk swallows is only not seen: nothing
    depends on it."""
    with suppress(OSError):
        append_whole(Path(live), (json.dumps(event) + "\n").encode())


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
