"""Seconds from the command to the end of the first step, and what they are spent on."""

import tempfile
from pathlib import Path
from typing import Any

from tests.bench import command
from tests.bench.report import Row, single

FLAGS = ["--epochs", "1", "--no-log-models"]
"""The default command but for what follows the first step."""


def measure(rounds: int, flags: list[str] | None = None) -> list[Row]:
    """The section. The first of ``rounds`` + 1 starts fills the caches and is not counted."""
    splits: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        # Short, because Ray makes sockets in it, whose paths have a limit.
        with tempfile.TemporaryDirectory(prefix="mm-", dir="/tmp") as folder:
            splits.append(split(*command.run(FLAGS if flags is None else flags, Path(folder))))
    rows = [single("start", f"of this: {part}", [taken[part] for taken in splits[1:]], "s") for part in splits[0]]
    totals = [sum(taken.values()) for taken in splits[1:]]
    return [single("start", "from the command to the end of the first step", totals, "s", wanted="< 30"), *rows]


def split(began: float, marks: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by part, in the order in which they pass; they add up to the whole.

    Workers are measured by the rank that was last to end its first step.
    """
    driver = {mark["name"]: mark for mark in marks if mark["rank"] is None}
    slowest = max((mark for mark in marks if mark["name"] == "first step"), key=lambda mark: mark["ended"])["rank"]
    worker: dict[str, dict[str, Any]] = {}
    for mark in marks:
        if mark["rank"] == slowest:
            worker.setdefault(mark["name"], mark)
    imports = worker["worker's imports"]
    loading, set_up, step = worker["load_splits"], worker["set_up"], worker["first step"]
    data = loading["ended"] - loading["began"]
    return {
        "Python, and imports of the driver": driver["imports"]["ended"] - began,
        "data, driver": driver["data"]["ended"] - driver["data"]["began"],
        "networks and run folder, driver": driver["fit"]["began"]
        - driver["imports"]["ended"]
        - (driver["data"]["ended"] - driver["data"]["began"])
        - (driver["Ray"]["ended"] - driver["Ray"]["began"]),
        "Ray": driver["Ray"]["ended"] - driver["Ray"]["began"],
        "workers: processes and their group": imports["began"] - driver["fit"]["began"],
        "workers: imports of the training": imports["ended"] - imports["began"],
        "workers: data": data,
        "workers: mesh and session, waiting for each other": set_up["began"] - imports["ended"],
        "workers: networks and optimizer": set_up["ended"] - set_up["began"] - data,
        "first batch": step["began"] - set_up["ended"],
        "first step": step["ended"] - step["began"],
    }
