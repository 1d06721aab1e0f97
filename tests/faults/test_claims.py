"""Two processes, one name: one gets it, the other is told; and a killed one keeps nobody out."""

import errno
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metamixer_ray.claiming import claimed
from metamixer_ray.config import TrainConfig, from_settings
from metamixer_ray.data import load_splits
from metamixer_ray.errors import ConfigError
from metamixer_ray.folder import RunFolder
from metamixer_ray.runs import create_run, open_run
from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.sweeps.opening import SWEEP, create_sweep, facts_of, open_sweep

FORK = multiprocessing.get_context("fork")
ROUNDS = 10
RACERS = 3


def begin_run(config: TrainConfig, meet: Callable[[], Any]) -> str:
    splits = load_splits(config.dataset)
    run = open_run(config)
    meet()
    create_run(run, config, splits)
    return run.key


def begin_sweep(config: TrainConfig, meet: Callable[[], Any]) -> str:
    facts = facts_of(SweepConfig(training=config), "images")
    sweep = open_sweep(SWEEP, config, facts, "race")
    meet()
    create_sweep(sweep, facts)
    return sweep.key


def race(
    begin: Callable[[TrainConfig, Callable[[], Any]], str], configs: list[TrainConfig], gate: Any, out: Any
) -> None:
    for config in configs:
        gate.wait()
        try:
            out.put(begin(config, gate.wait))
        except ConfigError as error:
            out.put(str(error))


@pytest.mark.parametrize("option", ["name alone", "resume_or_start"])
@pytest.mark.parametrize("begin", [begin_run, begin_sweep])
def test_of_those_that_start_at_once_one_gets_the_name(tmp_path: Path, begin: Any, option: str) -> None:
    configs = [
        from_settings({"storage": str(tmp_path), "name": f"run{i}", "resume_or_start": option == "resume_or_start"})
        for i in range(ROUNDS)
    ]
    load_splits(configs[0].dataset)
    # All have looked whether the name is free before one of them takes it.
    gate, out = FORK.Barrier(RACERS), FORK.Queue()
    racers = [FORK.Process(target=race, args=(begin, configs, gate, out)) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    told = [out.get(timeout=120) for _ in range(RACERS * ROUNDS)]
    for racer in racers:
        racer.join()
    refused = [text for text in told if "taken" in text]
    assert len(refused) == (RACERS - 1) * ROUNDS
    assert all(text.startswith("--name 'run") for text in refused)
    for config in configs:
        run = tmp_path / str(config.run.name)
        assert (
            sum(
                key in (run / kept).read_text()
                for kept in ("run.json", "sweep.yaml")
                if (run / kept).exists()
                for key in told
            )
            == 1
        )


def hold(folder: Path, ready: Any) -> None:
    with claimed(RunFolder(str(folder))):
        ready.set()
        signal.pause()


def test_a_run_that_is_trained_is_not_resumed_and_a_killed_one_is(tmp_path: Path) -> None:
    settings = {"storage": str(tmp_path), "name": "one"}
    config = from_settings(settings)
    create_run(open_run(config), config, load_splits(config.dataset))
    for option in ("resume", "resume_or_start"):
        again = from_settings({**settings, option: True})
        ready = FORK.Event()
        driver = FORK.Process(target=hold, args=(tmp_path / "one", ready))
        driver.start()
        assert ready.wait(60)
        with pytest.raises(ConfigError, match="'one' is taken: another process is at work"):
            open_run(again)
        assert driver.pid is not None
        os.kill(driver.pid, signal.SIGKILL)
        driver.join()
        assert not open_run(again).new


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_folder_that_knows_of_no_locks_is_used_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    with claimed(RunFolder(str(tmp_path / "one"))):
        assert not caplog.messages
    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(RunFolder(str(tmp_path / "other"))):
        (told,) = caplog.messages
    assert "other can't be locked" in told
    assert "no other process" in told
