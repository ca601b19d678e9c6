"""Networks by name, the classifier around them, and the folder they are saved in. Ships in the archive.

What needs torch is imported on first use: a worker that runs ONNX reads the config and no more.
"""

from importlib import import_module

from src.models.config import ModelConfig, ModelError

_HOMES = {
    "ImageClassifier": "classifier",
    "build_classifier": "storage",
    "build_network": "registry",
    "list_architectures": "registry",
    "load_model": "storage",
    "save_model": "storage",
}
__all__ = ["ModelConfig", "ModelError", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
