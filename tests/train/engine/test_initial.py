"""Runs that start from another run, an export, or published weights."""

import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.train.common import REAL, build, tiny_config
from train.engine import initial, loop
from train.engine import workdir as wd
from train.engine.settings import check

NOWHERE = pathlib.Path("no", "such", "run")


def flat(state):
    return traverse_util.flatten_dict(
        {"params": state.params, "batch_stats": state.batch_stats}, sep="/"
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Workdirs by normaliser, as runs leave them, no variable where it starts."""

    made = {}

    def workdir(norm, **options):
        name = norm if not options else f"{norm} {options}"
        if name not in made:
            config = tiny_config(norm=norm, seed=3, **options)
            state = build(config).state
            state = jax.tree.map(
                lambda x: x + 0.25 if jnp.issubdtype(x.dtype, jnp.floating) else x,
                state,
            )
            state = state.replace(step=state.step + 8)
            made[name] = tmp_path_factory.mktemp(norm), state
            wd.claim(made[name][0], config)
            with wd.open_checkpoints(made[name][0]) as checkpoints:
                wd.save(checkpoints, 8, state)
        return made[name]

    return workdir


def started(**keys):
    config = tiny_config(**keys)
    fresh = build(config)
    return flat(fresh.state), flat(initial.loaded(config, fresh, NOWHERE).state)


@pytest.mark.parametrize("norm, options, own", [
    ("kalman", {"decay_steps": 3, "learn_gain": "scalar"}, {"steps", "gain"}),
    ("frozen_batch", {}, set()),
    pytest.param("batch_renorm", {}, {"steps"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_batch_norm_run_starts_what_infers_as_it_does(
    pretrained, capsys, norm, options, own
):
    workdir, saved = pretrained("batch")
    fresh, loaded = started(norm=norm, norm_options=options, init_from=str(workdir))
    assert {path.split("/")[-1] for path in loaded.keys() - flat(saved)} == own
    for path, leaf in loaded.items():
        source = flat(saved).get(path, fresh[path])
        np.testing.assert_array_equal(leaf, source, err_msg=path)
    assert capsys.readouterr().err == f"17 arrays come from {workdir}, step 8\n"


def test_counts_begin_anew(pretrained):
    options = {"decay_steps": 3}
    workdir, saved = pretrained("kalman", norm_options=options)
    assert flat(saved)["batch_stats/stem_norm/steps"] == 0.25
    _, loaded = started(norm="kalman", norm_options=options, init_from=str(workdir))
    assert loaded["batch_stats/stem_norm/steps"] == 0
    assert loaded["batch_stats/stem_norm/mean"][0] == 0.25


def test_new_heads_are_left_out_and_said(pretrained, capsys):
    workdir, saved = pretrained("batch", **REAL)
    keys = {"norm": "batch", "init_from": str(workdir), "classes": (5, 6, 7)} | REAL
    fresh, loaded = started(**keys)
    for name in ("kernel", "bias"):
        path = f"params/head/{name}"
        np.testing.assert_array_equal(loaded[path], fresh[path])
    path = "params/stem/kernel"
    np.testing.assert_array_equal(loaded[path], flat(saved)[path])
    said = capsys.readouterr().err
    assert "head/kernel: [16, 10] in the checkpoint, [16, 3] here: kept as init" in said
    with pytest.raises(ValueError, match=r"head/bias: \[10\] in the checkpoint, \[3\]"):
        started(**keys, new_layers=())


@pytest.mark.parametrize("source, norm, why", [
    ("batch", "kalman_wc", "treats kernels otherwise.*such as 'kalman'"),
    pytest.param("batch", "kalman_ws", "treats kernels otherwise.*such as 'kalman'",
                 marks=pytest.mark.slow),
    ("kalman_wc", "frozen_batch", "treats kernels.*such as 'frozen_batch_wc'"),
    ("group", "batch", "trained with norm 'group', and 'batch' infers otherwise"),
    ("batch", "group", "'group' infers otherwise"),
    pytest.param("group", "proxy_group", "'proxy_group' infers otherwise",
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_what_would_compute_something_else_is_refused(pretrained, source, norm, why):
    workdir, _ = pretrained(source)
    config = tiny_config(norm=norm, init_from=str(workdir))
    checkpoint = initial.read(config.init_from, build(config).mesh)
    with pytest.raises(ValueError, match=why):
        initial.training_only(checkpoint, config, checkpoint.variables)


def test_another_network_is_refused_with_what_differs(pretrained):
    workdir, _ = pretrained("batch")
    with pytest.raises(ValueError) as error:
        started(norm="batch", blocks_per_stage=2, init_from=str(workdir))
    text = str(error.value)
    assert "blocks_per_stage is 1 there, 2 here" in text
    assert "stage1_block2/conv1/kernel: not in the checkpoint" in text
    assert "\n  and " in text and text.count("\n") == 8


def test_an_export_has_kernels_as_they_are_used(pretrained, tmp_path):
    """As train.export writes it, of centred kernels: plain norms may start from it."""
    workdir, saved = pretrained("kalman_wc")
    stats = {
        path: np.asarray(leaf)
        for path, leaf in flat(saved).items()
        if not path.endswith("steps")
    }
    path = tmp_path / "variables.npz"
    np.savez(path, **stats, **{"standardize/mean": np.zeros(1)})
    config = wd.read_config(workdir)
    wd.write_json(tmp_path / "metadata.json", {"config": config.to_dict()})
    _, loaded = started(norm="kalman", init_from=str(path))
    np.testing.assert_array_equal(
        loaded["params/stem/kernel"], stats["params/stem/kernel"]
    )
    (tmp_path / "metadata.json").unlink()
    started(norm="frozen_batch", init_from=str(path))  # its statistics tell enough
    groups = {p: leaf for p, leaf in stats.items() if p.startswith("params")}
    np.savez(path, **groups)
    with pytest.raises(ValueError, match=r"no metadata\.json beside"):
        started(norm="group", init_from=str(path))


def test_a_name_that_is_close_is_shown():
    there = {("params", "head", "kernel"), ("params", "stem_conv", "kernel")}
    text = initial._nearest(("params", "stem", "kernel"), there)
    assert text == "; the nearest is stem_conv/kernel"
    assert not initial._nearest(("batch_stats", "stem", "mean"), there)


def test_calibration_begins_as_the_checkpoint_normalises(pretrained):
    """By gain 0 a training pass normalises as frozen batch norm does."""
    workdir, _ = pretrained("batch")
    frozen = tiny_config(norm="frozen_batch", init_from=str(workdir))
    seeded = tiny_config(
        norm="kalman",
        norm_options={"calibrate": "both", "gain": 0.0},
        init_from=str(workdir),
    )
    logits = []
    for config in (frozen, seeded):
        experiment = initial.loaded(config, build(config), NOWHERE)
        images = np.asarray(experiment.task.train.images[:4], np.float32) / 8 - 1
        train = functools.partial(
            experiment.task.network.apply,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        logits.append(jax.jit(train)(experiment.state.variables, images)[0])
    np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-3)


def test_new_layers_are_not_seeded(pretrained, monkeypatch):
    """Their running statistics, 0 and 1, say nothing."""
    workdir, _ = pretrained("batch")
    whole = initial.read(str(workdir), build(tiny_config()).mesh)
    new = "stage2_block1"
    known = {path: leaf for path, leaf in whole.variables.items() if new not in path}
    monkeypatch.setattr(initial, "read", lambda *_: whole._replace(variables=known))
    monkeypatch.setattr(
        initial, "seed_calibration", lambda _, variables, *__: jax.tree.map(
            lambda leaf: leaf + 1, variables
        )
    )  # fmt: skip
    fresh, loaded = started(
        norm="kalman",
        norm_options={"calibrate": "both"},
        new_layers=(f"{new}/*", "head/*"),
        init_from=str(workdir),
    )
    corrections = {path for path in loaded if path.split("/")[-1] in initial.CORRECTION}
    moved = {p.split("/")[1] for p in corrections if (loaded[p] != fresh[p]).any()}
    assert moved == {p.split("/")[1] for p in corrections} - {new}


def test_what_is_not_there(tmp_path):
    for path, why in (("none", "init_from is none, which is not there"),
                      (str(tmp_path), r"no config\.json")):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=why):
            started(init_from=path)


def test_frozen_statistics_have_to_come_from_somewhere():
    for norm in ("frozen_batch", "frozen_batch_ws"):
        with pytest.raises(
            ValueError, match=r"normalises nothing.*--config\.init_from"
        ):
            check(tiny_config(norm=norm))
        check(tiny_config(norm=norm, init_from="runs/pretrained"))


def test_a_run_reads_it_once(tmp_path):
    """At rate 0 it ends where it starts; resumed, it has no need of the other run."""
    keys = {
        "task": "mean_pixel",
        "plugins": ("tests.train.engine.toy",),
        "epochs": 1,
        "freeze": ("Dense_0/*",),
    }
    first, second = tmp_path / "first", tmp_path / "second"
    loop.train(tiny_config(**keys, learning_rate=0.1), first)
    config = tiny_config(**keys, learning_rate=0.0, seed=1, init_from=str(first))
    summary = loop.train(config, second)
    states = [
        wd.last_checkpoint(folder, build(config).state) for folder in (first, second)
    ]
    for a, b in zip(*(jax.tree.leaves(state.params) for state in states)):
        np.testing.assert_array_equal(a, b)
    shutil.rmtree(first)
    (second / "summary.json").unlink()
    assert loop.train(config, second)["test_error"] == summary["test_error"]
    with pytest.raises(FileNotFoundError, match="which is not there"):
        loop.train(config, tmp_path / "third")
    assert not (tmp_path / "third").exists()
