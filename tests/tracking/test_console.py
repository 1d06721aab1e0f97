import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from metamixer_ray.tracking.board import Board
from metamixer_ray.tracking.console import Console, duration
from metamixer_ray.tracking.summary import PeerSummary, Places, RunSummary, count, run_description
from tests.tracking.examples import make_rows

PLACES = Places(
    run_folder="/home/ann/metamixer-ray/runs/r",
    figures="/home/ann/metamixer-ray/runs/r/figures",
    tracking="experiment metamixer_ray, run r",
    ui_command="python -m metamixer_ray.ui --tracking-uri sqlite:////home/ann/metamixer-ray/mlflow.db",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make_summary(peers: int = 2, epochs: int = 20) -> RunSummary:
    names = [f"{i}-resnet{14 - 2 * (i % 4)}" for i in range(peers)]
    return RunSummary(
        name="resnet14+resnet12 metamixer digits",
        peers=tuple(PeerSummary(name=name, parameters=175_258) for name in names),
        data="digits: 1,438 training and 359 test images of 10 classes, 32 x 32",
        mixer="metamixer, cross-class, local 0.5, global 0.5",
        distiller="dml, weight 1, T 3, attention statistics",
        placement="2 workers on CPU, float32",
        epochs=epochs,
        batch_size=128,
        steps_per_epoch=12,
        run_folder=PLACES.run_folder,
        command="python -m metamixer_ray.train --epochs 20",
    )


def run_console(stream: io.StringIO, peers: int, epochs: int, width: int | None = None, **options: int) -> str:
    console = Console(verbose=bool(options.pop("verbose", 0)), stream=stream, width=width)
    console.opening(make_summary(peers, epochs))
    rows = make_rows(peers, epochs, **options)
    for row in rows:
        console.epoch(row)
    console.closing(rows[-1], PLACES, alone=[0.6] * peers)
    return stream.getvalue()


def test_the_default_run_fits_forty_plain_lines() -> None:
    text = run_console(io.StringIO(), peers=2, epochs=20)
    assert len(text.splitlines()) <= 40
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert text.isascii()
    for place in (PLACES.run_folder, PLACES.figures, PLACES.tracking, PLACES.ui_command):
        assert place is not None
        assert place in text


def test_one_line_per_epoch_however_long() -> None:
    text = run_console(io.StringIO(), peers=3, epochs=200)
    assert len(re.findall(r"^ *\d+/200 ", text, re.MULTILINE)) == 200


@pytest.mark.parametrize(("peers", "width"), [(2, None), (8, None), (8, 80), (4, 60), (1, 60)])
def test_columns_are_aligned_and_fit(peers: int, width: int | None) -> None:
    lines = run_console(io.StringIO(), peers, 3, width).splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("epoch"))
    table = lines[start : start + 4]
    assert len({len(line) for line in table}) == 1
    assert len(table[0]) <= (width or 110)
    row = make_rows(peers, 3)[0]
    first = f"{100 * min(peer['top1'] for peer in row['peers']):.2f}"
    assert first in table[1]


@pytest.mark.parametrize(("loss", "shown"), [(2.3, "2.300"), (843.21, "843.2"), (1.37e8, "1.4e+08")])
def test_a_loss_that_gets_out_of_hand_stays_in_its_column(loss: float, shown: str) -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.opening(make_summary(2, epochs=4))
    row = make_rows(2, 4)[0]
    for peer in row["peers"]:
        peer["loss"] = loss
    console.epoch(row)
    head, line = stream.getvalue().splitlines()[-2:]
    assert line.split()[1] == shown
    assert len(line) == len(head)


def test_an_epoch_without_evaluation_shows_training_accuracy() -> None:
    text = run_console(io.StringIO(), peers=2, epochs=4, every=2)
    first, second = (re.search(rf"^ *{n}/4 .*$", text, re.MULTILINE) for n in (1, 2))
    assert first is not None
    assert second is not None
    row = make_rows(2, 4, every=2)[0]
    assert f"{100 * row['peers'][0]['train_top1']:.2f}" in first[0]
    assert first[0].endswith("(on training images)")
    assert "training" not in second[0]


