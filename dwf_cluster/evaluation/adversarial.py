"""Adversarial images that are kept: collected while attacks run, written to one `.npz` file, read and verified."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.data.sources import fail_if_too_large
from dwf_cluster.evaluation.registry import Column
from dwf_cluster.evaluation.settings import Norm
from dwf_cluster.settings import InvalidInput, one_line, printable, regular_file

Kind = Literal["float", "uint8"]
"""How images are stored: as they are, float32 NCHW in [0, 1]; or rounded to whole levels, uint8 NHWC."""

TOLERANCE = 1e-5, 1e-4
"""By how much a distance may exceed epsilon, because float32 rounds: pixels in [0, 1], and a share of epsilon (the L1
norm adds up thousands of values)."""

_ON_A_LEVEL = 1e-3
"""Levels (of 255) by which an image may be off a whole level and still count as on it: float32 rounds."""

_LARGEST_LABEL = 9999


@dataclass(frozen=True, eq=False)
class AdversarialImages:
    """Adversarial images, one row of each array an image. As arguments, `images` and `label` suit `api.evaluate`.

    Attributes:
        images: float32 in [0, 1], shape (n, channels, height, width); or uint8, shape (n, height, width, channels).
        index: of the clean image in the test set, int64.
        label: its true class, int64.
        prediction: of the model, when it was attacked, int64; for the image before it was rounded to uint8.
        attack, norm: of the column.
        source: name of the model that the image was made on.
        epsilon: radius of the ball, in `norm`, pixels in [0, 1], float64.
        steps: iterations (of `square`: queries), int64; -1 where it has no meaning.
        distance: of `images` from the clean image, in `norm`, pixels in [0, 1], float64.
    """

    images: NDArray[Any]
    index: NDArray[np.int64]
    label: NDArray[np.int64]
    prediction: NDArray[np.int64]
    attack: NDArray[np.str_]
    norm: NDArray[np.str_]
    source: NDArray[np.str_]
    epsilon: NDArray[np.float64]
    steps: NDArray[np.int64]
    distance: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.index)

    def to_npz(self) -> bytes:
        """The content of an `.npz` file with an array for each attribute, not compressed."""
        content = io.BytesIO()
        np.savez(content, **{name: getattr(self, name) for name in _NAMES})
        return content.getvalue()

    @property
    def pixels(self) -> NDArray[np.float64]:
        """The images in [0, 1], shape (n, channels, height, width)."""
        return _pixels(self.images)


_NAMES = [attribute.name for attribute in fields(AdversarialImages)]


@dataclass
class Collector:
    """Keeps the adversarial images of an evaluation, a batch at a time.

    Images of columns with a `source` are not kept, because another column has them: those of `transfer` are PGD images
    of the model that is their source. Neither are images without a ball: clean ones.

    Attributes:
        model: name of the model that is attacked.
        kind: how images are stored.
    """

    model: str
    kind: Kind
    _parts: dict[Column, list[AdversarialImages]] = field(default_factory=dict)
    _shape: tuple[int, ...] = ()

    def add(
        self,
        column: Column,
        x: torch.Tensor,
        moved: torch.Tensor,
        y: torch.Tensor,
        prediction: torch.Tensor,
        first: int,
    ) -> None:
        """Keep a batch of one column.

        Args:
            column: which.
            x, moved: clean and attacked images, float in [0, 1], shape (n, channels, height, width).
            y: labels, shape (n,).
            prediction: of the model for `moved`, shape (n,).
            first: index of the first image in the test set.
        """
        self._shape = tuple(x.shape[1:])
        if column.source is not None or column.norm is None or column.epsilon is None:
            return
        stored, count = _stored(x, moved, column.norm, column.epsilon, self.kind), len(y)
        part = AdversarialImages(
            images=stored,
            index=np.arange(first, first + count),
            label=y.cpu().numpy().astype(np.int64),
            prediction=prediction.cpu().numpy(),
            attack=np.full(count, column.attack),
            norm=np.full(count, column.norm),
            source=np.full(count, self.model),
            epsilon=np.full(count, column.epsilon),
            steps=np.full(count, -1 if column.steps is None else column.steps),
            distance=distances(x, stored, column.norm),
        )
        self._parts.setdefault(column, []).append(part)

    def images(self) -> AdversarialImages:
        """All images, column by column."""
        integers, text, floats = np.zeros(0, np.int64), np.zeros(0, np.str_), np.zeros(0)
        none = _as_kind(np.zeros((0, *self._shape)), self.kind)
        empty = AdversarialImages(none, integers, integers, integers, text, text, text, floats, integers, floats)
        return concatenated([empty, *(part for parts in self._parts.values() for part in parts)])


def _pixels(stored: NDArray[Any]) -> NDArray[np.float64]:
    return stored.transpose(0, 3, 1, 2) / 255 if stored.dtype == np.uint8 else stored.astype(np.float64)


def distances(x: torch.Tensor, stored: NDArray[Any], norm: Norm) -> NDArray[np.float64]:
    """Distance of each image from the clean one in a norm, pixels in [0, 1], shape (n,).

    Args:
        x: clean images, float in [0, 1], shape (n, channels, height, width).
        stored: images as they are stored.
        norm: the norm.
    """
    moved, clean = torch.tensor(_pixels(stored)), x.detach().cpu().double()
    if stored.dtype == np.uint8:
        clean = (255 * clean).round() / 255  # in single precision, k / 255 is not the level of the uint8 image
    measured: NDArray[np.float64] = Ball(norm, 0.0).distance(clean, moved).numpy()
    return measured


def _stored(x: torch.Tensor, moved: torch.Tensor, norm: Norm, epsilon: float, kind: Kind) -> NDArray[Any]:
    """Images as they are stored.

    Raises:
        InvalidInput: for `uint8`, if the clean images are not on whole levels: the rounded ones could leave the ball.
    """
    if kind == "float":
        return moved.detach().float().cpu().numpy()
    clean, levels = 255 * x.detach().double().cpu(), 255 * moved.detach().double().cpu()
    if bool(((clean - clean.round()).abs() > _ON_A_LEVEL).any()):
        raise InvalidInput(
            "adversarial: 'uint8' cannot be used: the clean images are no multiples of 1/255, so rounded images could "
            "leave the ball; allowed is 'float'"
        )
    clean, nearest = clean.round(), levels.round()
    if norm == "linf":  # the nearest level that the ball contains
        most = np.floor(255 * epsilon + _ON_A_LEVEL)
        rounded = nearest.clamp(clean - most, clean + most)
    else:  # towards the clean image: no change grows, so neither does any norm
        towards = torch.where(levels > clean, levels.floor(), levels.ceil())
        rounded = torch.where((levels - nearest).abs() <= _ON_A_LEVEL / 10, nearest, towards)
    return _as_kind((rounded.clamp(0, 255) / 255).numpy(), kind)


def _as_kind(pixels: NDArray[Any], kind: Kind) -> NDArray[Any]:
    """Pixels NCHW in [0, 1] on whole levels, as they are stored."""
    if kind == "float":
        return pixels.astype(np.float32)
    return np.ascontiguousarray(np.rint(255 * pixels).astype(np.uint8).transpose(0, 2, 3, 1))


# ------------------------------------------------------------------------------------------ reading and verifying


def read(path: Path) -> AdversarialImages:
    """Read one file.

    Raises:
        InvalidInput: if it cannot be read, is damaged, too large, lacks an array, or has a value that no run writes.
    """
    regular_file(str(path), "--from")
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # numpy warns of headers in an old form, on a line of its own
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if missing := [name for name in _NAMES if name not in members]:
                raise InvalidInput(f"{path}: no array {missing[0]}: {', '.join(_NAMES)} are needed")
            fail_if_too_large(str(path), 8 * sum(members[name].file_size for name in _NAMES))  # as float64
            arrays = {name: _array(archive, members[name]) for name in _NAMES}
    except InvalidInput:
        raise
    except OSError as error:
        raise InvalidInput(f"--from: {str(path)!r} cannot be read: {error.strerror or error}") from None
    # Anyone may have made the file; see `data.own_images.read`.
    except Exception as error:
        raise InvalidInput(f"{path}: not an .npz file of plain arrays ({one_line(error)})") from None
    _check(path, arrays)
    return AdversarialImages(**arrays)


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _check(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    def refuse(name: str, value: object, allowed: str) -> None:
        raise InvalidInput(f"{path}: {name}: {printable(value, 80)!r} cannot be used: allowed {allowed}")

    images = arrays["images"]
    if images.dtype not in (np.uint8, np.float32) or images.ndim != 4 or 0 in images.shape:
        refuse("images", f"{images.dtype} {images.shape}", "are uint8 NHWC or float32 NCHW, one image at least")
    kinds = {"index": "iu", "label": "iu", "prediction": "iu", "steps": "iu", "epsilon": "f", "distance": "f"}
    for name in _NAMES[1:]:
        array, kind = arrays[name], kinds.get(name, "U")
        if array.dtype.kind not in kind or array.shape != (len(images),):
            refuse(
                name, f"{array.dtype} {array.shape}", f"is one value of kind {kind} for each of {len(images)} images"
            )
    ranges = {
        "index": (0, np.inf),
        "label": (0, _LARGEST_LABEL),
        "prediction": (0, _LARGEST_LABEL),
        "steps": (-1, np.inf),
        "epsilon": (0, 1000),
        "distance": (0, 1e6),
        **({"images": (0, 1)} if images.dtype == np.float32 else {}),
    }
    for name, (low, high) in ranges.items():
        wrong = ~((arrays[name] >= low) & (arrays[name] <= high))  # NaN too
        if wrong.any():
            refuse(name, arrays[name][wrong][0], f"are {low:g} to {high:g}")
    if unknown := set(np.unique(arrays["norm"]).tolist()) - set(get_args(Norm)):
        refuse("norm", min(unknown), f"are {', '.join(get_args(Norm))}")


def verify(saved: AdversarialImages, x_test: NDArray[np.uint8], y_test: NDArray[np.int64], path: Path) -> None:
    """Fail unless every image belongs to these test images and is in the ball that it states.

    Args:
        saved: the images.
        x_test: clean test images, uint8, shape (n, channels, height, width).
        y_test: their labels.
        path: of the file, for the message.

    Raises:
        InvalidInput: names the first violation, and how many images have it.
    """
    if (shape := saved.pixels[:1].shape[1:]) != x_test.shape[1:]:
        raise InvalidInput(f"{path}: images of shape {shape} cannot be used: the test images have {x_test.shape[1:]}")
    if saved.index.max() >= len(y_test):
        raise InvalidInput(
            f"{path}: index: {saved.index.max()} cannot be used: allowed are 0 to {len(y_test) - 1}, the test images"
        )
    wrong = saved.label != y_test[saved.index]
    _refuse(path, saved, wrong, "label", saved.label, y_test[saved.index])
    x = torch.tensor(x_test[saved.index]).double() / 255
    measured = np.zeros(len(saved))
    for norm in get_args(Norm):
        own = saved.norm == norm
        if own.any():
            measured[own] = distances(x[torch.tensor(own)], saved.images[own], norm)
    largest = TOLERANCE[0] + (1 + TOLERANCE[1]) * saved.epsilon
    _refuse(path, saved, measured > largest, "images", measured, saved.epsilon, "at most ")
    differ = np.abs(measured - saved.distance) > 1e-4 * np.maximum(1, saved.distance)
    _refuse(path, saved, differ, "distance", saved.distance, measured)


def _refuse(
    path: Path,
    saved: AdversarialImages,
    wrong: NDArray[np.bool_],
    name: str,
    values: NDArray[Any],
    allowed: NDArray[Any],
    qualifier: str = "",
) -> None:
    if not wrong.any():
        return
    i = int(wrong.argmax())
    what = "a distance of " if name == "images" else ""
    raise InvalidInput(
        f"{path}: {name}: {what}{values[i]:.4g} cannot be used: test image {saved.index[i]} under {saved.attack[i]} "
        f"has {qualifier}{allowed[i]:.4g}; {int(wrong.sum())} of {len(saved)} images are wrong"
    )


def concatenated(parts: Sequence[AdversarialImages]) -> AdversarialImages:
    """The images of several files of one kind, or, if their kinds differ, all as float32."""
    kinds = {part.images.dtype for part in parts}
    images = [part.images if len(kinds) == 1 else part.pixels.astype(np.float32) for part in parts]
    rest = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _NAMES[1:]}
    return AdversarialImages(images=np.concatenate(images), **rest)
