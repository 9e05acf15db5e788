"""Reader of `.npz` files: the user's own images."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dwf_cluster.data.sources import Raw, fail_if_too_large
from dwf_cluster.settings import InvalidInput, one_line, regular_file


def read(path: Path) -> Raw:
    """The four arrays of an `.npz` file.

    Raises:
        InvalidInput: if it cannot be read, is damaged, lacks an array, or does not fit into memory.
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    regular_file(str(path), "data.source")
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # numpy warns of headers in an old form, on a line of its own
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            missing = [name for name in names if name not in members]
            if missing:
                raise InvalidInput(f"{path}: no array {missing[0]}: {', '.join(names)} are needed")
            fail_if_too_large(str(path), sum(members[name].file_size for name in names))
            return Raw(*(_array(archive, members[name]) for name in names))
    except InvalidInput:
        raise
    except OSError as error:
        raise InvalidInput(f"data.source: {str(path)!r} cannot be read: {error.strerror or error}") from None
    # Anyone may have made the file. What zipfile, its decompressors and numpy raise on a damaged one is not documented:
    # RuntimeError, NotImplementedError, LZMAError, TokenError, OverflowError and IndexError among others.
    except Exception as error:
        raise InvalidInput(f"{path}: not an .npz file of plain arrays ({one_line(error)})") from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[np.generic]:
    """One array of the archive.

    zipfile never returns more than the size in its directory, and memory that numpy allocates is not used before it is
    written to: a header that promises more than the archive holds is an error like any other.
    """
    with archive.open(member) as file:
        array: NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
    return array
