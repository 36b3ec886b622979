"""`train.export`: what it writes runs without this project, and gives the same."""

import json
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from flax import traverse_util
from sklearn.datasets import load_digits

import kalman_flax as kf
from tests.inference.test_checkpoint import IMAGES, variables_of
from tests.reference.plain_resnet import PlainResNet
from tests.train.command import run
from tests.train.common import REAL, build, tiny_config
from train.analysis import stablehlo as artifact
from train.engine import workdir as wd
from train.engine.classification import infer
from train.engine.loop import train

DIGITS = load_digits().images[..., None]
TEST = DIGITS[1500:1505].astype(np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with centred kernels, its own logits of five images, and its export."""
    root = tmp_path_factory.mktemp("export")
    config = tiny_config(**REAL, norm="kalman_wc", epochs=1)
    train(config, root / "run")
    out = run("train.export", f"--workdir={root}/run", f"--output={root}/exported")
    assert "written: " in out
    experiment = build(config)
    state = wd.last_checkpoint(root / "run", experiment.state)
    # Standardised by hand: by the mean and deviation of the training images.
    images = (TEST - DIGITS[:64].mean()) / DIGITS[:64].std()
    network, variables = experiment.task.network, jax.device_get(state.variables)
    logits = jax.jit(lambda images: infer(network, variables, images))(images)
    return root / "exported", images, np.asarray(logits)


def test_the_snippet_of_the_documents_runs_without_this_project(exported):
    folder, _, expected = exported
    page = pathlib.Path("docs/export.md").read_text()
    [snippet] = re.findall(
        r"^```python\n((?:(?!^```).)*?jax\.export.*?)^```", page, re.M | re.S
    )
    program = snippet + textwrap.dedent("""
        import sys
        ours = {"kalman_flax", "train", "flax", "orbax"} & set(sys.modules)
        assert not ours, ours
        images = np.load("images.npy")
        np.savez("logits.npz", *(infer(images[:n]) for n in (5, 2)))
    """)
    np.save(folder.parent / "images.npy", TEST)
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    five, two = np.load(folder.parent / "logits.npz").values()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(five, expected, atol=1e-5 * scale)
    np.testing.assert_allclose(two, expected[:2], atol=1e-5 * scale)


def test_the_variables_run_in_plain_flax(exported):
    folder, images, expected = exported
    with np.load(folder / "variables.npz") as file:
        variables = traverse_util.unflatten_dict(dict(file), sep="/")
    standardize = variables.pop("standardize")
    found = (TEST - standardize["mean"]) / standardize["scale"]
    np.testing.assert_allclose(found, images, rtol=1e-5)
    plain = PlainResNet(num_classes=10, blocks_per_stage=1, width=4)
    logits = plain.apply(variables, images, True)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), images, True))
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)  # nothing else


def test_what_the_metadata_say(exported):
    folder, _, _ = exported
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["input"]["shape"] == ["batch", 8, 8, 1]
    assert metadata["output"]["shape"] == ["batch", 10]
    assert metadata["classes"] == list("0123456789")
    assert metadata["network"]["platforms"] == ["cpu", "cuda", "tpu"]
    assert metadata["variables"]["norm"] == "flax.linen.BatchNorm(epsilon=1e-05)"
    assert metadata["config"]["norm"] == "kalman_wc"
    run_dir = pathlib.Path(metadata["run"])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (metadata["step"], metadata["test"]["images"]) == (8, 297)
    for name in ("accuracy", "top5_accuracy"):
        expected = summary[f"test_moving_{name}"]
        np.testing.assert_allclose(metadata["test"][name], expected, atol=0.005)
    assert summary["versions"].items() <= metadata["versions"].items()


def test_an_export_is_not_overwritten(exported, tmp_path):
    folder, _, _ = exported
    arguments = (f"--workdir={tmp_path}", f"--output={folder}")
    out = run("train.export", *arguments, status=1)
    assert out == f"error: {folder} is not empty; choose another --output.\n"


@pytest.mark.parametrize(
    "name, norm",
    [
        ("batch_renorm", "BatchNorm(epsilon=1e-05)"),  # has a step counter too
        ("group_ws", "GroupNorm(num_groups=4, group_size=None, epsilon=1e-06)"),
        ("evonorm_b0", None),
        ("weight", None),
    ],
)
def test_which_normalisers_there_is_a_layer_of_flax_for(name, norm):
    network = kf.models.ResNet(
        num_classes=3, blocks_per_stage=1, width=4, **kf.normalization(name)._asdict()
    )
    plain = artifact.plain_variables(network, variables_of(network), IMAGES)
    assert (plain and plain.norm) == (norm and f"flax.linen.{norm}")
