"""PyTorch on the CPU or a GPU. On the CPU batch norm is folded into the convolutions before it."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class TorchRuntime:
    """``runtime(uint8 (N, C, H, W)) -> float32 logits (N, classes)``."""

    def __init__(self, model: nn.Module, device: str = "cpu", fold: bool = True, compiled: bool = False):
        """``fold``: fold batch norm, on the CPU only. ``compiled``: through torch.compile, which needs a C++ compiler
        on the CPU and takes up to a minute at the first call."""
        self.device = device
        self.versions = {"torch": torch.__version__}
        place = torch.device(device)
        model = fold_batch_norm(model) if fold and place.type == "cpu" else model
        self.model = model.to(place, memory_format=torch.channels_last).eval()
        self.forward = torch.compile(self.model, dynamic=True) if compiled else self.model

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.forward(torch.from_numpy(images).to(self.device)).float().cpu().numpy()


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of ``model`` without the batch norms that follow a convolution in an nn.Sequential; same answers."""
    model = copy.deepcopy(model).eval()
    for block in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for index in range(len(block) - 1):
            conv, norm = block[index], block[index + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                block[index], block[index + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return model
