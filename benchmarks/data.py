"""How many images a core decodes, and how many cores a GPU needs for its ResNet-50.

    python -m benchmarks.data --workdir=runs/data

Makes JPEGs of 500 x 375 pixels, about the average of ImageNet in pixels and bytes, and
has them cut and resized at random to 224 x 224, as for training. Counts CPU time, not
that of the clock: on a busy machine, too, it says what a core of it can do. Then runs
the trainer's own reading ahead by the clock, with threads and with processes: that says
something only where nothing else runs. Prints both and writes data.json.
"""

import io
import os
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from absl import flags
from PIL import Image

from train import cli
from train.data.batches import Split
from train.data.encoded import Encoded
from train.engine import workdir as wd
from train.engine.feed import read_ahead

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for data.json.")
_IMAGES = flags.DEFINE_integer("images", 1000, "Decoded for a number.", lower_bound=32)

#: images a second of a ResNet-50 in training, for which cores are counted
RATES = (1000, 3000)
WIDTH, HEIGHT, SIZE = 500, 375, 224
BATCH = 32
DISTINCT = 64


class Jpegs(Sequence):
    """The same few JPEGs of smooth shapes and some noise again and again."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._files = []
        for _ in range(DISTINCT):
            shapes = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
            image = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
            noisy = image + random.normal(0.0, 8.0, image.shape)
            file = io.BytesIO()
            Image.fromarray(np.uint8(noisy.clip(0, 255))).save(file, "jpeg", quality=95)
            self._files.append(file.getvalue())

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, example: int) -> tuple[bytes, int, str]:
        return self._files[example % DISTINCT], 0, str(example)

    @property
    def mean_bytes(self) -> float:
        """Mean size of a file."""
        return float(np.mean([len(file) for file in self._files]))


def main() -> None:
    """Measures, prints and writes the file."""
    source = Jpegs()
    split = Encoded(source, SIZE, len(source))

    def read(step: int, rows: np.ndarray) -> Split:
        return split.read(step * BATCH + rows, key=(0, 0))

    batches, rows = _IMAGES.value // BATCH, np.arange(BATCH)
    read(0, rows)
    start = time.process_time()
    for step in range(batches):
        read(step, rows)
    per_core = batches * BATCH / (time.process_time() - start)
    print(f"JPEGs of {WIDTH} x {HEIGHT} pixels, {source.mean_bytes / 1e3:.0f} kB")
    print(f"{per_core:6.0f} images per second of CPU time, on one core")
    cores = {rate: rate / per_core for rate in RATES}
    for rate, needed in cores.items():
        print(f"{needed:6.1f} cores for a ResNet-50 at {rate} images/s")

    count = os.cpu_count() or 1
    by_clock = {}
    for name, workers in ((f"{count} threads", 0), (f"{count} processes", count)):
        ahead = read_ahead(read, rows, 0, workers)
        for _ in range(4 * count):  # starts them, and empties what they had ready
            next(ahead)
        start = time.perf_counter()
        for _ in range(batches):
            next(ahead)
        by_clock[name] = batches * BATCH / (time.perf_counter() - start)
        print(f"{by_clock[name]:6.0f} images/s by the clock, {name}", flush=True)

    path = pathlib.Path(_WORKDIR.value)
    path.mkdir(parents=True, exist_ok=True)
    found = {
        "jpeg_bytes": source.mean_bytes,
        "images_per_cpu_second": per_core,
        "cores_needed": cores,
        "images_per_second_by_clock": by_clock,
    }
    wd.write_json(path / "data.json", wd.provenance() | found)
    print(f"written: {path}/data.json")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("workdir")
    cli.run(main)
