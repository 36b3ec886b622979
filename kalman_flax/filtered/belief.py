"""What is believed of an array in a traced program: a constant, known, or lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kalman_flax._filter.predict import predict_pointwise
from kalman_flax._filter.state import KalmanState, for_channels

Pointwise = Callable[[jax.Array], jax.Array]


class Lost(NamedTuple):
    """Data of which nothing is known (any more).

    Attributes:
        at: the operation that lost the state, with file and line.
    """

    at: str


class Root:
    """A Gaussian signal that pointwise functions start from.

    All that follows from one root by elementwise operations alone is one pointwise
    function of it, and moved by one quadrature: ``x * sigmoid(x)`` is no product of two
    independent signals.
    """

    def __init__(self, state: KalmanState):
        self.state = state

    def moments(self, fn: Pointwise) -> KalmanState:
        """Mean and variance of ``fn(root)``."""
        return predict_pointwise(self.state, fn)


class Nodes(Root):
    """A random draw that takes the values `nodes` ``[K]`` by `weights` ``[K]``."""

    def __init__(self, nodes: jax.Array, weights: jax.Array):
        self.nodes, self.weights = nodes, weights
        super().__init__(self.moments(lambda x: x))

    def moments(self, fn: Pointwise) -> KalmanState:
        """Mean and variance of ``fn(root)``, exactly."""
        values = jnp.asarray(fn(self.nodes), jnp.float32)
        mean = jnp.sum(self.weights * values, axis=-1)
        centred = values - mean[..., None]
        return KalmanState(mean, jnp.sum(self.weights * jnp.square(centred), axis=-1))


def coin(p: jax.Array | float) -> Root:
    """True by probability `p`."""
    return Nodes(jnp.array([False, True]), jnp.stack([1.0 - p, jnp.asarray(p)]))


def uniform(low: jax.Array | float, high: jax.Array | float, count: int = 256) -> Root:
    """Uniform in [low, high], by the midpoints of `count` intervals."""
    shares = (jnp.arange(count) + 0.5) / count
    return Nodes(low + (high - low) * shares, jnp.full(count, 1 / count))


@dataclasses.dataclass(eq=False)
class Known:
    """Data whose moments are known.

    Make one by `Known.of`. `state` is computed when first asked for.

    Attributes:
        root: what it is a pointwise function of.
        fn: that function, of an array ``[..., C, nodes]``; None for the root itself.
        move: returns the state.
        axis: of the channels in the array; None where every channel is alike, and the
            state two scalars.
        affine: whether `fn` is, so that this is Gaussian as the root is.
        through: the operations since the last normaliser.
        base: (state, factor), where this is a signal of that state times a factor that
            depends on the position: what sums over windows at borders are.
        unpadded: (known, padding), where this is that array with zeros around it.
    """

    root: Root
    fn: Pointwise | None
    move: Callable[[], KalmanState]
    axis: int | None
    affine: bool = True
    through: tuple[str, ...] = ()
    base: tuple[KalmanState, Any] | None = None
    unpadded: tuple[Known, Any] | None = None

    @classmethod
    def of(
        cls, state: KalmanState, axis: int | None = None, *, like: Any = (), **more: Any
    ) -> Known:
        """A root of its own.

        Args:
            state: ``[C]`` float32, or scalars where `axis` is None.
            axis: of the channels in the array.
            like: the operands that it comes from; explanations list what those came
                through.
            more: `base`, `unpadded`.
        """
        through = tuple(name for known in like for name in known.through)
        return cls(Root(state), None, lambda: state, axis, through=through, **more)

    @property
    def state(self) -> KalmanState:
        """The moments, ``[C]``, or scalars where `axis` is None."""
        state = self.move()
        self.move = lambda: state
        return state

    def of_channels(self, channels: int) -> KalmanState:
        """The moments, ``[channels]`` in any case."""
        state = self.state
        if jnp.shape(state.mean) == (1,):  # one channel, broadcast
            state = KalmanState(state.mean[0], state.var[0])
        return for_channels(state, channels)

    def value_at(self, nodes: jax.Array) -> jax.Array:
        """This as a function of the root."""
        return nodes if self.fn is None else self.fn(nodes)

    def replace(self, **changes: Any) -> Known:
        """The same root; `base` and `unpadded` have to be given again."""
        changes = {"base": None, "unpadded": None} | changes
        return dataclasses.replace(self, **changes)

    def laid_out(self, axis: int | None) -> Known:
        """The same in another layout, with its channels at `axis`: a new root, since
        elementwise operations meet other elements now."""
        return Known.of(self.state, axis, like=[self])


Belief = Known | Lost | None  # None: a constant, exactly known


@dataclasses.dataclass
class Operand:
    """An array and what is believed of it.

    Attributes:
        value: the array.
        belief: `Known`; `Lost`; or None for a constant: parameters, literals, and what
            follows from them.
        compact: `value` before it was broadcast, with as many axes, of size 1 where all
            along the axis is the same; None where nothing is known of that.
    """

    value: Any
    belief: Belief = None
    compact: Any = None

    @property
    def small(self) -> Any:
        """`value`, or what it was broadcast from."""
        return self.value if self.compact is None else self.compact
