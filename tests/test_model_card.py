"""src/training/model_card.py: the page is what was measured, and the one in docs/ is up to date."""

import pytest

from src.config import DEFAULT_CONFIG, load_config
from src.training.model_card import PAGE, main, model_card
from tests.conftest import ROOT


@pytest.fixture
def config(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_config(DEFAULT_CONFIG, [])


def test_the_committed_card_is_what_the_command_writes(config):
    assert (ROOT / PAGE).read_text(encoding="utf-8") == model_card(config), "run: make docs"


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
