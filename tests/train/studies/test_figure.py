"""What the pictures of a comparison show."""

import types

import numpy as np
import pytest
from matplotlib import pyplot as plt

from train.paper import picture
from train.paper.result import Result
from train.studies import figure
from train.studies.report import Run


def run(norm, micro, accuracy, seed=0, tests=3, **summary):
    metrics = [{"step": 10 * i, "train_loss": 1.0} for i in range(1, 4)]
    for line in metrics[-tests:]:
        line["test_moving_accuracy"] = accuracy
    facts = {"variant": norm, "norm": norm, "micro_batch_size": micro, "seed": seed}
    results = {"test_moving_accuracy": accuracy, "test_batch_accuracy": accuracy - 0.1}
    return Run(facts | results | summary, metrics)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws, and returns the axes."""
    monkeypatch.setattr(plt, "close", lambda *_: None)

    def draw(*runs):
        figure.plot(tmp_path / "comparison.png", runs)
        assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
        return plt.gcf().axes

    yield draw
    monkeypatch.undo()
    plt.close("all")


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_by_micro_batch_size_ours_batch_norm_and_the_best_rivals_have_names(drawn):
    accuracies = {"kalman": 0.6, "kalman_wc": 0.7, "batch": 0.1, "bad": 0.2}
    accuracies |= {"good": 0.5, "better": 0.55}
    runs = [
        run(norm, micro, accuracy + 0.01 * seed, seed)
        for norm, accuracy in accuracies.items()
        for micro in (1, 8)
        for seed in (0, 1)
    ]
    (axis,) = drawn(*runs)  # 12 rows have no curves
    assert texts(axis) == ["batch", "good", "better", "kalman_wc"]  # by height
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "8"]
    assert axis.get_legend().get_texts()[0].get_text() == "2 others"
    (ours,) = (bars for bars in axis.containers if bars[0].get_color() == "#D55E00")
    np.testing.assert_allclose(ours[0].get_ydata(), [70.5, 70.5])
    (bar,) = ours[2]
    deviation = 100 * np.std([0.7, 0.71], ddof=1)
    ends = np.array(bar.get_segments())[:, :, 1]
    np.testing.assert_allclose(np.diff(ends), 2 * deviation)


def test_of_two_the_gap_is_the_title(drawn):
    dots, curves = drawn(run("batch", 1, 0.57), run("kalman", 1, 0.94))
    assert dots.get_title("left") == "Test accuracy: kalman 37.0 points above batch"
    assert texts(dots) == ["94.0%", "57.0%"]
    assert [label.get_text() for label in dots.get_yticklabels()] == ["kalman", "batch"]
    assert sorted(texts(curves)) == ["batch", "kalman"]
    assert curves.get_ylabel() == "test accuracy (%)"


def test_curves_are_of_the_loss_where_there_is_one_test(drawn):
    _, curves = drawn(run("batch", 1, 0.57, tests=1), run("kalman", 1, 0.94, tests=1))
    assert curves.get_ylabel() == "training loss"


def test_up_to_eight_have_curves_and_all_are_sorted(drawn):
    runs = [run(f"norm{i}", 2, 0.1 * i) for i in range(8)]
    dots, curves = drawn(*runs)
    names = [label.get_text() for label in dots.get_yticklabels()]
    assert names == [f"norm{i}" for i in reversed(range(8))]
    assert len(curves.lines) == 8
    (dots,) = drawn(*runs, run("norm8", 2, 0.8))
    assert len(dots.get_yticklabels()) == 9


def test_runs_that_diverged_leave_no_empty_panel(drawn):
    lost = Run({"variant": "a", "micro_batch_size": 2, "diverged": True}, [])
    dots, _ = drawn(lost, run("batch", 2, 0.5))
    assert [label.get_text() for label in dots.get_yticklabels()] == ["batch"]
    (axis,) = drawn(lost)
    assert axis.get_title("left") == "Test accuracy: every run diverged"


def test_another_task_is_compared_by_its_own_metric(drawn):
    runs = [
        Run(
            {
                "variant": norm,
                "norm": norm,
                "micro_batch_size": 1,
                "headline": "test_moving_miou",
                "test_moving_miou": miou,
                "test_batch_miou": miou,
            },
            [],
        )
        for norm, miou in (("batch", 0.2), ("kalman", 0.3))
    ]
    (dots,) = drawn(*runs)
    assert dots.get_title("left") == "Test miou: kalman 10.0 points above batch"
    with pytest.raises(ValueError, match="compared by different metrics"):
        drawn(*runs, run("batch", 1, 0.5))


def test_names_at_ends_keep_their_distance(drawn):
    _, axis = plt.subplots()
    axis.set_ylim(0, 1)
    figure.names_at_ends(axis, [(0.5, "b", "k"), (0.5, "a", "k"), (0.98, "c", "k")])
    heights = sorted(text.xy[1] for text in axis.texts)
    np.testing.assert_allclose(heights, [0.475, 0.525, 0.98])


def test_paper_beside_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda *_: None)
    reduced = "4 of 400 epochs"
    results = [
        Result("BN", "acc", "91.2", "accuracy (%)", [54.0], reduced=reduced),
        Result("BN, ours", "acc", "91.2", "accuracy (%)", [67.0], reduced=reduced),
        Result("GN", "acc", "91.3", "accuracy (%)"),  # not run
        Result("BN - GN", "acc", "1.5", "accuracy (%)", [-1.0], reduced=reduced),
    ]
    series = {"BN": types.SimpleNamespace(runs=[])}
    curve = picture.Curve("test_moving_accuracy", "test")
    picture.plot(tmp_path / "figure.png", results, series, curve)
    ours, differences = plt.gcf().axes  # no panel of curves: there are none
    crosses = [line for line in ours.lines if line.get_marker() == "x"]
    assert [x for line in crosses for x in line.get_xdata()] == [91.2]
    assert [text.get_text() for text in ours.get_yticklabels()] == ["BN", "BN, ours"]
    assert differences.get_title("left") == "Differences"
    assert differences.get_xlabel() == "points"
    assert plt.gcf().get_supxlabel() == f"Ours was reduced: {reduced}"
    monkeypatch.undo()
    plt.close("all")
