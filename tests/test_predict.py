"""src/predict.py: a folder of images to a CSV, whatever lies in the folder."""

import csv
import io
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.image_files import MAX_BYTES, list_images
from src.inference import Predictor
from src.models import load_model
from src.predict import main, predict_folder
from tests.drawing import GARMENTS, draw_garment, encode
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "best_model"
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF", "tiff": "TIFF"}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def classify(folder: Path, output: Path, *arguments: str) -> int:
    return main(["--input_path", str(folder), "--output_path", str(output), "--model_path", str(MODEL), *arguments])


def write_garments(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        kind = list(GARMENTS)[index % len(GARMENTS)]
        (folder / f"{index:03}.png").write_bytes(encode(draw_garment(kind, index)))
    return folder


def test_every_extension_in_any_case_and_folder_is_classified(tmp_path):
    images = tmp_path / "images"
    (images / "sub" / "deeper").mkdir(parents=True)
    for extension, kind in FORMATS.items():
        content = encode(draw_garment("Bag"), kind)
        (images / f"a.{extension}").write_bytes(content)
        (images / "sub" / "deeper" / f"B.{extension.upper()}").write_bytes(content)
    (images / "notes.txt").write_text("not an image, and not named like one")
    assert classify(images, tmp_path / "out.csv") == 0
    names = [row["filename"] for row in rows_of(tmp_path / "out.csv")]
    assert names == sorted([f"a.{e}" for e in FORMATS] + [f"sub/deeper/B.{e.upper()}" for e in FORMATS])
    assert not (tmp_path / "out.csv.errors.csv").exists()


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    images = write_garments(tmp_path / "images", 1)
    (images / "._000.png").write_bytes(b"\0\5\x16\7what macOS puts beside a file")
    write_garments(images / ".thumbnails", 1)
    assert list_images(images) == ["000.png"]
    assert list_images(images / ".thumbnails") == ["000.png"]


def test_columns_and_values(tmp_path):
    images = write_garments(tmp_path / "images", 5)
    assert classify(images, tmp_path / "out.csv") == 0
    predictor = Predictor.load(MODEL)
    names = predictor.config.class_names
    rows = rows_of(tmp_path / "out.csv")
    fixed = ["filename", "predicted_class", "predicted_label", "confidence"]
    assert list(rows[0]) == [*fixed, *(f"prob_{name}" for name in names), "uncertain"]
    for row in rows:
        expected = predictor.predict([(images / row["filename"]).read_bytes()])[0]
        assert int(row["predicted_class"]) == expected.predicted_class
        assert row["predicted_label"] == names[expected.predicted_class]
        probabilities = [float(row[f"prob_{name}"]) for name in names]
        assert probabilities == pytest.approx(list(expected.probabilities.values()), abs=1e-6)
        assert math.isclose(sum(probabilities), 1, abs_tol=1e-5)
        assert float(row["confidence"]) == max(probabilities)
        assert row["uncertain"] == str(expected.uncertain).lower()


def test_broken_images_are_rows_of_the_errors_file(tmp_path, capsys):
    images = write_garments(tmp_path / "images", 3)
    good = (images / "000.png").read_bytes()
    (images / "empty.png").write_bytes(b"")
    (images / "text.jpg").write_text("hello")
    (images / "cut.png").write_bytes(good[: len(good) // 2])
    (images / "huge.tiff").touch()
    os.truncate(images / "huge.tiff", MAX_BYTES + 1)
    (images / "nowhere.png").symlink_to("missing.png")
    (images / "loop.png").symlink_to("loop.png")
    os.mkfifo(images / "pipe.png")
    assert classify(images, tmp_path / "out.csv") == 1
    assert [row["filename"] for row in rows_of(tmp_path / "out.csv")] == ["000.png", "001.png", "002.png"]
    errors = rows_of(tmp_path / "out.csv.errors.csv")
    assert {row["filename"]: row["reason"] for row in errors} == {
        "cut.png": "broken", "empty.png": "empty", "huge.tiff": "too_large", "loop.png": "unreadable",
        "nowhere.png": "unreadable", "pipe.png": "unreadable", "text.jpg": "not_an_image",
    }  # fmt: skip
    assert all(row["message"] for row in errors)
    assert "7 images could not be read" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_row_of_the_errors_file(tmp_path):
    images = write_garments(tmp_path / "images", 2)
    (images / "001.png").chmod(0)
    assert classify(images, tmp_path / "out.csv") == 1
    assert rows_of(tmp_path / "out.csv.errors.csv")[0]["message"].endswith("Permission denied")


def test_only_broken_images_still_write_both_files(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"no")
    assert classify(images, tmp_path / "out.csv") == 1
    assert rows_of(tmp_path / "out.csv") == []
    assert len(rows_of(tmp_path / "out.csv.errors.csv")) == 1


def test_an_errors_file_of_an_earlier_run_is_removed(tmp_path):
    images = write_garments(tmp_path / "images", 2)
    (images / "bad.png").write_bytes(b"no")
    assert classify(images, tmp_path / "out.csv") == 1
    (images / "bad.png").unlink()
    assert classify(images, tmp_path / "out.csv") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.csv"]


def test_any_file_name_survives_in_the_csv(tmp_path):
    names = ["a,b.png", 'quote"d.png', "two\nlines.png", "été 衣.png", " spaces .png", "-rf.png", "=1+1.png"]
    for name in names:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(encode(draw_garment("Bag")))
    (tmp_path / "images" / os.fsdecode(b"caf\xe9.png")).write_bytes(encode(draw_garment("Bag")))
    assert classify(tmp_path / "images", tmp_path / "out.csv") == 0
    assert sorted(row["filename"] for row in rows_of(tmp_path / "out.csv")) == sorted([*names, "caf\\udce9.png"])


def test_folders_named_like_images_and_linked_in_circles_do_no_harm(tmp_path):
    images = write_garments(tmp_path / "images", 1)
    write_garments(images / "album.png", 1)
    (images / "album.png" / "up").symlink_to(images)
    assert list_images(images) == ["000.png", "album.png/000.png"]


def test_the_output_may_lie_in_the_input_folder_and_replaces_an_older_one(tmp_path):
    images = write_garments(tmp_path / "images", 2)
    output = images / "out.csv"
    output.write_text("older")
    for _ in range(2):
        assert classify(images, output) == 0
        assert len(rows_of(output)) == 2
    assert sorted(path.name for path in images.iterdir()) == ["000.png", "001.png", "out.csv"]


@pytest.mark.parametrize(
    ("prepare", "arguments", "said"),
    [
        (lambda p: (p / "images").mkdir(), [], "no image in"),
        (lambda p: None, [], "is not a folder"),
        (lambda p: (p / "images").write_text("a file"), [], "is not a folder"),
        (lambda p: (write_garments(p / "images", 1), (p / "out.csv").mkdir()), [], "no place for a CSV"),
        (lambda p: write_garments(p / "images", 1), ["--output_path", "images/000.png"], "no place for a CSV"),
        (lambda p: write_garments(p / "images", 1), ["--output_path", "/proc/out.csv"], "out.csv"),
        (lambda p: write_garments(p / "images", 1), ["--output_path", "images/000.png/out.csv"], "000.png"),
        (lambda p: write_garments(p / "images", 1), ["--model_path", "nowhere"], "no model here"),
        (lambda p: write_garments(p / "images", 1), ["--device", "toaster"], "--device toaster"),
        (lambda p: write_garments(p / "images", 1), ["--device", "meta"], "--device meta is not supported"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_says_why(prepare, arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    assert classify(Path("images"), Path("out.csv"), *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "out.csv").is_file()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_an_error(device, tmp_path, capsys):
    assert classify(write_garments(tmp_path / "images", 1), tmp_path / "out.csv", "--device", device) == 2
    assert f"--device {device}: PyTorch sees 0 GPUs here; use --device cpu" in capsys.readouterr().err


def test_a_batch_size_of_zero_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        classify(tmp_path, tmp_path / "out.csv", "--batch_size", "0")
    assert "--batch_size is 0; it must be at least 1" in capsys.readouterr().err


def test_the_batch_size_does_not_change_the_result(tmp_path):
    images = write_garments(tmp_path / "images", 10)
    (images / "0045.png").write_bytes(b"broken, in the middle of a batch")
    tables = []
    for size in (1, 3, 10, 500):
        assert classify(images, tmp_path / f"{size}.csv", "--batch_size", str(size)) == 1
        tables.append(rows_of(tmp_path / f"{size}.csv"))
    for table in tables[1:]:
        for one, other in zip(tables[0], table, strict=True):
            assert (one["filename"], one["predicted_label"]) == (other["filename"], other["predicted_label"])
            first, second = (np.array(list(row.values())[3:-1], float) for row in (one, other))
            np.testing.assert_allclose(first, second, atol=1e-6)


def test_a_failure_of_the_model_leaves_the_older_file(tmp_path):
    class Failing(Predictor):
        def probabilities(self, images):
            raise RuntimeError("out of memory")

    images = write_garments(tmp_path / "images", 2)
    (tmp_path / "out.csv").write_text("older")
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_folder(Failing(*load_model(MODEL)), images, tmp_path / "out.csv", 32)
    assert (tmp_path / "out.csv").read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.csv"]


@pytest.fixture(scope="module")
def many_images(tmp_path_factory) -> Path:
    """500 names for two files of 200 kB: an image, and a damaged one for each fourth name."""
    folder = tmp_path_factory.mktemp("many")
    buffer = io.BytesIO()
    Image.new("RGB", (256, 256), (90, 90, 90)).save(buffer, "BMP")
    good, bad = folder / "good", folder / "bad"
    good.write_bytes(buffer.getvalue())
    bad.write_bytes(b"XX" + buffer.getvalue()[2:])
    for count in (100, 500):
        (folder / str(count)).mkdir()
        for index in range(count):
            os.link(bad if index % 4 == 3 else good, folder / str(count) / f"{index:05}.bmp")
    return folder


def test_memory_does_not_grow_with_the_number_of_images(many_images, tmp_path):
    program = (
        "import resource, sys; from src.predict import main\n"
        "folder, *arguments = sys.argv[1:]\n"
        "for count in ('100', '500'):\n"
        "    main(['--input_path', f'{folder}/{count}', *arguments])\n"
        "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    command = [sys.executable, "-c", program, many_images, "--output_path", tmp_path / "out.csv", "--model_path", MODEL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)
    few, many = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak"))
    assert len(rows_of(tmp_path / "out.csv")) == 375
    assert len(rows_of(tmp_path / "out.csv.errors.csv")) == 125
    assert many - few < 40_000, "kB; the 400 files more hold 79,000 kB"


def script(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "src" / "predict.py"), "--model_path", str(MODEL), *map(str, arguments)]


def test_a_killed_run_leaves_the_older_file_whole(many_images, tmp_path):
    output = tmp_path / "out.csv"
    output.write_text("older")
    command = script("--input_path", many_images / "500", "--output_path", output, "--batch_size", "1")
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: list(tmp_path.glob(".out.csv.*.part")) or process.poll() is not None, 120)
        assert process.poll() is None
    finally:
        process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert output.read_text() == "older"
    assert not (tmp_path / "out.csv.errors.csv").exists()


def test_run_from_another_folder_with_a_progress_bar_on_a_terminal(tmp_path):
    write_garments(tmp_path / "images", 5)
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    process = subprocess.Popen(
        script("--input_path", "images", "--output_path", "new/out.csv"), cwd=tmp_path, stdout=end, stderr=end
    )
    os.close(end)
    shown = b""
    try:
        while select.select([terminal], [], [], 120)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait(timeout=30)
        os.close(terminal)
    assert re.search(rb"images: 100%.* 5/5 ", shown)
    assert b"5 images classified -> new/out.csv" in shown
    assert len(rows_of(tmp_path / "new" / "out.csv")) == 5


def test_no_progress_bar_in_a_log(tmp_path, capsys):
    assert classify(write_garments(tmp_path / "images", 2), tmp_path / "out.csv") == 0
    assert capsys.readouterr().err == ""
