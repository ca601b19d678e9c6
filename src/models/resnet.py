"""A small residual network for small images (He et al. 2016, arXiv:1512.03385, section 4.2)."""

import torch
from torch import nn

from src.models.early_exit import EarlyExit


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
    ``early_exits``: stages, from 2 on and rising, after whose entry an image may leave that is easy enough.
    Dense 3x3 convolutions, ReLU and widths in multiples of 16 keep it fast in INT8 on a CPU.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: tuple[int, ...] = (16, 32, 64),
        blocks: tuple[int, ...] = (3, 3, 3),
        dropout: float = 0.0,
        early_exits: tuple[int, ...] = (),
    ):
        super().__init__()
        if list(early_exits) != sorted(set(early_exits) & set(range(2, len(widths) + 1))):
            raise ValueError(
                f"resnet: early_exits is {list(early_exits)}; it must hold stages from 2 to {len(widths)}, rising"
            )
        if len(widths) != len(blocks):
            raise ValueError(f"resnet: widths {list(widths)} and blocks {list(blocks)} must have the same length")
        layers: list[nn.Module] = []
        self.bounds = [0]  # of the parts of ``features`` between the exits
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers += [conv_bn(channels, width, stride=2 if stage else 1), nn.ReLU()]
            self.bounds += [len(layers)] if stage + 1 in early_exits else []
            layers += [ResidualBlock(width) for _ in range(count)]
            channels = width
        self.features = nn.Sequential(*layers)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes))
        self.head = nn.Sequential(*head)
        self.bounds.append(len(layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Last, so that the draws before them are those of a network without.
        self.exits = nn.ModuleList(EarlyExit(widths[stage - 1], classes) for stage in early_exits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, channels, H, W) -> logits (N, classes). In training every image goes all the way."""
        return self.head(self.features(images)) if self.training else self.answer(images, 0)

    @torch.compiler.disable(recursive=False)  # its shapes follow the data; its parts are compiled
    def answer(self, features: torch.Tensor, part: int) -> torch.Tensor:
        """What enters ``part`` of the network -> logits (N, classes); only what its exit is unsure of goes on."""
        features = self.part(part)(features)
        if part == len(self.exits):
            return self.head(features)
        early = self.exits[part]
        logits = early(features)
        rest = early.unsure(logits)
        return logits.index_put((rest,), self.answer(features[rest], part + 1))

    def part(self, number: int) -> nn.Sequential:
        """The layers from one exit to the next."""
        return self.features[self.bounds[number] : self.bounds[number + 1]]

    def all_answers(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Float (N, channels, H, W) -> logits (N, classes) of each exit and, last, of the head."""
        logits = []
        for number, early in enumerate(self.exits):
            images = self.part(number)(images)
            logits.append(early(images))
        return [*logits, self.head(self.part(len(self.exits))(images))]
