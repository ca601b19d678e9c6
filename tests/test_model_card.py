"""src/training/model_card.py: the page is what was measured, and the one in docs/ is up to date."""

import json
import shutil

import pytest

from src.config import DEFAULT_CONFIG, load_config, to_dict
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
    overrides = ["training.epochs=7", "training.teachers=[models/a]", "seed=3", "data.limit=100"]
    used = recipe_of(load_config(DEFAULT_CONFIG, overrides))
    text = recipe(card, used, to_dict(config))
    assert "experiment=fashion_mnist training.epochs=7 training.teachers=['models/a'] data.limit=100 seed=3`" in text
    assert "| epochs | 7 |" in text
    assert "| teacher_share | 0.9 |" in text
    longer = gone_on(used, recipe_of(load_config(DEFAULT_CONFIG, [*overrides, "training.epochs=9"])), 7)
    assert "from epoch 7 by `training.resume=true training.epochs=9 training.restarts=[48]`" in recipe(
        card, longer, to_dict(config)
    )
    assert "experiment=fashion_mnist`, seed 42. " in recipe(card, recipe_of(config), to_dict(config))
    with pytest.raises(FileNotFoundError, match="train the model again"):
        load_recipe(tmp_path)
