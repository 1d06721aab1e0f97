"""scikit-learn's handwritten digits: 1,797 grey 8 x 8 images that come with the package, so no download."""

import numpy as np

from metamixer_ray.data.sources.base import Part, Source, Split, array_chunks
from metamixer_ray.data.stratify import allocate, choose
from metamixer_ray.randomness import numpy_generator

TEST_SHARE = 0.2


def open_digits() -> Source:
    """The digits, in a fixed stratified split of 1,438 training and 359 test images.

    Their values 0..16 are scaled to 0..255. They are enlarged to 16 x 16 unless --image-size says otherwise,
    because a convolutional network has nothing left to convolve after two halvings of 8 pixels.
    """
    # "split 1" changes when the fixed split does, so that no cache outlives it.
    return Source(name="digits", identity=["digits", "split 1"], open=_open, image_size=16)


def _open(split: Split) -> Part:
    from sklearn.datasets import load_digits  # slow to import, and only this source needs it

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    counts = np.bincount(labels)
    per_class = allocate(counts, int(TEST_SHARE * len(labels)), least=np.zeros_like(counts), most=counts)
    is_test = choose(labels, per_class, numpy_generator(0, "digits-split"))
    chosen = is_test if split == "test" else ~is_test
    where = f"digits ({split})"
    return Part(
        chunks=array_chunks(images[chosen], labels[chosen].tolist(), where),
        rows=int(chosen.sum()),
        where=where,
        classes=tuple(str(digit) for digit in range(10)),
    )
