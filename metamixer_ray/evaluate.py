"""Score a trained run again: ``python -m metamixer_ray.evaluate RUN [--data ...]``.

Gives the numbers that the training reported, or those on other data of the same classes; with more on request: figures
of what stands behind the numbers, and scores on spoilt images.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
import tyro

from metamixer_ray.cli import run_command
from metamixer_ray.data import Batch, eval_batches
from metamixer_ray.data.corruptions import Corruption, common_corruptions, severity_of
from metamixer_ray.errors import ConfigError
from metamixer_ray.evaluation import predictions
from metamixer_ray.folder import RunFolder
from metamixer_ray.precision import resolve_precision
from metamixer_ray.reporting import first_line
from metamixer_ray.tally import Tally
from metamixer_ray.tracking.summary import percent, score_table
from metamixer_ray.trained import RunOptions, TrainedRun, find_run, open_trained
from metamixer_ray.worker import EVALUATION_BATCH


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """Score a trained run's peers and their ensemble: on its own test split, or on other data of the same classes."""

    corruptions: bool = False
    """Score on spoilt images too: blur, noise, contrast, JPEG, each at one severity."""
    report: str | None = None
    """Folder or URI for evaluation.json and figures: accuracy by class, calibration, agreement between peers."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    json: bool = False
    """Print JSON instead of a table; it holds all that the figures show."""


def evaluate_run(
    folder: RunFolder, options: EvaluateOptions | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Scores of a run's peers and ensemble, fractions as in summary.json, and what stands behind them.

    Returns:
        ``images``, ``peers``, ``ensemble``, ``agreement`` as :meth:`Tally.scores` gives them, the keys of
        :meth:`Tally.details`, the ``run`` and the ``split``. With ``options.corruptions`` also ``severity``, and
        ``corruptions``: by name the ``setting``, scores as above, and in each of them ``relative_drop``, the fraction
        of the top-1 on clean images that is lost (None where there was none).

    Args:
        options: which data, if not the run's own test split, and what else to score. Images are normalised as in
            training.

    Raises:
        UserError: no such run, no checkpoint, or data that doesn't fit.
    """
    run, device = open_trained(folder, options), torch.device(device)
    for network in run.networks:
        network.to(device)
    tally = _count(run, device)
    clean = tally.scores(run.names)
    found = {"run": folder.name, "split": run.split, **clean, **tally.details(run.classes)}
    if options and options.corruptions:
        found["severity"] = severity_of(run.image_size)
        found["corruptions"] = {
            corruption.name: {
                "setting": corruption.setting,
                **_with_drops(_count(run, device, corruption).scores(run.names), clean),
            }
            for corruption in common_corruptions(run.image_size)
        }
    return found


def _count(run: TrainedRun, device: torch.device, corruption: Corruption | None = None) -> Tally:
    tally = Tally(len(run.networks), len(run.classes), device)
    batches: Iterable[Batch] = eval_batches(run.images, batch_size=EVALUATION_BATCH, replica=0, replicas=1)
    told = predictions(
        run.networks,
        batches if corruption is None else _spoilt(batches, corruption),
        mean=run.mean,
        std=run.std,
        device=device,
        precision=resolve_precision(run.config.precision, device),
    )
    for each, labels in told:
        tally.add(each, labels)
    return tally


def _spoilt(batches: Iterable[Batch], corruption: Corruption) -> Iterator[Batch]:
    for batch in batches:
        yield replace(batch, images=corruption.apply(batch.images, batch.indices))


