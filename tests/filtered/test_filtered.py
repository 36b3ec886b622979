"""What `filtered` takes and refuses, what it leaves alone, and what it costs."""

import functools
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from benchmarks.hlo import bytes_of_kernels, count_fusions
from tests.filtered.models import resnet, signal_resnet

STATES = {1: kf.KalmanState(0.0, 1.0)}
KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
TRAIN = dict(train=True, mutable=["batch_stats"])


class Net(nn.Module):
    norm: object = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(use_running_average=not train)(nn.Conv(3, (3, 3))(x))
        return self.norm(use_running_average=not train)(nn.Conv(2, (1, 1))(nn.relu(x)))


@pytest.fixture(scope="module")
def variables():
    return Net().init(KEY, IMAGES, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gain": 2.0}, "gain is 2.0"),
        ({"rule": "none"}, "rule is 'none'"),
        ({"gein": 0.1}, "no option 'gein'"),
        ({"use_scale": False}, "no option 'use_scale'"),
        ({"learn_gain": "scalar"}, "norm=kf.KalmanNorm"),
        ({"noise": "additive"}, "norm=kf.KalmanNorm"),
        ({"input_states": {1: 0.5}}, "KalmanState"),
        ({"input_states": {None: kf.KalmanState(0.0, 1.0)}}, "keyword"),
        ({"input_states": {7: kf.KalmanState(0.0, 1.0)}}, "7"),
        ({"input_states": {"train": kf.KalmanState(0.0, 1.0)}}, "'train'"),
        ({"input_states": {1: kf.KalmanState(jnp.zeros(5), 1.0)}}, "channels"),
    ],
)
def test_bad_arguments(variables, arguments, message):
    with pytest.raises(ValueError, match=message):
        apply = kf.filtered(Net().apply, **arguments)
        apply(variables, IMAGES, **TRAIN)


def test_not_a_function():
    with pytest.raises(ValueError, match="function"):
        kf.filtered(3)


def test_input_states_by_keyword_and_by_channel(variables):
    given = kf.KalmanState(jnp.zeros(3), jnp.ones(3))
    by_position = kf.filtered(Net().apply, input_states=STATES)
    by_keyword = kf.filtered(Net().apply, input_states={"x": given})
    chex.assert_trees_all_close(
        by_keyword(variables, x=IMAGES, **TRAIN),
        by_position(variables, IMAGES, **TRAIN),
        rtol=1e-5,
    )


def test_init_is_left_alone(variables):
    init = kf.filtered(Net().init, input_states=STATES)
    chex.assert_trees_all_equal(init(KEY, IMAGES, train=True), variables)


def test_decay_steps_counts_in_batch_stats(variables):
    """From the start with `filtered(init)`; without, the first step adds the count."""
    plain, kalman = Net(), Net(functools.partial(kf.KalmanNorm, decay_steps=2))
    start = kf.filtered(plain.init, decay_steps=2)(KEY, IMAGES, train=False)
    counts = [stats["steps"] for stats in start["batch_stats"].values()]
    assert counts == [0.0, 0.0]
    apply = kf.filtered(plain.apply, input_states=STATES, decay_steps=2)
    other = kf.filtered(kalman.apply, input_states=STATES)
    for count in (1.0, 2.0):
        _, added = apply(variables, IMAGES, **TRAIN)
        y, updates = apply(start, IMAGES, **TRAIN)
        chex.assert_trees_all_close(added, updates)
        assert updates["batch_stats"]["BatchNorm_0"]["steps"] == count
        names = {"params": {}, "batch_stats": {}}
        for name, tree in start.items():
            for path, leaf in tree.items():
                names[name][path.replace("Batch", "Kalman")] = leaf
        expected, _ = other(names, IMAGES, **TRAIN)
        chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-6)
        start, variables = {**start, **updates}, {**variables, **added}
    # At a gain of 0 the last statistics are the predicted ones.
    rows = kf.explain(apply, start, IMAGES, **TRAIN).rows
    np.testing.assert_allclose([row.gain for row in rows], 0.0, atol=1e-8)


def test_a_norm_of_the_model_keeps_its_options():
    norm = functools.partial(
        kf.KalmanNorm, gain=0.4, learn_gain="channel", noise="additive"
    )
    net = Net(norm)
    variables = net.init(KEY, IMAGES, False)
    apply = kf.filtered(net.apply, input_states=STATES, gain=0.1)

    @jax.grad
    def gradient(params):
        y, _ = apply({**variables, "params": params}, IMAGES, **TRAIN)
        return jnp.sum(jnp.sin(y))

    found = gradient(variables["params"])["KalmanNorm_1"]
    assert jnp.all(found["gain"] != 0) and jnp.all(found["noise"] != 0)
    rows = kf.explain(apply, variables, IMAGES, **TRAIN).rows
    np.testing.assert_allclose(rows[0].gain, 0.4, rtol=1e-5)


