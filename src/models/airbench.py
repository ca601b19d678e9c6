"""A network that learns small colour images in few epochs (Jordan 2024, arXiv:2404.00498, section 3)."""

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 2  # pixels; the side of what the first convolution sees


class Airbench(nn.Module):
    """Whitened 2x2 patches, then a stage a width (convolution, pooling, convolution), global max-pooling, one layer.

    Every 3x3 convolution starts by passing its input on. Unlike the paper's network it has ReLU for GELU, which INT8
    computes exactly, batch norm right behind each convolution, so that it folds into it, and a first layer that learns.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = (64, 256, 256), dropout: float = 0.0):
        super().__init__()
        inputs = 2 * channels * PATCH**2
        self.whitening = nn.Conv2d(channels, inputs, PATCH)
        layers: list[nn.Module] = [nn.ReLU()]
        for width in widths:
            layers += [start_by_passing_on(inputs, width), nn.BatchNorm2d(width), nn.MaxPool2d(2), nn.ReLU()]
            layers += [start_by_passing_on(width, width), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        self.features = nn.Sequential(*layers)
        head = (nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(inputs, classes))
        self.head = nn.Sequential(*head)

    @torch.no_grad()
    def start_from(self, images: torch.Tensor) -> None:
        """Make the first layer's outputs uncorrelated, each of deviation 1: the directions in which 2x2 patches of
        ``images``, float (N, channels, H, W) as ``forward`` takes them, vary, and their negatives."""
        patches = F.unfold(images, PATCH).transpose(1, 2).flatten(0, 1)
        variances, directions = torch.linalg.eigh(torch.cov(patches.T))
        filters = (directions / (variances + 5e-4).sqrt()).T.reshape(len(variances), -1, PATCH, PATCH)
        self.whitening.weight.copy_(torch.cat([filters, -filters]))
        self.whitening.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, channels, H, W) -> logits (N, classes)."""
        return self.head(self.features(self.whitening(images)))


def start_by_passing_on(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution whose first outputs are its inputs (Zagoruyko and Komodakis 2017, arXiv:1706.00388)."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:inputs].data)
    return convolution
