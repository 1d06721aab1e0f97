"""The driver of a training without Ray: its rows come from nowhere, all else it does as a driver does.

``python -m tests.faults.driver STORAGE TRACKING_URI NAME SECONDS [--resume]``; it waits for a line on its standard
input between training and keeping what was trained, and afterwards so long for a store that doesn't answer.
"""

import sys
from collections.abc import Sequence

from metamixer_ray import keeping
from metamixer_ray.capacity import WorkerResources
from metamixer_ray.cli import run_command
from metamixer_ray.config import from_settings
from metamixer_ray.data import load_splits
from metamixer_ray.interruption import stoppable
from metamixer_ray.keeping import Keeper, plan_tracking
from metamixer_ray.preparation import build_peers
from metamixer_ray.runs import SUMMARY, create_run, journal_of, open_run
from metamixer_ray.tracking import Console
from metamixer_ray.train import BASELINE, announce
from tests.tracking.examples import make_rows

EPOCHS = 6
PRACTICALLY_FOR_EVER = 1e6


def body(words: Sequence[str]) -> None:
    storage, uri, name, seconds, *rest = words
    config = from_settings(
        {
            "storage": storage,
            "tracking_uri": uri,
            "name": name,
            "resume": "--resume" in rest,
            "peers": ["resnet8"],
            "distiller": "none",
            "image_size": 8,
            "epochs": EPOCHS,
            "log_models": False,
        }
    )
    splits = load_splits(config.dataset)
    networks = build_peers(config, classes=10, image_size=8)
    run = open_run(config)
    if run.new:
        create_run(run, config, splits)
    console = Console()
    resources = WorkerResources(cpus=1.0, gpus=0.0, threads=1)
    announced = announce(config, run, splits, networks, 1, resources)
    tracking = plan_tracking(config, run, announced)
    with stoppable() as first, Keeper(config, run, tracking, announced, console) as keeper:
        first.append(keeper.mark_killed)
        keeping.FAILED_SECONDS = PRACTICALLY_FOR_EVER
        journal = journal_of(run.folder)
        for row in make_rows(1, EPOCHS):
            keeper.writer().offer([journal.append(row)])
        with keeper.alone({"mixer": "none", "distiller": "none"}) as (_, writer):
            journal = journal_of(run.folder.inside(BASELINE))
            for row in make_rows(1, EPOCHS):
                writer.offer([journal.append(row)])
            keeping.FAILED_SECONDS = float(seconds)
            print("both trained", flush=True)
            sys.stdin.readline()
        summary = {"peers": [{"gain": 0.1}], "baseline": {"peers": [{"top1": 0.5}]}}
        run.folder.write_json(SUMMARY, summary)
        keeper.send(splits, networks, journal.rows(), summary)


if __name__ == "__main__":
    sys.exit(run_command(body))
