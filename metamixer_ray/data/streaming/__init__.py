"""Sets too large to be decoded once: Parquet row groups are read, and their images decoded, again in every epoch.

``choice.py`` says whether a set is streamed, ``index.py`` reads its labels and layout once, ``row_groups.py`` reads
encoded images, ``feed.py`` keeps those in memory that the coming batches need, and ``streamed_set.py`` makes batches
of them. The order that lets a batch do with few row groups is in ``data/windows.py``.
"""

from metamixer_ray.data.streaming.choice import check_memory, is_streamed
from metamixer_ray.data.streaming.index import PartIndex, read_index
from metamixer_ray.data.streaming.row_groups import RowGroups
from metamixer_ray.data.streaming.streamed_set import Reading, StreamedSet

__all__ = ["PartIndex", "Reading", "RowGroups", "StreamedSet", "check_memory", "is_streamed", "read_index"]
