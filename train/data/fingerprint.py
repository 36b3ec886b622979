"""What a run was trained on, in a few numbers, to be known again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.data.batches import Split, Standardize
from train.data.digest import sha256
from train.data.encoded import Encoded
from train.data.files import Files
from train.data.folders import SHOWN
from train.data.objects import ObjectData
from train.data.pairs import Pairs
from train.data.segment_sets import SegmentData
from train.data.sets import Dataset

#: that statistics may differ by and still be of the same images, on another machine
TOLERANCE = 1e-4


def fingerprint(
    name: str, dataset: Dataset | SegmentData, standardize: Standardize
) -> dict[str, Any]:
    """Describes the data of a run, as JSON can hold it.

    It does not depend on where the data lies. Of images in memory it has a hash, of
    files one of their paths in their folder and sizes, of sets of TFDS the version.

    Args:
        name: of the data set, as of `load_dataset`.
        dataset: all of it.
        standardize: of the run.
    """
    train, test = (
        _describe(split, dataset.num_classes) for split in (dataset.train, dataset.test)
    )
    return {"version": dataset.version} | _fingerprint(
        name, dataset.classes, train, test, dataset.test_name, standardize
    )


def fingerprint_objects(
    name: str, data: ObjectData[Any], standardize: Standardize
) -> dict[str, Any]:
    """Describes the data of a run on images with objects; see `fingerprint`."""
    train, test = (split.describe() for split in (data.train, data.test))
    return {"version": ""} | _fingerprint(
        name, data.categories.names, train, test, data.test_name, standardize
    )


def _fingerprint(
    name: str,
    classes: Sequence[str],
    train: dict[str, Any],
    test: dict[str, Any],
    test_name: str,
    standardize: Standardize,
) -> dict[str, Any]:
    return {
        "dataset": name,
        "classes": list(classes),
        "train": train,
        "test": {"name": test_name} | test,
        "standardize": {
            key: _per_channel(value) for key, value in standardize._asdict().items()
        },
    }


def _describe(
    split: Split[np.ndarray] | Encoded | Pairs, num_classes: int
) -> dict[str, Any]:
    if isinstance(split, Pairs):
        return split.describe()
    described: dict[str, Any] = {
        "images": split.examples,
        "shape": list(split.image_shape),
        "dtype": "uint8",
    }
    if isinstance(split, Split):
        labels = split.labels
        described |= {"dtype": str(split.images.dtype), "sha256": sha256(split)}
    elif isinstance(split.source, Files):
        labels = split.source.labels
        paths = sorted(f"{f.path}\0{f.size}" for f in split.source.found)
        text = "\n".join(paths).encode(errors="surrogateescape")
        described["sha256"] = hashlib.sha256(text).hexdigest()
    else:
        return described
    if labels.ndim == 1:  # and not one of each pixel
        counts = np.bincount(labels, minlength=num_classes)
        described["by_class"] = counts.tolist()
    return described


def _per_channel(value: np.ndarray) -> list[float]:
    """Of a mean image the mean of each channel."""
    value = np.asarray(value, np.float64)
    return np.atleast_1d(value.mean(axis=tuple(range(max(0, value.ndim - 1))))).tolist()


def check_same(kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses data other than that of the run.

    Args:
        kept: the `fingerprint` of the run.
        now: of the data that is there now.

    Raises:
        ValueError: they differ; the message says in what.
    """
    if differences := compare(kept, now):
        raise ValueError(
            f"the data is not what the run was trained on: {'; '.join(differences)}."
            " Put it back as it was, pass the --data_dir that has it, or train anew"
            " in another --workdir."
        )


def compare(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns in what two fingerprints differ, in words; empty if in nothing."""
    if _form(kept) != _form(now):
        return ["its description is damaged or of another version"]
    found = [
        f"{what} was {kept.get(key)!r}, is {now[key]!r}"
        for key, what in (("dataset", "the data set"), ("version", "its version"))
        if kept.get(key) != now[key]
    ]
    found += _classes(kept["classes"], now["classes"])
    same_classes = not found
    for split in ("train", "test"):
        found += _split(split, kept[split], now[split], now["classes"], same_classes)
    if not found:
        found = [
            f"the {key} that images are standardised by was {_short(old)}, is"
            f" {_short(new)}"
            for key, new in now["standardize"].items()
            if not _close(old := kept["standardize"][key], new)
        ]
    return found


def _form(described: Any) -> Any:
    """The keys that every fingerprint has, and the types of their values."""
    if not isinstance(described, Mapping):
        return type(described)
    always = described.keys() - {"by_class", "sha256"}
    return {key: _form(described[key]) for key in always}


def _classes(kept: Sequence[str], now: Sequence[str]) -> list[str]:
    if kept == now:
        return []
    gone, new = ([n for n in a if n not in b] for a, b in ((kept, now), (now, kept)))
    if len(kept) != len(now):
        found = [f"there were {len(kept)} classes, there are {len(now)}"]
        found += [f"{_names(gone)} left"] if gone else []
        return found + ([f"{_names(new)} came"] if new else [])
    changed = [
        f"class {i} was {old!r}, is {new!r}"
        for i, (old, new) in enumerate(zip(kept, now))
        if old != new
    ]
    return _first(changed)


def _split(
    split: str,
    kept: Mapping[str, Any],
    now: Mapping[str, Any],
    classes: Sequence[str],
    same_classes: bool,
) -> list[str]:
    found = []
    if kept["images"] != now["images"]:
        found.append(f"{split} had {kept['images']:,} images, has {now['images']:,}")
    if same_classes and kept.get("by_class") != now.get("by_class"):
        pairs = zip(classes, kept.get("by_class", ()), now.get("by_class", ()))
        found += _first(
            [
                f"{split} had {old:,} of {name!r}, has {new:,}"
                for name, old, new in pairs
                if old != new
            ]
        )
    for key in ("name", "shape", "dtype"):
        if kept.get(key) != now.get(key):
            found.append(f"{key} of {split} was {kept.get(key)}, is {now.get(key)}")
    if same_classes and not found and kept.get("sha256") != now.get("sha256"):
        found.append(
            f"{split} has as many images, but others: their names, sizes or pixels"
            " differ"
        )
    return found


def _close(kept: Sequence[float], now: Sequence[float]) -> bool:
    return len(kept) == len(now) and np.allclose(kept, now, TOLERANCE, TOLERANCE)


def _short(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _names(names: Sequence[str]) -> str:
    return ", ".join(_first([repr(name) for name in names]))


def _first(items: list[str]) -> list[str]:
    """The first few, and how many more there are."""
    more = len(items) - SHOWN
    return items[:SHOWN] + ([f"and {more:,} more"] if more > 0 else [])
