"""Four plain blocks: what fruit on a white ground needs."""

import torch
from torch import nn


class CustomCNN(nn.Module):
    """A 3x3 convolution, batch norm, ReLU and max-pooling a block, then global average pooling, dropout and one layer.

    ``widths``: channels of each block; each halves the resolution.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = (32, 64, 128, 256), dropout: float = 0.3):
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            channels = width
        self.features = nn.Sequential(*layers)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes))
        self.head = nn.Sequential(*head)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, channels, H, W) -> logits (N, classes)."""
        return self.head(self.features(images))
