"""src/export/archive.py: which archives are refused, and that the reason is given."""

import io
import json
import os
import shutil
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import yaml

from src.export.archive import ArchiveError, checksum_path, main, seal, sha256, verify
from src.inference.archive import load_state
from src.models import ModelError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def archive(server) -> Path:
    """The archive that the server serves, its checksum beside it. Read only."""
    return server.root / "torchserve" / "model-store" / "fashion_mnist.mar"


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


def packed(name: str, data: bytes) -> bytes:
    """One file as it stands in a zip, behind its header."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
        return file.getvalue()[: archive.start_dir]


def before_the_files(content: bytes, hidden: bytes) -> bytes:
    return hidden + content


def behind_the_files(content: bytes, hidden: bytes) -> bytes:
    end = content.rindex(b"PK\5\6")
    (start,) = struct.unpack_from("<I", content, end + 16)
    moved = struct.pack("<I", start + len(hidden))
    return content[:start] + hidden + content[start : end + 16] + moved + content[end + 20 :]


def behind_the_end(content: bytes, hidden: bytes) -> bytes:
    return content + hidden


def within_a_file(content: bytes, hidden: bytes) -> bytes:
    """A file of 1 byte takes more in the zip; it is not compressed, so Java goes on behind that byte."""
    file, data = io.BytesIO(content), b"x" + hidden
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("note.txt", data)
    lengths = (struct.pack("<3I", zlib.crc32(each), len(data), len(each)) for each in (data, data[:1]))
    return file.getvalue().replace(*lengths)


@pytest.mark.parametrize("name", ["handler.py", "../../evil.txt"])
@pytest.mark.parametrize(
    ("hide", "said"),
    [
        (before_the_files, "at byte 0 is not"),
        (behind_the_files, "holds more than the files that it lists"),
        (behind_the_end, "holds more than the files that it lists"),
        (within_a_file, r"is not 'note\.txt' as it is listed"),
    ],
)
def test_files_that_the_list_at_the_end_does_not_name_are_refused(hide, said, name, archive, tmp_path):
    """TorchServe unpacks by the headers before the files and would take them."""
    target = tmp_path / "x.mar"
    target.write_bytes(hide(archive.read_bytes(), packed(name, b"evil")))
    with zipfile.ZipFile(target) as opened:
        assert opened.testzip() is None, "Python reads the list and sees nothing of them"
    with pytest.raises(ArchiveError, match=rf"{said}.*; build it again: \./create_mar_archive\.sh"):
        verify(sign(target))


class Pipe(io.BytesIO):
    """Cannot be sought in, so zipfile writes the lengths behind each file."""

    def tell(self) -> int:
        raise OSError


def test_headers_that_say_other_than_the_list_are_refused(archive, tmp_path):
    pipe, noted, changed = Pipe(), io.BytesIO(archive.read_bytes()), bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(pipe, "w") as new:
        changed[old.getinfo("handler.py").header_offset + 8] = zipfile.ZIP_STORED
        for name in old.namelist():
            new.writestr(name, old.read(name))
    note = zipfile.ZipInfo("note.txt")
    note.extra = struct.pack("<HHQQ", 1, 16, 0, 0)  # lengths beyond 4 GiB, which Java reads even where none is needed
    with zipfile.ZipFile(noted, "a") as opened:
        opened.writestr(note, b"x")
    for content, name in ((pipe.getvalue(), "MANIFEST"), (noted.getvalue(), "note"), (changed, "handler")):
        target = tmp_path / "x.mar"
        target.write_bytes(content)
        with pytest.raises(ArchiveError, match=rf"at byte \d+ is not '.*{name}\.\w+' as it is listed; build it again"):
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
        ({"handler": {"threads": 0, "runtime": "torch"}}, "threads is 0"),
        ({"handler": {"thread": 1, "runtime": "torch"}}, "it must hold runtime, threads and compile alone"),
        ({"handler": {"threads": 1}}, "it must hold runtime, threads and compile alone"),
        ({"handler": 3}, "it must hold runtime, threads and compile alone"),
        ({"handler": {"threads": 1, "runtime": "onyx"}}, "unknown runtime 'onyx'; valid: torch, onnx, onnx-int8"),
        ({"handler": {"threads": 1, "runtime": "onnx"}}, "misses model.onnx, which the runtime onnx reads"),
        ({"handler": {"threads": 1, "runtime": "torch", "compile": "yes"}}, "compile is 'yes' with the runtime torch"),
        ({"handler": {"threads": 1, "runtime": "onnx-int8", "compile": True}}, "it must be false, or true with torch"),
        ({7: 1}, "has the keys"),
    ],
)
def test_wrong_settings_are_refused(change, said, archive, tmp_path):
    settings = yaml.safe_load((ROOT / "torchserve" / "model-config.yaml").read_text()) | change
    settings = {key: value for key, value in settings.items() if value is not None}
    changed = {"model-config.yaml": yaml.safe_dump(settings).encode()}
    with pytest.raises(ArchiveError, match=said):
        verify(rewrite(archive, tmp_path / "x.mar", changed))


WRONG_YAML = (b"", b"[1, 2]", b"a: [", b"\xff\xfe\x00", b"!!python/object:os.system {}", b"a: 2020-13-45", b"a: 0x_")


@pytest.mark.parametrize("content", WRONG_YAML)
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
        ({"modelVersion": "all"}, "modelVersion is 'all', which has a meaning of its own"),
        ({"modelVersion": "draining"}, "modelVersion is 'draining', which has a meaning of its own"),
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


@pytest.mark.parametrize("wrong", [{"height": 100_000}, {"height": 28.5}, {"width": 27}, {"channels": 3}])
def test_a_config_that_is_not_the_networks_is_refused(wrong, archive, tmp_path):
    with zipfile.ZipFile(archive) as content:
        config = json.loads(content.read("model_config.json"))
    config["preprocessing"] |= wrong
    with pytest.raises(ArchiveError, match=r"is damaged: .*its config says"):
        verify(rewrite(archive, tmp_path / "x.mar", {"model_config.json": json.dumps(config).encode()}))


def test_a_config_of_fewer_classes_is_refused(archive, tmp_path):
    with zipfile.ZipFile(archive) as content:
        config = json.loads(content.read("model_config.json"))
    config["class_names"].pop()
    with pytest.raises(ArchiveError, match="is damaged"):
        verify(rewrite(archive, tmp_path / "x.mar", {"model_config.json": json.dumps(config).encode()}))


@pytest.mark.parametrize(
    "content", [b"", b".", b"a", b"\x80\x02.", b"text", [1, 2], {"epoch": 3, "state_dict": {}}, 5000]
)
def test_a_model_that_is_no_state_dict_is_refused(content, archive, tmp_path):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, int):
        with zipfile.ZipFile(archive) as opened:
            path.write_bytes(opened.read("model.pt")[:content])
    else:
        torch.save(content, path)
    with pytest.raises(ModelError, match=r"model\.pt .* state_dict"):
        load_state(path)


def test_weights_of_another_model_are_refused(archive, tmp_path):
    """The ONNX file answers, and says of what weights it was made."""
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(archive) as opened:
        path.write_bytes(opened.read("model.pt"))
    state = load_state(path)
    torch.save(state | {"mean": state["mean"] + 0.01}, path)
    with pytest.raises(ArchiveError, match=r"is stale: made of weights \w+, not of \w+"):
        verify(rewrite(archive, tmp_path / "x.mar", {"model.pt": path.read_bytes()}))


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
