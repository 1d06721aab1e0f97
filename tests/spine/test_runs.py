"""Naming a run, and finding the one to go on with."""

from pathlib import Path
from typing import Any

import pytest

from metamixer_ray.config import TrainConfig, flatten, from_settings, read_yaml
from metamixer_ray.data import DataConfig, load_splits
from metamixer_ray.errors import ConfigError
from metamixer_ray.folder import RunFolder
from metamixer_ray.runs import RUN, SUMMARY, TRACKED, Run, create_run, default_name, open_run, read_config, storage_of
from metamixer_ray.train import with_absolute_paths


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def made(config: TrainConfig) -> Run:
    """Open a run, and create it when it is new, as a training does."""
    run = open_run(config)
    if run.new:
        create_run(run, config, load_splits(config.dataset))
    return run


def wanted(storage: Path, **settings: Any) -> TrainConfig:
    return from_settings({"storage": str(storage), **settings})


def created(storage: Path, name: str, when: str, **settings: Any) -> None:
    """A run of that name, begun at ``when``."""
    run = made(wanted(storage, name=name, **settings))
    run.folder.write_json(RUN, {"key": f"key-{name}", "created": when})


def test_a_new_run_writes_what_it_takes_to_repeat_it(storage: Path) -> None:
    config = wanted(storage, name="one", seed=3, verbose=True)
    run = made(config)
    assert (run.name, run.folder.local) == ("one", storage / "one")
    repeated = flatten(read_yaml(storage / "one" / "config.yaml"))
    assert repeated == flatten(config) | {"name": None, "resume": False, "resume_or_start": False}
    assert len(run.key) >= 16
    assert made(wanted(storage, name="two")).key != run.key


def test_a_taken_name_is_refused_and_nothing_is_touched(storage: Path) -> None:
    made(wanted(storage, name="one"))
    before = {p.name: p.read_bytes() for p in (storage / "one").iterdir()}
    with pytest.raises(ConfigError, match=r"--name 'one' is taken .*--resume"):
        made(wanted(storage, name="one", seed=5))
    assert {p.name: p.read_bytes() for p in (storage / "one").iterdir()} == before


def test_a_run_is_resumed_by_its_name(storage: Path) -> None:
    first = made(wanted(storage, name="one"))
    made(wanted(storage, name="two"))
    again = made(wanted(storage, name="one", resume=True, verbose=True, loader_processes=2))
    assert (again.name, again.key) == ("one", first.key)


def test_a_name_that_is_not_there_cannot_be_resumed(storage: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run 'one'"):
        made(wanted(storage, name="one", resume=True))
    assert not (storage / "one").exists()


def test_a_command_that_is_repeated_starts_a_run_and_then_goes_on_with_it(storage: Path) -> None:
    first = made(wanted(storage, name="one", resume_or_start=True))
    again = made(wanted(storage, name="one", resume_or_start=True))
    assert (first.new, again.new) == (True, False)
    assert again.key == first.key
    with pytest.raises(ConfigError, match="seed is 5 but run 'one' has 0"):
        made(wanted(storage, name="one", resume_or_start=True, seed=5))


def test_without_a_name_it_goes_on_with_what_is_unfinished(storage: Path) -> None:
    first = made(wanted(storage, resume_or_start=True))
    assert made(wanted(storage, resume_or_start=True)).key == first.key
    first.folder.write_json(SUMMARY, {})
    # MLflow hasn't got everything yet.
    assert made(wanted(storage, resume_or_start=True)).key == first.key
    first.folder.write(TRACKED, "")
    assert made(wanted(storage, resume_or_start=True)).new


def test_who_asks_to_resume_gets_no_new_run(storage: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run 'one'"):
        made(wanted(storage, name="one", resume=True, resume_or_start=True))


def test_other_settings_are_named(storage: Path) -> None:
    made(wanted(storage, name="one"))
    with pytest.raises(ConfigError, match=r"temperature is 5.0 but run 'one' has 3.0.*config\.yaml"):
        made(wanted(storage, name="one", resume=True, temperature=5.0))


def test_without_a_name_the_newest_unfinished_run_of_these_settings_goes_on(storage: Path) -> None:
    created(storage, "oldest", "2026-01-01T00:00:00+0000")
    created(storage, "newest", "2026-01-03T00:00:00+0000")
    created(storage, "middle", "2026-01-02T00:00:00+0000")
    created(storage, "other-seed", "2026-01-04T00:00:00+0000", seed=1)
    created(storage, "finished", "2026-01-05T00:00:00+0000")
    RunFolder(str(storage / "finished")).write_json(SUMMARY, {})
    RunFolder(str(storage / "finished")).write(TRACKED, "")
    (storage / "broken").mkdir()
    (storage / "broken" / "config.yaml").write_text("no_such_setting: 1\n")
    (storage / "empty").mkdir()
    assert made(wanted(storage, resume=True)).name == "newest"
    assert made(wanted(storage, resume=True, seed=1)).key == "key-other-seed"
    with pytest.raises(ConfigError, match="no unfinished run of this configuration"):
        made(wanted(storage, resume=True, seed=2))


@pytest.mark.parametrize("content", ["a: [1", "- 1\n", "", "\x00"])
def test_a_damaged_neighbour_does_not_keep_a_run_from_going_on(storage: Path, content: str) -> None:
    made(wanted(storage, name="one"))
    (storage / "broken").mkdir()
    (storage / "broken" / "config.yaml").write_text(content)
    assert made(wanted(storage, resume=True)).name == "one"


def test_a_folder_without_a_run_has_no_configuration(storage: Path) -> None:
    assert read_config(RunFolder(str(storage))) is None


def test_storage_is_never_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAMIXER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("METAMIXER_STORAGE", raising=False)
    assert storage_of(TrainConfig()).local == tmp_path / "home" / "runs"
    monkeypatch.setenv("METAMIXER_STORAGE", str(tmp_path / "elsewhere"))
    assert storage_of(TrainConfig()).local == tmp_path / "elsewhere"
    assert storage_of(wanted(tmp_path / "said")).local == tmp_path / "said"


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({}, "resnet14-resnet8-metamixer-dml-digits-"),
        ({"data": "/a/b/train.parquet"}, "resnet14-resnet8-metamixer-dml-train-"),
        ({"data": "s3://bucket/cifar/"}, "resnet14-resnet8-metamixer-dml-cifar-"),
        ({"peers": ["my.nets:small", "a/b c"]}, "my.nets_small-a_b_c-metamixer-"),
        ({"peers": ["resnet14"] * 50}, "resnet14-resnet14-"),
    ],
)
def test_a_default_name_can_name_a_folder(settings: dict[str, Any], start: str) -> None:
    name = default_name(from_settings(settings))
    assert name.startswith(start)
    assert len(name) <= 120
    from_settings({"name": name}).check()


def test_paths_are_made_absolute_before_workers_see_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()

    def data(**settings: str) -> DataConfig:
        return with_absolute_paths(from_settings(settings)).dataset

    assert data(data="set").data == str(tmp_path / "set")
    assert data(data="*.parquet", test_data="test-?.pq").data == str(tmp_path / "*.parquet")
    assert data(data="*.parquet", test_data="test-?.pq").test_data == str(tmp_path / "test-?.pq")
    # Folders that aren't there yet.
    assert data(cache_dir="cache", data="cifar10", data_root="root").cache_dir == str(tmp_path / "cache")
    assert data(cache_dir="cache", data="cifar10", data_root="root").data_root == str(tmp_path / "root")
    for name in ("digits", "cifar10", "my.parts:load", "s3://bucket/*.parquet", "cifar11"):
        assert data(data=name).data == name
