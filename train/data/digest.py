"""Hashes of arrays, to know them again by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def octets(array: np.ndarray) -> memoryview:
    """Returns the bytes of an array of any dtype, row by row."""
    return np.ascontiguousarray(array).view(np.uint8).data


def sha256(arrays: Iterable[np.ndarray]) -> str:
    """Returns the SHA-256 of arrays, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(octets(array))
    return digest.hexdigest()
