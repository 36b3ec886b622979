"""What `make test` leaves to `make test-all`: all that is above some seconds and has a
quicker test of its kind beside it."""

from collections.abc import Iterable

import pytest


def few_quick(
    names: Iterable[object], quick: Iterable[object] = ("kalman", "batch", "group")
):
    """Parameters of a test of all normalisers, of which `make test` takes the few that
    stand for the kinds: the filter, the micro-batch, each image."""
    return [
        pytest.param(name, marks=() if name in quick else pytest.mark.slow)
        for name in names
    ]
