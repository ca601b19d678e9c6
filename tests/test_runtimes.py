"""src/inference: the three runtimes give one answer, and what is wrong with a file is said when it is loaded."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from src.export.staging import stage
from src.inference import Predictor
from src.inference.archive import load_archived_predictor
from src.inference.batch import PixelBatch
from src.inference.onnx_runtime import OnnxRuntime, has_vnni
from src.inference.runtimes import FILES
from src.inference.torch_runtime import TorchRuntime, fold_batch_norm
from src.models import ModelConfig, ModelError, build_classifier, load_model
from src.predict import main as predict
from src.prediction_output import as_dict
from src.preprocessing import Preprocessing
from src.serving.fastapi_service import Service
from tests.conftest import ROOT, run_script
from tests.drawing import GARMENTS, draw_garment, encode
from tests.sent_inputs import OTHER, PNG, as_base64, as_json
from tests.test_handler import load_handler, model_dir, raw  # noqa: F401 (model_dir is a fixture)

MODEL = ROOT / "models" / "best_model"


@pytest.fixture
def pixels() -> np.ndarray:
    """uint8 (16, 1, 28, 28)."""
    return np.stack([np.asarray(draw_garment(kind, seed))[None] for kind in GARMENTS for seed in range(4)])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the shipped model that a test may damage."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.mark.parametrize("size", [1, 3, 16])
def test_onnx_gives_the_probabilities_of_torch(pixels, size):
    wanted = Predictor.load(MODEL).probabilities(pixels[:size])
    found = Predictor.load(MODEL, runtime="onnx").probabilities(pixels[:size])
    assert found.dtype == wanted.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_int8_agrees_and_does_not_depend_on_the_batch(pixels):
    predictor = Predictor.load(MODEL, runtime="onnx-int8")
    wanted = Predictor.load(MODEL).probabilities(pixels)
    found = predictor.probabilities(pixels)
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.9
    alone = np.concatenate([predictor.probabilities(row[None]) for row in pixels])
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["resnet", "basic_cnn"])
def test_folding_batch_norm_keeps_the_answers_and_the_model(architecture, pixels):
    config = ModelConfig("drawn", architecture, {}, list(GARMENTS), Preprocessing(28, 28, 1))
    torch.manual_seed(0)
    model = build_classifier(config)
    with torch.no_grad():
        model(torch.from_numpy(pixels))  # in training mode: the statistics move away from 0 and 1
    model.eval()
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    plain, folded = TorchRuntime(model, fold=False), TorchRuntime(model)
    np.testing.assert_allclose(folded(pixels), plain(pixels), rtol=0, atol=1e-4)
    assert norms > 0
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fold_batch_norm(model).modules())
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == norms


@pytest.mark.parametrize("runtime", ["onnx", "onnx-int8"])
def test_the_onnx_runtimes_import_no_torch_and_report_to_nobody(runtime, tmp_path):
    program = f"""
