"""create_mar_archive.sh and src/export/archive.py: what is in an archive, and which archives are refused."""

import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

from src.export.archive import ArchiveError, checksum_path, main, seal, sha256, verify
from src.inference import Predictor
from tests.conftest import copy_checkout, run_script

ROOT = Path(__file__).resolve().parents[1]
SERVING_PYTHON = ROOT / "torchserve" / ".venv" / "bin" / "python"
LOCK = {
    "schema": "2.0",
    "stages": {name: {"cmd": f"do {name}"} for name in ("prepare", "train", "evaluate", "export", "archive")},
}


@pytest.fixture(scope="module")
def workshop(server, tmp_path_factory) -> Path:
    """A copy of the checkout with the exported model and a dvc.lock; needs the environment that ``server`` made."""
    root = copy_checkout(tmp_path_factory.mktemp("workshop"))
    for name in ("model.pt", "model_config.json"):
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


def test_the_checksum_is_what_sha256sum_reads(archive):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert checksum_path(archive).read_text() == f"{digest}  fashion_mnist.mar\n"
    assert verify(archive) == digest


def test_it_holds_the_shipped_rooms_and_nothing_else(archive):
    shipped = [ROOT / "src" / "__init__.py", ROOT / "src" / "preprocessing.py"]
    shipped += [path for room in ("models", "inference") for path in (ROOT / "src" / room).rglob("*.py")]
    rest = {"model.pt", "model_config.json", "model-config.yaml", "handler.py", "dvc.lock", "MAR-INF/MANIFEST.json"}
    with zipfile.ZipFile(archive) as opened:
        assert set(opened.namelist()) == {str(path.relative_to(ROOT)) for path in shipped} | rest
        for path in shipped:
            assert opened.read(str(path.relative_to(ROOT))) == path.read_bytes()
        for name in ("handler.py", "model-config.yaml"):
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


def test_torchserve_reads_every_key_of_the_settings():
    """TorchServe ignores what it does not know; its jar holds the setters of what it does."""
    settings = yaml.safe_load((ROOT / "torchserve" / "model-config.yaml").read_text())
    jar = next(SERVING_PYTHON.parents[1].glob("lib/python*/site-packages/ts/frontend/model-server.jar"))
    with zipfile.ZipFile(jar) as opened:
        code = opened.read("org/pytorch/serve/archive/model/ModelConfig.class")
    for key in settings.keys() - {"handler"}:
        assert f"set{key[0].upper()}{key[1:]}".encode() in code, key


@pytest.mark.parametrize("missing", ["model.pt", "model_config.json"])
def test_without_an_exported_model_it_says_how_to_make_one(missing, tmp_path, server):
    root = copy_checkout(tmp_path)
    for name in {"model.pt", "model_config.json"} - {missing}:
        shutil.copy2(server.root / "torchserve" / name, root / "torchserve" / name)
    built = create(root)
    assert built.returncode == 1
    assert f"torchserve/{missing} does not exist; make it with: python export_model_for_torchserve.py" in built.stderr
    assert not (root / "torchserve" / "model-store").exists()


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
folder, sample = sys.argv[1:]
sys.path.insert(0, folder)
from pathlib import Path
import handler
from src.inference import Predictor
from src.inference.archive import load_archived_model
model, config, _ = load_archived_model(Path(folder))
image = base64.b64decode(json.loads(Path(sample).read_text())["image"])
answer = Predictor(model, config).predict([image])[0]
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
    command = [SERVING_PYTHON, "-I", "-c", PROGRAM, unpacked, ROOT / "torchserve" / "sample_input.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["installed"] == []
    assert not any(Path(entry).resolve() == ROOT for entry in found["path"])
    assert found["origin"] == str(unpacked / "src" / "__init__.py")
    expected = Predictor.load(ROOT / "models" / "best_model").predict([base64.b64decode(sample["image"])])[0]
    assert found["label"] == expected.predicted_label
    assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)


# ---- what is refused ----

GOOD_MODEL_FILES = ("handler.py", "model.pt", "model-config.yaml")


