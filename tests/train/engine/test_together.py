"""Runs in one program: each comes to what it comes to by itself."""

import chex
import jax
import numpy as np
import pytest

from tests.train.common import tiny_config
from tests.train.engine.test_loop import last_state
from train.engine import loop, together
from train.engine import workdir as wd
from train.studies.runs import Job, run_all

FREE = ((0, 0.1), (1, 0.1), (1, 0.05))  # seed, learning rate
NAMES = ("a", "b", "c")


def members(**overrides):
    common = dict(crop_padding=1, flip=True) | overrides
    return [tiny_config(seed=s, learning_rate=rate, **common) for s, rate in FREE]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    workdirs = [folder / name for name in NAMES]
    assert not together.train_together(members(), workdirs, at_once=3)
    return workdirs


def test_each_run_is_as_by_itself(trained, tmp_path):
    for config, workdir, name in zip(members(), trained, NAMES):
        alone = loop.train(config, tmp_path / name)
        there = loop.train(config, workdir)  # finished: its summary is read
        assert there.keys() == alone.keys()
        for key in ("seed", "learning_rate", "steps", "parameters", "train_images"):
            assert there[key] == alone[key]
        logs = [wd.read_metrics(d) for d in (workdir, tmp_path / name)]
        times = {"seconds", "images_per_second", "data_wait", "memory_bytes"}
        ours, theirs = ([{**line} for line in log] for log in logs)
        for line in ours + theirs:
            for key in times & line.keys():
                del line[key]
        chex.assert_trees_all_close(ours, theirs, rtol=2e-3, atol=2e-3)
        states = [last_state(d, config) for d in (workdir, tmp_path / name)]
        chex.assert_trees_all_close(*(s.params for s in states), atol=1e-3)


def test_runs_differ(trained):
    """No two of the seed and the rate come to the same."""
    losses = [wd.read_metrics(d)[0]["train_loss"] for d in trained]
    assert len(set(losses)) == 3


def test_resume_equals_no_interruption(trained, tmp_path, monkeypatch):
    """But for rounding, where a kill between two checkpoints left one run behind: it
    catches up in a program of its own."""
    workdirs = [tmp_path / name for name in NAMES]
    make_batch = together.make_batch

    def interrupted(*args):
        batch = make_batch(*args)

        def at(step):
            if step == 13:  # between the checkpoints of steps 8 and 16
                raise KeyboardInterrupt
            return batch(step)

        return at

    with monkeypatch.context() as patch:
        patch.setattr(together, "make_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            together.train_together(members(), workdirs, at_once=3)
    assert [wd.read_metrics(d)[-1]["step"] for d in workdirs] == [12] * 3
    with wd.open_checkpoints(workdirs[0]) as checkpoints:
        checkpoints.delete(8)
    assert not together.train_together(members(), workdirs, at_once=3)
    for config, workdir, straight in zip(members(), workdirs, trained):
        states = [last_state(d, config) for d in (workdir, straight)]
        assert states[0].step == states[1].step
        chex.assert_trees_all_close(*(s.params for s in states), atol=1e-6)


def test_one_that_diverges_leaves_the_others(tmp_path):
    configs = [tiny_config(learning_rate=rate) for rate in (1e38, 0.1)]
    jobs = [Job(c, n, tmp_path / n) for c, n in zip(configs, NAMES)]
    lost, kept = run_all(jobs, None, at_once=2)
    assert lost.diverged and not kept.diverged
    assert lost.row()["learning_rate"] == 1e38
    assert kept.row()["test_moving_accuracy"] > 0
    assert not (tmp_path / "a/summary.json").exists()
    state = last_state(tmp_path / "b", configs[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_all_that_diverge(tmp_path):
    configs = [tiny_config(learning_rate=1e38, seed=s) for s in (0, 1)]
    workdirs = [tmp_path / "a", tmp_path / "b"]
    errors = together.train_together(configs, workdirs, at_once=2)
    assert list(errors) == workdirs
    assert all("training stopped at step" in str(e) for e in errors.values())


def test_what_is_alike_trains_together(tmp_path, monkeypatch):
    """Two normalisers, two seeds each: two programs."""
    seen = []

    def train(configs, workdirs, data_dir, at_once):
        seen.append([(c.norm, c.seed) for c in configs])
        return {d: loop.NonFiniteError("lost") for d in workdirs}

    monkeypatch.setattr("train.studies.runs.train_together", train)
    jobs = [
        Job(tiny_config(norm=norm, seed=seed), norm, tmp_path / f"{norm}{seed}")
        for seed in (0, 1)
        for norm in ("batch", "group")
    ]
    runs = run_all(jobs, None, at_once=2)
    assert seen == [[("batch", 0), ("batch", 1)], [("group", 0), ("group", 1)]]
    assert [r.summary["variant"] for r in runs] == ["batch", "group"] * 2


@pytest.mark.parametrize("at_once", [None, 2])
def test_another_run_is_seen_before_any_is_made(tmp_path, at_once):
    (tmp_path / "b").mkdir()
    wd.claim(tmp_path / "b", tiny_config(seed=5))
    jobs = [Job(tiny_config(seed=seed), n, tmp_path / n) for seed, n in enumerate("ab")]
    with pytest.raises(ValueError, match="b holds a run of another config:\n  seed: 5"):
        run_all(jobs, None, at_once)
    assert not (tmp_path / "a").exists()


def test_a_run_counts_once(tmp_path):
    jobs = [Job(tiny_config(), name, tmp_path / "a") for name in ("a", "b")]
    with pytest.raises(ValueError, match="a would be the directory of two runs"):
        run_all(jobs, None)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "others, message",
    [
        (dict(norm="group"), "may differ in seed and learning_rate alone"),
        (dict(debug_nans=True), "for one run, not for several"),
        (dict(profile_steps=(1, 2)), "for one run, not for several"),
    ],
)
def test_what_cannot_be(tmp_path, others, message):
    first = tiny_config(**{k: v for k, v in others.items() if k != "norm"})
    configs = [first, tiny_config(**others)]
    with pytest.raises(ValueError, match=message):
        together.train_together(configs, [tmp_path / "a", tmp_path / "b"])
    assert not list(tmp_path.iterdir())
