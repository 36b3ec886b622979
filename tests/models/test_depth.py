"""The networks of the paper's Tables 1, 4 and 5 at their depth, but slim: they learn.

Compiled as a whole each takes minutes. So their blocks are compiled one by one, and
those that are alike once.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from sklearn.datasets import load_digits

import kalman_flax as kf
from kalman_flax.models.network import Layers
from tests.reference.slow import few_quick

IMAGES, MICRO_BATCH, SIZE, WIDTH = 32, 4, 32, 4
UPDATES, RATE = 30, 0.05
SEEDS = itertools.count()


def he_normal(key, shape, dtype):
    """That of `kalman_flax.models.network`, drawn without a program for each shape."""
    fan_out = np.prod(shape[:-2]) * shape[-1]
    random = np.random.default_rng(next(SEEDS))
    return jnp.asarray(random.normal(0.0, np.sqrt(2 / fan_out), shape), dtype)


class Blockwise:
    """Mixin of a network whose blocks are compiled by themselves."""

    compiled = {}  # noqa: RUF012

    def _layers(self, use_running_average):
        layers = super()._layers(use_running_average)
        conv = functools.partial(layers.conv, kernel_init=he_normal)
        return layers._replace(conv=conv)

    def _block(self, block):
        if self.is_initializing():
            return block

        def build(*args, name, **options):
            described = [x for x in (*args, *options.items()) if not holds_layers(x)]
            key = self.norm, block, repr(described)
            if key not in self.compiled:
                made = block(*args, **options, parent=None)
                apply = functools.partial(
                    made.apply, mutable=["batch_stats", "intermediates"]
                )
                self.compiled[key] = jax.jit(apply)
            return functools.partial(self._call, self.compiled[key], name)

        return build

    def _call(self, block, name, x):
        collections = "params", "batch_stats"
        variables = {c: self.variables[c][name] for c in collections}
        y, written = block(variables, x)
        for collection, tree in written.items():
            if self.is_mutable_collection(collection):
                self.put_variable(collection, name, tree)
        return y


def holds_layers(x):
    return isinstance(x, Layers) or (isinstance(x, tuple) and x[0] == "layers")


class BottleneckResNet(Blockwise, kf.models.BottleneckResNet):
    pass


class InceptionV2(Blockwise, kf.models.InceptionV2):
    pass


NETWORKS = {
    "resnet50": functools.partial(BottleneckResNet, stage_sizes=(3, 4, 6, 3)),
    "resnet101": functools.partial(BottleneckResNet, stage_sizes=(3, 4, 23, 3)),
    "inception_v2": InceptionV2,
}


def few_digits():
    """32 images of the digits, standardised, 32x32, as micro-batches."""
    digits = load_digits()
    images = np.kron(digits.images[:IMAGES], np.ones((4, 4)))[..., None]
    images = (images - images.mean()) / images.std()
    images = images.reshape(-1, MICRO_BATCH, SIZE, SIZE, 1).astype(np.float32)
    return images, digits.target[:IMAGES].reshape(-1, MICRO_BATCH)


@functools.cache  # the programs of blocks are kept by normaliser
def normalization(name):
    return kf.normalization(name, momentum=0.9)


def build(network, norm):
    """The network and its variables."""
    net = NETWORKS[network](
        num_classes=10, width=WIDTH, **normalization(norm)._asdict()
    )
    images = jax.ShapeDtypeStruct((MICRO_BATCH, SIZE, SIZE, 1), jnp.float32)
    return net, net.lazy_init(jax.random.key(0), images, True)


def worst_ratio(network, norm):
    """Of the variance predicted to that observed, the mean over a layer, at the start;
    the one whose logarithm is the largest."""
    net, variables = build(network, norm)
    images, _ = few_digits()
    mutable = ["batch_stats", "intermediates"]
    _, written = net.apply(variables, images[0], False, mutable=mutable)
    found = traverse_util.flatten_dict(written["intermediates"])
    ratios = [
        float(jnp.mean(predicted.var / found[*path[:-1], "observed"].var))
        for path, predicted in found.items()
        if path[-1] == "predicted"
    ]
    assert len(ratios) > 50
    return max(ratios, key=lambda ratio: abs(np.log(ratio)))


@pytest.mark.parametrize("network", few_quick(NETWORKS, ["resnet50"]))
def test_predictions_keep_their_scale(network):
    assert 1 / 100 < worst_ratio(network, "kalman_paper") < 100


@pytest.mark.filterwarnings("ignore:LiteralPaperKalmanNorm")
def test_those_of_the_literal_reading_do_not():
    assert worst_ratio("resnet50", "kalman_paper_literal") > 1e3


def overfit(network, norm, updates=UPDATES):
    """Trains on the digits; returns the share told right, update by update."""
    images, labels = few_digits()
    net, variables = build(network, norm)
    params, stats = variables["params"], variables["batch_stats"]
    optimizer = optax.sgd(RATE, momentum=0.9)
    momentum = optimizer.init(params)

    def loss(params, stats):
        def of_micro_batch(images):
            return net.apply(
                {"params": params, "batch_stats": stats},
                images,
                False,
                mutable=["batch_stats"],
            )

        logits, written = jax.vmap(of_micro_batch)(images)
        stats = jax.tree.map(lambda x: x.mean(0), written["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (stats, jnp.mean(logits.argmax(-1) == labels))

    @jax.jit
    def move(params, grads, momentum):
        updates, momentum = optimizer.update(grads, momentum)
        return optax.apply_updates(params, updates), momentum

    found = []
    for _ in range(updates):
        grads, (stats, accuracy) = jax.grad(loss, has_aux=True)(params, stats)
        params, momentum = move(params, grads, momentum)
        found.append(float(accuracy))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("norm", ["batch", "kalman", "kalman_paper"])
def test_learns_at_its_depth(norm, network):
    """Most of the images of ten classes, and not yet all: a ResNet-101 is slow."""
    updates = 2 * UPDATES if network == "resnet101" else UPDATES
    assert np.mean(overfit(network, norm, updates)[-5:]) > 0.6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LiteralPaperKalmanNorm")
def test_the_literal_reading_does_not_learn():
    assert np.mean(overfit("resnet50", "kalman_paper_literal")[-5:]) < 0.3
