"""What a training is, in words: for the console and for the description of the MLflow run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metamixer_ray.tracking.board import settings_text
from metamixer_ray.tracking.rows import Row, mean, number, peer_names


@dataclass(frozen=True, kw_only=True)
class PeerSummary:
    """One peer as it is announced."""

    name: str
    parameters: int


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One training as it is announced. All texts are ready to be shown."""

    name: str
    peers: tuple[PeerSummary, ...]
    data: str
    mixer: str
    distiller: str
    placement: str
    """Workers, device and precision, such as ``2 workers, one per peer, on CPU, float32``."""
    epochs: int
    batch_size: int
    steps_per_epoch: int
    run_folder: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a finished training left its things; None leaves the line out."""

    run_folder: str
    figures: str | None = None
    tracking: str | None = None
    """The MLflow run: a link, or experiment and run name."""
    ui_command: str | None = None
    """The shell line that opens the MLflow UI on this store."""


def count(number_of: int) -> str:
    """A large number in short: ``175k``, ``1.74M``, ``25.6M``."""
    for unit, factor in (("M", 10**6), ("k", 10**3)):
        if number_of >= factor:
            value = number_of / factor
            return f"{value:.3g}{unit}" if value < 999.5 else f"{value:.0f}{unit}"
    return str(number_of)


def percent(value: float | None) -> str:
    """A fraction as percent with two decimals, ``-`` for none."""
    return "-" if value is None else f"{100 * value:.2f}"


def decimal(value: float | None) -> str:
    """A number with four decimals, ``-`` for none."""
    return "-" if value is None else f"{value:.4f}"


def signed_points(value: float | None) -> str:
    """A difference of fractions in percentage points with its sign, ``-`` for none."""
    return "-" if value is None else f"{100 * value:+.2f}"


def score_table(row: Row, alone: Sequence[float | None] | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the closing table: each peer, the peers' mean, the ensemble.

    Args:
        row: the last epoch's row.
        alone: top-1 of each peer's network trained alone, as fractions; adds a column with the gain over it.
    """
    keys = ("top1", "top5", "nll", "ece")
    header = ["peer", "top-1 %", "top-5 %", "NLL", "ECE %"] + (["gain over alone"] if alone else [])

    def line(name: str, values: Sequence[float | None], gain: float | None) -> list[str]:
        top1, top5, nll, ece = values
        cells = [name, percent(top1), percent(top5), decimal(nll), percent(ece)]
        return cells + ([signed_points(gain)] if alone else [])

    gains: list[float | None] = []
    for index, peer in enumerate(row["peers"]):
        top1, before = number(peer, "top1"), alone[index] if alone else None
        gains.append(None if top1 is None or before is None else top1 - before)
    lines = [
        line(name, [number(peer, key) for key in keys], gain)
        for name, peer, gain in zip(peer_names([row]), row["peers"], gains, strict=True)
    ]
    if len(lines) > 1:
        means = [mean([number(peer, key) for peer in row["peers"]]) for key in keys]
        lines.append(line("mean", means, mean(gains)))
        lines.append(line("ensemble", [number(row.get("ensemble"), key) for key in keys], None))
    return header, lines


def run_description(summary: RunSummary, row: Row | None = None, alone: Sequence[float | None] | None = None) -> str:
    """The run's description in Markdown: what was trained, how, the scores, the command that repeats it."""
    peers = ", ".join(f"{peer.name} ({count(peer.parameters)} parameters)" for peer in summary.peers)
    text = [
        f"**{len(summary.peers)} peers learning together**: {peers}",
        "",
        f"- data: {summary.data}",
        f"- mixer: {summary.mixer}",
        f"- distiller: {summary.distiller}",
        *([] if row is None else [f"- {_result(row, alone)}"]),
        f"- {summary.epochs} epochs of {summary.steps_per_epoch} steps, batch {summary.batch_size}; "
        f"{summary.placement}",
        f"- run folder: `{summary.run_folder}`",
        "",
    ]
    if row is not None:
        header, lines = score_table(row, alone)
        text += [f"Scores on the {row.get('split', 'test')} split after epoch {row['epoch']}:", ""]
        text += [
            _markdown(header),
            _markdown(["---"] + ["---:"] * (len(header) - 1)),
            *map(_markdown, lines),
            "",
        ]
        if (agreement := number(row, "agreement")) is not None:
            text += [f"The peers agree on {percent(agreement)} % of the images.", ""]
    return "\n".join([*text, repeated_by(summary.command)])


def trial_description(
    about: str, settings: Mapping[str, Any], changed: Mapping[str, Any], run_folder: str, command: str
) -> str:
    """The description of one training of many in Markdown, like :func:`run_description`.

    Args:
        about: what it belongs to and the data.
        settings: all of its.
        changed: those that the others may have otherwise.
    """
    text = [
        f"{about}: {', '.join(settings['peers'])}",
        "",
        f"- mixer: {settings['mixer']}",
        f"- distiller: {settings['distiller']}",
        f"- settings: {settings_text(changed, 1000)}",
        f"- {settings['epochs']} epochs; run folder: `{run_folder}`",
        "",
    ]
    return "\n".join([*text, repeated_by(command)])


def repeated_by(command: str) -> str:
    """The end of a description: the shell line that does it again."""
    return f"Repeat it with\n\n```\n{command}\n```\n"


def _result(row: Row, alone: Sequence[float | None] | None) -> str:
    """The most important numbers in a line: MLflow shows a description's first lines alone at first."""
    hits = [number(peer, "top1") for peer in row["peers"]]
    text = f"top-1: {percent(mean(hits))} % (mean of the peers)"
    if (together := number(row.get("ensemble"), "top1")) is not None:
        text += f", {percent(together)} % (ensemble)"
    if alone and (before := mean(alone)) is not None and (after := mean(hits)) is not None:
        text += f"; gain over training alone: {signed_points(after - before)} points"
    return text


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
