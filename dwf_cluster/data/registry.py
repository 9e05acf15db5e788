"""Data sets by name, and the settings that choose and augment images.

To add a data set: a file beside this one with its reader, and an entry in `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from dwf_cluster.settings import Count, PerChannel, Settings, Spreads

Shape = tuple[int, int, int]
"""(channels, height, width) of an image."""


@dataclass(frozen=True)
class Dataset:
    """A named data set.

    Attributes:
        train, test: number of training and of test images.
        shape: of an image as stored, before padding.
        classes: number of labels.
        reader: `module:function`; takes the folder of downloads, downloads what is missing there, returns a
            `data.sources.Raw`. Raises `data.sources.DataUnavailable` if it cannot be downloaded.
        files: that the reader reads; none if the images come with a library.
        folders: where all of these files may lie: relative to the folder of downloads, or absolute.
    """

    train: int
    test: int
    shape: Shape
    classes: int
    reader: str
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ("",)

    def location(self, downloads: Path) -> Path | None:
        """The first folder that holds all files; None if there is none."""
        folders = (downloads / folder for folder in self.folders)
        return next((folder for folder in folders if all((folder / file).is_file() for file in self.files)), None)


_NAMED = "dwf_cluster.data.named"

DATASETS: Mapping[str, Dataset] = {
    "digits": Dataset(1_437, 360, (1, 8, 8), 10, f"{_NAMED}:digits"),
    "fashion-mnist": Dataset(
        60_000,
        10_000,
        (1, 28, 28),
        10,
        f"{_NAMED}:fashion_mnist",
        files=tuple(
            f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
        ),
        # torchvision's folder, and that of Debian's package dataset-fashion-mnist.
        folders=("", "fashion-mnist", "FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
    ),
    "cifar10": Dataset(
        50_000,
        10_000,
        (3, 32, 32),
        10,
        f"{_NAMED}:cifar10",
        files=(*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"),
        folders=("cifar-10-batches-py",),
    ),
    "svhn": Dataset(
        73_257,
        26_032,
        (3, 32, 32),
        10,
        f"{_NAMED}:svhn",
        files=("train_32x32.mat", "test_32x32.mat"),
    ),
}

NPZ_READER = "dwf_cluster.data.own_images:read"
"""Reads an `.npz` file of the user's; takes its path, returns a `data.sources.Raw`."""


CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""Common corruptions (Hendrycks and Dietterich 2019), by the names of CIFAR-10-C's files."""


@dataclass(frozen=True)
class Sizes:
    """Number of training images (without validation images) and of test images, and (channels, height, width) of one,
    as the models see them."""

    train: int
    test: int
    shape: Shape


@dataclass(frozen=True)
class ImageFormat:
    """The properties of the images that a model depends on.

    Attributes:
        shape: (channels, height, width) of an image.
        classes: number of labels.
        mean, std: one number a channel, of pixels in [0, 1]; the models normalise with them.
    """

    shape: Shape
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Data(Settings):
    """Which images, and how they are augmented."""

    source: str = Field(
        "cifar10",
        description=f"{', '.join(f'`{name}`' for name in DATASETS)}, or an `.npz` file with `x_train`, `y_train`, "
        "`x_test`, `y_test` (images uint8, NHWC or NHW; labels integers from 0).",
    )
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Digest of an `.npz` source; filled in when the file is read, so that the signature follows the
    content and not the path."""
    train_examples: Count | None = None
    """Train on n images, of those that validation leaves: the first ones of a named data set, a class-balanced draw
    from an `.npz` file; null takes all."""
    test_examples: Count | None = None
    """Test on n images: the first ones of a named data set, a class-balanced draw from an `.npz` file; null takes
    all."""
    validation_examples: Count | None = None
    """Cut n images off the training images, a class-balanced draw that is the same for every seed. Probes, ASHA and
    `keep=best` look at them; nothing is trained or tested on them. Null: none."""
    padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Black pixels added on each side of every image; attacks may change them. Our assumption: 2 for Fashion-MNIST, for
    networks that are made for 32x32; its numbers are not comparable with those of others at 28x28."""
    mean: PerChannel | None = None
    """Mean of each channel, pixels in [0, 1]; null measures it on the training images. Our assumption: that of the data
    set, 0.4914,0.4822,0.4465 for CIFAR-10."""
    std: Spreads | None = None
    """Standard deviation of each channel, pixels in [0, 1]; null measures it on the training images. Our assumption:
    that of the data set, 0.2470,0.2435,0.2616 for CIFAR-10. The other candidate is 0.2023,0.1994,0.2010: with it, the
    checkpoints that the paper cites have its clean accuracies."""
    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Augmentation: pad by n pixels, then crop at random to the old size. Our assumption: 4 for
    CIFAR-10 and SVHN."""
    flip: bool = False
    """Augmentation: mirror each image left to right with probability 1/2. Our assumption: CIFAR-10 only."""

    @model_validator(mode="after")
    def _one_std_for_each_mean(self) -> Data:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std need the same number of channels, or null for both")
        return self

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        if (source not in DATASETS and not source.endswith(".npz")) or "\0" in source:
            raise ValueError(f"one of {', '.join(DATASETS)}, or the path of an .npz file")
        return source
