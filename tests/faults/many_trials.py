"""``python -m tests.faults.many_trials``: a sweep of trials of seconds each, and what is left of them afterwards."""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
import tyro
from mlflow import MlflowClient
from ray.util import placement_group_table
from ray.util.state import list_actors

from metamixer_ray.folder import RunFolder
from metamixer_ray.sweeps.ledger import Ledger
from metamixer_ray.sweeps.opening import TRIALS
from tests.e2e import tiny
from tests.faults.watch import Watch, role


@dataclass(frozen=True, kw_only=True)
class Load:
    """Run a sweep of many short trials of tiny peers on a cluster of two CPUs, and count what it leaves behind."""

    trials: int = 200
    """How many."""
    epochs: int = 3
    """Of each, unless it is stopped early."""
    peers: int = 2
    """Of each; one alone starts in half the time."""


def of_ray() -> list[str]:
    """Titles of Ray's workers under this process, without what they are at."""
    roles = (role(process) for process in psutil.Process().children(recursive=True))
    return [found for found in roles if found.startswith("ray::")]


# What Ray keeps for as long as the cluster is there.
OF_THE_CLUSTER = {"ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::IDLE", "ray::_AutoscalingCoordinatorActor"}
MAY_REMAIN = {
    "placement groups": {"REMOVED"},
    "actors": {"DEAD", "ALIVE: _AutoscalingCoordinatorActor"},
    "processes": OF_THE_CLUSTER,
    "MLflow runs": {"FINISHED"},
    "trials": {"finished", "stopped"},
    "reserved CPUs": set[str](),
    "temporary folders": set[str](),
}


def left(storage: Path, address: str) -> dict[str, Counter[str]]:
    """What is there once the sweep has ended, by state."""
    groups = placement_group_table()
    actors = list_actors(address, limit=10_000, raise_on_missing_output=False)
    client = MlflowClient(tiny.store(storage))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    reserved = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)
    folders = [folder for folder in storage.parent.glob("metamixer_ray-*") if folder != storage]
    return {
        "placement groups": Counter(group["state"] for group in groups.values()),
        "actors": Counter("DEAD" if a.state == "DEAD" else f"{a.state}: {a.class_name}" for a in actors),
        "processes": Counter(of_ray()),
        "MLflow runs": Counter(run.info.status for run in client.search_runs(experiments, max_results=10_000)),
        "trials": Counter(t.status for t in Ledger(RunFolder(str(storage / "runs" / "many" / TRIALS))).trials()),
        "reserved CPUs": Counter([f"{reserved:g}"] if reserved else []),
        "temporary folders": Counter(folder.name.rpartition("-")[0] for folder in folders),
    }


def main() -> int:
    options = tyro.cli(Load, prog="python -m tests.faults.many_trials")
    # All that is temporary, also of the cluster's processes, in a place of its own.
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="many-")
    storage = Path(tempfile.mkdtemp(prefix="metamixer_ray-trials-"))
    os.environ.setdefault("METAMIXER_HOME", str(storage / "home"))
    os.environ.setdefault("METAMIXER_CACHE", str(storage / "cache"))
    alone: dict[str, str] = {"distiller": "none", "statistics": "none"} if options.peers == 1 else {}
    words = tiny.flags(storage, name="many", epochs=options.epochs, peers=["resnet8"] * options.peers, **alone)
    words += ["--samples", str(options.trials), "--confirm-seeds", "0", "--cpus-per-worker", "0.5"]
    address = ray.init(num_cpus=2, logging_level="ERROR", log_to_driver=False).address_info["address"]
    try:
        before = left(storage, address)
        watch, began = Watch(storage), time.monotonic()
        command = [sys.executable, "-m", "metamixer_ray.tune", *words, "--address", address]
        status = subprocess.run(command, check=False).returncode
        print(f"exit {status} after {(time.monotonic() - began) / 60:.1f} minutes")
        time.sleep(30)
        for name, found in left(storage, address).items():
            was = ", ".join(f"{count} {state}" for state, count in sorted(before[name].items())) or "none"
            now = ", ".join(f"{count} {state}" for state, count in sorted(found.items())) or "none"
            leaked = sorted(found.keys() - MAY_REMAIN[name] - before[name].keys())
            print(f"{name + ':':<20}{now} (before: {was})" + (f"; left behind: {leaked}" if leaked else ""))
            status = status or bool(leaked)
            if name in ("trials", "MLflow runs") and found.total() < options.trials:
                print(f"{name}: {found.total()} of {options.trials} are there")
                status = 1
        watch.end()
        print(watch.table())
    finally:
        ray.shutdown()
    return status


if __name__ == "__main__":
    sys.exit(main())
