import pytest

from tests.train.data.pictures import put


@pytest.fixture
def root(tmp_path):
    """A set of two classes, of two images each to train and one to test."""
    for place in ("train/cat/1", "train/cat/2", "train/dog/1", "train/dog/2"):
        put(tmp_path / f"{place}.png")
    for place in ("val/cat/9", "val/dog/9"):
        put(tmp_path / f"{place}.png")
    return tmp_path
