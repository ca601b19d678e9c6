"""Early exits: an image that is easy enough gets its answer half-way through the network.

BranchyNet, Teerapittayanon et al. 2016, arXiv:1709.01686; the measure of easy is the confidence.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 32  # channels of an exit
GRID = 4  # it sees its image in 4x4 places
POOLED = 7  # what is larger is pooled down to this or a little more, which the convolution halves
SIZES = "7, 8, 14 to 17, 21 to 26 and above 27 are sizes that do"
NEVER = 2.0  # a threshold that no confidence reaches


class EarlyExit(nn.Module):
    """A small head that answers from half-way features; it keeps where in the image they lie.

    ``threshold``: the confidence with which its answer stands, a buffer. NEVER until it is fitted
    (src/training/early_exits.py).
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.conv = nn.Conv2d(width, WIDTH, 3, stride=2, padding=1)
        self.linear = nn.Linear(WIDTH * GRID**2, classes)
        self.register_buffer("threshold", torch.tensor(NEVER))
        self.requires_grad_(False)  # the network is trained without; they learn from it afterwards

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Float (N, width, H, W) -> logits (N, classes). Raises ValueError for a size that gives no GRID x GRID."""
        size = tuple(int(side) for side in features.shape[2:])
        smaller = F.max_pool2d(features, tuple(max(side // POOLED, 1) for side in size))
        places = F.relu(self.conv(smaller))
        if tuple(places.shape[2:]) != (GRID, GRID):
            raise ValueError(f"an early exit sees {GRID}x{GRID} places, which features of {size} do not give; {SIZES}")
        return self.linear(places.flatten(1))

    def unsure(self, logits: torch.Tensor) -> torch.Tensor:
        """Which rows of ``logits`` (N, classes) do not stand: their indices, int64."""
        return (logits.softmax(1).amax(1) < self.threshold).nonzero()[:, 0]


def exits_of(network: nn.Module) -> list[EarlyExit]:
    """The early exits of ``network``, in order; an empty list where it has none."""
    return [module for module in network.modules() if isinstance(module, EarlyExit)]


@contextmanager
def no_early_exits(network: nn.Module) -> Iterator[None]:
    """Every image goes all the way through ``network`` meanwhile."""
    exits = exits_of(network)
    thresholds = [leave.threshold.clone() for leave in exits]
    for leave in exits:
        leave.threshold.fill_(NEVER)
    try:
        yield
    finally:
        for leave, threshold in zip(exits, thresholds, strict=True):
            leave.threshold.copy_(threshold)
