"""What is made of a sweep's trials: ranks, gains, importance, figures and lines."""

import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.sweeps.findings import Gain, common_epoch, importance, ranked
from metamixer_ray.sweeps.ledger import Trial
from metamixer_ray.sweeps.telling import closing, parent_metrics, summarise
from metamixer_ray.sweeps.trial import objective_of
from metamixer_ray.tracking.board import Board, settings_text
from metamixer_ray.tracking.figures import figure_png
from metamixer_ray.tracking.figures.sweep_sheets import (
    Dot,
    Measure,
    logarithmic,
    searched,
    sweep_curves,
    sweep_history,
    sweep_importance,
    sweep_settings,
)

MEASURE = Measure("top-1 (%)", 100.0, True)


def trial(number: int, objective: float | None, status: str = "finished", epochs: int = 8) -> Trial:
    return Trial(
        number=number,
        settings={"lr": number / 10},
        origin="tpe",
        status=status,  # type: ignore[arg-type]
        objective=objective,
        epochs=epochs,
    )


def test_only_trials_that_ran_to_the_end_are_compared() -> None:
    trials = [trial(0, 0.5), trial(1, 0.9, "stopped", 2), trial(2, 0.6), trial(3, None, "failed")]
    assert [t.number for t in ranked(trials, maximised=True)] == [2, 0]
    assert [t.number for t in ranked(trials, maximised=False)] == [0, 2]
    assert [t.number for t in ranked(trials[1:2], maximised=True)] == [1]


def test_the_gain_is_that_of_pairs() -> None:
    gain = Gain((0.5, 0.6, 0.7), (0.6, 0.65, 0.9))
    assert gain.mean == pytest.approx((0.1 + 0.05 + 0.2) / 3)
    assert gain.deviation == pytest.approx(np.std([0.1, 0.05, 0.2], ddof=1))
    assert Gain((0.5,), (0.6,)).deviation is None
    assert Gain((1.5,), (1.25,), maximised=False).mean == pytest.approx(0.25)


def test_further_seeds_that_failed_are_told() -> None:
    config = SweepConfig()
    trials = [trial(0, 0.5), trial(1, 0.6)]
    for gain, told in (
        (Gain((0.5,), (0.6,), failed=("best, seed 1: diverged",)), "+10.00 points, mean of 1 further seed, validation"),
        (Gain((), (), failed=("best, seed 1: diverged", "best, seed 2: diverged")), None),
        (Gain((0.5, 0.6), (0.6, 0.9)), "+20.00 points (sd 14.14), mean of 2 further seeds, validation"),
    ):
        summary = summarise(config, trials, ranked(trials, maximised=True), gain, search_seconds=3, wall_seconds=4)
        lines = closing(config, json.loads(json.dumps(summary)))
        assert sum(told is not None and told in line for line in lines) == (told is not None)
        assert [line for line in lines if "failed: best" in line] == [
            f"a further seed failed: {f}" for f in gain.failed
        ]
        assert ("gain" in parent_metrics(summary)) == (told is not None)


def test_importance_finds_what_mattered() -> None:
    dice = random.Random(0)
    points = [
        {"lr": dice.random(), "pairing": dice.choice(["free", "within-class"]), "batch_size": 64}
        | ({"off_epochs": dice.choice([0, 5])} if dice.random() < 0.5 else {})
        for _ in range(60)
    ]
    found = importance(points, [(p["pairing"] == "free") + 0.1 * p["lr"] for p in points])
    assert found is not None
    assert next(iter(found)) == "pairing"
    assert set(found) == {"pairing", "lr", "off_epochs"}  # what never varied says nothing
    assert found["pairing"][0] > 5 * found["lr"][0]
    assert importance(points[:5], [0.0] * 5) is None


def test_the_epoch_at_which_trials_are_compared() -> None:
    curves = [dict.fromkeys(range(1, last + 1), 0.5) for last in (1, 1, 1, 4, 4, 4, 4, 9, 9, 9, 9)]
    assert common_epoch(curves) == 4
    assert common_epoch([*curves * 3]) == 4  # 17 of 33: half of them
    assert common_epoch([*curves[3:] * 3]) == 9
    assert common_epoch([]) is None


def test_objectives() -> None:
    row = {"peers": [{"top1": 0.5, "nll": 1.0}, {"top1": 0.7, "nll": None}], "ensemble": {"top1": 0.8}}
    values = {kind: objective_of(row, kind) for kind in ("mean", "ensemble", "best", "worst", "nll")}  # type: ignore[arg-type]
    assert values == {"mean": 0.6, "ensemble": 0.8, "best": 0.7, "worst": 0.5, "nll": 50.5}
    assert objective_of({"peers": [{"loss": 1.0}], "ensemble": None}, "mean") is None


def test_shares_are_drawn_as_they_are_and_rates_by_their_logarithm() -> None:
    dice = random.Random(0)
    assert not logarithmic([dice.random() for _ in range(30)])
    assert not logarithmic([0.0002, *(dice.random() for _ in range(30))])
    assert logarithmic([10 ** dice.uniform(-4, -1) for _ in range(30)])
    assert not logarithmic([0.0, 1.0, 30.0])
    assert not logarithmic([1.0, 2.0, 3.0])


