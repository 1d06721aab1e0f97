"""Nothing that is read can run code: files that would if anything unpickled them; and paths that lead elsewhere."""

import ast
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs

import metamixer_ray
from metamixer_ray.comparison.methods import read_method
from metamixer_ray.config import from_settings, read_yaml
from metamixer_ray.data import DataConfig, load_splits
from metamixer_ray.errors import ConfigError, DataError, UserError
from metamixer_ray.evaluate import evaluate_run, write_report
from metamixer_ray.export import load_network
from metamixer_ray.folder import RunFolder
from metamixer_ray.networks import build_network
from metamixer_ray.networks.config import NetworkConfig
from metamixer_ray.runs import open_run, read_config
from metamixer_ray.tracking import Journal
from metamixer_ray.trained import find_run, open_trained
from metamixer_ray.tune import read_point
from tests.data.drawing import drawn_set, encoded, picture, write_parquet
from tests.spine.run_folder import make_run


class Bomb:
    """Runs a program where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Is there once something ran."""
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb works"
    marker.unlink()
    return marker


FORBIDDEN = {"eval", "exec", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "system"}
BETWEEN_OWN_PROCESSES = {"data/helpers.py"}
"""Pickles only what goes over the nameless connection between a process and those that it forked."""


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    package = Path(metamixer_ray.__path__[0])
    files = set(package.rglob("*.py"))
    own = {package / name for name in BETWEEN_OWN_PROCESSES}
    assert own < files
    for path in files - own:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not names & FORBIDDEN, path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN | {"os.system", "os.popen"}, path
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called != "torch.load" or given.get("weights_only") == "True", path
            assert given.get("allow_pickle", "False") == "False", path
            assert not called.endswith(("_object", "_object_list")), f"{path}: torch pickles what it gathers so"
            assert called not in ("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"), path


YAML = "epochs: !!python/object/apply:os.system ['touch {marker}']\n"
READERS: dict[str, Callable[[Path], Any]] = {
    "--config": read_yaml,
    "--first": read_point,
    "run": lambda path: read_config(RunFolder(str(path.parent))),
    "--methods": lambda path: read_method(f"dml+kd_weight={path.read_text().partition(' ')[2].strip()}"),
}


@pytest.mark.parametrize("reader", READERS)
def test_yaml_makes_no_objects(tmp_path: Path, marker: Path, reader: str) -> None:
    (tmp_path / "config.yaml").write_text(YAML.format(marker=marker))
    with pytest.raises(ConfigError, match=r"(?s)is not (YAML: could not determine a constructor|a value; a list is)"):
        READERS[reader](tmp_path / "config.yaml")
    assert not marker.exists()


ENDLESS = ", ".join(
    f"&{name} [{', '.join([before] * 9)}]"
    for before, name in zip(["x", *(f"*{c}" for c in "abcdefg")], "abcdefgh", strict=True)
)
TEXTS = {
    "a billion words": f"dataset: [{ENDLESS}]\n",
    "itself": "peers: &a [*a]\n",
    "deep": "peers: " + "[" * 3_000,
    "no such day": "epochs: 2001-13-45\n",
    "no number": "epochs: !!int x\n",
    "too long a number": f"epochs: {'9' * 5000}\n",
    "no text": "\xff\x00",
    "a list": "- epochs\n",
}


