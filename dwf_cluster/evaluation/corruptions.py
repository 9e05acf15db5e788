"""Fifteen common corruptions (Hendrycks and Dietterich 2019), generated from the test images or read from files.

Strengths are those of CIFAR-10-C. Noise, defocus, brightness, contrast, pixelation, JPEG and the elastic transform are
their authors' definitions; `glass_blur`, `motion_blur`, `zoom_blur`, `snow`, `fog` and `frost` are simpler (their
docstrings say how). So accuracies on generated images are not comparable with published ones on CIFAR-10-C, except that
those of its files are. Our assumption: lengths in pixels are those for 32x32 images, whatever the size, except for the
elastic transform's, which follow the size as the authors' do.

A corruption's random draws depend on the image's pixels, the corruption and the severity alone: every model, seed and
shard sees the same images.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from dwf_cluster.data.device import to_float
from dwf_cluster.evaluation.registry import CORRUPTION
from dwf_cluster.evaluation.run import Attacked, Batch

Pixels = NDArray[np.float64]
"""An image, pixels in [0, 1], shape (height, width, channels)."""


def corruptions(batch: Batch) -> Iterator[Attacked]:
    """The corrupted images of each column; 8-bit, as the benchmark's."""
    clean = (batch.x * 255).round().to(torch.uint8).cpu().numpy()
    for column in batch.columns:
        name, severity = column.attack.removeprefix(CORRUPTION), column.steps or 1
        if batch.evaluation.corruptions == "files":
            images = batch.corrupted[name, severity]
        else:
            images = np.stack([corrupted(image, name, severity) for image in clean])
        yield Attacked(column, to_float(torch.tensor(images, device=batch.x.device)))


def corrupted(image: NDArray[np.uint8], name: str, severity: int) -> NDArray[np.uint8]:
    """One corrupted image.

    Args:
        image: shape (channels, height, width), any size and number of channels.
        name: one of `data.registry.CORRUPTIONS`.
        severity: 1 to 5.

    Returns:
        Shape of `image`. Fractions of a level are cut off, as by the authors.
    """
    x = image.transpose(1, 2, 0)
    # NumPy keeps the streams of RandomState fixed.
    random = np.random.RandomState(zlib.crc32(image.tobytes() + f"{name} {severity}".encode()))
    if name in _ON_BYTES:
        return np.ascontiguousarray(_ON_BYTES[name](x, severity - 1).transpose(2, 0, 1))
    result = np.clip(_ON_PIXELS[name](x / 255, severity - 1, random), 0, 1) * 255
    return np.ascontiguousarray(result.astype(np.uint8).transpose(2, 0, 1))


# ------------------------------------------------------------------------------------------------------- noise


