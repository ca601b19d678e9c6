"""create_mar_archive.sh: what it packs, and that the archive alone predicts as the repository does."""

import base64
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from src.export.archive import checksum_path, verify
from src.inference import Predictor
from src.inference.runtimes import FILES
from src.models import load_model, save_model
from tests.conftest import HANG, RUNTIME, copy_checkout, run_script
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
EXPORTED = ("model.pt", "model_config.json", "model.onnx", "model.int8.onnx")
SERVING_PYTHON = ROOT / "torchserve" / ".venv" / "bin" / "python"
LOCK = {
    "schema": "2.0",
    "stages": {name: {"cmd": f"do {name}"} for name in ("prepare", "train", "evaluate", "export", "archive")},
}


@pytest.fixture(scope="module")
def workshop(server, tmp_path_factory) -> Path:
    """A copy of the checkout with the exported model and a dvc.lock; needs the environment that ``server`` made."""
    root = copy_checkout(tmp_path_factory.mktemp("workshop"))
    for name in EXPORTED:
        shutil.copy2(server.root / "torchserve" / name, root / "torchserve" / name)
    (root / "dvc.lock").write_text(yaml.safe_dump(LOCK))
    (root / "src" / "models" / "__pycache__").mkdir()
    (root / "src" / "models" / "__pycache__" / "registry.cpython-311.pyc").write_bytes(b"stale")
    return root


