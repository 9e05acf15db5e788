"""TensorBoard event files, made from the rows of `metrics` during training: `<folder>/<experiment>/<model>/`."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event as ProtoEvent
from tensorboardX.summary import scalar

from dwf_cluster.cluster.events import Epoch, Event
from dwf_cluster.settings import InvalidInput

SCALARS = ("loss", "clean_accuracy", "probe_pgd_accuracy", "learning_rate", "images_per_second")
"""Columns of `metrics` that are shown over epochs."""


class EventFiles:
    """Event files of the models of a run. Files of an earlier run are replaced: every epoch is written again.

    Args:
        folder: of all event files.

    Raises:
        InvalidInput: if the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        if re.match(r"\w+:/", str(folder)):
            raise InvalidInput(f"--tensorboard: {str(folder)!r} cannot be used: allowed is a folder of this machine")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as trial:
                trial.write(b"trial")
        except OSError as error:
            raise InvalidInput(f"--tensorboard: {str(folder)!r} cannot be used: {error.strerror}") from None
        self._folder = folder
        self._has_failed = False
        self._writers: dict[tuple[str, str], EventsWriter] = {}

    def __call__(self, event: Event) -> None:
        """Write an epoch; ignore other events.

        Raises:
            ValueError: if the row is of another model. Rows come from a store that others may write to.
            OSError: if it cannot be written; later epochs are then ignored.
        """
        if not isinstance(event, Epoch) or self._has_failed:
            return
        job, model = event.job, event.row["model"]
        if model != job.model:
            raise ValueError(f"metrics of {job.folder}, {job.model}, name another model, {model!r}")
        try:
            self._write(event)
        except OSError as error:
            self._has_failed = True
            reason = f"{error.filename or self._folder}: {error.strerror or error}"
            raise OSError(f"{reason}; no more event files, the table metrics has every epoch") from error

    def _write(self, event: Epoch) -> None:
        # The names are the plan's, never the row's: those might point to other folders.
        key, row = (event.job.folder, event.job.model), event.row
        if key not in self._writers:
            folder = self._folder.joinpath(*key)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            self._writers[key] = EventsWriter(str(folder / "events"))
        for name in SCALARS:
            if row[name] is not None:
                summary = scalar(name, row[name])
                self._writers[key].write_event(ProtoEvent(wall_time=time.time(), step=row["epoch"], summary=summary))
        self._writers[key].flush()
