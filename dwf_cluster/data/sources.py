"""Data sets as uint8 arrays: read by the reader that the registry names, checked, and prepared for a device."""

from __future__ import annotations

import functools
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dwf_cluster.data import subsets
from dwf_cluster.data.registry import DATASETS, NPZ_READER, Data, ImageFormat, Shape, Sizes
from dwf_cluster.settings import InvalidInput, regular_file

Bytes = NDArray[np.uint8]
Labels = NDArray[np.int64]


class DataUnavailable(RuntimeError):
    """The data set is neither on this machine nor can it be downloaded. Its text is one line."""


@dataclass(frozen=True)
class Images:
    """A data set, ready to be put on a device.

    Attributes:
        x_train, x_test: uint8, shape (n, channels, height, width).
        y_train, y_test: int64, shape (n,), values 0..classes-1.
        classes: number of labels.
        mean, std: one number a channel, of pixels in [0, 1]; the models normalise with them.
        x_validation, y_validation: as the others, none of which they are part of; without a split, no images.
        test_index: int64, shape (n,): the index of each test image in the data set or the file. `example` in the table
            of predictions is an index of this array.
        corrupted: the test images in corrupted forms, by corruption and severity, where they were read from files
            (`data.corruption_files.read`); as x_test.
        whole_test: all test images and their labels, where x_test is a part of them and given weights are tested.
    """

    x_train: Bytes
    y_train: Labels
    x_test: Bytes
    y_test: Labels
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    x_validation: Bytes = field(default_factory=lambda: np.zeros((0, 1, 1, 1), np.uint8))
    y_validation: Labels = field(default_factory=lambda: np.zeros(0, np.int64))
    test_index: Labels = field(default_factory=lambda: np.zeros(0, np.int64))
    corrupted: Mapping[tuple[str, int], Bytes] = field(default_factory=dict)
    whole_test: tuple[Bytes, Labels] | None = None

    @property
    def format(self) -> ImageFormat:
        """The properties that a model depends on."""
        return ImageFormat(self.shape, self.classes, self.mean, self.std)

    @property
    def shape(self) -> Shape:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.x_train.shape
        return channels, height, width


@dataclass(frozen=True)
class Raw:
    """The result of a reader: images NHWC or NHW as stored, labels as stored."""

    x_train: NDArray[np.generic]
    y_train: NDArray[np.generic]
    x_test: NDArray[np.generic]
    y_test: NDArray[np.generic]


def sizes(data: Data) -> Sizes:
    """The sizes of the images that `load` would return, without reading a named data set.

    Raises:
        InvalidInput: as `load`.
    """
    if data.source not in DATASETS:
        images = load(data, Path())
        return Sizes(len(images.x_train), len(images.x_test), images.shape)
    dataset = DATASETS[data.source]
    channels, height, width = dataset.shape
    train, test = _counts(data, dataset.train, dataset.test, dataset.classes)
    return Sizes(
        train,
        test,
        (channels, height + 2 * data.padding, width + 2 * data.padding),
    )


def load(data: Data, folder: Path) -> Images:
    """Read, check and prepare the images of an experiment.

    Args:
        data: which images, how many of them, and how they are padded.
        folder: where downloads are kept and looked for.

    Raises:
        InvalidInput: if the arrays do not fit `data.source`, or `data` requests more images than there are.
        DataUnavailable: if the data set is not here and cannot be downloaded.
    """
    if dataset := DATASETS.get(data.source):
        return _prepare(pkgutil.resolve_name(dataset.reader)(folder), data)
    status = regular_file(data.source, "data.source")
    return _own_images(data, os.path.abspath(data.source), status.st_mtime_ns, status.st_size)


def fetch(data: Data, folder: Path) -> None:
    """Download a data set into `folder` if it is not there, and verify that it can be read and used.

    Nothing is downloaded for sources that need no download; they are verified.

    Raises:
        InvalidInput, DataUnavailable: as `load`.
    """
    load(data, folder)


def is_here(data: Data, folder: Path) -> bool:
    """Whether `load` would find the data set without a network. Looks for its files, but does not read them."""
    if dataset := DATASETS.get(data.source):
        return dataset.location(folder) is not None
    return os.path.isfile(data.source)


@functools.lru_cache(maxsize=1)
def _own_images(data: Data, path: str, modified: int, size: int) -> Images:
    """The images of an `.npz` file; read once as long as the file does not change: `sizes` needs them before `load`."""
    raw: Raw = pkgutil.resolve_name(NPZ_READER)(Path(data.source))
    return _prepare(raw, data)


# ------------------------------------------------------------------------------------ checks and preparation


