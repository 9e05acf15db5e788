"""Image files that are damaged, hostile or not regular files: one line, exit status 2, and nothing is written."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dwf_cluster.data import own_images, sources
from dwf_cluster.data.registry import Data
from dwf_cluster.launch import main
from dwf_cluster.settings import InvalidInput

from .conftest import write_npz

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
SHAPE = "(64, 8, 8, 3)"


def _members(folder: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(write_npz(folder / "good.npz")) as archive:
        return {name: archive.read(f"{name}.npy") for name in ARRAYS}


def _zip(folder: Path, method: int = zipfile.ZIP_DEFLATED, **changed: bytes) -> bytearray:
    """The good archive with some members replaced."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, member in (_members(folder) | changed).items():
            archive.writestr(f"{name}.npy", member)
    return bytearray(content.getvalue())


def _header(text: bytes, version: bytes = b"\x01\x00") -> Callable[[Path], bytes]:
    """The good archive, `x_train` with this header."""

    def make(folder: Path) -> bytes:
        padded = text + b" " * (-(len(text) + 11) % 64) + b"\n"
        return bytes(
            _zip(folder, x_train=b"\x93NUMPY" + version + struct.pack("<H", len(padded)) + padded + bytes(12288))
        )

    return make


def _fields(descr: str = "'|u1'", shape: str = SHAPE) -> Callable[[Path], bytes]:
    return _header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode())


def _damaged(method: int) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        archive = _zip(folder, method)
        archive[100:160] = b"\xff" * 60  # within the first member
        return bytes(archive)

    return make


def _flagged(at_local: int, at_central: int, value: int) -> Callable[[Path], bytes]:
    """The good archive with one 16-bit field of every member's two headers changed."""

    def make(folder: Path) -> bytes:
        archive = _zip(folder)
        for signature, offset in ((b"PK\x03\x04", at_local), (b"PK\x01\x02", at_central)):
            start = archive.find(signature)
            while start >= 0:
                struct.pack_into("<H", archive, start + offset, value)
                start = archive.find(signature, start + 4)
        return bytes(archive)

    return make


def _labels(folder: Path) -> bytes:
    content = io.BytesIO()
    np.save(content, np.full(64, 2**64 - 1, np.uint64))
    return bytes(_zip(folder, y_train=content.getvalue()))


def _scalar(folder: Path) -> bytes:
    content = io.BytesIO()
    np.save(content, np.uint8(3))
    return bytes(_zip(folder, x_train=content.getvalue()))


