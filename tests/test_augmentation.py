"""src/data/augmentation.py: each augmentation does what it says, to uint8 batches, repeatably."""

import math

import pytest
import torch

from src.config import DEFAULT_CONFIG, load_config, to_dict
from src.data.augmentation import BatchAugmentation, brighten, crop, erase, flip, rotate
from tests.conftest import ROOT

ALL = {"horizontal_flip": 0.5, "crop_padding": 2, "rotation_degrees": 15, "brightness": 0.3, "erasing": 0.5}


@pytest.fixture
def images() -> torch.Tensor:
    """uint8 (64, 3, 20, 28); no pixel is 0, so that zeros that come in are seen."""
    torch.manual_seed(0)
    return torch.randint(1, 256, (64, 3, 20, 28), dtype=torch.uint8)


@pytest.mark.parametrize("name", [*ALL, "all"])
@pytest.mark.parametrize("shape", [(16, 1, 28, 28), (5, 3, 20, 33), (1, 1, 1, 1)])
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
    if images[0].numel() > 1 and len(images) > 10:
        assert not torch.equal(first, images)
        assert not torch.equal(augmentation(images), first)


def test_nothing_is_done_when_all_is_zero(images):
    assert BatchAugmentation()(images) is images
    for augment in (flip, rotate, brighten, erase):
        assert torch.equal(augment(images, 0.0), images), augment
    assert torch.equal(crop(images, 0), images)


def test_the_default_config_is_accepted():
    BatchAugmentation(**to_dict(load_config(ROOT / DEFAULT_CONFIG))["augmentation"])


@pytest.mark.parametrize(
    "values",
    [{"horizontal_flip": 1.1}, {"erasing": -0.1}, {"brightness": 2}, {"crop_padding": -1}, {"rotation_degrees": -5}],
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
    """``rotate`` with the angle at the end of its range instead of a random one."""
    monkeypatch.setattr(torch, "rand", lambda count, device: torch.ones(count, device=device))
    return rotate(images, degrees)


def test_a_quarter_turn_is_exact_also_when_the_image_is_not_square(monkeypatch):
    square = torch.randint(1, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(turned(square, 90, monkeypatch), square.rot90(1, (2, 3)))
    assert torch.equal(turned(square, 180, monkeypatch), square.flip(2, 3))
    wide = torch.randint(1, 256, (2, 1, 20, 40), dtype=torch.uint8)
    assert torch.equal(turned(wide, 90, monkeypatch)[..., 10:30], wide[..., 10:30].rot90(1, (2, 3)))


def test_rotation_stays_within_its_range():
    line = torch.zeros(200, 1, 41, 41, dtype=torch.uint8)
    line[:, :, 20, :] = 255
    column = rotate(line, 10)[:, 0, :, 40].float()  # where the line meets the right edge, if it still does
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
