"""src/training/model_card.py: the page is what was measured, and the one in docs/ is up to date."""

import json
import re
import shlex
import shutil

import pytest

from src.config import DEFAULT_CONFIG, load_config
from src.models import ModelConfig
from src.training.model_card import PAGE, main, model_card, recipe
from src.training.recipe import gone_on, load_recipe, recipe_of
from tests.conftest import ROOT


@pytest.fixture
def config(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_config(DEFAULT_CONFIG, [])


def test_the_committed_card_is_what_the_command_writes(config):
    assert (ROOT / PAGE).read_text(encoding="utf-8") == model_card(config), "run: make pages"


def test_every_picture_of_the_card_is_there(config):
    pictures = [line.split("](")[1].rstrip(")") for line in model_card(config).splitlines() if line.startswith("![")]
    assert len(pictures) == 2
    for picture in pictures:
        assert (ROOT / PAGE.parent / picture).resolve().is_file(), picture


def test_without_measurements_it_names_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    before = (ROOT / PAGE).read_bytes()
    assert main(["--config", DEFAULT_CONFIG, f"paths.metrics={tmp_path}"]) == 1
    assert "test_metrics.json does not exist; make it with: python src/training/evaluate.py" in capsys.readouterr().err
    assert (ROOT / PAGE).read_bytes() == before


@pytest.mark.parametrize("name", ["test_metrics.json", "photos.json"])
@pytest.mark.parametrize(
    ("key", "value"), [("weights_sha256", "0" * 64), ("temperature", 2.0), ("runtime", "onnx-int8")]
)
def test_measurements_of_another_model_are_refused(name, key, value, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    metrics = shutil.copytree(ROOT / "metrics", tmp_path / "metrics")
    content = json.loads((metrics / name).read_text())
    content["model"][key] = value
    (metrics / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name} was measured with {key} {value}.*; measure again: python src/train"):
        model_card(load_config(DEFAULT_CONFIG, [f"paths.metrics={metrics}"]))


def test_the_recipe_is_the_one_the_model_was_trained_by(tmp_path, config):
    card = ModelConfig.load(ROOT / "models" / "best_model" / "config.json")
    overrides = ["training.epochs=7", "training.teachers=[models/a,models/b c]", "training.ema_decay=null", "seed=3",
                 "augmentation.erasing=0", "data.limit=100", "training.restarts=[]"]  # fmt: skip
    used = recipe_of(load_config(DEFAULT_CONFIG, overrides))
    text = recipe(card, used, config)
    (shown,) = re.findall(r"configs/config.yaml (.*?)`", text)
    assert shown.startswith("experiment=fashion_mnist ")
    assert recipe_of(load_config(DEFAULT_CONFIG, shlex.split(shown))) == used, "the command trains by this recipe"
    assert "| epochs | 7 |" in text
    assert "| teacher_share | 0.9 |" in text
    assert "ema_decay |" not in text
    assert "experiment=fashion_mnist`, seed 42. " in recipe(card, recipe_of(config), config)
    with pytest.raises(FileNotFoundError, match="train the model again"):
        load_recipe(tmp_path)


def test_the_recipe_of_a_run_that_went_on_has_its_whole_length(config):
    card = ModelConfig.load(ROOT / "models" / "best_model" / "config.json")
    first = ["training.epochs=7", "training.restarts=[]"]
    longer = recipe_of(load_config(DEFAULT_CONFIG, ["training.epochs=9", "training.restarts=[7]"]))
    used = gone_on(recipe_of(load_config(DEFAULT_CONFIG, first)), longer, 7)
    text = recipe(card, used, config)
    assert "experiment=fashion_mnist training.epochs=7 'training.restarts=[]'`" in text
    assert "from epoch 7 by `training.resume=true training.epochs=9 'training.restarts=[7]'`" in text
    assert "| epochs | 9 |" in text
    assert "| restarts | [7] |" in text


def test_a_key_that_the_config_has_no_more_stands_in_the_command(config):
    card = ModelConfig.load(ROOT / "models" / "best_model" / "config.json")
    used = recipe_of(config)
    used["training"]["dropped_since"] = 0.5
    assert "experiment=fashion_mnist training.dropped_since=0.5`" in recipe(card, used, config)
