import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from metamixer_ray.errors import DataError
from metamixer_ray.tracking.files import read_bytes, read_json, write_bytes, write_json
from metamixer_ray.tracking.journal import Journal
from tests.tracking.examples import make_rows

ROWS = make_rows(2, 4)


@pytest.fixture(params=["local", "subtree", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[fs.FileSystem, str]:
    if request.param == "local":
        return fs.LocalFileSystem(), str(tmp_path / "run" / "metrics.jsonl")
    if request.param == "subtree":
        return fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run/metrics.jsonl"
    return fs.PyFileSystem(fs.FSSpecHandler(MemoryFileSystem())), f"{tmp_path.name}/run/metrics.jsonl"


def test_rows_come_back_after_reopening(place: tuple[fs.FileSystem, str]) -> None:
    journal = Journal(*place)
    assert journal.rows() == []
    for row in ROWS:
        assert journal.append(row) == row
        assert Journal(*place).rows()[-1] == row
    assert Journal(*place).rows() == ROWS


def test_an_epoch_is_recorded_once(place: tuple[fs.FileSystem, str]) -> None:
    journal = Journal(*place)
    first = journal.append(ROWS[0])
    assert journal.append({**ROWS[0], "seconds": 99.0}) == first
    again = Journal(*place)
    assert again.append({**ROWS[0], "seconds": 99.0})["seconds"] == first["seconds"]
    data = read_bytes(*place)
    assert data is not None
    assert data.count(b"\n") == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_torn_anywhere_keeps_whole_rows_and_goes_on(data: st.DataObject) -> None:
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    cut = data.draw(st.integers(0, len(whole)))
    filesystem, path = fs.PyFileSystem(fs.FSSpecHandler(MemoryFileSystem())), "torn/metrics.jsonl"
    write_bytes(filesystem, path, whole[:cut])
    journal = Journal(filesystem, path)
    kept = len(journal.rows())
    assert journal.rows() == ROWS[:kept]
    assert whole[:cut].count(b"\n") <= kept <= whole[:cut].count(b"\n") + 1
    for row in ROWS:
        journal.append(row)
    assert read_bytes(filesystem, path) is not None
    assert Journal(filesystem, path).rows() == ROWS


def test_a_torn_local_file_is_repaired_by_who_writes_to_it_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    torn = json.dumps(ROWS[0]).encode() + b'\n{"epoch": 2, "peers": [{"na'
    path.write_bytes(torn)
    journal = Journal(fs.LocalFileSystem(), str(path))
    # Somebody may just be writing that line.
    assert journal.rows() == ROWS[:1]
    assert path.read_bytes() == torn
    journal.append(ROWS[1])
    assert [json.loads(text)["epoch"] for text in path.read_text().splitlines()] == [1, 2]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match=r"metrics\.jsonl: this is no file but a pipe"):
        Journal(fs.LocalFileSystem(), str(tmp_path / "metrics.jsonl"))


def test_zeros_after_a_power_cut_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + b"\0" * 100)
    assert Journal(fs.LocalFileSystem(), str(path)).rows() == ROWS[:1]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps(ROWS[0]) + "\n"
    path.write_text(line + "nonsense\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2.*remove the line"):
        Journal(fs.LocalFileSystem(), str(path))


def test_values_become_plain_json(tmp_path: Path) -> None:
    journal = Journal(fs.LocalFileSystem(), str(tmp_path / "metrics.jsonl"))
    row = journal.append({"epoch": np.int64(3), "peers": [{"loss": np.float32(0.5), "kd": math.nan, "maps": (1, 2)}]})
    assert row["peers"] == [{"loss": 0.5, "kd": None, "maps": [1, 2]}]
    assert row["time"] > 1.7e9
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_json_files_are_replaced_whole(place: tuple[fs.FileSystem, str]) -> None:
    filesystem, path = place
    assert read_json(filesystem, path) is None
    write_json(filesystem, path, {"a": [1, 2]})
    write_json(filesystem, path, {"b": "é"})
    assert read_json(filesystem, path) == {"b": "é"}
