"""docs/experiments.md's way to one's own images, as written there: folders, an experiment file, the commands."""

import re
import shutil

from src.config import DEFAULT_CONFIG, load_config
from src.data.prepare import prepare
from src.inference import Predictor
from src.training.train import train
from tests.conftest import ROOT
from tests.drawing import GARMENTS
from tests.image_folders import write_classes


def test_a_shop_trains_on_its_own_photos(tmp_path, mlflow_store, monkeypatch):
    page = (ROOT / "docs" / "experiments.md").read_text()
    [experiment] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "experiment" / "shop.yaml").write_text(experiment)
    write_classes(tmp_path / "photos", 30)
    monkeypatch.chdir(tmp_path)
    quick = ["training.epochs=1", "training.accelerator=cpu", f"tracking.uri={mlflow_store}", "data.mirror=null"]
    config = load_config(DEFAULT_CONFIG, ["experiment=shop", *quick])
    info = prepare(config)
    counts = [info["splits"][name]["images"] for name in ("train", "validation", "test")]
    assert counts == [92, 10, 18]  # 15% of 120 are the test images, 10% of the others validate
    train(config)
    predictor = Predictor.load("models/shop/best_model")
    assert (predictor.config.name, predictor.config.class_names) == ("shop", sorted(GARMENTS))
