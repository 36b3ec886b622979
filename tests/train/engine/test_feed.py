"""Reading ahead: the same batches by threads, processes, devices and after a stop."""

import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.train.common import tiny_config
from tests.train.tfds_data import picture
from train.data.encoded import Encoded
from train.data.sets import Dataset
from train.engine.classification import Classification
from train.engine.experiment import make_batch
from train.engine.feed import Ahead, read_ahead
from train.engine.mesh import local_rows, make_mesh

EXAMPLES = 21
CONFIG = tiny_config(batch_size=8, dataset="imagenet2012")


def batches(config, mesh, split):
    dataset = Dataset(split, split, EXAMPLES)
    return make_batch(config, mesh, Classification(config, mesh, dataset, None, None))


@pytest.fixture(scope="module")
def split():
    source = [(picture(i, 40 + i, 50, "jpeg"), i, str(i)) for i in range(EXAMPLES)]
    return Encoded(source, 16, EXAMPLES)


@pytest.fixture(scope="module")
def straight(split):
    """The batches of three epochs of two steps, on one device, from the first on."""
    batch = batches(CONFIG, make_mesh(1), split)
    return [jax.device_get(batch(step)) for step in range(6)]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_batches_are_those_that_were_asked_for(split, straight):
    labels = np.array([batch.labels for batch in straight]).reshape(3, 16)
    assert all(len(set(epoch)) == 16 for epoch in labels.tolist())
    assert np.any(labels[0] != labels[1])
    example = labels[2, 9]  # in the second batch of the last epoch
    [image] = split.read(np.array([example]), key=(CONFIG.seed, 2)).images
    np.testing.assert_array_equal(straight[5].images[1], image)


def test_going_on_in_the_middle_on_other_devices(split, straight):
    batch = batches(CONFIG, make_mesh(8), split)
    found = [batch(step) for step in (3, 4, 5)]
    assert found[0].images.sharding.num_devices == 8
    assert_same(jax.device_get(found), straight[3:])
    assert_same(jax.device_get([batch(1)]), straight[1:2])  # back again


def test_processes_that_decode_change_nothing(split, straight):
    config = CONFIG.copy_and_resolve_references()
    config.data_workers = 2
    batch = batches(config, make_mesh(2), split)
    assert_same(jax.device_get([batch(step) for step in (2, 3, 4)]), straight[2:5])


#: a trainer that has a worker read, and then stands still
TRAINER = """
import sys
import numpy as np
from train.data.batches import Split
from train.engine.feed import read_ahead

read = lambda step, rows: Split(rows, rows)
batches = read_ahead(read, np.arange(1), step=0, workers=1)
next(batches)
print("read", flush=True)
sys.stdin.read()
"""


def test_processes_that_decode_end_with_a_trainer_that_is_killed():
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", TRAINER]
    trainer = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert trainer.stdout.readline() == "read\n"
    trainer.kill()
    trainer.communicate(timeout=30)  # until the last that could write there has ended


def test_a_process_reads_its_own_rows_alone(split, straight):
    """As two processes, the first with the first and last quarter of the rows."""
    mesh = make_mesh(8)
    assert local_rows(mesh, 16).all()
    for rows in (np.array([0, 1, 6, 7]), np.array([2, 3, 4, 5])):
        seen = []

        def read(step, rows):
            seen.extend(rows.tolist())  # noqa: B023
            return type(straight[0])(*(a[rows] for a in straight[step]))

        ahead = read_ahead(read, rows, 4, workers=0)
        for step in (4, 5):
            np.testing.assert_array_equal(
                next(ahead).labels, straight[step].labels[rows]
            )
        assert set(seen) == set(rows.tolist())


def test_ahead_gives_batches_in_turn_and_times_the_wait():
    def slow(step):
        time.sleep(0.1)
        return step

    with Ahead(slow, range(3, 7)) as batches:
        assert [batches.next([]) for _ in range(4)] == [3, 4, 5, 6]
        assert 0.5 < batches.waited() <= 1
        assert batches.waited() == 0
    with Ahead(slow, range(1000)) as batches:
        time.sleep(0.25)
        batches.waited()
        assert (batches.next([]), batches.waited()) == (0, 0)


def test_an_error_while_reading_is_the_trainers():
    def broken(step):
        raise ValueError("image 7 cannot be decoded")

    with (
        pytest.raises(ValueError, match="image 7"),
        Ahead(broken, range(3)) as batches,
    ):
        batches.next([])