@pytest.mark.parametrize("text", TEXTS)
def test_yaml_that_is_no_settings_ends_in_a_short_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(TEXTS[text].encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.yaml") as raised:
        read_yaml(path)
    assert len(str(raised.value)) < 2000


def test_an_exported_file_that_is_a_pickle(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "network.safetensors"
    for content in (pickle.dumps(Bomb(marker)), b"", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="can't be read as safetensors"):
            load_network(path)
    torch.save(Bomb(marker), path)
    with pytest.raises(ConfigError, match="can't be read as safetensors"):
        load_network(path)
    assert not marker.exists()


CARD = {
    "network": "resnet8",
    "network_options": json.dumps({"small_stem": "auto", "stage_names": None}),
    "classes": '["a", "b"]',
    "mean": "[0.5, 0.5, 0.5]",
    "std": "[0.5, 0.5, 0.5]",
    "image_size": "8",
    "source": "run x",
}
HOSTILE_CARDS = (
    {"image_size": "1000000000"},
    {"image_size": '"8"x'},
    {"classes": "[]"},
    {"classes": "[" * 100_000},
    {"mean": "[0.5]"},
    {"std": "[0, 0, 0]"},
    {"mean": "[NaN, 0, 0]"},
    {"network_options": "[]"},
    {"network_options": '{"small_stem": "' + "x" * 10 + '"}'},
    {"network": "../../x:y"},
    {"network": "no-such-network"},
    {},
)


@pytest.mark.parametrize("changes", HOSTILE_CARDS)
def test_an_exported_file_that_tells_nonsense(tmp_path: Path, changes: dict[str, str]) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "network.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={**CARD, **changes})
    with pytest.raises(ConfigError):
        load_network(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _, _ = make_run(tmp_path_factory.mktemp("runs") / "one", "tests.spine.networks:tiny")
    assert folder.local is not None
    return folder.local


RUN_FILES: dict[str, list[bytes]] = {
    "run.json": [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b"{}",
        b'{"classes": 3}',
        b'{"classes": [], "mean": [0, 0, 0], "std": [1, 1, 1], "image_size": 8, "data_fingerprint": ""}',
        b'{"classes": ["a"], "mean": [0], "std": [1], "image_size": 8, "data_fingerprint": ""}',
        b'{"classes": ["a"], "mean": [0, 0, 0], "std": [0, 1, 1], "image_size": 8, "data_fingerprint": ""}',
        b'{"classes": ["a"], "mean": [0, 0, 0], "std": [1, 1, 1], "image_size": 1e9, "data_fingerprint": ""}',
        b'{"classes": [{}], "mean": [NaN, 0, 0], "std": [1, 1, 1], "image_size": 8, "data_fingerprint": 7}',
    ],
    "config.yaml": [b"[]", b"\xff\x00", b"peers: [[]]", b"image_size: -1", b"nothing: 1", b"peers: ['os:nothing']"],
}
CONTENTS = [(name, content) for name, contents in RUN_FILES.items() for content in contents]


@pytest.mark.parametrize(("name", "content"), CONTENTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CONTENTS)])
def test_a_run_whose_files_are_not_what_was_written(trained: Path, tmp_path: Path, name: str, content: bytes) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for path in trained.iterdir():
        (run / path.name).symlink_to(path)
    (run / name).unlink()
    (run / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        evaluate_run(RunFolder(str(run)))
    assert len(str(raised.value)) < 2000
    if name == "run.json":
        assert f"{run}/run.json is torn or changed" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_summary_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"summary\.json is torn or changed .*put back the file"):
        RunFolder(str(tmp_path)).read_json("summary.json")


@pytest.mark.parametrize("streaming", ["no", "yes"])
def test_a_cache_of_pickles_is_made_again(tmp_path: Path, marker: Path, streaming: str) -> None:
    config = DataConfig(
        data=str(drawn_set(tmp_path / "set")),
        streaming=streaming,  # type: ignore[arg-type]
        image_size=8,
        cache_dir=str(tmp_path / "cache"),
    )
    right = load_splits(config)
    bomb = np.array([Bomb(marker)], dtype=object)
    for path in [*(tmp_path / "cache").glob("set-*/*.npz"), *(tmp_path / "cache").glob("set-*/*.arrow")]:
        if path.suffix == ".npz":
            np.savez(path, facts=bomb, labels=bomb, in_file=bomb, number=bomb, rows=bomb, bytes=bomb)
        else:
            # A file in use is mapped: it is never written again, but replaced.
            path.with_name("new").write_bytes(pickle.dumps(Bomb(marker)))
            path.with_name("new").replace(path)
    again = load_splits(config)
    assert not marker.exists()
    assert again.fingerprint == right.fingerprint
    assert torch.equal(again.train.take(torch.arange(9)), right.train.take(torch.arange(9)))


def test_a_named_set_of_other_pickles(tmp_path: Path, marker: Path) -> None:
    place = tmp_path / "root/cifar-10-batches-py"
    place.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (place / name).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(DataError, match=r"--data-root .*incomplete or damaged"):
        load_splits(DataConfig(data="cifar10", data_root=str(tmp_path / "root"), cache_dir=str(tmp_path / "cache")))
    assert not marker.exists()


def test_a_parquet_file_with_a_type_of_its_own(tmp_path: Path, marker: Path) -> None:
    drawn_set(tmp_path / "set")
    table = pq.read_table(tmp_path / "set/train.parquet")
    extension = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Bomb(marker)),
    }
    fields = [field.with_metadata(extension) for field in table.schema]
    pq.write_table(table.cast(pa.schema(fields, metadata=table.schema.metadata)), tmp_path / "set/train.parquet")
    for streaming in ("no", "yes"):
        config = DataConfig(
            data=str(tmp_path / "set"),
            streaming=streaming,  # type: ignore[arg-type]
            image_size=8,
            cache_dir=str(tmp_path / "cache"),
        )
        assert len(load_splits(config).train) == 30
    assert not marker.exists()


