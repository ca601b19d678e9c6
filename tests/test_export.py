"""export_model_for_torchserve.py: models/best_model as the two files that an archive holds."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export_model_for_torchserve import export, main
from src.inference.archive import load_archived_model
from src.models import ModelError, load_model
from tests.conftest import run_script

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "best_model"
FILES = ("model.pt", "model_config.json", "model.onnx", "model.int8.onnx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with FILES of the shipped model."""
    folder = tmp_path_factory.mktemp("exported")
    assert export(MODEL, folder / "model.pt") == [folder / name for name in FILES]
    return folder


def test_the_state_dict_needs_no_code_and_equals_the_weights(exported):
    state, weights = torch.load(exported / "model.pt", weights_only=True), load_file(MODEL / "model.safetensors")
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


def test_the_config_is_the_same(exported):
    assert json.loads((exported / "model_config.json").read_text()) == json.loads((MODEL / "config.json").read_text())


def test_exporting_twice_gives_the_same_bytes(exported, tmp_path):
    export(MODEL, tmp_path / "model.pt")
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes()


def test_the_exported_model_answers_as_the_original(exported):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 1, 28, 28), dtype=np.uint8))
    original, config = load_model(MODEL)
    model, archived_config = load_archived_model(exported)
    assert archived_config == config
    with torch.inference_mode():
        assert torch.equal(model(images), original(images))


def test_the_command_works_from_the_repository(tmp_path):
    output = f"{tmp_path}/new/model.pt"
    done = run_script(ROOT, sys.executable, "export_model_for_torchserve.py", "--output-path", output)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["wrote", f"{tmp_path}/new/{name}"] for name in FILES
    ]
    assert done.stderr == ""


def change_weights(folder: Path) -> None:
    """Other weights under the same name, as a checkout of an older commit may leave them."""
    state = load_file(folder / "model.safetensors")
    state["mean"] += 0.01
    save_file(state, folder / "model.safetensors")


def test_a_model_without_onnx_files_leaves_none_of_an_older_export(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    model = tmp_path / "model"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("*.onnx"))
    assert export(model, tmp_path / "out" / "model.pt") == [tmp_path / "out" / name for name in FILES[:2]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES[:2])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "no model here"),
        (lambda folder: (folder / "model.safetensors").unlink(), "git checkout"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "misses architecture"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"cut"), "model.onnx cannot be loaded"),
        (change_weights, "model.onnx is stale: made of weights"),
    ],
    ids=["no folder", "no weights", "broken weights", "broken config", "empty config", "broken ONNX", "stale ONNX"],
)
def test_a_model_that_cannot_be_loaded_is_an_error(broken, said, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    broken(model)
    assert main(["--model-path", str(model), "--output-path", str(tmp_path / "out" / "model.pt")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError):
        export(model, tmp_path / "out" / "model.pt")


@pytest.mark.parametrize("output", ["folder", "file/model.pt", "/proc/model.pt"])
def test_an_output_that_cannot_be_written_is_an_error(output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert main(["--model-path", str(MODEL), "--output-path", output]) == 1
    assert capsys.readouterr().err.startswith("error: ")
