"""Checkpoints that were damaged: the last good one is used, it is said which and why, and nothing else changes."""

import errno
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from metamixer_ray import checkpoint, restoring
from metamixer_ray.checkpoint import peer_files
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import Splits
from metamixer_ray.errors import CheckpointError, StorageFailed
from metamixer_ray.folder import RunFolder, checkpoint_names
from metamixer_ray.keeping import Keeper
from metamixer_ray.patience import insist
from metamixer_ray.preparation import build_peers
from metamixer_ray.restoring import newest_checkpoint
from metamixer_ray.runs import Run, read_config
from metamixer_ray.tracking import Console
from metamixer_ray.trained import open_trained
from tests.spine import training
from tests.spine.pool import Pool
from tests.spine.run_folder import make_run
from tests.spine.test_worker import identical, weights
from tests.spine.training import FolderSession, Outcome, learn_together

HERE = "tests.spine.networks"
DAMAGES = ("cut", "flip", "empty", "remove", "swap", "folder", "pipe")
HASH = checkpoint._hash


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
    elif kind in ("remove", "folder", "pipe"):
        file.unlink()
        if kind == "folder":
            (file / "inner").mkdir(parents=True)
        elif kind == "pipe":
            os.mkfifo(file)
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


@pytest.mark.parametrize("seed", range(6))
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


@pytest.fixture
def names(whole: Path, tmp_path: Path) -> list[str]:
    """Two checkpoints from the midst of the training, newest first, also in ``tmp_path``."""
    chosen = checkpoint_names(RunFolder(str(whole)))[2:4]
    for name in chosen:
        shutil.copytree(whole / name, tmp_path / name)
    return chosen


class FarAway(FolderSession):
    """A session over a store that doesn't give one of the checkpoints, and what was asked of it."""

    gone, asked = "", list[str]()

    def fetch(self, name: str, peers: Sequence[int]) -> Path:
        self.asked.append(name)
        if name == self.gone:
            raise OSError("no answer")
        return super().fetch(name, peers)


def learn_far_away(gone: str, config: TrainConfig, folder: Path, names: list[str]) -> tuple[Outcome, list[str]]:
    """The job of one rank: :func:`learn_together`, where the last rank is not given a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoring, "BRIEF_PATIENCE", 0.0)
        patch.setattr(FarAway, "gone", gone if dist.get_rank() == 1 else "")
        patch.setattr(FarAway, "asked", [])
        patch.setattr(training, "FolderSession", FarAway)
        return learn_together(config, folder, names, recorded=1), FarAway.asked


def test_one_that_cannot_be_fetched_is_passed_over_for_an_older_one(
    pool: Pool, config: TrainConfig, tmp_path: Path, names: list[str]
) -> None:
    for outcome, asked in pool.run(2, learn_far_away, names[0], config, tmp_path, names):
        assert (outcome.ended, asked) == ("finished", names)
        (told,) = outcome.reports[0]["warnings"]
        assert told == f"{names[0]} is not whole: it can't be read (no answer); going on from {names[1]}"


class BadDisk:
    """Sectors that can't be read, in the files of a checkpoint whose paths have a word in them.

    Args:
        tries: how many of them fail; None: all.
    """

    def __init__(self, word: str, tries: int | None = None) -> None:
        self._word, self._left = word, tries

    def hash(self, path: Path) -> str:
        if self._word in str(path) and self._left != 0:
            self._left = None if self._left is None else self._left - 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return HASH(path)


def learn_from_a_bad_disk(
    word: str, rank: int, tries: int | None, config: TrainConfig, folder: Path, names: list[str]
) -> tuple[Outcome, list[str]]:
    """The job of one rank: :func:`learn_together`, where ``rank`` has a bad disk; and what it said of its storage."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoring, "BRIEF_PATIENCE", 0.0)
        patch.setattr(
            FolderSession, "persist", lambda _, work, what: insist(work, f"{what} can't be read", 60.0, said.append)
        )
        if dist.get_rank() == rank:
            patch.setattr(checkpoint, "_hash", BadDisk(word, tries).hash)
            # What it writes, it reads again for its checksum.
            patch.setattr(checkpoint.Snapshot, "write", lambda *_: None)
        return learn_together(config, folder, names, recorded=1), said


