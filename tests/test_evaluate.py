"""src/training/evaluate.py: the figures against scikit-learn, the files, and what --enforce does."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sk

from src.data.datamodule import load_data_info, load_split
from src.inference import Predictor
from src.models import ModelConfig, build_classifier, load_model, save_model
from src.preprocessing import Preprocessing
from src.training.calibration import expected_calibration_error
from src.training.evaluate import classification_metrics, latency_ms, main, missed_targets
from src.training.pages import measured_model
from src.training.plots import plot_confusion, plot_images
from tests.drawing import GARMENTS

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["ankle boot", "bag", "coat", "dress", "shirt"]


@pytest.fixture(scope="module")
def answers() -> tuple[np.ndarray, np.ndarray]:
    """400 rows of probabilities that are right more often than not, and their labels; no image of the last class."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 400)
    logits = rng.normal(size=(400, 5)) + 1.5 * np.eye(5)[labels]
    return torch.softmax(torch.from_numpy(logits), 1).numpy().astype(np.float32), labels


def test_every_figure_is_what_scikit_learn_says(answers):
    probabilities, labels = answers
    predicted = probabilities.argmax(1)
    found = classification_metrics(probabilities, labels, CLASSES)
    report = sk.classification_report(
        labels, predicted, labels=range(5), target_names=CLASSES, output_dict=True, zero_division=0
    )
    ranks = (-probabilities).argsort(1)[:, :3]
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-6)
    assert found["top_3_accuracy"] == pytest.approx((ranks == labels[:, None]).any(1).mean(), abs=1e-6)
    for name in ("precision", "recall", "f1"):
        expected = report["macro avg"]["f1-score" if name == "f1" else name]
        assert found[f"macro_{name}"] == pytest.approx(expected, abs=1e-6)
    assert found["micro_f1"] == pytest.approx(sk.f1_score(labels, predicted, average="micro"), abs=1e-6)
    for name in CLASSES:
        row = report[name]
        assert found["per_class"][name] == pytest.approx(
            {"precision": row["precision"], "recall": row["recall"], "f1": row["f1-score"], "images": row["support"]},
            abs=1e-6,
        )
    assert found["per_class"]["shirt"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 0}


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_have_a_top_3_accuracy_too(classes):
    rng = np.random.default_rng(2)
    probabilities = rng.dirichlet(np.ones(classes), 50)
    found = classification_metrics(probabilities, rng.integers(0, classes, 50), CLASSES[:classes])
    assert found["top_3_accuracy"] == 1.0 if classes <= 3 else found["top_3_accuracy"] < 1.0


def test_calibration_error_of_an_example_done_by_hand():
    # Ten bins of 0.1. Bin 0.9-1.0: confidences 0.95, 0.91, one right: |1.86 - 1| = 0.86.
    # Bin 0.6-0.7: confidences 0.62, 0.66, 0.68, all right: |1.96 - 3| = 1.04. Sum 1.90 over five images: 0.38.
    confidences, right = [0.95, 0.91, 0.62, 0.66, 0.68], [True, False, True, True, True]
    probabilities = np.array([[confidence, 1 - confidence] for confidence in confidences])
    labels = np.array([0 if good else 1 for good in right])
    assert expected_calibration_error(probabilities, labels, bins=10) == pytest.approx(0.38)


def test_calibration_error_is_zero_for_perfect_and_one_for_the_worst():
    certain = np.eye(3)[[0, 1, 2]]
    assert expected_calibration_error(certain, np.array([0, 1, 2])) == 0
    assert expected_calibration_error(certain, np.array([1, 2, 0])) == 1


def test_targets_that_are_missed_are_named():
    scores = {"precision": 0.9, "recall": 0.8, "f1": 0.85, "images": 10}
    metrics = {"accuracy": 0.91, "macro_f1": 0.85, "per_class": {"bag": scores, "coat": {**scores, "recall": 0.85}}}
    targets = {"accuracy": 0.91, "macro_f1": 0.88, "precision_per_class": 0.85, "recall_per_class": 0.85}
    assert missed_targets(metrics, targets) == [
        "macro_f1 is 0.8500, the target is 0.88", "recall of bag is 0.8000, the target is 0.85",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"evaluation\.targets\.acuracy; valid: accuracy, "):
        missed_targets(metrics, {"acuracy": 0.9})


