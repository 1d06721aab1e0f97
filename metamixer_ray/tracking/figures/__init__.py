"""Figures of a training: pure functions from data to a matplotlib Figure, and `figure_png` to store one."""

from metamixer_ray.tracking.figures.attention_sheet import attention_sheet
from metamixer_ray.tracking.figures.canvas import figure_png
from metamixer_ray.tracking.figures.comparison_sheet import comparison_sheet
from metamixer_ray.tracking.figures.curves import agreement_curves, learning_curves
from metamixer_ray.tracking.figures.evaluation_sheets import EVALUATION_FIGURES, evaluation_figures
from metamixer_ray.tracking.figures.mixing_sheet import describe_label, mixing_sheet

__all__ = [
    "EVALUATION_FIGURES",
    "agreement_curves",
    "attention_sheet",
    "comparison_sheet",
    "describe_label",
    "evaluation_figures",
    "figure_png",
    "learning_curves",
    "mixing_sheet",
]
