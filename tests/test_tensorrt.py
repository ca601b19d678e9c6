"""scripts/convert_to_tensorrt.sh and python -m src.export.tensorrt; without a GPU, all but the engine itself."""

import importlib.util
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from src.data.datamodule import load_split
from src.export.engine import load_engine, origin_path
from src.export.onnx import write_onnx
from src.export.quantization import TENSORRT, quantize
from src.export.tensorrt import benchmark, main
from src.inference import Predictor
from src.inference.onnx_runtime import WEIGHTS_KEY, OnnxRuntime
from src.models import ModelConfig, build_classifier, save_model
from src.models.storage import weights_sha256
from src.preprocessing import Preprocessing
from tests.conftest import ROOT, run_script
from tests.drawing import GARMENTS, draw_garment, encode

SCRIPT = "scripts/convert_to_tensorrt.sh"
HAS_TENSORRT = bool(importlib.util.find_spec("tensorrt"))
STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" > "$0.arguments"
for argument in "$@"; do case $argument in
    --saveEngine=*) echo 'no engine' > "${argument#--saveEngine=}" ;;
    --onnx=*) cp "${argument#--onnx=}" "$0.onnx" ;;
esac; done
"""
without_tensorrt = pytest.mark.skipif(HAS_TENSORRT, reason="the Python package tensorrt is here")
needs_gpu = pytest.mark.skipif(
    not (HAS_TENSORRT and torch.cuda.is_available()), reason="needs an NVIDIA GPU and the Python package tensorrt"
)


@pytest.fixture
def model(tmp_path) -> Path:
    """The folder of a small network that learnt nothing, with its model.onnx."""
    folder = tmp_path / "model"
    config = ModelConfig(
        "drawn", "resnet", {"widths": [4, 8], "blocks": [0, 1]}, list(GARMENTS), Preprocessing(28, 28, 1)
    )
    torch.manual_seed(0)
    network = build_classifier(config).eval()
    save_model(folder, network, config)
    write_onnx(network, config, folder / "model.onnx", 17)
    content = onnx.load(folder / "model.onnx")
    onnx.helper.set_model_props(content, {WEIGHTS_KEY: weights_sha256(network.state_dict())})
    onnx.save(content, folder / "model.onnx")
    return folder


@pytest.fixture
def overrides(drawn) -> list[str]:
    return [f"data.directory={drawn}", "export.calibration_images=25", "export.max_accuracy_loss=1"]


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Runs the script with this Python, and with ``tmp_path``/bin before a PATH that has no trtexec."""
    if any(Path(place, "bin", "trtexec").exists() for place in ("/usr/src/tensorrt", "/opt/tensorrt")):
        pytest.skip("a real trtexec is here")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.delenv("TENSORRT_HOME", raising=False)
    places = [place for place in os.environ["PATH"].split(":") if not Path(place, "trtexec").exists()]
    monkeypatch.setenv("PATH", ":".join([str(tmp_path / "bin"), *places]))
    return lambda *arguments: run_script(ROOT, SCRIPT, *map(str, arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "0 arguments given, 4 needed"),
        (["a.onnx", "b.engine", "8"], "3 arguments given"),
        (["a.onnx", "b.engine", "0", "fp32"], "BATCH is 0"),
        (["a.onnx", "b.engine", "many", "fp32"], "BATCH is many"),
        (["a.onnx", "b.engine", "8", "fp8"], "the precision is fp8; it must be fp32, fp16 or int8"),
        (["a.onnx", "b.engine", "8", "fp16", "x"], "x is no override"),
    ],
)
def test_wrong_arguments_show_the_usage(convert, arguments, said):
    done = convert(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert f"Usage: {SCRIPT} IN OUT BATCH fp32|fp16|int8 [--unverified]" in done.stderr


@without_tensorrt
def test_without_either_tool_the_error_says_what_to_install(convert, model):
    done = convert(model / "model.onnx", model / "model.engine", 8, "fp16")
    assert done.returncode == 1
    assert re.search("neither trtexec nor the Python package tensorrt .*put trtexec on PATH", done.stderr)
    missing = convert(model / "nowhere.onnx", model / "model.engine", 8, "fp16")
    assert (missing.returncode, "nowhere.onnx does not exist" in missing.stderr) == (1, True)


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A trtexec that writes down its arguments and a file that is no engine: it shows the command line only."""
    path = tmp_path / "bin" / "trtexec"
    path.parent.mkdir()
    path.write_text(STAND_IN)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@without_tensorrt
@pytest.mark.parametrize(
    ("precision", "flags"), [("fp32", ["--noTF32"]), ("fp16", ["--fp16"]), ("int8", ["--int8", "--fp16"])]
)
def test_the_command_line_of_trtexec(model, stand_in, overrides, precision, flags, caplog):
    """Of the command line only: what the stand-in writes is no engine."""
    source, target = model / "model.onnx", model / "model.engine"
    built = ["build", "--trtexec", str(stand_in), "--unverified", str(source), str(target), "8", precision, *overrides]
    assert main(built) == 0
    given = stand_in.with_name("trtexec.arguments").read_text().splitlines()
    assert (given[0] == f"--onnx={source}") == (precision != "int8")
    assert given[1:] == [
        f"--saveEngine={model}/.model.engine.part", "--minShapes=images:1x1x28x28", "--optShapes=images:8x1x28x28",
        "--maxShapes=images:8x1x28x28", "--skipInference", *flags,
    ]  # fmt: skip
    operators = {node.op_type for node in onnx.load(stand_in.with_name("trtexec.onnx")).graph.node}
    assert ("QuantizeLinear" in operators) == (precision == "int8")
    assert "WARNING: the engine is not compared with PyTorch" in caplog.text
    origin = json.loads(origin_path(target).read_text())
    assert (origin["precision"], origin["compared_with_pytorch"]) == (precision, False)
    assert not list(model.glob(".*"))


@without_tensorrt
def test_the_script_finds_trtexec_and_tells_the_size(convert, model, stand_in, overrides):
    refused = convert(model / "model.onnx", model / "model.engine", 8, "fp16", *overrides)
    assert refused.returncode == 1
    assert "could not be compared with PyTorch, so it is not built" in refused.stderr
    assert not (model / "model.engine").exists()
    done = convert(model / "model.onnx", model / "model.engine", 8, "fp16", *overrides, "--unverified")
    assert done.returncode == 0, done.stderr
    for part in (f"Building with {stand_in}", "batches of 1 to 8, fp16", "model.engine has 10 bytes"):
        assert part in done.stdout


def test_what_trtexec_cannot_build_leaves_no_engine(model, stand_in, overrides, caplog):
    stand_in.write_text("#!/bin/sh\necho '[E] no CUDA-capable device is detected'\nexit 1\n")
    source, target = model / "model.onnx", model / "model.engine"
    built = ["build", "--trtexec", str(stand_in), "--unverified", str(source), str(target), "8", "fp32", *overrides]
    assert main(built) == 1
    assert "exit status 1; it ended with:\n[E] no CUDA-capable device" in caplog.text
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.onnx", "model.safetensors"]


@pytest.mark.parametrize(
    ("spoil", "precision", "said"),
    [
        (lambda m: (m / "model.onnx").write_bytes(b"text"), "fp32", "model.onnx cannot be loaded"),
        (lambda m: (m / "config.json").unlink(), "fp32", "no model here"),
        (lambda m: shutil.copy(ROOT / "models/best_model/model.int8.onnx", m / "model.onnx"), "int8", "is stale"),
        (lambda m: shutil.copytree(ROOT / "models/best_model", m, dirs_exist_ok=True), "int8", "int8 with zero points"),
    ],
)
def test_what_is_no_source_of_an_engine(model, overrides, spoil, precision, said, caplog):
    spoil(model)
    source = model / ("model.int8.onnx" if (model / "model.int8.onnx").exists() else "model.onnx")
    assert main(["build", str(source), str(model / "model.engine"), "8", precision, *overrides]) == 1
    assert said in caplog.text


def test_int8_for_tensorrt_is_symmetric_and_close(model, drawn, tmp_path):
    """ONNX Runtime runs what TensorRT would read: int8 alone, zero points of 0, float biases."""
    config = ModelConfig.load(model / "config.json")
    images, labels = load_split(drawn, "validation")
    path, _ = quantize(model / "model.onnx", tmp_path, images[:25], images, labels, TENSORRT)
    graph = onnx.load(path).graph
    values = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {values[node.input[2]].dtype.name for node in pairs} == {"int8"}
    assert not any(values[node.input[2]].any() for node in pairs)
    producers = {node.output[0]: node.op_type for node in graph.node}
    for node in (node for node in graph.node if node.op_type in ("Conv", "Gemm")):
        assert [producers.get(name, "float") for name in node.input] == [
            "DequantizeLinear",
            "DequantizeLinear",
            "float",
        ]
    wanted = Predictor.load(model, runtime="onnx").probabilities(images)
    np.testing.assert_allclose(Predictor(OnnxRuntime(path), config).probabilities(images), wanted, atol=0.05)


def test_an_engine_that_cannot_be_run_is_an_error(model, tmp_path, caplog):
    image, engine = tmp_path / "bag.png", model / "model.engine"
    image.write_bytes(encode(draw_garment("Bag")))
    said = [
        (lambda: None, "model.engine does not exist; make it with: scripts/convert_to_tensorrt.sh"),
        (lambda: engine.write_bytes(b"no engine"), "model.engine.json does not exist"),
        (lambda: origin_path(engine).write_text("["), "model.engine.json is broken"),
        (lambda: origin_path(engine).write_text('{"weights_sha256": "old"}'), "is stale: made of weights old"),
    ]
    for prepare, sentence in said:
        prepare()
        assert main(["infer", str(engine), str(image)]) == 1
        assert sentence in caplog.text


@without_tensorrt
def test_without_tensorrt_an_engine_says_what_to_install(model, caplog):
    weights = OnnxRuntime(model / "model.onnx").session.get_modelmeta().custom_metadata_map[WEIGHTS_KEY]
    (model / "model.engine").touch()
    origin_path(model / "model.engine").write_text(json.dumps({WEIGHTS_KEY: weights}))
    assert main(["infer", str(model / "model.engine"), "x.png"]) == 1
    assert "pip install 'tensorrt-cu12==10.*'" in caplog.text
    assert "model.engine was never compared with PyTorch" in caplog.text


def test_the_benchmark_says_what_it_measured(model):
    """On ONNX Runtime: it is the same for every runtime."""
    said = benchmark(Predictor.load(model, runtime="onnx"), np.zeros((2, 1, 28, 28), np.uint8), 5)
    assert re.fullmatch(r"5 calls of 2 images: p50 [\d.]+ ms, p95 [\d.]+ ms, p99 [\d.]+ ms, [\d,]+ images/s", said)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_gives_the_classes_of_torch(model, overrides, drawn, tmp_path, capsys, precision):
    engine, image = model / "model.engine", tmp_path / "bag.png"
    assert main(["build", str(model / "model.onnx"), str(engine), "8", precision, *overrides]) == 0
    images, _ = load_split(drawn, "test")
    wanted = Predictor.load(model).probabilities(images)
    found = load_engine(engine, model).probabilities(images)
    np.testing.assert_allclose(found, wanted, atol={"fp32": 1e-4, "fp16": 0.02, "int8": 0.05}[precision])
    image.write_bytes(encode(draw_garment("Bag")))
    assert main(["infer", str(engine), str(image), "--benchmark", "--iterations", "5"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["filename"] == str(image)
