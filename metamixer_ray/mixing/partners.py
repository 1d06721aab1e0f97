"""Random partners, for the mixers that do not organise their batches."""

import numpy as np
import torch
from torch import Tensor


def random_partner(rng: np.random.Generator, rows: int) -> Tensor:
    """A random permutation of the rows, int64 [rows]; as in the field's code a row may meet itself."""
    return torch.from_numpy(rng.permutation(rows))