def rewrite(archive: Path, target: Path, changes: dict[str, bytes | None]) -> Path:
    """A copy of ``archive`` with entries replaced, added or (None) left out, and a checksum that fits."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        content = {name: old.read(name) for name in old.namelist()} | changes
        for name, data in content.items():
            if data is not None:
                new.writestr(name, data)
    return sign(target)


def sign(target: Path) -> Path:
    checksum_path(target).write_text(f"{sha256(target)}  {target.name}\n")
    return target


def test_tampering_is_refused(archive, tmp_path):
    target = tmp_path / "x.mar"
    shutil.copy2(archive, target)
    with pytest.raises(ArchiveError, match=r"x\.mar\.sha256 does not exist, so x\.mar cannot be trusted"):
        verify(target)
    checksum_path(target).write_text("")
    with pytest.raises(ArchiveError, match="was changed"):
        verify(target)
    sign(target)
    verify(target)
    with target.open("r+b") as file:
        file.seek(1000)
        file.write(b"tampered")
    with pytest.raises(ArchiveError, match=r"was changed: its SHA-256 is .* build it again"):
        verify(target)
    sign(target)  # even with a checksum that fits, the content does not
    with pytest.raises(ArchiveError, match="is damaged"):
        verify(target)
    target.unlink()
    with pytest.raises(ArchiveError, match="does not exist; build it again"):
        verify(target)


@pytest.mark.parametrize(
    "name", ["../evil.py", "src/../../evil.py", "/etc/evil", "C:\\evil.py", "D:evil.py", "\\evil.py", "a\\..\\evil.py"]
)
def test_names_that_lead_out_of_the_folder_are_refused(name, archive, tmp_path):
    with pytest.raises(ArchiveError, match="leads out of its folder; do not serve it"):
        verify(rewrite(archive, tmp_path / "x.mar", {name: b""}))


def test_links_are_refused(archive, tmp_path):
    target = tmp_path / "x.mar"
    shutil.copy2(archive, target)
    link = zipfile.ZipInfo("src/secrets.py")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(target, "a") as opened:
        opened.writestr(link, "/etc/passwd")
    with pytest.raises(ArchiveError, match=r"holds 'src/secrets\.py', which is a link"):
        verify(sign(target))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_names_are_refused(archive, tmp_path):
    target = tmp_path / "x.mar"
    shutil.copy2(archive, target)
    with zipfile.ZipFile(target, "a") as opened:
        opened.writestr("handler.py", "print('second')")
    with pytest.raises(ArchiveError, match=r"holds handler\.py twice"):
        verify(sign(target))


@pytest.mark.parametrize("name", [*GOOD_MODEL_FILES, "model_config.json", "MAR-INF/MANIFEST.json"])
def test_missing_files_are_named(name, archive, tmp_path):
    with pytest.raises(ArchiveError, match=f"misses {name}; build it again"):
        verify(rewrite(archive, tmp_path / "x.mar", {name: None}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"maxWorker": 4}, "has the keys"),
        ({"minWorkers": None}, "has the keys"),
        ({"minWorkers": 0}, "minWorkers is 0; it must be a whole number from 1"),
        ({"batchSize": "32"}, "batchSize is '32'"),
        ({"batchSize": True}, "batchSize is True"),
        ({"maxBatchDelay": -1}, "maxBatchDelay is -1; it must be a whole number from 0"),
        ({"minWorkers": 9}, "minWorkers must not be above maxWorkers"),
        ({"handler": {"threads": 0}}, "threads is 0"),
        ({"handler": {"thread": 1}}, "it must hold threads and nothing else"),
        ({"handler": 3}, "it must hold threads and nothing else"),
        ({7: 1}, "has the keys"),
    ],
)
def test_wrong_settings_are_refused(change, said, archive, tmp_path):
    settings = yaml.safe_load((ROOT / "torchserve" / "model-config.yaml").read_text()) | change
    settings = {key: value for key, value in settings.items() if value is not None}
    changed = {"model-config.yaml": yaml.safe_dump(settings).encode()}
    with pytest.raises(ArchiveError, match=said):
        verify(rewrite(archive, tmp_path / "x.mar", changed))


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"a: [", b"\xff\xfe\x00", b"!!python/object:os.system {}"])
def test_settings_that_are_no_mapping_are_refused(content, archive, tmp_path):
    with pytest.raises(ArchiveError, match=r"model-config|damaged"):
        verify(rewrite(archive, tmp_path / "x.mar", {"model-config.yaml": content}))


GOOD_MODEL = {"modelName": "a", "modelVersion": "1.0", "handler": "handler.py", "serializedFile": "model.pt",
              "configFile": "model-config.yaml"}  # fmt: skip


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("{", "is damaged"),
        ("[]", "has no section model"),
        ('{"model": 3}', "has no section model"),
        ({"handler": "../evil.py"}, "names handler '../evil.py'"),
        ({"handler": "image_classifier"}, "it must be a file of the archive"),
        ({"serializedFile": None}, "names serializedFile None"),
        ({"configFile": "other.yaml"}, "names configFile 'other.yaml'"),
        ({"modelName": "a/b"}, "modelName is 'a/b'"),
        ({"modelVersion": 1.0}, "modelVersion is 1.0"),
    ],
)
def test_a_wrong_manifest_is_refused(manifest, said, archive, tmp_path):
    text = manifest if isinstance(manifest, str) else json.dumps({"model": GOOD_MODEL | manifest})
    with pytest.raises(ArchiveError, match=said):
        verify(rewrite(archive, tmp_path / "x.mar", {"MAR-INF/MANIFEST.json": text.encode()}))


@pytest.mark.parametrize("content", [b"{", b"\xff", b"{}", b'"text"', b'{"name": "a", "surprise": 1}'])
def test_a_broken_model_config_is_refused(content, archive, tmp_path):
    with pytest.raises(ArchiveError, match="is damaged"):
        verify(rewrite(archive, tmp_path / "x.mar", {"model_config.json": content}))


@pytest.mark.parametrize("size", [0, 100, -100, -5000])
def test_a_truncated_zip_is_refused(size, archive, tmp_path):
    target = tmp_path / "x.mar"
    target.write_bytes(archive.read_bytes()[:size])
    with pytest.raises(ArchiveError, match="is damaged"):
        verify(sign(target))


def test_sealing_refuses_what_must_not_be_served_and_leaves_the_older_archive(archive, tmp_path):
    target = tmp_path / "kept.mar"
    target.write_bytes(b"older")
    with pytest.raises(ArchiveError, match=r"misses handler\.py"):
        seal(rewrite(archive, tmp_path / "x.mar", {"handler.py": None}), target)
    assert target.read_bytes() == b"older"
    assert not list(tmp_path.glob(".*"))


def test_the_commands_exit_with_the_reason(archive, tmp_path, capsys):
    assert main(["verify", str(archive)]) == 0
    assert f"verified {archive}" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "no.mar")]) == 1
    assert main(["seal", str(tmp_path / "no.mar"), str(tmp_path / "out.mar")]) == 1
    (tmp_path / "text.mar").write_text("text")
    assert main(["seal", str(tmp_path / "text.mar"), str(tmp_path / "out.mar")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") for line in errors)
    assert sorted(os.listdir(tmp_path)) == ["text.mar"]
