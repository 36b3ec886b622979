"""Commands in processes of their own, forked from one that has JAX and the rest.

A new interpreter takes seconds to import them. Nothing else differs: each process has
its own flags, devices and environment, and can be stopped and killed.
"""

import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile

_CONTEXT = multiprocessing.get_context("forkserver")
# No command itself: what one defines, such as its flags, is its own.
_CONTEXT.set_forkserver_preload(
    [
        "train.analysis.confusion",
        "train.analysis.moments_figure",
        "train.analysis.stablehlo",
        "train.engine.loop",
        "train.paper",
        "train.studies.figure",
        "train.studies.runs",
    ]
)


class Command:
    """``python -m module *arguments`` on so many devices."""

    def __init__(self, module, *arguments, devices=1):
        self._folder = tempfile.TemporaryDirectory()
        to = [os.path.join(self._folder.name, name) for name in ("out", "err")]
        self._printed = [pathlib.Path(path) for path in to]
        # The tests' own, but for the number of devices: what they compiled will do.
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        if devices > 1:
            flags.append(f"--xla_force_host_platform_device_count={devices}")
        environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "TFDS_DATA_DIR": ""}
        self.process = _CONTEXT.Process(
            target=_main, args=(module, [*map(str, arguments)], environment, to)
        )
        self.process.start()

    def printed(self):
        """Standard output, then standard error."""
        return "".join(path.read_text() for path in self._printed if path.exists())

    def finish(self, status=0, timeout=300):
        """Returns what it printed, after it has ended with `status`."""
        self.process.join(timeout)
        assert self.process.exitcode == status, self.printed()
        return self.printed()


def _main(module, arguments, environment, to):
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in zip((sys.stdout, sys.stderr), to):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run(module, *arguments, status=0):
    """Returns what the command prints, standard output then standard error."""
    return Command(module, *arguments).finish(status)
