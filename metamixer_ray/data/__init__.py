"""Images: where they come from, how they are split, ordered into batches and augmented.

``load_splits`` opens a source (``sources/``, one file per kind), decodes it once per node into a
memory-mapped file (``cache.py``, ``arrow_file.py``), or reads labels and layout of what is too large for that
(``streaming/``), and cuts it (``splits.py``). ``BatchOrder``
(``sampler.py``) says which images form each batch, ``train_batches`` and ``eval_batches`` (``loader.py``)
fetch and augment them. Order and augmentation are pure functions of (seed, epoch, step), so nothing of them
is ever sent or saved. The room knows nothing of Ray or MLflow.
"""

from metamixer_ray.data.config import Augment, DataConfig
from metamixer_ray.data.decoded_set import DecodedSet
from metamixer_ray.data.image_set import ImageSet
from metamixer_ray.data.loader import Batch, eval_batches, normalise, train_batches
from metamixer_ray.data.sampler import BatchOrder, wants_quadruples
from metamixer_ray.data.sources import NAMED_SOURCES
from metamixer_ray.data.splits import Splits, load_splits
from metamixer_ray.data.windows import Layout

__all__ = [
    "NAMED_SOURCES",
    "Augment",
    "Batch",
    "BatchOrder",
    "DataConfig",
    "DecodedSet",
    "ImageSet",
    "Layout",
    "Splits",
    "eval_batches",
    "load_splits",
    "normalise",
    "train_batches",
    "wants_quadruples",
]
