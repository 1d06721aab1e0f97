"""The plan command as a person types it: what the words mean, what it prints, how it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch

from metamixer_ray.config import TrainConfig, flag, sections
from metamixer_ray.errors import ConfigError
from metamixer_ray.plan import PlanOptions, cluster_of, crowding, main, many_peers, parse_plan, threads_of
from metamixer_ray.planning import Link, epoch_of


def parsed(words: str = "") -> PlanOptions:
    return parse_plan(words.split())


def test_a_number_of_peers_stands_for_their_networks() -> None:
    options = parsed("--peers 4 --network resnet20 wrn16-2 --replicas 2 --bandwidth 25 --lr 0.2")
    assert options.training.peers == ("resnet20", "resnet20", "wrn16-2", "wrn16-2")
    assert options.training.workers == 8
    assert options.training.optimisation.lr == (0.2,)
    assert many_peers(["resnet8", "resnet14"], []) == ("resnet8", "resnet14")
    assert parsed().training == TrainConfig()


def test_the_words_of_a_training_and_its_file_are_understood(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("peers: [resnet8, resnet14]\nepochs: 7\n")
    options = parsed(f"--config {file} --batch-size 64")
    assert (options.training.peers, options.training.epochs) == (("resnet8", "resnet14"), 7)
    assert options.training.batch_size == 64


def test_what_the_options_do_not_say_is_as_measured() -> None:
    measured = Link(bandwidth=1e9, latency=2e-4)
    assert cluster_of(parsed(), measured).between == measured
    given = parsed("--bandwidth 8 --latency 30 --workers-per-node 2 --node-bandwidth 80")
    cluster = cluster_of(given, None)
    assert (cluster.workers_per_node, cluster.between.bandwidth, cluster.inside.bandwidth) == (2, 1e9, 1e10)
    assert cluster.between.latency == cluster.inside.latency == pytest.approx(3e-5)
    part = cluster_of(parsed("--bandwidth 16"), measured)
    assert part.between == part.inside == Link(bandwidth=2e9, latency=2e-4)


@pytest.mark.parametrize(("words", "workers"), [("", 1), ("--cpus-per-worker 0.25", 4), ("--cpus-per-worker 3", 1)])
def test_workers_that_share_a_core_are_slower(words: str, workers: float) -> None:
    assert crowding(parsed(words).training, torch.device("cpu")) == workers


def test_threads_are_those_of_a_worker() -> None:
    for words, threads in (("", 1), ("--threads 3", 3), ("--cpus-per-worker 2", 2), ("--cpus-per-worker 0.5", 1)):
        assert threads_of(parsed(words).training) == threads


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--peers 64", "--network resnet32"),
        ("--network resnet32", "--peers 64"),
        ("--peers 64 resnet8 --network resnet32", "one positive number"),
        ("--peers 0 --network resnet8", "one positive number"),
        ("--peers 7 --network resnet8 resnet14", "nearest number that can is 8"),
        ("--peers 4 --network resnet41", "there is no network 'resnet41'. Did you mean resnet44"),
        ("--peers 1 --network resnet8", "--distiller dml needs at least two --peers"),
        ("--bandwidth 0", "--bandwidth must be a positive number of Gbit/s"),
        ("--node-bandwidth nan", "--node-bandwidth must be a positive number"),
        ("--latency -1", "--latency must be 0 or a positive number"),
        ("--workers-per-node 0", "--workers-per-node must be at least 1"),
        ("--workers-per-node 2 --replicas 2", "say with --bandwidth"),
        ("--throughput 100 0", "--throughput takes positive numbers"),
        ("--throughput 100 200 300", "--throughput has 3 values for 2 different networks"),
        ("--tflops 0", "--tflops must be a positive number"),
        ("--tflops 3 --throughput 100", "give one of them"),
        ("--images 1000", "--classes"),
        ("--batch-size 30", "--batch-size 30"),
        ("--replicas 0", "--replicas must be at least 1"),
        ("--data nowhere/train.parquet", "nowhere/train.parquet"),
        ("--config nowhere.yaml", "--config nowhere.yaml: No such file"),
    ],
)
def test_what_makes_no_sense_gets_one_clear_error(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert caught.value.code == 0
    own = ["bandwidth", "latency", "workers_per_node", "node_bandwidth", "throughput", "tflops", "images", "classes"]
    own.append("network")
    assert [name for name in [*sections(), *own] if not re.search(rf"{flag(name)}\b", text)] == []


def test_a_plan_measures_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--peers 6 --network resnet8 resnet14 --replicas 2 --image-size 8 --batch-size 16 --epochs 3"
    assert main(words.split()) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 120
    assert lines[0] == "6 peers x 2 replicas: 12 workers on 12 nodes"
    for text in (
        "digits: 1438 training, 359 test images of 8 x 8 pixels",
        "8 per worker",
        "resnet14",
        "gradients between",
    ):
        assert text in printed.out
    assert re.search(r"exchange (under|over) 5 % of a step", printed.out)
    assert re.search(r"[\d,.]+ worker-hours", printed.out)
    assert printed.out.count("measured here") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_machines_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--images 1280 --classes 10 --image-size 8 --epochs 2 --bandwidth 10 --latency 20 "
        "--throughput 1000 500 --gpus-per-worker 0.5 --json"
    )
    assert main([*words.split(), "--precision", "float32"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [network["compute_seconds"] for network in plan["networks"]] == [0.128, 0.256]
    assert plan["step_seconds"] == pytest.approx(0.256 + plan["exchange"]["seconds_per_step"])
    latency = 2 * 20e-6
    assert plan["exchange"]["latency_seconds_per_step"] == pytest.approx(latency)
    sent = plan["exchange"]["sent_bytes_per_step"]
    assert plan["exchange"]["seconds_per_step"] == pytest.approx(latency + sent / (10e9 / 8))
    assert sent == plan["exchange"]["bytes_per_step"]
    assert plan["gpu_hours"] == pytest.approx(plan["worker_hours"] / 2)
    assert "given" in plan["assumptions"]["links"]


def test_operations_per_second_give_images_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--images 1280 --classes 10 --image-size 8 --bandwidth 10 --latency 20 --tflops 0.5 --json"
    assert main([*words.split(), "--precision", "float32"]) == 0
    plan = json.loads(capsys.readouterr().out)
    for network in plan["networks"]:
        assert network["images_per_second"] * network["training_flops"] == pytest.approx(0.5e12)
    assert plan["gpu_hours"] == pytest.approx(plan["worker_hours"])
    assert "0.5 TFLOP/s" in plan["assumptions"]["speed"]


def test_imagenet_is_planned_for_without_being_here() -> None:
    config = parsed("--data imagenet --batch-size 256").training
    epoch = epoch_of(config, images=None, classes=None)
    # The published sizes of ILSVRC 2012.
    assert (epoch.classes, epoch.size, epoch.evaluated) == (1000, 224, 50_000)
    assert 1_281_167 <= sum(epoch.rows) < 1_281_167 + 2 * 1000


def test_a_bad_number_of_peers_is_told_before_anything_is_measured() -> None:
    with pytest.raises(ConfigError, match="shared evenly"):
        many_peers(["5"], ["resnet8", "resnet14"])
