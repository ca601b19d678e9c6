"""Draw a pair of trousers and write it as torchserve/sample_input.json: ``python scripts/draw_sample.py``.

The picture is ours, so that the repository needs no image of any dataset.
"""

import base64
import io
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SAMPLE = Path(__file__).resolve().parents[1] / "torchserve" / "sample_input.json"


def draw_trousers(size: int = 28) -> Image.Image:
    """White trousers on black, mode L, ``size`` x ``size`` pixels; drawn large and reduced, so that edges are soft."""
    scale = 16
    image = Image.new("L", (28 * scale, 28 * scale), 0)
    canvas = ImageDraw.Draw(image)
    legs = [(8, 1), (20, 1), (21, 14), (21.5, 27), (15.5, 27), (14.3, 9), (13.7, 9), (12.5, 27), (6.5, 27), (7, 14)]
    waistband = [(8, 1), (20, 1), (20.1, 3), (7.9, 3)]
    for outline, gray in ((legs, 200), (waistband, 235)):
        canvas.polygon([(x * scale, y * scale) for x, y in outline], gray)
    return image.filter(ImageFilter.GaussianBlur(scale / 3)).resize((size, size), Image.Resampling.LANCZOS)


def main() -> None:
    buffer = io.BytesIO()
    draw_trousers().save(buffer, "PNG", optimize=True)
    SAMPLE.write_text(json.dumps({"image": base64.b64encode(buffer.getvalue()).decode()}) + "\n")
    print(f"wrote {SAMPLE.name}: {len(buffer.getvalue())} bytes of PNG")


if __name__ == "__main__":
    main()
