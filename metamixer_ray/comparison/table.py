"""How methods stand, for people (Markdown) and for programs (CSV, JSON, MLflow)."""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from metamixer_ray.comparison.outcomes import CONFIDENCE, Outcome, Spread, Standing

_SCORES: dict[str, Callable[[Outcome], float]] = {
    "mean": lambda outcome: outcome.mean,
    "best": lambda outcome: max(outcome.top1),
    "worst": lambda outcome: min(outcome.top1),
    "ensemble": lambda outcome: outcome.ensemble,
    "nll": lambda outcome: outcome.nll,
    "ece": lambda outcome: outcome.ece,
    "step_seconds": lambda outcome: outcome.step_seconds,
    "bytes_per_step": lambda outcome: outcome.bytes_per_step,
}


def facts(standing: Standing) -> dict[str, Any]:
    """A standing as plain numbers, for ``summary.json``; shares are fractions, and what isn't finite is None, since
    JSON has no such numbers."""
    spreads = {name: standing.spread(value) for name, value in _SCORES.items()}
    return {
        "method": standing.method.name,
        "settings": dict(standing.method.settings),
        "seeds": [outcome.seed for outcome in standing.outcomes],
        "failed": list(standing.failed),
        **{name: None if found is None else _finite(found) for name, found in spreads.items()},
        "gain": None if standing.gain is None else asdict(standing.gain),
        "step_ratio": standing.step_ratio,
        "bytes_ratio": standing.bytes_ratio,
    }


def _finite(found: Spread) -> dict[str, float | None]:
    return {name: value if value is None or math.isfinite(value) else None for name, value in asdict(found).items()}


def as_markdown(standings: Sequence[Standing]) -> str:
    """The table with what its numbers are; as Markdown that also reads well as it is."""
    header = ["method", "seeds", "peers' mean", "best peer", "worst peer", "ensemble", "gain", "NLL", "ECE"]
    header += ["ms/step", "x dml", "bytes/step", "x dml"]
    rows = [header, *map(_cells, standings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines += [
        "",
        "Top-1 and calibration error (ECE) in % of the test set after the last epoch, mean ± sample standard deviation",
        "over the seeds; best and worst peer of each training. Gain: points of the peers' mean over 'independent', by",
        f"seed, ± half the {CONFIDENCE:.0%} confidence interval (Student's t, paired), bold where it leaves out",
        "zero. Milliseconds as measured, beside whatever else ran; bytes that a worker hands to the exchange.",
    ]
    lines += [f"Failed: {standing.method.name}, {reason}" for standing in standings for reason in standing.failed]
    return "\n".join(lines) + "\n"


def as_csv(standings: Sequence[Standing]) -> str:
    """A line per method, numbers as they are."""
    lines = []
    for standing in standings:
        line: dict[str, Any] = {"method": standing.method.name, "seeds": len(standing.outcomes)}
        for name, value in _SCORES.items():
            found = standing.spread(value)
            line |= {name: found and found.mean, f"{name}_sd": found and found.deviation}
        gain = standing.gain
        line |= {"gain": gain and gain.mean, "gain_half_width": gain and gain.half_width}
        lines.append(line | {"step_ratio": standing.step_ratio, "bytes_ratio": standing.bytes_ratio})
    return _csv(lines)


def trainings_csv(standings: Sequence[Standing]) -> str:
    """A line per training and peer, from which all else was computed; the last three are the training's."""
    return _csv(
        [
            {
                "method": standing.method.name,
                "seed": outcome.seed,
                "peer": peer,
                "top1": top1,
                "nll": nll,
                "ece": ece,
                **{name: _SCORES[name](outcome) for name in ("ensemble", "step_seconds", "bytes_per_step")},
            }
            for standing in standings
            for outcome in standing.outcomes
            for peer, (top1, nll, ece) in enumerate(zip(outcome.top1, outcome.nlls, outcome.eces, strict=True))
        ]
    )


def metrics(standings: Sequence[Standing]) -> dict[str, float]:
    """MLflow's metrics of the comparison: ``dml+metamixer`` has ``dml-metamixer/mean``, ``.../gain``, ..."""
    found: dict[str, float] = {}
    for standing in standings:
        key = re.sub(r"[^\w.-]", "_", standing.method.name.replace("+", "-"))
        for name, value in _SCORES.items():
            if (over := standing.spread(value)) is not None:
                found[f"{key}/{name}"] = over.mean
                if over.deviation is not None:
                    found[f"{key}/{name}_sd"] = over.deviation
        if standing.gain is not None:
            found[f"{key}/gain"] = standing.gain.mean
    return found


def _cells(standing: Standing) -> list[str]:
    def text(name: str, scale: float, digits: int) -> str:
        return spread_text(standing.spread(_SCORES[name]), scale, digits)

    found = standing.spread(_SCORES["bytes_per_step"])
    return [
        standing.method.name,
        str(len(standing.outcomes)),
        *(text(name, 100, 2) for name in ("mean", "best", "worst", "ensemble")),
        _gain_text(standing),
        text("nll", 1, 3),
        text("ece", 100, 2),
        text("step_seconds", 1000, 1),
        _ratio(standing.step_ratio),
        "-" if found is None else f"{found.mean:,.0f}",
        _ratio(standing.bytes_ratio),
    ]


def spread_text(found: Spread | None, scale: float, digits: int) -> str:
    """For example ``69.15 ± 0.30``; without the deviation where there is one seed, ``-`` where there is none."""
    if found is None:
        return "-"
    deviation = "" if found.deviation is None else f" ± {scale * found.deviation:.{digits}f}"
    return f"{scale * found.mean:.{digits}f}{deviation}"


def _gain_text(standing: Standing) -> str:
    gain = standing.gain
    if gain is None:
        return "-"
    if gain.half_width is None:
        return f"{100 * gain.mean:+.2f}"
    text = f"{100 * gain.mean:+.2f} ± {100 * gain.half_width:.2f}"
    return f"**{text}**" if abs(gain.mean) > gain.half_width else text


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    stream = io.StringIO()
    if lines:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return stream.getvalue()
