"""What a training step costs, normaliser by normaliser.

    python -m benchmarks.step --workdir=runs/step
    python -m benchmarks.step --micro_batch_sizes=1,2,8,32,128 --torch \\
        --dtypes=float32,bfloat16 --workdir=runs/step

Times the trainer's own step on random images, and inference by moving statistics, all
normalisers in turn in one process: on a busy machine ratios hold, times do not. Beside
them stands what XLA says of the compiled step: operations, bytes, fusions, memory. All
ratios are to `batch`, which is Flax's `nn.BatchNorm`; `ours` is `KalmanNorm` with gain
1, which is batch norm by our own code. Prints a table and writes step.json.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import torch_step
from benchmarks.hlo import count_fusions
from benchmarks.program import VARIANTS, configure
from train import cli
from train import workdir as wd
from train.speed import Stepper, measure, prepare
from train.step import TrainState

_VARIANTS = flags.DEFINE_list("variants", list(VARIANTS), f"Of {', '.join(VARIANTS)}.")
_BLOCKS = flags.DEFINE_integer("blocks", 3, "n of the ResNet of 6n + 2 layers.")
_SIZE = flags.DEFINE_integer("size", 32, "Height and width of the images.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images per step.")
_MICRO_BATCH_SIZES = flags.DEFINE_list("micro_batch_sizes", "2,128", "Divisors of it.")
_DTYPES = flags.DEFINE_list("dtypes", "float32", "Of float32, bfloat16.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timings of each.", lower_bound=1)
_TORCH = flags.DEFINE_bool("torch", False, "Time PyTorch's step too, if installed.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for step.json.")


class Program(NamedTuple):
    """A compiled step and inference, ready to run."""

    train: Callable[[], Any]
    infer: Callable[[], Any]
    facts: dict[str, float]


def compile_program(config: ConfigDict) -> Program:
    """Compiles the step and the inference of `config` for random images."""
    network, step, state, batch = prepare(config, _SIZE.value)
    lowered = step.lower(state, batch)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start

    @jax.jit
    def infer(state: TrainState, images: jax.Array) -> jax.Array:
        x = images / 128.0 - 1.0
        return network.apply(state.variables, x, use_running_average=True)

    inference = infer.lower(state, batch.images).compile()
    train = Stepper(compiled, state, batch)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    facts = {
        "compile_seconds": compile_seconds,
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "fusions": count_fusions(compiled.as_text()),
        "memory_bytes": memory.temp_size_in_bytes,
        "inference_flops": inference.cost_analysis()["flops"],
        "inference_fusions": count_fusions(inference.as_text()),
    }
    return Program(
        train,
        lambda: jax.block_until_ready(inference(train.state, batch.images)),
        facts,
    )


def ratio(seconds: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios round by round: what slows a whole round
    leaves them alone."""
    ratios = np.array(seconds) / np.array(baseline)
    return tuple(float(q) for q in np.quantile(ratios, (0.5, 0.25, 0.75)))


def compare(micro_batch_size: int, dtype: str) -> list[dict[str, Any]]:
    """Measures all variants at one micro-batch size; a row for each."""
    keys = dict(
        blocks_per_stage=_BLOCKS.value,
        batch_size=_BATCH_SIZE.value,
        micro_batch_size=micro_batch_size,
        dtype=dtype,
    )
    made = {v: compile_program(configure(v, **keys)) for v in _VARIANTS.value}
    steps = {variant: program.train for variant, program in made.items()}
    if _TORCH.value:
        shape = (_BATCH_SIZE.value, 3, _SIZE.value, _SIZE.value)
        steps["torch"] = torch_step.make(shape, _BLOCKS.value, dtype)
    train = measure(steps, _ROUNDS.value)
    infer = measure({v: p.infer for v, p in made.items()}, _ROUNDS.value)
    rows = []
    for name, seconds in train.items():
        rows.append(
            {
                "variant": name,
                "dtype": dtype,
                "micro_batch_size": micro_batch_size,
                "step_seconds": float(np.median(seconds)),
                "step_ratio": ratio(seconds, train["batch"]),
                "images_per_second": _BATCH_SIZE.value / float(np.median(seconds)),
            }
        )
        if name in made:
            rows[-1] |= {
                "inference_ratio": ratio(infer[name], infer["batch"]),
                **made[name].facts,
            }
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown, with ratios to the first of them."""
    lines = [
        "| variant | dtype | micro-batch | images/s | step | quartiles | inference"
        " | flops | bytes | memory | fusions | compile |",
        "|" + "---|" * 12,
    ]
    base = rows[0]
    for row in rows:
        step, low, high = row["step_ratio"]
        cells = [row["variant"], row["dtype"], row["micro_batch_size"]]
        cells += [f"{row['images_per_second']:.0f}", f"{step:.3f}"]
        cells += [f"{low:.3f} to {high:.3f}"]
        if "flops" in row:
            cells += [f"{row['inference_ratio'][0]:.3f}"]
            for key in ("flops", "bytes", "memory_bytes"):
                cells += [f"{row[key] / base[key]:.3f}"]
            cells += [row["fusions"]]
            cells += [f"{row['compile_seconds'] / base['compile_seconds']:.2f}"]
        else:
            cells += ["-"] * 6
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes."""
    if "batch" not in _VARIANTS.value:
        raise ValueError("--variants must hold batch, which the ratios are to.")
    rows = []
    for dtype in _DTYPES.value:
        for size in map(cli.micro_batch_size, _MICRO_BATCH_SIZES.value):
            compared = compare(size, dtype)
            print(table(compared), flush=True)
            rows += compared
    path = pathlib.Path(_WORKDIR.value)
    path.mkdir(parents=True, exist_ok=True)
    wd.write_json(path / "step.json", wd.provenance() | {"rows": rows})
    print(f"written: {path}/step.json")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("workdir")
    cli.run(main)
