"""Carrying a plan out: pure functions of (images, targets or features, plan); local mixing comes first."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from metamixer_ray.mixing.blend import check_rows
from metamixer_ray.mixing.global_mixing import mix_global
from metamixer_ray.mixing.local_mixing import mix_local_images, mix_local_targets
from metamixer_ray.mixing.plan import MixPlan


def mix_images(images: Tensor, plan: MixPlan) -> Tensor:
    """What the networks receive. images: [B, 3, H, W] float, of the size the plan was drawn for.

    Applies local mixing, then global mixing if its stage is 0. The input is left as it is; an unmixed plan
    returns it itself. Raises ``ValueError`` if rows and plan do not fit or the images are not floating point.
    """
    check_rows(images, plan.rows)
    if plan.local is not None:
        images = mix_local_images(images, plan.local)
    if plan.glob is not None and plan.glob.stage == 0:
        images = mix_global(images, plan.glob)
    return images


def mix_targets(one_hot: Tensor, plan: MixPlan) -> Tensor:
    """The targets of the mixture, whatever the stage: float32 [B, C] -> [B, C]; rows still sum to one.

    Raises ``ValueError`` if rows and plan do not fit or the targets are not floating point.
    """
    check_rows(one_hot, plan.rows)
    if plan.local is not None:
        one_hot = mix_local_targets(one_hot, plan.local)
    if plan.glob is not None:
        one_hot = mix_global(one_hot, plan.glob)
    return one_hot


def mix_features(features: Tensor, plan: MixPlan) -> Tensor:
    """What stage k+1 receives, from what flows out of the plan's stage k: features [B, ...], maps or tokens.

    Returned as they are if the plan interpolates nothing or did so at the input already. Raises
    ``ValueError`` if rows and plan do not fit.
    """
    if plan.glob is None or plan.glob.stage == 0:
        return features
    check_rows(features, plan.rows)
    return mix_global(features, plan.glob)


def mix_tap(plan: MixPlan) -> dict[int, Callable[[Tensor], Tensor]]:
    """The tap a network needs, {stage: function}; empty if nothing is mixed behind the input."""
    if plan.glob is None or plan.glob.stage == 0:
        return {}
    return {plan.glob.stage: partial(mix_features, plan=plan)}
