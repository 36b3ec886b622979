"""What the commands share: flags, and errors that a user can read."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, overload

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import base
from train.engine import processes
from train.engine.files import directory

DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "TFDS directory (default: $TFDS_DATA_DIR, ~/tensorflow_datasets), or of"
    " --config.dataset=folder the one that holds train/ and val/, of coco the one that"
    " holds annotations/, train2017/ and val2017/.",
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


#: seconds that threads have to end after an error
_PATIENCE = 5.0
_BUG = (
    "This is a bug in kalman_flax. Please report it, with the lines above and the"
    " command."
)


def run(main: Callable[..., None], positional: int = 0) -> None:
    """Runs a command; what can go wrong ends it with one clear line and status 1.

    ``--verbosity=1`` shows the traceback as well. Anything else is a bug of ours: it
    shows its traceback, says so, and ends with status 70.

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
            check_lists(flags.FLAGS)
            path(DATA_DIR)
            keep_compiled()
            main(*given)
        except processes.Stopped as stop:
            if processes.primary():
                print(stop, file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            if (line := expected(error)) is None:
                traceback.print_exception(error)
                print(_BUG, file=sys.stderr)
                _leave(os.EX_SOFTWARE)
            logging.debug("traceback", exc_info=True)
            print(f"error: {line}", file=sys.stderr)
            _leave(1)

    app.run(guarded, flags_parser=_parse)


def _leave(status: int) -> NoReturn:
    """Ends the process. Where a checkpoint could not be written, threads of Orbax may
    wait for each other, and Python for them, for many minutes."""
    until = time.monotonic() + _PATIENCE
    others = [t for t in threading.enumerate() if t is not threading.main_thread()]
    for thread in others:
        if not thread.daemon:
            thread.join(max(0.0, until - time.monotonic()))
    if any(thread.is_alive() and not thread.daemon for thread in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def expected(error: Exception) -> str | None:
    """Returns what to tell a user of an error that can happen to anybody: bad input, a
    full disk, too little memory. None for one that is a bug of ours."""
    text = str(error)
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC or "No space left" in text:
            return f"the disk is full: {text}{_where(error)}"
        return text + _where(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return (
            "out of memory; a smaller batch_size or width needs less, and so does a"
            f" larger accumulate. {text.partition(chr(10))[0]}"
        )
    if isinstance(error, ModuleNotFoundError):
        return f"{text}; pip install 'kalman_flax[train]' has all that commands need."
    if isinstance(error, ValueError | FloatingPointError):
        return text + _raised_in(error)
    return None


def _raised_in(error: Exception) -> str:
    """The package that refused what it got, where the words are not ours."""
    place = traceback.extract_tb(error.__traceback__)
    last = place[-1].filename if place else ""
    _, installed, inside = last.partition("site-packages/")
    if not installed:
        return ""
    return (
        f" (raised in {inside.partition('/')[0]}; --verbosity=1 shows where. If what"
        " you gave is right, this is a bug in kalman_flax: please report it)"
    )


def _where(error: OSError) -> str:
    """The directory of the command, for an error that has none in it."""
    if isinstance(error, FileNotFoundError) and error.errno is None:
        return ""  # in our words, which name what is missing
    workdir = flags.FLAGS.flag_values_dict().get("workdir")
    if workdir is None or error.filename is not None or workdir in str(error):
        return ""
    return f" (with --workdir={workdir})"


def keep_compiled() -> None:
    """Has JAX keep what it compiles, where ``--compilation_cache`` says."""
    given = _COMPILED.value
    if given == "":
        raise ValueError("--compilation_cache is empty; expected a directory, or off.")
    if given == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if given is None and jax.config.values["jax_compilation_cache_dir"]:
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


@overload
def path(flag: flags.FlagHolder[str]) -> pathlib.Path: ...
@overload
def path(flag: flags.FlagHolder[str | None]) -> pathlib.Path | None: ...
def path(flag: flags.FlagHolder[Any]) -> pathlib.Path | None:
    """Returns the directory that a flag names, the ``~`` of a home written out; None if
    it is not given.

    Raises:
        ValueError: it is empty, or a URL.
    """
    return None if flag.value is None else directory(flag.value, f"--{flag.name}")


def check_lists(values: flags.FlagValues) -> None:
    """Refuses lists that are given and empty: nobody means nothing by that.

    Raises:
        ValueError: there is one.
    """
    for name in values:
        flag = values[name]
        given = flag.present and isinstance(flag.parser, flags.ListParser)
        if given and not any(flag.value or ()):
            raise ValueError(f"--{name} is empty; leave it out for its default.")


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
        rest = flags.FLAGS(arguments)
        if "config" in flags.FLAGS:  # one that could not be loaded says so when used
            getattr(flags.FLAGS["config"].value, "keys", None)
    except SystemExit:  # after --help, with absl's status 1
        if "config" in flags.FLAGS:
            print(f"\n{base.listing()}")
        sys.exit(0)
    except flags.Error as error:
        sys.exit(f"error: {_without_traceback(error)}\nPass --help for the flags.")
    except (OSError, SyntaxError) as error:
        sys.exit(f"error: bad --config: {error}")
    except Exception as error:  # a config is a program, and may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}, line {place.lineno}"
        if "ml_collections" in place.filename:
            keys = [each for each in arguments if each.startswith("--config.")]
            where = f"with {' '.join(keys)}"
        # For an unknown key the message lies in a KeyError, whose own text is a repr.
        message = error.args[0] if error.args else type(error).__name__
        if isinstance(error, KeyError) or isinstance(message, KeyError):
            message = f"no key {str(message).strip(chr(34))}"
        sys.exit(f"error: bad --config: {message} ({where})")
    return rest


def _without_traceback(error: flags.Error) -> str:
    """Returns the first line of the text and the last: a config that refuses what it is
    given comes with its whole traceback."""
    text = str(error)
    if "Traceback (most recent call last)" not in text:
        return text
    why = re.split(r"\n(?=\w[\w.]*(?:Error|Exception)?: )", text.rstrip())[-1]
    return f"{text.splitlines()[0]} {why.removeprefix('ValueError: ')}"
