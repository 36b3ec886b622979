"""Configs, schedules, the optimiser, and what a bad config says."""

import importlib
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from configs import base
from kalman_flax import NETWORKS, KalmanNorm
from tests.train.common import batch, tiny_config
from train.engine.classification import make_network
from train.engine.experiment import build
from train.engine.optimizer import make_optimizer
from train.engine.schedule import make_schedule

#: those of other tasks are tried in test_segmentation.py and test_detection.py
CONFIGS = sorted(
    name
    for path in pathlib.Path("configs").rglob("[!_]*.py")
    if (name := ".".join(path.with_suffix("").parts)) != "configs.schema"
    if importlib.import_module(name).get_config().task == "classification"
)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_makes_a_network(name):
    config = importlib.import_module(name).get_config()
    assert set(config) == set(base.get_config())
    assert config.batch_size % config.micro_batch_size == 0
    network = make_network(config, 10)
    size = 8 if config.dataset == "digits" else 32
    shapes = jax.eval_shape(
        lambda: network.init(
            jax.random.key(0), np.zeros((2, size, size, 3)), use_running_average=True
        )
    )
    kernels = [
        path
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes["params"])
        if path[-1].key == "kernel"
    ]
    sizes = {
        "cifar_resnet": 6 * config.blocks_per_stage + 2,
        "resnet14": 18,
        "resnet50": 54,
    }
    assert len(kernels) == sizes[config.network]


@pytest.mark.parametrize("name", NETWORKS)
def test_network_by_name(name):
    network = make_network(tiny_config(network=name, width=0), 10)
    expected = NETWORKS[name](num_classes=10)
    assert type(network) is type(expected)
    sizes = "blocks_per_stage", "stage_sizes", "width"
    if name in ("cifar_resnet", "cifar_resnet_v1", "nf_resnet"):  # sized by the config
        expected = expected.clone(blocks_per_stage=1)
    if name != "small_inception":
        network = make_network(tiny_config(network=name, width=4), 10)
        expected = expected.clone(width=4)
    assert [getattr(network, size, None) for size in sizes] == [
        getattr(expected, size, None) for size in sizes
    ]


def test_released_schedule():
    config = importlib.import_module(
        "configs.experiments.cifar10_released"
    ).get_config()
    schedule = make_schedule(config, steps_per_epoch=390)
    epochs = np.array([0, 81.9, 82.1, 122.9, 123.1, 299.9, 300.1, 399.9])
    rates = [float(schedule(int(epoch * 390))) for epoch in epochs]
    expected = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0002, 0.0002]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_warm_up_then_cosine():
    config = tiny_config(epochs=10, warmup_epochs=2, learning_rate=0.5)
    schedule = make_schedule(config, steps_per_epoch=5)
    rates = np.array([float(schedule(step)) for step in range(51)])
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11), rtol=1e-5)
    cosine = 0.25 * (1 + np.cos(np.pi * np.arange(41) / 40))
    np.testing.assert_allclose(rates[10:], cosine, rtol=1e-4, atol=1e-7)


def test_schedule_in_steps():
    """A warm-up from a third, as of Detectron, whose first update is on the way."""
    config = tiny_config(
        epochs=0,
        total_steps=12,
        warmup_steps=4,
        warmup_from=1 / 3,
        schedule="step",
        step_drops=(6, 10),
        step_factors=(0.1, 0.1),
        learning_rate=3.0,
    )
    rates = [float(rate) for rate in build(config).rates]
    expected = [1.5, 2.0, 2.5, 3.0, 3.0, 3.0, *[0.3] * 4, *[0.03] * 2]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_weight_decay_reaches_kernels_only():
    config = tiny_config(weight_decay=0.5, sgd_momentum=0.9)
    optimizer = make_optimizer(config, lambda _: 0.1)
    params = {"conv": {"kernel": 2.0, "bias": 2.0}, "norm": {"scale": 2.0}}
    state = optimizer.init(params)
    zeros = jax.tree.map(np.zeros_like, params)
    for expected in (1.9, 1.9 - 0.1 * (0.95 + 0.9 * 1.0)):
        updates, state = optimizer.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["conv"]["kernel"], expected, rtol=1e-6)
    assert params["conv"]["bias"] == params["norm"]["scale"] == 2.0


