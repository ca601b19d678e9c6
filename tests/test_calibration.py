"""src/training/calibration.py and plots.py: the calibration, its error, the pictures of a run."""

import csv
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from src.config import DEFAULT_CONFIG
from src.data.datamodule import load_split
from src.inference.predictor import Predictor, calibrate
from src.models import ModelConfig, build_classifier, save_model
from src.preprocessing import Preprocessing
from src.training.calibration import (
    check_kept_accuracy,
    expected_calibration_error,
    fit_calibration,
    fit_card,
    fit_threshold,
    kept_metrics,
    main,
)
from src.training.plots import plot_confusion, plot_history, save_confusion_pairs, save_history
from tests.conftest import ROOT
from tests.drawing import GARMENTS


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
    assert fit_calibration(logits * factor, labels) == pytest.approx((factor, 1.0), rel=0.1)


def test_calibration_undoes_a_bent_scale(calibrated):
    """Distances to the highest logit under a power, as label smoothing leaves them."""
    logits, labels = calibrated
    highest = logits.max(1, keepdims=True)
    bent = highest - 2 * (highest - logits) ** (1 / 1.5)
    temperature, exponent = fit_calibration(bent, labels)
    assert (temperature, exponent) == pytest.approx((2.0, 1.5), rel=0.1)
    before = expected_calibration_error(softmax(bent, axis=1), labels)
    after = expected_calibration_error(calibrate(bent, temperature, exponent), labels)
    assert before > 0.03
    assert after < 0.02


def test_exponent_one_is_temperature_scaling(calibrated):
    logits = calibrated[0].astype(np.float32)
    probabilities = calibrate(logits, 1.5, 1.0)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, softmax(logits / 1.5, axis=1), rtol=1e-5)
    assert (calibrate(logits, 0.7, 1.6).argmax(1) == logits.argmax(1)).all()


def test_calibration_of_huge_logits_is_finite():
    logits = np.array([[1e4, 0.0], [0.0, 1e4], [1e4, 0.0]])
    assert np.isfinite(fit_calibration(logits, np.array([0, 1, 1]))).all()


def test_a_network_that_answers_no_numbers_is_not_calibrated():
    card = ModelConfig("drawn", "resnet", {"widths": [8], "blocks": [0]}, list(GARMENTS), Preprocessing(28, 28, 1))
    logits = np.ones((3, 4))
    logits[1, 2], logits[2, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 3 validation images with NaN or infinity: the training diverged"):
        fit_card(card, logits, np.zeros(3, int), 0.97)


def test_the_threshold_keeps_what_is_accurate_enough():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.7, 0.3], [0.6, 0.4]])
    labels = np.array([0, 0, 0, 1, 1])  # right, right, right, wrong, wrong
    assert fit_threshold(probabilities, labels, 0.6) == 0.0
    assert fit_threshold(probabilities, labels, 0.7) == 0.7
    assert fit_threshold(probabilities, labels, 0.76) == 0.8
    assert fit_threshold(probabilities, 1 - labels, 0.9) == 1.0
    assert kept_metrics(probabilities, labels, 0.7) == {"coverage": 0.8, "accuracy_kept": 0.75}
    assert kept_metrics(probabilities, labels, 0.0) == {"coverage": 1.0, "accuracy_kept": 0.6}
    assert kept_metrics(probabilities, labels, 1.0) == {"coverage": 0.0, "accuracy_kept": 0.0}


@pytest.mark.parametrize("value", [-0.1, 97])
def test_a_kept_accuracy_that_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match=f"training.kept_accuracy is {value}"):
        check_kept_accuracy(value)


def test_a_trained_model_is_refitted_on_validation(drawn, tmp_path):
    card = ModelConfig("drawn", "resnet", {"widths": [8], "blocks": [0]}, list(GARMENTS), Preprocessing(28, 28, 1))
    torch.manual_seed(0)
    save_model(tmp_path / "model", build_classifier(card), card)
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    arguments = ["--config", str(ROOT / DEFAULT_CONFIG), f"data.directory={drawn}"]
    assert main(["--model-path", str(tmp_path / "model"), *arguments, "training.kept_accuracy=0"]) == 0
    fitted = ModelConfig.load(tmp_path / "model" / "config.json")
    assert fitted.uncertain_below == 0.0
    assert fitted.temperature != card.temperature
    assert main(["--model-path", str(tmp_path / "model"), *arguments, "training.kept_accuracy=1"]) == 0
    predictor = Predictor.load(tmp_path / "model")
    images, labels = load_split(drawn, "validation")
    probabilities = predictor.probabilities(images)
    below = predictor.config.uncertain_below
    assert 0 < below <= 1
    kept = kept_metrics(probabilities, labels, below)
    assert kept["coverage"] == 0 or kept["accuracy_kept"] == 1
    for row in probabilities:
        assert predictor.label(row).uncertain == (row.max() < below)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    assert main(["--model-path", str(tmp_path / "none"), *arguments]) == 1


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
