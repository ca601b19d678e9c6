"""src/styles.py and src/training/photos.py: photos come out white on black; what already is stays as it is."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from src.data.fashion_mnist import FILES, SUBFOLDER, read_idx
from src.models import ModelConfig, build_classifier, save_model
from src.preprocessing import Preprocessing, fit, preprocess
from src.styles import is_on_black
from src.training.photos import CLASSES, END, main
from tests.conftest import ROOT
from tests.drawing import GARMENTS, draw_garment, draw_photo, encode

STYLE = Preprocessing(28, 28, 1, style="fashion_mnist")
PLAIN = Preprocessing(28, 28, 1)
SIZE = (28, 28)
BACKGROUNDS = {"white": (255, 255, 255), "rose": (250, 215, 220), "blue": (190, 215, 250), "gray": (225, 225, 225)}


def photo(colour: tuple[int, ...], kind: str = "Trouser", size: tuple[int, int] = (300, 400)) -> Image.Image:
    """A dark garment in the upper left of a photo of that background; ``(0, 0, 0, 0)`` is a transparent one."""
    image = Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour)
    outline = [(20 + 0.5 * size[0] * x, 30 + 0.6 * size[1] * y) for x, y in GARMENTS[kind]]
    ImageDraw.Draw(image).polygon(outline, (40, 50, 90, 255)[: len(colour)])
    return image


def extent(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Columns left and right, rows above and below, of what is bright."""
    rows, columns = (np.flatnonzero((pixels > 100).any(axis)) for axis in (1, 0))
    return int(columns[0]), 27 - int(columns[-1]), int(rows[0]), 27 - int(rows[-1])


@pytest.mark.parametrize("kind", GARMENTS)
@pytest.mark.parametrize("colour", [*BACKGROUNDS.values(), (0, 0, 0, 0)], ids=[*BACKGROUNDS, "transparent"])
def test_a_garment_comes_out_white_on_black_and_centred(kind, colour):
    pixels = preprocess(encode(photo(colour, kind)), STYLE)[0]
    left, right, above, below = extent(pixels)
    assert abs(left - right) <= 1
    assert abs(above - below) <= 1
    assert min(left, above) <= 1, "the longest edge fills the picture"
    x, y = np.ptp(np.array(GARMENTS[kind]) * (150, 240), axis=0)
    assert (28 - left - right) / (28 - above - below) == pytest.approx(x / y, rel=0.12)
    assert pixels[above : 28 - below, left : 28 - right].max() > 180
    assert np.median(pixels[0]) <= 70
    assert is_on_black(Image.fromarray(pixels), SIZE)


@pytest.mark.parametrize("kind", GARMENTS)
def test_converting_twice_is_converting_once(kind):
    once = fit(photo(BACKGROUNDS["white"], kind), STYLE)[0]
    np.testing.assert_array_equal(fit(Image.fromarray(once), STYLE)[0], once)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("side", [14, 28, 40, 300])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_what_is_white_on_black_is_only_resized(kind, side, mode):
    if mode == "P" and kind in ("JPEG", "WEBP"):
        pytest.skip(f"{kind} has no palette")
    data = encode(draw_garment("Shirt", seed=3).resize((side, side), Image.Resampling.BICUBIC).convert(mode), kind)
    resized = fit(Image.open(io.BytesIO(data)).convert("L"), PLAIN)
    np.testing.assert_array_equal(preprocess(data, STYLE), resized)


def test_a_dark_garment_that_touches_the_upper_corners_is_no_background():
    image = Image.new("RGB", (300, 400), "white")
    ImageDraw.Draw(image).polygon([(0, 0), (299, 0), (220, 399), (80, 399)], (25, 25, 28))
    assert not is_on_black(image, SIZE)
    assert not is_on_black(image.convert("L"), SIZE)
    assert not is_on_black(photo(BACKGROUNDS["white"]).convert("L"), SIZE)


@pytest.mark.parametrize("tint", [(255, 245, 235), (200, 30, 40)], ids=["warm", "red"])
def test_a_coloured_garment_on_black_stays_bright_on_black(tint):
    gray = np.asarray(draw_garment("Shirt", seed=3), np.float32)[..., None] / 255
    pixels = fit(Image.fromarray((gray * tint).round().astype(np.uint8)), STYLE)[0]
    assert pixels[0].max() == pixels[:, 0].max() == 0
    np.testing.assert_allclose(pixels, gray[..., 0] * np.dot(tint, (0.299, 0.587, 0.114)), atol=2)


