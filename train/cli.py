"""What the commands share: flags, and errors that a user can read."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags, logging

DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "TFDS directory (default: $TFDS_DATA_DIR, ~/tensorflow_datasets)."
)


def run(main: Callable[[], None]) -> None:
    """Runs a command; bad input ends it with one clear line and status 1.

    ``--verbosity=1`` shows the traceback as well.
    """

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(arguments[1:])}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax narrates every save at INFO
        try:
            main()
        except (ValueError, OSError, FloatingPointError) as error:
            logging.debug("traceback", exc_info=True)
            sys.exit(f"error: {error}")

    app.run(guarded)
