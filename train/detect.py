"""Draws what a trained detector finds on images.

    python -m train.detect --workdir=runs/scenes --images=DIR
    python -m train.detect --workdir=runs/scenes --images=photo.jpg --least_score=0.7

Needs the run, and not the data that it was trained on. Writes

    NAME.png         each image with boxes, classes, scores and masks
    detections.json  all of it in COCO's form, numbers unrounded and low scores as well

to --output, by default the folder detections in the run. Inference is by moving
statistics (option A).
"""

from absl import flags

from train import cli
from train.analysis.detections import draw_all, find, kind_of, restore
from train.data.picture_files import PictureFiles, find_images
from train.engine import workdir as wd
from train.engine.detection import scales
from train.engine.settings import check

DETECTIONS = "detections.json"

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_IMAGES = flags.DEFINE_string(
    "images", None, "A folder of images, or one image.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.")
_LEAST_SCORE = flags.DEFINE_float(
    "least_score",
    0.5,
    "Draw what has this score or more, from 0 to 1.",
    lower_bound=0.0,
    upper_bound=1.0,
)


def main() -> None:
    """Restores, looks, draws and writes."""
    workdir, least = cli.path(_WORKDIR), _LEAST_SCORE.value
    output = cli.path(_OUTPUT) or workdir / "detections"
    config = wd.read_config(workdir)
    check(config)
    kind_of(config)
    paths = find_images(cli.path(_IMAGES))
    files = PictureFiles(paths, scales(config)[1], config.max_pixels)
    _ = files.pictures  # what is no image is refused before the network is made
    task, state = restore(config, workdir)
    content = find(task, state, files)
    output.mkdir(parents=True, exist_ok=True)
    wd.write_json(output / DETECTIONS, content)
    drawn = draw_all(files, content, least, output)
    print(
        f"step {int(state.step)}: {len(content['annotations'])} objects on"
        f" {files.examples} images, {drawn} of them with a score of {least:g} or more"
    )
    print(f"written: {output}/{DETECTIONS}, and a .png of each image")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    cli.run(main)
