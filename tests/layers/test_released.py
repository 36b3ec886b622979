"""The preset of the released code against a float64 transcription."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import Signal
from kalman_flax.models.resnet import Block
from tests.reference import released

MOMENTUM = 0.9
WIDTH = 4
# Layers here and kernels there.
KERNELS = {
    "stem": ("stem",),
    "conv1_a": ("a", "conv1"),
    "conv2_a": ("a", "conv2"),
    "conv1_b": ("b", "conv1"),
    "conv2_b": ("b", "conv2"),
}
NORMS = {
    "stem_norm": ("stem_norm",),
    "norm2_a": ("a", "norm2"),
    "norm1_b": ("b", "norm1"),
    "norm2_b": ("b", "norm2"),
    "final_norm": ("final_norm",),
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, images):
        norm = functools.partial(kf.ReleasedKalmanNorm, False, momentum=MOMENTUM)
        conv = functools.partial(kf.Conv, use_bias=False)
        x = conv(WIDTH, (3, 3), name="stem")(Signal(images))
        x = kf.relu(norm(name="stem_norm")(x))
        x = Block(WIDTH, norm, conv, normalized_input=True, name="a")(x)
        x = Block(WIDTH, norm, conv, name="b")(x)
        return norm(name="final_norm")(x)


def pick(tree, path):
    return functools.reduce(lambda node, key: node[key], path, tree)


# The state of the stem's norm is raw, that of its input; what goes on is normalised.
# So the brighter the image, the farther off are the predictions after it.
@pytest.mark.parametrize("brightness, guard_fires", [(1.0, False), (30.0, True)])
def test_values_and_running_statistics(brightness, guard_fires):
    rng = np.random.default_rng(0)
    images = brightness * rng.normal(0.3, 1.0, (2, 6, 6, 3)).astype(np.float32)
    net = Net()
    variables = jax.jit(net.init)(jax.random.key(0), images)
    apply = functools.partial(
        net.apply,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, method: method == "normalize",
    )
    _, updates = jax.jit(apply)(variables, images)
    kernels = {
        name: np.asarray(pick(variables["params"], path)["kernel"], np.float64)
        for name, path in KERNELS.items()
    }
    steps = released.run(np.float64(images), kernels)

    assert steps["stem_norm"].rejected is None  # the first normaliser only observes
    rejected = [step.rejected for step in steps.values()]
    assert (True in rejected) == guard_fires
    assert False in rejected
    for name, path in NORMS.items():
        step = steps[name]
        (output,) = pick(updates["intermediates"], path)["normalize"]
        np.testing.assert_allclose(
            output.value, step.output, rtol=1e-3, atol=1e-3, err_msg=name
        )
        stats = pick(updates["batch_stats"], path)
        scale = np.sqrt(step.var)
        mean = (1 - MOMENTUM) * step.mean / scale
        var = MOMENTUM + (1 - MOMENTUM) * step.var
        np.testing.assert_allclose(stats["mean"] / scale, mean, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-4, err_msg=name)
