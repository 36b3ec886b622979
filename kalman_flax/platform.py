"""What the compiler of a CPU needs, and those of GPUs and TPUs must not have."""

from __future__ import annotations

from typing import TypeVar

from jax import lax

Tree = TypeVar("Tree")


def hold(tree: Tree) -> Tree:
    """On a CPU an optimisation barrier, elsewhere `tree` itself.

    XLA:CPU fuses what is cheap to say into all that reads it, and so computes small
    vectors again at every pixel, and gradients once for each reader. On a TPU the
    barriers that prevent this cost 2.6 times the memory traffic: they keep layouts from
    being chosen, and moments from being summed in the convolution before them.
    """
    return lax.platform_dependent(
        tree, cpu=lax.optimization_barrier, default=lambda tree: tree
    )
