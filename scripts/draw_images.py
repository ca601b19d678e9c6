"""Draw the images that are sent to a server: ``python scripts/draw_images.py`` writes torchserve/golden, the default
golden set, and torchserve/sample_input.json.

Garments of our own that a Fashion-MNIST classifier should know, so that the repository needs no image of any dataset; a
golden set of real, labelled images says more (``operate deploy --golden``).
"""

import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SERVER = Path(__file__).resolve().parents[1] / "torchserve"
GOLDEN, SAMPLE = SERVER / "golden", SERVER / "sample_input.json"
SCALE = 16  # drawn this much larger and reduced, so that edges are soft
# Polygons on a canvas of 28 x 28, each with its shade of gray.
TROUSERS = [
    ([(8, 1), (20, 1), (21, 14), (21.5, 27), (15.5, 27), (14.3, 9), (13.7, 9), (12.5, 27), (6.5, 27), (7, 14)], 1.0),
    ([(8, 1), (20, 1), (20.1, 3), (7.9, 3)], 1.15),
]
# fmt: off
T_SHIRT = [
    (
        [(10, 2), (18, 2), (24, 5), (27, 11), (23, 13), (21, 10), (21, 26), (7, 26), (7, 10), (5, 13), (1, 11), (4, 5)],
        1.0,
    ),
    ([(11, 2), (17, 2), (14, 5)], 0.3),
]
# fmt: on
BAG = [
    ([(9, 10), (10, 4), (18, 4), (19, 10), (17, 10), (16.5, 6), (11.5, 6), (11, 10)], 0.8),
    ([(3, 10), (25, 10), (26, 25), (2, 25)], 1.0),
    ([(3, 10), (25, 10), (25, 13), (3, 13)], 1.15),
]
GARMENTS = {"Trouser": TROUSERS, "T-shirt/top": T_SHIRT, "Bag": BAG}
VARIANTS = [(210, 1.0), (180, 0.96), (150, 1.0), (220, 0.92)]  # gray, size


def draw(parts: list, gray: int, size: float) -> Image.Image:
    """A garment on black, mode L, 28 x 28 pixels."""
    image = Image.new("L", (28 * SCALE, 28 * SCALE), 0)
    canvas = ImageDraw.Draw(image)
    for outline, shade in parts:
        points = [(((x - 14) * size + 14) * SCALE, ((y - 14) * size + 14) * SCALE) for x, y in outline]
        canvas.polygon(points, min(255, int(gray * shade)))
    return image.filter(ImageFilter.GaussianBlur(SCALE / 3)).resize((28, 28), Image.Resampling.LANCZOS)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    rows = []
    for label, parts in GARMENTS.items():
        for number, (gray, size) in enumerate(VARIANTS, start=1):
            name = f"{label.split('/')[0].lower()}_{number}.png"
            draw(parts, gray, size).save(GOLDEN / name, "PNG", optimize=True)
            rows.append((name, label))
    with (GOLDEN / "labels.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("filename", "label"), *rows])
    legs, waistband = (outline for outline, _ in TROUSERS)
    buffer = io.BytesIO()
    draw([(legs, 1.0), (waistband, 1.175)], 200, 1.0).save(buffer, "PNG", optimize=True)
    SAMPLE.write_text(json.dumps({"image": base64.b64encode(buffer.getvalue()).decode()}) + "\n")
    print(f"wrote {len(rows)} images and labels.csv to {GOLDEN.name}, and {SAMPLE.name}")


if __name__ == "__main__":
    main()
