"""The measure of how well the filter knows the statistics."""

import csv
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kalman_flax import NETWORKS, KalmanNorm
from tests.reference.slow import few_quick
from tests.train.command import run
from tests.train.commands.test_commands import TINY
from tests.train.common import build, tiny_config
from train.analysis.moments import (
    ERRORS,
    ESTIMATES,
    _Pooled,
    collect,
    errors,
    in_order,
    rows_of,
    summarise,
    variance_gaps,
    watched,
)


def measured(config, size, kept=1000):
    config = watched(config)
    experiment = build(config)
    return experiment, *collect(experiment, config, size, images=0, kept=kept)


def test_pooled_moments_are_those_of_all_values():
    x = 1e4 + np.random.default_rng(0).normal(size=(6, 50, 3))
    pooled = _Pooled()
    for sets in (x[:1], x[1:3], x[3:]):
        pooled.add(sets.mean(1), sets.var(1))
    moments = pooled.moments()
    np.testing.assert_allclose(moments["mean"], x.mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(moments["var"], x.var((0, 1)), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 4])
def test_against_numpy_at_the_stem(size):
    """The first normaliser's input does not depend on any normaliser."""
    config = tiny_config(norm="kalman", norm_options={"gain": 0.25})
    experiment, truth, estimates = measured(config, size)
    images = experiment.task.standardize(experiment.task.train.images)
    kernel = experiment.state.params["stem"]["kernel"]
    x = lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = np.float64(x)
    np.testing.assert_allclose(truth["stem_norm"]["mean"], x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(truth["stem_norm"]["var"], x.var((0, 1, 2)), rtol=1e-4)
    observed, predicted, filtered = (
        estimates[kind]["stem_norm"] for kind in ("observed", "predicted", "filtered")
    )
    assert observed["mean"].shape == (len(x) // size, 4)
    rows = {row["estimate"]: row for row in rows_of(truth, estimates, size)}
    order = np.random.default_rng(config.seed).permutation(len(x))
    means = x[order].reshape(-1, size * 64, 4).mean(1)
    np.testing.assert_allclose(observed["mean"], means, atol=1e-5)
    stem = next(row for row in rows_of(truth, estimates, size) if row["depth"] == 0)
    deviation = (means - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    assert stem["estimate"] == "observed" and stem["layer"] == "stem_norm"
    np.testing.assert_allclose(
        stem["mean_error"], np.sqrt(np.mean(deviation**2)), rtol=1e-3
    )
    mixed = 0.75 * predicted["mean"] + 0.25 * observed["mean"]
    np.testing.assert_allclose(filtered["mean"], mixed, atol=1e-5)
    assert set(rows) == set(ESTIMATES)


def test_batch_norm_is_watched_as_the_filter_with_gain_1():
    _, truth, estimates = measured(tiny_config(norm="batch"), 2)
    jax.tree.map(
        np.testing.assert_array_equal, estimates["filtered"], estimates["observed"]
    )
    assert set(estimates["predicted"]) == set(truth)
    assert watched(tiny_config(norm="batch_wc")).norm == "kalman_wc"
    for name in ("group", "group_kalman", "batch_renorm"):
        with pytest.raises(ValueError, match=f"'{name}' does not filter"):
            watched(tiny_config(norm=name))


@pytest.mark.parametrize(
    "name",
    few_quick(["resnet110", "resnet50", "inception_v2"], ["resnet50", "inception_v2"]),
)
def test_layers_from_bottom_to_top(name):
    """In the order in which they are called; of parallel branches by name."""
    network, called = NETWORKS[name](num_classes=10), []

    def note(call, args, kwargs, context):
        if isinstance(context.module, KalmanNorm) and context.method_name == "filter":
            called.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(
            lambda: network.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), True)
        )

    def blocks(layers):
        return [layer.rpartition("/")[0] for layer in layers]

    assert len(called) == len(set(called)) > 50
    assert blocks(in_order(sorted(called))) == blocks(called)


def test_factor_of_all_channels_is_no_relative_error():
    truth = {"mean": np.zeros(2), "var": np.array([1.0, 4.0])}
    found = errors({"mean": np.ones(2), "var": np.array([[3.0, 12.0]])}, truth)
    np.testing.assert_allclose(found["mean_error"], [1.0, 0.5], rtol=1e-5)
    np.testing.assert_allclose(found["variance_error"], [[np.log(3)] * 2], rtol=1e-5)
    np.testing.assert_allclose(found["relative_error"], [[0.0] * 2], atol=1e-5)


def test_summary_weighs_channels_alike():
    rows = [
        {
            "micro_batch_size": 2,
            "estimate": kind,
            "channels": channels,
            **dict.fromkeys(ERRORS, error),
        }
        for kind in ESTIMATES
        for channels, error in ((1, 2.0), (3, 0.0))
    ]
    for line in summarise(rows):
        assert [line[name] for name in ERRORS] == [1.0] * len(ERRORS)


def test_gaps_to_the_moving_variance():
    maps = {
        "filtered": {"final_norm": {"var": np.array([[1.0, 4.0], [3.0, 5.0]])}},
        "moving": {"final_norm": {"var": np.array([[2.0, 5.0]])}},
    }
    for kind in maps:
        maps[kind]["stem_norm"] = {"var": np.ones((1, 2))}
    gaps = variance_gaps(maps, "filtered")
    assert list(gaps) == ["stem_norm", "final_norm"]
    np.testing.assert_allclose(gaps["final_norm"], [[0.5, 0.2], [0.5, 0.0]])


def test_command(tmp_path):
    learned = ("learn_gain=channel", "gain=0.3")
    learned = [f"--config.norm_options.{option}" for option in learned]
    run("train", *TINY, *learned, f"--workdir={tmp_path}")
    sizes = "--micro_batch_sizes=1,4"
    out = run("train.statistics", f"--workdir={tmp_path}", sizes)
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in table[2:]] == ["1", "4"]
    with (tmp_path / "statistics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * len(ESTIMATES)  # sizes, normalisers
    assert [r["layer"] for r in rows[:: len(ESTIMATES)][:3]][-1] == "final_norm"
    content = json.loads((tmp_path / "statistics.json").read_text())
    assert len(content["summary"]) == 2 * len(ESTIMATES)
    for figure in ("statistics.png", "gains.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    median = re.search(r"learned gains: median (\S+),", out).group(1)
    assert 0.29 < float(median) < 0.31  # a few updates from 0.3
    out = run("train.statistics", f"--workdir={tmp_path}", "--images=1", status=1)
    assert "error: 1 images" in out
