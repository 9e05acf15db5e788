"""Adversarial images that are kept: what is written, that rounding stays in the ball, and what is refused."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dwf_cluster import evaluate
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.evaluation import adversarial
from dwf_cluster.evaluation.adversarial import AdversarialImages, Collector, concatenated, read, verify
from dwf_cluster.evaluation.registry import Column
from dwf_cluster.settings import InvalidInput

X_TEST = np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), np.uint8)
Y_TEST = np.random.default_rng(1).integers(0, 4, 30)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def _kept(model: nn.Module, kind: Any, *suites: str, norm: Any = "linf", epsilon: float = 8 / 255) -> AdversarialImages:
    x = X_TEST.transpose(0, 2, 3, 1)
    options = {"norm": norm, "epsilon": epsilon, "step_size": epsilon / 4, "batch_size": 20, "progress": False}
    kept = evaluate(model, x, Y_TEST, suites=suites, adversarial=kind, **options).adversarial  # type: ignore[arg-type]
    assert kept is not None
    return kept


@pytest.fixture(scope="module")
def kept(model: nn.Module) -> AdversarialImages:
    return _kept(model, "float", "paper", "noise")


@pytest.fixture
def file(kept: AdversarialImages, tmp_path: Path) -> Path:
    path = tmp_path / "kept.npz"
    path.write_bytes(kept.to_npz())
    return path


def test_every_attacked_image_is_kept_with_the_answer_of_the_predictions_table(
    model: nn.Module, kept: AdversarialImages
) -> None:
    """Images of all columns, in the order of the test set; clean images are not kept."""
    x = X_TEST.transpose(0, 2, 3, 1)
    result = evaluate(
        model, x, Y_TEST, epsilon=8 / 255, step_size=2 / 255, suites=("paper", "noise"), batch_size=7, progress=False
    )
    assert result.adversarial is None
    is_attack = ~result.predictions.attack.isin(["clean", "worst_case"])  # the worst case has the images of others
    rows = result.predictions[is_attack].fillna({"steps": -1})
    names = ["attack", "epsilon", "steps", "index", "label", "prediction"]
    shown = pd.DataFrame({name: getattr(kept, name) for name in names})
    expected = rows.rename(columns={"example": "index"})[names].astype({"steps": "int64"})
    pd.testing.assert_frame_equal(
        shown.sort_values(names, ignore_index=True), expected.sort_values(names, ignore_index=True), check_dtype=False
    )
    with torch.no_grad():
        answers = model(torch.tensor(kept.images)).argmax(1)
    assert answers.tolist() == kept.prediction.tolist()
    distance = np.abs(kept.images.astype(float) - X_TEST[kept.index] / 255).max((1, 2, 3))
    assert kept.distance == pytest.approx(distance, abs=1e-7)


@pytest.mark.parametrize(
    ("norm", "suite", "epsilon"),
    [("linf", "noise", 8 / 255), ("linf", "noise", 0.03), ("linf", "noise", 0.05), ("l2", "pgd_l2", 0.5)],
)
def test_images_rounded_to_uint8_stay_in_the_ball(model: nn.Module, norm: Any, suite: str, epsilon: float) -> None:
    exact, rounded = (_kept(model, kind, suite, norm=norm, epsilon=epsilon) for kind in ("float", "uint8"))
    assert rounded.images.dtype == np.uint8
    assert rounded.images.shape == (30, 8, 8, 3)
    levels = rounded.images.transpose(0, 3, 1, 2).astype(int) - X_TEST[rounded.index]
    change = levels.reshape(30, -1) / 255
    length = np.abs(change).max(1) if norm == "linf" else np.linalg.norm(change, axis=1)
    assert (length <= epsilon + 1e-9).all()
    assert rounded.distance == pytest.approx(length)
    assert (length > 0.8 * exact.distance.max() - 1 / 255).all()  # and near its surface
    assert np.abs(rounded.pixels - exact.pixels).max() < 1 / 255
    verify(rounded, X_TEST, Y_TEST, Path())


def test_images_between_the_levels_cannot_be_rounded(model: nn.Module) -> None:
    x = torch.rand(4, 3, 8, 8)
    with pytest.raises(InvalidInput, match="adversarial: 'uint8' cannot be used: the clean images are no multiples"):
        evaluate(model, x, torch.zeros(4, dtype=torch.int64), suites=["noise"], adversarial="uint8", progress=False)
    with pytest.raises(InvalidInput, match="adversarial: 'jpeg' cannot be used: allowed are None, float, uint8"):
        evaluate(model, x, torch.zeros(4, dtype=torch.int64), adversarial="jpeg")  # type: ignore[arg-type]


def test_images_of_another_column_are_not_kept_twice() -> None:
    collector = Collector("mixture", "uint8")
    x, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    for column in (Column("transfer", "pgd-1", 0.1), Column("clean", norm=None)):
        collector.add(column, x, x, y, y, 0)
    kept = collector.images()
    assert len(kept) == 0
    assert kept.images.shape == (0, 4, 4, 1)
    assert np.load(io.BytesIO(kept.to_npz()))["images"].dtype == np.uint8


def test_a_file_that_was_written_is_read_and_verified(kept: AdversarialImages, file: Path) -> None:
    again = read(file)
    for name in ("images", "index", "label", "prediction", "attack", "norm", "source", "epsilon", "steps", "distance"):
        assert np.array_equal(getattr(again, name), getattr(kept, name))
    verify(again, X_TEST, Y_TEST, file)
    both = concatenated([again, _kept_as_uint8(again)])
    assert both.images.dtype == np.float32
    assert len(both) == 2 * len(kept)


def _kept_as_uint8(saved: AdversarialImages) -> AdversarialImages:
    images = np.rint(255 * saved.images).astype(np.uint8).transpose(0, 2, 3, 1)
    return AdversarialImages(**{**vars(saved), "images": images})


def _changed(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Change the last element of an array."""

    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][-1] = value

    return change


