"""A stranger's walk through MLflow's pages in a browser, where there is one: do they say what was trained, and how?

Its pictures go to the folder that $METAMIXER_PICTURES names, to be looked at.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from metamixer_ray import train
from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.tune import tune
from tests.e2e import tiny
from tests.e2e.waiting import wait_for
from tests.ports import answers, free_port

pytest.importorskip("selenium")
from tests.e2e.browser import PROGRAMS, Browser, browser

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="there is no chromium with its driver"),
]


@pytest.fixture(scope="module")
def storage(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a training with its baseline and a sweep of two trials lie."""
    storage = tmp_path_factory.mktemp("browsed")
    train(tiny.config(storage, name="together", peers=["resnet8", "resnet14"], baseline=True, log_models=True))
    single = tiny.config(storage, name="searched", peers=["resnet8"], distiller="none")
    tune(SweepConfig(space=("tune_spaces.mixing",), search="random", samples=2, confirm_seeds=0, training=single))
    return storage


@pytest.fixture(scope="module")
def runs(storage: Path) -> dict[str, Run]:
    client = MlflowClient(tiny.store(storage))
    experiment = client.get_experiment_by_name("metamixer_ray")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture(scope="module")
def pages(storage: Path) -> Iterator[str]:
    """The address that ``python -m metamixer_ray.ui`` tells."""
    port = free_port()
    words = ["-m", "metamixer_ray.ui", "--tracking-uri", tiny.store(storage), "--port", str(port)]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        (address,) = re.findall(r"http://\S+", process.stdout.readline())
        # What MLflow tells about itself would fill the pipe.
        drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
        assert wait_for(lambda: answers(port), 120)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
        drain.wait(timeout=60)


@pytest.fixture(scope="module")
def walker(pages: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    pictures = Path(os.environ.get("METAMIXER_PICTURES") or tmp_path_factory.mktemp("pictures"))
    pictures.mkdir(parents=True, exist_ok=True)
    with browser(pictures) as walker:
        yield walker


def test_from_the_experiments_to_the_runs(walker: Browser, pages: str, runs: dict[str, Run]) -> None:
    walker.show(f"{pages}/#/experiments", "metamixer_ray", "Small networks that learn together")
    walker.picture("experiments")
    # As the line says that tells the address; the browser remembers it.
    walker.press("Model training")
    walker.press("metamixer_ray")
    # A training and a sweep, whose children are below them.
    walker.read("together", "searched", "Run Name", "python -m metamixer_ray.train", "python -m metamixer_ray.tune")
    walker.picture("runs")
    assert set(runs) == {"together", "together-alone", "searched", "searched-0000", "searched-0001"}


def _page(pages: str, run: Run, tab: str = "") -> str:
    return f"{pages}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{tab}"


def test_a_training_says_what_was_trained_what_it_gained_and_how_to_repeat_it(
    walker: Browser, pages: str, runs: dict[str, Run]
) -> None:
    run = runs["together"]
    # What is seen at once, before "Show more".
    walker.show(
        _page(pages, run), "2 peers learning together: resnet8", "resnet14", "distiller: dml", "gain over training"
    )
    walker.picture("training")
    walker.read("Repeat it with", "python -m metamixer_ray.train --config", "gain over alone", press="Show more")
    walker.picture("training-more")
    walker.show(_page(pages, run), "gain/peer0", "together-alone", "peer1-resnet14", "command", "mixer")
    walker.show(_page(pages, run, "/model-metrics"), "together (ensemble/top1)", "peer0")
    walker.picture("metrics")
    walker.show(_page(pages, run, "/artifacts"), "figures", "summary.json")
    walker.press("figures")
    walker.press("learning_curves.png")
    assert walker.sees_picture()
    walker.picture("figure")


def test_a_baseline_is_told_from_what_it_is_compared_with(walker: Browser, pages: str, runs: dict[str, Run]) -> None:
    alone = runs["together-alone"]
    assert (alone.data.tags["mixer"], alone.data.tags["distiller"]) == ("none", "none")
    walker.show(_page(pages, alone), "The networks of together alone")


def test_a_sweep_leads_to_its_trials(walker: Browser, pages: str, runs: dict[str, Run]) -> None:
    sweep, trial = runs["searched"], runs["searched-0001"]
    walker.show(_page(pages, sweep), "2 trials trained to the end", "searched-0000", "searched-0001")
    walker.picture("sweep")
    walker.show(_page(pages, sweep, "/artifacts"), "best.yaml", "figures")
    walker.press("figures")
    walker.press("sweep-history.png")
    assert walker.sees_picture()
    walker.picture("sweep-figure")
    walker.show(_page(pages, trial), "A training of the sweep searched", "mixer: metamixer", "settings: ", "pairing=")
    walker.read("Repeat it with", f"{trial.data.tags['run_folder']}/config.yaml", press="Show more")
    walker.picture("trial")
