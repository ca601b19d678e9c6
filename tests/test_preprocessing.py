"""src/preprocessing.py: geometry, pixel formats, limits; any bytes give the right picture or an ImageError."""

import random
import struct
import threading
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from src.image_limits import BYTES_A_PIXEL, MAX_EXIF, MAX_PARTS, MAX_PIXEL_READS, MAX_READS, MAX_STRIPS
from src.preprocessing import MAX_PIXELS, ImageError, Preprocessing, decode, fit, preprocess
from tests.drawing import draw_garment, draw_photo, encode, png_chunk, write_png, write_tiff

GRAY, RGB = Preprocessing(28, 28, 1), Preprocessing(28, 28, 3)
STYLED = Preprocessing(28, 28, 1, style="fashion_mnist")
EXIF_ORIENTATION, EXIF_DIRECTORY = 0x0112, 34665


def pixels(data: bytes, channels: int = 1) -> list:
    """A one-row image, decoded but not resized."""
    return np.asarray(decode(data, Preprocessing(28, 28, channels)))[0].tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 2}, "channels is 2"),
        ({"height": 0}, "must be positive"),
        ({"resample": "best"}, "valid: nearest, bilinear, bicubic, lanczos"),
        ({"style": "mnist"}, "style is 'mnist'; valid: plain, fashion_mnist"),
    ],
)
def test_an_impossible_spec_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"height": 28, "width": 28, "channels": 1} | values)


@pytest.mark.parametrize("spec", [GRAY, RGB, Preprocessing(32, 48, 3, "bicubic"), Preprocessing(1, 1, 1, "nearest")])
def test_shape_and_type(spec):
    array = preprocess(encode(draw_photo()), spec)
    assert array.shape == spec.shape == (spec.channels, spec.height, spec.width)
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = draw_garment("Bag")
    np.testing.assert_array_equal(preprocess(encode(image), GRAY)[0], np.asarray(image))
    np.testing.assert_array_equal(preprocess(encode(image), RGB), np.stack([np.asarray(image)] * 3))


def test_resizing_keeps_the_picture():
    for spec in (Preprocessing(28, 28, 3), Preprocessing(14, 40, 3), Preprocessing(60, 90, 3)):
        array = fit(draw_photo((480, 320)), spec).astype(int)
        expected = np.asarray(draw_photo((480, 320)).resize((spec.width, spec.height), Image.Resampling.BOX))
        assert abs(array.transpose(1, 2, 0) - expected).max() <= 12


def test_a_large_jpeg_is_drafted_to_the_same_picture():
    photo = draw_photo((1600, 1200))
    spec = Preprocessing(28, 40, 3)
    for data in (encode(photo, "JPEG"), encode(photo, "MPO", save_all=True, append_images=[photo.rotate(180)])):
        drafted = decode(data, spec)
        assert drafted.size == (400, 300)
        assert abs(fit(drafted, spec).astype(int) - fit(photo, spec)).max() <= 6


def test_drafting_leaves_enough_pixels_for_a_turned_image():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    spec = Preprocessing(20, 100, 3)
    image = decode(encode(draw_photo((1600, 1600)), "JPEG", exif=exif), spec)
    assert min(image.size) >= 4 * spec.width


# Transparency: one colour of a PNG may be transparent, named at the depth of the file.
@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (1, b"\xa0", 1, [255, 0, 255]),
        (1, b"\xa0", 0, [255, 255, 255]),
        (2, b"\x18", 1, [0, 255, 170]),
        (4, b"\x03\x50", 3, [0, 255, 85]),
        (8, b"\x03\x5f\x00", 3, [255, 95, 0]),
        (16, b"\x12\x34\x12\x35\xff\xff", 0x1234, [255, 18, 255]),
    ],
)
def test_the_transparent_gray_of_a_png_becomes_white(depth, row, transparent, expected):
    data = write_png((3, 1), depth, 0, [row], png_chunk(b"tRNS", struct.pack(">H", transparent)))
    assert pixels(data) == expected
    assert pixels(data, 3) == [[value] * 3 for value in expected]


def test_the_transparent_colour_of_a_png_becomes_white():
    data = write_png((2, 1), 8, 2, [b"\x01\x02\x03\x10\x10\x10"], png_chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))
    assert pixels(data, 3) == [[255] * 3, [16] * 3]


def test_the_transparent_colour_of_a_16_bit_png_takes_no_other_with_it():
    row = struct.pack(">6H", 0x1234, 0, 0, 0x1235, 0, 0)
    data = write_png((2, 1), 16, 2, [row], png_chunk(b"tRNS", struct.pack(">3H", 0x1234, 0, 0)))
    assert pixels(data, 3) == [[0x12, 0, 0]] * 2