def create(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return run_script(root, "./create_mar_archive.sh", *arguments, PYTHON=str(SERVING_PYTHON), **environment)


@pytest.fixture(scope="module")
def archive(workshop) -> Path:
    """A built archive, its checksum beside it. Read only."""
    built = create(workshop, "--version", "3.1")
    assert built.returncode == 0, built.stdout + built.stderr
    return workshop / "torchserve" / "model-store" / "fashion_mnist.mar"


# ---- what is built ----


def test_two_builds_give_the_same_bytes_and_leave_the_temporary_folder_alone(workshop, archive, tmp_path):
    (tmp_path / "tmp" / "fashion_mnist").mkdir(parents=True)  # what the archiver would delete
    built = create(workshop, "--version", "3.1", "--output", str(tmp_path / "out"), TMPDIR=str(tmp_path / "tmp"))
    assert built.returncode == 0, built.stderr
    for name in ("fashion_mnist.mar", "fashion_mnist.mar.sha256"):
        assert (tmp_path / "out" / name).read_bytes() == (archive.parent / name).read_bytes()
    assert os.listdir(tmp_path / "tmp") == ["fashion_mnist"]
    assert sorted(os.listdir(tmp_path / "out")) == ["fashion_mnist.mar", "fashion_mnist.mar.sha256"]


def test_a_second_build_waits_for_the_first(workshop, archive, tmp_path):
    command = ["./create_mar_archive.sh", "--output", str(tmp_path)]
    environment = os.environ | {"PYTHON": str(SERVING_PYTHON)}
    with (workshop / "create_mar_archive.sh").open() as script:
        fcntl.flock(script, fcntl.LOCK_EX)  # as a build holds it
        build = subprocess.Popen(command, cwd=workshop, env=environment, stdout=subprocess.DEVNULL)
        wait_until(lambda: any(child.name() == "flock" for child in psutil.Process(build.pid).children()))
    assert build.wait(HANG) == 0  # the lock ended with the file
    verify(tmp_path / "fashion_mnist.mar")


def test_the_checksum_is_what_sha256sum_reads(archive):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert checksum_path(archive).read_text() == f"{digest}  fashion_mnist.mar\n"
    assert verify(archive) == digest


def test_it_holds_the_shipped_rooms_and_nothing_else(archive):
    names = ("__init__.py", "preprocessing.py", "image_limits.py", "plain_png.py", "styles.py")
    shipped = [ROOT / "src" / name for name in names]
    shipped += [path for room in ("models", "inference") for path in (ROOT / "src" / room).rglob("*.py")]
    serving = ("__init__", "client", "draining", "management", "scaling", "tls", "tokens")
    shipped += [ROOT / "src" / "serving" / f"{name}.py" for name in serving]
    rest = {"model.pt", "model_config.json", "model-config.yaml", "handler.py", "dvc.lock", "MAR-INF/MANIFEST.json"}
    rest |= {FILES[RUNTIME], "sitecustomize.py"}
    with zipfile.ZipFile(archive) as opened:
        assert set(opened.namelist()) == {str(path.relative_to(ROOT)) for path in shipped} | rest
        for path in shipped:
            assert opened.read(str(path.relative_to(ROOT))) == path.read_bytes()
        for name in ("handler.py", "model-config.yaml", "sitecustomize.py"):
            assert opened.read(name) == (ROOT / "torchserve" / name).read_bytes()


def test_the_manifest_names_the_model_and_its_version(archive):
    with zipfile.ZipFile(archive) as opened:
        manifest = json.loads(opened.read("MAR-INF/MANIFEST.json"))
    assert manifest["model"] == {
        "modelName": "fashion_mnist", "modelVersion": "3.1", "serializedFile": "model.pt", "handler": "handler.py",
        "configFile": "model-config.yaml",
    }  # fmt: skip


def test_the_lock_stops_before_the_export(archive):
    with zipfile.ZipFile(archive) as opened:
        lock = yaml.safe_load(opened.read("dvc.lock"))
    assert lock["schema"] == LOCK["schema"]
    assert lock["stages"] == {name: LOCK["stages"][name] for name in ("prepare", "train", "evaluate")}


def test_no_name_shadows_a_module_of_torchserve(archive):
    taken = {path.stem for path in (SERVING_PYTHON.parents[1]).glob("lib/python*/site-packages/ts/*")}
    with zipfile.ZipFile(archive) as opened:
        assert not {Path(name.split("/")[0]).stem for name in opened.namelist()} & taken


def test_torchserve_reads_every_key_of_the_settings(server):
    """TorchServe ignores what it does not know; the jar, there once ``server`` runs, holds its setters."""
    settings = yaml.safe_load((ROOT / "torchserve" / "model-config.yaml").read_text())
    jar = next(SERVING_PYTHON.parents[1].glob("lib/python*/site-packages/ts/frontend/model-server.jar"))
    with zipfile.ZipFile(jar) as opened:
        code = opened.read("org/pytorch/serve/archive/model/ModelConfig.class")
    for key in settings.keys() - {"handler"}:
        assert f"set{key[0].upper()}{key[1:]}".encode() in code, key


@pytest.mark.parametrize("runtime", FILES)
def test_the_runtime_asked_for_is_packed_and_named(runtime, workshop, tmp_path):
    built = create(workshop, "--runtime", runtime, "--output", str(tmp_path))
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / "fashion_mnist.mar") as opened:
        assert yaml.safe_load(opened.read("model-config.yaml"))["handler"]["runtime"] == runtime
        assert {name for name in opened.namelist() if name.endswith(".onnx")} == {FILES[runtime]} - {None}
        assert "model.pt" in opened.namelist()


