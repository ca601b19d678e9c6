"""src/data/augmentation.py: each augmentation does what it says, to uint8 batches, repeatably."""

import math

import pytest
import torch

from src.config import DEFAULT_CONFIG, load_config, to_dict
from src.data.augmentation import BatchAugmentation, blend, brighten, crop, erase, flip, luminance, move
from tests.conftest import ROOT

ALL = {
    "horizontal_flip": 0.5,
    "crop_padding": 2,
    "rotation_degrees": 15,
    "scale": 0.2,
    "translate": 0.2,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.3,
    "erasing": 0.5,
}


@pytest.fixture
def images() -> torch.Tensor:
    """uint8 (64, 3, 20, 28); no pixel is 0, so that zeros that come in are seen."""
    torch.manual_seed(0)
    return torch.randint(1, 256, (64, 3, 20, 28), dtype=torch.uint8)


@pytest.mark.parametrize("name", [*ALL, "all"])
@pytest.mark.parametrize("shape", [(16, 1, 28, 28), (16, 3, 20, 33), (5, 3, 20, 33), (1, 1, 1, 1)])
def test_shape_and_type_stay_and_the_seed_decides(name, shape):
    augmentation = BatchAugmentation(**(ALL if name == "all" else {name: ALL[name]}))
    images = torch.randint(256, shape, dtype=torch.uint8)
    original = images.clone()
    torch.manual_seed(3)
    first = augmentation(images)
    torch.manual_seed(3)
    second = augmentation(images)
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert torch.equal(images, original), "the stored images were changed"
    gray = shape[1] == 1
    if images[0].numel() > 1 and len(images) > 10 and not (gray and name == "saturation"):
        assert not torch.equal(first, images)
        assert not torch.equal(augmentation(images), first)


def test_nothing_is_done_when_all_is_zero(images):
    assert BatchAugmentation()(images) is images
    for augment in (flip, move, brighten, erase):
        assert torch.equal(augment(images, 0.0), images), augment
    assert torch.equal(crop(images, 0), images)


def test_the_default_config_is_accepted():
    BatchAugmentation(**to_dict(load_config(ROOT / DEFAULT_CONFIG))["augmentation"])


@pytest.mark.parametrize(
    "values",
    [{name: 1.1} for name in ("horizontal_flip", "brightness", "scale")]
    + [{name: -0.1} for name in ("erasing", "crop_padding", "rotation_degrees")],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=f"augmentation.*{next(iter(values))}"):
        BatchAugmentation(**values)


def test_flip_is_the_exact_mirror_of_about_its_share(images):
    assert torch.equal(flip(images, 1.0), images.flip(-1))
    many = images[:1].expand(4000, -1, -1, -1)
    mirrored = (flip(many, 0.3) != many).flatten(1).any(1)
    assert abs(mirrored.float().mean() - 0.3) < 0.04


def test_crop_is_a_shift_with_zeros_coming_in(images):
    padding = 3
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    height, width = images.shape[-2:]
    shifts = set()
    for original, moved in zip(padded, crop(images, padding), strict=True):
        matches = [
            (top, left)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            if torch.equal(original[:, top : top + height, left : left + width], moved)
        ]
        assert len(matches) == 1
        shifts |= set(matches)
    assert {top for top, _ in shifts} == {left for _, left in shifts} == set(range(2 * padding + 1))


def test_crop_keeps_the_memory_order_plain(images):
    assert crop(images, 2).is_contiguous()


def turned(images: torch.Tensor, degrees: float, monkeypatch) -> torch.Tensor:
    """``move`` with the angle at the end of its range instead of a random one."""
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.ones(shape, device=device))
    return move(images, degrees)


