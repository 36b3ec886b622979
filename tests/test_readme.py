"""The README's code, run as printed, in order.

What loads an exported network is run in `tests/train/commands/test_export.py`.
"""

import pathlib
import re

import chex
import jax.numpy as jnp

import kalman_flax as kf

BLOCKS = re.findall(
    r"^```python\n(.*?)^```", pathlib.Path("README.md").read_text(), re.M | re.S
)


def test_code_blocks_run_and_keep_their_promises():
    names = {}
    for block in BLOCKS:
        if "jax.export" in block:
            continue
        exec(compile(block, "README.md", "exec"), names)
    network, variables = names["Net"](), names["variables"]
    logits = network.apply(variables, names["images"], True)
    chex.assert_trees_all_close(names["served"], logits, rtol=1e-4, atol=1e-5)
    chex.assert_shape(names["logits"], (64, 2, 10))
    chex.assert_trees_all_equal_shapes(names["batch_stats"], variables["batch_stats"])
    output = kf.filter.observe(names["y"])
    assert jnp.abs(output.mean).max() < 1 and jnp.abs(output.var - 1).max() < 1
