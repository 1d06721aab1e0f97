"""A cluster that has no worker nodes until somebody needs them, and loses one."""

import subprocess
import sys
from pathlib import Path

import pytest

from metamixer_ray.folder import RunFolder
from metamixer_ray.sweeps.ledger import Ledger
from tests.e2e import tiny
from tests.e2e.autoscaling import autoscaled_cluster
from tests.e2e.own_parts import patience
from tests.e2e.waiting import wait_for, workers
from tests.tracking.server import tracking_server

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

EPOCHS = 3
RATES = """
from hyperopt import hp
def space():
    return {"lr": hp.choice("lr", [0.001, 0.05])}
"""


def test_a_sweep_starts_from_no_nodes_survives_the_loss_of_one_and_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "rates.py").write_text(RATES)
    folder = tmp_path / "runs" / "scaled"
    own = ["--space", str(tmp_path / "rates.py"), "--search", "random", "--samples", "2", "--scheduler", "none"]
    own += ["--confirm-seeds", "0", *tiny.flags(tmp_path, name="scaled", epochs=EPOCHS, **tiny.PATIENT)]
    with tracking_server(tmp_path) as server, autoscaled_cluster(cpus=1, most_nodes=2) as cluster:
        assert wait_for(lambda: cluster.worker_nodes() == 0)
        command = [sys.executable, "-m", "metamixer_ray.tune", *own, "--address", cluster.address]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "the cluster has 0 CPUs in all" in refused.stderr
        assert "if its autoscaler may start more nodes, say so with --grows-to" in refused.stderr
        growing = [*command, "--grows-to", "2xCPU=1"]
        refused = subprocess.run(growing, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "this cluster's autoscaler may start other machines: start an MLflow server" in refused.stderr
        driver = subprocess.Popen(
            [*growing, "--tracking-uri", server.uri], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            with patience():
                assert wait_for(lambda: cluster.worker_nodes() == 2)
                assert wait_for(lambda: len(workers(cluster.root)) == 2)
                assert wait_for(lambda: all(tiny.recorded(folder / "trials" / f"{n:04d}") >= 1 for n in range(2)))
                # A node goes with all that runs on it, and another comes in its place.
                lost = workers(cluster.root)[0]
                lost.parent().kill()
                assert wait_for(lambda: not lost.is_running())
                assert wait_for(lambda: cluster.worker_nodes() == 2 and len(workers(cluster.root)) == 2)
        finally:
            told, _ = driver.communicate(timeout=400)
        assert driver.returncode == 0, told
        assert "2 now" in told
        assert wait_for(lambda: cluster.worker_nodes() == 0)
    trials = Ledger(RunFolder(str(folder / "trials"))).trials()
    assert [trial.status for trial in trials] == ["finished"] * 2
    for trial in trials:
        assert [row["epoch"] for row in tiny.rows(folder / "trials" / trial.name)] == list(range(1, EPOCHS + 1))
