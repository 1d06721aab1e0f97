"""The bench keeps working: what it counts is asserted, what it times only runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import classes_batch, limit, peers, report
from tests.bench.command import MARKS, mark
from tests.bench.epoch import parts_of, shares
from tests.bench.start import split


@pytest.mark.parametrize(("batch", "classes"), [(32, 10), (16, 20)])
def test_a_step_is_one_collective_of_the_designed_bytes(batch: int, classes: int) -> None:
    told = classes_batch.count(batch, classes, steps=3)
    assert len(told) == classes_batch.PEERS
    for calls, sent, steps in told:
        assert steps == 3
        assert calls == {"all_reduce": 3}
        assert sent == classes_batch.designed(batch, classes)


def test_what_a_worker_sends_does_not_grow_with_the_peers() -> None:
    kind = replace(peers.TINY_PEERS, sizes=(2, 3), steps=2)
    rows = peers.measure(1, kinds=(kind,))
    sent = [row for row in rows if "bytes sent" in row.what]
    assert [row.ours for row in sent] == [sent[0].ours] * 2
    assert [row.other for row in sent] == [sent[0].ours, 2 * sent[0].ours]
    assert all(row.ours > 0 for row in rows)


def test_a_timed_section_gives_its_rows(tmp_path: Path) -> None:
    settings = {"peers": ["resnet8", "resnet8"], "batch_size": 8, "precision": "float32"}
    rows = limit.measure(2, settings, steps=3, image_size=8)
    assert rows[0].versus == "bare loop"
    assert rows[0].low is not None
    assert rows[0].ratio is not None
    assert rows[0].high is not None
    assert rows[0].low <= rows[0].ratio <= rows[0].high
    whats = [row.what for row in rows]
    assert all(any(what.endswith(part) for what in whats) for part in limit.WATCHED)
    # Each part was met, so nothing that is watched has moved away.
    assert all(row.ours > 0 for row in rows)
    header = report.machine(2)
    report.show(header, rows)
    report.write_json(tmp_path / "bench.json", header, rows)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["what"] for row in written["rows"]] == whats
    assert written["machine"]["packages"]["torch"]


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    row = report.compared("limit", "x", [1.0, 4.0, 9.0], "y", [1.0, 2.0, 3.0], "s")
    assert (row.ours, row.other, row.ratio, row.low, row.high) == (4.0, 2.0, 2.0, 1.0, 3.0)


def test_the_parts_of_a_start_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARKS, str(tmp_path / "marks.jsonl"))
    for number, name in enumerate(("imports", "data", "Ray"), start=1):
        mark(name, number, number + 0.5)
    mark("fit", 5, 30)
    for rank, late in ((0, 0.0), (1, 2.0)):
        for number, name in enumerate(("worker's imports", "load_splits", "set_up", "first step"), start=10):
            mark(name, number, number + 0.75 + late, rank)
    marks = [json.loads(line) for line in (tmp_path / "marks.jsonl").read_text().splitlines()]
    parts = split(0.0, marks)
    assert sum(parts.values()) == pytest.approx(13.75 + 2.0)
    assert parts["data, driver"] == 0.5


def test_shares_of_an_epoch() -> None:
    spans = {"train_epoch": (0, 10), "evaluate_epoch": (7, 9), "report": (9, 10)}
    marks = [{"name": name, "rank": 0, "began": began, "ended": ended} for name, (began, ended) in spans.items()]
    parts = parts_of(marks, 0)
    assert parts == {"steps": 7, "evaluation": 2, "report": 1}
    assert shares([parts], "evaluation", 1.0) == [20.0]
    assert shares([parts], "report", 11.0) == [1.0]
