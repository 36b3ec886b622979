"""The paper's tables and figures.

Those of networks to be trained are declared, see `Trained`; others are a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from train.paper import cifar, figure5, imagenet, table2, table3, table6
from train.paper.trained import Request, Trained


class Reproduction(NamedTuple):
    """A table or figure that is a module.

    Attributes:
        title: what ``--list`` shows.
        reproduce: called with its name and a `Request`, prints what the paper has
            beside ours and, given a workdir, writes it there.
    """

    title: str
    reproduce: Callable[[str, Request], None]


#: By name, in the paper's order.
REPRODUCTIONS: dict[str, Trained | Reproduction] = {
    "table1": imagenet.TABLE1,
    "table2": Reproduction(table2.TITLE, table2.reproduce),
    "table3": Reproduction(table3.TITLE, table3.reproduce),
    "table4": imagenet.TABLE4,
    "table5": imagenet.TABLE5,
    "table6": Reproduction(table6.TITLE, table6.reproduce),
    "table7": cifar.TABLE7,
    "table8": cifar.TABLE8,
    "figure3": imagenet.FIGURE3,
    "figure4": cifar.FIGURE4,
    "figure5": Reproduction(figure5.TITLE, figure5.reproduce),
}


def reproduce_all(
    request: Request, reproductions: Mapping[str, Trained | Reproduction]
) -> None:
    """Reproduces one after the other; what misses its data does not stop the others.

    Raises:
        FileNotFoundError: at the end, if data was missing for any.
    """
    missing = []
    for name, each in reproductions.items():
        print(f"\n{name}: {each.title}", flush=True)
        try:
            each.reproduce(name, request)
        except FileNotFoundError as error:
            print(f"not run: {error}", flush=True)
            missing.append(name)
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} not run, for want of data: see above."
        )
