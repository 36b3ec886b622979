"""The flags of several processes are checked before anything is connected."""

import pytest
from absl import flags
from absl.testing import flagsaver

from train.engine import processes


@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(coordinator="h:abc", num_processes=2, process_id=0),
            "expected HOST:PORT",
        ),
        (dict(coordinator="foo", num_processes=2, process_id=0), "expected HOST:PORT"),
        (dict(coordinator="h:1", num_processes=2, process_id=2), "are 0 to 1"),
        (dict(coordinator="h:1", num_processes=2, process_id=-1), "are 0 to 1"),
        (dict(coordinator="h:1", num_processes=0, process_id=0), "expected 1 or more"),
        (dict(coordinator="auto", num_processes=2), "go together"),
        (dict(process_id=1), "go together"),
        (dict(coordinator_bind="h:1"), "go together"),
        (
            dict(coordinator="h:1", num_processes=2, process_id=0)
            | dict(coordinator_bind="h:2"),
            "port 2, --coordinator 1",
        ),
    ],
)
def test_flags_that_do_not_fit(given, message):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with (
        flagsaver.flagsaver(**given),
        pytest.raises(ValueError, match=message),
        processes.joined(),
    ):
        pass
