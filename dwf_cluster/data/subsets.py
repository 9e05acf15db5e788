"""Which images of a data set are used: class-balanced draws that depend on the labels alone."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwf_cluster.data.registry import DATASETS

Indices = NDArray[np.int64]


def balanced_order(labels: NDArray[Any], purpose: str) -> Indices:
    """A fixed random order of images whose every beginning is class-balanced.

    It starts with one image of each class; then a class comes up as often as its share of all images. So the first n
    images have n / classes of each class if all classes are equally frequent (give or take one image), and every class
    if n is at least the number of classes.

    Args:
        labels: integers from 0, shape (n,).
        purpose: draws for different purposes are unrelated. The seed of an experiment plays no part.

    Returns:
        The indices 0..n-1, shape (n,).
    """
    # NumPy keeps the stream of RandomState fixed, and so the draw.
    order = np.random.RandomState(zlib.crc32(purpose.encode())).permutation(len(labels))
    shuffled = np.asarray(labels)[order]
    counts = np.bincount(shuffled)
    rank = np.empty(len(order), np.int64)  # of an image among those of its class
    rank[np.argsort(shuffled, kind="stable")] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    indices: Indices = order[np.argsort(rank / counts[shuffled], kind="stable")].astype(np.int64)
    return indices


def balanced(labels: NDArray[Any], count: int, purpose: str) -> Indices:
    """The first `count` images of `balanced_order`, or all if there are fewer, rising."""
    return np.sort(balanced_order(labels, purpose)[:count])


def subset(source: str, labels: NDArray[Any], count: int | None, purpose: str) -> Indices:
    """The images that a field such as `data.test_examples` selects, in the order of the data set.

    Args:
        source: as `data.source`. Of a named data set these are the first images: its order is random, and published
            numbers are of these. A user's file may be sorted by label, so its images are drawn (`balanced`).
        labels: of all images, shape (n,).
        count: how many; None takes all.
        purpose: of the draw.

    Returns:
        Rising indices, shape (min(count, n),).
    """
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    return np.arange(count) if source in DATASETS else balanced(labels, count, purpose)


def checked(source: str, labels: NDArray[Any], count: int) -> Indices:
    """The images that are checked for gradient masking (`evaluation.check_examples`); arguments as of `subset`."""
    return subset(source, labels, count, "checks")
