"""The suite of faults uses the spine's processes that stay."""

from tests.spine.conftest import pool, small

__all__ = ["pool", "small"]
