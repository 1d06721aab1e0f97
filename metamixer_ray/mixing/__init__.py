"""Mixing images, labels and features of a batch, from a plan that every peer draws for itself."""

from metamixer_ray.mixing.apply import mix_features, mix_images, mix_tap, mix_targets
from metamixer_ray.mixing.config import MixingConfig, resolve_stages
from metamixer_ray.mixing.describe import RowMixture, describe_row
from metamixer_ray.mixing.plan import GlobalMix, LocalMix, Mixer, MixPlan, draw_plan, label_sources
from metamixer_ray.mixing.registry import build_mixer

__all__ = [
    "GlobalMix",
    "LocalMix",
    "MixPlan",
    "Mixer",
    "MixingConfig",
    "RowMixture",
    "build_mixer",
    "describe_row",
    "draw_plan",
    "label_sources",
    "mix_features",
    "mix_images",
    "mix_tap",
    "mix_targets",
    "resolve_stages",
]
