"""The folder a trained model lives in: ``config.json`` and ``model.safetensors``, the Hugging Face form.

``config.json`` holds all that prediction needs, so that loading never reads a training config. The ONNX files that
``python -m src.export.onnx`` makes of the weights lie beside them.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from src.models.classifier import ImageClassifier
from src.models.config import CONFIG_NAME, WEIGHTS_NAME, ModelConfig, ModelError
from src.models.registry import build_network


def build_classifier(config: ModelConfig) -> ImageClassifier:
    """An untrained classifier of ``config``'s shape; mean and std come with the state_dict."""
    channels = config.preprocessing.channels
    try:
        network = build_network(config.architecture, channels, len(config.class_names), **config.architecture_args)
    except (ImportError, TypeError, ValueError) as error:
        raise ModelError(f"{config.architecture} cannot be built from {config.architecture_args}: {error}") from error
    return ImageClassifier(network, [0.0] * channels, [1.0] * channels)


def save_model(folder: str | Path, model: ImageClassifier, config: ModelConfig) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``, making it if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, content = folder / WEIGHTS_NAME, weights_bytes(model.state_dict())
    if not weights.is_file() or weights.read_bytes() != content:
        for older in folder.glob("*.onnx"):  # made of the weights that go now
            older.unlink()
    weights.write_bytes(content)
    config.save(folder / CONFIG_NAME)


def weights_bytes(state: dict[str, torch.Tensor]) -> bytes:
    """A state_dict as the content of ``model.safetensors``; equal tensors give equal bytes."""
    return serialize({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of ``weights_bytes``: the name under which ONNX files know the weights they were made of."""
    return hashlib.sha256(weights_bytes(state)).hexdigest()


def load_model(folder: str | Path) -> tuple[ImageClassifier, ModelConfig]:
    """Read what ``save_model`` wrote; the model is in evaluation mode on the CPU. Raises ModelError."""
    folder = Path(folder)
    config = ModelConfig.load(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise ModelError(f"{weights} does not exist; train the model or run `git checkout {folder}`")
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ModelError(f"{weights} cannot be read ({error}); restore it with `git checkout {weights}`") from error
    return with_state(build_classifier(config), state, str(weights)), config


def with_state(model: ImageClassifier, state: dict[str, torch.Tensor], source: str) -> ImageClassifier:
    """Load ``state`` into ``model`` and switch it to evaluation. Raises ModelError when the two do not match."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{source} does not fit its config: {error}") from error
    return model.eval()
