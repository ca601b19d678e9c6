"""From what a client sends to what it gets: bytes -> array -> probabilities -> CSV row and JSON."""

import base64
import csv
import json

import numpy as np
import orjson
import pytest
import torch
from PIL import Image

from src.inference import Predictor
from src.inference.predictor import calibrate
from src.inference.requests import MAX_IMAGES, parse_body, parse_request
from src.inference.torch_runtime import TorchRuntime
from src.models import ModelConfig, build_classifier
from src.predict import predict_folder
from src.preprocessing import FORMATS, ImageError, Preprocessing
from tests.drawing import GARMENTS, draw_garment, draw_photo, encode

CLASSES = list(GARMENTS)
ORIENTATION = 0x0112
# The modes that Pillow writes in each format, and how far lossy compression may move a gray level.
WRITES = {
    "PNG": ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "WEBP": ("L", "RGB", "RGBA"),
    "TIFF": ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
}
CASES = [(kind, mode) for kind, modes in WRITES.items() for mode in modes]


@pytest.fixture(scope="module", params=[1, 3], ids=["gray", "rgb"])
def predictor(request) -> Predictor:
    """An untrained classifier: conversions do not depend on what it has learnt."""
    spec = Preprocessing(28, 28, request.param)
    config = ModelConfig("drawn", "basic_cnn", {"widths": [8, 16]}, CLASSES, spec, temperature=0.5, exponent=1.3)
    torch.manual_seed(1)
    return Predictor(TorchRuntime(build_classifier(config)), config)


def written(image: Image.Image, kind: str, mode: str) -> bytes:
    """``image`` (mode L) in another mode and file format, saying the same thing."""
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    elif mode == "1":
        image = image.point(lambda value: 255 * (value > 60)).convert("1")
    elif mode == "P":
        image = image.convert("RGB").quantize(16)
    else:
        image = image.convert("RGB").convert(mode)
    return encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_every_format_and_mode_gives_the_same_pixels(predictor, kind, mode):
    image = draw_garment("Shirt")
    expected = np.asarray(image.point(lambda value: 255 * (value > 60)) if mode == "1" else image).astype(int)
    array = predictor.decode(written(image, kind, mode))
    assert array.shape == (predictor.config.preprocessing.channels, 28, 28)
    assert array.dtype == np.uint8
    difference = abs(array - expected)
    assert difference.mean() <= 3 if kind == "JPEG" else difference.max() <= 3  # CMYK and YCbCr round


def test_every_known_format_is_tested():
    assert set(WRITES) == set(FORMATS)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_lies_on_white(kind, channels):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    spec = Preprocessing(1, 2, channels)
    config = ModelConfig("drawn", "basic_cnn", {"widths": [8]}, CLASSES, spec)
    data = encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert Predictor(TorchRuntime(build_classifier(config)), config).decode(data).tolist() == [[[0, 255]]] * channels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(predictor, kind, orientation):
    """Exif 2.32: where row 0 and column 0 of the stored picture lie when it is shown upright."""
    upright = draw_photo((28, 28))
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    array = predictor.decode(encode(stored, kind, exif=exif, **options)).astype(int)
    assert abs(array - predictor.decode(encode(upright)).astype(int)).max() <= 8


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(predictor, kind):
    frames = [draw_garment(name).convert("RGB") for name in ("Bag", "Trouser", "Shirt")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    difference = predictor.decode(data).astype(int) - predictor.decode(encode(frames[0]))
    assert abs(difference).max() <= 3


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_an_image_error(predictor, kind):
    data = encode(draw_photo((200, 150)), kind)
    known = {"PNG": 8, "JPEG": 3, "WEBP": 12, "BMP": 10, "TIFF": 4, "GIF": 6}[kind]  # bytes that tell the format
    for length in (1, 7, 8, 20, 30, 60, 100, 200, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(ImageError) as error:
            predictor.decode(data[:length])
        assert error.value.reason == ("not_an_image" if length < known else "broken"), length


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (b"%PDF-1.7", "not_an_image"),
        (b"\x89PNG\r\n\x1a\n", "broken"),
        (b"II am a text", "not_an_image"),
        (bytes(1000), "not_an_image"),
        (encode(draw_photo(), "PPM"), "not_an_image"),
        (b"II\0*\x08\0\0\0\0\0\0\0\0\0", "broken"),
        (b"MM*\0\0\0\0\x08\0\0\0\0\0\0", "broken"),
        (encode(Image.fromarray(np.ones((4, 4), "f4")), "TIFF"), "unsupported"),
    ],
    ids=["empty", "text", "svg", "pdf", "signature", "like a TIFF", "zeros", "ppm", "TIFF II", "TIFF MM", "float"],
)
def test_what_is_no_picture_has_a_reason(predictor, data, reason):
    with pytest.raises(ImageError) as error:
        predictor.decode(data)
    assert error.value.reason == reason


