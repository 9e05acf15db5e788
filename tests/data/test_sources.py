"""Readers of data sets, on small files in the real formats."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from dwf_cluster.data import sources
from dwf_cluster.data.registry import DATASETS, Data
from dwf_cluster.data.sources import DataUnavailable
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput, describe

from ..conftest import write_npz


def _sizes(images: sources.Images) -> tuple[int, int, tuple[int, int, int], int]:
    return len(images.x_train), len(images.x_test), images.shape, images.classes


def _registered_sizes(name: str) -> tuple[int, int, tuple[int, int, int], int]:
    dataset = DATASETS[name]
    return dataset.train, dataset.test, dataset.shape, dataset.classes


def test_digits_are_scikit_learns_with_a_fixed_split() -> None:
    images = sources.load(Data(source="digits"), Path())
    assert _sizes(images) == _registered_sizes("digits")
    assert images.x_train.dtype == np.uint8
    assert images.x_train.max() == 255
    together = np.concatenate([images.x_train, images.x_test]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    original = np.round(load_digits().data * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, together)) == sorted(map(bytes, original))
    assert images.y_test[:8].tolist() == [2, 7, 2, 6, 8, 5, 4, 4]


def test_mean_and_std_are_measured_on_the_training_images() -> None:
    images = sources.load(Data(source="digits"), Path())
    pixels = images.x_train / 255
    assert images.mean == pytest.approx([pixels.mean()])
    assert images.std == pytest.approx([pixels.std()])


# ----------------------------------------------------------------------------------------- Fashion-MNIST


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    for split, count in (("train", 20), ("t10k", 10)):
        x = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(count, 28, 28)
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(_idx(x))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(_idx(np.arange(count, dtype=np.uint8) % 10))
    return tmp_path


def test_fashion_mnist_is_read_from_a_local_folder_and_padded(fashion: Path) -> None:
    images = sources.load(Data(source="fashion-mnist", padding=2), fashion)
    assert images.x_train.shape == (20, 1, 32, 32)
    assert images.y_test.tolist() == list(range(10))
    assert images.x_train[0, 0, 2, 2:6].tolist() == [0, 1, 2, 3]
    assert not images.x_train[:, :, :2].any()


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_the_real_fashion_mnist_is_found_where_debian_puts_it(tmp_path: Path) -> None:
    images = sources.load(Data(source="fashion-mnist"), tmp_path)
    assert _sizes(images) == _registered_sizes("fashion-mnist")
    assert np.bincount(images.y_train).tolist() == [6000] * 10
    assert images.mean == pytest.approx([0.2860], abs=1e-4)


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: gzip.compress(b"hello"), lambda b: b"plain"])
def test_a_damaged_idx_file_is_named(fashion: Path, damage: object) -> None:
    path = fashion / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(InvalidInput, match=r"train-images-idx3-ubyte\.gz"):
        sources.load(Data(source="fashion-mnist"), fashion)


# ------------------------------------------------------------------------------------ CIFAR-10 and SVHN


def _cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's python version with 4 images a batch, and their checksums in torchvision's place."""
    from torchvision.datasets import CIFAR10

    base = folder / "cifar-10-batches-py"
    base.mkdir()
    checksums = {}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]):
        entry = {"data": np.full((4, 3072), number, np.uint8), "labels": [number % 2, 1, 2, 9]}
        entry["data"][:, 0] = 200  # red, top left
        content = pickle.dumps({"label_names": list("abcdefghij")} if name == "batches.meta" else entry)
        (base / name).write_bytes(content)
        checksums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", checksums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": checksums["batches.meta"]}
    )
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nothing listens there
    return base


def test_cifar10_is_read_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cifar10(tmp_path, monkeypatch)
    assert sources.is_here(Data(source="cifar10"), tmp_path)
    images = sources.load(Data(source="cifar10"), tmp_path)
    assert images.x_train.shape == (20, 3, 32, 32)
    assert images.x_train[4, :, 0, 0].tolist() == [200, 1, 1]
    assert images.y_train[:4].tolist() == [0, 1, 2, 9]


