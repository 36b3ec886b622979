"""Every image file is opened before the first step: the bad ones are found at once."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import PIL
from tqdm import tqdm

from train.data.encoded import Encoded
from train.data.files import Files, Found
from train.data.folders import SHOWN
from train.data.pixels import check_file
from train.data.sets import Dataset

#: files that a thread opens at a time
PIECE = 64
#: of threads, most of which wait for the disk
THREADS = min(32, 4 * (os.cpu_count() or 1))


class Group(NamedTuple):
    """Files to be looked at together.

    Attributes:
        name: of the group.
        root: the folder that paths begin in.
        found: the files.
    """

    name: str
    root: pathlib.Path
    found: Sequence[Found]


def check_images(
    dataset: Dataset, checked: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Opens all image files of both splits, by split and class; see `check_files`.

    Sets that are no folders of images have nothing to look at.
    """
    groups, max_pixels = [], 0
    for split in (dataset.train, dataset.test):
        if isinstance(split, Encoded) and isinstance(split.source, Files):
            root, max_pixels = split.source.root, split.max_pixels
            groups += [
                Group(f"{root.name}/{dataset.classes[label]}", root, found)
                for label, found in _by_label(split.source)
            ]
    return check_files(groups, max_pixels, checked)


def check_files(
    groups: Iterable[Group], max_pixels: int, checked: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Opens all image files; reads headers and ends, but few pixels.

    Shows a progress bar when it takes longer than a second.

    Args:
        groups: the files.
        max_pixels: of an image, at most.
        checked: what an earlier call returned: groups whose files have not changed
            since are left out.

    Returns:
        By group a hash of the paths, sizes and times of change of its files.

    Raises:
        ValueError: files that are no images, cut short, too large, or of a kind whose
            colours are not known; the message has the first of them, and how many there
            are.
    """
    digests: dict[str, str] = {}
    unknown: list[pathlib.Path] = []
    for name, root, found in groups:
        digests[name] = _digest(found, max_pixels)
        if (checked or {}).get(name) != digests[name]:
            unknown += [root / file.path for file in found]
    if unknown:
        _check(unknown, max_pixels)
    return digests


def _by_label(files: Files) -> Iterator[tuple[int, list[Found]]]:
    found: dict[int, list[Found]] = {}
    for file, label in zip(files.found, files.labels.tolist()):
        found.setdefault(label, []).append(file)
    yield from sorted((label, sorted(those)) for label, those in found.items())


def _digest(found: Sequence[Found], max_pixels: int) -> str:
    """Of everything that what we find hangs on."""
    digest = hashlib.sha256(f"{PIL.__version__} {max_pixels}".encode())
    for file in found:
        line = f"\n{file.path}\0{file.size} {file.changed}"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _check(paths: Sequence[pathlib.Path], max_pixels: int) -> None:
    bad: list[str] = []
    several = 0
    main = jax.process_index() == 0
    with (
        ThreadPoolExecutor(THREADS) as threads,
        tqdm(
            total=len(paths),
            desc="image files",
            unit="file",
            delay=1.0,
            disable=not main,
        ) as bar,
    ):
        look = functools.partial(_look, max_pixels=max_pixels)
        pieces = [paths[i : i + PIECE] for i in range(0, len(paths), PIECE)]
        for piece, found in zip(pieces, threads.map(look, pieces)):
            bar.update(len(piece))
            several += found.count(True)
            bad += [f"{p}: {f}" for p, f in zip(piece, found) if isinstance(f, str)]
    if bad:
        more = [f"and {len(bad) - SHOWN:,} more"] if len(bad) > SHOWN else []
        raise ValueError(
            f"{len(bad):,} of {len(paths):,} image files cannot be used; mend them or"
            " take them away:\n  " + "\n  ".join(bad[:SHOWN] + more)
        )
    if several and main:
        tqdm.write(
            f"{several:,} files hold several images each, of which the first is taken"
        )


def _look(paths: Sequence[pathlib.Path], max_pixels: int) -> list[bool | str]:
    """Returns of each file whether it holds several images, or what is wrong."""
    found: list[bool | str] = []
    for path in paths:
        try:
            found.append(check_file(path, max_pixels))
        except Exception as error:  # of Pillow, by format, and of the file system
            found.append(str(error) or type(error).__name__)
    return found
