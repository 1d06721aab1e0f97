"""Global mixing: interpolation of whole rows, with a lambda for each.

Of images it is mixup (Zhang et al., ICLR 2018, arXiv 1710.09412), of what flows between two stages it is
Manifold Mixup (Verma et al., ICML 2019, arXiv 1806.05236).
"""

import numpy as np
import torch
from torch import Tensor

from metamixer_ray.mixing.blend import blend_rows
from metamixer_ray.mixing.plan import GlobalMix

# Lambdas are multiples of 1/256: lambda and 1 - lambda are then exact in bfloat16 and float16 too, so that
# features under autocast are mixed by the very number that their labels are mixed by, at no cost.
LAMBDA_STEPS = 256


def draw_global(rng: np.random.Generator, partner: Tensor, *, stage: int, alpha: float) -> GlobalMix:
    """One lambda ~ Beta(alpha, alpha) per row, rounded to a multiple of 1/256. ``partner``: int64 [B]."""
    lam = np.rint(rng.beta(alpha, alpha, size=len(partner)) * LAMBDA_STEPS) / LAMBDA_STEPS
    return GlobalMix(partner, torch.from_numpy(lam.astype(np.float32)), stage)


def mix_global(values: Tensor, glob: GlobalMix) -> Tensor:
    """Interpolate rows of images, features or targets: any floating point [B, ...]; the dtype is kept."""
    return blend_rows(values, glob.partner, glob.kept)
