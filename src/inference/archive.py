"""What an archive holds of a model: ``model.pt`` (a state_dict) and ``model_config.json``. Written and read here."""

import hashlib
import pickle
from pathlib import Path

import torch

from src.models import ImageClassifier, ModelConfig, ModelError, build_classifier
from src.models.storage import with_state

STATE_NAME = "model.pt"
CONFIG_NAME = "model_config.json"


def save_archived_model(folder: Path, model: ImageClassifier, config: ModelConfig, name: str = STATE_NAME) -> None:
    """Write the two files into ``folder``; equal models give equal bytes. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    with (folder / name).open("wb") as file:  # given a path, torch writes the file's name into it
        torch.save(state, file)
    config.save(folder / CONFIG_NAME)


def load_archived_model(folder: Path) -> tuple[ImageClassifier, ModelConfig, dict[str, str]]:
    """Read the two files: ``(model, config, SHA-256 by file name)``. Raises ModelError when one cannot be used."""
    config = ModelConfig.load(folder / CONFIG_NAME)
    path = folder / STATE_NAME
    if not path.is_file():
        raise ModelError(f"{path} does not exist; build the archive again: ./create_mar_archive.sh")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ModelError(f"{path} is no state_dict that torch can read: {error}") from error
    checksums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (STATE_NAME, CONFIG_NAME)}
    return with_state(build_classifier(config), state, str(path)), config, checksums