def test_a_pickle_with_another_checksum_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    (_cifar10(tmp_path, monkeypatch) / "data_batch_3").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DataUnavailable):  # the download that would replace it fails
        sources.load(Data(source="cifar10"), tmp_path)
    assert not (tmp_path / "executed").exists()


def test_svhn_is_read_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import SVHN

    splits = {}
    for split, count in (("train", 6), ("test", 3)):
        path = tmp_path / f"{split}_32x32.mat"
        x = np.zeros((32, 32, 3, count), np.uint8)
        x[1, 2, 0] = np.arange(count)
        scipy.io.savemat(path, {"X": x, "y": np.array([[10], [1], [2], [3], [4], [5]][:count])})
        splits[split] = ["http://127.0.0.1:9/", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", splits)
    assert sources.is_here(Data(source="svhn"), tmp_path)
    images = sources.load(Data(source="svhn"), tmp_path)
    assert images.x_train[:, 0, 1, 2].tolist() == [0, 1, 2, 3, 4, 5]
    assert images.y_train.tolist() == [0, 1, 2, 3, 4, 5]  # the format writes 0 as 10


@pytest.mark.parametrize("source", ["cifar10", "svhn"])
@pytest.mark.parametrize("use", [sources.load, sources.fetch], ids=lambda use: use.__name__)
def test_without_a_network_the_message_says_what_to_do(
    use: Callable[[Data, Path], object], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    assert not sources.is_here(Data(source=source), tmp_path)
    with pytest.raises(DataUnavailable) as error:
        use(Data(source=source), tmp_path)
    assert "cannot be downloaded" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "--data-folder" in str(error.value)
    assert "on a machine with a network, run the same command with --fetch-data" in str(error.value)
    assert "\n" not in str(error.value)


def test_fetch_downloads_what_is_missing_with_torchvision_and_verifies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive that torchvision downloads comes from a server of the test's own, with its real checksum."""
    from torchvision.datasets import CIFAR10

    served, downloads = tmp_path / "served", tmp_path / "downloads"
    served.mkdir()
    _cifar10(served, monkeypatch)
    with tarfile.open(served / CIFAR10.filename, "w:gz") as archive:
        archive.add(served / "cifar-10-batches-py", "cifar-10-batches-py")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
        monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
        with pytest.raises(DataUnavailable, match="cannot be downloaded"):
            sources.fetch(Data(source="cifar10"), downloads)
        digest = hashlib.md5((served / CIFAR10.filename).read_bytes()).hexdigest()
        monkeypatch.setattr(CIFAR10, "tgz_md5", digest)
        sources.fetch(Data(source="cifar10"), downloads)
        server.shutdown()
    assert sources.is_here(Data(source="cifar10"), downloads)
    sources.fetch(Data(source="cifar10"), downloads)  # nothing is downloaded again


def test_fetch_verifies_data_sets_that_need_no_download(fashion: Path, tmp_path: Path) -> None:
    own = Data(source=str(write_npz(tmp_path / "own.npz")))
    for data in (Data(source="digits"), Data(source="fashion-mnist"), own):
        assert sources.is_here(data, fashion)
        sources.fetch(data, fashion)
    (fashion / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    (tmp_path / "own.npz").write_bytes(b"damaged")
    for data in (Data(source="fashion-mnist"), own):
        assert sources.is_here(data, fashion)  # without reading
        with pytest.raises(InvalidInput):
            sources.fetch(data, fashion)
    (tmp_path / "own.npz").unlink()
    assert not sources.is_here(own, fashion)


# ------------------------------------------------------------------------------------------- own images


def test_own_images_can_be_grey_or_coloured(tmp_path: Path) -> None:
    coloured = sources.load(Data(source=str(write_npz(tmp_path / "c.npz"))), Path())
    assert coloured.shape == (3, 8, 8)
    grey = write_npz(tmp_path / "g.npz", x_train=np.zeros((64, 9, 7), np.uint8), x_test=np.ones((16, 9, 7), np.uint8))
    assert sources.load(Data(source=str(grey)), Path()).shape == (1, 9, 7)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_train": np.zeros((64, 8, 8, 3), np.float32)}, "x_train: dtype float32 cannot be used"),
        ({"x_train": np.zeros((64, 3, 8, 8), np.uint8)}, "x_train: shape (64, 3, 8, 8) cannot be used"),
        ({"x_train": np.zeros((64, 8), np.uint8)}, "x_train: shape (64, 8) cannot be used"),
        ({"x_train": np.zeros((0, 8, 8, 3), np.uint8)}, "x_train: shape (0, 8, 8, 3) cannot be used"),
        ({"x_test": np.zeros((16, 9, 9, 3), np.uint8)}, "x_test: images of shape (9, 9, 3) cannot be used"),
        ({"y_train": np.zeros(64)}, "y_train: dtype float64 cannot be used"),
        ({"y_train": np.zeros(63, int)}, "y_train: shape (63,) cannot be used"),
        ({"y_train": np.zeros(64, int)}, "y_train: all labels are 0"),
        ({"y_train": np.arange(64) - 1}, "y_train: label -1 cannot be used"),
        ({"y_test": np.arange(16)}, "y_test: label 15 cannot be used: y_train has 0..2"),
        ({"y_test": None}, "no array y_test"),
        ({"x_train": np.array([{}] * 64)}, "not an .npz file of plain arrays"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, changed: dict[str, np.ndarray | None], message: str) -> None:
    path = write_npz(tmp_path / "images.npz", **changed)
    with pytest.raises(InvalidInput) as error:
        sources.load(Data(source=str(path)), Path())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_npz_is_named(tmp_path: Path) -> None:
    (tmp_path / "fake.npz").write_bytes(b"hello")
    with pytest.raises(InvalidInput, match=r"fake\.npz: not an \.npz file"):
        sources.load(Data(source=str(tmp_path / "fake.npz")), Path())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(source="digits", train_examples=1438), "data.train_examples: 1438 cannot be used: allowed are 2 to 1437"),
        (Data(source="digits", train_examples=1), "data.train_examples: 1 cannot be used"),
        (Data(source="digits", test_examples=361), "data.test_examples: 361 cannot be used: allowed are 1 to 360"),
        (Data(source="digits", mean=(0.1,) * 3, std=(0.1,) * 3), "data.mean: 3 values cannot be used"),
    ],
)
def test_settings_that_the_images_do_not_allow_are_refused(data: Data, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        sources.load(data, Path())
    assert str(error.value).startswith(message)


def test_sizes_are_those_of_the_loaded_images(fashion: Path, tmp_path: Path) -> None:
    path = str(write_npz(tmp_path / "own.npz"))
    for data in (Data(source="digits", test_examples=7), Data(source=path, padding=1)):
        images = sources.load(data, Path())
        assert sources.sizes(data) == sources.Sizes(len(images.x_train), len(images.x_test), images.shape)


def test_a_command_decompresses_own_images_once_and_again_only_if_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, open_member = list[str](), zipfile.ZipFile.open

    def counted(archive: zipfile.ZipFile, member: Any, *arguments: Any, **options: Any) -> object:
        members.append(getattr(member, "filename", member))
        return open_member(archive, member, *arguments, **options)

    monkeypatch.setattr(zipfile.ZipFile, "open", counted)
    path = write_npz(tmp_path / "own.npz")
    members.clear()
    data = build(str(path)).data
    for _ in range(3):  # the plan, the run and a sweep's driver read sizes and images
        assert sources.sizes(data).train == len(sources.load(data, Path()).x_train) == 64
    assert sorted(members) == [f"{name}.npy" for name in ("x_test", "x_train", "y_test", "y_train")]
    write_npz(path, x_test=np.zeros((9, 8, 8, 3), np.uint8), y_test=np.arange(9) % 3)
    members.clear()
    assert sources.sizes(data).test == 9
    assert len(members) == 4


def test_the_help_of_the_source_lists_every_data_set() -> None:
    (source,) = (field for field in describe(Data) if field.name == "source")
    assert source.meaning.startswith("`digits`, `fashion-mnist`, `cifar10`, `svhn`, or an `.npz` file with")
