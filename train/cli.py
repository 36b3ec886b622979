"""What the commands share: flags, and errors that a user can read."""

from __future__ import annotations

import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from train.engine import processes

DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "TFDS directory (default: $TFDS_DATA_DIR, ~/tensorflow_datasets), or of"
    " --config.dataset=folder the one that holds train/ and val/.",
)

_COMPILED = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Directory of compiled programs, which runs that differ in seed and learning rate"
    " alone share; or off. Default: $JAX_COMPILATION_CACHE_DIR,"
    " ~/.cache/kalman_flax.",
)
#: bytes, beyond which the programs go that were not used for longest
_MOST_COMPILED = 2 * 2**30


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
            keep_compiled()
            main(*given)
        except processes.Stopped as stop:
            if processes.primary():
                print(stop, file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)
        except (ValueError, OSError, FloatingPointError) as error:
            logging.debug("traceback", exc_info=True)
            sys.exit(f"error: {error}")

    app.run(guarded, flags_parser=_parse)


def keep_compiled() -> None:
    """Has JAX keep what it compiles, where ``--compilation_cache`` says."""
    given = _COMPILED.value
    if given == "":
        raise ValueError("--compilation_cache is empty; expected a directory, or off.")
    if given == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if given is None and jax.config.jax_compilation_cache_dir:
        return  # as the environment says
    folder = pathlib.Path(given or "~/.cache/kalman_flax").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_COMPILED)


def define_config(**options: Any) -> flags.FlagHolder[ConfigDict]:
    """Defines ``--config``, a Python file, and ``--config.KEY`` for its keys.

    Keys of nested options, say of a normaliser, need not be there before, and so none
    is refused here; `train.engine.settings.check` knows which there are. `options` are
    those of `config_flags.DEFINE_config_file`.
    """
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment, a Python file.",
        lock_config=False,
        accept_new_attributes=True,
        **options,
    )


def config_keys() -> list[str]:
    """Returns the keys that flags set, nested ones with dots in them."""
    return list(config_flags.get_override_values(flags.FLAGS["config"]))


def path(flag: flags.FlagHolder[str]) -> pathlib.Path | None:
    """Returns the directory that a flag names, the ``~`` of a home written out; None if
    it is not given.

    Raises:
        ValueError: it is empty.
    """
    if flag.value == "":
        raise ValueError(f"--{flag.name} is empty; expected a directory.")
    return None if flag.value is None else pathlib.Path(flag.value).expanduser()


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
    except SystemExit:  # after --help, with absl's status 1
        sys.exit(0)
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
