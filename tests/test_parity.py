"""evaluate.py's path, the CSV, the handler in process and a running server give one answer for one image.

All use the runtime of the archive that ships."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data.fashion_mnist import SUBFOLDER, read_idx
from src.inference import Predictor
from src.training.predictions import in_batches
from tests.conftest import ROOT, RUNTIME
from tests.drawing import GARMENTS, draw_garment, encode
from tests.sent_inputs import as_base64, as_json, variants
from tests.test_handler import ask, model_dir, raw  # noqa: F401 (the first two are fixtures)

MIRROR = Path(os.environ.get("DATA_MIRROR") or ROOT / ".." / "shared" / "data")
TEST_IMAGES = MIRROR / SUBFOLDER / "t10k-images-idx3-ubyte.gz"


def drawn() -> np.ndarray:
    """uint8 (N, 1, 28, 28)."""
    return np.stack([np.asarray(draw_garment(kind, seed))[None] for kind in GARMENTS for seed in range(4)])


def real() -> np.ndarray:
    """The first 48 test images, uint8 (48, 1, 28, 28): with the special files not more than one request holds."""
    if not TEST_IMAGES.is_file():
        pytest.skip(f"no test images: {TEST_IMAGES} does not exist; set DATA_MIRROR")
    return read_idx(TEST_IMAGES)[:48, None].copy()


@pytest.mark.parametrize("images", [drawn, real])
def test_every_path_gives_the_same_answer(images, ask, server, tmp_path):  # noqa: F811
    pixels = images()
    predictor = Predictor.load(ROOT / "models" / "best_model", runtime=RUNTIME)
    names = predictor.config.class_names
    files = [encode(Image.fromarray(image[0])) for image in pixels]
    special, plain = zip(*variants().values(), strict=True)  # other files, of the same pixels as the plain ones
    files += special
    pixels = np.concatenate([pixels, [predictor.decode(data) for data in plain]])

    decoded = np.stack([predictor.decode(data) for data in files])
    np.testing.assert_array_equal(decoded, pixels)
    worker = ask.handler.predictor
    np.testing.assert_array_equal(np.stack([worker.decode(data) for data in files]), pixels)

    evaluated = in_batches(predictor.probabilities, pixels, 512, "test images")
    in_process = [answer["probabilities"] for _, answer in ask(*(raw(data) for data in files))]
    live_single = [server.predict(data).json()["probabilities"] for data in files[:16]]
    body = as_json(images=[as_base64(data) for data in files])
    live = [answer["probabilities"] for answer in server.predict(body).json()]
    for answers in (in_process, live_single, live, csv_probabilities(files, names, tmp_path)):
        values = np.array([[answer[name] for name in names] for answer in answers])
        np.testing.assert_allclose(values, evaluated[: len(values)], rtol=0, atol=1e-5)


def csv_probabilities(files: list[bytes], names: list[str], folder: Path) -> list[dict[str, float]]:
    """What src/predict.py writes for ``files``, run as a person runs it."""
    (folder / "images").mkdir()
    for number, data in enumerate(files):
        (folder / "images" / f"{number:04}.png").write_bytes(data)  # the content says which format it is
    places = ["--input_path", folder / "images", "--output_path", folder / "out.csv"]
    command = [sys.executable, "src/predict.py", *places, "--runtime", RUNTIME]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    with (folder / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["filename"] for row in rows] == [f"{number:04}.png" for number in range(len(files))]
    return [{name: float(row[f"prob_{name}"]) for name in names} for row in rows]


def test_the_shipped_sample_is_right_on_every_path(ask, server, sample):  # noqa: F811
    body = json.dumps(sample).encode()
    [(_, answer)] = ask(raw(body))
    assert answer["predicted_label"] == server.predict(body).json()["predicted_label"] == "Trouser"
