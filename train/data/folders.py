"""Folders of images: one scan that says what it took, and refuses what cannot be meant.

A class is a folder in ``train/``; its images lie in it or in folders within it, as for
torchvision's `ImageFolder`.
"""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from train.data.files import Files, Found
from train.data.names import (
    IMAGES,
    RAW,
    UNREAD,
    alike,
    is_hidden,
    plain,
    suffix,
    unprintable,
)
from train.data.pixels import is_image, unread_format

TEST_FOLDERS = ("val", "validation", "test")
#: names that a message shows
SHOWN = 10
_HIDDEN = "hidden or a tool's"


class Folder(NamedTuple):
    """What a scan found.

    Attributes:
        classes: their names, sorted: by label.
        summary: what was taken and what was not, for people to read.
    """

    train: Files
    test: Files
    classes: tuple[str, ...]
    summary: str


def scan(root: pathlib.Path) -> Folder:
    """Looks at every file in ``train/`` and in ``val/``, ``validation/`` or ``test/``.

    Raises:
        FileNotFoundError: a folder or the images are missing.
        ValueError: classes or files that cannot be meant; the message names them.
        OSError: a folder cannot be read.
    """
    there = sorted(e.name for e in os.scandir(root)) if root.is_dir() else []
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise FileNotFoundError(
            f"expected the folders train and {', '.join(TEST_FOLDERS[:-1])} or"
            f" {TEST_FOLDERS[-1]} in {root}, with images in train/CLASS/; found"
            f" {_list(there) if there else 'nothing'}."
        )
    splits = _Split(root / "train"), _Split(test)
    _check_classes(*splits)
    classes = tuple(sorted(splits[0].by_class))
    train, test = (
        Files(s.root, {name: s.by_class.get(name, []) for name in classes})
        for s in splits
    )
    lines = [*(s.summary(classes) for s in splits), *_in_both(train, test)]
    return Folder(train, test, classes, "\n".join(lines))


def _in_both(train: Files, test: Files) -> list[str]:
    """A line of the test images that look like copies of training images."""
    known = {(file.path, file.size) for file in train.found}
    both = sorted(f.path for f in test.found if (f.path, f.size) in known)
    if not both:
        return []
    return [
        f"{test.root}: {len(both):,} of {len(test):,} images have the path and the size"
        f" of one in {train.root} ({_list(both, 3)}); accuracy on images that were"
        " trained on says nothing"
    ]


