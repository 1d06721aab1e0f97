"""Figures of a sweep: how it went, what each setting did, which of them mattered, and all trials' learning curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from metamixer_ray.tracking.figures.canvas import (
    ENSEMBLE_COLOUR,
    MUTED,
    RIGHT_COLOUR,
    WRONG_COLOUR,
    clipped,
    new_figure,
    style_curves,
)

_COLUMNS = 3
_FEW = 6  # so many different numbers, some of them seen twice, are drawn as choices, side by side
_LOG_RANGE = 20.0  # values that span less than this factor are never drawn on a logarithmic axis
_COLOURS = {"finished": RIGHT_COLOUR, "stopped": MUTED, "failed": WRONG_COLOUR}


@dataclass(frozen=True, kw_only=True)
class Dot:
    """What the figures need of a trial."""

    number: int
    settings: Mapping[str, Any]
    status: str
    objective: float | None
    curve: Mapping[int, float]
    """Objective after each epoch."""
    minutes: float | None = None
    """From the sweep's begin to the trial's end."""
    default: bool = False


@dataclass(frozen=True)
class Measure:
    """What the objective is called, and how its values become what is drawn."""

    label: str
    factor: float
    maximised: bool


def sweep_history(dots: Sequence[Dot], measure: Measure) -> Figure | None:
    """Every trial's objective over time, and the best so far of those that were trained to the end."""
    there = [dot for dot in dots if dot.objective is not None and dot.status != "failed" and dot.minutes is not None]
    shown = sorted(there, key=lambda dot: dot.minutes or 0.0)
    if not shown:
        return None
    figure = new_figure(9, 4.6)
    axes = figure.subplots()
    style_curves(axes, title="The search", ylabel=measure.label)
    axes.set_xlabel("minutes since the sweep began", fontsize=9)
    for status, label in (("finished", "trained to the end"), ("stopped", "stopped early (at its last epoch)")):
        some = [dot for dot in shown if dot.status == status]
        if some:
            axes.scatter(
                [dot.minutes or 0.0 for dot in some],
                [_value(dot.objective, measure) for dot in some],
                s=26 if status == "finished" else 14,
                color=_COLOURS[status],
                label=label,
                zorder=3,
            )
    best: list[tuple[float, float]] = []
    for dot in shown:
        value = _value(dot.objective, measure)
        if dot.status == "finished" and (not best or (value > best[-1][1]) == measure.maximised):
            best.append((dot.minutes or 0.0, value))
    if best:
        last = shown[-1].minutes or 0.0
        axes.step(
            [*[n for n, _ in best], last],
            [*[v for _, v in best], best[-1][1]],
            where="post",
            color=ENSEMBLE_COLOUR,
            linewidth=1.6,
            label="best so far",
        )
    _mark_defaults(axes, shown, measure)
    failed = [dot.minutes for dot in dots if dot.status == "failed" and dot.minutes is not None]
    if failed:
        low = axes.get_ylim()[0]
        axes.plot(failed, [low] * len(failed), "x", color=_COLOURS["failed"], label="failed", clip_on=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def sweep_settings(dots: Sequence[Dot], measure: Measure) -> Figure | None:
    """The objective against each setting that was searched, a panel each."""
    shown = [dot for dot in dots if dot.objective is not None and dot.status != "failed"]
    names = searched(shown)
    if not shown or not names:
        return None
    rows = math.ceil(len(names) / _COLUMNS)
    figure = new_figure(11, 3.1 * rows + 0.5)
    grid = figure.subplots(rows, min(_COLUMNS, len(names)), squeeze=False, sharey=True)
    for axes, name in zip(grid.flat, names, strict=False):
        _panel(axes, name, shown, measure)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel(measure.label, fontsize=9)
    figure.suptitle(
        "blue: trained to the end; grey: stopped early; diamond: the defaults",
        fontsize=9,
        color=MUTED,
        x=0.01,
        ha="left",
    )
    return figure


def sweep_importance(importance: Mapping[str, tuple[float, float]], *, epoch: int, trials: int) -> Figure:
    """Permutation importance of each setting, the most important on top."""
    names = list(importance)[::-1]
    figure = new_figure(8, 1.4 + 0.36 * len(names))
    axes = figure.subplots()
    axes.barh(
        names,
        [importance[name][0] for name in names],
        xerr=[importance[name][1] for name in names],
        color=RIGHT_COLOUR,
        ecolor=MUTED,
        height=0.6,
    )
    axes.set_title(
        f"Which settings mattered ({trials} trials at epoch {epoch})", fontsize=11, loc="left", fontweight="bold"
    )
    axes.set_xlabel("loss of explained variance when the setting is shuffled (random forest)", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(0.0, color=MUTED, linewidth=0.8)
    return figure


def sweep_curves(dots: Sequence[Dot], measure: Measure) -> Figure | None:
    """The objective of every trial over epochs; the best and the defaults stand out."""
    shown = [dot for dot in dots if dot.curve]
    if not shown:
        return None
    figure = new_figure(9, 4.8)
    axes = figure.subplots()
    style_curves(axes, title="Learning curves of all trials", ylabel=measure.label)
    whole = [dot for dot in shown if dot.status == "finished" and dot.objective is not None]
    sign = 1.0 if measure.maximised else -1.0
    best = max(whole, key=lambda dot: sign * (dot.objective or 0.0), default=None)
    for dot in shown:
        _draw_curve(axes, dot, measure, color=_COLOURS.get(dot.status, MUTED), linewidth=0.9, alpha=0.45)
    if best is not None:
        label = "the best: the defaults" if best.default else f"the best, trial {best.number}"
        _draw_curve(axes, best, measure, color=ENSEMBLE_COLOUR, linewidth=2.2, label=label)
    default = next((dot for dot in shown if dot.default), None)
    if default is not None and default is not best:
        _draw_curve(axes, default, measure, color=WRONG_COLOUR, linewidth=2.2, label="the defaults")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def searched(dots: Sequence[Dot]) -> list[str]:
    """Settings of which trials had different values; one that some trials only lack has nothing to compare."""
    names = sorted({name for dot in dots for name in dot.settings})
    return [name for name in names if len({repr(d.settings[name]) for d in dots if name in d.settings}) > 1]


def _value(objective: float | None, measure: Measure) -> float:
    return measure.factor * (objective if objective is not None else math.nan)


def _mark_defaults(axes: Axes, shown: Sequence[Dot], measure: Measure) -> None:
    default = next((dot for dot in shown if dot.default and dot.status == "finished"), None)
    if default is not None:
        axes.axhline(
            _value(default.objective, measure), color=WRONG_COLOUR, linewidth=1.1, linestyle="--", label="the defaults"
        )


def logarithmic(values: Sequence[float]) -> bool:
    """Whether values spread more evenly on a logarithmic axis, as those of learning rates do and of shares don't."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low <= 0 or high / low <= _LOG_RANGE:
        return False
    ordered = np.sort(np.array(values, dtype=float))
    even = np.linspace(0.0, 1.0, len(ordered))
    plain = (ordered - low) / (high - low)
    logs = np.log(ordered / low) / math.log(high / low)
    return bool(np.abs(logs - even).max() < np.abs(plain - even).max())


def _panel(axes: Axes, name: str, shown: Sequence[Dot], measure: Measure) -> None:
    dots = [dot for dot in shown if name in dot.settings]
    values = [dot.settings[name] for dot in dots]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if numeric and (len(set(values)) > _FEW or len(set(values)) == len(values)):
        xs = [float(v) for v in values]
        if logarithmic(xs):
            axes.set_xscale("log")
            # Plain numbers at 1, 2 and 5: the usual powers of ten run into each other in a narrow panel.
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        ordered = sorted(set(values)) if numeric else sorted(set(map(_text, values)))
        texts = list(dict.fromkeys(map(_text, ordered)))
        # Dots on one value are spread a little, always alike, so that all can be seen.
        xs = [texts.index(_text(v)) + 0.16 * math.sin(2.4 * dot.number) for v, dot in zip(values, dots, strict=True)]
        axes.set_xticks(range(len(texts)), [clipped(text, 14) for text in texts])
        axes.set_xlim(-0.5, len(texts) - 0.5)
    for status, alpha in (("stopped", 0.45), ("finished", 1.0)):
        chosen = np.array([dot.status == status for dot in dots], dtype=bool)
        if chosen.any():
            ys = np.array([_value(dot.objective, measure) for dot in dots])
            axes.scatter(np.array(xs)[chosen], ys[chosen], s=18, color=_COLOURS[status], alpha=alpha)
    for x, dot in zip(xs, dots, strict=True):
        if dot.default:
            axes.scatter([x], [_value(dot.objective, measure)], s=30, marker="D", color=WRONG_COLOUR, zorder=4)
    axes.set_title(name, fontsize=10, loc="left", fontweight="bold")
    axes.tick_params(labelsize=8)
    axes.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Axes, dot: Dot, measure: Measure, **style: Any) -> None:
    epochs = sorted(dot.curve)
    if len(epochs) == 1:
        style["marker"] = "."  # a line of one point can't be seen
    axes.plot(epochs, [measure.factor * dot.curve[epoch] for epoch in epochs], **style)


def _text(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, float):
        return f"{value:.3g}"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
