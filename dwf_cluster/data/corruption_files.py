"""Reader of CIFAR-10-C (Hendrycks and Dietterich 2019): the test images of CIFAR-10, corrupted.

A file for each corruption, `<name>.npy`: uint8, shape (5 n, 32, 32, 3), the n test images in their order at each
severity from 1 to 5; `labels.npy`: their labels, shape (5 n,). n is 10,000.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dwf_cluster.data.registry import CORRUPTIONS, Data
from dwf_cluster.data.sources import Bytes, DataUnavailable, Images, fail_if_too_large, padded_nchw
from dwf_cluster.settings import InvalidInput, one_line, regular_file

FOLDER = "CIFAR-10-C"
"""Its folder below that of the downloads, as its archive unpacks it."""

SEVERITIES = 5


def read(images: Images, data: Data, folder: Path, severities: Iterable[int]) -> dict[tuple[str, int], Bytes]:
    """The corrupted forms of an experiment's test images.

    Args:
        images: the experiment's, in the order of `images.test_index`.
        data: how they are padded.
        folder: of the downloads.
        severities: which to read, 1 to 5.

    Returns:
        By corruption and severity, images in the shape of `images.x_test`.

    Raises:
        DataUnavailable: if the folder is not there.
        InvalidInput: if a file is missing, is not of this form, or its labels are not those of the test images.
    """
    location = folder / FOLDER
    if not location.is_dir():
        raise DataUnavailable(
            f"{FOLDER} is not in {folder}; unpack CIFAR-10-C.tar (https://zenodo.org/records/2535967) there, choose "
            "another folder with --data-folder, or set evaluation.corruptions=generated"
        )
    labels = _array(location / "labels.npy")
    count, remainder = divmod(len(labels) if labels.ndim else 0, SEVERITIES)
    if remainder or count <= images.test_index.max():
        raise InvalidInput(
            f"{location / 'labels.npy'}: shape {labels.shape} cannot be used: {SEVERITIES} times the number of test "
            "images is allowed"
        )
    severities = sorted(set(severities))
    fail_if_too_large(FOLDER, len(CORRUPTIONS) * len(severities) * images.x_test.nbytes)
    corrupted = dict[tuple[str, int], Bytes]()
    for severity in severities:
        rows = (severity - 1) * count + images.test_index
        if not np.array_equal(labels[rows], images.y_test):
            raise InvalidInput(
                f"{location / 'labels.npy'}: its labels are not those of the test images of {data.source}"
            )
        for name in CORRUPTIONS:
            path = location / f"{name}.npy"
            x = _array(path)
            shape = (
                SEVERITIES * count,
                images.shape[1] - 2 * data.padding,
                images.shape[2] - 2 * data.padding,
                images.shape[0],
            )
            if x.dtype != np.uint8 or x.shape != shape:
                raise InvalidInput(
                    f"{path}: {x.dtype} of shape {x.shape} cannot be used: allowed is uint8 of shape {shape}"
                )
            corrupted[name, severity] = padded_nchw(x[rows].astype(np.uint8), data.padding)
    return corrupted


def _array(path: Path) -> NDArray[np.generic]:
    """An array of a file; its rows are read when they are used."""
    regular_file(str(path), "evaluation.corruptions")
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInput(f"{path}: not an .npy file ({one_line(error)})") from None
    return array
