"""Common corruptions: their definitions, their draws, and the reader of CIFAR-10-C's files."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image

from dwf_cluster.attacks.gradient import predict
from dwf_cluster.data import corruption_files
from dwf_cluster.data.registry import CORRUPTIONS, Data
from dwf_cluster.data.sources import DataUnavailable, Images
from dwf_cluster.defences.build import untrained
from dwf_cluster.evaluation import run
from dwf_cluster.evaluation.corruptions import corrupted
from dwf_cluster.evaluation.merge import merged_rows
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput

from ..conftest import TINY

CPU = torch.device("cpu")
Bytes = NDArray[np.uint8]


@pytest.fixture(scope="module")
def photo() -> Bytes:
    """A photograph of 32x32 pixels, shape (3, 32, 32)."""
    photo: Bytes = load_sample_image("flower.jpg")[100:420:10, 200:520:10].transpose(2, 0, 1).copy()
    return photo


def _distance(image: Bytes, other: Bytes) -> float:
    return float(np.abs(image.astype(float) - other).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_keeps_the_form_of_any_image_and_draws_the_same_for_the_same_image(
    name: str, photo: Bytes
) -> None:
    images: list[Bytes] = [photo, photo[:1], photo[:, 4:12, 8:16], photo[:2, :9, :13], 255 - photo]
    for image in images:
        for severity in (1, 5):
            result = corrupted(image, name, severity)
            assert (result.shape, result.dtype) == (image.shape, np.uint8)
            assert np.array_equal(result, corrupted(image.copy(), name, severity))
    distances = [_distance(photo, corrupted(photo, name, severity)) for severity in range(1, 6)]
    assert len(set(distances)) == 5
    assert min(distances) > 1
    assert max(distances) < 60
    if name not in ("glass_blur", "elastic_transform"):  # whose authors' strengths do not rise by this measure
        assert distances[0] < distances[4]


@pytest.mark.parametrize(
    "name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate"]
)
def test_a_corruption_that_moves_pixels_keeps_an_image_of_one_colour(name: str) -> None:
    image = np.full((3, 12, 12), 100, np.uint8)
    for severity in range(1, 6):
        assert _distance(image, corrupted(image, name, severity)) <= 1  # a fraction of a level is cut off


def test_noise_has_the_size_of_its_definition() -> None:
    grey = np.full((1, 200, 200), 128, np.uint8)
    level = grey / 255
    gaussian = corrupted(grey, "gaussian_noise", 5) / 255 - level
    assert gaussian.std() == pytest.approx(0.10, rel=0.03)
    shot = corrupted(grey, "shot_noise", 5) / 255 - level
    assert shot.std() == pytest.approx(np.sqrt(128 / 255 / 50), rel=0.03)
    impulse = corrupted(grey, "impulse_noise", 5)
    assert (impulse != 128).mean() == pytest.approx(0.07, rel=0.1)
    assert (impulse == 255).sum() == pytest.approx((impulse == 0).sum(), rel=0.1)


def test_digital_corruptions_equal_their_definitions(photo: Bytes) -> None:
    nhwc = photo.transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(nhwc).save(file, "JPEG", quality=58)
    assert np.array_equal(corrupted(photo, "jpeg_compression", 3), np.asarray(Image.open(file)).transpose(2, 0, 1))
    small = Image.fromarray(nhwc).resize((27, 27), Image.Resampling.BOX)
    pixelated = np.asarray(small.resize((32, 32), Image.Resampling.BOX)).transpose(2, 0, 1)
    assert np.array_equal(corrupted(photo, "pixelate", 3), pixelated)
    mean = nhwc.mean((0, 1)) / 255
    contrast = ((nhwc / 255 - mean) * 0.4 + mean) * 255
    assert np.abs(corrupted(photo, "contrast", 3).transpose(1, 2, 0) - contrast).max() <= 1
    brighter = corrupted(photo, "brightness", 3).transpose(1, 2, 0)
    for row, column in ((0, 0), (9, 17), (31, 2)):
        hue, saturation, value = colorsys.rgb_to_hsv(*nhwc[row, column] / 255)
        expected = np.array(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.15))) * 255
        assert np.abs(brighter[row, column] - expected).max() <= 1


def test_glass_blur_exchanges_pixels_and_loses_none() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    shuffled = corrupted(image, "glass_blur", 1)  # its Gaussians are too narrow to blur
    assert np.abs(np.sort(shuffled.ravel()).astype(int) - np.arange(256)).max() <= 1
    assert (shuffled != image).sum() > 10


def _rows(
    experiment: Experiment, images: Images, name: str, parts: int = 1, seed: int = 0, **options: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    model = untrained(experiment.spec(name), images.format, 0, {})
    rows, predictions = list[dict[str, Any]](), list[dict[str, Any]]()
    for part in np.array_split(np.arange(len(images.y_test)), parts):
        shard = slice(part[0], part[-1] + 1)
        x, y = images.x_test[shard], images.y_test[shard]
        more = {key: {k: v[shard] for k, v in value.items()} for key, value in options.items()}
        settings = (experiment.evaluation, experiment.threats)
        results = run.evaluate(
            {name: model}, name, "corruptions", x, y, *settings, seed=seed, device=CPU, first=int(part[0]), **more
        )
        rows += results[0]
        predictions += results[1]
    return merged_rows(rows), predictions


def test_each_corruption_and_severity_is_a_column_and_no_shard_or_seed_changes_its_images(images: Images) -> None:
    settings = ["evaluation.beyond=corruptions", "evaluation.corruption_severities=5,1"]
    experiment = build("digits", 0, [*TINY, *settings])
    rows, predictions = _rows(experiment, images, "benign")
    expected = [(f"corruption_{name}", severity) for name in CORRUPTIONS for severity in (1, 5)]
    assert [(row["attack"], row["steps"]) for row in rows] == expected
    assert [(c.attack, c.steps) for c in experiment.columns if c.attack.startswith("corruption_")] == expected
    assert {(row["epsilon"], row["norm"], row["source"]) for row in rows} == {(None, None, None)}
    in_parts, _ = _rows(experiment, images, "benign", parts=3, seed=7)
    assert [(row["correct"], row["perturbation"]) for row in in_parts] == [
        (row["correct"], row["perturbation"]) for row in rows
    ]

    model = frozen(untrained(experiment.spec("benign"), images.format, 0, {}))
    slow = np.stack([corrupted(image, "snow", 5) for image in images.x_test])
    labels = predict(model, torch.tensor(slow) / 255).argmax(1).tolist()
    assert [
        row["prediction"] for row in predictions if (row["attack"], row["steps"]) == ("corruption_snow", 5)
    ] == labels


# ------------------------------------------------------------------------------------------- CIFAR-10-C's files

COUNT = 20


@pytest.fixture
def cifar10() -> Images:
    """Some of twenty test images, in another order than the labels'."""
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8), np.arange(COUNT) * 7 % 10
    index = np.arange(3, 19)
    return Images(x, y, x[index], y[index], 10, (0.5,) * 3, (0.25,) * 3, test_index=index)


