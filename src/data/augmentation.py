"""Augmentation of whole uint8 batches, on whatever device they are on. One random draw an image."""

import math

import torch
import torch.nn.functional as F


class BatchAugmentation:
    """Callable: uint8 (N, C, H, W) -> uint8 of the same shape. Arguments as in configs/config.yaml."""

    def __init__(
        self,
        horizontal_flip: float = 0.0,
        crop_padding: int = 0,
        rotation_degrees: float = 0.0,
        brightness: float = 0.0,
        erasing: float = 0.0,
    ):
        for name, value in (("horizontal_flip", horizontal_flip), ("erasing", erasing), ("brightness", brightness)):
            if not 0 <= value <= 1:
                raise ValueError(f"augmentation.{name} is {value}; it must lie between 0 and 1")
        if crop_padding < 0 or rotation_degrees < 0:
            raise ValueError("augmentation.crop_padding and rotation_degrees must not be negative")
        self.horizontal_flip = horizontal_flip
        self.crop_padding = crop_padding
        self.rotation_degrees = rotation_degrees
        self.brightness = brightness
        self.erasing = erasing

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.horizontal_flip:
            images = flip(images, self.horizontal_flip)
        if self.crop_padding:
            images = crop(images, self.crop_padding)
        if self.rotation_degrees:
            images = rotate(images, self.rotation_degrees)
        if self.brightness:
            images = brighten(images, self.brightness)
        if self.erasing:
            images = erase(images, self.erasing)
        return images


def flip(images: torch.Tensor, probability: float) -> torch.Tensor:
    """Mirror each image left to right with ``probability``."""
    chosen = torch.rand(len(images), device=images.device) < probability
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def crop(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Shift each image by up to ``padding`` pixels in x and y; zeros come in."""
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count), device=images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    index = torch.arange(count, device=images.device)[:, None, None]
    # Advanced indexing around the channel axis puts it last: (N, H, W, C).
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Turn each image by an angle uniform in [-degrees, degrees], bilinear; zeros come in."""
    count, _, height, width = images.shape
    angle = (torch.rand(count, device=images.device) * 2 - 1) * math.radians(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = height / width
    theta = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    turned = F.grid_sample(images.float(), grid, align_corners=False)
    return turned.round_().clamp_(0, 255).to(torch.uint8)


def brighten(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Multiply each image by a factor uniform in [1 - strength, 1 + strength]."""
    factor = 1 + strength * (torch.rand(len(images), 1, 1, 1, device=images.device) * 2 - 1)
    return (images * factor).round_().clamp_(0, 255).to(torch.uint8)


def erase(
    images: torch.Tensor, probability: float, area: tuple[float, float] = (0.02, 0.4), aspect: float = 0.3
) -> torch.Tensor:
    """Fill a random rectangle of each image with noise, with ``probability`` (Zhong et al. 2017, arXiv:1708.04896).

    ``area``: share of the image, uniform; ``aspect``: the height:width ratio is log-uniform in [aspect, 1/aspect].
    """
    count, _, height, width = images.shape
    uniform = torch.rand(5, count, device=images.device)
    size = (area[0] + uniform[0] * (area[1] - area[0])) * height * width
    ratio = torch.exp((uniform[1] * 2 - 1) * math.log(1 / aspect))
    tall = (size * ratio).sqrt().round().clamp(1, height)
    wide = (size / ratio).sqrt().round().clamp(1, width)
    top = (uniform[2] * (height - tall + 1)).floor()
    left = (uniform[3] * (width - wide + 1)).floor()
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    inside_y = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    inside_x = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    chosen = (uniform[4] < probability)[:, None, None]
    mask = (inside_y[:, :, None] & inside_x[:, None, :] & chosen)[:, None]
    noise = torch.randint(256, images.shape, dtype=torch.uint8, device=images.device)
    return torch.where(mask, noise, images)
