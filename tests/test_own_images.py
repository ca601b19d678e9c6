"""docs/experiments.md's way to one's own images, as written there: folders, an experiment file, the commands."""

import re
import shutil

import pytest

from src.config import DEFAULT_CONFIG, load_config
from src.data.prepare import prepare
from src.inference import Predictor
from src.training.train import train
from tests.conftest import ROOT
from tests.drawing import GARMENTS
from tests.image_folders import write_classes


@pytest.fixture
def shop(tmp_path, mlflow_store, monkeypatch):
    """``shop("key=value", ...)``: the config of the page's experiment in a project of its own, with its photos/."""
    page = (ROOT / "docs" / "experiments.md").read_text()
    [experiment] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "experiment" / "shop.yaml").write_text(experiment)
    write_classes(tmp_path / "photos", 30)
    monkeypatch.chdir(tmp_path)
    quick = ["training.epochs=1", "training.accelerator=cpu", f"tracking.uri={mlflow_store}", "data.mirror=null"]
    return lambda *overrides: load_config(DEFAULT_CONFIG, ["experiment=shop", *quick, *overrides])


def test_a_shop_trains_on_its_own_photos(shop):
    config = shop()
    info = prepare(config)
    counts = [info["splits"][name]["images"] for name in ("train", "validation", "test")]
    assert counts == [92, 10, 18]  # 15% of 120 are the test images, 10% of the others validate
    train(config)
    predictor = Predictor.load("models/shop/best_model")
    assert (predictor.config.name, predictor.config.class_names) == ("shop", sorted(GARMENTS))


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("inside", ["photos", "."], ids=["of the folder", "of what is in it"])
def test_an_archive_of_the_photos_gives_the_same_data(shop, tmp_path, kind, inside):
    expected = prepare(shop())["data_hash"]
    beside = tmp_path / "copy"  # what macOS puts beside the photos in a zip
    place = beside / inside
    shutil.copytree("photos", place, dirs_exist_ok=True)
    (beside / "__MACOSX" / inside / "Bag").mkdir(parents=True)
    (beside / "__MACOSX" / inside / "Bag" / "._000.jpg").touch()
    shutil.make_archive("photos", kind, beside)
    assert prepare(shop(f"data.location=photos.{kind}"))["data_hash"] == expected


def test_an_archive_of_one_class_is_refused(shop, tmp_path):
    shutil.make_archive("bags", "tar", tmp_path / "photos", "Bag")
    with pytest.raises(ValueError, match=r"has the class folders \['Bag'\]; at least two are needed"):
        prepare(shop("data.location=bags.tar"))
