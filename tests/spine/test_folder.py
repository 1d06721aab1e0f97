"""The run folder, by path and by URI."""

from pathlib import Path

import pytest
from pyarrow import fs

from metamixer_ray.errors import ConfigError
from metamixer_ray.folder import RunFolder

ODD = ["plain", "with space", "ünïcode", "100%", "a#b", "a+b=c"]


@pytest.mark.parametrize("name", ODD)
def test_a_path_is_kept_as_it_is(tmp_path: Path, name: str) -> None:
    folder = RunFolder(str(tmp_path / name))
    folder.create()
    folder.write("a.txt", "x")
    assert (tmp_path / name / "a.txt").read_text() == "x"
    assert folder.local == tmp_path / name
    assert folder.name == name
    assert str(folder) == str(tmp_path / name)


@pytest.mark.parametrize("spelling", ["path", "uri", "slash"])
def test_files_and_folders(tmp_path: Path, spelling: str) -> None:
    place = tmp_path / "runs"
    uri = {"path": str(place), "uri": place.as_uri(), "slash": f"{place}/"}[spelling]
    runs = RunFolder(uri)
    assert runs.children() == []
    run = runs.inside("b")
    assert run.read("x.json") is None
    assert run.read_json("x.json") is None
    assert not run.exists("x.json")
    run.create()
    run.create()
    runs.inside("a").create()
    assert runs.children() == ["a", "b"]
    run.write_json("x.json", {"ü": [1, None]})
    assert run.read_json("x.json") == {"ü": [1, None]}
    run.write("x.json", b"{}")
    assert run.read("x.json") == b"{}"
    assert run.exists("x.json")
    assert run.children() == []
    assert [p.name for p in (place / "b").iterdir()] == ["x.json"]
    assert run.name == "b"
    assert run.fetch("checkpoint", tmp_path / "unused") == place / "b" / "checkpoint"


def test_a_folder_elsewhere_is_copied(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "store"))
    folder.create()
    folder.inside("checkpoint").create()
    folder.inside("checkpoint").write("peer0.pt", b"\0\1")

    class Elsewhere(RunFolder):
        """The same files, without telling that they are at hand."""

        local = None

    target = Elsewhere(str(tmp_path / "store")).fetch("checkpoint", tmp_path / "target")
    assert target == tmp_path / "target"
    assert (target / "peer0.pt").read_bytes() == b"\0\1"


def test_a_part_of_a_filesystem_is_local_too(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.filesystem, folder.root = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run"
    folder.create()
    folder.write_json("a.json", {"a": 1})
    assert folder.local == tmp_path / "run"
    assert (tmp_path / "run" / "a.json").exists()


def test_a_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/runs").local == tmp_path / "runs"


@pytest.mark.parametrize("uri", ["nowhere://bucket/x", "s3://"])
def test_what_pyarrow_does_not_know_is_told(uri: str) -> None:
    with pytest.raises(ConfigError, match=f"--storage {uri}"):
        RunFolder(uri)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--storage .*can't be written"):
        RunFolder(str(tmp_path / "file" / "runs")).create()


def test_a_secret_in_the_uri_is_not_told() -> None:
    folder = RunFolder("s3://ann:secret@bucket/runs?region=us-east-1")
    assert "secret" in folder.inside("one").uri
    assert str(folder.inside("one")) == "s3://***@bucket/runs/one?region=us-east-1"
    with pytest.raises(ConfigError, match=r"\*\*\*@bucket") as caught:
        RunFolder("nowhere://ann:secret@bucket/runs")
    assert "secret" not in str(caught.value)
