"""Where an operation of a traced program stands in the sources."""

from __future__ import annotations

import pathlib
from typing import Any

import flax
import jax

_LIBRARIES = tuple(
    str(pathlib.Path(file).parent) + "/"
    for file in (jax.__file__, flax.__file__, __file__)
)


def place(equation: Any) -> str:
    """Returns file and line of the innermost call outside of JAX, Flax and this."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not frame.file_name.startswith((*_LIBRARIES, "<")):
            return f"{_short(frame.file_name)}:{frame.line_num}"
    return "an unknown place"


def in_library(jaxpr: Any) -> bool:
    """Whether a function of JAX or Flax was traced, and not one of the model: it may
    have been traced at another call, so that its places are not those of this one."""
    file = getattr(jaxpr.debug_info, "func_filename", None)
    return file is None or file.startswith(_LIBRARIES)


def _short(file: str) -> str:
    return "/".join(pathlib.Path(file).parts[-3:])
