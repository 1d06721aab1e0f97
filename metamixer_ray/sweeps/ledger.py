"""What a sweep knows of its trials: a small file per trial, from which a sweep that was killed goes on.

Nothing here is pickled and nothing is Ray's: a killed sweep is told all that was seen again, trial by trial.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from metamixer_ray.errors import ConfigError
from metamixer_ray.folder import RunFolder
from metamixer_ray.patience import insist

T = TypeVar("T")
logger = logging.getLogger(__name__)

Status = Literal["running", "finished", "stopped", "failed"]
TRIAL = "trial.json"
# Is there when a trial has let go of its workers and of its MLflow run.
ENDED = ".ended"
# Holds why a trial broke, for whoever is told only that it did.
BROKE = ".broke"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial: what was tried, and what came of it."""

    number: int
    """From 0, in the order in which trials were proposed."""
    settings: dict[str, Any]
    """What differs from the sweep's own training settings."""
    origin: str
    """Who proposed it: defaults, first, tpe, random, grid, or what a comparison calls its condition."""
    labels: dict[str, Any] = field(default_factory=dict)
    """HyperOpt's own description of the point, empty when its space doesn't hold it."""
    refused: list[dict[str, Any]] = field(default_factory=list)
    """Such descriptions of points that HyperOpt proposed just before, and that can't work."""
    status: Status = "running"
    """finished: trained to the last epoch; stopped: early, by the scheduler; failed: see the reason."""
    reason: str = ""
    """Why it failed."""
    epochs: int = 0
    """Epochs trained."""
    score: float | None = None
    """The objective turned so that more is better."""
    objective: float | None = None
    """At its last epoch, on the split that is watched."""
    seconds: float = 0.0
    """Of training, in all attempts."""
    begun: float = 0.0
    """When it was first proposed; seconds since 1970."""
    ended: float | None = None
    """When it was over."""

    @property
    def name(self) -> str:
        """Of its folder and, after the sweep's, of its MLflow run."""
        return f"{self.number:04d}"

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status != "running"


class Ledger:
    """The trials of a sweep by their number, kept in ``folder``; one process writes.

    Args:
        patience: seconds for which reading and writing are tried again where storage fails.
        warn: hears that it does.

    Raises:
        ConfigError: a file in the folder is not a trial's.
        StorageFailed: patience is over.
    """

    def __init__(self, folder: RunFolder, patience: float = 0.0, warn: Callable[[str], None] | None = None) -> None:
        self.folder, self._patience, self._warn = folder, patience, warn or logger.warning
        self._trials = self._insist(lambda: _read(folder), f"the records in {folder} can't be read")

    def trials(self) -> list[Trial]:
        """All trials, in order."""
        return [self._trials[number] for number in sorted(self._trials)]

    def trial(self, number: int) -> Trial:
        """The trial of that number."""
        return self._trials[number]

    def place(self, number: int) -> RunFolder:
        """The run folder of a trial."""
        return self.folder.inside(self._trials[number].name)

    def read(self, number: int, look: Callable[[RunFolder], T]) -> T:
        """What ``look`` finds in the run folder of a trial, where it looks again while storage fails.

        Raises:
            StorageFailed: patience is over.
        """
        place = self.place(number)
        return self._insist(lambda: look(place), f"what is in {place} can't be read")

    def mark(self, number: int, name: str) -> None:
        """Put an empty file of this name into the run folder of a trial; insists like :meth:`read`."""
        place = self.place(number)
        self._insist(lambda: place.write(name, ""), f"{place}/{name} can't be written")

    def _insist(self, work: Callable[[], T], what: str) -> T:
        return insist(work, what, self._patience, self._warn)

    def add(
        self,
        settings: Mapping[str, Any],
        origin: str,
        labels: Mapping[str, Any] | None = None,
        refused: Sequence[Mapping[str, Any]] = (),
    ) -> Trial:
        """Record a new trial before it is begun."""
        trial = Trial(
            number=max(self._trials, default=-1) + 1,
            settings=dict(settings),
            origin=origin,
            labels=dict(labels or {}),
            refused=[dict(point) for point in refused],
            begun=time.time(),
        )
        self._write(trial)
        return trial

    def update(self, number: int, **changes: Any) -> Trial:
        """Record what came of a trial; while it runs, only here and not in its file."""
        trial = replace(self._trials[number], **changes)
        if trial.over:
            trial = replace(trial, ended=trial.ended or time.time())
            self._write(trial)
        self._trials[number] = trial
        return trial

    def _write(self, trial: Trial) -> None:
        self._trials[trial.number] = trial
        place = self.place(trial.number)

        def write() -> None:
            place.create()
            place.write_json(TRIAL, asdict(trial))

        self._insist(write, f"the record of trial {trial.name} can't be written")


def _read(folder: RunFolder) -> dict[int, Trial]:
    """The trials that are recorded in ``folder``, by number."""
    trials = {}
    for name in folder.children():
        place = folder.inside(name)
        try:
            trial = place.read_as(TRIAL, Trial)
        except ConfigError as error:
            raise ConfigError(
                f"{place}/{TRIAL} is not the record of a trial ({error}); remove its folder to leave the trial out"
            ) from None
        if trial is not None and trial.name != name:
            raise ConfigError(
                f"{place}/{TRIAL} is the record of trial {trial.name}: a copy, or moved; remove its folder to leave "
                "the trial out"
            )
        if trial is not None:
            trials[trial.number] = trial
    return trials
