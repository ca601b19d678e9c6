"""A plain convolutional network: the baseline."""

import torch
from torch import nn


class BasicCNN(nn.Module):
    """Two convolutions a stage, max-pooling between stages, global average pooling, one linear layer.

    ``widths``: channels of each stage; the resolution halves between stages.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = (32, 64, 128), dropout: float = 0.0):
        super().__init__()
        layers: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes))
        self.head = nn.Sequential(*head)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, channels, H, W) -> logits (N, classes)."""
        return self.head(self.features(images))
