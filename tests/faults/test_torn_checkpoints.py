"""Checkpoints that were damaged: the last good one is used, it is said which and why, and nothing else changes."""

import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from metamixer_ray.checkpoint import peer_files
from metamixer_ray.config import TrainConfig
from metamixer_ray.errors import CheckpointError
from metamixer_ray.folder import RunFolder, checkpoint_names
from metamixer_ray.restoring import newest_checkpoint
from tests.spine.pool import Pool
from tests.spine.test_worker import identical, weights
from tests.spine.training import Outcome, learn_together

HERE = "tests.spine.networks"
DAMAGES = ("cut", "flip", "empty", "remove", "swap")


def damage(checkpoint: Path, kind: str, dice: random.Random) -> str:
    """Damage one of the files of a checkpoint of two peers; tells which and how."""
    peer = dice.randrange(2)
    name = dice.choice(peer_files(peer))
    file = checkpoint / name
    content = bytearray(file.read_bytes())
    if kind == "cut":
        file.write_bytes(content[: dice.randrange(len(content))])
    elif kind == "flip":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "remove":
        file.unlink()
    else:
        file.write_bytes((checkpoint / peer_files(1 - peer)[peer_files(peer).index(name)]).read_bytes())
    return f"{kind} {name}"


@pytest.fixture(scope="module")
def config(small: Callable[..., TrainConfig]) -> TrainConfig:
    return small(peers=[f"{HERE}:tiny", f"{HERE}:wide"], checkpoint_seconds=1e-9)


@pytest.fixture(scope="module")
def whole(pool: Pool, config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed training that kept all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    pool.run(2, learn_together, config, folder)
    return folder


def resumed(pool: Pool, config: TrainConfig, whole: Path, folder: Path, names: list[str]) -> list[Outcome]:
    for name in names:
        if not (folder / name).exists():
            shutil.copytree(whole / name, folder / name)
    return pool.run(2, partial(learn_together, recorded=1), config, folder, names)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_ones_are_passed_over_and_named(
    pool: Pool, config: TrainConfig, whole: Path, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    names = checkpoint_names(RunFolder(str(whole)))[2:5]
    for name in names:
        shutil.copytree(whole / name, tmp_path / name)
    kinds = [damage(tmp_path / name, dice.choice(DAMAGES), dice) for name in names[:2]]
    outcomes = resumed(pool, config, whole, tmp_path, names)
    assert {o.ended for o in outcomes} == {"finished"}, kinds
    for outcome in outcomes:
        first, second = outcome.reports[0]["warnings"]
        for told, name in ((first, names[0]), (second, names[1])):
            assert re.match(rf"{name} is not whole: .*peer[01]\.(pt|json) .*; going on from {names[2]}$", told), kinds
    last = checkpoint_names(RunFolder(str(whole)))[0]
    for peer in range(2):
        one, two = (weights(folder, last, peer) for folder in (whole, tmp_path))
        assert all(identical(one[part], two[part]) for part in one.keys() - {"progress"}), kinds


def test_nothing_whole_is_an_error_where_epochs_are_on_record(
    pool: Pool, config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    (name,) = checkpoint_names(RunFolder(str(whole)))[:1]
    shutil.copytree(whole / name, tmp_path / name)
    (tmp_path / name / "peer1.pt").write_bytes(b"")
    for outcome in resumed(pool, config, whole, tmp_path, [name]):
        assert re.match(
            rf"refused: 1 epochs are on record, but there is no whole checkpoint .*{name} is not whole: .*peer1\.pt .*"
            "choose another --name",
            outcome.ended,
        )
    for outcome in resumed(pool, config, whole, tmp_path / "gone", []):
        assert "no whole checkpoint to go on from (there is none)" in outcome.ended


def test_a_first_one_that_never_was_whole_costs_nothing(
    pool: Pool, config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    # As a kill leaves it: one peer's files were there, the other's not yet.
    first, last = (checkpoint_names(RunFolder(str(whole)))[i] for i in (-1, 0))
    shutil.copytree(whole / first, tmp_path / first)
    (tmp_path / first / "peer1.json").unlink()
    for outcome in pool.run(2, learn_together, config, tmp_path, [first]):
        assert outcome.ended == "finished"
        assert outcome.reports[0]["warnings"][0].endswith("; starting anew")
    one, two = (weights(folder, last, 0) for folder in (whole, tmp_path))
    assert identical(one["network"], two["network"])


@pytest.fixture(scope="module")
def mixed(pool: Pool, config: TrainConfig, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose newest checkpoint is one peer's of another start of the workers, as a kill leaves it while one
    that had been passed over is overwritten."""
    newest, *_, oldest = checkpoint_names(RunFolder(str(whole)))
    again, folder = (tmp_path_factory.mktemp(name) for name in ("again", "mixed"))
    resumed(pool, config, whole, again, [oldest])
    shutil.copytree(again / newest, folder / newest)
    for file in peer_files(0):
        shutil.copy(whole / newest / file, folder / newest)
    return folder


def test_one_that_two_starts_wrote_is_passed_over(
    pool: Pool, config: TrainConfig, whole: Path, mixed: Path, tmp_path: Path
) -> None:
    newest, *_, oldest = checkpoint_names(RunFolder(str(whole)))
    shutil.copytree(mixed / newest, tmp_path / newest)
    for outcome in resumed(pool, config, whole, tmp_path, [newest, oldest]):
        assert outcome.ended == "finished"
        assert outcome.reports[0]["warnings"] == [
            f"{newest} is not whole: its peers' files were written before and after a restart; going on from {oldest}"
        ]


def test_what_reads_a_run_passes_it_over_too(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="peers' files were written before and after a restart"):
        newest_checkpoint(RunFolder(str(mixed)), 2, tmp_path / "scratch")
