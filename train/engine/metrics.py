"""The log of a run: metrics.jsonl, and the same for TensorBoard."""

from __future__ import annotations

import json
import pathlib

from train.engine import processes
from train.engine.events import Events
from train.engine.files import damaged, is_number, naming, parse, replace

METRICS = "metrics.jsonl"


class MetricsLog:
    """Scalars by step, as JSON lines for our own plots and as TensorBoard events.

    Opened at step s, it forgets what an interrupted run wrote after its checkpoint. Of
    several processes the first one writes.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        """Opens the log of a run that goes on from `step`."""
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        #: seconds that training took up to `step`, over all interruptions
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self._writes = processes.primary()
        if not self._writes:
            return
        self._path = workdir / METRICS
        replace(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = self._path.open("a", buffering=1)
        self._events = Events(workdir / "tensorboard", step)

    def write(self, step: int, seconds: float, **scalars: float) -> None:
        """Writes one line: after `step` updates and so many seconds.

        Raises:
            OSError: it could not be written, say because the disk is full.
        """
        if not self._writes:
            return
        line = {"step": step, "seconds": round(seconds, 3)} | scalars
        with naming(self._path):
            self._lines.write(json.dumps(line) + "\n")
        self._events.write(step, scalars)

    def close(self) -> None:
        """Flushes and closes both files."""
        if not self._writes:
            return
        with naming(self._path):
            self._lines.close()
        self._events.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Reads what `MetricsLog` wrote; a last line cut off by a crash does not count.

    Raises:
        ValueError: a line is damaged.
    """
    path = workdir / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = []
    for number, text in enumerate(lines, 1):
        if not text.endswith(b"\n"):
            break
        line = parse(text)
        if not (
            isinstance(line, dict)
            and {"step", "seconds"} <= line.keys()
            and all(map(is_number, line.values()))
        ):
            raise damaged(
                f"line {number} of {path}",
                "delete the line, or the file: the run goes on without it",
            )
        found.append(line)
    return found


def last_test(workdir: pathlib.Path, step: int) -> dict[str, float]:
    """Returns what the test after `step` updates found; empty if there was none."""
    found: dict[str, float] = {}
    for line in read_metrics(workdir):
        if line["step"] == step:
            found |= {k: v for k, v in line.items() if k.startswith("test_")}
    return {name.removeprefix("test_"): value for name, value in found.items()}
