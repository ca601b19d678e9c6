"""python -m src.export.onnx and src.export.compare, on a small network trained on drawn garments."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from PIL import Image

from src.data.datamodule import load_split
from src.export import compare
from src.export.onnx import ExportError, check, main, write_onnx
from src.inference import Predictor
from src.inference.onnx_runtime import OnnxRuntime
from src.inference.torch_runtime import TorchRuntime
from src.models import ModelConfig, build_classifier, load_model, save_model
from src.preprocessing import Preprocessing
from tests.conftest import ROOT
from tests.drawing import GARMENTS

FILES = ("model.onnx", "model.int8.onnx")
SHAPE = (1, 28, 28)
QUICK = ("export.calibration_images=60", "export.max_accuracy_loss=0.05")


@pytest.fixture(scope="module")
def trained(drawn, tmp_path_factory) -> Path:
    """A folder with a network that has learnt the drawn garments in a second. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    args = {"widths": [8, 16], "blocks": [0, 1]}
    config = ModelConfig("fashion_mnist", "resnet", args, list(GARMENTS), Preprocessing(28, 28, 1))
    torch.manual_seed(0)
    model = build_classifier(config)
    model.mean += 0.3
    model.std -= 0.6
    images, labels = (torch.from_numpy(array) for array in load_split(drawn, "train"))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(15):
        for part, target in zip(images.split(64), labels.split(64), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(part), target).backward()
            optimizer.step()
    save_model(folder, model.eval(), config)
    return folder


