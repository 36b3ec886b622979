"""A run knows its data again, and is used on no other."""

import json
import logging
import shutil

import pytest

from tests.reference.slow import few_quick
from tests.train.command import run
from tests.train.common import tiny_config
from tests.train.data.pictures import put
from tests.train.tfds_data import picture
from train.analysis import moments
from train.engine import trained_on
from train.engine.experiment import build
from train.engine.loop import train

CONFIG = tiny_config(
    dataset="folder",
    train_examples=0,
    image_size=32,
    norm="kalman",
    batch_size=8,
    micro_batch_size=4,
    epochs=1,
    eval_batch_size=8,
)


def add(root, place, number=0):
    put(root / f"{place}.png", picture(number))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Images in data/ and a run of them in run/."""
    folder = tmp_path_factory.mktemp("trained")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(4):
                add(folder / "data", f"{split}/{name}/{i}", i)
    train(CONFIG, folder / "run", str(folder / "data"))
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """The same, to be changed, elsewhere; the run is to be gone on with."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path


def rename_class(data):
    for split in ("train", "val"):
        (data / split / "cat").rename(data / split / "eel")


def add_class(data):
    for split in ("train", "val"):
        add(data, f"{split}/eel/0")


CHANGES = {
    "class 0 was 'cat', is 'dog'; class 1 was 'dog', is 'eel'": rename_class,
    "there were 2 classes, there are 3; 'eel' came": add_class,
    "train had 8 images, has 9": lambda data: add(data, "train/cat/9"),
    "test has as many images, but others": lambda data: add(data, "val/cat/1", 50),
}


@pytest.mark.parametrize("said", few_quick(CHANGES, [*CHANGES][:2]))
def test_other_data_is_refused(copy, said):
    CHANGES[said](copy / "data")
    before = sorted(copy.rglob("*"))
    data, workdir = str(copy / "data"), copy / "run"
    match = f"^the data is not what the run was trained on: {said}"
    with pytest.raises(ValueError, match=match):
        train(CONFIG, workdir, data)
    with pytest.raises(ValueError, match=match):  # evaluate and export
        trained_on.last_state(workdir, build(CONFIG, data))
    with pytest.raises(ValueError, match=match):  # statistics
        moments.restore(workdir, data)
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_commands_refuse_in_one_line(copy, command):
    rename_class(copy / "data")
    output = [f"--output={copy}/exported"] if command == "export" else []
    where = f"--workdir={copy}/run", f"--data_dir={copy}/data"
    said = run(f"train.{command}", *where, *output, status=1)
    line = said.splitlines()[-1]
    assert line.startswith("error: the data is not what the run was trained on: class")
    assert "Traceback" not in said and not (copy / "exported").exists()


def test_the_same_data_elsewhere_will_do(copy):
    (copy / "data").rename(copy / "moved")
    assert train(CONFIG, copy / "run", str(copy / "moved"))["steps"] == 1
    experiment, _ = moments.restore(copy / "run", str(copy / "moved"))
    assert int(experiment.state.step) == 1


def test_a_run_of_before_is_used_with_a_warning(copy, caplog):
    (copy / "run" / "data.json").unlink()
    with caplog.at_level(logging.WARNING):
        trained_on.last_state(copy / "run", build(CONFIG, str(copy / "data")))
    assert "nothing says whether the run was trained on the data" in caplog.text
    train(CONFIG, copy / "run", str(copy / "data"))
    assert (copy / "run" / "data.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": {}}', '{"images": 3}'])
def test_a_damaged_description(copy, content):
    (copy / "run" / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.json is dam|description is dam"):
        train(CONFIG, copy / "run", str(copy / "data"))


def test_bad_images_claim_no_workdir(copy):
    (copy / "data" / "val" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 16 .*\n.*val/dog/1\.png"):
        train(CONFIG, copy / "new", str(copy / "data"))
    assert not (copy / "new").exists()


def test_files_that_were_opened_are_remembered(trained):
    kept = json.loads((trained / "run" / "data.json").read_text())
    assert sorted(kept["files"]) == ["train/cat", "train/dog", "val/cat", "val/dog"]
