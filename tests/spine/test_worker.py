"""Whole trainings in real process groups: what all ranks must agree on, whatever happens."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from metamixer_ray import worker
from metamixer_ray.checkpoint import read_peer
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import load_splits, normalise, train_batches
from metamixer_ray.evaluation import ScoreSums, probabilities_of
from metamixer_ray.mixing import build_mixer, draw_plan, mix_images
from metamixer_ray.preparation import batch_order, build_peers
from metamixer_ray.reporting import assemble_row
from tests.data.drawing import drawn_set
from tests.distill.textbook import mutual_learning
from tests.spine.networks import digest
from tests.spine.pool import Pool
from tests.spine.training import TIMES, Outcome, agreement_on_images, compiled_graphs, learn_together

Make = Callable[..., TrainConfig]
HERE = "tests.spine.networks"


def last(config: TrainConfig) -> str:
    return f"checkpoint-epoch{config.epochs:04d}"


def weights(folder: Path, name: str, peer: int) -> dict[str, Any]:
    return read_peer(folder / name, peer)


def leaves(value: Any) -> list[Any]:
    """Numbers, strings and tensors of a nested checkpoint, in its order."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *leaves(value[key]))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def identical(first: Any, second: Any) -> bool:
    """Whether two nested checkpoints agree to the last bit."""
    ones, others = leaves(first), leaves(second)
    return len(ones) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ones, others, strict=True)
    )


def by_seat(outcomes: Sequence[Outcome]) -> dict[tuple[int, int], Outcome]:
    return {(o.peer, o.replica): o for o in outcomes}


def expected_inputs(config: TrainConfig, replica: int) -> list[str]:
    """Hashes of the mixed images of every step, from the pure functions alone."""
    splits = load_splits(config.dataset)
    order, mixer = batch_order(config, splits), build_mixer(config.mixing)
    peers = build_peers(config, classes=len(splits.classes), image_size=splits.train.image_size)
    stages = min(len(network.stage_names) for network in peers)
    hashes = []
    for epoch in range(config.epochs):
        for batch in train_batches(splits.train, order, config.dataset, seed=config.seed, epoch=epoch, replica=replica):
            plan = draw_plan(
                mixer,
                config.mixing,
                seed=config.seed,
                epoch=epoch,
                step=batch.step,
                replica=replica,
                rows=len(batch.labels),
                height=batch.images.shape[-2],
                width=batch.images.shape[-1],
                epochs=config.epochs,
                available_stages=stages,
            )
            clean = normalise(batch.images, splits.mean, splits.std)
            hashes.append(digest(mix_images(clean.contiguous(memory_format=torch.channels_last), plan)))
    return hashes


@pytest.mark.parametrize(("replicas", "processes"), [(1, 0), (1, 2), (2, 0), (2, 1)])
def test_all_peers_see_the_same_images_and_targets(
    pool: Pool, small: Make, tmp_path: Path, replicas: int, processes: int
) -> None:
    config = small(replicas=replicas, loader_processes=processes, local_probability=0.8, global_probability=0.8)
    seats = by_seat(pool.run(config.workers, learn_together, config, tmp_path))
    for replica in range(replicas):
        one, other = seats[0, replica], seats[1, replica]
        assert one.images == other.images == expected_inputs(config, replica)
        assert len(one.images) == config.epochs * batch_order(config, load_splits(config.dataset)).steps_per_epoch
        assert all(torch.equal(a, b) for a, b in zip(one.targets, other.targets, strict=True))
        assert any((targets.max(1).values < 1).any() for targets in one.targets)
    if replicas == 2:
        assert not set(seats[0, 0].images) & set(seats[0, 1].images)
    # Every rank says where it is after every step.
    told = (tmp_path / "rank0.steps").read_text().splitlines()
    steps = len(one.images) // config.epochs
    assert told == [f"{epoch} {step} {steps}" for epoch in (1, 2) for step in range(1, steps + 1)]


def test_ranks_that_hold_other_images_are_refused_by_all(pool: Pool) -> None:
    assert pool.run(3, agreement_on_images, {}) == ["", "", ""]
    told = pool.run(3, agreement_on_images, {1: "other", 2: "other"})
    assert len(set(told)) == 1
    assert "the workers hold different images (rank 1 and 1 more differ from rank 0)" in told[0]


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_whose_images_are_not_those_of_the_start_are_refused(pool: Pool, world: int) -> None:
    assert pool.run(world, agreement_on_images, {}, "same") == [""] * world
    for told in pool.run(world, agreement_on_images, {}, "before"):
        assert "other images than the training was started on: put back" in told


