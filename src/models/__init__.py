"""Networks by name, the classifier around them, and the folder they are saved in. Ships in the archive."""

from src.models.classifier import ImageClassifier
from src.models.registry import build_network, list_architectures
from src.models.storage import ModelConfig, ModelError, build_classifier, load_model, save_model

__all__ = [
    "ImageClassifier",
    "ModelConfig",
    "ModelError",
    "build_classifier",
    "build_network",
    "list_architectures",
    "load_model",
    "save_model",
]
