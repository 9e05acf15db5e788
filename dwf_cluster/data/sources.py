"""Data sets as uint8 arrays, read once in the driver. To add one: a name in `experiment.SOURCES`, a reader here."""

from __future__ import annotations

import gzip
import math
import os
import pkgutil
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwf_cluster.data.registry import DATASETS, Data, ImageFormat, Shape, Sizes
from dwf_cluster.settings import InvalidInput, printable, regular_file

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
    """

    x_train: Bytes
    y_train: Labels
    x_test: Bytes
    y_test: Labels
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def format(self) -> ImageFormat:
        """What a model must know of them."""
        return ImageFormat(self.shape, self.classes, self.mean, self.std)

    @property
    def shape(self) -> Shape:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.x_train.shape
        return channels, height, width


@dataclass(frozen=True)
class Raw:
    """What a reader returns: images NHWC or NHW as stored, labels as stored."""

    x_train: NDArray[np.generic]
    y_train: NDArray[np.generic]
    x_test: NDArray[np.generic]
    y_test: NDArray[np.generic]


def sizes(data: Data) -> Sizes:
    """What `load` would give, without reading a named data set.

    Raises:
        InvalidInput: as `load`.
    """
    if data.source not in DATASETS:
        images = load(data, Path())
        return Sizes(len(images.x_train), len(images.x_test), images.shape)
    dataset = DATASETS[data.source]
    channels, height, width = dataset.shape
    return Sizes(
        _count(data.train_examples, dataset.train, "train"),
        _count(data.test_examples, dataset.test, "test"),
        (channels, height + 2 * data.padding, width + 2 * data.padding),
    )


def load(data: Data, folder: Path) -> Images:
    """Read, check and prepare the images of an experiment.

    Args:
        data: which images, how many of them, and how they are padded.
        folder: where downloads are kept and looked for.

    Raises:
        InvalidInput: if the arrays are not what `data.source` promises, or `data` asks for more than there is.
        DataUnavailable: if the data set is not here and cannot be downloaded.
    """
    known = DATASETS.get(data.source)
    raw = pkgutil.resolve_name(known.reader)(folder) if known else _npz(Path(data.source))
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
    train = _count(data.train_examples, len(x_train), "train")
    test = _count(data.test_examples, len(x_test), "test")
    x_train, y_train, x_test, y_test = x_train[:train], y_train[:train], x_test[:test], y_test[:test]
    x_train, x_test = (_prepared(x, data) for x in (x_train, x_test))
    mean, std = data.mean, data.std
    if mean is None or std is None:
        mean, std = _moments(x_train)
    elif len(mean) != x_train.shape[1]:
        raise InvalidInput(
            f"data.mean: {len(mean)} values cannot be used: the images have {x_train.shape[1]} channel(s)"
        )
    return Images(x_train, y_train, x_test, y_test, classes, mean, std)


# ------------------------------------------------------------------------------------ checks and preparation


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


def _count(wanted: int | None, available: int, split: str) -> int:
    least = 2 if split == "train" else 1  # BatchNorm needs two images
    count = available if wanted is None else wanted
    if not least <= count <= available:
        raise InvalidInput(f"data.{split}_examples: {count} cannot be used: allowed are {least} to {available}")
    return count


def _prepared(x: Bytes, data: Data) -> Bytes:
    nchw = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    margin = (data.padding, data.padding)
    return np.ascontiguousarray(np.pad(nchw, ((0, 0), (0, 0), margin, margin)))


def _moments(x: Bytes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    histograms = [np.bincount(x[:, c].ravel(), minlength=256) for c in range(x.shape[1])]
    levels = np.arange(256) / 255
    means = [float(h @ levels / h.sum()) for h in histograms]
    variances = [h @ (levels - m) ** 2 / h.sum() for h, m in zip(histograms, means, strict=True)]
    # One grey level at least: a constant channel has nothing to divide by.
    return tuple(means), tuple(max(float(v) ** 0.5, 1 / 255) for v in variances)


# --------------------------------------------------------------------------------------------------- readers


def digits(folder: Path) -> Raw:
    """The 1,797 digits of scikit-learn, 8x8; every fifth image of a fixed shuffle is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = np.round(digits.images * (255 / 16)).astype(np.uint8)
    y = digits.target.astype(np.int64)
    order = np.random.RandomState(0).permutation(len(x))  # a frozen stream: the same split for ever
    test, train = order[::5], np.delete(order, np.s_[::5])
    return Raw(x[train], y[train], x[test], y[test])


