"""Garment photos into the look that Fashion-MNIST gave its images: white on black, centred, gray.

The conversion is the one that the dataset's makers published (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747, section 2),
but for one step: they skip rows and columns to make an image smaller, here they are averaged.
"""

import numpy as np
from PIL import Image, ImageChops, ImageFilter

STYLES = ("plain", "fashion_mnist")  # plain: the image is only resized
CLOSE = 0.05 * 255  # gray levels, root mean square over the channels: 5 % of the largest distance in RGB space
# The second darkest corner of the 70,000 images is at most 12, that of their negatives at least 152; of the border of
# each image 41 % or more are below 82.
DARK = 82
DARK_LEVELS = bytes(range(DARK))
DARK_BORDER = 0.4
DETAIL = 16  # pixels of a large photo for each of the result: more is averaged away before the background is sought
# Gaussian of radius 1 and standard deviation 1, subtracted from twice its sum: ImageMagick's -sharpen 1x1.
EDGE, CORNER = np.exp(-0.5), np.exp(-1.0)
CENTRE = 2 + 8 * (EDGE + CORNER)
SHARPEN = ImageFilter.Kernel(
    (3, 3),
    [-CORNER, -EDGE, -CORNER, -EDGE, CENTRE, -EDGE, -CORNER, -EDGE, -CORNER],
    CENTRE - 4 * (EDGE + CORNER),
)


def is_on_black(image: Image.Image, size: tuple[int, int]) -> bool:
    """Whether the background of an ``L`` or ``RGB`` image is dark, as the dataset's is at any scale.

    ``size`` (width, height): that of the model's input, at which the corners and the border are looked at.
    """
    if image.width > size[0] or image.height > size[1]:
        image = image.resize(size, Image.Resampling.BOX, reducing_gap=3.0)
    if image.mode == "RGB":  # the brightest channel: a dark red is bright enough to be no background
        red, green, blue = image.split()
        image = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    width, pixels = image.width, image.tobytes()
    corners = sorted((pixels[0], pixels[width - 1], pixels[-width], pixels[-1]))
    if corners[1] >= DARK:
        return False
    border = pixels[:width] + pixels[-width:] + pixels[::width] + pixels[width - 1 :: width]
    return len(border.translate(None, DARK_LEVELS)) <= (1 - DARK_BORDER) * len(border)


def keep_on_black(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """An image on black as ``L``: untouched when shaped like ``size``, or else fitted into it, black around it."""
    image = image if image.mode == "L" else image.convert("L")  # which would copy it
    if image.width * size[1] == image.height * size[0]:
        return image
    return centred(fitted(image, size, resample), size, 0)


def to_white_on_black(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """An ``L`` or ``RGB`` photo as ``L`` of ``size`` (width, height), converted as the dataset's own photos were."""
    if (factor := -(-max(image.size) // (DETAIL * max(size)))) > 1:
        image = image.reduce(factor)
    image = fitted(image.crop(trimmed_box(image)), size, resample).filter(SHARPEN)
    return ImageChops.invert(centred(image.convert("L"), size, 255))


def fitted(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """The image as large as fits into ``size``, in its own proportions."""
    scale = min(size[0] / image.width, size[1] / image.height)
    sides = [min(room, max(1, round(scale * side))) for room, side in zip(size, image.size, strict=True)]
    return image.resize(sides, resample, reducing_gap=3.0)


def centred(image: Image.Image, size: tuple[int, int], gray: int) -> Image.Image:
    """An ``L`` image in the middle of one of ``size``, ``gray`` around it; one of a single value goes on around it."""
    lowest, highest = image.getextrema()
    canvas = Image.new("L", size, lowest if lowest == highest else gray)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def trimmed_box(image: Image.Image) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) without the edges that are close to the corner pixels' colour; all if nothing is left.

    Each side is compared with one corner, as ImageMagick's -trim does.
    """
    pixels = np.asarray(image, np.int32).reshape(image.height, image.width, -1)
    edges: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def far_from(row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
        """The columns and the rows that hold a pixel unlike the one given; corners of one colour are asked once."""
        colour = pixels[row, column]
        if (key := colour.tobytes()) not in edges:
            differs = ((pixels - colour) ** 2).mean(-1) > CLOSE**2
            edges[key] = np.flatnonzero(differs.any(0)), np.flatnonzero(differs.any(1))
        return edges[key]

    columns, rows = far_from(0, 0)
    to_the_right, below = far_from(0, -1)[0], far_from(-1, 0)[1]
    if min(map(len, (columns, rows, to_the_right, below))) == 0:
        return 0, 0, *image.size
    box = int(columns[0]), int(rows[0]), int(to_the_right[-1]) + 1, int(below[-1]) + 1
    return box if box[0] < box[2] and box[1] < box[3] else (0, 0, *image.size)
