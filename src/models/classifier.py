"""The module that is trained, saved and served: normalisation and network in one."""

import torch
from torch import nn


class ImageClassifier(nn.Module):
    """``forward(uint8 (N, C, H, W)) -> float32 logits (N, classes)``.

    ``mean`` and ``std`` are buffers in units of 0..1 pixels, one value a channel, so they travel in the state_dict.
    """

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, C, H, W) -> float32 with zero mean and unit deviation over the training set."""
        return (images.float() / 255 - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, C, H, W) -> float32 logits (N, classes)."""
        return self.network(self.normalize(images))
