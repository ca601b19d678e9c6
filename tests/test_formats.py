"""python -m src.export.onnx and src.export.compare on another kind of model: ResNet-18, colour images, not square."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from src.export import compare
from src.export.engine import origin_path
from src.export.onnx import main
from src.inference.onnx_runtime import OnnxRuntime
from src.models import ModelConfig, build_classifier, save_model
from src.preprocessing import Preprocessing
from tests.conftest import ROOT

CLASSES = ["red", "green", "blue"]
SIZES = {"train": 60, "validation": 24, "test": 12}


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """A prepared dataset of 32x40 images that are mostly of one colour. Read only."""
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for name, count in SIZES.items():
        labels = np.arange(count) % len(CLASSES)
        images = random.integers(0, 100, (count, 3, 32, 40), dtype=np.uint8)
        images[np.arange(count), labels] += 120
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    (folder / "class_names.json").write_text(json.dumps(CLASSES))
    return folder


@pytest.fixture(scope="module")
def arguments(colours, tmp_path_factory) -> list[str]:
    """``--model-path`` of an exported ResNet-18 (timm's) that learnt nothing, and the config's overrides."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig("colours", "resnet18", {}, CLASSES, Preprocessing(32, 40, 3))
    torch.manual_seed(0)
    save_model(folder, build_classifier(config).eval(), config)
    overrides = [f"data.directory={colours}", "export.calibration_images=25", "export.max_accuracy_loss=1"]
    found = ["--config", str(ROOT / "configs" / "config.yaml"), "--model-path", str(folder), *overrides]
    assert main([*found, "export.opset=18"]) == 0
    return found


def test_the_files_take_colour_images_of_any_number(arguments):
    for name in ("model.onnx", "model.int8.onnx"):
        path = Path(arguments[3]) / name
        assert onnx.load(path).opset_import[0].version == 18
        for count in (1, 3):
            assert OnnxRuntime(path)(np.zeros((count, 3, 32, 40), np.uint8)).shape == (count, 3)


def test_the_formats_are_compared_and_an_engine_that_cannot_run_is_named(arguments, tmp_path, caplog):
    caplog.set_level("INFO")
    quick = ["--rounds", "1", "--limit", "8", "--output", str(tmp_path / "formats.md"), f"paths.plots={tmp_path}"]
    assert "TensorRT: no *.engine in" in compare.engines_of(tmp_path)[1][0]
    engine = Path(arguments[3]) / "model.fp16.engine"
    engine.write_bytes(b"no engine")
    origin_path(engine).write_text('{"weights_sha256": "of others"}')
    assert compare.main([*arguments, *quick]) == 0
    page = (tmp_path / "formats.md").read_text()
    assert re.search(r"TensorRT: model.fp16.engine is left out: .* is stale: made of weights of others", page)
    rows = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["torch, as trained", "torch", "onnx", "onnx-int8"]
    assert (tmp_path / "formats.png").is_file()


def test_a_quick_try_writes_no_page(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare.main([*arguments, "--rounds", "1", "--limit", "8"]) == 0
    assert not list(tmp_path.iterdir())


def test_the_data_of_another_experiment_is_an_error(arguments, colours, tmp_path, caplog):
    (tmp_path / "class_names.json").write_text(json.dumps(CLASSES))
    np.savez(tmp_path / "validation.npz", images=np.zeros((4, 1, 28, 28), np.uint8), labels=np.zeros(4, np.int64))
    for command in (main, compare.main):
        assert command([*arguments, f"data.directory={tmp_path}"]) == 1
        assert "needs some of 3x32x40; prepare the data" in caplog.text
        caplog.clear()