# Base64 in JSON
IMAGE = bytes(range(256))
TEXT = base64.b64encode(IMAGE).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        base64.urlsafe_b64encode(IMAGE).decode(),
        TEXT.rstrip("="),
        base64.encodebytes(IMAGE).decode(),
        f"data:image/png;base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:image/svg+xml;charset=utf-8;base64,{TEXT}",
        f"DATA:image/png;BASE64,{TEXT}",
        f"\n data:image/png ; base64 ,{TEXT}",
        f'data:image/png;name="a,b{"c" * 300}";base64,{TEXT}',
    ],
    ids=[
        "standard",
        "url-safe",
        "no-padding",
        "lines",
        "data-uri",
        "bare-uri",
        "uri-with-charset",
        "capitals",
        "blanks",
        "long-name",
    ],
)
def test_every_form_of_base64(text):
    assert parse_body(json.dumps({"image": text}).encode()) == ([IMAGE], False)
    assert parse_body(b" \n" + json.dumps({"images": [text, TEXT]}).encode()) == ([IMAGE, IMAGE], True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"image": "', "bad_json"),
        ("[" * 100_000, "bad_json"),
        ("[1]", "no_image"),
        ("{}", "no_image"),
        ('{"picture": ""}', "no_image"),
        ('{"images": []}', "no_image"),
        ('{"images": "x"}', "no_image"),
        (json.dumps({"images": [TEXT] * (MAX_IMAGES + 1)}), "too_many"),
        (json.dumps({"image": TEXT, "images": [TEXT]}), "bad_json"),
        ('{"image": ""}', "empty"),
        ('{"image": "===="}', "empty"),
        ('{"image": null}', "bad_base64"),
        ('{"image": [1, 2]}', "bad_base64"),
        ('{"image": "not base64!"}', "bad_base64"),
        ('{"image": "abcde"}', "bad_base64"),
        ('{"image": "ab=cd"}', "bad_base64"),
        ('{"image": "gr\u00fcn"}', "bad_base64"),
        ('{"image": "data:image/png,abcd"}', "bad_base64"),
        ('{"image": "data:image/png;base64"}', "bad_base64"),
        ('{"image": "data:image/png;name=\\"abc,d"}', "bad_base64"),
        ('{"image": "http://example.org/a.png"}', "bad_base64"),
    ],
    ids=lambda value: value[:24],
)
def test_a_body_that_holds_no_image_has_a_reason(content, reason):
    with pytest.raises(ImageError) as error:
        parse_body(content.encode())
    assert error.value.reason == reason


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b" " * 1000, b"\xef\xbb\xbf\r\n\t"], ids=repr)
def test_what_may_stand_before_json(before):
    body = json.dumps({"image": TEXT}).encode()
    assert parse_body(before + body) == parse_body(bytearray(before + body)) == ([IMAGE], False)


# Forms
def form(*parts: tuple[str, bytes], boundary: str = "xx") -> bytes:
    """A multipart body; each part is what its Content-Disposition says beside the field's name, and its content."""
    heads = (f'--{boundary}\r\nContent-Disposition: form-data; name="n"{more}\r\n\r\n'.encode() for more, _ in parts)
    contents = (content + b"\r\n" for _, content in parts)
    return b"".join(map(bytes.__add__, heads, contents)) + f"--{boundary}--\r\n".encode()


FILE, TEXT_FIELD, UNFILLED = ('; filename="a.png"', IMAGE), ("", b"7"), ('; filename=""', b"")


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([FILE], ([IMAGE], False)),
        ([FILE, FILE], ([IMAGE, IMAGE], True)),
        ([FILE, TEXT_FIELD], ([IMAGE], False)),
        ([TEXT_FIELD, FILE], ([IMAGE], False)),
        ([FILE, UNFILLED], ([IMAGE], False)),
        ([("", IMAGE)], ([IMAGE], False)),
        ([("", IMAGE), UNFILLED], ([IMAGE], False)),
        ([('; filename=""', IMAGE)], ([IMAGE], False)),
        ([FILE, ('; filename="b.png"', b"")], ([IMAGE, b""], True)),
    ],
    ids=["one", "two", "text after", "text before", "unfilled", "no name", "no name, unfilled", "empty name", "empty"],
)
def test_the_files_of_a_form_count(parts, found):
    assert parse_request({"body": form(*parts)}, "multipart/form-data; boundary=xx") == found