def test_closing_table_has_peers_mean_ensemble_and_gain() -> None:
    lines = run_console(io.StringIO(), peers=2, epochs=20).splitlines()
    row = make_rows(2, 20)[-1]
    gain = f"{100 * (row['peers'][0]['top1'] - 0.6):+.2f}"
    peer = next(line for line in lines if line.startswith("0-resnet14 "))
    assert peer.split() == [
        "0-resnet14",
        f"{100 * row['peers'][0]['top1']:.2f}",
        "95.00",
        "1.2000",
        "3.00",
        gain,
    ]
    assert next(line for line in lines if line.startswith("ensemble ")).split()[1] == "65.00"
    assert any(line.startswith("mean ") for line in lines)
    assert "the peers agree on 90.00 % of the images" in "\n".join(lines)


def test_a_single_peer_has_no_ensemble() -> None:
    text = run_console(io.StringIO(), peers=1, epochs=2)
    assert "ensemble" not in text
    assert "mean" not in text


def test_a_terminal_gets_the_same_lines_and_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    plain = run_console(io.StringIO(), 2, 5, width=120).splitlines()
    text = run_console(Terminal(), 2, 5, width=120)
    assert "\x1b[" in text
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)
    assert all(line in bare for line in plain)
    assert "left" in bare


def percentages(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"(\d+) %.{0,10} left", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))]


def test_the_bar_moves_inside_an_epoch_and_never_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    console = Console(stream=stream, width=120)
    console.opening(make_summary(2, epochs=4))
    (row, *_) = make_rows(2, 4)
    console.step(1, 6, 12)
    shown = percentages(stream.getvalue())
    assert shown
    console._progress.refresh()  # type: ignore[union-attr]
    assert percentages(stream.getvalue())[-1] == 12
    console.epoch(row)
    console.step(1, 11, 12)
    console._progress.refresh()  # type: ignore[union-attr]
    assert percentages(stream.getvalue())[-1] == 25
    console.close()


def test_a_log_hears_of_long_epochs_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    console = Console(stream=stream)
    console.opening(make_summary(2, epochs=4))
    before = stream.getvalue()
    now += 299
    console.step(1, 100, 10_000)
    assert stream.getvalue() == before
    now += 2
    console.step(1, 1200, 10_000)
    console.step(1, 1201, 10_000)
    assert stream.getvalue() == before + "      1/4  step 1,200 of 10,000\n"


@pytest.fixture(params=["full disk", "closed pipe", "gone terminal"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    """A stream that takes nothing any more."""
    if request.param == "full disk":
        number = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, number = os.openpty() if request.param == "gone terminal" else os.pipe()
        os.close(reader)
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = os.fdopen(number, "w")
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


def test_a_training_goes_on_where_nobody_can_be_told(broken: TextIO) -> None:
    console = Console(stream=broken)
    console.opening(make_summary(2, epochs=4))
    for epoch, row in enumerate(make_rows(2, 4), start=1):
        console.step(epoch, 6, 12)
        console.epoch(row)
    console.warn("summary.json can't be written")
    console.closing(row, Places(run_folder="runs/a"))
    board = Board(1, 8, stream=broken)
    board.warn("the ledger can't be written")
    board.close()
    # As it was throughout.
    with pytest.raises(OSError):
        print("anything", file=broken, flush=True)


@pytest.mark.parametrize(("raised", "status"), [("", 0), ("raise ConfigError('no such thing')", 2)])
def test_a_log_that_takes_nothing_leaves_the_exit_status_alone(raised: str, status: int) -> None:
    program = f"""
import sys
from metamixer_ray.cli import run_command
from metamixer_ray.errors import ConfigError
from metamixer_ray.tracking import Console

def body(words):
    Console().warn("the disk is full")
    {raised}

sys.exit(run_command(body, []))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, env=environment)
    assert ended.returncode == status


def test_verbose_adds_losses_and_exchange() -> None:
    text = run_console(io.StringIO(), 2, 3, verbose=1)
    assert "cross entropy 1.1000, kd 0.2000" in text
    assert "exchange 2.10 ms/step" in text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3675, "1:01:15"), (200_000, "2d 07h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (175_258, "175k"), (1_736_564, "1.74M")])
def test_counts(number: int, text: str) -> None:
    assert count(number) == text


def test_description_is_markdown_with_table_and_command() -> None:
    text = run_description(make_summary(), make_rows(2, 20)[-1], alone=[0.6, None])
    assert "| peer | top-1 % | top-5 % | NLL | ECE % | gain over alone |" in text
    assert text.count("\n| ") == 6
    assert "```\npython -m metamixer_ray.train --epochs 20\n```" in text
    # MLflow shows the first lines alone at first: what came of it must be among them.
    assert "gain over training alone" in "\n".join(text.splitlines()[:7])
    assert "scores" not in run_description(make_summary()).lower()
