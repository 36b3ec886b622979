"""What the compiler of a CPU needs, and those of GPUs and TPUs must not have."""

from __future__ import annotations

from typing import TypeVar

import jax
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


def compiler_options() -> dict[str, str]:
    """Returns what to compile a training step with, for the default backend:
    ``jax.jit(step, compiler_options=kf.compiler_options())``.

    XLA:CPU drops optimisation barriers before it fuses, and then computes the filter's
    small vectors again at every pixel; these options keep them. Elsewhere, none.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}
