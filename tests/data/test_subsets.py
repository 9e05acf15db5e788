"""Which images are validated on, and class-balanced draws from files that may be sorted by label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dwf_cluster.data import sources, subsets
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.registry import Data
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput

from ..conftest import write_npz

CLASSES = 4


@pytest.fixture
def by_label(tmp_path: Path) -> str:
    """An .npz file sorted by label: 30, 20, 10 and 4 training images, 8 test images of each class; pixels count."""
    y_train, y_test = np.repeat(np.arange(CLASSES), (30, 20, 10, 4)), np.repeat(np.arange(CLASSES), 8)
    x_train, x_test = (
        np.broadcast_to(np.arange(len(y), dtype=np.uint8)[:, None, None], (len(y), 8, 8)) for y in (y_train, y_test)
    )
    return str(write_npz(tmp_path / "sorted.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test))


def _numbers(x: np.ndarray) -> list[int]:
    """Which images these are, by their pixels."""
    return x[:, 0, 0, 0].tolist()


def test_every_beginning_of_a_balanced_order_has_each_class_in_its_share() -> None:
    labels = np.repeat(np.arange(CLASSES), (300, 200, 100, 5))
    order = subsets.balanced_order(labels, "test")
    assert sorted(order) == list(range(len(labels)))
    assert sorted(labels[order[:CLASSES]]) == list(range(CLASSES))
    for count in range(1, len(labels)):
        shares = np.bincount(labels[order[:count]], minlength=CLASSES) / count
        assert np.abs(shares - np.bincount(labels) / len(labels)).max() < CLASSES / count
    assert order[:20].tolist() != sorted(order[:20])
    assert order.tolist() == subsets.balanced_order(labels, "test").tolist()
    assert order.tolist() != subsets.balanced_order(labels, "probe").tolist()


def test_subsets_of_a_users_file_hold_every_class_in_the_order_of_the_file(by_label: str) -> None:
    images = sources.load(Data(source=by_label, train_examples=16, test_examples=8), Path())
    assert np.bincount(images.y_train).tolist() == [7, 5, 3, 1]
    assert np.bincount(images.y_test).tolist() == [2, 2, 2, 2]
    for x in (images.x_train, images.x_test):
        assert _numbers(x) == sorted(_numbers(x))
    assert _numbers(images.x_test) == images.test_index.tolist()
    checked = subsets.checked(by_label, images.y_test, CLASSES)
    assert images.y_test[checked].tolist() == list(range(CLASSES))


def test_without_a_subset_a_users_file_keeps_its_images_and_their_order(by_label: str) -> None:
    images = sources.load(Data(source=by_label), Path())
    assert _numbers(images.x_train) == list(range(64))
    assert _numbers(images.x_test) == images.test_index.tolist() == list(range(32))
    assert len(images.x_validation) == len(images.y_validation) == 0


def test_named_data_sets_keep_their_first_images() -> None:
    every, first = (
        sources.load(Data(source="digits", **f), Path()) for f in ({}, {"train_examples": 96, "test_examples": 7})
    )
    assert np.array_equal(first.x_train, every.x_train[:96])
    assert np.array_equal(first.x_test, every.x_test[:7])
    assert subsets.checked("digits", every.y_test, 64).tolist() == list(range(64))


@pytest.mark.parametrize("train_examples", [None, 40])
def test_validation_images_are_cut_off_the_training_images_before_a_subset_is_chosen(
    by_label: str, train_examples: int | None
) -> None:
    for source in (by_label, "digits"):
        data = Data(source=source, validation_examples=16, train_examples=train_examples)
        images, every = sources.load(data, Path()), sources.load(Data(source=source), Path())
        classes = every.classes
        assert len(images.y_validation) == 16
        assert len(np.unique(images.y_validation)) == classes
        remaining = len(every.y_train) - 16
        assert len(images.y_train) == (train_examples or remaining) == sources.sizes(data).train
        trained, validated = ({row.tobytes() for row in x} for x in (images.x_train, images.x_validation))
        assert not trained & validated
        assert trained | validated <= {row.tobytes() for row in every.x_train}
        pixels = images.x_train / 255
        assert images.mean == pytest.approx([pixels.mean()])
        assert np.array_equal(images.x_test, every.x_test)


def test_the_validation_images_are_the_same_for_every_seed_and_every_training_subset(by_label: str) -> None:
    def validation(seed: int, *fields: str) -> list[int]:
        experiment = build(by_label, seed, ["data.validation_examples=12", *fields])
        return _numbers(sources.load(experiment.data, Path()).x_validation)

    assert validation(0) == validation(1) == validation(0, "data.train_examples=20")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation_examples": 3}, "data.validation_examples: 3 cannot be used: allowed are 4 to 60"),
        ({"validation_examples": 61}, "data.validation_examples: 61 cannot be used: allowed are 4 to 60"),
        (
            {"validation_examples": 12, "train_examples": 53},
            "data.train_examples: 53 cannot be used: allowed are 4 to 52",
        ),
        ({"train_examples": 3}, "data.train_examples: 3 cannot be used: allowed are 4 to 64"),
        ({"test_examples": 3}, "data.test_examples: 3 cannot be used: allowed are 4 to 32"),
    ],
)
def test_splits_that_leave_too_few_images_are_refused_in_one_line(
    by_label: str, fields: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidInput) as error:
        sources.load(Data(source=by_label, **fields), Path())
    assert str(error.value) == message


def test_a_named_data_set_without_enough_images_to_validate_on_is_refused_before_it_is_read() -> None:
    for validation in (9, 1428):
        data = Data(source="digits", validation_examples=validation)
        for use in (sources.sizes, lambda data: sources.load(data, Path())):
            with pytest.raises(
                InvalidInput, match=f"^data.validation_examples: {validation} cannot be used: allowed are 10 to 1427$"
            ):
                use(data)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changed", "fields", "split"),
    [
        ({"y_test": np.arange(16) % 2}, {}, "test"),
        ({"y_train": np.arange(64) % 2 * 2}, {}, "train"),
        ({"y_train": np.where(np.arange(64) == 5, 2, np.arange(64) % 2)}, {"validation_examples": 9}, "train"),
    ],
    ids=["no test images", "no training images", "the only image is cut off"],
)
def test_a_class_without_images_in_a_split_is_named(
    tmp_path: Path, changed: dict[str, np.ndarray], fields: dict[str, int], split: str
) -> None:
    path = str(write_npz(tmp_path / "own.npz", **changed))
    missing = 1 if "y_train" in changed and not fields else 2
    with pytest.raises(InvalidInput) as error:
        sources.load(Data(source=path, **fields), Path())
    assert str(error.value) == (
        f"data.source: {path!r} cannot be used: class {missing} has no {split} images; allowed are images of each of "
        "the 3 classes in every split"
    )


def test_probed_images_are_a_balanced_draw_of_validation_images_and_else_of_training_images(by_label: str) -> None:
    for validation, split in ((16, "validation"), (None, "train")):
        data = Data(source=by_label, validation_examples=validation, crop_padding=2, flip=True)
        images = sources.load(data, Path())
        x, y, named = DeviceImages(images, data, torch.device("cpu")).probed(8)
        assert named == split
        assert sorted(set(y.tolist())) == list(range(CLASSES))
        source = images.x_validation if validation else images.x_train
        assert {int(value) for value in (x[:, 0, 0, 0] * 255).round()} <= set(_numbers(source))
        assert len(DeviceImages(images, data, torch.device("cpu")).probed(1000)[1]) == len(source)
