"""What a training step costs, normaliser by normaliser.

    python -m benchmarks.step --workdir=runs/step
    python -m benchmarks.step --micro_batch_sizes=1,2,8,32,128 --torch \\
        --networks=cifar_resnet,resnet32,small_inception \\
        --dtypes=float32,bfloat16 --workdir=runs/step
    python -m benchmarks.step --networks=resnet50 --size=224 --workdir=runs/step50
    python -m benchmarks.step --networks=mask_rcnn_c4 --size=800 --batch_size=1 \\
        --micro_batch_sizes=1 --variants=flax,frozen_batch,kalman --workdir=runs/c4

Times the trainer's own step on random images, and inference by moving statistics, all
normalisers and micro-batch sizes in turn in one process: on a busy machine ratios hold,
times do not. Beside them stands what XLA says of the compiled step: operations, bytes,
fusions, memory. Ratios are to `flax`, which is `nn.BatchNorm` as Flax has it, at the
same micro-batch size; `batch` computes its variance in two centred passes, `ours` is
`KalmanNorm` with gain 1, which is batch norm by our own code, `kalman_scan` runs the
blocks of a stage as one `nn.scan`, and `NAME_remat` computes norms and activations
again in the backward pass. "of one batch" is the throughput as a
share of the same normaliser's at the largest micro-batch size: what independent
replicas cost. Prints a table and writes step.json.
"""

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import torch_step
from benchmarks.hlo import bytes_moved, count_fusions
from benchmarks.program import (
    BASELINE,
    SIZE,
    VARIANTS,
    compile_inference,
    configure,
)
from train import cli
from train.analysis.speed import Stepper, measure, prepare, ratio
from train.engine import workdir as wd

_VARIANTS = flags.DEFINE_list("variants", list(VARIANTS), f"Of {', '.join(VARIANTS)}.")
_NETWORKS = flags.DEFINE_list(
    "networks", "cifar_resnet", "Of kalman_flax.NETWORKS or kalman_flax.DETECTORS."
)
_BLOCKS = flags.DEFINE_integer("blocks", 3, "n of cifar_resnet, of 6n + 2 layers.")
_SIZE = flags.DEFINE_integer("size", 32, SIZE)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images per step.")
_MICRO_BATCH_SIZES = flags.DEFINE_list("micro_batch_sizes", "2,128", "Divisors of it.")
_DTYPES = flags.DEFINE_list("dtypes", "float32", "Of float32, bfloat16.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timings of each.", lower_bound=1)
_TORCH = flags.DEFINE_bool(
    "torch", False, "Time PyTorch's cifar_resnet and resnet50 too, if installed."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for step.json.")


class Program(NamedTuple):
    """A compiled step and inference, ready to run."""

    train: Callable[[], Any]
    infer: Callable[[], Any]
    facts: dict[str, float]


def compile_program(config: ConfigDict) -> Program:
    """Compiles the step and the inference of `config` for random images."""
    task, step, state, batch = prepare(config, _SIZE.value)
    lowered = step.lower(state, batch)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start

    inference = compile_inference(task, state, batch)
    train = Stepper(compiled, state, batch)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    facts = {
        "compile_seconds": compile_seconds,
        "flops": cost["flops"],
        "bytes": bytes_moved(compiled),
        "fusions": count_fusions(compiled.as_text()),
        "memory_bytes": memory.temp_size_in_bytes,
        "inference_flops": inference.cost_analysis()["flops"],
        "inference_fusions": count_fusions(inference.as_text()),
    }
    return Program(train, lambda: inference(train.state, batch), facts)


def compare(network: str, dtype: str, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Measures all variants at all micro-batch sizes; a row for each."""
    keys = dict(
        network=network,
        blocks_per_stage=_BLOCKS.value,
        batch_size=_BATCH_SIZE.value,
        dtype=dtype,
    )
    made = {
        (variant, size): compile_program(
            configure(variant, micro_batch_size=size, **keys)
        )
        for size in sizes
        for variant in _VARIANTS.value
    }
    steps = {key: program.train for key, program in made.items()}
    if _TORCH.value and network in torch_step.NETWORKS:
        shape = (_BATCH_SIZE.value, 3, _SIZE.value, _SIZE.value)
        steps["torch", max(sizes)] = torch_step.make(
            network, shape, _BLOCKS.value, dtype
        )
    train = measure(steps, _ROUNDS.value)
    infer = measure({key: p.infer for key, p in made.items()}, _ROUNDS.value)
    rows = []
    for (variant, size), seconds in train.items():
        of_whole = ratio(train[variant, max(sizes)], seconds)
        rows.append(
            {
                "variant": variant,
                "network": network,
                "dtype": dtype,
                "micro_batch_size": size,
                "step_seconds": float(np.median(seconds)),
                "step_ratio": ratio(seconds, train[BASELINE, size]),
                "share_of_one_batch": of_whole,
                "images_per_second": _BATCH_SIZE.value / float(np.median(seconds)),
            }
        )
        if program := made.get((variant, size)):
            inference = ratio(infer[variant, size], infer[BASELINE, size])
            rows[-1] |= {"inference_ratio": inference, **program.facts}
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown, with ratios to `BASELINE`."""
    lines = [
        "| variant | network | dtype | micro-batch | images/s | of one batch | step"
        " | quartiles | inference | flops | bytes | memory | fusions | compile |",
        "|" + "---|" * 14,
    ]
    bases = {r["micro_batch_size"]: r for r in rows if r["variant"] == BASELINE}
    for row in rows:
        base = bases[row["micro_batch_size"]]
        step, low, high = row["step_ratio"]
        cells = [row["variant"], row["network"], row["dtype"], row["micro_batch_size"]]
        cells += [f"{row['images_per_second']:.0f}"]
        cells += [f"{row['share_of_one_batch'][0]:.2f}", f"{step:.3f}"]
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
    if BASELINE not in _VARIANTS.value:
        raise ValueError(f"--variants must hold {BASELINE}, which the ratios are to.")
    sizes = [cli.micro_batch_size(size) for size in _MICRO_BATCH_SIZES.value]
    rows = []
    for network in _NETWORKS.value:
        for dtype in _DTYPES.value:
            compared = compare(network, dtype, sizes)
            print(table(compared), flush=True)
            rows += compared
    path = pathlib.Path(_WORKDIR.value)
    path.mkdir(parents=True, exist_ok=True)
    wd.write_json(path / "step.json", wd.provenance() | {"rows": rows})
    print(f"written: {path}/step.json")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("workdir")
    # A program of before would cost no time to compile.
    flags.FLAGS.set_default("compilation_cache", "off")
    cli.run(main)
