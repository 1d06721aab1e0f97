"""The quadruple (A1, A2, B1, B2) and its two involutions.

A batch of an organised mixer is a row of quadruples: rows 4q .. 4q+3 are two images of a class A and two of
another class B. Both involutions work on row indices, keep every row inside its quadruple, undo themselves,
and commute.
"""

from torch import Tensor

from metamixer_ray.errors import ConfigError

QUADRUPLE = 4


def swap_classes(index: Tensor) -> Tensor:
    """A1 <-> B1, A2 <-> B2, for row indices of any shape (int64)."""
    return index ^ 2


def swap_members(index: Tensor) -> Tensor:
    """A1 <-> A2, B1 <-> B2, for row indices of any shape (int64)."""
    return index ^ 1


def require_quadruples(rows: int) -> None:
    """Raise ``ConfigError`` naming ``--batch-size`` unless ``rows`` is a positive multiple of four."""
    if rows <= 0 or rows % QUADRUPLE:
        raise ConfigError(
            f"--batch-size gives each replica {rows} rows, not quadruples (two images of each of two "
            f"classes); give each a multiple of {QUADRUPLE}, or use --pairing free or another --mixer"
        )
