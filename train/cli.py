"""What the commands share: flags, and errors that a user can read."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from absl import app, flags, logging

from train.engine import processes

DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "TFDS directory (default: $TFDS_DATA_DIR, ~/tensorflow_datasets), or of"
    " --config.dataset=folder the one that holds train/ and val/.",
)


def run(main: Callable[..., None], positional: int = 0) -> None:
    """Runs a command; bad input ends it with one clear line and status 1.

    ``--verbosity=1`` shows the traceback as well.

    Args:
        main: the command.
        positional: how many arguments that are no flags it takes, at most.
    """

    def guarded(arguments: list[str]) -> None:
        given, unexpected = arguments[1 : positional + 1], arguments[positional + 1 :]
        if unexpected:
            raise app.UsageError(f"unexpected arguments: {' '.join(unexpected)}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax narrates every save at INFO
        try:
            main(*given)
        except processes.Stopped as stop:
            if processes.primary():
                print(stop, file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)
        except (ValueError, OSError, FloatingPointError) as error:
            logging.debug("traceback", exc_info=True)
            sys.exit(f"error: {error}")

    app.run(guarded, flags_parser=_parse)


def define_at_once() -> flags.FlagHolder[int | None]:
    """Defines ``--at_once``, for commands that make many runs."""
    return flags.DEFINE_integer(
        "at_once",
        None,
        "Compile once for all runs that differ in seed and learning rate alone, and"
        " train up to so many of them by one program. Default: each by a program of its"
        " own.",
        lower_bound=1,
    )


def micro_batch_size(text: str) -> int:
    """Reads a micro-batch size that a user gave.

    Raises:
        ValueError: it is not a positive number.
    """
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"micro-batch size {text!r}; expected a positive number.")
    return int(text)


def _parse(arguments: list[str]) -> list[str]:
    """Parses flags; what ml_collections raises for a bad --config is input as well."""
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        # A config that refuses what it is given comes with its whole traceback.
        flag, refusal, why = str(error).rpartition("\nValueError: ")
        if refusal:
            error = f"{flag.splitlines()[0]} {why.strip()}"
        sys.exit(f"error: {error}\nPass --help for the flags.")
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # For an unknown key the message lies in a KeyError, whose own text is a repr.
        message = error.args[0] if error.args else error
        if isinstance(message, KeyError):
            message = f"no key {message.args[0]}"
        sys.exit(f"error: bad --config: {message}")
