"""Encoded images for the coming batches, and no others, in memory."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Encoded = list[bytes | None]

READS_AT_A_TIME = 4
"""Threads that read row groups: enough to hide the latency of remote storage."""


class Feed:
    """Goes through batches in order, reads row groups shortly before they are needed, and drops every image after its
    last use.

    What was needed only before the first of the batches is never read, which is how a resumed epoch starts at once.
    A row group of which images are needed much later keeps nothing but these in memory.

    Attributes:
        held: images in memory or being read.
        most_held: the largest value of ``held`` so far. It is at most ``ahead``, or if that is more, what one batch
            and later batches need of the row groups up to those of this batch, and of one row group more.
    """

    def __init__(
        self,
        parts: Sequence[Ints],
        groups: Ints,
        read: Callable[[int, Ints, Callable[[float], object]], Encoded],
        *,
        ahead: int,
    ) -> None:
        """
        Args:
            parts: int64 [b] each, the images of every batch.
            groups: int64 [N], the row group of every image of the set.
            read: (row group, images int64 [n] in it, wait) -> what is stored for them; called in threads. To wait for
                a store it calls ``wait(seconds)``, and gives up where that is true.
            ahead: row groups after the next one are read in advance only while ``held`` stays within this.
        """
        self._parts = parts
        self._read = read
        self._ahead = ahead
        self.held = self.most_held = 0
        rows: Ints = np.concatenate([np.empty(0, dtype=np.int64), *parts])
        self._uses = np.bincount(rows, minlength=len(groups))
        images, first_use = np.unique(rows, return_index=True)
        used, of_image = np.unique(groups[images], return_inverse=True)
        # Row groups in the order in which they are first needed.
        first_of_group = np.full(len(used), len(rows), dtype=np.int64)
        np.minimum.at(first_of_group, of_image, first_use)
        order = np.argsort(first_of_group)
        members = np.split(images[np.argsort(of_image, kind="stable")], np.cumsum(np.bincount(of_image))[:-1])
        self._coming = [(int(used[i]), members[i]) for i in order]
        # How many row groups must have been read for each batch.
        place = np.empty(len(groups), dtype=np.int64)
        place[images] = np.argsort(order)[of_image]
        self._needed = [int(place[part].max(initial=-1)) + 1 for part in parts]

    def __iter__(self) -> Generator[Encoded, None, None]:
        """What is stored for the images of each batch, in order."""
        store: dict[int, bytes | None] = {}
        reads: deque[tuple[Ints, Future[Encoded]]] = deque()
        asked = arrived = 0
        pool, over = ThreadPoolExecutor(READS_AT_A_TIME, thread_name_prefix="row-groups"), threading.Event()
        try:
            for part, needed in zip(self._parts, self._needed, strict=True):
                while asked < len(self._coming):
                    group, images = self._coming[asked]
                    # One row group is always read in advance, however large.
                    if asked > needed and self.held + len(images) > self._ahead:
                        break
                    reads.append((images, pool.submit(self._read, group, images, over.wait)))
                    self.held += len(images)
                    self.most_held = max(self.most_held, self.held)
                    asked += 1
                while arrived < needed:
                    images, read = reads.popleft()
                    store.update(zip(images.tolist(), read.result(), strict=True))
                    arrived += 1
                encoded = [store[image] for image in part.tolist()]
                self._drop(part, store)
                yield encoded
        finally:
            over.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _drop(self, part: Ints, store: dict[int, bytes | None]) -> None:
        np.subtract.at(self._uses, part, 1)
        for image in np.unique(part[self._uses[part] == 0]).tolist():
            del store[image]
            self.held -= 1