def save_untrained(folder: Path, class_names: list[str], size: int = 28) -> Path:
    config = ModelConfig("fashion_mnist", "resnet", {"widths": [4, 8], "blocks": [0, 0]}, class_names,
                         Preprocessing(size, size, 1))  # fmt: skip
    torch.manual_seed(0)
    save_model(folder, build_classifier(config), config)
    return folder


@pytest.fixture
def run(tiny_overrides, tmp_path, monkeypatch):
    """``run("--enforce", "key=value", ...)``: evaluate.py on the drawn data; all files go below ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    model = save_untrained(tmp_path / "untrained", list(GARMENTS))
    fixed = ["--config", str(ROOT / "configs" / "config.yaml"), "--model-path", str(model), *tiny_overrides]

    def run(*arguments: str) -> int:
        return main([*fixed, f"paths.metrics={tmp_path}/metrics", *arguments])

    return run


ANY_RESULT = {  # meets each target that configs/experiment/fashion_mnist.yaml sets
    "accuracy": 0,
    "macro_f1": 0,
    "precision_per_class": 0,
    "recall_per_class": 0,
    "top_3_accuracy": 0,
    "expected_calibration_error": 1,
}


def test_the_files_hold_what_was_measured(run, drawn, tmp_path):
    assert run() == 0
    metrics = json.loads((tmp_path / "metrics" / "test_metrics.json").read_text())
    images, labels = load_split(drawn, "test")
    predictor = Predictor.load(tmp_path / "untrained")
    probabilities = predictor.probabilities(images)
    expected = classification_metrics(probabilities, labels, list(GARMENTS))
    extra = {
        "coverage",
        "accuracy_kept",
        "latency_ms_per_image",
        "model_size_mb",
        "parameters",
        "multiply_adds",
        "targets_missed",
        "model",
        "data_hash",
    }
    assert set(metrics) == set(expected) | extra
    assert metrics["model"] == measured_model(tmp_path / "untrained", "torch")
    assert {name: metrics[name] for name in expected} == expected
    weights = tmp_path / "untrained" / "model.safetensors"
    assert metrics["model_size_mb"] == pytest.approx(weights.stat().st_size / 1e6, abs=1e-3)
    assert metrics["parameters"] == sum(
        parameter.numel() for parameter in load_model(tmp_path / "untrained")[0].parameters()
    )
    # Two 3x3 convolutions, the second of stride 2, and the last layer.
    assert metrics["multiply_adds"] == 28 * 28 * 9 * 1 * 4 + 14 * 14 * 9 * 4 * 8 + 8 * 4
    assert metrics["latency_ms_per_image"] > 0

    predicted = probabilities.argmax(1)
    confusion = json.loads((tmp_path / "metrics" / "confusion_matrix.json").read_text())
    assert confusion["class_names"] == list(GARMENTS)
    assert confusion["rows_true"] == sk.confusion_matrix(labels, predicted, labels=range(4)).tolist()
    for name in ("confusion_matrix.png", "calibration.png"):
        with Image.open(tmp_path / "plots" / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
    with (tmp_path / "plots" / "confusion.csv").open(newline="") as file:
        pairs = list(csv.DictReader(file))
    names = list(GARMENTS)
    assert [(row["actual"], row["predicted"]) for row in pairs] == [
        (names[true], names[guess]) for true, guess in zip(labels, predicted, strict=True)
    ]


def test_a_model_of_other_data_is_measured_and_told(run, drawn, tmp_path, caplog):
    metrics, card = tmp_path / "metrics", tmp_path / "untrained" / "config.json"
    data_hash = load_data_info(drawn)["data_hash"]
    metrics.mkdir()
    shutil.copy(drawn / "data_info.yaml", metrics)
    replace(ModelConfig.load(card), data_hash=data_hash).save(card)
    assert run() == 0
    assert "was trained on data" not in caplog.text
    assert json.loads((metrics / "test_metrics.json").read_text())["data_hash"] == data_hash
    replace(ModelConfig.load(card), data_hash="0123456789abcdef").save(card)
    assert run() == 0
    said = f"untrained was trained on data 0123456789ab, this is {data_hash[:12]}: images may stand in both"
    assert said in caplog.text


def test_the_confusion_matrix_of_many_classes_is_a_picture_of_bounded_size(tmp_path):
    plot_confusion(np.eye(250, dtype=int), [f"class {number}" for number in range(250)], tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as picture:
        assert max(picture.size) <= 3200


def test_names_with_dollars_are_drawn_as_they_are(tmp_path):
    plot_confusion(np.eye(2, dtype=int), ["$5_{-", "}^$10"], tmp_path / "matrix.png")
    plot_images([np.zeros((1, 4, 4), np.uint8)], ["$5_{- $"], tmp_path / "row.png")
    for name in ("matrix.png", "row.png"):
        assert (tmp_path / name).is_file()


def test_missed_targets_fail_only_when_enforced(run, caplog):
    caplog.set_level("INFO")
    assert run("evaluation.targets.accuracy=1") == 0
    assert re.search(r"TARGET MISSED: accuracy is 0\.\d{4}, the target is 1", caplog.text)
    assert run("--enforce", "evaluation.targets.accuracy=1") == 1


def test_a_calibration_error_has_a_most(run, caplog):
    caplog.set_level("INFO")
    assert run("evaluation.targets.expected_calibration_error=0") == 0
    assert re.search(r"TARGET MISSED: expected_calibration_error is 0\.\d{4}, the target is 0", caplog.text)


def test_met_targets_pass_when_enforced(run, caplog):
    caplog.set_level("INFO")
    assert run("--enforce", *(f"evaluation.targets.{name}={value}" for name, value in ANY_RESULT.items())) == 0
    assert "every target is met" in caplog.text
    assert "TARGET MISSED" not in caplog.text


def test_a_measurement_is_added_to_no_run_when_none_trained_here(run, caplog):
    caplog.set_level("INFO")
    assert run() == 0
    assert "no MLflow run to add to" in caplog.text


@pytest.mark.parametrize(
    ("prepare", "overrides", "said"),
    [
        (lambda p: None, ["data.directory=nowhere"], "python src/data/prepare.py"),
        (lambda p: save_untrained(p / "untrained", ["a", "b", "c", "d"]), [], "knows the classes ['a', 'b', 'c', 'd']"),
        (lambda p: save_untrained(p / "untrained", list(GARMENTS), size=32), [], "needs some of 1x32x32"),
        (lambda p: (p / "untrained" / "config.json").unlink(), [], "no model here"),
        (lambda p: None, ["+evaluation.targets.speed=1"], "unknown target evaluation.targets.speed"),
    ],
    ids=["no data", "other classes", "other size", "no model", "unknown target"],
)
def test_what_cannot_be_measured_is_an_error_that_says_why(prepare, overrides, said, run, tmp_path, caplog):
    prepare(tmp_path)
    assert run(*overrides) == 2
    assert said in caplog.text
    assert not (tmp_path / "metrics" / "test_metrics.json").exists()


def test_an_empty_test_split_is_an_error(run, drawn, tmp_path, caplog):
    data = tmp_path / "data"
    data.mkdir()
    (data / "class_names.json").write_text((drawn / "class_names.json").read_text())
    np.savez(data / "test.npz", images=np.empty((0, 1, 28, 28), np.uint8), labels=np.empty(0, np.int64))
    assert run(f"data.directory={data}") == 2
    assert "have the shape (0, 1, 28, 28)" in caplog.text


def test_latency_is_the_median_of_single_images(tmp_path):
    predictor = Predictor.load(save_untrained(tmp_path, list(GARMENTS)))
    sizes = []
    inner = predictor.probabilities
    predictor.probabilities = lambda images: (sizes.append(len(images)), inner(images))[1]
    assert latency_ms(predictor, np.zeros((3, 1, 28, 28), np.uint8), count=7) > 0
    assert sizes == [1] * 7
