"""Training on several devices, by Lightning's own strategies: here two processes on one CPU."""

import json
import sys

from src.config import DEFAULT_CONFIG
from src.inference import Predictor
from tests.conftest import ROOT, run_script


def test_two_devices_train_one_model(tiny_overrides, tmp_path):
    """Both processes train, one writes, below the working directory only; what it wrote predicts."""
    train, config = ROOT / "src" / "training" / "train.py", ROOT / DEFAULT_CONFIG
    command = [sys.executable, str(train), "--config", str(config), *tiny_overrides]
    command += ["training.accelerator=cpu", "training.devices=2", "training.strategy=ddp", "training.epochs=1"]
    done = run_script(tmp_path, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr
    assert done.stderr.count("best model ->") == 1
    assert (tmp_path / "mlruns").is_dir()
    folder = tmp_path / "models" / "best_model"
    assert 0 < json.loads((folder / "config.json").read_text())["metrics"]["test_accuracy"] <= 1
    assert len(Predictor.load(folder).config.class_names) == 4