import json, sys
from src.inference import Predictor
Predictor.load({str(MODEL)!r}, runtime={runtime!r}).warm_up()
print(json.dumps([name for name in ("torch", "safetensors", "onnx", "yaml", "scipy") if name in sys.modules]))
"""
    done = run_script(ROOT, sys.executable, "-c", program, TMPDIR=str(tmp_path), ORT_DISABLE_TELEMETRY="")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert list(tmp_path.iterdir()) == []  # ONNX Runtime's telemetry would leave the id of its session here


@pytest.mark.parametrize("runtime", FILES)
@pytest.mark.parametrize("colour", ["white", "black", (60, 60, 60), (128, 128, 128), "red"])
def test_an_image_of_one_colour_gets_no_confident_answer(runtime, colour):
    predictor = Predictor.load(ROOT / "models" / "best_model", runtime=runtime)
    blank, garment = predictor.predict([encode(Image.new("RGB", (50, 60), colour)), encode(draw_garment("Bag"))])
    assert blank.uncertain
    assert list(blank.probabilities.values()) == pytest.approx([0.1] * 10)
    assert garment.confidence > 0.2


def test_a_network_that_computes_no_number_is_uncertain_and_answers_null():
    model, card = load_model(MODEL)
    model.std *= float("nan")
    predictor = Predictor(TorchRuntime(model), replace(card, uncertain_below=0.0))
    (answer,) = predictor.predict([PNG])
    assert answer.uncertain
    assert (answer.confidence, set(answer.probabilities.values())) == (None, {None})
    status, content, _ = Service(predictor, "torch", "1.0", 1, 1).classify(PNG, "", 1, False, 0.0)
    shown = json.loads(json.dumps(as_dict("a.png", answer), allow_nan=False))
    assert (status, json.loads(content)["probabilities"]) == (200, shown["probabilities"])


def test_an_archive_that_would_need_timm_on_the_server_is_refused(tmp_path):
    card = json.loads((ROOT / "models" / "flowers_small" / "best_model" / "config.json").read_text())
    (tmp_path / "model_config.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="prototypes needs timm, which a server has not: give --runtime onnx-int8"):
        stage(tmp_path, "torch", tmp_path)


@pytest.mark.parametrize(
    ("model", "files", "said"),
    [
        ("best_model", ["model.onnx"], "; or give --runtime onnx or torch"),
        ("best_model", [], "; or give --runtime torch"),
        ("flowers_small/best_model", ["model.onnx"], "experiment=flowers_small; or give --runtime onnx"),
        ("flowers_small/best_model", [], "experiment=flowers_small"),
    ],
)
def test_a_missing_int8_file_names_the_runtimes_that_do_without_it(tmp_path, model, files, said):
    shutil.copyfile(ROOT / "models" / model / "config.json", tmp_path / "model_config.json")
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=f"which the runtime onnx-int8 reads; make it with: .*{said}$"):
        stage(tmp_path, "onnx-int8", tmp_path)


def test_an_unknown_runtime_is_an_error_that_names_the_valid_ones(capsys, tmp_path):
    with pytest.raises(ValueError, match="unknown runtime 'onyx'; valid: torch, onnx, onnx-int8"):
        Predictor.load(MODEL, runtime="onyx")
    with pytest.raises(ValueError, match="the ONNX runtimes use the CPU, not cuda:0"):
        Predictor.load(MODEL, "cuda:0", "onnx")
    with pytest.raises(SystemExit):
        predict(["--input_path", str(tmp_path), "--output_path", str(tmp_path / "x.csv"), "--runtime", "onyx"])
    assert "invalid choice: 'onyx'" in capsys.readouterr().err


def cut(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])


def of_other_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"other weights")


def of_unknown_weights(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, folder / "model.onnx")


def of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["preprocessing"]["height"] = 32
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), r"model\.onnx does not exist; make it with: python -m src"),
        (cut, "cannot be loaded"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"text"), "cannot be loaded"),
        (of_other_weights, "is stale: made of weights"),
        (of_unknown_weights, "is stale: made of weights none"),
        (of_another_size, r"its config says \('tensor\(uint8\)', \(1, 32, 28\), 10\)"),
    ],
    ids=["missing", "cut", "no model", "other weights", "no hash", "other size"],
)
def test_a_file_that_cannot_be_used_is_an_error(damage, said, folder):
    damage(folder)
    with pytest.raises(ModelError, match=said):
        Predictor.load(folder, runtime="onnx")


@pytest.mark.parametrize("runtime", FILES)
def test_the_handler_with_each_runtime(runtime, model_dir):  # noqa: F811
    ask = load_handler(model_dir, runtime)
    predictor = Predictor.load(MODEL, runtime=runtime)
    images = [PNG, encode(OTHER)] * 40  # more than go through the network at once
    broken = raw(as_json(images=[as_base64(PNG), as_base64(PNG[:60])]))
    (first, _), (_, answers), (_, last) = ask(
        broken, raw(as_json(images=[as_base64(data) for data in images[:60]])), raw(images[60])
    )
    assert first == 400
    wanted = [predictor.predict([data])[0].probabilities for data in images[:2]]
    for index, answer in enumerate([*answers, last]):
        assert answer["probabilities"] == pytest.approx(wanted[index % 2], abs=1e-5)
    several = ask(*(raw(as_json(images=[as_base64(data) for data in images[:40]])) for _ in range(3)))
    for _, answers in several:
        assert [answer["predicted_label"] for answer in answers] == ["Trouser", "Bag"] * 20


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_handler_with_a_compiled_network(model_dir, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    ask = load_handler(model_dir, "torch", compile=True)
    assert ask.handler.predictor.runtime.forward is not ask.handler.predictor.runtime.model
    predictor = Predictor.load(MODEL, runtime="torch")
    for images in ([PNG], [encode(OTHER), PNG] * 5):
        for found, wanted in zip(ask(*map(raw, images)), predictor.predict(images), strict=True):
            assert found[1]["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-5)
    assert any(tmp_path.iterdir()), "what was compiled lies where it was told to"


@pytest.mark.parametrize("missing", ["model.onnx", "model.int8.onnx", "model.pt"])
def test_an_archive_without_the_file_of_its_runtime_does_not_load(missing, model_dir, tmp_path):  # noqa: F811
    unpacked = Path(shutil.copytree(model_dir, tmp_path / "unpacked"))
    (unpacked / missing).unlink()
    runtime = next(name for name, file in FILES.items() if (file or "model.pt") == missing)
    with pytest.raises(ModelError, match=f"{missing} does not exist"):
        load_archived_predictor(unpacked, runtime)


def test_the_csv_of_each_runtime(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").write_bytes(PNG)
    places = ["--input_path", f"{tmp_path}/images", "--output_path"]
    for runtime in FILES:
        done = run_script(
            ROOT, sys.executable, "src/predict.py", *places, f"{tmp_path}/{runtime}.csv", "--runtime", runtime
        )
        assert done.returncode == 0, done.stderr
        assert ",Trouser," in (tmp_path / f"{runtime}.csv").read_text()


def test_a_batch_of_pixels_grows_rewinds_and_goes_back():
    batch = PixelBatch(Preprocessing(2, 3, 1), 2)
    home = batch.pixels
    for value in range(5):
        batch.next_row()[:] = value
        batch.keep()
    batch.rewind(3)
    batch.next_row()[:] = 9
    batch.keep()
    assert [part[:, 0, 0, 0].tolist() for part in batch.parts(3)] == [[0, 1, 2], [9]]
    batch.clear()
    assert batch.pixels is home
    assert list(batch.parts(3)) == []


def test_the_session_uses_one_thread_and_names_its_weights():
    runtime = OnnxRuntime(MODEL / "model.int8.onnx")
    options = runtime.session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    _, config = load_model(MODEL)
    runtime.check_shape((1, 28, 28), len(config.class_names))


def test_processors_with_exact_int8_are_told_apart(tmp_path):
    (tmp_path / "new").write_text("flags : fpu avx2 avx512_vnni\n")
    (tmp_path / "old").write_text("flags : fpu avx2 avx512f\n")
    assert has_vnni(tmp_path / "new")
    assert not has_vnni(tmp_path / "old")
    assert not has_vnni(tmp_path / "none")