_FASHION_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def fashion_mnist(folder: Path) -> Raw:
    downloads = folder / "FashionMNIST" / "raw"
    allocations = (folder, folder / "fashion-mnist", downloads, Path("/usr/share/datasets/fashion-mnist"))
    for place in allocations:
        if all((place / name).is_file() for name in _FASHION_FILES):
            break
    else:
        place = downloads
        _download(
            "FashionMNIST",
            folder,
            f"put its four .gz files into {folder}, or install Debian's package dataset-fashion-mnist",
        )
    return Raw(*(_idx(place / name) for name in _FASHION_FILES))


def _idx(path: Path) -> Bytes:
    """Read an IDX file of bytes: two zero bytes, 0x08, the number of dimensions, each size, the values.

    Never more is decompressed than the sizes in its header say, and they must fit into memory.
    """
    try:
        with gzip.open(path) as file:
            start = file.read(4)
            dimensions = start[3] if len(start) == 4 and start[:3] == b"\0\0\x08" else 0
            header = file.read(4 * dimensions) if dimensions in (1, 3) else b""
            sizes = [int(size) for size in np.frombuffer(header[: len(header) // 4 * 4], dtype=">u4")]
            if not sizes or len(sizes) != dimensions:
                raise InvalidInput(f"{path}: not an IDX file of unsigned bytes, or cut short")
            count = math.prod(sizes)
            _fits(str(path), count)
            content = file.read(count + 1)  # one more than there may be, which also compares the checksum
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidInput(f"{path}: not a gzip file ({error})") from None
    if len(content) != count:
        raise InvalidInput(f"{path}: not an IDX file of unsigned bytes, or cut short")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes)


def _fits(name: str, size: int) -> None:
    """Refuse data of which there is not room for two copies: as read, and as prepared.

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
    """Bytes of memory that a process of this machine can still get."""
    try:
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cifar10(folder: Path) -> Raw:
    # torchvision compares each file with its known checksum before it unpickles any of them.
    train, test = _torchvision("CIFAR10", folder, {"train": True}, {"train": False})
    return Raw(train.data, np.asarray(train.targets), test.data, np.asarray(test.targets))


def svhn(folder: Path) -> Raw:
    train, test = _torchvision("SVHN", folder, {"split": "train"}, {"split": "test"})
    nhwc = (0, 2, 3, 1)
    return Raw(train.data.transpose(nhwc), train.labels, test.data.transpose(nhwc), test.labels)


def _torchvision(name: str, folder: Path, *splits: dict[str, object]) -> list[Any]:
    """torchvision's data sets, downloaded when they are not in `folder`, checksums compared."""
    from torchvision import datasets

    dataset = getattr(datasets, name)
    try:
        return [dataset(root=folder, **split) for split in splits]
    except RuntimeError:  # not there, or not the right bytes
        _download(name, folder, f"copy torchvision's files for {name} into {folder}", splits)
        return [dataset(root=folder, **split) for split in splits]


def _download(name: str, folder: Path, remedy: str, splits: tuple[dict[str, object], ...] = ({},)) -> None:
    from torchvision import datasets

    try:
        for split in splits:
            getattr(datasets, name)(root=folder, download=True, **split)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum a RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataUnavailable(
            f"{name} is not in {folder} and cannot be downloaded ({reason}); {remedy}, "
            "or choose another folder with --data-folder"
        ) from None


def _npz(path: Path) -> Raw:
    names = ("x_train", "y_train", "x_test", "y_test")
    regular_file(str(path), "data.source")
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # numpy's, of headers in an old form: they are a second line
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            missing = [name for name in names if name not in members]
            if missing:
                raise InvalidInput(f"{path}: no array {missing[0]}: {', '.join(names)} are needed")
            _fits(str(path), sum(members[name].file_size for name in names))
            return Raw(*(_array(archive, members[name]) for name in names))
    except InvalidInput:
        raise
    except OSError as error:
        raise InvalidInput(f"data.source: {str(path)!r} cannot be read: {error.strerror or error}") from None
    # Anybody can have made the file. What zipfile, its decompressors and numpy raise on a damaged one is written down
    # nowhere: RuntimeError, NotImplementedError, LZMAError, TokenError, OverflowError and IndexError among others.
    except Exception as error:
        reason = printable(str(error) or type(error).__name__, 200)
        raise InvalidInput(f"{path}: not an .npz file of plain arrays ({reason})") from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[np.generic]:
    """One array of the archive.

    zipfile never returns more than the size in its directory, and memory that numpy has asked for is not taken before
    it is written to: a header that promises more than the archive holds is an error like any other.
    """
    with archive.open(member) as file:
        array: NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
    return array
