"""Flax models as Hugging Face's transformers (below version 5) has them, if installed.

Built from a config: nothing is downloaded.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import kalman_flax as kf

transformers = pytest.importorskip("transformers")
SIZE = {
    "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2],
    "num_labels": 3, "layer_type": "basic",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [("ResNet", {}), ("RegNet", {"layer_type": "y", "groups_width": 4})],
)
def test_hugging_face(name, options):
    if not hasattr(transformers, f"Flax{name}ForImageClassification"):
        pytest.skip(f"transformers {transformers.__version__} has no Flax {name}")
    config = getattr(transformers, f"{name}Config")(**SIZE | options)
    cls = getattr(transformers, f"Flax{name}ForImageClassification")
    model = cls(config, input_shape=(1, 32, 32, 3), seed=0)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    call = dict(train=True, mutable=["batch_stats"])

    def forward(variables, images, train, **options):
        output = model.module.apply(
            variables, images, deterministic=not train, **options
        )
        return (output[0].logits, output[1]) if train else output.logits

    apply = kf.filtered(forward, input_states={1: kf.KalmanState(0.0, 1.0)})
    explanation = kf.explain(apply, model.params, images, **call)
    # RegNet leaves the normalisers of its branches in inference.
    before = model.params["batch_stats"]
    plain = forward(model.params, images, **call)[1]["batch_stats"]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), plain, before)
    norms = [
        path for path, did in flatten_dict(moved).items() if path[-1] == "mean" and did
    ]
    assert explanation.predicted == len(explanation.rows) == len(norms) >= 3
    logits, updates = jax.jit(lambda v, x: apply(v, x, **call))(model.params, images)
    assert jnp.isfinite(logits).all()
    chex.assert_trees_all_equal_shapes(updates["batch_stats"], before)
    expected = forward(model.params, images, train=False)
    np.testing.assert_allclose(apply(model.params, images, train=False), expected)