@pytest.mark.parametrize("streaming", ["no", "yes"])
def test_the_path_beside_an_image_is_never_opened(tmp_path: Path, streaming: str) -> None:
    picture(0).save(tmp_path / "secret.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": encoded(picture(i)), "path": f"{tmp_path}/secret.png"} for i in range(12)]
    rows[8]["bytes"] = None
    for part in ("train", "test"):
        write_parquet(tmp_path / f"set/{part}.parquet", [], [])
        table = pa.table({"image": pa.array(rows, kind), "label": [i % 3 for i in range(12)]})
        pq.write_table(table, tmp_path / f"set/{part}.parquet")
    with pytest.raises(DataError, match=r"row 8: .*no image bytes are stored here"):
        load_splits(
            DataConfig(
                data=str(tmp_path / "set"),
                streaming=streaming,  # type: ignore[arg-type]
                image_size=8,
                cache_dir=str(tmp_path / "cache"),
            )
        )


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "", "a/b", "a\\b", "/tmp/x", "%2e%2e", "a?b", "a#b", "a\nb", "\ud800", "x" * 300]
)
def test_a_name_is_that_of_a_folder_in_the_storage(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"--name .* can't name a folder in --storage"):
        from_settings({"name": name, "storage": str(tmp_path / "runs")}).check()


def test_names_that_are_fine(tmp_path: Path) -> None:
    for name in ("two words", "größe-1", "a.b", ".hidden", "run=1,lr=0.1"):
        config = from_settings({"name": name, "storage": str(tmp_path / "runs")})
        config.check()
        run = open_run(config)
        assert run.folder.local == tmp_path / "runs" / name


ODD_NAMES = ("../../x", "a/b", "$\\frac{$ $x$", "\x1b[2J\nb", "\ud800", "x" * 5000, "/etc/passwd")


def test_class_names_are_only_shown(tmp_path: Path) -> None:
    images = [encoded(picture(i)) for i in range(70)]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"set/{part}.parquet", images, [i % 7 for i in range(70)], names=ODD_NAMES)
    folder, _, _ = make_run(tmp_path / "run", "tests.spine.networks:tiny", data=str(tmp_path / "set"))
    before = set(tmp_path.iterdir())
    scores = evaluate_run(folder)
    write_report(RunFolder(str(tmp_path / "report")), scores)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "report"}
    assert {path.suffix for path in (tmp_path / "report").iterdir()} == {".png", ".json"}
    assert not set(json.dumps(scores["per_class"], ensure_ascii=False)) & {"\x1b", "\ud800"}


@pytest.mark.parametrize(
    "peer", ["../../x:y", "a/../../b:f", "/tmp/x:f", ".:f", "..:f", "a b:c d", ":", "a:", "x\ny:f", "os:.."]
)
def test_odd_plug_ins_are_not_found(tmp_path: Path, peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "x.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="--peers"):
        build_network(peer, classes=3, image_size=8, config=NetworkConfig())
    with pytest.raises(UserError, match="--data"):
        load_splits(DataConfig(data=peer, cache_dir=str(tmp_path / "cache")))


def test_a_run_is_looked_for_by_its_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAMIXER_STORAGE", str(tmp_path / "runs"))
    for text in ("../x", "a?b", "a b"):
        with pytest.raises(ConfigError, match="there is no run"):
            open_trained(find_run(text))


@pytest.mark.parametrize(
    "line",
    [b"x", b"[]", b'{"epoch": true}', b'{"epoch": 2, "x": NaN}', b'{"epoch": 2, "x": "\\ud800"}', b"[" * 100_000],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: bytes) -> None:
    row = b'{"epoch": 1, "x": 0.5}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(row + line + b"\n" + row.replace(b"1", b"3"))
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: this is not a row of metrics; remove"):
        Journal(fs.LocalFileSystem(), str(path))
    path.write_bytes(row + line)
    assert [row["epoch"] for row in Journal(fs.LocalFileSystem(), str(path)).rows()] == [1], "the last may be torn"
