"""From the reports of all ranks to a row, and from the rows to the summary."""

import json
import random
from typing import Any

import pytest

from metamixer_ray import results
from metamixer_ray.config import TrainConfig, from_settings
from metamixer_ray.deaths import cause_of
from metamixer_ray.reporting import assemble_row, first_line, peer_names

PEERS = ("resnet14", "resnet8")


def scores(top1: float) -> dict[str, float]:
    return {"top1": top1, "top5": 1.0, "nll": 1 - top1, "ece": 0.1}


def evaluation(peer: int, base: float) -> dict[str, Any]:
    return {"own": scores(base + peer / 10), "ensemble": scores(base + 0.2), "agreement": 0.75}


def reports(epoch: int, *, replicas: int = 1, evaluated: bool = True, last: bool = False) -> list[dict[str, Any]]:
    return [
        {
            "event": "epoch",
            "epoch": epoch,
            "step": 10 * epoch,
            "peer": peer,
            "replica": replica,
            "seconds": 2.0 + peer + replica,
            "elapsed": epoch * (2.0 + peer),
            "images_per_second": 100.0 * epoch - peer,
            "split": "validation",
            "train": {"loss": 1.0 + peer, "lr": 0.1, "attention_agreement": [0.5, 0.25]},
            "scores": evaluation(peer, epoch / 10) if evaluated else None,
            "test": evaluation(peer, 0.5) if last else None,
            "exchange": {"bytes_per_step": 4.0, "seconds_per_step": 0.1 * (1 + peer), "wait_fraction": 0.5},
            "skipped_steps": 3,
        }
        for peer in range(2)
        for replica in range(replicas)
    ]


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_row_does_not_depend_on_who_reports_first(replicas: int) -> None:
    told = reports(1, replicas=replicas, last=True)
    row = assemble_row(told, PEERS)
    random.Random(0).shuffle(told)
    assert assemble_row(told, PEERS) == row
    assert json.loads(json.dumps(row)) == row
    assert [peer["name"] for peer in row["peers"]] == ["peer0-resnet14", "peer1-resnet8"]
    assert [peer["loss"] for peer in row["peers"]] == [1.0, 2.0]
    assert [peer["top1"] for peer in row["peers"]] == [0.1, 0.2]
    assert (row["seconds"], row["elapsed"], row["images_per_second"]) == (2.0 + replicas, 3.0, 99.0)
    assert row["exchange"]["seconds_per_step"] == pytest.approx(0.15)
    assert row["ensemble"] == scores(0.1 + 0.2)
    assert row["test"]["peers"][1] == {"name": "peer1-resnet8", **scores(0.6)}
    assert row["test"]["agreement"] == 0.75


def test_an_epoch_without_evaluation_has_no_scores() -> None:
    row = assemble_row(reports(1, evaluated=False), PEERS)
    assert (row["ensemble"], row["agreement"]) == (None, None)
    assert "top1" not in row["peers"][0]
    assert "test" not in row


def test_equal_networks_have_different_names() -> None:
    assert peer_names(["a", "a"]) == ["peer0-a", "peer1-a"]


def rows() -> list[dict[str, Any]]:
    return [assemble_row(reports(epoch, last=epoch == 3), PEERS) for epoch in (1, 2, 3)]


CONTRACT = {
    "peers": list,
    "ensemble": dict,
    "agreement": float,
    "images_per_second": float,
    "exchange": dict,
    "mixer": str,
    "distiller": str,
    "split": str,
    "seed": int,
    "epochs": int,
    "steps": int,
    "skipped_steps": int,
    "training_seconds": float,
    "wall_seconds": float,
}


def test_the_summary_keeps_its_contract() -> None:
    config = from_settings({"epochs": 3, "seed": 5})
    summary = results.summarise(config, rows(), [100, 50], wall_seconds=9.0)
    assert {name: type(value) for name, value in summary.items()} == CONTRACT
    assert json.loads(json.dumps(summary)) == summary
    first, second = summary["peers"]
    assert first == {"name": "peer0-resnet14", **scores(0.5), "network": "resnet14", "parameters": 100}
    assert (second["network"], second["parameters"], second["top1"]) == ("resnet8", 50, 0.6)
    assert (summary["steps"], summary["skipped_steps"], summary["images_per_second"]) == (30, 3, 199.0)
    assert (summary["training_seconds"], summary["wall_seconds"]) == (9.0, 9.0)
    assert (summary["seed"], summary["mixer"], summary["distiller"]) == (5, "metamixer", "dml")
    assert summary["split"] == "test"


def test_without_a_test_the_summary_tells_of_the_split_that_was_watched() -> None:
    watched = [{name: value for name, value in row.items() if name != "test"} for row in rows()]
    summary = results.summarise(TrainConfig(), watched, [100, 50], wall_seconds=9.0)
    assert summary["split"] == watched[-1]["split"]
    assert [peer["top1"] for peer in summary["peers"]] == [peer["top1"] for peer in watched[-1]["peers"]]
    assert results.tested_row(watched[-1]) == watched[-1]


def test_the_baseline_adds_each_peers_gain() -> None:
    before = rows()[-1]
    before["test"] = {**before["test"], "peers": [{"name": "x", **scores(0.4)}, {"name": "y", **scores(0.7)}]}
    summary = results.summarise(TrainConfig(), rows(), [1, 1], wall_seconds=1.0, alone=before)
    assert [peer["gain"] for peer in summary["peers"]] == pytest.approx([0.1, -0.1])
    assert set(summary) == {*CONTRACT, "baseline"}
    assert summary["baseline"]["peers"] == before["test"]["peers"]


def test_the_closing_table_shows_the_test_set() -> None:
    row = results.tested_row(rows()[-1])
    assert row["split"] == "test"
    assert [peer["top1"] for peer in row["peers"]] == [0.5, 0.6]
    assert [peer["loss"] for peer in row["peers"]] == [1.0, 2.0]
    assert row["ensemble"] == scores(0.7)


class Wrapped(Exception):
    def __init__(self, **inner: Any) -> None:
        super().__init__("wrapped")
        self.__dict__.update(inner)


def test_the_cause_is_found_in_its_wrappers() -> None:
    inner = ValueError("first\nsecond")
    for error in (
        inner,
        Wrapped(cause=inner),
        Wrapped(_base_exc=inner),
        Wrapped(health_check_failure=Wrapped(cause=inner)),
    ):
        assert cause_of(error) is inner
    text = Wrapped(cause="no exception")
    assert cause_of(text) is text
    assert first_line(inner) == "first"
    assert first_line(ValueError()) == "ValueError"