@pytest.fixture
def files(tmp_path: Path, cifar10: Images) -> Path:
    """The folder of downloads with CIFAR-10-C of those images; a pixel says which corruption, severity and image."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for number, name in enumerate(CORRUPTIONS):
        x = np.zeros((5 * COUNT, 32, 32, 3), np.uint8)
        x[:, 0, 0] = np.stack(
            [np.full(5 * COUNT, number), np.arange(5 * COUNT) // COUNT + 1, np.arange(5 * COUNT) % COUNT], 1
        )
        np.save(folder / f"{name}.npy", x)
    np.save(folder / "labels.npy", np.tile(cifar10.y_train, 5).astype(np.uint8))
    return tmp_path


def test_files_give_each_test_image_its_corrupted_form(cifar10: Images, files: Path) -> None:
    read = corruption_files.read(cifar10, Data(source="cifar10"), files, (5, 2))
    assert list(read) == [(name, severity) for severity in (2, 5) for name in CORRUPTIONS]
    for (name, severity), x in read.items():
        assert x.shape == cifar10.x_test.shape
        assert x.dtype == np.uint8
        for place, image in enumerate(cifar10.test_index):
            assert x[place, :, 0, 0].tolist() == [CORRUPTIONS.index(name), severity, image]


def test_images_of_files_are_evaluated_and_nothing_is_generated(
    cifar10: Images, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [line for line in TINY if not line.startswith("data.")]
    settings = ["evaluation.beyond=corruptions", "evaluation.corruptions=files", "evaluation.corruption_severities=2"]
    experiment = build("cifar10", 0, [*small, "baselines=", *settings])
    assert experiment.corruption_files == (2,)
    read = corruption_files.read(cifar10, experiment.data, files, experiment.corruption_files)
    monkeypatch.setattr("dwf_cluster.evaluation.corruptions.corrupted", lambda *_: pytest.fail("generated"))
    rows, predictions = _rows(experiment, cifar10, "benign", parts=2, corrupted=read)
    assert len(rows) == len(CORRUPTIONS)
    model = frozen(untrained(experiment.spec("benign"), cifar10.format, 0, {}))
    for name in ("gaussian_noise", "fog"):
        labels = predict(model, torch.tensor(read[name, 2]) / 255).argmax(1).tolist()
        assert [row["prediction"] for row in predictions if row["attack"] == f"corruption_{name}"] == labels


def test_files_that_do_not_fit_are_named_in_one_line(cifar10: Images, files: Path, tmp_path: Path) -> None:
    data, folder = Data(source="cifar10"), files / "CIFAR-10-C"

    def refused(kind: type[Exception]) -> str:
        with pytest.raises(kind) as error:
            corruption_files.read(cifar10, data, files, (1,))
        assert "\n" not in str(error.value)
        return str(error.value)

    fog = np.load(folder / "fog.npy")
    np.save(folder / "fog.npy", fog[:, :, :31])
    assert refused(InvalidInput) == (
        f"{folder}/fog.npy: uint8 of shape (100, 32, 31, 3) cannot be used: allowed is uint8 of shape (100, 32, 32, 3)"
    )
    (folder / "fog.npy").write_bytes(b"hello")
    assert refused(InvalidInput).startswith(f"{folder}/fog.npy: not an .npy file (")
    np.save(folder / "fog.npy", np.array([{}] * 100))  # a pickle
    assert refused(InvalidInput).startswith(f"{folder}/fog.npy: not an .npy file (")
    (folder / "fog.npy").unlink()
    assert (
        refused(InvalidInput) == f"evaluation.corruptions: '{folder}/fog.npy' cannot be read: No such file or directory"
    )
    labels = np.load(folder / "labels.npy")
    np.save(folder / "labels.npy", labels[::-1])
    assert refused(InvalidInput) == f"{folder}/labels.npy: its labels are not those of the test images of cifar10"
    np.save(folder / "labels.npy", labels[:-1])
    assert refused(InvalidInput).startswith(f"{folder}/labels.npy: shape (99,) cannot be used: 5 times the number of")
    folder.rename(tmp_path / "elsewhere")
    assert refused(DataUnavailable).startswith(f"CIFAR-10-C is not in {files}; unpack CIFAR-10-C.tar")


def test_files_of_cifar10_are_refused_for_other_images() -> None:
    with pytest.raises(InvalidInput) as error:
        build("digits", 0, ["evaluation.corruptions=files"])
    assert str(error.value) == (
        "experiment: evaluation.corruptions: 'files' cannot be used: they are of cifar10; allowed is generated"
    )