def test_a_quarter_turn_is_exact_also_when_the_image_is_not_square(monkeypatch):
    square = torch.randint(1, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(turned(square, 90, monkeypatch), square.rot90(1, (2, 3)))
    assert torch.equal(turned(square, 180, monkeypatch), square.flip(2, 3))
    wide = torch.randint(1, 256, (2, 1, 20, 40), dtype=torch.uint8)
    assert torch.equal(turned(wide, 90, monkeypatch)[..., 10:30], wide[..., 10:30].rot90(1, (2, 3)))


def test_rotation_stays_within_its_range():
    line = torch.zeros(200, 1, 41, 41, dtype=torch.uint8)
    line[:, :, 20, :] = 255
    column = move(line, 10)[:, 0, :, 40].float()  # where the line meets the right edge, if it still does
    height = (column * torch.arange(41)).sum(1) / column.sum(1).clamp(min=1)
    lowest, highest = 20 - 20 * math.tan(math.radians(10)) - 1, 20 + 20 * math.tan(math.radians(10)) + 1
    seen = height[column.sum(1) > 0]
    assert ((seen > lowest) & (seen < highest)).all()
    assert seen.max() - seen.min() > 4


def test_brightness_is_one_factor_an_image_within_its_range():
    gray = torch.full((2000, 1, 4, 4), 100, dtype=torch.uint8)
    bright = brighten(gray, 0.2)
    assert (bright == bright[:, :, :1, :1]).all()
    assert 80 <= bright.min() <= 82
    assert 118 <= bright.max() <= 120
    assert brighten(torch.full_like(gray, 250), 0.5).max() == 255


def test_a_shift_and_a_zoom_are_exact_at_the_ends_of_their_ranges(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.ones(shape, device=device))
    images = torch.randint(1, 256, (2, 3, 20, 40), dtype=torch.uint8)
    moved = move(images, 0, translate=0.25)  # what was a quarter to the right and below comes to the place
    assert torch.equal(moved[..., :15, :30], images[..., 5:, 10:])
    assert torch.equal(moved[..., 15:, 30:], images[..., -1:, -1:].expand(-1, -1, 5, 10)), "the border is repeated"
    doubled = move(images, 0, scale=1.0).float()
    middle = torch.nn.functional.interpolate(images[..., 5:15, 10:30].float(), scale_factor=2, mode="bilinear")
    assert (doubled - middle)[..., 2:-2, 2:-2].abs().max() <= 0.5


def test_contrast_and_saturation_keep_what_they_turn_around():
    torch.manual_seed(0)
    images = torch.randint(100, 156, (500, 3, 8, 8), dtype=torch.uint8)
    means = images.float().mean((1, 2, 3), keepdim=True)
    contrasted = blend(images, means, 0.5)
    assert (contrasted.float().mean((1, 2, 3)) - means.flatten()).abs().max() < 0.5
    ratio = contrasted.float().std((1, 2, 3)) / images.float().std((1, 2, 3))
    assert 0.45 < ratio.min() < 0.55
    assert 1.45 < ratio.max() < 1.55
    assert (luminance(blend(images, luminance(images), 0.5)) - luminance(images)).abs().max() < 1
    gray = images[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(blend(gray, luminance(gray), 1.0), gray)


def test_erase_blanks_one_rectangle_of_the_right_size_in_its_share_of_images():
    images = torch.zeros(4000, 1, 28, 28, dtype=torch.uint8)
    erased = erase(images, 0.5) != 0
    touched = erased.flatten(1).any(1)
    assert abs(touched.float().mean() - 0.5) < 0.03
    rows, columns = erased.any(3)[:, 0], erased.any(2)[:, 0]
    area = (rows.sum(1) * columns.sum(1))[touched] / 784
    assert 0.01 <= area.min() <= 0.04
    assert 0.3 <= area.max() <= 0.42
    assert abs(area.mean() - 0.21) < 0.02
    for found in (rows, columns):  # one run of neighbours, so a rectangle
        starts = found[:, 1:] & ~found[:, :-1]
        assert (starts.sum(1) + found[:, 0] <= 1).all()
    inside = erased[touched].flatten(1).sum(1) / (area * 784)
    assert (inside > 0.9).all()  # noise is 0 in one pixel of 256