@pytest.mark.parametrize("side", [28, 280])
def test_an_image_on_black_that_is_not_square_is_not_squashed(side):
    garment = draw_garment("Shirt", seed=3).resize((side, side), Image.Resampling.BICUBIC)
    wide = Image.new("L", (2 * side, side))
    wide.paste(garment, (side // 2, 0))
    pixels = fit(wide, STYLE)[0].astype(int)
    middle = np.asarray(garment.resize((14, 14), Image.Resampling.BILINEAR, reducing_gap=3.0)).astype(int)
    assert abs(pixels[7:21, 7:21] - middle).max() <= 2
    pixels[7:21, 7:21] = 0
    assert pixels.max() <= 2


def test_a_garment_that_is_small_in_its_photo_keeps_its_detail_as_jpeg():
    image = Image.new("RGB", (900, 900), "white")
    image.paste(photo(BACKGROUNDS["white"], "Shirt", (200, 200)), (400, 400))
    png, jpeg = (preprocess(encode(image, kind), STYLE).astype(int) for kind in ("PNG", "JPEG"))
    assert abs(png - jpeg).mean() < 12


def test_no_image_of_the_dataset_is_converted_and_every_negative_is(mirror):
    changed = taken = count = 0
    for name in (name for name in FILES if "images" in name):
        for pixels in read_idx(mirror / SUBFOLDER / name):
            changed += not np.array_equal(fit(Image.fromarray(pixels), STYLE)[0], pixels)
            taken += is_on_black(Image.fromarray(255 - pixels), SIZE)
            count += 1
    assert (count, changed, taken) == (70_000, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 2), (3, 900), (28, 28), (27, 29)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_shape_and_an_image_of_one_colour(size, channels):
    spec = Preprocessing(28, 28, channels, style="fashion_mnist")
    for colour in ("white", "black"):
        pixels = preprocess(encode(Image.new("RGB", size, colour)), spec)
        assert pixels.shape == (channels, 28, 28)
        assert pixels.max() == 0
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    assert preprocess(encode(Image.fromarray(noise)), spec).shape == (channels, 28, 28)


def test_white_stays_black_and_red_keeps_its_gray():
    assert fit(Image.new("RGB", (50, 20), "white"), STYLE).max() == 0
    red = fit(Image.new("RGB", (50, 50), "red"), STYLE)
    assert np.unique(red).tolist() == [255 - 76]


def test_a_large_photo_gives_about_what_a_small_one_gives():
    small = fit(photo(BACKGROUNDS["white"]), STYLE).astype(int)
    large = preprocess(encode(photo(BACKGROUNDS["white"]).resize((3000, 4000)), "JPEG"), STYLE)
    assert abs(small - large).mean() < 6


# The measurement
def add_photos(folder: Path, count: int = 2) -> Path:
    """Drawn photos of every class, and folders and files that do not count."""
    for name in [*CLASSES, "hat"]:
        (folder / "validation" / name).mkdir(parents=True)
        for index in range(count):
            draw_photo((60 + index, 80)).save(folder / "validation" / name / f"{index}.jpg")
    (folder / "LICENSE").write_text("CC0")
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    """An untrained Fashion-MNIST classifier."""
    card = ModelConfig.load(ROOT / "models" / "best_model" / "config.json")
    save_model(tmp_path / "model", build_classifier(card), card)
    return tmp_path / "model"


def measure(photos: Path, model: Path, folder: Path) -> int:
    config = ["--config", str(ROOT / "configs" / "config.yaml"), f"paths.metrics={folder}/metrics"]
    return main(["--photos", str(photos), "--model-path", str(model), *config])


def test_a_folder_and_a_tar_measure_the_same(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = add_photos(tmp_path / "clothes")
    with tarfile.open(tmp_path / "clothes.tar", "w") as archive:
        archive.add(photos, ".")
    results = []
    for source in (photos, tmp_path / "clothes.tar"):
        assert measure(source, model, tmp_path) == 0
        results.append(json.loads((tmp_path / "metrics" / "photos.json").read_text()) | {"source": ""})
    assert results[0] == results[1]
    assert results[0]["photos"] == 2 * len(CLASSES)
    for style in ("plain", "fashion_mnist"):
        scores = results[0][style]
        assert scores["accuracy_per_class"].keys() == CLASSES.keys()
        assert scores["accuracy"] == pytest.approx(np.mean(list(scores["accuracy_per_class"].values())), abs=1e-3)


def test_the_section_is_replaced_and_the_rest_stays(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = add_photos(tmp_path / "clothes", 1)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "results.md"
    page.write_text("# Results\n\nBefore.\n")
    assert measure(photos, model, tmp_path) == 0
    first = page.read_text()
    page.write_text(first + "\nAfter.\n")
    assert measure(photos, model, tmp_path) == 0
    assert page.read_text() == first + "\nAfter.\n"
    assert first.startswith("# Results\n\nBefore.\n\n<!-- photos: begin -->\n## Photos\n")
    assert first.endswith(f"{END}\n")


def test_photos_that_are_not_there_are_an_error(model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert measure(tmp_path / "nothing.tar", model, tmp_path) == 1
    assert measure(tmp_path / "empty", model, tmp_path) == 1
    (tmp_path / "text.tar").write_bytes(b"no tar")
    assert measure(tmp_path / "text.tar", model, tmp_path) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in errors] == [True] * 3
    assert "does not exist" in errors[0]
    assert "holds no photo validation/<class>/<photo>" in errors[1]
    assert "text.tar is no tar that can be read" in errors[2]
