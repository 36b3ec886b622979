"""Prints a table or figure of the paper beside ours.

    python -m train.reproduce --list
    python -m train.reproduce table2
    python -m train.reproduce table8 --scale=short --datasets=cifar10 --seeds=2 \\
        --workdir=runs/paper --data_dir=DIR
    python -m train.reproduce all --scale=smoke --workdir=runs/smoke

Trains what is missing. Finished runs are kept, also for other tables that have the same
run, and interrupted ones go on when the command runs again; another scale needs another
workdir. Writes NAME.csv, NAME.json (with command, hardware, versions) and NAME.png.

    full   the paper's networks, data and, where it says one, schedule: days on GPUs
    short  to fit a day on one GPU; on CIFAR-10 some 20 minutes a run on a CPU core
    smoke  two updates of a ResNet-8, which show that it runs; for the ImageNet networks
           thirty on one batch, slim but at their true depth, which show whether each
           learns; on the embedded digits where a data set is not there

table6, of detection, is at short and smoke another experiment: digit scenes in place of
COCO, a classifier of digits in place of one of ImageNet. At full it needs both:

    python -m train.reproduce table6 --data_dir=COCO --workdir=runs/coco \\
        --init_from=resnet50.safetensors,runs/resnet50_group

What a run has less than the paper's stands below the table, and in the files.
"""

from absl import flags

from kalman_flax import NETWORKS, normalization
from kalman_flax._filter.state import check_choice
from kalman_flax.registry import DETECTORS
from train import cli
from train.data.sets import DATASETS
from train.paper import REPRODUCTIONS, reproduce_all
from train.paper.scale import SCALES
from train.paper.trained import Request

ALL = "all"

_LIST = flags.DEFINE_bool("list", False, "Say which tables and figures there are.")
_SCALE = flags.DEFINE_enum("scale", "full", SCALES, "How large; see above.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs of each network.", lower_bound=1)
_DATASETS = flags.DEFINE_list(
    "datasets", None, "Train only on these; what needs others stays empty."
)
_NETWORKS = flags.DEFINE_list(
    "networks", None, "Train only these of the paper's, e.g. resnet32; likewise."
)
_NORMS = flags.DEFINE_list(
    "norms", None, "Train only with these normalisers, e.g. batch,kalman_wc; likewise."
)
_MICRO_BATCH_SIZES = flags.DEFINE_list(
    "micro_batch_sizes", None, "Train only with micro-batches of these; likewise."
)
_INIT_FROM = flags.DEFINE_list(
    "init_from",
    [],
    "Of table6 at full scale: a ResNet-50 pre-trained with batch norm, and another with"
    " group norm; see docs/fine-tuning.md.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of runs and tables.")


def main(name: str = "") -> None:
    """Lists the tables and figures, or reproduces the one of that name, or all."""
    if _LIST.value:
        for known, reproduction in REPRODUCTIONS.items():
            print(f"{known}: {reproduction.title}")
        return
    check_choice("the table or figure", name, (*REPRODUCTIONS, ALL))
    for dataset in _DATASETS.value or ():
        check_choice("datasets", dataset, (*DATASETS, "coco"))
    for network in _NETWORKS.value or ():
        check_choice("networks", network, (*NETWORKS, *DETECTORS))
    for norm in _NORMS.value or ():
        normalization(norm)  # says which there are
    sizes = _MICRO_BATCH_SIZES.value
    request = Request(
        _SCALE.value,
        _SEEDS.value,
        cli.path(_WORKDIR),
        cli.DATA_DIR.value,
        _DATASETS.value,
        _NETWORKS.value,
        _NORMS.value,
        None if sizes is None else [cli.micro_batch_size(size) for size in sizes],
        _INIT_FROM.value,
    )
    if name == ALL:
        reproduce_all(request, REPRODUCTIONS)
    else:
        REPRODUCTIONS[name].reproduce(name, request)


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    cli.run(main, positional=1)