NO_NPZ = "a.npz: not an .npz file of plain arrays ("
DAMAGED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "lzma-damaged": (_damaged(zipfile.ZIP_LZMA), NO_NPZ),
    "bz2-damaged": (_damaged(zipfile.ZIP_BZIP2), ""),
    "deflate-damaged": (_damaged(zipfile.ZIP_DEFLATED), NO_NPZ),
    "encrypted": (_flagged(6, 8, 1), NO_NPZ),
    "unknown-compression": (_flagged(8, 10, 77), NO_NPZ),
    "header-unbalanced": (_header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (64, 8"), NO_NPZ),
    "header-deep": (_fields(shape="(" * 500 + "64" + ",)" * 500), NO_NPZ),
    "header-huge-shape": (_fields(shape="(99999999999999999999999, 8, 8, 3)"), NO_NPZ),
    "header-tera": (_fields(shape="(1000000000000, 8, 8, 3)"), NO_NPZ),
    "header-giga": (_fields(shape="(10000000, 8, 8, 3)"), NO_NPZ),
    "header-negative": (_fields(shape="(-64, 8, 8, 3)"), NO_NPZ),
    "header-descr-int": (_fields(descr="7"), NO_NPZ),
    "header-descr-tuple": (_fields(descr="()"), NO_NPZ),
    "header-descr-list": (_fields(descr="[()]"), NO_NPZ),
    "header-python-2": (_fields(shape="(64L, 8L, 8L, 4L)"), NO_NPZ),
    "header-zero-byte": (_header(b"{'descr': '|u1'\0}"), NO_NPZ),
    "header-indented": (_header(b"  {'descr': '|u1',\n 'fortran_order': L\n  'shape': (64, 8, 8, 3), }"), NO_NPZ),
    "header-object": (_fields(descr="'|O'"), NO_NPZ),
    "version-9": (_header(b"{}", b"\x09\x09"), NO_NPZ),
    "label-uint64": (_labels, "y_train: label 18446744073709551615 cannot be used"),
    "no-dimension": (_scalar, "x_train: shape () cannot be used"),
    "empty-member": (lambda folder: bytes(_zip(folder, x_test=b"")), NO_NPZ),
}


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a launch that refuses its input."""
    before = sorted(os.listdir())
    assert main(["--local", "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 400
    assert error[:-1].isprintable()
    assert sorted(os.listdir()) == before
    return error.removeprefix("error: ")


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_archive_is_one_line(working_folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, message = DAMAGED[case]
    content = make(working_folder)
    (working_folder / "good.npz").unlink()
    (working_folder / "a.npz").write_bytes(content)
    error = _refused(capsys, "--preset", "a.npz")
    assert error.startswith(message)
    assert "None" not in error


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_of_any_known_compression_is_read(tmp_path: Path, method: int) -> None:
    (tmp_path / "a.npz").write_bytes(_zip(tmp_path, method))
    assert sources.load(Data(source=str(tmp_path / "a.npz")), Path()).shape == (3, 8, 8)


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory": (lambda path: path.mkdir(), "it is a directory; allowed is a regular file"),
    "pipe": (os.mkfifo, "it is a pipe, a socket or a device; allowed is a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a pipe, a socket or a device"),
    "dangling": (lambda path: path.symlink_to("gone"), "No such file or directory"),
    "loop": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.parametrize(("name", "field"), [("a.npz", "data.source"), ("a.json", "preset")])
def test_a_path_that_is_not_a_regular_file_is_refused_before_it_is_read(
    working_folder: Path, capsys: pytest.CaptureFixture[str], case: str, name: str, field: str
) -> None:
    make, message = SPECIAL[case]
    make(working_folder / name)
    assert _refused(capsys, "--preset", name).startswith(f"{field}: '{name}' cannot be read: {message}")


def test_an_archive_that_does_not_fit_into_memory_is_refused_before_it_is_decompressed(
    working_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = np.zeros((1 << 16, 8, 8, 3), np.uint8)
    np.savez_compressed(
        working_folder / "bomb.npz", x_train=bomb, y_train=np.arange(1 << 16), x_test=bomb, y_test=bomb[:, 0, 0, 0]
    )
    size = sum(member.file_size for member in zipfile.ZipFile(working_folder / "bomb.npz").infolist())
    assert size > 20 * (working_folder / "bomb.npz").stat().st_size
    monkeypatch.setattr(sources, "_available_memory", lambda: 2 * size - 1)
    monkeypatch.setattr(own_images, "_array", lambda *_: pytest.fail("it was decompressed"))
    error = _refused(capsys, "--preset", "bomb.npz")
    assert error.startswith(f"bomb.npz: {size:,} bytes decompressed cannot be used: allowed are {size - 1:,}")


# ----------------------------------------------------------------------------------------------- IDX files

IMAGES = "train-images-idx3-ubyte.gz"


def _idx(*sizes: int, values: int, dimensions: int | None = None) -> bytes:
    header = bytes([0, 0, 8, len(sizes) if dimensions is None else dimensions])
    return gzip.compress(header + struct.pack(f">{len(sizes)}I", *sizes) + bytes(values))


@pytest.fixture
def fashion(working_folder: Path) -> Path:
    for split, count in (("train", 20), ("t10k", 10)):
        (working_folder / f"{split}-images-idx3-ubyte.gz").write_bytes(_idx(count, 28, 28, values=count * 784))
        (working_folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(_idx(count, values=count))
    return working_folder


NO_IDX = "not an IDX file of unsigned bytes, or cut short"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"\0\0\x08\x03\0\0"), NO_IDX),
        (gzip.compress(b"\0\0"), NO_IDX),
        (_idx(2**31, 2**31, 4, values=9), "18,446,744,073,709,551,616 bytes decompressed cannot be used"),
        (_idx(2**32 - 1, 2**32 - 1, 2**32 - 1, values=9), "bytes decompressed cannot be used"),
        (_idx(*[1] * 255, values=1), NO_IDX),
        (_idx(20, 28, 28, values=15680 + 1), NO_IDX),
        (_idx(20, 28, 28, values=15680 - 1), NO_IDX),
        (_idx(20, 28, 28, values=15680)[:-9], "not a gzip file"),
        (_idx(20, 28, 28, values=15680) + b"garbage", "not a gzip file"),
        (_idx(20, 28, 28, values=15680)[:-8] + bytes(8), "not a gzip file"),
        (bz2.compress(b"x"), "not a gzip file"),
        (lzma.compress(b"x"), "not a gzip file"),
    ],
    ids=["header", "start", "sizes", "overflow", "dimensions", "long", "short", "cut", "garbage", "crc", "bz2", "xz"],
)
def test_a_damaged_idx_file_is_one_line(
    fashion: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (fashion / IMAGES).write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as error:
        sources.load(Data(source="fashion-mnist"), fashion)
    assert str(error.value).startswith(f"{fashion / IMAGES}: ")
    assert "\n" not in str(error.value)


def test_an_idx_file_is_decompressed_only_up_to_the_size_in_its_header(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gzip.open(fashion / IMAGES, "wb", compresslevel=1) as file:
        file.write(b"\0\0\x08\x03" + struct.pack(">3I", 20, 28, 28))
        file.write(bytes(1 << 24))
    sizes, read = list[int](), gzip.GzipFile.read

    def recorded(self: gzip.GzipFile, size: int = -1) -> bytes:
        sizes.append(size)
        return read(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", recorded)
    with pytest.raises(InvalidInput, match=NO_IDX):
        sources.load(Data(source="fashion-mnist"), fashion)
    assert sizes == [4, 12, 20 * 28 * 28 + 1]
