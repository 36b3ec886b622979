"""`train.evaluate` with statistics other than those of options A and B."""

import re

import jax
import numpy as np
import pytest

from tests.reference.slow import few_quick
from tests.train.command import run
from tests.train.common import batch, build, tiny_config
from train.analysis import inference_statistics as inference
from train.data.batches import epoch_order
from train.engine.classification import Classification
from train.engine.loop import train
from train.engine.step import TrainState

LINE = re.compile(r"^ *(\d+\.\d\d)%  +\d+\.\d\d%  +(\d+\.\d{4})  (.*)$", re.MULTILINE)


def test_table_of_every_kind(tmp_path):
    train(tiny_config(epochs=1), tmp_path)
    out = run(
        "train.evaluate",
        f"--workdir={tmp_path}",
        "--precise_batches=3",
        "--example_weight=0",
        "--split=train",
    )
    assert "step 8, 64 train images" in out
    plain, batch, weighed, precise, both = LINE.findall(out)
    assert plain[2] == "A, moving statistics"
    assert batch[2] == "B, micro-batch statistics"
    assert precise[2] == "A, precise statistics of 3 training batches"
    assert weighed[2] == plain[2] + ", image's own at weight 0"
    assert both[2] == precise[2] + ", image's own at weight 0"
    assert weighed[:2] == plain[:2] != precise[:2] == both[:2]


@pytest.mark.parametrize("sort_batches", few_quick([False, True], [True]))
def test_precise_statistics_are_those_of_the_first_training_batches(sort_batches):
    """With a rate of 0 training sees the same; its averages then say what it saw."""
    config = tiny_config(
        learning_rate=0.0, crop_padding=1, flip=True, sort_batches=sort_batches
    )
    experiment = build(config)
    precise = inference.recompute(config, experiment, experiment.state, 10)
    old = np.array(experiment.state.batch_stats["final_norm"]["mean"])
    means, state = [], experiment.state
    for step in range(10):  # 8 a epoch
        order = epoch_order(config.seed, step // 8, 64)
        index = order[step % 8 * 8 :][:8]
        if sort_batches:
            labels = np.asarray(experiment.task.train.labels)
            index = np.array(sorted(index, key=lambda i: labels[i]))
        state, _ = experiment.train_step(state, batch(experiment, index))
        new = np.array(state.batch_stats["final_norm"]["mean"])
        means.append((new - 0.9 * old) / 0.1)
        old = new
    got = precise.batch_stats["final_norm"]["mean"]
    np.testing.assert_allclose(got, np.mean(means, 0), rtol=1e-4, atol=1e-5)
    assert isinstance(precise, TrainState)


def test_weight_is_chosen_by_the_loss_on_training_images(monkeypatch):
    experiment = build(tiny_config())
    asked = []

    def made(self, state, split, weight):
        asked.append(split)
        return {"weighed_loss": (weight - 0.21) ** 2, "weighed_accuracy": -weight}

    monkeypatch.setattr(Classification, "evaluate", made)
    assert inference.choose_weight(experiment, experiment.state) == 0.2
    for split in asked:
        np.testing.assert_array_equal(split.images, experiment.task.train.images)


def test_weighed_evaluation_counts_every_image_once():
    experiment = build(tiny_config(eval_batch_size=10))
    split = experiment.task.test.take(23)
    plain = experiment.task.evaluate(experiment.state, split)
    weighed = experiment.task.evaluate(experiment.state, split, 0.0)
    names = ("loss", "accuracy", "top5_accuracy")
    assert set(weighed) == {f"weighed_{name}" for name in names}
    for name in names:
        value = weighed[f"weighed_{name}"]
        np.testing.assert_allclose(value, plain[f"moving_{name}"], rtol=1e-5)
    other = experiment.task.evaluate(experiment.state, split, 0.5)
    assert jax.tree.leaves(other) != jax.tree.leaves(weighed)


@pytest.mark.parametrize("weight", ["much", "1.5", "-0.1", "nan", ""])
def test_bad_weight(weight):
    with pytest.raises(ValueError, match=f"example_weight is '{weight}'; expected"):
        inference.parse_weight(weight)


def test_bad_flags_end_in_a_clear_line(tmp_path):
    out = run("train.evaluate", "--workdir=w", "--example_weight=2", status=1)
    assert out.strip() == (
        "error: example_weight is '2'; expected a number from 0 to 1, or auto."
    )
    out = run("train.evaluate", "--workdir=w", "--precise_batches=0", status=1)
    assert "flag --precise_batches=0" in out and "Traceback" not in out
    train(tiny_config(epochs=1, norm="group"), tmp_path)
    out = run(
        "train.evaluate", f"--workdir={tmp_path}", "--example_weight=auto", status=1
    )
    assert "error: normaliser 'group' keeps no moving mean and variance" in out
    assert "Traceback" not in out