def test_a_half_transparent_palette_entry_is_mixed_with_white():
    palette = png_chunk(b"PLTE", bytes([0, 0, 0, 50, 50, 50, 100, 100, 100, 150, 150, 150]))
    data = write_png((4, 1), 2, 3, [b"\x1b"], palette, png_chunk(b"tRNS", b"\x00\x80"))
    assert pixels(data) == [255, 152, 100, 150]


def test_16_bits_with_alpha():
    assert pixels(write_png((2, 1), 16, 4, [b"\x12\x34\x80\x00\x00\x00\x00\x00"])) == [136, 255]
    assert pixels(write_png((1, 1), 16, 6, [b"\x12\x34" * 3 + b"\xff\xff"])) == [18]


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_16_bit_gray_of_either_byte_order_is_scaled(kind):
    image = Image.fromarray(np.array([[0, 128, 129, 257, 32768, 65535]], dtype=kind))
    assert pixels(encode(image, "TIFF")) == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("bits", "zero", "content"),
    [
        (8, "black", b"\0\xff"),
        (8, "white", b"\xff\0"),
        (12, "black", b"\0\x0f\xff"),
        (16, "black", b"\0\0\xff\xff"),
        (16, "white", b"\xff\xff\0\0"),
    ],
)
def test_tiff_gray_of_any_depth_and_sense(bits, zero, content, orientation):
    tags = {258: (3, 1, bits), 262: (3, 1, 1 if zero == "black" else 0), 274: (3, 1, orientation)}
    array = np.asarray(decode(write_tiff((2, 1), content, tags), GRAY))
    assert array.shape == ((1, 2) if orientation == 1 else (2, 1))
    assert array.ravel().tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["i4", "f4"])
def test_32_bits_a_channel_are_refused(kind):
    with pytest.raises(ImageError, match="32-bit") as error:
        preprocess(encode(Image.fromarray(np.ones((2, 2), kind)), "TIFF"), GRAY)
    assert error.value.reason == "unsupported"


def test_lab_reaches_gray_and_rgb():
    data = encode(Image.frombytes("LAB", (2, 1), bytes([255, 0, 0, 0, 0, 0])), "TIFF")
    assert pixels(data) == [255, 0]
    np.testing.assert_allclose(pixels(data, 3), [[255] * 3, [0] * 3], atol=2)