def _replaced(name: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = make(arrays[name])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("norm"), "no array norm: images, index, label"),
        (_replaced("images", lambda a: a.astype(np.float64)), "images: 'float64 "),
        (_replaced("images", lambda a: a[:0]), "images: 'float32 (0, 3, 8, 8)' cannot be used"),
        (_replaced("label", lambda a: a.astype(float)), "label: 'float64 (510,)' cannot be used"),
        (_replaced("epsilon", lambda a: a[:3]), "epsilon: 'float64 (3,)' cannot be used"),
        (_replaced("attack", lambda a: a.astype(object)), "not an .npz file of plain arrays"),
        (_changed("images", np.nan), "images: 'nan' cannot be used: allowed are 0 to 1"),
        (_changed("images", 1.5), "images: '1.5' cannot be used: allowed are 0 to 1"),
        (_changed("distance", np.inf), "distance: 'inf' cannot be used"),
        (_changed("label", 10_000), "label: '10000' cannot be used: allowed are 0 to 9999"),
        (_changed("norm", "l3"), "norm: 'l3' cannot be used: allowed are linf, l2, l1"),
        (_changed("index", 30), "index: 30 cannot be used: allowed are 0 to 29, the test images"),
        (_changed("label", 3 - int(Y_TEST[-1])), "cannot be used: test image 29 under noise has"),
        (_changed("index", 5), "cannot be used: test image 5 under noise has"),
        (_changed("epsilon", 0.01), "a distance of 0.03137 cannot be used: test image 29 under noise has at most 0"),
        (_changed("distance", 0.001), "distance: 0.001 cannot be used: test image 29 under noise has 0.03137"),
        (_replaced("images", lambda a: a[:, :, :4]), "images of shape (3, 4, 8) cannot be used: the test images have"),
    ],
)
def test_a_file_with_a_fault_is_refused_in_one_line(
    file: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with np.load(file) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez(file, **arrays)
    with pytest.raises(InvalidInput) as caught:
        verify(read(file), X_TEST, Y_TEST, file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_archives_or_too_large_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: No such file"):
        read(file.with_name("none.npz"))
    with pytest.raises(InvalidInput, match="it is a directory"):
        read(file.parent)
    content = bytearray(file.read_bytes())
    content[2000:2100] = bytes(100)
    file.with_name("damaged.npz").write_bytes(content)
    file.with_name("text.npz").write_text("no archive")
    for name in ("damaged.npz", "text.npz"):
        with pytest.raises(InvalidInput, match=r"not an \.npz file of plain arrays"):
            read(file.with_name(name))
    huge = file.with_name("huge.npz")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(huge, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.namelist():
            target.writestr(member, bytes(1 << 26) if member == "images.npy" else source.read(member))
    monkeypatch.setattr("dwf_cluster.data.sources._available_memory", lambda: 1 << 28)
    monkeypatch.setattr(adversarial, "_array", lambda *_: pytest.fail("it was decompressed"))
    with pytest.raises(InvalidInput, match="bytes decompressed cannot be used"):
        read(huge)


def test_the_distance_is_that_of_the_ball(kept: AdversarialImages) -> None:
    own = kept.attack == "noise"
    x, moved = torch.tensor(X_TEST[kept.index[own]] / 255), torch.tensor(kept.pixels[own])
    for norm in ("linf", "l2"):
        expected = Ball(norm, 0.1).distance(x, moved).numpy()  # type: ignore[arg-type]
        assert adversarial.distances(x, kept.images[own], norm) == pytest.approx(expected)  # type: ignore[arg-type]
