"""Training on several devices, by Lightning's own strategies: here two processes on one CPU."""

import json
import subprocess
import sys

from src.inference import Predictor
from tests.conftest import ROOT


def test_two_devices_train_one_model(tiny_overrides, tmp_path):
    """Both processes train, one writes; what it wrote predicts."""
    command = [sys.executable, "src/training/train.py", *tiny_overrides]
    command += ["training.accelerator=cpu", "training.devices=2", "training.strategy=ddp", "training.epochs=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr
    assert done.stderr.count("best model ->") == 1
    folder = tmp_path / "models" / "best_model"
    assert 0 < json.loads((folder / "config.json").read_text())["metrics"]["test_accuracy"] <= 1
    assert len(Predictor.load(folder).config.class_names) == 4
