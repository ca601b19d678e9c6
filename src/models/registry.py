"""Architectures by name. A builder takes ``(channels, classes, **args)`` and returns normalised images -> logits."""

import inspect

from torch import nn

from src.models.basic_cnn import BasicCNN
from src.models.custom_cnn import CustomCNN
from src.models.pretrained import build_efficientnet, build_resnet18
from src.models.prototypes import PrototypeNetwork
from src.models.resnet import ResNet

ARCHITECTURES = {
    "basic_cnn": BasicCNN,
    "custom_cnn": CustomCNN,
    "resnet": ResNet,
    "efficientnet": build_efficientnet,
    "resnet18": build_resnet18,
    "prototypes": PrototypeNetwork,
}
NEED_TIMM = {"efficientnet", "resnet18", "prototypes"}  # a server does without it, and runs their ONNX files


def list_architectures() -> list[str]:
    """Names that ``build_network`` and ``model.architecture`` accept."""
    return sorted(ARCHITECTURES)


def build_network(architecture: str, channels: int, classes: int, **args) -> nn.Module:
    """Build an untrained network: float (N, channels, H, W) -> float logits (N, classes).

    Raises ValueError naming the valid architectures or arguments when one is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; valid: {', '.join(list_architectures())}")
    builder = ARCHITECTURES[architecture]
    valid = [name for name in inspect.signature(builder).parameters if name not in ("channels", "classes")]
    unknown = sorted(set(args) - set(valid))
    if unknown:
        raise ValueError(f"unknown arguments {', '.join(unknown)} for {architecture}; valid: {', '.join(valid)}")
    return builder(channels, classes, **args)


def find_head(network: nn.Module) -> nn.Module:
    """The last layers of ``network``, which turn features into logits."""
    return network.get_classifier() if hasattr(network, "get_classifier") else network.head