def _with_drops(scores: dict[str, Any], clean: dict[str, Any]) -> dict[str, Any]:
    def dropped(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        lost = (before["top1"] - now["top1"]) / before["top1"] if before["top1"] else None
        return {**now, "relative_drop": lost}

    return {
        **scores,
        "peers": [dropped(now, before) for now, before in zip(scores["peers"], clean["peers"], strict=True)],
        "ensemble": dropped(scores["ensemble"], clean["ensemble"]) if clean["ensemble"] else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m metamixer_ray.evaluate``; returns its exit status."""

    def body(words: Sequence[str]) -> None:
        options: EvaluateOptions = tyro.cli(EvaluateOptions, prog="python -m metamixer_ray.evaluate", args=list(words))
        device = usable_device(options.device)
        target = None
        if options.report is not None:
            target = RunFolder(options.report, option="--report")
            target.create()
        scores = evaluate_run(find_run(options.run), options, device)
        print(json.dumps(scores, indent=2) if options.json else as_table(scores))
        if target is not None:
            try:
                write_report(target, scores)
            except OSError as error:
                raise ConfigError(f"--report {target} can't be written: {error}") from None
            print(f"report    {target}", file=sys.stderr if options.json else sys.stdout)

    return run_command(body, argv)


def usable_device(name: str) -> torch.device:
    """The device that ``--device`` means.

    Raises:
        ConfigError: there is none of that name here, or it can't count in float64.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, dtype=torch.float64, device=name).item()
    except Exception as error:  # each kind of device fails in its own way
        raise ConfigError(f"--device {name} can't be used here ({first_line(error)}): give auto or cpu") from None
    return torch.device(name)


def write_report(folder: RunFolder, scores: dict[str, Any]) -> None:
    """Write ``evaluation.json`` and the figures that ``scores`` (of :func:`evaluate_run`) give.

    Those of an earlier report in the same folder are replaced, or removed where ``scores`` give none of that name.
    """
    # matplotlib takes a moment, which the plain command need not wait for.
    from metamixer_ray.tracking.figures import EVALUATION_FIGURES, evaluation_figures, figure_png

    earlier = folder.exists("evaluation.json")
    folder.write_json("evaluation.json", scores)
    figures = evaluation_figures(scores)
    for name, figure in figures.items():
        folder.write(f"{name}.png", figure_png(figure))
    for name in EVALUATION_FIGURES if earlier else ():
        if name not in figures:
            folder.remove(f"{name}.png")


def as_table(scores: dict[str, Any]) -> str:
    """The scores as aligned columns."""
    tail = f"{scores['images']} images"
    if scores["agreement"] is not None:
        tail += f"; the peers agree on {percent(scores['agreement'])} %"
    parts = [_aligned(*score_table({**scores, "epoch": 0})), tail]
    if "corruptions" in scores:
        parts += ["", *_corruption_lines(scores)]
    return "\n".join(parts)


def _corruption_lines(scores: dict[str, Any]) -> list[str]:
    corruptions = scores["corruptions"]
    several = scores["ensemble"] is not None

    def of(found: dict[str, Any]) -> list[dict[str, Any]]:
        return [*found["peers"], *([found["ensemble"]] if several else [])]

    def cells(top1: float, lost: float | None) -> list[str]:
        return [percent(top1), "" if lost is None else f"({round(-100 * lost, 1) + 0.0:+.1f} %)"]

    lines = []
    for at, (before, *after) in enumerate(zip(of(scores), *(of(found) for found in corruptions.values()), strict=True)):
        drops = [now["relative_drop"] for now in after]
        average = cells(fmean(now["top1"] for now in after), None if None in drops else fmean(drops))
        name = scores["peers"][at]["name"] if at < len(scores["peers"]) else "ensemble"
        pairs = [cells(now["top1"], now["relative_drop"]) for now in after]
        lines.append([name, percent(before["top1"]), *(cell for pair in [*pairs, average] for cell in pair)])
    header = ["top-1 %", "clean", *(cell for name in (*corruptions, "mean") for cell in (name, ""))]
    settings = "; ".join(f"{name}: {found['setting']}" for name, found in corruptions.items())
    return [_aligned(header, lines), f"{scores['severity']}: {settings}; in brackets the change relative to clean"]


def _aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in [header, *lines]
    )


if __name__ == "__main__":
    sys.exit(main())