def _gaussian_noise(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    return x + random.normal(size=x.shape, scale=(0.04, 0.06, 0.08, 0.09, 0.10)[level])


def _shot_noise(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    photons = (500, 250, 100, 75, 50)[level]
    return random.poisson(x * photons) / photons


def _impulse_noise(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    """Salt and pepper, on single values."""
    replaced = random.uniform(size=x.shape) < (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    return np.where(replaced, random.uniform(size=x.shape) < 0.5, x)


# -------------------------------------------------------------------------------------------------------- blur


def _defocus_blur(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    radius, softness = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[level]
    rows, columns = np.mgrid[-3:4, -3:4]
    disk = (rows**2 + columns**2 <= radius**2).astype(float)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), softness, radius=1)
    blurred: Pixels = ndimage.convolve(x, kernel[:, :, None], mode="mirror")
    return blurred


def _glass_blur(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    """Pixels trade places with neighbours between two Gaussian blurs.

    Simpler: the authors' exchange of pixels overwrites one of the two; here they are exchanged.
    """
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[level]
    x = ndimage.gaussian_filter(x, (sigma, sigma, 0))
    height, width, channels = x.shape
    order = list(range(height * width))
    for moves in (random.randint(-1, 1, size=(rounds, height, width, 2)) @ [width, 1]).tolist():
        for row in range(height - 1, 1, -1):
            for column in range(width - 1, 1, -1):
                one = row * width + column
                other = one + moves[row][column]
                order[one], order[other] = order[other], order[one]
    x = x.reshape(-1, channels)[order].reshape(x.shape)
    blurred: Pixels = ndimage.gaussian_filter(x, (sigma, sigma, 0))
    return blurred


def _motion_blur(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[level]
    return _moved(x, radius, sigma, random.uniform(-45, 45))


def _moved(x: Pixels, radius: int, sigma: float, angle: float) -> Pixels:
    """A mean along a line, with the weights of half a Gaussian; `angle` in degrees.

    Simpler: ImageMagick, which the authors call, rounds the line's points to whole pixels; here they are interpolated.
    """
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    down, right = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    moved = (
        weight * ndimage.shift(x, (step * down, step * right, 0), order=1, mode="nearest")
        for step, weight in enumerate(weights)
        if weight > 1e-4
    )
    mean: Pixels = sum(moved) / weights[weights > 1e-4].sum()
    return mean


def _zoom_blur(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    """The mean over zooms in steps of 1 %.

    Simpler: the authors zoom a crop of whole pixels; here the zoom is exact.
    """
    zooms = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[level], 0.01)
    return (x + sum(_zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1)


def _zoomed(x: Pixels, zoom: float) -> Pixels:
    scale = np.array([1 / zoom, 1 / zoom, 1])
    centre = (np.array(x.shape) - 1) / 2
    zoomed: Pixels = ndimage.affine_transform(x, scale, centre - scale * centre, order=1, mode="nearest")
    return zoomed


# ----------------------------------------------------------------------------------------------------- weather


def _snow(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    """Flakes, blurred by motion, on a whitened image. Simpler: as `motion_blur` and `zoom_blur` are."""
    mean, std, zoom, least, radius, sigma, share = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[level]
    layer = _zoomed(random.normal(size=(*x.shape[:2], 1), loc=mean, scale=std), zoom)
    layer = _moved(np.where(layer < least, 0, layer).clip(0, 1), int(radius), sigma, random.uniform(-135, -45))
    grey = x @ np.array([0.299, 0.587, 0.114])[:, None] if x.shape[2] == 3 else x.mean(2, keepdims=True)
    whitened = share * x + (1 - share) * np.maximum(x, grey * 1.5 + 0.5)
    result: Pixels = whitened + layer + layer[::-1, ::-1]
    return result


def _frost(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    """A bright texture over the image.

    Simpler: the authors' is cut from six photographs of frost, ours is fractal noise with fine grain.
    """
    kept, added = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[level]
    result: Pixels = kept * x + added * _fractal(x.shape[:2], 1.3, random)
    return result


def _fog(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    """Fractal noise over the image, whose brightest value stays. Simpler: as `_fractal`."""
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[level]
    brightest = x.max()
    result: Pixels = (x + amount * _fractal(x.shape[:2], decay, random)) * brightest / (brightest + amount)
    return result


def _fractal(shape: tuple[int, ...], decay: float, random: np.random.RandomState) -> Pixels:
    """Noise over octaves, each `decay` times weaker and twice as fine, scaled to [0, 1], shape (height, width, 1).

    Simpler: interpolated grids of random values, where the authors' diamond-square algorithm displaces midpoints.
    """
    total, octaves = np.zeros(shape), max(1, int(np.ceil(np.log2(max(shape)))))
    for octave in range(1, octaves + 1):
        grid = random.uniform(-1, 1, size=(2**octave + 1,) * 2)
        rows, columns = (np.linspace(0, 2**octave, size) for size in shape)
        total += ndimage.map_coordinates(grid, np.meshgrid(rows, columns, indexing="ij"), order=1) / decay**octave
    total -= total.min()
    result: Pixels = (total / max(total.max(), 1e-12))[:, :, None]
    return result


def _brightness(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    """A larger value in HSV: an image's colours are proportional to it."""
    value = x.max(2, keepdims=True)
    brighter = np.clip(value + (0.05, 0.1, 0.15, 0.2, 0.3)[level], 0, 1)
    result: Pixels = np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)
    return result


# ----------------------------------------------------------------------------------------------------- digital


def _contrast(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    mean = x.mean((0, 1), keepdims=True)
    result: Pixels = mean + (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[level]
    return result


def _elastic_transform(x: Pixels, level: int, random: np.random.RandomState) -> Pixels:
    """A random affine map of three points, then smooth displacements; all lengths are shares of the size."""
    height, width, _ = x.shape
    size = min(height, width)
    shares = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))[level]
    reach, sigma, moved = (size * share for share in shares)
    centre, arm = np.array([height // 2, width // 2], float), size // 3
    points = centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    targets = points + random.uniform(-moved, moved, size=points.shape)
    # From each pixel of the result to its place in x.
    inverse = np.linalg.solve(np.hstack([targets, np.ones((3, 1))]), points)
    places = np.stack([*np.mgrid[:height, :width], np.ones((height, width))], axis=-1) @ inverse
    affine = _sampled(x, places, "mirror")
    if not reach:
        return affine
    smooth = [
        ndimage.gaussian_filter(random.uniform(-1, 1, size=(height, width)), sigma, truncate=3) * reach for _ in "xy"
    ]
    return _sampled(affine, np.mgrid[:height, :width].transpose(1, 2, 0) + np.stack(smooth[::-1], axis=-1), "reflect")


def _sampled(x: Pixels, places: Pixels, mode: str) -> Pixels:
    """Values of x at (row, column), shape (height, width, 2), interpolated."""
    parts = (
        ndimage.map_coordinates(channel, places.transpose(2, 0, 1), order=1, mode=mode)
        for channel in x.transpose(2, 0, 1)
    )
    return np.stack(list(parts), axis=-1)


def _pixelate(x: NDArray[np.uint8], level: int) -> NDArray[np.uint8]:
    share, (height, width, _) = (0.95, 0.9, 0.85, 0.75, 0.65)[level], x.shape
    small = max(1, int(width * share)), max(1, int(height * share))

    def resized(channel: Image.Image) -> NDArray[np.uint8]:
        box = Image.Resampling.BOX
        return np.asarray(channel.resize(small, box).resize((width, height), box))

    return _each_channel(x, resized)


def _jpeg_compression(x: NDArray[np.uint8], level: int) -> NDArray[np.uint8]:
    def compressed(image: Image.Image) -> NDArray[np.uint8]:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=(80, 65, 58, 50, 40)[level])
        return np.asarray(Image.open(file))

    return compressed(Image.fromarray(np.ascontiguousarray(x))) if x.shape[2] == 3 else _each_channel(x, compressed)


def _each_channel(x: NDArray[np.uint8], change: Callable[[Image.Image], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.stack([change(Image.fromarray(np.ascontiguousarray(c))) for c in x.transpose(2, 0, 1)], axis=-1)


_ON_PIXELS: Mapping[str, Callable[[Pixels, int, np.random.RandomState], Pixels]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
}
_ON_BYTES: Mapping[str, Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]] = {
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
