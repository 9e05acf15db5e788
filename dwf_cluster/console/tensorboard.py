"""TensorBoard event files, made from the rows of `metrics` as they come: `<folder>/<experiment>/<model>/`."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from dwf_cluster.settings import InvalidInput

SCALARS = ("loss", "clean_accuracy", "probe_pgd_accuracy", "learning_rate", "images_per_second")
"""Columns of `metrics` that are shown over epochs."""


class EventFiles:
    """Event files of the models of a run. What an earlier run left is replaced: the table has it all.

    Args:
        folder: of all event files.
        models: names of the models of each experiment, by the name of the experiment's folder. Only these become
            paths: rows come from a store that others may write to.
        warn: is told, as a channel and a reason, that event files are missing. No failure after the start is raised.

    Raises:
        InvalidInput: if there cannot be such a folder, or nothing can be written to it.
    """

    def __init__(self, folder: Path, models: Mapping[str, Collection[str]], warn: Callable[[str, str], None]) -> None:
        if re.match(r"\w+:/", str(folder)):
            raise InvalidInput(f"--tensorboard: {str(folder)!r} cannot be used: allowed is a folder of this machine")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as trial:
                trial.write(b"trial")
        except OSError as error:
            raise InvalidInput(f"--tensorboard: {str(folder)!r} cannot be used: {error.strerror}") from None
        self._folder = folder
        self._models = models
        self._warn = warn
        self._failed = False
        self._writers: dict[tuple[str, str], EventsWriter] = {}

    def add(self, experiment: str, row: Mapping[str, Any]) -> None:
        """Take a row of `metrics`.

        Args:
            experiment: its folder's name.
            row: later epochs after earlier ones.
        """
        model = row["model"]
        if model not in self._models.get(experiment, ()):
            self._warn("TensorBoard", f"metrics of {experiment} name a model {model!r}, which it does not have")
        elif not self._failed:
            try:
                self._write(experiment, model, row)
            except OSError as error:
                self._failed = True
                reason = f"{error.filename or self._folder}: {error.strerror or error}"
                self._warn("TensorBoard", f"{reason}; no more event files, the table metrics has every epoch")

    def _write(self, experiment: str, model: str, row: Mapping[str, Any]) -> None:
        key = experiment, model
        if key not in self._writers:
            place = self._folder.joinpath(*key)
            for old in place.glob("events.out.tfevents.*"):
                old.unlink()
            place.mkdir(parents=True, exist_ok=True)
            self._writers[key] = EventsWriter(str(place / "events"))
        for name in SCALARS:
            if row[name] is not None:
                event = Event(wall_time=time.time(), step=row["epoch"], summary=scalar(name, row[name]))
                self._writers[key].write_event(event)
        self._writers[key].flush()
