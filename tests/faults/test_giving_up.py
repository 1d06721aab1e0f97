"""When workers that fail again and again are given up."""

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from metamixer_ray.errors import ProcessKilled
from metamixer_ray.reporting import HOPELESS, HOPELESS_DEATHS, EpochReporter
from metamixer_ray.troubles import Troubles

DEAD, CUT, BROKEN, HELPLESS, SILENT = (
    ActorDiedError(),
    RuntimeError("[pair.cc:561] Connection closed by peer [::1]:1"),
    OSError("worn out"),
    ProcessKilled("a loader process was killed"),
    WorkerHealthCheckTimeoutError("A worker health check has been hanging for 61 seconds"),
)


@pytest.fixture
def reporter(tmp_path: Path) -> EpochReporter:
    live = tmp_path / "live.jsonl"
    return EpochReporter(str(tmp_path / "run"), ("resnet8",) * 2, str(live), 2, 4, Troubles("key"), patience=0.0)


@pytest.mark.parametrize(
    ("failures", "allowed"),
    [
        ({0: BROKEN}, HOPELESS),
        ({0: CUT, 1: BROKEN}, HOPELESS),
        ({0: DEAD}, HOPELESS_DEATHS),
        ({0: CUT}, HOPELESS_DEATHS),
        ({0: DEAD, 1: BROKEN}, HOPELESS_DEATHS),
        ({0: HELPLESS, 1: BROKEN}, HOPELESS_DEATHS),
        ({0: SILENT}, HOPELESS_DEATHS),
    ],
    ids=["code", "code and cut", "death", "cut", "death and what it led to", "a loader process", "no answer"],
)
def test_what_code_raises_is_given_up_sooner_than_deaths(
    reporter: EpochReporter, failures: dict[int, Exception], allowed: int
) -> None:
    for _ in range(2):
        for _ in range(allowed - 1):
            reporter.after_exception(None, failures)
        # Any checkpoint is progress.
        reporter.after_report(None, [{"event": "checkpoint", "checkpoint": None, "leaving": False}], None)
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
