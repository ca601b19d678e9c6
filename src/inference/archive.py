"""What an archive holds of a model: ``model.pt`` (a state_dict), ``model_config.json`` and, for a runtime that reads
one, an ONNX file. Written and read here."""

import hashlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

from src.inference.predictor import Predictor
from src.inference.runtimes import load_onnx, runtime_file
from src.models.config import ModelConfig, ModelError

if TYPE_CHECKING:  # torch is imported where it is used: the ONNX runtimes do without
    from torch import Tensor

    from src.models import ImageClassifier

STATE_NAME = "model.pt"
CONFIG_NAME = "model_config.json"
# What torch.load raises for a file that is none of its own, cut or empty.
UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError, OSError, AttributeError)


def save_archived_model(folder: Path, model: "ImageClassifier", config: ModelConfig, name: str = STATE_NAME) -> None:
    """Write the state_dict and the config into ``folder``; equal models give equal bytes. Raises OSError."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    with (folder / name).open("wb") as file:  # given a path, torch writes the file's name into it
        torch.save(state, file)
    config.save(folder / CONFIG_NAME)


def load_state(path: Path) -> "dict[str, Tensor]":
    """Read a ``model.pt``. Raises ModelError."""
    import torch

    if not path.is_file():
        raise ModelError(f"{path} does not exist; build the archive again: ./create_mar_archive.sh")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ModelError(f"{path} is no state_dict that torch can read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} holds no state_dict; make it with: python export_model_for_torchserve.py")
    return state


def load_archived_model(folder: Path) -> "tuple[ImageClassifier, ModelConfig]":
    """The classifier and its config. Raises ModelError when they cannot be used."""
    from src.models.storage import build_classifier, with_state

    config = ModelConfig.load(folder / CONFIG_NAME)
    path = folder / STATE_NAME
    return with_state(build_classifier(config), load_state(path), str(path)), config


def load_archived_predictor(
    folder: Path, runtime: str, gpu: int | None = None, threads: int = 1, compiled: bool = False
) -> Predictor:
    """A Predictor from an unpacked archive.

    ``gpu``: the one to use where ``runtime`` is torch and sees one. ``threads``: of each call on the CPU. ``compiled``:
    through torch.compile, where ``runtime`` is torch.

    Raises ModelError when a file is missing or cannot be used, ValueError for an unknown runtime.
    """
    file = runtime_file(runtime)
    if file is not None:
        config = ModelConfig.load(folder / CONFIG_NAME)
        return Predictor(load_onnx(folder / file, config, "cpu", threads), config)
    import torch

    from src.inference.torch_runtime import TorchRuntime

    torch.set_num_threads(threads)
    model, config = load_archived_model(folder)
    device = f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu"
    return Predictor(TorchRuntime(model, device, compiled=compiled), config)


def checksums(folder: Path, runtime: str) -> dict[str, str]:
    """SHA-256 by file name of what ``runtime`` serves from ``folder``, and of the state_dict."""
    names = [name for name in (STATE_NAME, CONFIG_NAME, runtime_file(runtime)) if name is not None]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
