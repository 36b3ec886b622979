"""Why is option B below option A for batch norm even at micro-batch 128?

    python -m docs.results.cifar10_short.borders WORKDIR...

Tests finished runs on the test images as they are, and cropped and mirrored as the
training images were, black borders included. Prints JSON.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from train.experiment import build

from train import workdir as wd
from train.data import Split, augment, draw_crops


def main() -> None:
    """Evaluates each run on both versions of the test images."""
    rows = []
    for workdir in map(pathlib.Path, sys.argv[1:]):
        config = wd.read_config(workdir)
        experiment = build(config)
        with wd.open_checkpoints(workdir) as checkpoints:
            state = wd.restore(checkpoints, experiment.state)
        images, labels = experiment.test
        crops = draw_crops(
            jax.random.key(0), len(images), config.crop_padding, config.flip
        )
        cropped = np.asarray(augment(images, crops, config.crop_padding))
        for name, version in (("as they are", images), ("cropped", cropped)):
            result = experiment.evaluate(state, Split(version, labels))
            rows.append({"run": workdir.name, "test images": name, **result})
    print(json.dumps({**wd.provenance(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