def test_masks_and_axes_are_those_of_batch_norm():
    """A gain of 1 is batch norm, whatever the normaliser is told."""

    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            mask = jnp.arange(4)[:, None, None] < 3
            norm = functools.partial(nn.BatchNorm, not train, momentum=0.5)
            x = norm(name="masked", use_bias=False)(x, mask=mask)
            return norm(name="other", axis=1, epsilon=1e-2, use_scale=False)(x)

    variables = Odd().init(KEY, IMAGES, False)
    apply = kf.filtered(Odd().apply, gain=1.0)
    chex.assert_trees_all_close(
        apply(variables, IMAGES, **TRAIN),
        Odd().apply(variables, IMAGES, **TRAIN),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    *_, other = kf.explain(apply, variables, IMAGES, **TRAIN).rows
    assert "axis 1" in other.lost_at


class Own(nn.BatchNorm):
    """A subclass that does something around."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return 2 * super().__call__(3 * x, use_running_average, mask=mask)


def test_a_subclass_does_what_it_does():
    net = Net(Own)
    variables = net.init(KEY, IMAGES, False)
    apply = kf.filtered(net.apply, input_states=STATES, gain=1.0)
    chex.assert_trees_all_close(
        apply(variables, IMAGES, **TRAIN),
        net.apply(variables, IMAGES, **TRAIN),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    assert kf.explain(apply, variables, IMAGES, **TRAIN).predicted == 2


def test_kernel_map_cannot_export_a_kernel_that_is_computed(variables):
    class Computed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            conv = nn.WeightNorm(nn.Conv(3, (3, 3)))
            return nn.BatchNorm(not train)(conv(x))

    net = Computed()
    v = net.init(KEY, IMAGES, False)
    apply = kf.filtered(net.apply, kernel_map=kf.centre_kernel)
    with pytest.raises(ValueError, match="computed"):
        apply.export_kernels(v, IMAGES, train=False)
    with pytest.raises(ValueError, match="kernel_map"):
        kf.filtered(net.apply).export_kernels(v, IMAGES, train=False)


def test_explain_of_signals():
    """The same table for a network of Signals."""
    net = signal_resnet.ResNet()
    variables = jax.eval_shape(net.init, KEY, IMAGES)
    variables = jax.tree.map(lambda s: jnp.ones(s.shape), variables)
    explanation = kf.explain(net.apply, variables, IMAGES, **TRAIN)
    assert explanation.predicted == len(explanation.rows) == 6
    assert np.all(np.isfinite([row.log_ratio for row in explanation.rows]))
    assert explanation.rows[0].path == "bn_init"
    shapes = jax.eval_shape(lambda: variables)
    of_shapes = kf.explain(net.apply, shapes, IMAGES, **TRAIN)
    assert of_shapes.predicted == 6 and of_shapes.rows[0].log_ratio is None
    plain = kf.explain(kf.KalmanNorm(False).init_with_output, KEY, IMAGES)
    assert not plain.rows  # initialisation
    norm = kf.KalmanNorm(False)
    row = kf.explain(norm.apply, norm.init(KEY, IMAGES), IMAGES, mutable=True).rows[0]
    assert not row.predicted and "Signal" in row.lost_at


def test_a_plain_array_in_training_is_warned_of():
    """With what mends it; not in initialisation, in inference, or in `filtered`."""
    net = Net(kf.KalmanNorm)
    apply = kf.filtered(net.apply, input_states=STATES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables = net.init(KEY, IMAGES, True)
        net.apply(variables, IMAGES, train=False)
        apply(variables, IMAGES, **TRAIN)
    with pytest.warns(UserWarning, match=r"kalman_flax\.filtered"):
        net.apply(variables, IMAGES, **TRAIN)


def test_costs_what_signals_cost():
    """Kernels, and bytes into and out of them, of a training step: within 2 %."""
    images = jnp.zeros((2, 8, 8, 3))
    plain, signals = resnet.ResNet(), signal_resnet.ResNet()
    variables = jax.eval_shape(functools.partial(plain.init, train=False), KEY, images)

    def cost(apply):
        @jax.jit
        def step(variables):
            def loss(params):
                v = {**variables, "params": params}
                logits, updates = apply(v, images, **TRAIN)
                return jnp.mean(jnp.square(logits)), updates

            return jax.grad(loss, has_aux=True)(variables["params"])

        options = {**kf.compiler_options(), "xla_backend_optimization_level": "3"}
        text = step.lower(variables).compile(compiler_options=options).as_text()
        return np.array([count_fusions(text), bytes_of_kernels(text)])

    ours = cost(kf.filtered(plain.apply, input_states=STATES))
    theirs = cost(signals.apply)
    assert np.all(ours <= 1.02 * theirs), (ours, theirs)
    assert np.all(ours > cost(plain.apply))