def test_one_that_storage_does_not_give_is_passed_over_for_an_older_one(
    pool: Pool, config: TrainConfig, tmp_path: Path, names: list[str]
) -> None:
    for outcome, said in pool.run(2, partial(learn_from_a_bad_disk, names[0], 1, None), config, tmp_path, names):
        assert (outcome.ended, said) == ("finished", [])
        (told,) = outcome.reports[0]["warnings"]
        assert re.match(
            rf"{names[0]} is not whole: .*{names[0]}/peer1\.pt can't be read \(Input/output error\); going on from "
            rf"{names[1]}$",
            told,
        )


def test_all_wait_together_where_there_is_no_older_one(
    pool: Pool, config: TrainConfig, tmp_path: Path, names: list[str]
) -> None:
    # Both checkpoints, twice.
    for outcome, said in pool.run(2, partial(learn_from_a_bad_disk, "peer0.pt", 0, 4), config, tmp_path, names):
        assert outcome.ended == "finished"
        assert (outcome.reports[0]["event"], outcome.reports[0]["warnings"]) == ("restored", [])
        (told,) = said
        assert re.match(
            r"the run's checkpoints can't be read \(.*peer0\.pt can't be read \(Input/output error\)\); it is tried",
            told,
        )


def test_what_reads_a_run_takes_an_older_one_or_insists(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "BRIEF_PATIENCE", 0.0)
    newest, second, *_ = checkpoint_names(RunFolder(str(whole)))
    monkeypatch.setattr(checkpoint, "_hash", BadDisk(newest).hash)
    content, (problem,) = newest_checkpoint(RunFolder(str(whole)), 2, tmp_path)
    assert content[0]["progress"] == weights(whole, second, 0)["progress"]
    assert re.match(rf"{newest} is not whole: .* can't be read \(Input/output error\); {second} is used", problem)
    with pytest.raises(OSError, match=rf"Input/output error: '.*{newest}/peer0\.pt'"):
        newest_checkpoint(RunFolder(str(whole)), 2, tmp_path, insisting=True)
    monkeypatch.setattr(checkpoint, "_hash", BadDisk("peer1").hash)
    with pytest.raises(CheckpointError, match=rf"{newest}/peer1\.pt can't be read"):
        newest_checkpoint(RunFolder(str(whole)), 2, tmp_path)


def test_a_blip_is_not_even_told(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_hash", BadDisk("peer1", tries=1).hash)
    _, problems = newest_checkpoint(RunFolder(str(whole)), 2, tmp_path)
    assert problems == []


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, Splits]:
    """A run with two checkpoints, and its data."""
    folder, _, splits = make_run(tmp_path / "run", "resnet8")
    shutil.copytree(tmp_path / "run/checkpoint-epoch0001", tmp_path / "run/checkpoint-epoch0002")
    return folder, splits


@pytest.mark.parametrize("name", peer_files(0))
def test_a_pipe_in_a_strangers_run_holds_nobody_up(
    run: tuple[RunFolder, Splits], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder, _ = run
    for told in ("checkpoint-epoch0002", "checkpoint-epoch0001"):
        (tmp_path / "run" / told / name).unlink()
        os.mkfifo(tmp_path / "run" / told / name)
        if told == "checkpoint-epoch0002":
            assert open_trained(folder).names == ["peer0-resnet8"]
            assert f"{told}/{name} is no file but a folder, a pipe or a device" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=rf"{name} is no file but"):
        open_trained(folder)


def test_what_is_kept_of_a_training_waits_for_its_last_checkpoint(
    run: tuple[RunFolder, Splits], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, splits = run
    monkeypatch.setattr(restoring, "BRIEF_PATIENCE", 0.0)

    def load(patience: float) -> str:
        config = read_config(folder)
        assert config is not None
        config = replace(config, run=replace(config.run, storage_patience=patience))
        networks = build_peers(config, classes=len(splits.classes), image_size=8)
        nobody = cast(Any, None)
        Keeper(config, Run(folder, "key"), nobody, nobody, Console()).load(splits, networks)
        return "".join(capsys.readouterr())

    monkeypatch.setattr(checkpoint, "_hash", BadDisk("epoch0002", tries=1).hash)
    told = load(60.0)
    assert "the last checkpoint in" in told
    assert "is used instead" not in told
    monkeypatch.setattr(checkpoint, "_hash", BadDisk("epoch0002").hash)
    assert "checkpoint-epoch0001 is used instead" in " ".join(load(0.0).split())
    monkeypatch.setattr(checkpoint, "_hash", BadDisk("peer0").hash)
    with pytest.raises(StorageFailed, match=r"Input/output error.*checkpoint-epoch0002/peer0\.pt"):
        load(0.0)
