"""Links in what somebody else made: none leads out of a run folder that is written to, or out of a tree of images."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from metamixer_ray.claiming import claimed
from metamixer_ray.config import from_settings
from metamixer_ray.data import DataConfig, load_splits
from metamixer_ray.errors import ConfigError, DataError
from metamixer_ray.export import ExportOptions, export_peer
from metamixer_ray.folder import RunFolder
from metamixer_ray.runs import journal_of
from tests.data.drawing import class_folders
from tests.spine.run_folder import make_run


def test_links_in_a_run_folder_are_read_but_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/notes").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/export").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run/config.yaml").symlink_to(tmp_path / "elsewhere/notes")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for folder in (RunFolder(str(tmp_path / "run")), RunFolder(str(tmp_path / "link"))):
        with pytest.raises(ConfigError, match=r"export/x\.onnx would be written outside .*remove the link"):
            folder.write("export/x.onnx", b"")
        folder.write("run.json", "{}")
        assert folder.read("export/notes") == b"theirs"
    folder.write("config.yaml", "ours")
    assert (tmp_path / "elsewhere/notes").read_text() == "theirs", "a link is replaced, not followed"
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["notes"]


@pytest.mark.parametrize("link", [".lock", "metrics.jsonl", "checkpoint-epoch0001", "baseline", "baseline/run.json"])
def test_a_run_folder_with_a_link_out_of_it_is_not_taken_up(tmp_path: Path, link: str) -> None:
    (tmp_path / "run/baseline").mkdir(parents=True)
    (tmp_path / "run/inner").symlink_to(tmp_path / "run/metrics.jsonl")
    with claimed(RunFolder(str(tmp_path / "run"))):
        pass
    if link in (".lock", "baseline"):
        path = tmp_path / "run" / link
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "run" / link).symlink_to(tmp_path / "theirs")
    with (
        pytest.raises(ConfigError, match=rf"run/{link} is a link that leads out of .*run: remove it"),
        claimed(RunFolder(str(tmp_path / "run"))),
    ):
        pass
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_record_that_is_a_link_to_nothing_makes_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    assert journal_of(RunFolder(str(tmp_path / "run"))).rows() == []
    assert not (tmp_path / "elsewhere").exists()


def tree(place: Path) -> DataConfig:
    class_folders(place / "set/train", 2)
    class_folders(place / "set/test", 2)
    class_folders(place / "other", 2, first=500)
    return DataConfig(data=str(place / "set"), cache_dir=str(place / "cache"))


@pytest.mark.parametrize("link", ["ant/x.png", "ant/deeper", "dog", "ant/up"])
def test_links_out_of_a_tree_of_images(tmp_path: Path, link: str) -> None:
    config = tree(tmp_path)
    targets = {"ant/x.png": "other/bee/000.png", "ant/deeper": "other/bee", "dog": "other/cow", "ant/up": ""}
    (tmp_path / "set/train" / link).symlink_to(tmp_path / targets[link])
    with pytest.raises(DataError, match=rf"train/{link}.*: a link leads out of the folder.*--follow-links"):
        load_splits(config)
    if link == "ant/x.png":
        followed = load_splits(from_settings({"data": config.data, "follow_links": True}).dataset)
        assert followed.train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_links_inside_a_tree_and_to_nothing(tmp_path: Path) -> None:
    config = tree(tmp_path)
    (tmp_path / "set/train/ant/self").symlink_to(tmp_path / "set/train/ant")
    (tmp_path / "set/train/ant/again.png").symlink_to(tmp_path / "set/test/ant/000.png")
    (tmp_path / "linked").symlink_to(tmp_path / "set")
    for data in ("set", "linked"):
        splits = load_splits(DataConfig(data=str(tmp_path / data), cache_dir=config.cache_dir))
        assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2], "a loop is gone through once"
    (tmp_path / "set/train/bee/gone.png").symlink_to(tmp_path / "set/nothing.png")
    with pytest.raises(DataError, match=r"gone\.png: the image can't be read .*mend or remove it"):
        load_splits(config)


def test_a_run_folder_with_a_link_out_of_it_gets_no_export(tmp_path: Path) -> None:
    folder, _, _ = make_run(tmp_path / "run", "resnet8")
    (tmp_path / "outside").mkdir()
    (tmp_path / "run/figures").symlink_to(tmp_path / "outside")
    options = ExportOptions(run="run", format="pt2")
    with pytest.raises(ConfigError, match=r"run/figures is a link that leads out of .*run: remove it"):
        export_peer(folder, options)
    assert not (tmp_path / "run/export").exists()
    export_peer(folder, replace(options, output=str(tmp_path / "mine/x.pt2")))
    assert (tmp_path / "mine/x.pt2").exists(), "nothing is written to the run then"


def test_a_link_in_the_place_of_a_file_in_the_making_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / f"run/.x.onnx.{os.getpid()}").symlink_to(tmp_path / "theirs")
    RunFolder(str(tmp_path / "run")).write("x.onnx", b"ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == {"x.onnx": "ours"}
