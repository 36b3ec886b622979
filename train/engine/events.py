"""Scalars for TensorBoard."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from train.engine.files import naming


class Events:
    """Writes at once what it is given.

    tensorboardX's own `SummaryWriter` leaves it to a thread. That dies when the disk is
    full, and whoever writes next waits for ever.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        """Opens a file in `folder`; events after `step`, of other files, are void."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        with naming(folder):
            self._writer = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=step + 1, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars, by name, of `step`.

        Raises:
            OSError: they could not be written, say because the disk is full.
        """
        self._write(
            *(
                Event(step=step, summary=scalar(name, value))
                for name, value in scalars.items()
            )
        )

    def close(self) -> None:
        """Closes the file."""
        with naming(self._folder):
            self._writer.close()

    def _write(self, *events: Event) -> None:
        with naming(self._folder):
            for event in events:
                event.wall_time = time.time()
                self._writer.write_event(event)
            self._writer.flush()