def test_the_reported_kd_is_the_textbook_loss_of_the_recorded_logits(pool: Pool, small: Make, tmp_path: Path) -> None:
    config = small(
        peers=[f"{HERE}:tiny", f"{HERE}:wide", f"{HERE}:tiny"], epochs=1, batch_size=64, lr=1e-3, temperature=2.0
    )
    outcomes = pool.run(3, learn_together, config, tmp_path)
    steps = list(zip(*(o.logits for o in outcomes), strict=True))
    for own, outcome in enumerate(outcomes):
        losses = [mutual_learning(step, own, config.distillation.temperature)[0] for step in steps]
        (row,) = outcome.epochs
        assert row["train"]["kd"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
        assert row["train"]["kd"] > 0


ALIKE = {
    # Nothing is drawn per replica.
    "unmixed": {"mixer": "none", "sampler": "shuffle"},
    # Beta(alpha, alpha) of a huge alpha is one half for every row, and partners follow from the quadruples.
    "mixed": {
        "mixer": "metamixer",
        "local_probability": 0,
        "global_probability": 1,
        "global_alpha": 1e9,
        "mix_stages": [1],
    },
    # What the distiller learns itself is averaged over replicas as well.
    "with a gate": {"mixer": "none", "sampler": "shuffle", "distiller": "ensemble-gated", "kd_warmup_epochs": 0},
}


@pytest.mark.parametrize("settings", ALIKE.values(), ids=ALIKE)
def test_two_replicas_learn_what_one_learns_of_the_whole_batch(
    pool: Pool, small: Make, tmp_path: Path, settings: dict[str, Any]
) -> None:
    def trained(replicas: int) -> tuple[TrainConfig, list[Outcome]]:
        # 80 images are eight of each class: 20 quadruples, which two replicas share without a rest.
        config = small(replicas=replicas, train_limit=80, statistics_weight=1.0, **settings)
        return config, pool.run(config.workers, learn_together, config, tmp_path / str(replicas))

    config, ones = trained(1)
    _, twos = trained(2)
    splits = load_splits(config.dataset)
    initial = build_peers(config, classes=len(splits.classes), image_size=splits.train.image_size)
    for peer in range(2):
        saved, shared = (weights(tmp_path / replicas, last(config), peer) for replicas in ("1", "2"))
        for part in saved.keys() - {"optimizer", "progress"}:
            torch.testing.assert_close(shared[part], saved[part], rtol=1e-4, atol=2e-6)
        one = saved["network"]
        moved = max((one[k] - v).abs().max() for k, v in initial[peer].network.state_dict().items())
        assert moved > 1e-2
    for alone, shared in zip(by_seat(ones)[0, 0].epochs, by_seat(twos)[0, 0].epochs, strict=True):
        for name in ("loss", "cross_entropy", "kd", "statistics", "train_top1"):
            assert shared["train"][name] == pytest.approx(alone["train"][name], rel=1e-4, abs=1e-6)


RESUMED = {
    "kdcl-general": {"distiller": "kdcl-general", "validation_fraction": 0.1},
    # Between two refreshes of the copies, whose networks have running statistics of their own in each replica.
    "codistillation": {"distiller": "codistillation", "stale_steps": 3, "replicas": 2, "kd_warmup_epochs": 0},
    "float32": {"precision": "float32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "statistics": "similarity"},
    "replicas": {"replicas": 2},
    # A ring adds three summands in an order that depends on where in the buffer they are.
    "streamed": {
        "streaming": "yes",
        "stream_window": 32,
        "augment": "crop-flip",
        "train_limit": None,
        "image_size": 16,
    },
    "three replicas": {"replicas": 3, "batch_size": 24, "peers": [f"{HERE}:tiny", f"{HERE}:wide"]},
    "okddip": {"distiller": "okddip", "peers": [f"{HERE}:dropping", "resnet8", f"{HERE}:wide"], "optimizer": "adamw"},
    "mcl of three replicas": {
        "distiller": "mcl",
        "replicas": 3,
        "batch_size": 24,
        "peers": [f"{HERE}:tiny", f"{HERE}:wide"],
    },
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_interrupted_inside_an_epoch_equals_uninterrupted(
    pool: Pool, small: Make, tmp_path: Path, settings: dict[str, Any]
) -> None:
    if settings.get("streaming"):
        settings = {**settings, "data": str(drawn_set(tmp_path / "set", train=66))}
    config = small(
        **{
            "peers": [f"{HERE}:dropping", "resnet8"],
            "checkpoint_seconds": 1e-9,
            "statistics_weight": 0.5,
            "kd_warmup_epochs": 1.5,
            "lr_warmup_epochs": 0.5,
            **settings,
        }
    )
    middle = "checkpoint-epoch0001-step000002"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    through = pool.run(config.workers, learn_together, config, whole)
    before = pool.run(config.workers, learn_together, config, parts, None, middle)
    if settings.get("streaming"):
        config = replace(config, dataset=replace(config.dataset, loader_processes=1))
    after = pool.run(config.workers, learn_together, config, parts, middle)
    assert {o.ended for o in before} == {"stopped"}
    assert {o.ended for o in after} == {"finished"}
    for peer in range(len(config.peers)):
        one, two = (weights(folder, last(config), peer) for folder in (whole, parts))
        assert one.keys() == two.keys()
        assert all(identical(one[part], two[part]) for part in one.keys() - {"progress"})
    for uninterrupted, resumed in zip(through, after, strict=True):
        assert 0 < len(resumed.targets) < len(uninterrupted.targets)
        tail = uninterrupted.targets[-len(resumed.targets) :]
        assert all(torch.equal(a, b) for a, b in zip(resumed.targets, tail, strict=True))
        if config.placement.replicas < 3:
            assert resumed.epochs == uninterrupted.epochs
        else:
            # What was shared at the checkpoint is summed over three replicas in another order.
            for one, two in zip(resumed.epochs, uninterrupted.epochs, strict=True):
                assert one.keys() == two.keys()
                assert one["scores"] == two["scores"]
                for name, value in one["train"].items():
                    assert value == pytest.approx(two["train"][name], rel=1e-6)


def learn_and_lose(seconds: float, *args: Any) -> Outcome:
    """The job of a rank of which an evaluation may cost so much."""
    with patch.multiple(worker, LOST_SECONDS=seconds, SHORT_EVALUATION=-1.0):
        return learn_together(*args)


def test_what_was_learnt_is_kept_before_an_evaluation(pool: Pool, small: Make, tmp_path: Path) -> None:
    config = small(epochs=4, evaluate_every=2, checkpoint_seconds=1e8)
    ends = {f"checkpoint-epoch{epoch:04d}" for epoch in (1, 2, 3, 4)}
    little, whole, parts = (tmp_path / name for name in ("little", "whole", "parts"))
    pool.run(2, learn_and_lose, 1e8, config, little)
    assert {path.name for path in little.glob("checkpoint-*")} == ends
    through = pool.run(2, learn_and_lose, 1e-9, config, whole)
    steps = through[0].epochs[0]["step"]
    before = [f"checkpoint-epoch{epoch:04d}-step{steps:06d}" for epoch in (1, 3)]
    assert {path.name for path in whole.glob("checkpoint-*")} == ends | set(before)
    # Killed while it evaluates, it takes no step again.
    pool.run(2, learn_and_lose, 1e-9, config, parts, None, before[1])
    after = pool.run(2, learn_together, config, parts, before[1])
    assert [len(outcome.targets) for outcome in after] == [0, 0]
    assert [outcome.epochs for outcome in after] == [outcome.epochs for outcome in through]


def test_a_resumed_training_of_replicas_reports_all_epochs_again_as_they_were(
    pool: Pool, small: Make, tmp_path: Path
) -> None:
    # Who keeps the rows may be any number of epochs behind when it dies.
    config = small(replicas=2, epochs=3)
    first = pool.run(4, learn_together, config, tmp_path / "first")
    shutil.copytree(tmp_path / "first" / last(config), tmp_path / "again" / last(config))
    again = pool.run(4, learn_together, config, tmp_path / "again", last(config))
    assert {o.ended for o in again} == {"finished"}
    assert [len(o.reports) for o in again] == [1] * 4
    assert [o.epochs for o in again] == [o.epochs for o in first]
    rows = [
        [assemble_row(told, config.peers) for told in zip(*reports, strict=True)]
        for reports in ([o.reports for o in first], [o.reports[0]["reports"] for o in again])
    ]
    before, after = ([{k: v for k, v in row.items() if k not in TIMES} for row in side] for side in rows)
    assert [row["epoch"] for row in after] == [1, 2, 3]
    assert before == after


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_networks_learn_the_same(pool: Pool, small: Make, tmp_path: Path) -> None:
    def learn(name: str, **settings: Any) -> Outcome:
        config = small(peers=[f"{HERE}:quiet"] * 2, mixer="manifold-mixup", **settings)
        return pool.run(2, learn_together, config, tmp_path / name, None, None, None, False)[1]

    plain, compiled = learn("plain"), learn("compiled", compile=True)
    assert len(plain.epochs) == len(compiled.epochs) == 2
    for one, other in zip(plain.epochs, compiled.epochs, strict=True):
        assert other["train"]["loss"] == pytest.approx(one["train"]["loss"], rel=1e-3)
    assert all(graphs > 0 for graphs in pool.run(2, compiled_graphs))


@pytest.mark.parametrize("statistics", ["attention", "similarity"])
def test_peers_of_different_depth_compare_their_features(
    pool: Pool, small: Make, tmp_path: Path, statistics: str
) -> None:
    config = small(
        peers=["resnet8", "mobilenetv2"],
        epochs=1,
        batch_size=32,
        train_limit=32,
        image_size=16,
        statistics=statistics,
        statistics_weight=0.5,
        kd_warmup_epochs=0,
    )
    outcomes = pool.run(2, learn_together, config, tmp_path)
    splits = load_splits(config.dataset)
    networks = build_peers(config, classes=len(splits.classes), image_size=splits.train.image_size)
    shared = min(len(network.stage_names) for network in networks)
    for outcome in outcomes:
        train = outcome.epochs[0]["train"]
        assert len(train["attention_agreement"]) == shared
        assert train["statistics"] > 0
        expected = train["cross_entropy"] + train["kd"] + 0.5 * train["statistics"]
        assert train["loss"] == pytest.approx(expected, rel=1e-5)


def test_one_peer_learns_alone(pool: Pool, small: Make, tmp_path: Path) -> None:
    config = small(peers=[f"{HERE}:tiny"], distiller="none", epochs=1)
    (outcome,) = pool.run(1, learn_together, config, tmp_path)
    (row,) = outcome.epochs
    assert row["test"]["ensemble"] is None
    assert row["test"]["agreement"] is None
    assert row["train"]["kd"] == 0
    assert row["train"]["loss"] == row["train"]["cross_entropy"]


def test_undistilled_peers_learn_what_each_learns_alone(pool: Pool, small: Make, tmp_path: Path) -> None:
    names = [f"{HERE}:tiny", f"{HERE}:wide"]
    pair = small(peers=names, distiller="none", statistics="none", epochs=1)
    pool.run(2, learn_together, pair, tmp_path / "pair")
    alone = small(peers=names[:1], distiller="none", statistics="none", epochs=1)
    pool.run(1, learn_together, alone, tmp_path / "alone")
    one, two = (weights(tmp_path / folder, last(pair), 0) for folder in ("pair", "alone"))
    assert identical(one["network"], two["network"])


def test_reported_scores_are_those_of_the_checkpoint(pool: Pool, small: Make, tmp_path: Path) -> None:
    """Also with BatchNorm on two replicas, each of which has seen other images."""
    config = small(peers=["resnet8", f"{HERE}:dropping"], replicas=2, epochs=1, train_limit=200)
    outcomes = pool.run(4, learn_together, config, tmp_path)
    splits = load_splits(config.dataset)
    networks = build_peers(config, classes=len(splits.classes), image_size=splits.train.image_size)
    together = []
    for peer, network in enumerate(networks):
        network.network.load_state_dict(weights(tmp_path, last(config), peer)["network"])
        network.eval()
        with torch.inference_mode():
            together.append(probabilities_of(network, splits.test.images, splits.mean, splits.std, "float32"))
    rows = {seat: outcome.epochs[0] for seat, outcome in by_seat(outcomes).items()}
    for peer, probabilities in enumerate(together):
        sums = ScoreSums(torch.device("cpu"))
        sums.add(probabilities, splits.test.labels)
        for replica in range(2):
            own = rows[peer, replica]["test"]["own"]
            assert own["nll"] == pytest.approx(sums.scores().nll, rel=1e-4)
            assert own["top1"] == pytest.approx(sums.scores().top1)
    sums = ScoreSums(torch.device("cpu"))
    sums.add(torch.stack(together).mean(0), splits.test.labels)
    agreed = (together[0].argmax(1) == together[1].argmax(1)).float().mean()
    for row in rows.values():
        assert row["test"]["ensemble"]["nll"] == pytest.approx(sums.scores().nll, rel=1e-4)
        assert row["test"]["agreement"] == pytest.approx(float(agreed), abs=1e-6)
