"""The models in git: each runtime of each gives the same answers, and the figures beside them are of these weights."""

import json

import numpy as np
import pytest

from src.export.compare import SCORES
from src.inference import Predictor
from src.inference.runtimes import FILES
from src.training.evaluate import classification_metrics
from src.training.pages import measured_model
from src.training.predictions import in_batches, load_images
from src.training.recipe import load_recipe
from tests.conftest import ROOT
from tests.drawing import GARMENTS, draw_garment, encode
from tests.tables import rows_of

SHIPPED = {
    "models/best_model": "metrics",
    "models/clothing_small/best_model": "metrics/clothing_small",
    "models/flowers_small/best_model": "metrics/flowers_small",
}


@pytest.mark.parametrize("folder", SHIPPED)
def test_every_runtime_gives_the_same_answers(folder):
    found = {}
    for runtime in FILES:
        predictor = Predictor.load(ROOT / folder, runtime=runtime)
        pixels = np.stack([predictor.decode(encode(draw_garment(kind, size=96))) for kind in GARMENTS])
        found[runtime] = predictor.probabilities(pixels)
    np.testing.assert_allclose(found["onnx"], found["torch"], atol=1e-4)
    assert np.abs(found["onnx-int8"] - found["torch"]).mean() < 0.02


@pytest.mark.parametrize(("folder", "metrics"), SHIPPED.items())
def test_the_figures_are_of_this_model(folder, metrics):
    card = json.loads((ROOT / folder / "config.json").read_text())
    measured = json.loads((ROOT / metrics / "test_metrics.json").read_text())
    info = (ROOT / metrics / "data_info.yaml").read_text()
    assert card["metrics"]["test_accuracy"] == pytest.approx(measured["accuracy"], abs=1e-4)
    assert measured["model"] == measured_model(str(ROOT / folder), "torch")
    assert load_recipe(ROOT / folder)["name"] == card["name"]
    assert card["data_hash"] in info
    page = (ROOT / "docs" / "results.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{card['name']}` |"))
    for key in ("accuracy", "macro_f1", "top_3_accuracy", "expected_calibration_error"):
        assert f"| {measured[key]:.4f} |" in row


@pytest.mark.parametrize("runtime", ["torch", "onnx-int8"])
def test_the_flagship_reaches_its_figures_on_the_test_images(runtime, prepared):
    folder = ROOT / "models" / "best_model"
    predictor = Predictor.load(folder, runtime=runtime)
    images, labels = load_images(prepared, "test", folder, predictor.config)
    probabilities = in_batches(predictor.probabilities, images, 256, runtime)
    found = classification_metrics(probabilities, labels, predictor.config.class_names)
    shown, measured = rows_of("formats.md")[runtime], json.loads((ROOT / "metrics" / "test_metrics.json").read_text())
    claims = [{key: float(shown[head]) for key, head in SCORES.items()}]
    if runtime == measured["model"]["runtime"]:
        claims.append({key: measured[key] for key in SCORES})
    for claim in claims:  # another processor rounds otherwise, which turns an undecided image or two of the 10,000
        assert {key: found[key] for key in SCORES} == pytest.approx(claim, abs=5e-4)
