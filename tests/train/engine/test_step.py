"""One update and one evaluation, against what they are by definition."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.reference.slow import few_quick
from tests.train.common import INDEX, REAL, batch, build, tiny_config
from train.data.batches import Split
from train.engine.step import apply_replicas


@pytest.mark.parametrize("norm", few_quick(["kalman", "batch", "group"], ["kalman"]))
def test_update_equals_a_loop_over_micro_batches(norm):
    """Gradients averaged, running statistics of the pooled batch, SGD by hand."""
    config = tiny_config(**REAL, norm=norm, weight_decay=0.01)
    experiment = build(config)
    state = jax.device_get(experiment.state)  # the train step takes it over
    images = (
        experiment.task.train.images[INDEX] - experiment.task.train.images.mean()
    ) / (experiment.task.train.images.std())
    labels = experiment.task.train.labels[INDEX]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradient(params, x, y):
        logits, new = experiment.task.network.apply(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, new.get("batch_stats", {})

    grads, losses, written = [], [], []
    for x, y in zip(images.reshape(4, 2, 8, 8, 1), labels.reshape(4, 2)):
        (loss, new), grad = gradient(state.params, x, y)
        grads.append(grad)
        losses.append(loss)
        written.append(new)

    def stepped(path, param, *micro_grads):
        grad = sum(micro_grads) / 4
        if path[-1].key == "kernel":
            grad += config.weight_decay * param
        return param - config.learning_rate * grad

    expected = jax.tree_util.tree_map_with_path(stepped, state.params, *grads)
    after, metrics = experiment.train_step(experiment.state, batch(experiment))
    chex.assert_trees_all_close(after.params, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert after.step == 1

    if norm != "group":
        # The deepest statistic shows the law of total variance over replicas.
        old = state.batch_stats["final_norm"]
        means = np.stack([w["final_norm"]["mean"] for w in written])
        means = (means - 0.9 * old["mean"]) / 0.1
        within = np.stack([w["final_norm"]["var"] for w in written])
        within = (within - 0.9 * old["var"]) / 0.1
        pooled = within.mean(0) + means.var(0)
        np.testing.assert_allclose(
            after.batch_stats["final_norm"]["var"],
            0.9 * old["var"] + 0.1 * pooled,
            rtol=1e-3,
            atol=1e-5,
        )


def test_replicas_share_no_statistics():
    """A micro-batch's logits do not change with its neighbours."""
    experiment = build(tiny_config())
    variables = {
        "params": experiment.state.params,
        "batch_stats": experiment.state.batch_stats,
    }
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    keys = jax.random.split(jax.random.key(1), 4)

    @jax.jit
    def apply(x):
        return apply_replicas(experiment.task.network, variables, x, keys)[0]

    logits, other = apply(x), apply(x.at[2:].multiply(3.0))
    chex.assert_trees_all_close(logits[:2], other[:2], rtol=1e-5)
    assert not np.allclose(logits[2:], other[2:], rtol=1e-2)


def test_no_retrace_after_the_first_step():
    experiment = build(tiny_config())
    state = experiment.state
    for step in range(3):
        state, _ = experiment.train_step(state, batch(experiment, INDEX + step))
    assert experiment.update._cache_size() == 1


@pytest.mark.parametrize("size", few_quick([10, 128], [10]))
def test_evaluation_counts_every_image_once(size):
    """Sums over any batch size equal those over all images at once (option A), or over
    micro-batches in order, the last one filled from the start (option B)."""
    config = tiny_config(eval_batch_size=size)
    experiment = build(config)
    test = Split(*(a[:99] for a in experiment.task.test))
    result = experiment.task.evaluate(experiment.state, test)

    variables = {
        "params": experiment.state.params,
        "batch_stats": experiment.state.batch_stats,
    }
    train = np.asarray(experiment.task.train.images, np.float64)
    images = (jnp.concatenate([test.images, test.images[:1]]) - train.mean()) / (
        train.std()
    )

    def metrics(logits):
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, test.labels)
        best = np.argsort(-np.asarray(logits), axis=-1)[:, :5]
        hits = best == test.labels[:, None]
        return loss.mean(), hits[:, 0].mean(), hits.any(-1).mean()

    network = experiment.task.network
    infer = jax.jit(functools.partial(network.apply, use_running_average=True))
    logits = infer(variables, images[:99])
    loss, accuracy, top5 = metrics(logits)
    np.testing.assert_allclose(result["moving_loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(result["moving_accuracy"], accuracy, rtol=1e-6)
    np.testing.assert_allclose(result["moving_top5_accuracy"], top5, rtol=1e-6)
    assert accuracy < top5 < 1
    taken = logits.argmax(-1)
    for (true, predicted), count in np.ndenumerate(
        experiment.task.confusion(experiment.state, test)
    ):
        assert count == np.sum((test.labels == true) & (taken == predicted))

    forward = jax.jit(
        lambda x: network.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"]
        )[0]
    )
    logits = np.concatenate([forward(x) for x in images.reshape(50, 2, 8, 8, 1)])
    loss, accuracy, top5 = metrics(logits[:99])
    np.testing.assert_allclose(result["batch_loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(result["batch_accuracy"], accuracy, rtol=1e-6)
    np.testing.assert_allclose(result["batch_top5_accuracy"], top5, rtol=1e-6)


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    experiment = build(tiny_config(dtype="bfloat16"))
    state, metrics = experiment.train_step(experiment.state, batch(experiment))
    chex.assert_type(jax.tree.leaves((state.params, state.batch_stats)), jnp.float32)
    assert np.isfinite(metrics["loss"])


def losses_of(config, steps):
    """Training losses of the first updates, always on the same examples."""
    experiment = build(config)
    state, losses = experiment.state, []
    for _ in range(steps):
        state, metrics = experiment.train_step(state, batch(experiment))
        losses.append(float(metrics["loss"]))
    return losses


def test_monte_carlo_transition_trains_and_evaluates():
    config = tiny_config(norm="kalman_mc", width=16)
    losses = losses_of(config, steps=20)
    assert losses[-1] < 0.5 * losses[0]
    experiment = build(config)
    result = experiment.task.evaluate(experiment.state, experiment.task.test)
    assert np.isfinite(result["batch_loss"])


@pytest.mark.parametrize(
    "overrides", [dict(norm="kalman_mc"), dict(crop_padding=2, flip=True)]
)
def test_draws_depend_on_seed_and_step_alone(overrides):
    """Samples and crops: anew at every step, the same again in a resumed run."""
    config = tiny_config(learning_rate=0.0, **overrides)
    first, second = losses_of(config, steps=2)
    assert first != second
    assert [first, second] == losses_of(config, steps=2)


def test_micro_batch_size_must_divide():
    with pytest.raises(ValueError, match="micro_batch_size 3 does not divide"):
        build(tiny_config(micro_batch_size=3))
