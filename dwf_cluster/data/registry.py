"""Data sets by name, and the settings that choose and augment images. To add one: a reader, and an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
        reader: `module:function`; takes the folder of downloads and returns a `data.sources.Raw`.
        download: class of `torchvision.datasets` that downloads it into that folder; empty if nothing is downloaded.
    """

    train: int
    test: int
    shape: Shape
    classes: int
    reader: str
    download: str = ""


DATASETS: Mapping[str, Dataset] = {
    "digits": Dataset(1_437, 360, (1, 8, 8), 10, "dwf_cluster.data.sources:digits"),
    "fashion-mnist": Dataset(60_000, 10_000, (1, 28, 28), 10, "dwf_cluster.data.sources:fashion_mnist", "FashionMNIST"),
    "cifar10": Dataset(50_000, 10_000, (3, 32, 32), 10, "dwf_cluster.data.sources:cifar10", "CIFAR10"),
    "svhn": Dataset(73_257, 26_032, (3, 32, 32), 10, "dwf_cluster.data.sources:svhn", "SVHN"),
}


@dataclass(frozen=True)
class Sizes:
    """Number of training and of test images, and (channels, height, width) of one, as the models see them."""

    train: int
    test: int
    shape: Shape


@dataclass(frozen=True)
class ImageFormat:
    """What a model must know of the images.

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

    source: str = "cifar10"
    """`digits`, `fashion-mnist`, `cifar10`, `svhn`, or an `.npz` file with `x_train`, `y_train`, `x_test`,
    `y_test` (images uint8, NHWC or NHW; labels integers from 0)."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Digest of an `.npz` source; filled in when the file is read, so that the signature follows the
    content and not the path."""
    train_examples: Count | None = None
    """Train on the first n images; null takes all."""
    test_examples: Count | None = None
    """Test on the first n images; null takes all."""
    padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Black pixels added on each side of every image."""
    mean: PerChannel | None = None
    """Mean of each channel, pixels in [0, 1]; null measures it on the training images."""
    std: Spreads | None = None
    """Standard deviation of each channel, pixels in [0, 1]; null measures it on the training images."""
    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Augmentation: pad by n pixels, then crop at random to the old size. Our assumption for CIFAR-10
    and SVHN: 4."""
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