@pytest.fixture
def run(trained, tiny_overrides, tmp_path, monkeypatch):
    """``run("key=value", ...)``: the export of a copy of ``trained``, which is ``tmp_path``/model."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    save_model(folder, *load_model(trained))
    fixed = ["--config", str(ROOT / "configs" / "config.yaml"), "--model-path", str(folder), *tiny_overrides]
    return lambda *arguments, command=main: command([*fixed, *QUICK, *arguments])


@pytest.fixture(scope="module")
def exported(trained, drawn, tmp_path_factory) -> Path:
    """``trained`` with both files, opset 18. Read only."""
    folder = tmp_path_factory.mktemp("exported")
    save_model(folder, *load_model(trained))
    overrides = [f"data.directory={drawn}", "export.opset=18", *QUICK]
    assert main(["--config", str(ROOT / "configs" / "config.yaml"), "--model-path", str(folder), *overrides]) == 0
    return folder


def test_both_files_agree_with_torch(exported, drawn):
    images, labels = load_split(drawn, "test")
    wanted = Predictor.load(exported).probabilities(images)
    assert (wanted.argmax(1) == labels).mean() > 0.5
    found = Predictor.load(exported, runtime="onnx").probabilities(images)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    small = Predictor.load(exported, runtime="onnx-int8").probabilities(images)
    assert (small.argmax(1) == wanted.argmax(1)).mean() > 0.9


def test_the_same_export_gives_the_same_bytes_and_tells_what_it_measured(exported, run, tmp_path, caplog):
    caplog.set_level("INFO")
    assert run("export.opset=18") == 0
    for name in FILES:
        assert (tmp_path / "model" / name).read_bytes() == (exported / name).read_bytes()
    for part in (r"model\.onnx: \d+ KB, accuracy", r"INT8 by minmax: \d+ of 64 right", "the limit is 5.00"):
        assert re.search(part, caplog.text), part


def test_the_files_name_their_weights_and_take_any_batch(exported):
    sha256 = hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()
    for name in FILES:
        model = onnx.load(exported / name)
        onnx.checker.check_model(model, full_check=True)
        assert {item.key: item.value for item in model.metadata_props}["weights_sha256"] == sha256
        assert model.opset_import[0].version == 18
        for size in (1, 5):
            assert OnnxRuntime(exported / name)(np.zeros((size, 1, 28, 28), np.uint8)).shape == (size, 4)


def test_int8_has_weights_by_channel_and_uint8_activations(exported):
    graph = onnx.load(exported / "model.int8.onnx").graph
    tensors = {item.name: item for item in graph.initializer}
    nodes = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 1
    assert tensors[convolutions[0].input[1]].data_type == TensorProto.FLOAT  # faster so for one channel
    for convolution in convolutions[1:]:
        activation, weight = (nodes[name] for name in convolution.input[:2])
        values = tensors[weight.input[0]]
        assert values.data_type == TensorProto.INT8
        assert list(tensors[weight.input[1]].dims) == [values.dims[0]]
        assert tensors[activation.input[2]].data_type == TensorProto.UINT8


def test_int8_that_loses_too_much_is_refused(run, tmp_path, caplog):
    (tmp_path / "model" / "model.int8.onnx").write_bytes(b"an older one")
    assert run("export.max_accuracy_loss=-1") == 1
    assert re.search(
        r"INT8 loses -?\d.* on 64 validation images, the limit is -100.00; serve with --runtime", caplog.text
    )
    assert sorted(path.name for path in (tmp_path / "model").glob("*.onnx")) == ["model.onnx"]


def test_a_network_that_computes_no_number_is_refused(run, trained, tmp_path, caplog):
    """NaN is above no limit, so each comparison would let it pass."""
    model, card = load_model(trained)
    model.std *= float("nan")
    save_model(tmp_path / "model", model, card)
    (tmp_path / "model" / "model.onnx").write_bytes(b"an older one")
    assert run() == 1
    assert "PyTorch answers some validation images with NaN; train the model again" in caplog.text
    assert not list((tmp_path / "model").glob("*.onnx"))
    write_onnx(model, card, tmp_path / "nan.onnx", 17)
    images, wanted = np.full((14, *SHAPE), np.arange(SHAPE[-1], dtype=np.uint8)), np.full((14, 4), 0.25)
    with pytest.raises(ExportError, match=r"nan\.onnx answers some validation images with NaN"):
        check(OnnxRuntime(tmp_path / "nan.onnx"), card, images, np.zeros(14, int), wanted)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.directory=nowhere", "python src/data/prepare.py"),
        ("export.opset=12", "export.opset is 12; it must be a number from 13 to 20"),
        ("export.opset=99", "export.opset is 99; it must be a number from 13 to 20"),
        ("export.opset=new", "export.opset is 'new'; it must be a number from 13 to 20"),
    ],
)
def test_what_cannot_be_exported_is_an_error_and_leaves_the_files(run, override, said, tmp_path, caplog):
    for name in FILES:
        (tmp_path / "model" / name).write_bytes(b"an older one")
    assert run(override) == 1
    assert said in caplog.text
    assert {(tmp_path / "model" / name).read_bytes() for name in FILES} == {b"an older one"}


@pytest.mark.parametrize("opset", [13, 20])
def test_the_first_and_the_last_opset_can_be_written(run, opset):
    assert run(f"export.opset={opset}") == 0


def test_other_classes_are_an_error(run, tmp_path, caplog):
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("Sneaker", "Boot"))
    assert run() == 1
    assert "knows the classes" in caplog.text


def test_the_network_of_flowers_can_be_written(tmp_path):
    args = {"backbone": "rexnet_150", "embedding_size": 16}
    card = ModelConfig("flowers", "prototypes", args, list(GARMENTS), Preprocessing(64, 64, 3))
    torch.manual_seed(0)
    model = build_classifier(card).eval()
    write_onnx(model, card, tmp_path / "model.onnx", 17)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), np.uint8)
    found, wanted = OnnxRuntime(tmp_path / "model.onnx")(images), TorchRuntime(model, fold=False)(images)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)


def test_saving_other_weights_drops_the_files_made_of_the_older_ones(tmp_path):
    config = ModelConfig("a", "resnet", {"widths": [4], "blocks": [0]}, list(GARMENTS), Preprocessing(28, 28, 1))
    model = build_classifier(config)
    save_model(tmp_path, model, config)
    (tmp_path / "model.onnx").touch()
    save_model(tmp_path, model, config)
    assert (tmp_path / "model.onnx").exists()
    model.mean += 1
    save_model(tmp_path, model, config)
    assert not (tmp_path / "model.onnx").exists()


def test_the_formats_are_compared(exported, run, tmp_path, caplog):
    caplog.set_level("INFO")
    assert run("--rounds", "1", "--limit", "20", "--output", "docs/formats.md", command=compare.main) == 0
    for name in FILES:
        shutil.copy2(exported / name, tmp_path / "model")
    assert run("--rounds", "1", "--limit", "20", "--output", "docs/formats.md", "--test", command=compare.main) == 0
    page = (tmp_path / "docs" / "formats.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "format", "---", "torch, as trained", "torch", "onnx", "onnx-int8",
    ]  # fmt: skip
    assert "those of 20 test images." in page
    assert re.search(r"Targets missed by .*`onnx`.*: accuracy is ", page)
    assert "](../plots/formats.png)" in page
    with Image.open(tmp_path / "plots" / "formats.png") as picture:
        assert picture.format == "PNG"
    assert "Scores of 20 validation images" in caplog.text
    assert "ONNX: no model.int8.onnx in" in caplog.text  # of the first time
    assert "ONNX: no" not in page


def test_a_format_that_fails_while_it_is_measured_is_an_error(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert run("--rounds", "1", "--limit", "20", "--compile", "--output", "formats.md", command=compare.main) == 1
    assert "error: " in caplog.text
    assert "no-such-compiler" in caplog.text
    assert not (tmp_path / "formats.md").exists()


def test_the_page_of_the_formats_must_be_a_file(exported, run, tmp_path, caplog):
    (tmp_path / "docs").mkdir()
    assert run("--rounds", "1", "--output", "docs", command=compare.main) == 1
    assert "--output docs is a folder; name a file in it, such as docs/formats.md" in caplog.text


def test_wrong_numbers_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--rounds", "0", command=compare.main)
    assert "--rounds is 0; it must be at least 1" in capsys.readouterr().err