def test_an_onnx_file_that_is_missing_or_of_other_weights_is_refused(workshop, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(workshop, root, symlinks=True)
    model = root / "torchserve" / "model.pt"
    state = torch.load(model, weights_only=True)
    state["mean"] += 0.01
    torch.save(state, model)
    shutil.rmtree(root / "models" / "best_model")  # what is trained there would be asked for first
    stale = create(root, "--runtime", "onnx")
    (root / "torchserve" / "model.int8.onnx").unlink()
    missing = create(root, "--runtime", "onnx-int8")
    unknown = create(root, "--runtime", "onyx")
    assert [done.returncode for done in (stale, missing, unknown)] == [1, 1, 1]
    assert "model.onnx is stale: made of weights" in stale.stderr
    assert "model.int8.onnx does not exist, which the runtime onnx-int8 reads; make it with:" in missing.stderr
    assert "unknown runtime 'onyx'; valid: torch, onnx, onnx-int8" in unknown.stderr


@pytest.mark.parametrize("changed", ["weights", "config"])
def test_an_export_of_another_model_than_the_trained_one_is_refused(changed, workshop, tmp_path):
    """As after a training, or a calibration, that nobody exported."""
    root = tmp_path / "root"
    shutil.copytree(workshop, root, symlinks=True)
    model, card = load_model(root / "models" / "best_model")
    if changed == "weights":
        model.mean += 0.01
    else:
        card = replace(card, temperature=card.temperature + 0.1)
    save_model(root / "models" / "best_model", model, card)
    built = create(root, "--runtime", "torch", "--output", str(tmp_path / "out"))
    assert built.returncode == 1
    assert built.stderr == (
        "error: torchserve/model.pt is not the model that models/best_model holds now; "
        "export that: python export_model_for_torchserve.py --model-path models/best_model\n"
    )
    assert os.listdir(tmp_path / "out") == []
    shutil.rmtree(root / "models" / "best_model")  # as on a machine that only packs
    assert create(root, "--runtime", "torch", "--output", str(tmp_path / "out")).returncode == 0


@pytest.mark.parametrize("missing", ["model.pt", "model_config.json"])
def test_without_an_exported_model_it_says_how_to_make_one(missing, tmp_path, server):
    root = copy_checkout(tmp_path)
    for name in {"model.pt", "model_config.json"} - {missing}:
        shutil.copy2(server.root / "torchserve" / name, root / "torchserve" / name)
    built = create(root)
    assert built.returncode == 1
    assert f"torchserve/{missing} does not exist; make it with: python export_model_for_torchserve.py" in built.stderr
    assert not (root / "torchserve" / "model-store").exists()


@pytest.mark.parametrize(("content", "said"), [("{", "is not valid JSON"), ("{}", "misses architecture")])
def test_a_wrong_model_config_is_an_error_that_names_it(content, said, tmp_path, server):
    root = copy_checkout(tmp_path)
    shutil.copy2(server.root / "torchserve" / "model.pt", root / "torchserve" / "model.pt")
    (root / "torchserve" / "model_config.json").write_text(content)
    built = create(root)
    assert built.returncode == 1
    assert built.stderr.startswith(f"error: torchserve/model_config.json {said}")
    assert "Traceback" not in built.stderr


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--verison", "2"], "unknown argument --verison"), (["--version"], "needs a value")]
)
def test_wrong_arguments_are_refused(arguments, said):
    done = run_script(ROOT, "./create_mar_archive.sh", *arguments)
    assert done.returncode != 0
    assert said in done.stderr


def test_a_version_that_fits_in_no_url_is_refused(workshop, tmp_path):
    built = create(workshop, "--version", "../1", "--output", str(tmp_path / "out"))
    assert built.returncode == 1
    assert "modelVersion is '../1'" in built.stderr
    assert os.listdir(tmp_path / "out") == []


# ---- the archive alone, with what a server has ----

PROGRAM = """
import base64, importlib.util, json, sys
folder, sample, runtime = sys.argv[1:]
sys.path.insert(0, folder)
from pathlib import Path
import handler
from src.inference.archive import load_archived_predictor
predictor = load_archived_predictor(Path(folder), runtime)
image = base64.b64decode(json.loads(Path(sample).read_text())["image"])
answer = predictor.predict([image])[0]
training = ["torchvision", "lightning", "hydra", "omegaconf", "mlflow", "timm", "sklearn", "pandas"]
print(json.dumps({
    "probabilities": answer.probabilities, "label": answer.predicted_label, "path": sys.path,
    "installed": [name for name in training if importlib.util.find_spec(name)],
    "origin": sys.modules["src"].__file__,
}))
"""


def test_in_a_clean_environment_it_predicts_as_the_repository_does(archive, tmp_path, sample):
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(unpacked)
    command = [SERVING_PYTHON, "-I", "-c", PROGRAM, unpacked, ROOT / "torchserve" / "sample_input.json", RUNTIME]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["installed"] == []
    assert not any(Path(entry).resolve() == ROOT for entry in found["path"])
    assert found["origin"] == str(unpacked / "src" / "__init__.py")
    expected = Predictor.load(ROOT / "models" / "best_model", runtime=RUNTIME).predict(
        [base64.b64decode(sample["image"])]
    )[0]
    assert found["label"] == expected.predicted_label
    assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
