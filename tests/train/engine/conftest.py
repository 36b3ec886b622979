import pytest

from tests.train import common
from train.engine import loop


@pytest.fixture(scope="module")
def built_once():
    """Runs of one config share what is built and compiled, as far as they are in this
    process; test_interruption.py has runs that share nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", common.build)
        yield