def _prepare(raw: Raw, data: Data) -> Images:
    x_train, y_train = _checked(raw.x_train, raw.y_train, "train")
    x_test, y_test = _checked(raw.x_test, raw.y_test, "test")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InvalidInput(
            f"x_test: images of shape {x_test.shape[1:]} cannot be used: x_train has {x_train.shape[1:]}"
        )
    classes = int(y_train.max()) + 1
    if classes < 2:
        raise InvalidInput("y_train: all labels are 0: at least two classes are needed")
    if y_test.max() >= classes:
        raise InvalidInput(f"y_test: label {y_test.max()} cannot be used: y_train has 0..{classes - 1}")
    _counts(data, len(x_train), len(x_test), classes)
    validation = subsets.balanced(y_train, data.validation_examples or 0, "validation")
    remaining = np.delete(np.arange(len(y_train)), validation)
    train = remaining[subsets.subset(data.source, y_train[remaining], data.train_examples, "train")]
    test = subsets.subset(data.source, y_test, data.test_examples, "test")
    labels = {"train": y_train[train], "validation": y_train[validation], "test": y_test[test]}
    _refuse_missing_classes(data, labels, classes)
    x_train, x_validation, x_test = (
        padded_nchw(_selected(x, indices), data.padding)
        for x, indices in ((x_train, train), (x_train, validation), (x_test, test))
    )
    y_train, y_validation, y_test = y_train[train], y_train[validation], y_test[test]
    mean, std = data.mean, data.std
    if mean is None or std is None:
        mean, std = _moments(x_train)
    elif len(mean) != x_train.shape[1]:
        raise InvalidInput(
            f"data.mean: {len(mean)} values cannot be used: the images have {x_train.shape[1]} channel(s)"
        )
    return Images(x_train, y_train, x_test, y_test, classes, mean, std, x_validation, y_validation, test)


def _refuse_missing_classes(data: Data, labels: Mapping[str, Labels], classes: int) -> None:
    """Refuse a split in which a class has no images: an accuracy on it would be one of fewer classes.

    The first images of a named data set are not refused: its order is random, and a user may want few.
    """
    if data.source in DATASETS:
        labels = {name: y for name, y in labels.items() if name != "test" and data.validation_examples}
    for split, y in labels.items():
        missing = np.flatnonzero(np.bincount(y, minlength=classes) == 0)
        if len(missing) and (split != "validation" or data.validation_examples):
            raise InvalidInput(
                f"data.source: {data.source!r} cannot be used: class {missing[0]} has no {split} images; allowed are "
                f"images of each of the {classes} classes in every split"
            )


def _checked(x: NDArray[np.generic], y: NDArray[np.generic], split: str) -> tuple[Bytes, Labels]:
    if x.dtype != np.uint8:
        raise InvalidInput(f"x_{split}: dtype {x.dtype} cannot be used: images are uint8, 0..255")
    if x.ndim not in (3, 4) or (x.ndim == 4 and not 1 <= x.shape[3] <= 4) or 0 in x.shape:
        raise InvalidInput(f"x_{split}: shape {x.shape} cannot be used: images are NHWC with 1 to 4 channels, or NHW")
    if y.dtype.kind not in "iu":
        raise InvalidInput(f"y_{split}: dtype {y.dtype} cannot be used: labels are integers")
    if y.shape != (len(x),):
        raise InvalidInput(f"y_{split}: shape {y.shape} cannot be used: {len(x)} images need shape ({len(x)},)")
    if y.min() < 0 or y.max() >= 10_000:
        raise InvalidInput(f"y_{split}: label {min(y.min(), 0) or y.max()} cannot be used: labels are 0..9999")
    return x.astype(np.uint8, copy=False), y.astype(np.int64)


def _counts(data: Data, train: int, test: int, classes: int) -> tuple[int, int]:
    """Numbers of images to train and to test on.

    Args:
        data: which of them.
        train, test: images of the data set.
        classes: number of labels.

    Raises:
        InvalidInput: if `data` requests more images than there are, or too few.
    """
    validation = data.validation_examples or 0
    is_drawn = data.source not in DATASETS or validation > 0  # then every class must be there
    least = max(2, classes) if is_drawn else 2  # BatchNorm needs two images
    if validation:
        _count(validation, classes, train - least, "validation")
    return (
        _count(data.train_examples, least, train - validation, "train"),
        _count(data.test_examples, classes if data.source not in DATASETS else 1, test, "test"),
    )


def _count(requested: int | None, least: int, available: int, split: str) -> int:
    if requested is None:
        requested, least = available, 2 if split == "train" else 1
    if not least <= requested <= available:
        raise InvalidInput(f"data.{split}_examples: {requested} cannot be used: allowed are {least} to {available}")
    return requested


def _selected(x: Bytes, indices: NDArray[np.int64]) -> Bytes:
    """Some of the images; all of them are not copied."""
    return x if len(indices) == len(x) else x[indices]


def padded_nchw(x: Bytes, padding: int) -> Bytes:
    """Images NHWC or NHW as NCHW, with black pixels on each side."""
    nchw = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    margin = (padding, padding)
    return np.ascontiguousarray(np.pad(nchw, ((0, 0), (0, 0), margin, margin)))


def _moments(x: Bytes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    histograms = [np.bincount(x[:, c].ravel(), minlength=256) for c in range(x.shape[1])]
    levels = np.arange(256) / 255
    means = [float(h @ levels / h.sum()) for h in histograms]
    variances = [h @ (levels - m) ** 2 / h.sum() for h, m in zip(histograms, means, strict=True)]
    # At least one grey level: the standard deviation of a constant channel is 0.
    return tuple(means), tuple(max(float(v) ** 0.5, 1 / 255) for v in variances)


def fail_if_too_large(name: str, size: int) -> None:
    """For readers: refuse data that does not fit into memory twice, as read and as prepared.

    Raises:
        InvalidInput: if so.
    """
    allowed = _available_memory() // 2
    if size > allowed:
        raise InvalidInput(
            f"{name}: {size:,} bytes decompressed cannot be used: allowed are {allowed:,}, half of this machine's free "
            "memory"
        )


def _available_memory() -> int:
    """Bytes of memory that a process of this machine can still allocate."""
    try:
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
