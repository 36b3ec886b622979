"""What a training step is on a GPU or TPU, compiled on a machine that has none.

    pip install libtpu
    python -m benchmarks.accelerator --target=tpu --workdir=runs/tpu

    pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
    python -m benchmarks.accelerator --target=gpu --workdir=runs/gpu
    python -m benchmarks.accelerator --target=gpu --workdir=runs/gpu_c4 \\
        --network=mask_rcnn_c4 --size=800 --batch_size=1 --micro_batch_sizes=1 \\
        --variants=flax,frozen_batch,group,kalman

(libtpu in the version that `pip show jax` asks for, the plugins in that of jax.) XLA
compiles the trainer's own step for one core of a TPU v5e, or for an H100. That says how
much memory it moves and holds, in how many kernels, and how long compiling takes; times
only the device itself can tell. Kernels count as on the CPU: fusions, products,
convolutions. Ratios are to `flax`, see `benchmarks.step`. "bytes" are XLA's count on a
TPU; on a GPU, where it has none, those that enter and leave kernels. Without cuDNN
at hand XLA does not choose its algorithms, the same for all normalisers. Prints a
table and writes accelerator.json. Compiling for a TPU takes minutes a program.
"""

import functools
import os
import pathlib
import time
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from benchmarks.hlo import bytes_moved, bytes_of_kernels, count_fusions
from benchmarks.program import BASELINE, SIZE, VARIANTS, configure
from train import cli
from train.analysis.speed import at_constant_rate, prepare
from train.engine import workdir as wd
from train.engine.mesh import SAME, SPLIT, make_mesh
from train.engine.optimizer import make_optimizer
from train.engine.step import make_update

TARGETS = ("tpu", "gpu")
_TARGET = flags.DEFINE_enum("target", "tpu", TARGETS, "What to compile for.")
_VARIANTS = flags.DEFINE_list("variants", "flax,kalman", f"Of {', '.join(VARIANTS)}.")
_NETWORK = flags.DEFINE_string(
    "network", "cifar_resnet", "Of kalman_flax.NETWORKS or kalman_flax.DETECTORS."
)
_BLOCKS = flags.DEFINE_integer("blocks", 3, "n of cifar_resnet, of 6n + 2 layers.")
_SIZE = flags.DEFINE_integer("size", 32, SIZE)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images per step.")
_MICRO_BATCH_SIZES = flags.DEFINE_list("micro_batch_sizes", "2,128", "Divisors of it.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for accelerator.json.")

#: The machine that XLA is to plan for, in its own terms; NVIDIA's data sheet has them.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 7 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def device(target: str) -> jax.Device:
    """Returns a device of that kind, which can be compiled for and does not run.

    Raises:
        FileNotFoundError: the compiler for it is not installed.
    """
    try:
        if target == "tpu":
            return topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
        topology = topologies.get_topology_desc(
            "", "cuda", topology="1x1x1", target_config=H100
        )
        return topology.devices[0]
    except (RuntimeError, NotImplementedError) as error:
        raise FileNotFoundError(
            f"no compiler for a {target} ({error}); --help says what to install."
        ) from error


def lower(config: ConfigDict, device: jax.Device) -> Any:
    """Lowers the training step of `config` for `device`."""
    task, _, state, batch = prepare(config, _SIZE.value)
    mesh = make_mesh(1, [device])
    optimizer = functools.partial(make_optimizer, config)
    update = make_update(task, optimizer, config, mesh)
    # As `jit_update`, without the options of the CPU that this runs on.
    update = at_constant_rate(config, update, jax.random.key(0))
    step = jax.jit(update, donate_argnums=0)
    return step.lower(_placed(state, mesh, SAME), _placed(batch, mesh, SPLIT))


def _placed(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """The shapes of `tree`, as if it lay on `mesh`."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def facts(config: ConfigDict, target: str) -> dict[str, float]:
    """Compiles the training step of `config` and returns what the program does."""
    options = {"xla_gpu_autotune_level": "0"} if target == "gpu" else {}
    lowered = lower(config, device(target))
    start = time.process_time()
    compiled = lowered.compile(compiler_options=options)
    hlo = compiled.as_text()
    return {
        "compile_cpu_seconds": time.process_time() - start,
        "bytes": bytes_of_kernels(hlo) if target == "gpu" else bytes_moved(compiled),
        "memory_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": count_fusions(hlo),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown, with ratios to `BASELINE`."""
    lines = [
        "| variant | micro-batch | bytes, MB | | memory, MB | | kernels | compile |",
        "|" + "---|" * 8,
    ]
    bases = {r["micro_batch_size"]: r for r in rows if r["variant"] == BASELINE}
    for row in rows:
        base = bases[row["micro_batch_size"]]
        cells = [row["variant"], str(row["micro_batch_size"])]
        for key in ("bytes", "memory_bytes"):
            cells += [f"{row[key] / 1e6:.0f}", f"{row[key] / base[key]:.3f}"]
        cells += [str(row["kernels"])]
        cells += [f"{row['compile_cpu_seconds'] / base['compile_cpu_seconds']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compiles, prints and writes."""
    if BASELINE not in _VARIANTS.value:
        raise ValueError(f"--variants must hold {BASELINE}, which the ratios are to.")
    jax.config.update("jax_platforms", "cpu")
    device(_TARGET.value)
    keys = dict(
        network=_NETWORK.value,
        blocks_per_stage=_BLOCKS.value,
        batch_size=_BATCH_SIZE.value,
        dtype=_DTYPE.value,
    )
    rows = []
    for size in map(cli.micro_batch_size, _MICRO_BATCH_SIZES.value):
        for variant in _VARIANTS.value:
            config = configure(variant, micro_batch_size=size, **keys)
            row = {"variant": variant, "micro_batch_size": size}
            rows.append(row | facts(config, _TARGET.value))
    print(table(rows))
    path = pathlib.Path(_WORKDIR.value)
    path.mkdir(parents=True, exist_ok=True)
    found = {"target": device(_TARGET.value).device_kind, **keys, "rows": rows}
    wd.write_json(path / "accelerator.json", wd.provenance() | found)
    print(f"written: {path}/accelerator.json")


if __name__ == "__main__":
    # There is no device to agree with the libraries, or to ask for its neighbours.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("workdir")
    # A program of before would cost no time to compile.
    flags.FLAGS.set_default("compilation_cache", "off")
    cli.run(main)
