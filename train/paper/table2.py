"""Table 2 of the paper: the parameters of its networks, by normaliser."""

from __future__ import annotations

import csv
from typing import NamedTuple

import jax
import numpy as np

from kalman_flax import NETWORKS, normalization
from train.paper import printed
from train.paper.trained import Request
from train.studies.report import markdown

TITLE = "parameters of Inception-v2, ResNet-101 and ResNet-50 under BN, GN and KN"

#: Our networks, and what the paper calls them.
NETWORK_NAMES = {
    "inception_v2": "Inceptionv2",
    "resnet101": "ResNet101",
    "resnet50": "ResNet50",
}

#: Our normalisers: label, line of the paper, name. `kalman_paper` learns what the paper
#: counts, a gain q (learn_gain="scalar") and a diagonal R (noise="additive") per norm.
NORMALIZER_ROWS = (
    ("BN", "BN", "batch"),
    ("GN", "GN", "group"),
    ("KN, learned q and R", "KN", "kalman_paper"),
    ("KN, our default", "", "kalman"),
)

NOTE = (
    "KN of the paper learns a scalar gain q and a diagonal R, C + 1 parameters for a"
    " norm of C channels (our `kalman_paper`: learn_gain=scalar, noise=additive); our"
    " default `kalman` fixes q and has no R, so it counts as batch norm does."
)


class Row(NamedTuple):
    """A cell of the paper's table beside ours; `paper` is empty where it has none."""

    normalizer: str
    network: str
    parameters: int
    ours: str
    paper: str


def count(network: str, norm: str) -> int:
    """Returns the parameters of a network for 1,000 classes; computes only shapes."""
    net = NETWORKS[network](num_classes=1000, **normalization(norm)._asdict())
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    variables = jax.eval_shape(
        lambda images: net.init(jax.random.key(0), images, True), images
    )
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def rows() -> list[Row]:
    """Returns the table, normaliser by normaliser."""
    result = []
    for label, line, norm in NORMALIZER_ROWS:
        for network, column in NETWORK_NAMES.items():
            paper = printed.TABLE2.get((line, column), "")
            parameters = count(network, norm)
            ours = f"{parameters / 1e6:.2f}"
            result.append(Row(label, network, parameters, ours, paper))
    return result


def verdict(table: list[Row]) -> str:
    """Returns in one line how many of the paper's digits ours are."""
    compared = [row for row in table if row.paper]
    same = sum(row.ours == row.paper for row in compared)
    return f"{same} of {len(compared)} cells agree with the paper to its printed digits"


def reproduce(name: str, request: Request) -> None:
    """Counts, at any scale, prints the table and, given a workdir, writes NAME.csv.

    All printed digits are the paper's: the Inception-v2 with the widths of Ioffe and
    Szegedy (2015), no convolution before a norm with a bias, KN as `NOTE` says. The
    stride placement of the ResNets changes no parameter.
    """
    table = rows()
    print(markdown([("normaliser", "network", "parameters", "ours (M)", "paper (M)")]
                   + [(row.normalizer, row.network, f"{row.parameters:,}", row.ours,
                       row.paper or "-") for row in table]))  # fmt: skip
    print(f"{verdict(table)}.\n{NOTE}")
    if request.workdir is not None:
        request.workdir.mkdir(parents=True, exist_ok=True)
        with (request.workdir / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([Row._fields, *table])