def test_a_form_without_a_file_is_empty():
    with pytest.raises(ImageError, match="the form has no field") as error:
        parse_request({"body": form(UNFILLED)}, "multipart/form-data; boundary=xx")
    assert error.value.reason == "empty"


@pytest.mark.parametrize("boundary", ["----=_Part_1_2.3", "a:b/c", "'()+_,-./:=?", "xx"])
@pytest.mark.parametrize(
    "head", ["multipart/form-data; boundary={}", 'Multipart/Form-Data; charset=utf-8;\tBOUNDARY="{}"; more=1']
)
def test_the_boundary_of_a_form(head, boundary):
    assert parse_request({"body": form(FILE, boundary=boundary)}, head.format(boundary)) == ([IMAGE], False)


def test_anything_but_json_is_the_image_itself():
    for body in (encode(draw_photo()), b"", b"text"):
        assert parse_body(body) == ([body], False)
    assert parse_body(bytearray(b"text")) == ([b"text"], False)


# Arrays to answers
def test_probabilities_are_calibrated_and_sum_to_one(predictor):
    images = np.stack([predictor.decode(encode(draw_garment(kind))) for kind in CLASSES])
    rows = predictor.probabilities(images)
    assert rows.shape == (len(CLASSES), len(CLASSES))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)
    logits = predictor.runtime.model(torch.from_numpy(images)).detach()
    np.testing.assert_allclose(rows, calibrate(logits.numpy(), 0.5, 1.3), atol=1e-6)


def test_one_bad_image_disturbs_no_other(predictor):
    good = [encode(draw_garment(kind)) for kind in CLASSES]
    answers = predictor.predict([good[0], b"text", good[1], b"", good[2]])
    assert [answer.reason for answer in (answers[1], answers[3])] == ["not_an_image", "empty"]
    for answer, data in zip(answers[::2], good, strict=False):
        alone = predictor.predict([data])[0]
        assert answer.predicted_label == alone.predicted_label == CLASSES[answer.predicted_class]
        np.testing.assert_allclose(list(answer.probabilities.values()), list(alone.probabilities.values()), atol=1e-5)
    assert predictor.predict([]) == []
    assert predictor.predict([b""])[0].reason == "empty"


def test_a_prediction_is_plain_json(predictor):
    prediction = predictor.predict([encode(draw_garment("Bag"))])[0]
    answer = json.loads(orjson.dumps(vars(prediction)))
    assert list(answer) == ["predicted_class", "predicted_label", "confidence", "uncertain", "probabilities"]
    assert list(answer["probabilities"]) == CLASSES
    assert answer["confidence"] == max(answer["probabilities"].values())
    assert answer["predicted_label"] == CLASSES[answer["predicted_class"]]


def test_a_csv_row_holds_the_same_numbers(predictor, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    names = [
        f"{kind.lower()}.{extension}" for kind, extension in zip(CLASSES, ("png", "BMP", "tiff", "webp"), strict=True)
    ]
    for name, kind in zip(names, CLASSES, strict=True):
        draw_garment(kind).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    output = tmp_path / "out.csv"
    assert predict_folder(predictor, folder, output, batch_size=2) == (4, 1)
    with output.open(newline="") as file:
        rows = {row["filename"]: row for row in csv.DictReader(file)}
    assert rows.keys() == set(names)
    for name in names:
        prediction = predictor.predict([(folder / name).read_bytes()])[0]
        row = rows[name]
        assert (int(row["predicted_class"]), row["predicted_label"]) == (
            prediction.predicted_class,
            prediction.predicted_label,
        )
        read = [float(row[f"prob_{label}"]) for label in CLASSES]
        np.testing.assert_allclose(read, list(prediction.probabilities.values()), atol=1e-5)
        assert float(row["confidence"]) == max(read)
    with (tmp_path / "out.csv.errors.csv").open(newline="") as file:
        assert [row["filename"] for row in csv.DictReader(file)] == ["broken.jpg"]
