"""Runs that a command makes one after the other."""

import pytest

from tests.train.common import tiny_config
from train.engine import workdir as wd
from train.studies.runs import Job, run_all


def test_one_that_diverges_leaves_the_others(tmp_path):
    keys = dict(epochs=1, train_examples=16)
    configs = [tiny_config(learning_rate=rate, **keys) for rate in (1e38, 0.1)]
    jobs = [Job(c, n, tmp_path / n) for c, n in zip(configs, "ab")]
    lost, kept = run_all(jobs, None)
    assert lost.diverged and not kept.diverged
    assert lost.row()["learning_rate"] == 1e38
    assert kept.row()["test_moving_accuracy"] > 0
    assert not (tmp_path / "a/summary.json").exists()


def test_another_run_is_seen_before_any_is_made(tmp_path):
    (tmp_path / "b").mkdir()
    wd.claim(tmp_path / "b", tiny_config(seed=5))
    jobs = [Job(tiny_config(seed=seed), n, tmp_path / n) for seed, n in enumerate("ab")]
    with pytest.raises(ValueError, match="b holds a run of another config:\n  seed: 5"):
        run_all(jobs, None)
    assert not (tmp_path / "a").exists()


def test_a_run_counts_once(tmp_path):
    jobs = [Job(tiny_config(), name, tmp_path / "a") for name in ("a", "b")]
    with pytest.raises(ValueError, match="a would be the directory of two runs"):
        run_all(jobs, None)
    assert not (tmp_path / "a").exists()
