"""Statistics set before the first update: by passes, and from a checkpoint."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import kalman_flax as kf
from tests.inference.test_checkpoint import variables_of
from tests.reference.plain_resnet import PlainResNet

KEY = jax.random.key(0)
IMAGES = 2.0 * jax.random.normal(KEY, (2, 8, 8, 3)) + 1.0
SIZE = {"num_classes": 3, "blocks_per_stage": 1, "width": 4}
STATES = {1: kf.KalmanState(0.0, 1.0)}
TRAIN = {"train": True, "mutable": ["batch_stats"]}


class Pooled(nn.Module):
    """A plain Flax model with a shortcut and a max-pool."""

    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        def conv_norm(x, name, stride=1):
            x = nn.Conv(4, (3, 3), stride, use_bias=False, name=f"{name}_conv")(x)
            return self.norm(not train, name=name)(x)

        x = nn.relu(conv_norm(x, "stem"))
        y = conv_norm(nn.relu(conv_norm(x, "first")), "second")
        x = nn.max_pool(nn.relu(x + y), (2, 2), (2, 2))
        return nn.Dense(3)(conv_norm(x, "last", 2).mean((1, 2)))


def normalised(net, variables, train):
    """What every normaliser gives, by its path, and the logits."""
    method = "normalize" if train else "__call__"

    @jax.jit
    def apply(variables):
        return net.apply(
            variables,
            IMAGES,
            not train,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda _, name: name == method,
        )

    logits, written = apply(variables)
    flat = traverse_util.flatten_dict(written["intermediates"])
    outputs = {
        path[:-1]: getattr(values[0], "value", values[0])
        for path, values in flat.items()
        if path[-1] == method and path[:-1] and "norm" in path[-2]
    }
    return outputs | {(): logits}


@pytest.fixture(scope="module")
def seeded():
    """ResNet with pooled, padded and plain shortcuts, as of a checkpoint."""
    checkpoint = variables_of(PlainResNet(**SIZE))
    normalization = kf.normalization("kalman", calibrate="both", gain=0.0)
    net = kf.models.ResNet(**SIZE, **normalization._asdict())
    fresh = variables_of(net, seed=1)
    return net, kf.load_batch_norm(fresh, checkpoint, net, IMAGES, True), checkpoint


def test_the_first_step_is_that_of_frozen_batch_norm(seeded):
    """Tensor by tensor, whatever the images are."""
    net, variables, checkpoint = seeded
    actual = normalised(net, variables, train=True)
    expected = normalised(PlainResNet(**SIZE), checkpoint, train=False)
    assert len(expected) == 8 and actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, 1e-4, 1e-4, err_msg=str(path))


def test_export_after_seeding_is_the_checkpoint(seeded):
    net, variables, checkpoint = seeded
    exported = kf.export_batch_norm(net, variables, IMAGES, True)
    jax.tree.map(np.testing.assert_array_equal, exported, checkpoint)


def test_a_plain_flax_model():
    """Its max-pool observes these very images."""
    model = Pooled()
    checkpoint = variables_of(model)
    apply = kf.filtered(
        model.apply, input_states=STATES, calibrate="both", gain=0.0, strict=True
    )

    @jax.jit
    def step(variables):
        return apply(variables, IMAGES, **TRAIN)

    with warnings.catch_warnings():  # nothing to say to who starts it, or only looks
        warnings.simplefilter("error", UserWarning)
        kf.explain(apply, checkpoint, IMAGES, **TRAIN)
        kf.calibrate(lambda v, x: apply(v, x, **TRAIN), checkpoint, [IMAGES])
        variables = kf.seed_calibration(step, checkpoint)
        step(variables)
    expected = jax.jit(model.apply, static_argnums=2)(checkpoint, IMAGES, False)
    np.testing.assert_allclose(step(variables)[0], expected, atol=1e-4)
    with pytest.warns(UserWarning, match="hold no corrections: this step adds"):
        unseeded, _ = step(checkpoint)
    assert np.abs(unseeded - expected).max() > 0.2
    exported = kf.export_batch_norm(model, variables, IMAGES, False)
    jax.tree.map(np.testing.assert_array_equal, exported, checkpoint)


def test_loading_without_the_network_says_what_is_not_done(seeded):
    _, variables, checkpoint = seeded
    with pytest.warns(UserWarning, match="seed_calibration"):
        loaded = kf.load_batch_norm(variables, checkpoint)
    with pytest.raises(ValueError, match="offset: of another filter's"):
        kf.load_batch_norm(checkpoint, loaded)


class Normalised(nn.Module):
    norm: nn.Module

    @nn.compact
    def __call__(self, x, train):
        return self.norm(kf.Signal(x, kf.KalmanState(0.0, 1.0)), not train)


BATCHES = [3.0 * jax.random.normal(jax.random.key(i), (16, 4)) + i for i in (1, 2)]


@pytest.mark.parametrize("norm", [
    kf.baselines.BatchNorm(momentum=0.5),
    kf.KalmanNorm(momentum=0.5, calibrate="var", gain=1.0, decay_steps=9),
])  # fmt: skip
def test_passes_set_the_statistics_and_nothing_else(norm):
    net = Normalised(norm)
    variables = net.init(KEY, BATCHES[0], False)

    @jax.jit
    def forward(variables, x):
        return net.apply(variables, x, **TRAIN)

    found = kf.calibrate(forward, variables, iter(BATCHES))
    assert found["params"] is variables["params"]
    stats = found["batch_stats"]["norm"]
    means = [np.mean(x, 0) for x in BATCHES]
    np.testing.assert_allclose(
        stats["mean"], 0.25 * means[0] + 0.5 * means[1], rtol=1e-4
    )
    if "ratio" in stats:
        assert stats["steps"] == 0.0  # no update was made
        offset = (means[0] + 2.0 * means[1]) / 3.0
        squares = [np.mean((x - offset) ** 2, 0) for x in BATCHES]
        np.testing.assert_allclose(stats["offset"], offset, rtol=1e-4)
        np.testing.assert_allclose(
            stats["ratio"], (squares[0] + 2.0 * squares[1]) / 3.0, rtol=1e-4
        )


def test_seeding_that_cannot_be():
    def seed(norm, **kwargs):
        net = Normalised(norm)
        variables = net.init(KEY, BATCHES[0], False)
        return kf.seed_calibration(net.apply, variables, BATCHES[0], **kwargs)

    with pytest.raises(ValueError, match="no KalmanNorm with calibrate"):
        seed(kf.KalmanNorm(), **TRAIN)
    with pytest.raises(ValueError, match="may not write"):
        seed(kf.KalmanNorm(calibrate="both"), train=True)
    with pytest.raises(ValueError, match="returned no batch_stats"):
        seed(kf.KalmanNorm(), train=False)


def test_passes_that_cannot_be():
    net = Normalised(kf.baselines.BatchNorm())
    variables = net.init(KEY, BATCHES[0], False)

    def forward(variables, x, train=True):
        return net.apply(variables, x, train=train, mutable=["batch_stats"])

    def calibrate(apply=forward, variables=variables, batches=BATCHES):
        return kf.calibrate(apply, variables, batches)

    with pytest.raises(ValueError, match="keeps no statistics"):
        calibrate(variables={"params": {}})
    with pytest.raises(ValueError, match="no batches"):
        calibrate(batches=[])
    with pytest.raises(ValueError, match="returned no batch_stats"):
        calibrate(lambda v, x: net.apply(v, x, False))
    with pytest.raises(ValueError, match="moved no statistics"):
        calibrate(lambda v, x: forward(v, x, train=False))
    bad = variables["batch_stats"]["norm"] | {
        "var": jnp.array([1.0, jnp.nan, 1.0, 1.0])
    }
    with pytest.raises(ValueError, match="infinite or NaN: norm/var"):
        calibrate(variables={**variables, "batch_stats": {"norm": bad}})
