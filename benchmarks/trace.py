"""What the filter costs before a program is compiled: seconds of tracing.

    python -m benchmarks.trace --workdir=runs/trace

Traces and lowers the loss and its gradients of ResNet-20 and ResNet-50, micro-batches
of two as replicas under `jax.vmap`: `batch` with `nn.BatchNorm`, `signals` with our
layers, and `filtered`, which is `batch` by `kalman_flax.filtered`. All in turn, and the
shortest of several times counts. Prints a table and writes trace.json.
"""

import functools
import pathlib
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags

import kalman_flax as kf
from train import cli
from train.engine import workdir as wd

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for trace.json.")

STATE = kf.KalmanState(0.0, 1.0)
REPLICAS = 4
#: blocks of each stage, width, kernel sizes in a block, growth of its last, image size
NETWORKS = {
    "resnet20": ((3, 3, 3), 16, (3, 3), 1, 32),
    "resnet50": ((3, 4, 6, 3), 64, (1, 3, 1), 4, 224),
}


class ResNet(nn.Module):
    """A ResNet of the layers of Flax, or of ours, which have the same names.

    Attributes:
        layers: `flax.linen` or `kalman_flax`.
        norm: the normaliser.
    """

    stages: tuple[int, ...]
    width: int
    kernels: tuple[int, ...]
    growth: int
    layers: ModuleType
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Maps images to logits."""
        relu = self.layers.relu
        x = relu(self._conv_norm(x, self.width, 3))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                y, features = x, self.width * 2**stage
                for kernel in self.kernels[:-1]:
                    y = relu(self._conv_norm(y, features, kernel, strides))
                    strides = 1
                y = self._conv_norm(y, features * self.growth, self.kernels[-1])
                if y.shape != x.shape:
                    by = x.shape[1] // y.shape[1]
                    x = self._conv_norm(x, y.shape[-1], 1, by)
                x = relu(x + y)
        return self.layers.Dense(10)(x.mean(axis=(1, 2)))

    def _conv_norm(self, x: Any, features: int, kernel: int, strides: int = 1) -> Any:
        conv = self.layers.Conv(features, (kernel,) * 2, strides, use_bias=False)
        return self.norm(use_running_average=False)(conv(x))


def forwards(network: str) -> tuple[Any, dict[str, Callable[..., Any]]]:
    """Returns shapes of variables and images, and the forward pass of each variant."""
    *size, side = NETWORKS[network]
    plain = ResNet(*size, nn, nn.BatchNorm)
    signals = ResNet(*size, kf, kf.KalmanNorm)
    filtered = kf.filtered(plain.apply, input_states={1: STATE})

    def of_signals(variables: Any, images: jax.Array, **options: Any) -> Any:
        logits, updates = signals.apply(variables, kf.Signal(images, STATE), **options)
        return logits.value, updates

    images = jax.ShapeDtypeStruct((REPLICAS, 2, side, side, 3), jnp.float32)
    one, key = jax.ShapeDtypeStruct(images.shape[1:], jnp.float32), jax.random.key(0)
    ours = functools.partial(signals.init, key)
    variables = {
        "batch": jax.eval_shape(functools.partial(plain.init, key), one),
        "signals": jax.eval_shape(lambda x: ours(kf.Signal(x, STATE)), one),
    }
    variables["filtered"] = variables["batch"]
    passes = {"batch": plain.apply, "signals": of_signals, "filtered": filtered}
    return (variables, images), passes


def seconds(forward: Callable[..., Any], variables: Any, images: Any) -> list[float]:
    """Returns the seconds it takes to trace loss and gradients, and to lower them."""

    def loss(params: Any, rest: Any, images: jax.Array) -> Any:
        def one(x: jax.Array) -> Any:
            return forward({**rest, "params": params}, x, mutable=["batch_stats"])

        logits, updates = jax.vmap(one)(images)
        return jnp.mean(jnp.square(logits)), updates

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    start = time.perf_counter()
    traced = step.trace(variables["params"], variables, images)
    middle = time.perf_counter()
    traced.lower()
    return [middle - start, time.perf_counter() - middle]


def main() -> None:
    """Measures, prints and writes."""
    rows = []
    for network in NETWORKS:
        (variables, images), passes = forwards(network)
        times: dict[str, list[list[float]]] = {name: [] for name in passes}
        for _ in range(_ROUNDS.value):
            for name, forward in passes.items():
                times[name].append(seconds(forward, variables[name], images))
        for name, found in times.items():
            trace, lower = map(min, zip(*found))
            rows.append({"network": network, "variant": name, "trace": trace})
            rows[-1]["lower"] = lower
            print(f"{network} {name:9s} {trace:6.2f} s + {lower:.2f} s", flush=True)
    path = pathlib.Path(_WORKDIR.value)
    path.mkdir(parents=True, exist_ok=True)
    wd.write_json(path / "trace.json", wd.provenance() | {"rows": rows})
    print(f"written: {path}/trace.json")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("workdir")
    cli.run(main)
