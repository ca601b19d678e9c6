"""src/training/calibration.py and plots.py: the temperature, the calibration error, the pictures of a run."""

import csv
import warnings

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from src.training.calibration import expected_calibration_error, fit_temperature
from src.training.plots import plot_confusion, plot_history, save_confusion_pairs, save_history


@pytest.fixture(scope="module")
def calibrated():
    """Logits float64 (20000, 5) and labels drawn from their own softmax."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    labels = (softmax(logits, axis=1).cumsum(1) > rng.random((20_000, 1))).argmax(1)
    return logits, labels


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_temperature_undoes_a_factor(calibrated, factor):
    logits, labels = calibrated
    assert fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.05)


def test_temperature_lowers_the_calibration_error(calibrated):
    logits, labels = calibrated
    before = expected_calibration_error(softmax(logits * 3, axis=1), labels)
    after = expected_calibration_error(softmax(logits * 3 / fit_temperature(logits * 3, labels), axis=1), labels)
    assert before > 0.1
    assert after < 0.02


def test_temperature_of_huge_logits_is_finite():
    logits = np.array([[1e4, 0.0], [0.0, 1e4], [1e4, 0.0]])
    assert np.isfinite(fit_temperature(logits, np.array([0, 1, 1])))


def test_calibration_error_by_hand():
    # Two bins of 15: 0.95 with 1 of 2 right, 0.6 with 2 of 2 right.
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.4, 0.6], [0.4, 0.6]])
    assert expected_calibration_error(probabilities, np.array([0, 1, 1, 1])) == pytest.approx((0.45 * 2 + 0.4 * 2) / 4)
    certain = np.eye(3)[[0, 1, 2]]
    assert expected_calibration_error(certain, np.array([0, 1, 2])) == 0
    assert expected_calibration_error(certain, np.array([1, 2, 0])) == 1


def test_history_is_written_and_drawn(tmp_path):
    history = [{"epoch": 0, "train_loss": 2.0, "val_loss": 1.5}, {"epoch": 1, "train_loss": 1.0, "val_accuracy": 0.5}]
    save_history(history, tmp_path / "new" / "history.csv")
    with (tmp_path / "new" / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["train_loss"] for row in rows] == ["2.0", "1.0"]
    assert [row["val_accuracy"] for row in rows] == ["", "0.5"]
    paths = plot_history(history, tmp_path / "plots")
    assert [path.name for path in paths] == ["loss.png", "accuracy.png", "f1.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.size > (100, 100)
    assert len(plot_history([], tmp_path / "empty")) == 3


@pytest.mark.parametrize("classes", [2, 10, 30])
def test_confusion_is_drawn_for_any_number_of_classes(tmp_path, classes):
    matrix = np.eye(classes, dtype=int) * 3
    matrix[0] = 0  # a class without images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion(matrix, [f"class {index}" for index in range(classes)], tmp_path / "new" / "confusion.png")
    assert (tmp_path / "new" / "confusion.png").stat().st_size > 1000


def test_confusion_pairs_are_names(tmp_path):
    save_confusion_pairs(np.array([0, 1]), np.array([1, 1]), ["a,b", "c"], tmp_path / "pairs.csv")
    with (tmp_path / "pairs.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["actual", "predicted"], ["a,b", "c"], ["c", "c"]]