# Limits
def test_the_pixel_limit_is_inclusive():
    row = bytes(625)  # one bit a pixel
    assert preprocess(write_png((5000, MAX_PIXELS // 5000), 1, 0, [row] * (MAX_PIXELS // 5000)), GRAY).max() == 0
    for width, height in ((MAX_PIXELS + 1, 1), (1, MAX_PIXELS + 1), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(ImageError, match=str(MAX_PIXELS)) as error:
            preprocess(write_png((width, height), 8, 0, []), GRAY)
        assert error.value.reason == "too_large"


def test_huge_dimensions_with_hardly_any_data_are_a_damaged_file():
    with pytest.raises(ImageError) as error:
        preprocess(write_png((20_000, 1000), 8, 0, [bytes(10)]), GRAY)
    assert error.value.reason == "broken"


def test_a_tiff_of_countless_strips_is_refused():
    count = MAX_STRIPS + 1
    tags = [(256, 1, 1), (257, 1, count), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, count, 126), (277, 1, 1),
            (278, 1, 1), (279, count, 126 + 4 * count)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, number, value) for tag, number, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + b"\x80" * 4
    assert len(head) == 126
    data = head + struct.pack("<I", 122) * count + struct.pack("<I", 1) * count
    with pytest.raises(ImageError, match="strips") as error:
        preprocess(data, GRAY)
    assert error.value.reason == "too_large"


def test_an_image_has_few_bytes_for_its_pixels():
    """Before Pillow looks at it: after 15 seconds of a batch no image is opened."""
    data = encode(draw_garment("Bag"), "JPEG")
    fits = len(data) // BYTES_A_PIXEL + 1
    assert fits < 28 * 28
    for limit, message in ((0, "bytes, the limit is 0"), (fits - 1, "bytes"), (fits, "pixels, the limit")):
        with pytest.raises(ImageError, match=message) as error:
            preprocess(data, GRAY, max_pixels=limit)
        assert error.value.reason == "too_large"


def run_length_bmp(codes: bytes) -> bytes:
    """10x10 pixels of 8 bits."""
    header = struct.pack("<IiiHHIIiiII", 40, 10, 10, 1, 8, 1, len(codes), 0, 0, 256, 256)
    return b"BM" + struct.pack("<IHHI", 1078 + len(codes), 0, 0, 1078) + header + bytes(1024) + codes


def test_a_bmp_of_many_runs_is_read_and_one_of_countless_is_refused():
    empty, rows = b"\0\0", b"\x0a\1\0\0" * 10 + b"\0\1"
    assert preprocess(run_length_bmp(empty * MAX_READS + rows), GRAY).max() == 0
    with pytest.raises(ImageError, match="too many pieces") as error:
        preprocess(run_length_bmp(empty * MAX_PIXEL_READS + rows), GRAY)
    assert error.value.reason == "too_large"


def exif(count: int, directory: bool = False) -> bytes:
    """``count`` rationals as the orientation, or in a directory of their own."""
    own = struct.pack("<HHHIII", 1, EXIF_ORIENTATION, 5, count, 44, 0)
    first = struct.pack("<HHHIII", 1, EXIF_DIRECTORY, 4, 1, 26, 0) if directory else own
    return b"II*\0" + struct.pack("<I", 8) + first + own + struct.pack("<II", 3, 7) * count


def with_exif(content: bytes) -> bytes:
    """A JPEG with EXIF in as many segments as it takes."""
    data = encode(draw_garment("Bag"), "JPEG")
    parts = [b"Exif\0\0" + content[at : at + 65_000] for at in range(0, len(content), 65_000)]
    return data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(part)) + part for part in parts) + data[2:]


def with_chunks(*chunks: bytes) -> bytes:
    data = encode(draw_garment("Bag"))
    return data[:33] + b"".join(chunks) + data[33:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_chunks(png_chunk(b"eXIf", exif(MAX_EXIF // 8))), f"bytes of EXIF, the limit is {MAX_EXIF}"),
        (with_chunks(png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n1\n" + bytes(MAX_EXIF))), "bytes of EXIF"),
        (with_exif(exif(65_000 * MAX_PARTS // 8)), f"{MAX_PARTS + 1} EXIF segments, the limit is {MAX_PARTS}"),
        (
            with_chunks(*[png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6), 0)[:9000])] * (MAX_PARTS + 1)),
            f"{MAX_PARTS + 1} colour profiles",
        ),
    ],
    ids=["png", "png text", "jpeg", "colour profiles"],
)
def test_metadata_that_take_long_are_refused(data, message):
    with pytest.raises(ImageError, match=message) as error:
        preprocess(data, GRAY)
    assert error.value.reason == "too_large"


def test_metadata_of_a_camera_are_left_alone():
    """Pillow would unpack them with the pixels of a TIFF."""
    count = 200_000
    data = write_tiff((8, 8), bytes(8 * count), {EXIF_DIRECTORY: (4, 1, 10**6)})
    data = data[: 10**6].ljust(10**6, b"\0") + struct.pack("<HHHIII", 1, 33434, 5, count, 8, 0) + data[10**6 :]
    tracemalloc.start()
    preprocess(data, GRAY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


# Damage
def test_damaged_metadata_does_not_spoil_good_pixels():
    photo = draw_photo()
    for kind in ("JPEG", "WEBP", "PNG"):
        good = preprocess(encode(photo, kind), RGB)
        np.testing.assert_array_equal(preprocess(encode(photo, kind, exif=b"Exif\0\0MM\0*garbage"), RGB), good)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip bits, overwrite the header, delete or insert."""
    content, kind, at = bytearray(data), rng.randrange(5), rng.randrange(len(data))
    if kind == 0:
        del content[at:]
    elif kind == 1:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        for _ in range(6):
            content[rng.randrange(min(len(content), 150))] = rng.choice([0, 1, 127, 128, 255])
    elif kind == 3:
        del content[at : at + rng.randint(1, 20)]
    else:
        content[at:at] = rng.randbytes(rng.randint(1, 20))
    return bytes(content)


def test_mutated_files_give_a_picture_or_an_image_error():
    photo, frames, rng = draw_photo(), [draw_photo().rotate(90 * i, expand=False) for i in range(3)], random.Random(1)
    files = [
        encode(photo.convert(mode), kind) for kind in ("PNG", "TIFF", "BMP", "GIF") for mode in ("1", "L", "P", "RGB")
    ]
    files += [encode(photo.convert(mode), "JPEG", exif=Image.Exif()) for mode in ("L", "RGB", "CMYK")]
    files += [encode(photo.convert(mode), "TIFF") for mode in ("I", "F", "CMYK", "YCbCr", "RGBA", "LA")]
    files += [encode(photo, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")]
    files += [encode(photo, "WEBP"), encode(photo.convert("RGBA"), "WEBP", lossless=True)]
    files += [
        encode(frames[0], kind, save_all=True, append_images=frames[1:])
        for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO")
    ]
    outcomes = {"picture": 0}
    for _ in range(8000):
        try:
            array = preprocess(mutate(rng.choice(files), rng), rng.choice([GRAY, RGB, STYLED]))
        except ImageError as error:
            outcomes[error.reason] = outcomes.get(error.reason, 0) + 1
        else:
            assert array.dtype == np.uint8
            outcomes["picture"] += 1
    assert outcomes.keys() == {"picture", "broken", "not_an_image", "too_large", "unsupported", "empty"}, outcomes


def test_threads_leave_the_warning_filters_alone():
    photo = encode(draw_photo(), "TIFF")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [preprocess(photo, RGB) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert list(warnings.filters) == before
