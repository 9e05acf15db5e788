"""TensorBoard event files, made from the rows of `metrics` as they come: `<folder>/<experiment>/<model>/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from dwf_cluster.experiment import InvalidInput

SCALARS = ("loss", "clean_accuracy", "probe_pgd_accuracy", "learning_rate", "images_per_second")
"""Columns of `metrics` that are shown over epochs."""


class EventFiles:
    """Event files of the models of a run. What an earlier run left is replaced: the table has it all.

    Raises:
        InvalidInput: if there cannot be such a folder.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"--tensorboard: {str(folder)!r} cannot be used: {error.strerror}") from None
        self._folder = folder
        self._writers: dict[tuple[str, str], SummaryWriter] = {}

    def add(self, experiment: str, row: Mapping[str, Any]) -> None:
        """Take a row of `metrics`.

        Args:
            experiment: its folder's name.
            row: later epochs after earlier ones.
        """
        key = experiment, row["model"]
        if key not in self._writers:
            place = self._folder.joinpath(*key)
            for old in place.glob("events.out.tfevents.*"):
                old.unlink()
            self._writers[key] = SummaryWriter(str(place))
        for name in SCALARS:
            self._writers[key].add_scalar(name, row[name], row["epoch"])
        self._writers[key].flush()
