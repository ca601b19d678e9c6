"""Garment photos into the look that Fashion-MNIST gave its images: white on black, centred, gray.

The conversion is the one that the dataset's makers published (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747, section 2),
but for one step: they skip rows and columns to make an image smaller, here they are averaged.
"""

import numpy as np
from PIL import Image, ImageChops, ImageFilter

STYLES = ("plain", "fashion_mnist")  # plain: the image is only resized
CLOSE = 0.05 * 255  # gray levels, root mean square over the channels: 5 % of the largest distance in RGB space
# The second darkest corner of the 70,000 images is at most 12; that of their negatives is at least 152.
DARK = 64
DETAIL = 16  # pixels of a large photo for each of the result: more is averaged away before the background is sought
# Gaussian of radius 1 and standard deviation 1, subtracted from twice its sum: ImageMagick's -sharpen 1x1.
EDGE, CORNER = np.exp(-0.5), np.exp(-1.0)
CENTRE = 2 + 8 * (EDGE + CORNER)
SHARPEN = ImageFilter.Kernel(
    (3, 3),
    [-CORNER, -EDGE, -CORNER, -EDGE, CENTRE, -EDGE, -CORNER, -EDGE, -CORNER],
    CENTRE - 4 * (EDGE + CORNER),
)


def is_white_on_black(image: Image.Image, size: tuple[int, int]) -> bool:
    """Whether an ``L`` or ``RGB`` image has a dark background and no colour, as the dataset's have at any scale.

    ``size`` (width, height): that of the model's input, at which the corners and the colours are looked at.
    """
    if image.width > size[0] or image.height > size[1]:
        image = image.resize(size, Image.Resampling.BOX, reducing_gap=3.0)
    if image.mode == "RGB":
        red, green, blue = image.split()
        brightest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        darkest = ImageChops.darker(ImageChops.darker(red, green), blue)
        if ImageChops.subtract(brightest, darkest).getextrema()[1] > CLOSE:
            return False
        image = brightest
    right, bottom, pixels = image.width - 1, image.height - 1, image.load()
    corners = [pixels[at] for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    return sorted(corners)[1] < DARK


def to_white_on_black(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """An ``L`` or ``RGB`` photo as ``L`` of ``size`` (width, height), converted as the dataset's own photos were."""
    if (factor := max(image.size) // (DETAIL * max(size))) > 1:
        image = image.reduce(factor)
    image = image.crop(trimmed_box(image))
    scale = min(size[0] / image.width, size[1] / image.height)
    fitted = [min(room, max(1, round(scale * side))) for room, side in zip(size, image.size, strict=True)]
    image = image.resize(fitted, resample).filter(SHARPEN)
    canvas = Image.new("L", size, 255)
    canvas.paste(image.convert("L"), ((size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2))
    return ImageChops.invert(canvas)


def trimmed_box(image: Image.Image) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) without the edges that are close to the corner pixels' colour; all if nothing is left.

    Each side is compared with one corner, as ImageMagick's -trim does.
    """
    pixels = np.asarray(image, np.int32).reshape(image.height, image.width, -1)

    def differs(row: int, column: int) -> np.ndarray:
        return ((pixels - pixels[row, column]) ** 2).mean(-1) > CLOSE**2

    first = differs(0, 0)
    columns, rows = np.flatnonzero(first.any(0)), np.flatnonzero(first.any(1))
    to_the_right, below = np.flatnonzero(differs(0, -1).any(0)), np.flatnonzero(differs(-1, 0).any(1))
    if min(map(len, (columns, rows, to_the_right, below))) == 0:
        return 0, 0, *image.size
    box = int(columns[0]), int(rows[0]), int(to_the_right[-1]) + 1, int(below[-1]) + 1
    return box if box[0] < box[2] and box[1] < box[3] else (0, 0, *image.size)
