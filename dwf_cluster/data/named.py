"""Readers of the named data sets. torchvision downloads CIFAR-10, SVHN and Fashion-MNIST, and compares checksums."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dwf_cluster.data.registry import DATASETS
from dwf_cluster.data.sources import Bytes, DataUnavailable, Raw, fail_if_too_large
from dwf_cluster.settings import InvalidInput, one_line


def digits(folder: Path) -> Raw:
    """The 1,797 digits of scikit-learn, 8x8; every fifth image of a fixed shuffle is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = np.round(digits.images * (255 / 16)).astype(np.uint8)
    y = digits.target.astype(np.int64)
    order = np.random.RandomState(0).permutation(len(x))  # NumPy keeps this stream fixed, and so the split
    test, train = order[::5], np.delete(order, np.s_[::5])
    return Raw(x[train], y[train], x[test], y[test])


def fashion_mnist(folder: Path) -> Raw:
    """Fashion-MNIST's four IDX files, from the folder of downloads or from Debian's package."""
    dataset = DATASETS["fashion-mnist"]
    if dataset.location(folder) is None:
        remedy = f"put its four .gz files into {folder}, or install Debian's package dataset-fashion-mnist"
        _download("FashionMNIST", folder, remedy, {})
    location = dataset.location(folder)
    if location is None:
        raise DataUnavailable(f"FashionMNIST was downloaded into {folder}, but its four .gz files are not there")
    return Raw(*(_idx(location / name) for name in dataset.files))


def cifar10(folder: Path) -> Raw:
    """CIFAR-10's python version. torchvision compares each file with its known checksum before it unpickles any."""
    train, test = _torchvision("CIFAR10", folder, {"train": True}, {"train": False})
    return Raw(train.data, np.asarray(train.targets), test.data, np.asarray(test.targets))


def svhn(folder: Path) -> Raw:
    """SVHN's cropped digits, without the extra images."""
    train, test = _torchvision("SVHN", folder, {"split": "train"}, {"split": "test"})
    nhwc = (0, 2, 3, 1)
    return Raw(train.data.transpose(nhwc), train.labels, test.data.transpose(nhwc), test.labels)


def _torchvision(name: str, folder: Path, *splits: dict[str, object]) -> list[Any]:
    """torchvision's data sets, downloaded if they are not in `folder`, checksums compared."""
    from torchvision import datasets

    dataset = getattr(datasets, name)
    try:
        return [dataset(root=folder, **split) for split in splits]
    except RuntimeError:  # files are missing or have a wrong checksum
        _download(name, folder, f"copy torchvision's files for {name} into {folder}", *splits)
        return [dataset(root=folder, **split) for split in splits]


def _download(name: str, folder: Path, remedy: str, *splits: dict[str, object]) -> None:
    """Download with torchvision.

    Args:
        name: class of `torchvision.datasets`.
        folder: of the downloads.
        remedy: what the user can do instead.
        splits: arguments of the class, for each part of the data set.

    Raises:
        DataUnavailable: if that fails.
    """
    from torchvision import datasets

    try:
        for split in splits:
            getattr(datasets, name)(root=folder, download=True, **split)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum a RuntimeError
        raise DataUnavailable(
            f"{name} is not in {folder} and cannot be downloaded ({one_line(error)}); on a machine with a network, run "
            f"the same command with --fetch-data, or {remedy}, or choose another folder with --data-folder"
        ) from None


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
            fail_if_too_large(str(path), count)
            content = file.read(count + 1)  # one more than there may be, which also compares the checksum
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidInput(f"{path}: not a gzip file ({error})") from None
    if len(content) != count:
        raise InvalidInput(f"{path}: not an IDX file of unsigned bytes, or cut short")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes)