class _Split:
    """The files of a split by class, and what else lies there.

    Attributes:
        by_class: sorted by class and path.
        ignored: names by reason.
        places: names of classes by the folder that they stand for.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.ignored = collections.defaultdict[str, list[str]](list)
        self.places: dict[str, str] = {}
        self._missing: list[str] = []
        self._unread: list[str] = []
        self.by_class = {
            entry.name: sorted(
                found
                for path, file in self._walk(entry.path, entry.name, ())
                if (found := self._take(path, file))
            )
            for entry in self._class_folders()
        }
        _refuse(root, self._missing, "links to files that are not there")
        _refuse(
            root,
            self._unread,
            "pictures of formats that are not read (save them as PNG or JPEG, or take"
            " them away)",
        )

    def _class_folders(self) -> Iterator[os.DirEntry]:
        for entry in sorted(os.scandir(self.root), key=lambda entry: entry.name):
            if is_hidden(entry.name):
                self.ignored[_HIDDEN].append(entry.name)
            elif not entry.is_dir():
                self.ignored["in no class's folder"].append(entry.name)
            else:
                first = self.places.setdefault(os.path.realpath(entry.path), entry.name)
                if first != entry.name:
                    raise ValueError(
                        f"the classes {first!r} and {entry.name!r} of {self.root} are"
                        " one and the same folder, by a link."
                    )
                yield entry

    def _take(self, path: str, file: os.DirEntry) -> Found | None:
        """Returns the file if it is an image, or notes why not."""
        end = suffix(file.name)
        if not file.is_file():
            if os.path.exists(file.path):
                self.ignored["a pipe, socket or device"].append(path)
            else:
                self._missing.append(path)
        elif end in IMAGES or (end not in RAW and is_image(pathlib.Path(file.path))):
            stat = file.stat()
            return Found(path, stat.st_size, stat.st_mtime_ns)
        elif end in RAW | UNREAD or _is_unread(file.path):
            self._unread.append(path)
        else:
            self.ignored["no image"].append(path)
        return None

    def _walk(
        self, folder: str, path: str, above: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[str, os.DirEntry]]:
        """Yields everything in a folder and below that is no folder, with its path
        within the split; follows links, but not in a circle."""
        stat = os.stat(folder)
        here = stat.st_dev, stat.st_ino
        if here in above:
            self.ignored["a link to a folder that it lies in"].append(path)
            return
        for entry in os.scandir(folder):
            inner = f"{path}/{entry.name}"
            if is_hidden(entry.name):
                self.ignored[_HIDDEN].append(inner)
            elif entry.is_dir():
                yield from self._walk(entry.path, inner, (*above, here))
            else:
                yield inner, entry

    def summary(self, classes: Sequence[str]) -> str:
        """A line of what was taken, and one of what was ignored."""
        counts = {name: len(self.by_class.get(name, ())) for name in classes}
        if len(counts) <= SHOWN:
            each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        else:
            each = f"{min(counts.values()):,} to {max(counts.values()):,} each"
        lines = [
            f"{self.root}: {sum(counts.values()):,} images of {len(counts)} classes"
            f" ({each})"
        ]
        if empty := [name for name, count in counts.items() if not count]:
            lines.append(
                f"{self.root}: NO images of {_list(empty)}; accuracy does not say how"
                " well they are told"
            )
        return "\n".join(lines) + self.not_taken()

    def not_taken(self) -> str:
        """A line of what was ignored, or ""."""
        if not self.ignored:
            return ""
        parts = [
            f"{len(names):,} {reason} ({_list(_kinds(names), 3)})"
            for reason, names in sorted(self.ignored.items())
        ]
        return f"\n{self.root}: ignored {'; '.join(parts)}"


def _is_unread(path: str) -> bool:
    with open(path, "rb") as file:
        return bool(unread_format(file.read(32)))


def _check_classes(train: _Split, test: _Split) -> None:
    """Refuses classes that cannot be meant."""
    for split in (train, test):
        if not split.by_class:
            raise FileNotFoundError(
                f"no folders in {split.root}; expected one for each class, with its"
                " images."
            )
        _refuse(
            split.root,
            [*map(ascii, filter(unprintable, split.by_class))],
            "classes whose names have control characters or are not UTF-8",
        )
        _refuse(
            split.root,
            [f"{a!a} and {b!a}" for a, b in alike(split.by_class)],
            "classes whose names differ in case, spaces or the form of their letters"
            " alone",
        )
    _refuse(
        test.root,
        [test.places[place] for place in test.places.keys() & train.places.keys()],
        f"classes whose folders are those of {train.root}, by a link,",
    )
    known = {plain(name): name for name in train.by_class}
    new = sorted(test.by_class.keys() - train.by_class.keys())
    if new:
        looks = [
            f"{name!a} for {known[plain(name)]!a}"
            for name in new
            if plain(name) in known
        ]
        hint = f" Written otherwise: {_list(looks)}." if looks else ""
        raise ValueError(
            f"classes in {test.root} that are not in {train.root}: {_list(new)}.{hint}"
        )
    for split in (train, test):
        if not any(split.by_class.values()):
            raise FileNotFoundError(
                f"no images in the folders of {split.root}; expected files of JPEG,"
                f" PNG or the like.{split.not_taken()}"
            )
    _refuse(
        train.root,
        [name for name, files in train.by_class.items() if not files],
        "classes without images",
        train.not_taken(),
    )
    if len(train.by_class) == 1:
        raise ValueError(
            f"{train.root} has one class, {_list(train.by_class)}; expected two or"
            " more, each a folder with its images."
        )


def _refuse(
    root: pathlib.Path, names: Sequence[str], what: str, more: str = ""
) -> None:
    if names:
        raise ValueError(f"{what} in {root}: {_list(sorted(names))}.{more}")


def _list(names: Iterable[str], shown: int = SHOWN) -> str:
    """The first few names, and how many there are if there are more."""
    names = list(names)
    rest = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _kinds(names: Sequence[str]) -> list[str]:
    """The suffixes of names and how often each comes; whole names without one."""
    last = (os.path.basename(name) for name in names)
    counts = collections.Counter(suffix(name) or name for name in last)
    return [f"{kind} {count}" for kind, count in counts.most_common()]
