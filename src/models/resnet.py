"""A small residual network for small images (He et al. 2016, arXiv:1512.03385, section 4.2)."""

import torch
from torch import nn


def conv_bn(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an identity shortcut; the shape does not change."""

    def __init__(self, width: int):
        super().__init__()
        self.first = conv_bn(width, width)
        self.second = conv_bn(width, width)
        self.relu = nn.ReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.relu(features + self.second(self.relu(self.first(features))))


class ResNet(nn.Module):
    """Stages of residual blocks; a 3x3 convolution of stride 2 enters each stage after the first.

    ``widths``: channels of each stage. ``blocks``: residual blocks in each stage; 0 leaves only its entry.
    Dense 3x3 convolutions, ReLU and widths in multiples of 16 keep it fast in INT8 on a CPU.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: tuple[int, ...] = (16, 32, 64),
        blocks: tuple[int, ...] = (3, 3, 3),
        dropout: float = 0.0,
    ):
        super().__init__()
        if len(widths) != len(blocks):
            raise ValueError(f"resnet: widths {list(widths)} and blocks {list(blocks)} must have the same length")
        layers: list[nn.Module] = []
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers += [conv_bn(channels, width, stride=2 if stage else 1), nn.ReLU()]
            layers += [ResidualBlock(width) for _ in range(count)]
            channels = width
        self.features = nn.Sequential(*layers)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes))
        self.head = nn.Sequential(*head)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, channels, H, W) -> logits (N, classes)."""
        return self.head(self.features(images))
