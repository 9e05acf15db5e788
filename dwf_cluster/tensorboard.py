"""TensorBoard event files, made from the rows of `metrics` as they come: `<folder>/<experiment>/<model>/`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

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
        self._writers: dict[tuple[str, str], EventsWriter] = {}

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
            place.mkdir(parents=True, exist_ok=True)
            self._writers[key] = EventsWriter(str(place / "events"))
        for name in SCALARS:
            event = Event(wall_time=time.time(), step=row["epoch"], summary=scalar(name, row[name]))
            self._writers[key].write_event(event)
        self._writers[key].flush()
