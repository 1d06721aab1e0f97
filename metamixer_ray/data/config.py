"""What a person may choose about the data: where it is, how it is split, sampled and augmented."""

from dataclasses import dataclass
from typing import Literal

from metamixer_ray.errors import ConfigError

Augment = Literal["auto", "none", "crop", "crop-flip", "resized-crop", "trivial", "rand"]
Streaming = Literal["auto", "yes", "no"]

SMALLEST_SIDE, LARGEST_SIDE = 4, 4096
"""Pixels; a batch of images larger than that fits no memory."""

STREAM_ABOVE_GB = 32
"""Decoded sets larger than this don't stay in the page cache of most nodes, and each read would go to the disk."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they become batches.

    Raises:
        ConfigError: a value that cannot work, named by its flag.
    """

    data: str = "digits"
    """What to learn from: a name (digits, cifar10, cifar100, fashion-mnist, svhn, stl10); a Parquet file,
    folder, glob or URI (s3://, gs://, file://) with Hugging Face image columns; a folder with train/ and
    test/ trees of class folders; or module:function that returns (train_images, train_labels, test_images,
    test_labels)."""

    test_data: str | None = None
    """Where the test images are, when --data holds only training images: a file, folder, glob or URI like
    --data."""

    data_root: str | None = None
    """Folder that already holds a named torchvision set, unpacked as torchvision lays it out; nothing is
    downloaded."""

    follow_links: bool = False
    """In a tree of class folders, whether links may lead out of the folder that --data names."""

    image_column: str | None = None
    """Parquet column with the images; found by its type when there is only one."""

    label_column: str | None = None
    """Parquet column with the integer labels; found by its type when there is only one."""

    image_size: int | None = None
    """Side in pixels that every image is brought to (short side resized, then centre crop); by default the
    images' own size, and 16 for digits. Needed when images differ in size or aren't square."""

    validation_fraction: float = 0.0
    """Share of the training set cut off as validation split, evenly over the classes and before
    --train-limit; when it is above 0, evaluation uses this split instead of the test set."""

    train_limit: int | None = None
    """Train on this many images only, drawn evenly over the classes from what --validation-fraction left."""

    split_seed: int = 0
    """Seed of the validation split and of --train-limit; apart from --seed, so that runs that differ only in
    --seed learn from and are measured on the same images."""

    augment: Augment = "auto"
    """How training images vary: crop (random crop after padding), crop-flip (and random mirroring),
    resized-crop (a random part of 8 to 100 % of the image, resized, and random mirroring), trivial
    (crop-flip, then TrivialAugment), rand (crop-flip, then RandAugment), none; auto is resized-crop for
    streamed sets, crop for the named sets digits and svhn, whose mirror images mean something else, and
    crop-flip for all others. For streamed sets trivial and rand follow resized-crop. Streamed sets that are
    trained with resized crops are evaluated on the centre crop of 224/256 of the short side, as is usual."""

    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with an image that cannot be decoded or has no valid label: stop, or leave it out and count
    it. In a streamed training batch another image of its class out of the batch stands in for it."""

    sampler: Literal["auto", "quadruple", "shuffle"] = "auto"
    """How batches are formed: quadruple (two images of each of two classes, side by side), shuffle (plain
    random order); auto takes quadruple when the mixer needs it."""

    loader_processes: int = 0
    """Processes per worker that prepare and augment batches; 0 uses one background thread, which is too slow
    for streamed sets: give as many as the worker has CPUs. Never changes the batches."""

    streaming: Streaming = "auto"
    """Whether images stay encoded and are read and decoded again in every epoch (Parquet only, needs
    --image-size); auto streams what would take more than 32 GB decoded (images x 3 x size x size bytes). A
    validation split lies all over the training files, so each evaluation on it reads all of them."""

    stream_window: int = 8192
    """Streamed images that are shuffled together: random row groups of about so many images in all; a row
    group is never divided. A worker holds up to one and a half windows in memory, as encoded as in the files
    (for ImageNet 1.5 x 8192 x 110 KB = 1.4 GB), divided by --replicas, and for each loader process two
    batches, encoded and decoded."""

    cache_dir: str | None = None
    """Folder for decoded images and downloads; by default $METAMIXER_CACHE, else ~/.cache/metamixer_ray."""

    def __post_init__(self) -> None:
        if self.image_size is not None and not SMALLEST_SIDE <= self.image_size <= LARGEST_SIDE:
            raise ConfigError(
                f"--image-size {self.image_size}: images need at least {SMALLEST_SIDE} pixels a side, and may have at "
                f"most {LARGEST_SIDE}"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"--validation-fraction {self.validation_fraction}: give a share from 0 (none) to below 1, like 0.1"
            )
        if self.train_limit is not None and self.train_limit < 1:
            raise ConfigError(f"--train-limit {self.train_limit}: give a positive number of images, or leave it out")
        if self.split_seed < 0:
            raise ConfigError(f"--split-seed {self.split_seed}: give 0 or a positive integer")
        if self.stream_window < 1:
            raise ConfigError(f"--stream-window {self.stream_window}: give a positive number of images, like 8192")
        if self.loader_processes < 0:
            raise ConfigError(f"--loader-processes {self.loader_processes}: give 0 or a positive integer")
