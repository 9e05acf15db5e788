"""The SLURM cluster that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .slurm import Slurm


@pytest.fixture(scope="package")
def cluster() -> Iterator[Slurm]:
    running = Slurm()
    try:
        running.start()
        yield running
    finally:
        running.stop()
