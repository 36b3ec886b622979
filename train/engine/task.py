"""What the engine asks of a task: all that a run does and the engine does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

Kind = TypeVar("Kind")


class Source(Protocol):
    """Examples in the memory of the host, or on its disk.

    One that is itself a pytree of arrays ``[N, ...]`` is in memory: batches are rows of
    its arrays. Any other is read ahead by `read`.
    """

    @property
    def examples(self) -> int:
        """Their number, N."""
        ...

    def read(self, index: np.ndarray, key: Sequence[int] | None = None) -> Any:
        """Returns the examples `index`, a pytree of arrays ``[n, ...]``.

        Args:
            index: which, ``[n]`` int.
            key: (seed, epoch) of the random numbers, in training; None: as they are.
        """
        ...


class Task(Protocol):
    """What a network is trained to do, with its data.

    ``TASKS`` of `train.engine.experiment`, or of a plugin, has the class by name.

    What stands here as a property may be an attribute.

    Attributes:
        shown: of the sums of `loss`, those in the progress bar, and their formats.
        headline: which of the numbers of `evaluate` a table is to show first.
    """

    shown: ClassVar[Mapping[str, str]]
    headline: ClassVar[str]

    @property
    def network(self) -> Any:
        """The module, called with the inputs and `use_running_average`."""
        ...

    @property
    def train(self) -> Source:
        """What to train on."""
        ...

    @property
    def test(self) -> Source:
        """What to test on while training, and at the end."""
        ...

    @property
    def validation(self) -> Source | None:
        """What to score at the end, too, to choose settings by; or None."""
        ...

    @property
    def test_name(self) -> str:
        """What the data itself calls what `test` is, say ``"val"``."""
        ...

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuses, with a ValueError, a `config` that cannot be; reads no data."""
        ...

    @classmethod
    def build(cls, config: Any, mesh: Mesh, data_dir: str | None) -> Self:
        """Makes the task that `config` describes.

        Raises:
            ValueError: a setting that cannot be.
            FileNotFoundError: the data is not there.
        """
        ...

    def check_data(
        self, kept: Mapping[str, Any] | None, files: bool = False
    ) -> dict[str, Any]:
        """Returns what to know the data by, for JSON; it does not say where that lies.

        Args:
            kept: what an earlier call returned, if there was one.
            files: open what there is to open, too, before the first step.

        Raises:
            ValueError: the data is not that of `kept`, or cannot be used.
        """
        ...

    def inputs(self) -> Any:
        """Returns inputs to initialise the network with, of one example."""
        ...

    def order(self) -> Callable[[int], np.ndarray]:
        """Returns a map from the step to the training examples of its batch,
        ``[batch_size]``: of the config's seed and the step alone."""
        ...

    def draw(self, key: jax.Array) -> Any:
        """Draws the random numbers of a batch: a pytree of arrays ``[batch_size,
        ...]``."""
        ...

    def loss(
        self,
        network: nn.Module,
        variables: dict[str, Any],
        batch: Any,
        draws: Any,
        keys: jax.Array,
        mutable: Sequence[str] = ("batch_stats",),
    ) -> tuple[dict[str, jax.Array], Any]:
        """Runs micro-batches, and sums over their examples.

        Args:
            network: `network`, or one that shows more of itself.
            variables: the network's collections.
            batch: examples, leaves ``[n, ...]``, in micro-batches one after the other.
            draws: their rows of what `draw` drew.
            keys: one of each micro-batch, ``[R]``, see
                `train.engine.step.apply_replicas`.
            mutable: collections that the network may write.

        Returns:
            Sums over the examples, scalars by name; the mean of ``loss`` over a batch
            is what training makes small. And what each micro-batch wrote, with a
            leading axis of those.
        """
        ...

    def evaluate(self, state: Any, source: Any) -> dict[str, float]:
        """Returns what a `train.engine.step.TrainState` comes to on `source`, a
        `Source` of the kind that `train` and `test` are."""
        ...


def splits(task: Task) -> dict[str, Any]:
    """Returns what there is to evaluate on, by name; the test examples under the data's
    own name for them as well."""
    found = {"train": task.train, "test": task.test, task.test_name: task.test}
    if task.validation is not None:
        found["validation"] = task.validation
    return found


def of_kind(task: Any, kind: type[Kind]) -> Kind:
    """Returns `task`, for what is done with tasks of one class alone.

    Raises:
        ValueError: it is of another one.
    """
    if not isinstance(task, kind):
        raise ValueError(
            f"this is for runs of the task {kind.__name__.lower()}, not of"
            f" {type(task).__name__}."
        )
    return task
