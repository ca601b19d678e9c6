"""Datasets of photos as their authors hand them out, drawn small: a folder a class, or a folder an item."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.drawing import GARMENTS, draw_garment

COLOURS = {"Shirt": (200, 30, 30), "Trouser": (30, 160, 40), "Sneaker": (40, 60, 200), "Bag": (190, 170, 30)}


def draw_photo_of(kind: str, seed: int, size: int = 48) -> Image.Image:
    """A coloured garment of ``kind`` on white, RGB."""
    shape = np.asarray(draw_garment(kind, seed, size), float)[..., None] / 255
    return Image.fromarray((255 - shape * (255 - np.array(COLOURS[kind]))).astype(np.uint8))


def write_classes(root: Path, count: int, seed: int = 0) -> Path:
    """``count`` JPEGs in each of four class folders of ``root``."""
    for number, kind in enumerate(GARMENTS):
        folder = root / kind
        folder.mkdir(parents=True)
        for index in range(count):
            draw_photo_of(kind, seed + 1000 * number + index).save(folder / f"{index:03d}.jpg")
    return root


def write_items(root: Path, items: int, views: int) -> Path:
    """DeepFashion's layout below ``root``: ``items`` of each class, each seen from ``views`` sides."""
    for number, kind in enumerate(GARMENTS):
        for item in range(items):
            folder = root / ("MEN" if item % 2 else "WOMEN") / kind / f"id_{item:08d}"
            folder.mkdir(parents=True)
            for view in range(views):
                draw_photo_of(kind, 1000 * number + item).rotate(view, fillcolor="white").save(folder / f"{view}.jpg")
    return root
