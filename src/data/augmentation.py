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
        scale: float = 0.0,
        translate: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        erasing: float = 0.0,
    ):
        shares = {"horizontal_flip": horizontal_flip, "scale": scale, "translate": translate, "erasing": erasing}
        for name, value in (
            shares | {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        ).items():
            if not 0 <= value <= 1:
                raise ValueError(f"augmentation.{name} is {value}; it must lie between 0 and 1")
        if crop_padding < 0 or rotation_degrees < 0:
            raise ValueError("augmentation.crop_padding and rotation_degrees must not be negative")
        self.horizontal_flip = horizontal_flip
        self.crop_padding = crop_padding
        self.rotation_degrees = rotation_degrees
        self.scale = scale
        self.translate = translate
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.erasing = erasing

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.horizontal_flip:
            images = flip(images, self.horizontal_flip)
        if self.crop_padding:
            images = crop(images, self.crop_padding)
        if self.rotation_degrees or self.scale or self.translate:
            images = move(images, self.rotation_degrees, self.scale, self.translate)
        if self.brightness:
            images = brighten(images, self.brightness)
        if self.contrast:
            images = blend(images, images.float().mean((1, 2, 3), keepdim=True), self.contrast)
        if self.saturation and images.shape[1] == 3:
            images = blend(images, luminance(images), self.saturation)
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


def move(images: torch.Tensor, degrees: float, scale: float = 0.0, translate: float = 0.0) -> torch.Tensor:
    """Turn each image by up to ``degrees``, zoom it by a factor in [1 - scale, 1 + scale] and shift it by up to
    ``translate`` of its size, all uniform, bilinear; what comes in repeats the border."""
    count, _, height, width = images.shape
    draws = torch.rand(4, count, device=images.device) * 2 - 1
    angle, zoom = draws[0] * math.radians(degrees), 1 / (1 + scale * draws[1]).clamp_min(0.05)
    cos, sin, ratio = angle.cos() * zoom, angle.sin() * zoom, height / width
    shift = draws[2:] * 2 * translate  # affine_grid's unit is half the image
    theta = torch.stack([cos, -sin * ratio, shift[0], sin / ratio, cos, shift[1]], dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round_().clamp_(0, 255).to(torch.uint8)


def brighten(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Multiply each image by a factor uniform in [1 - strength, 1 + strength]."""
    factor = 1 + strength * (torch.rand(len(images), 1, 1, 1, device=images.device) * 2 - 1)
    return (images * factor).round_().clamp_(0, 255).to(torch.uint8)


def blend(images: torch.Tensor, centre: torch.Tensor, strength: float) -> torch.Tensor:
    """Move each image from ``centre``, which broadcasts to it, by a factor uniform in [1 - strength, 1 + strength]."""
    factor = 1 + strength * (torch.rand(len(images), 1, 1, 1, device=images.device) * 2 - 1)
    return (centre + (images - centre) * factor).round_().clamp_(0, 255).to(torch.uint8)


def luminance(images: torch.Tensor) -> torch.Tensor:
    """RGB (N, 3, H, W) -> gray float (N, 1, H, W), by the weights of ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


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