def dots() -> list[Dot]:
    def dot(n: int) -> Dot:
        curve = {epoch: 0.1 * epoch + 0.01 * n for epoch in range(1, 3 if n % 3 else 6)}
        return Dot(
            number=n,
            settings={"lr": 10 ** (n / 5 - 3), "pairing": "free" if n % 2 else "within-class"},
            status="stopped" if n % 3 else "finished",
            objective=curve[max(curve)],
            curve=curve,
            minutes=n + 0.5,
            default=n == 0,
        )

    return [*map(dot, range(12)), replace(dot(12), status="failed", objective=None, curve={})]


def test_figures_show_something() -> None:
    figures = [sweep_history(dots(), MEASURE), sweep_settings(dots(), MEASURE), sweep_curves(dots(), MEASURE)]
    figures.append(sweep_importance({"lr": (0.5, 0.1), "pairing": (0.1, 0.02)}, epoch=2, trials=12))
    for figure in figures:
        assert figure is not None
        pixels = np.asarray(Image.open(io.BytesIO(figure_png(figure))).convert("L"))
        assert (pixels < 200).mean() > 0.002
    history = figures[0]
    assert history is not None
    (axes,) = history.axes
    steps = axes.lines[0].get_ydata()
    assert list(steps) == sorted(steps)  # the best so far never falls
    assert sweep_history([], MEASURE) is None
    assert sweep_settings(dots()[-1:], MEASURE) is None
    assert searched(dots()) == ["lr", "pairing"]


def test_what_has_nothing_to_compare_is_not_drawn() -> None:
    lone = replace(dots()[1], settings={**dots()[1].settings, "batch_size": 8})
    failed = replace(dots()[-1], settings={**dots()[-1].settings, "weight_decay": 1e12})
    for dot in (lone, failed):
        figure = sweep_settings([*dots(), dot], MEASURE)
        assert figure is not None
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["lr", "pairing"]


def test_every_value_of_a_choice_is_named() -> None:
    figure = sweep_settings([replace(dot, settings={"pairing": dot.settings["pairing"]}) for dot in dots()], MEASURE)
    assert figure is not None
    (axes,) = figure.axes
    left, right = axes.get_xlim()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["free", "within-class"]
    assert all(left < tick < right for tick in axes.get_xticks())


def test_numbers_of_which_none_is_seen_twice_are_no_choices() -> None:
    figure = sweep_settings([replace(dot, settings={"momentum": 0.1 * dot.number}) for dot in dots()[:4]], MEASURE)
    assert figure is not None
    (axes,) = figure.axes
    places = sorted(x for drawn in axes.collections for x, _ in drawn.get_offsets())
    assert places == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3])  # that of the defaults has its mark on it


def test_a_curve_of_one_epoch_can_be_seen() -> None:
    figure = sweep_curves([dots()[0], replace(dots()[1], curve={1: 0.1})], MEASURE)
    assert figure is not None
    (axes,) = figure.axes
    assert {len(np.atleast_1d(line.get_xdata())): line.get_marker() for line in axes.lines} == {1: ".", 5: "None"}


def test_the_best_is_named_the_defaults_where_they_are() -> None:
    by_default = [dots()[0], *(replace(dot, status="stopped") for dot in dots()[1:])]
    for shown, named in ((dots(), ["the best, trial 9", "the defaults"]), (by_default, ["the best: the defaults"])):
        figure = sweep_curves(shown, MEASURE)
        assert figure is not None
        assert [text.get_text() for text in figure.legends[0].get_texts()] == named


def test_a_log_has_a_line_per_trial_and_no_control_characters() -> None:
    told = io.StringIO()
    board = Board(4, 8, stream=told)
    board.known(trial(0, 0.5))
    board.running(trial(1, 0.3, "running", 1))
    board.over(trial(1, 0.6))
    board.over(trial(2, 0.1, "stopped", 1))
    board.over(replace(trial(3, None, "failed", 0), reason="--lr is too much"))
    board.close()
    header, *lines = told.getvalue().splitlines()
    assert header.split() == ["trial", "epochs", "top-1", "best", "settings"]
    assert [line.split()[:3] for line in lines] == [
        ["2/4", "finished", "8/8"],
        ["3/4", "stopped", "1/8"],
        ["4/4", "failed", "0/8"],
    ]
    assert "60.00 %" in lines[0]
    assert "--lr is too much" in lines[2]
    assert "\x1b" not in told.getvalue()


def test_settings_on_a_line() -> None:
    assert settings_text({}, 64) == "defaults"
    assert settings_text({"lr": 0.1, "mix_stages": [0, 1]}, 64) == "lr=0.1 mix_stages=0,1"
    assert settings_text({"lr": 0.12345, "pairing": "free"}, 64) == "pairing=free lr=0.123"
    assert len(settings_text({"a": "x" * 200}, 64)) == 64
