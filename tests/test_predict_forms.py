"""src/predict.py: one image, a file list, JSON, and the device auto."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.predict import choose_device, main
from tests.test_predict import MODEL, classify, rows_of, write_garments


def test_one_image_to_a_file_or_printed(tmp_path, capsys):
    image = write_garments(tmp_path / "images", 1) / "000.png"
    for output in ("out.csv", "out.JSON"):
        assert classify(image, tmp_path / output) == 0
    row, shown = rows_of(tmp_path / "out.csv")[0], json.loads((tmp_path / "out.JSON").read_text())[0]
    capsys.readouterr()
    for arguments in ([], ["--output_path", "-"]):
        assert main(["--input_path", str(image), "--model_path", str(MODEL), *arguments]) == 0
        assert json.loads(capsys.readouterr().out) == shown
    assert list(shown) == [
        "filename", "predicted_class", "predicted_label", "confidence", "uncertain", "probabilities", "model_version",
    ]  # fmt: skip
    assert shown["model_version"] == "unregistered"
    assert (row["filename"], float(row["confidence"])) == ("000.png", shown["confidence"])
    assert shown["filename"] == "000.png"
    assert {name: float(row[f"prob_{name}"]) for name in shown["probabilities"]} == shown["probabilities"]


def test_the_one_image_of_a_folder_or_a_list_is_printed(tmp_path, capsys):
    folder = write_garments(tmp_path / "images", 1)
    (tmp_path / "list.txt").write_text("images/000.png\n")
    for source, name in ((folder, "000.png"), (tmp_path / "list.txt", "images/000.png")):
        assert main(["--input_path", str(source), "--model_path", str(MODEL)]) == 0
        assert json.loads(capsys.readouterr().out)["filename"] == name
    (folder / "000.png").write_bytes(b"no")
    assert main(["--input_path", str(folder), "--model_path", str(MODEL)]) == 1
    assert f"error: {folder / '000.png'}: " in capsys.readouterr().err


def test_a_gif_is_an_image_offline_too(tmp_path):
    folder = write_garments(tmp_path / "images", 1)
    with Image.open(folder / "000.png") as image:
        image.save(folder / "001.GIF")
    assert classify(folder, tmp_path / "out.csv") == 0
    first, second = rows_of(tmp_path / "out.csv")
    assert second["filename"] == "001.GIF"
    assert second["confidence"] == first["confidence"]


def test_one_image_that_cannot_be_read_prints_no_json(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no")
    assert main(["--input_path", str(tmp_path / "bad.png"), "--model_path", str(MODEL)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.match(r"error: .*bad\.png: ", shown.err)


def test_a_file_list_loses_nothing(tmp_path):
    """Paths relative to the list's folder or absolute, other extensions, spaces, twice; the rest are error rows."""
    write_garments(tmp_path / "images", 2)
    other = write_garments(tmp_path / "other", 1) / "000.png"
    (tmp_path / "images" / " no extension ").write_bytes(other.read_bytes())
    (tmp_path / "images" / os.fsdecode(b"caf\xe9.png")).write_bytes(other.read_bytes())
    good = [b"000.png", b" no extension ", str(other).encode(), b"../images/001.png", b"000.png", b"caf\xe9.png"]
    bad = [b"missing.png", b"../other", b"null\0byte.png", b"list.txt"]
    (tmp_path / "images" / "list.txt").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*good[:3], b"", *bad, *good[3:]]))
    assert classify(tmp_path / "images" / "list.txt", tmp_path / "out.json", "--batch_size", "2") == 1
    rows = json.loads((tmp_path / "out.json").read_text())
    names = [name.decode() for name in (*good[:3], *bad, *good[3:5])]
    assert [row["filename"] for row in rows] == [*names, "caf\\udce9.png"]
    kinds = ["unreadable", "unreadable", "unreadable", "not_an_image"]
    assert [row.get("type") for row in rows] == [None] * 3 + kinds + [None] * 3
    assert not (tmp_path / "out.json.errors.csv").exists()
    assert classify(tmp_path / "images" / "list.txt", tmp_path / "out.csv") == 1
    errors = rows_of(tmp_path / "out.csv.errors.csv")
    assert [(row["filename"], row["reason"]) for row in errors] == [
        (name.decode(), kind) for name, kind in zip(bad, kinds, strict=True)
    ]


def test_json_holds_the_error_of_an_image_in_its_place(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("missing.png\n")
    assert classify(tmp_path / "list.txt", tmp_path / "out.json") == 1
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row == {"filename": "missing.png", "code": 400, "type": "unreadable", "message": row["message"]}
    assert "No such file" in row["message"]
    assert f"1 images could not be read -> {tmp_path / 'out.json'}\n" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.txt", "out.json"]


@pytest.mark.parametrize(
    ("source", "output", "said"),
    [
        ("images", "out.xml", "predictions.csv or predictions.json"),
        ("images", "-", "only one image is printed"),
        ("empty.txt", "out.csv", "one path a line, relative to"),
        ("nowhere.png", "out.csv", "nor a file that exists"),
    ],
)
def test_what_no_form_allows_is_an_error(source, output, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_garments(tmp_path / "images", 2)
    (tmp_path / "empty.txt").write_text("\n \n")
    assert classify(Path(source), Path(output)) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "images"]


@pytest.mark.parametrize(
    ("gpu", "runtime", "device"),
    [(True, "torch", "cuda"), (False, "torch", "cpu"), (True, "onnx", "cpu"), (False, "onnx", "cpu")],
)
def test_the_device_auto_takes_the_gpu_where_there_is_one(gpu, runtime, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert choose_device("auto", runtime) == device
