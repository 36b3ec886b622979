"""Files that outlive a crash, and errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any


def directory(given: str | os.PathLike[str], name: str = "workdir") -> pathlib.Path:
    """Returns the directory that is meant, the ``~`` of a home written out.

    Raises:
        ValueError: `given` is empty, or a URL; the message has the `name`.
    """
    text = os.fspath(given)
    if not text:
        raise ValueError(f"{name} is empty; expected a directory.")
    if re.match(r"[A-Za-z][\w+.-]+:/", text):  # a path has lost one slash of two
        raise ValueError(
            f"{name} is {text}, a URL; expected a directory of this machine. Mount"
            " what is elsewhere, as gcsfuse and s3fs do."
        )
    return pathlib.Path(text).expanduser()


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Gives an OSError that lacks it, such as of a full disk, the name of the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a crash, also of the machine, leaves the old one or the new
    one, never half.

    Raises:
        OSError: it could not be written; the old one is kept.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with naming(path), draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: pathlib.Path) -> None:
    """Brings the names in `folder` to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON as `replace` does."""
    replace(path, json.dumps(content, indent=2) + "\n")


def read_json(path: pathlib.Path, mend: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: the file is damaged; the message names it and ends with `mend`.
    """
    content = parse(path.read_bytes())
    if not isinstance(content, dict):
        raise damaged(path, mend)
    return content


def parse(text: bytes) -> Any:
    """Returns what JSON stands for; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def damaged(where: object, mend: str, why: str = "") -> ValueError:
    """Returns an error for a file that is not as it was written."""
    return ValueError(f"{where} is damaged{why and f' ({why})'}; {mend}.")


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