def test_long_gradients_are_clipped_before_weight_decay():
    config = tiny_config(weight_decay=0.5, sgd_momentum=0.0, clip_norm=1.0)
    optimizer = make_optimizer(config, lambda _: 0.1)
    params = {"kernel": 2.0, "bias": 2.0}
    state = optimizer.init(params)
    for length, clipped in ((5.0, 1.0), (0.5, 0.5)):
        grads = {"kernel": jnp.array(0.6 * length), "bias": jnp.array(0.8 * length)}
        updates, state = optimizer.update(grads, state, params)
        expected = {"kernel": -0.1 * (0.6 * clipped + 1.0), "bias": -0.08 * clipped}
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_adaptive_clipping_is_by_unit_and_leaves_the_head():
    """Brock et al., 2021, Eq. 3, with their least norm of a unit, 1e-3."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "head": {"kernel": (4, 2)},
    }
    scale = np.float32([1e-5, 0.1, 1.0, 10.0])  # of the units: the first is below 1e-3
    params, grads = (
        jax.tree.map(
            lambda shape: rng.normal(size=shape).astype(np.float32),
            shapes,
            is_leaf=lambda shape: isinstance(shape, tuple),
        )
        for _ in range(2)
    )
    params["conv"]["kernel"] *= scale
    config = tiny_config(
        weight_decay=0.0, sgd_momentum=0.0, clip_adaptive=0.5, clip_norm=1e9
    )
    optimizer = make_optimizer(config, lambda _: 1.0)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)

    expected = jax.tree.map(lambda grad: -grad.astype(np.float64), grads)
    units = [(expected["conv"]["bias"], params["conv"]["bias"])]
    units += [
        (expected["conv"]["kernel"][..., unit], params["conv"]["kernel"][..., unit])
        for unit in range(4)
    ]
    shortened = 0
    for grad, weights in units:
        most = 0.5 * max(np.linalg.norm(weights), 1e-3)
        length = np.linalg.norm(grad)
        shortened += length > most
        grad *= min(1.0, most / length)
    assert 0 < shortened < len(units)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_optimisers_by_name(name):
    """The first two updates of each, by hand."""
    options = {"adamw": {"b1": 0.5}, "sgd": {"nesterov": True}}.get(name, {})
    config = tiny_config(
        optimizer=name, optimizer_options=options, weight_decay=0.1, sgd_momentum=0.9
    )
    optimizer = make_optimizer(config, lambda _: 0.01)
    params = {"kernel": np.float32([3.0, 4.0]), "bias": np.float32([2.0])}
    state = optimizer.init(params)
    given = {"kernel": np.float32([0.6, 0.8]), "bias": np.float32([0.5])}
    moments = {key: (0.0, 0.0) for key in params}
    for step in (1, 2):
        expected = {}
        for key, grad in given.items():
            param, (first, second) = params[key], moments[key]
            decay = 0.1 * param if key == "kernel" else 0.0
            if name == "adamw":
                first, second = (
                    0.5 * first + 0.5 * grad,
                    (0.999 * second + 0.001 * grad**2),
                )
                unbiased = second / (1 - 0.999**step)
                move = first / (1 - 0.5**step) / (np.sqrt(unbiased) + 1e-8) + decay
            elif name == "sgd":
                grad = grad + decay
                first = 0.9 * first + grad
                move = grad + 0.9 * first
            else:
                grad, norm = grad + decay, np.linalg.norm
                if key == "kernel":
                    grad = grad * 0.001 * norm(param) / norm(grad)
                first = move = 0.01 * grad + 0.9 * first
                move = move / 0.01
            moments[key], expected[key] = (first, second), param - 0.01 * move
        updates, state = optimizer.update(given, state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        chex.assert_trees_all_close(params, expected, rtol=1e-5)


def test_frozen_parameters_stay():
    config = tiny_config(freeze=("stem*", "*/norm2/*"), clip_norm=1.0)
    experiment = build(config)
    before = jax.device_get(experiment.state.params)
    given = experiment.state, batch(experiment)
    state, _ = experiment.train_step(*given)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.params)
    for path, changed in traverse_util.flatten_dict(moved, sep="/").items():
        frozen = path.startswith("stem") or "/norm2/" in path
        assert changed != frozen, path


def test_options_reach_the_normaliser():
    config = tiny_config(norm_options={"gain": 0.3, "learn_gain": None})
    norm = make_network(config, 10).norm(name="norm")
    assert isinstance(norm, KalmanNorm)
    assert (norm.gain, norm.learn_gain, norm.momentum) == (0.3, None, 0.9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(norm="kalmann"), "unknown normaliser 'kalmann'; known are batch"),
        (dict(norm_options={"gian": 1}), "no attribute .*gian.*gain"),
        (dict(norm_options={"momentum": 0.5}), "momentum, which the key stats_mom"),
        (
            dict(micro_batch_size=0),
            "micro_batch_size is 0; expected a whole number, at least 1",
        ),
        (dict(micro_batch_size=3), "micro_batch_size 3 does not divide"),
        (dict(batch_size=-8), "batch_size is -8; expected a whole"),
        (dict(eval_epochs=0), "eval_epochs is 0"),
        (dict(width=-1), "width is -1"),
        (dict(network="small_inception", width=8), "'small_inception' has one width"),
        (dict(train_examples=-1), "train_examples is -1; expected .*at least 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(clip_norm=-1.0), "clip_norm is -1.0; expected a number, at least 0"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(network="resnet18"), r"resnet18.*inception_v2"),
        (dict(norm_options={"gain": 1.5}), r"gain is 1.5; expected .*\[0, 1\]"),
        (dict(dataset="digit"), r"dataset is 'digit'; expected one of \['digits"),
        (dict(dtype="float64"), "dtype is 'float64'"),
        (dict(schedule="linear"), "schedule is 'linear'"),
        (dict(standardize="none"), "standardize is 'none'"),
        (dict(batch_size=128), "batch_size 128 is larger than the 64"),
        (dict(warmup_epochs=2), "warmup_epochs 2 leaves none"),
        (dict(schedule="step", step_epochs=(1,)), "differ in length"),
        (dict(total_steps=9), "epochs 2 and total_steps 9 are both given; set"),
        (dict(epochs=0), "epochs and total_steps are 0"),
        (dict(warmup_epochs=1, warmup_steps=3), "warmup_steps 3 are both given"),
        (dict(step_epochs=(1,), step_drops=(3,)), r"step_drops .*both given.* \(\)"),
        (dict(warmup_steps=16), "warm-up of 16 updates leaves none of 16"),
        (
            dict(warmup_from=2.0),
            "warmup_from is 2.0; expected .* at least 0 and at most 1",
        ),
        (dict(optimizer="adam"), "optimizer is 'adam'; expected one of .'sgd'"),
        (dict(optimizer_options={"b1": 0.5}), "'sgd' has no option .*b1.*nesterov"),
        (dict(optimizer_options={"momentum": 0.5}), "momentum, which the key sgd_mom"),
        (dict(freeze=("stm*",)), "freeze has 'stm.', which matches no parameter"),
        (dict(wdith=8), "no key 'wdith'. Did you mean \"width\""),
        (dict(seed=2**32), "seed is 4294967296; expected .* at most 4,294,967,295"),
        (dict(step_epochs=(1, 1), step_factors=(0.1, 0.1)), "later than the last"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_config(**overrides))
