"""What a normalisation layer costs by itself, forward and backward.

    python -m benchmarks.layer --workdir=runs/layer

Times each normaliser on activations of typical shapes, all in turn in one process, with
the gradient to input and parameters; the filter is given a state. Beside the times
stands how near they are to the physical limit: the bytes that must move (forward, the
input is read for the moments and again to be normalised, and the output written;
backward, input and gradient are read for the sums and again for the gradient that is
written: eight times the activation) at the bandwidth that this machine reaches when it
copies a large array. Ratios are to `flax`, `nn.BatchNorm` as Flax has it. Prints a
table and writes layer.json.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.hlo import bytes_moved, count_fusions
from benchmarks.program import BASELINE, VARIANTS, configure
from kalman_flax import KalmanState, Signal, compiler_options
from train import cli
from train.analysis.speed import measure, ratio
from train.engine import workdir as wd
from train.engine.settings import make_normalization

_VARIANTS = flags.DEFINE_list(
    "variants",
    "flax,batch,ours,group,batch_renorm,kalman",
    f"Of {', '.join(VARIANTS)}; what they do to convolutions has no say here.",
)
_SHAPES = flags.DEFINE_list(
    "shapes", "2x32x32x16,128x32x32x16,128x8x8x64,2x56x56x256", "N x H x W x C."
)
_DTYPES = flags.DEFINE_list("dtypes", "float32,bfloat16", "Of float32, bfloat16.")
_ROUNDS = flags.DEFINE_integer("rounds", 30, "Timings of each.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for layer.json.")

PASSES = 8  # over the activation, that any batch norm needs; see above
COPIED = 2**26  # float32 values that are copied to measure the bandwidth


def compile_layer(variant: str, shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
    """Compiles a layer's output and gradients; returns that and its arguments."""
    norm = make_normalization(configure(variant, dtype=dtype)).norm
    layer = norm(use_running_average=False, dtype=jnp.dtype(dtype), name="norm")
    x, g = np.random.default_rng(0).normal(size=(2, *shape))
    x, g = jnp.asarray(x, dtype), jnp.asarray(g, dtype)
    state = KalmanState(jnp.zeros(shape[-1]), jnp.ones(shape[-1]))
    variables = layer.init(jax.random.key(0), Signal(x, state))

    def step(variables: Any, x: jax.Array, g: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> Any:
            signal, written = layer.apply(
                {**variables, "params": params}, Signal(x, state), mutable="batch_stats"
            )
            return signal.value, written

        y, pull, written = jax.vjp(forward, variables["params"], x, has_aux=True)
        return y, pull(g), written

    jitted = jax.jit(step, compiler_options=compiler_options())
    return jitted.lower(variables, x, g).compile(), (variables, x, g)


def bandwidth(rounds: int) -> float:
    """Bytes per second, read and written, of copying a large array."""
    copy = jax.jit(lambda x: x + 1.0)
    x = jnp.zeros(COPIED)
    seconds = measure({"copy": lambda: copy(x)}, rounds)
    return 2 * x.nbytes / float(np.median(seconds["copy"]))


def compare(shape: tuple[int, ...], dtype: str, rate: float) -> list[dict[str, Any]]:
    """Measures all variants on one shape; a row for each."""
    made = {name: compile_layer(name, shape, dtype) for name in _VARIANTS.value}

    def call(compiled: Any, arguments: Any) -> Callable[[], Any]:
        return lambda: compiled(*arguments)

    times = measure({name: call(*one) for name, one in made.items()}, _ROUNDS.value)
    must = PASSES * int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    return [
        {
            "variant": name,
            "shape": shape,
            "dtype": dtype,
            "seconds": float(np.median(times[name])),
            "ratio": ratio(times[name], times[BASELINE]),
            "bytes": bytes_moved(compiled),
            "bytes_needed": must,
            "share_of_limit": must / rate / float(np.median(times[name])),
            "fusions": count_fusions(compiled.as_text()),
        }
        for name, (compiled, _) in made.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| variant | shape | dtype | ms | ratio | quartiles | bytes / needed"
        " | of the limit | fusions |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        middle, low, high = row["ratio"]
        cells = [row["variant"], "x".join(map(str, row["shape"])), row["dtype"]]
        cells += [f"{row['seconds'] * 1e3:.3f}", f"{middle:.3f}"]
        cells += [f"{low:.3f} to {high:.3f}"]
        cells += [f"{row['bytes'] / row['bytes_needed']:.2f}"]
        cells += [f"{row['share_of_limit']:.2f}", row["fusions"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes."""
    if BASELINE not in _VARIANTS.value:
        raise ValueError(f"--variants must hold {BASELINE}, which the ratios are to.")
    rate = bandwidth(_ROUNDS.value)
    print(f"memory bandwidth of a copy: {rate / 1e9:.1f} GB/s")
    rows = []
    for dtype in _DTYPES.value:
        for shape in _SHAPES.value:
            compared = compare(tuple(map(int, shape.split("x"))), dtype, rate)
            print(table(compared), flush=True)
            rows += compared
    path = pathlib.Path(_WORKDIR.value)
    path.mkdir(parents=True, exist_ok=True)
    found = wd.provenance() | {"bytes_per_second": rate, "rows": rows}
    wd.write_json(path / "layer.json", found)
    print(f"written: {path}/layer.json")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("workdir")
    cli.run(main)
