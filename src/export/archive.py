"""Seal and verify a TorchServe archive: ``python src/export/archive.py seal IN.mar OUT.mar`` or ``verify X.mar``.

Needs nothing but what a server has. ``seal`` makes equal content equal bytes and writes the SHA-256 beside it;
``verify`` refuses an archive that was changed since, or that TorchServe should not unpack.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import hashlib
import json
import lzma
import os
import re
import stat
import tempfile
import zipfile
import zlib

import yaml

from src.inference.archive import CONFIG_NAME, STATE_NAME, load_archived_predictor, load_state
from src.inference.runtimes import runtime_file
from src.models import ModelConfig

MANIFEST = "MAR-INF/MANIFEST.json"
MODEL_SETTINGS = "model-config.yaml"
SETTINGS = {"minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "handler"}
REQUIRED = (STATE_NAME, CONFIG_NAME, MODEL_SETTINGS, "handler.py", "src/preprocessing.py", MANIFEST)
REBUILD = "build it again: ./create_mar_archive.sh"
# What reading a damaged zip, JSON or YAML raises; RuntimeError is an encrypted file or an unknown compression,
# ValueError bad UTF-8, JSON, a YAML date like 2020-13-45, or a ModelError.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    ValueError,
    yaml.YAMLError,
)
RESERVED = ("all", "draining")  # /models/NAME/all is every version; src/serving/draining.py registers the other
DESCRIPTOR = 8  # the bit of a zip entry's flags that says its lengths stand behind it
END = b"PK\5\6" + bytes(18)  # a zip's last record; it ends with the length of a comment
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip can hold


class ArchiveError(ValueError):
    """An archive that must not be served; the message says why and what to do."""


def seal(source: Path, target: Path) -> str:
    """Rewrite ``source`` to ``target`` without dates and in sorted order; write ``target``.sha256 and return it.

    Raises ArchiveError, and leaves ``target`` as it was, when the content must not be served.
    """
    partial = target.with_name(f".{target.name}.part")
    try:
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as new:
            for name in sorted(name for name in old.namelist() if not name.endswith("/")):
                content = old.read(name)
                if name == MANIFEST:
                    # TorchServe warns without a date; the real one would change the bytes.
                    manifest = json.loads(content) | {"createdOn": "01/01/1980 00:00:00"}
                    content = json.dumps(manifest, indent=2, sort_keys=True).encode()
                new.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED)
        check_content(partial)
        digest = sha256(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    checksum_path(target).write_text(f"{digest}  {target.name}\n")
    return digest


def verify(path: Path) -> str:
    """Check the checksum, the names inside, the settings and that the model loads; return the SHA-256.

    Raises ArchiveError.
    """
    if not path.is_file():
        raise ArchiveError(f"{path} does not exist; {REBUILD}")
    if not checksum_path(path).is_file():
        raise ArchiveError(f"{checksum_path(path)} does not exist, so {path.name} cannot be trusted; {REBUILD}")
    expected, found = checksum_path(path).read_bytes()[:64].decode(errors="replace"), sha256(path)
    if found != expected:
        raise ArchiveError(f"{path} was changed: its SHA-256 is {found}, {path.name}.sha256 says {expected}; {REBUILD}")
    check_content(path)
    return found


def check_content(path: Path) -> None:
    """Everything inside is readable, named as expected and valid. Raises ArchiveError."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_names(archive.infolist(), path)
            if broken := archive.testzip():
                raise ArchiveError(f"{path} is damaged: {broken} does not match its CRC; {REBUILD}")
            check_headers(archive, path)
            settings = yaml.safe_load(archive.read(MODEL_SETTINGS))
            check_settings(settings, set(archive.namelist()), path)
            check_manifest(json.loads(archive.read(MANIFEST)), set(archive.namelist()), path)
            check_model(archive, settings["handler"]["runtime"])
    except ArchiveError:
        raise
    except UNREADABLE as error:
        raise ArchiveError(f"{path} is damaged: {error}; {REBUILD}") from error


def check_model(archive: zipfile.ZipFile, runtime: str) -> None:
    """The network can be loaded as a worker will, is what its config says, and was made of the weights that lie beside
    it. Raises ModelError."""
    ModelConfig.from_dict(json.loads(archive.read(CONFIG_NAME)), CONFIG_NAME)
    with tempfile.TemporaryDirectory() as folder:
        for name in (STATE_NAME, CONFIG_NAME, runtime_file(runtime)):
            if name is not None:
                archive.extract(name, folder)
        predictor = load_archived_predictor(Path(folder), runtime)
        if runtime_file(runtime) is not None:  # torch reads the weights themselves
            from src.models.storage import weights_sha256

            predictor.runtime.check_weights(weights_sha256(load_state(Path(folder, STATE_NAME))))


def check_names(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Every required file is there, once, and none would be unpacked outside the model's folder."""
    names = [entry.filename for entry in entries]
    for entry, name in zip(entries, names, strict=True):
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            raise ArchiveError(f"{path} holds {name!r}, which leads out of its folder; do not serve it")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ArchiveError(f"{path} holds {name!r}, which is a link; do not serve it")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArchiveError(f"{path} holds {', '.join(twice)} twice; do not serve it")
    if missing := [name for name in REQUIRED if name not in names]:
        raise ArchiveError(f"{path} misses {', '.join(missing)}; {REBUILD}")


def check_headers(archive: zipfile.ZipFile, path: Path) -> None:
    """The header before each file says what the list at the end says, and nothing else lies in the zip: TorchServe
    unpacks by the headers, from the first byte on, and never reads the list."""
    place = 0
    with path.open("rb") as file:
        for entry in archive.infolist():
            stored = entry.compress_type == zipfile.ZIP_STORED
            # By an extra field, a descriptor behind the data or two lengths Java may take another length than Python.
            unclear = entry.extra or entry.flag_bits & DESCRIPTOR or (stored and entry.compress_size != entry.file_size)
            file.seek(place)
            header = entry.FileHeader()
            if unclear or entry.header_offset != place or file.read(len(header)) != header:
                raise ArchiveError(f"{path}: at byte {place} is not {entry.filename!r} as it is listed; {REBUILD}")
            place += len(header) + entry.compress_size
        file.seek(-len(END), os.SEEK_END)
        end = file.read()
    if place != archive.start_dir or (end[:4], end[-2:]) != (END[:4], END[-2:]):
        raise ArchiveError(f"{path} holds more than the files that it lists; {REBUILD}")


def check_settings(settings: object, names: set[str], path: Path) -> None:
    """model-config.yaml has exactly the keys that TorchServe and the handler read, with positive whole numbers, and
    a runtime whose file is in the archive."""
    if not isinstance(settings, dict) or set(settings) != SETTINGS:
        found = sorted(map(str, settings)) if isinstance(settings, dict) else type(settings).__name__
        raise ArchiveError(f"{path}: {MODEL_SETTINGS} has the keys {found}; it must have {sorted(SETTINGS)}")
    handler = settings["handler"]
    if not isinstance(handler, dict) or set(handler) - {"compile"} != {"runtime", "threads"}:
        raise ArchiveError(
            f"{path}: {MODEL_SETTINGS}: handler is {handler!r}; it must hold runtime, threads and compile alone"
        )
    try:
        file = runtime_file(str(handler["runtime"]))
    except ValueError as error:
        raise ArchiveError(f"{path}: {MODEL_SETTINGS}: {error}") from error
    if file is not None and file not in names:
        raise ArchiveError(f"{path} misses {file}, which the runtime {handler['runtime']} reads; {REBUILD}")
    compiled = handler.get("compile", False)  # archives built before it was known lack it
    if type(compiled) is not bool or (compiled and file is not None):
        raise ArchiveError(
            f"{path}: {MODEL_SETTINGS}: compile is {compiled!r} with the runtime {handler['runtime']}; "
            "it must be false, or true with torch"
        )
    numbers = {key: value for key, value in settings.items() if key != "handler"} | {"threads": handler["threads"]}
    for key, value in numbers.items():
        least = 0 if key == "maxBatchDelay" else 1
        if type(value) is not int or value < least:
            raise ArchiveError(f"{path}: {MODEL_SETTINGS}: {key} is {value!r}; it must be a whole number from {least}")
    if settings["minWorkers"] > settings["maxWorkers"]:
        raise ArchiveError(f"{path}: {MODEL_SETTINGS}: minWorkers must not be above maxWorkers")


def check_manifest(manifest: object, names: set[str], path: Path) -> None:
    """The manifest names files of the archive, and a model and version that fit into a URL."""
    model = manifest.get("model") if isinstance(manifest, dict) else None
    if not isinstance(model, dict):
        raise ArchiveError(f"{path}: {MANIFEST} has no section model; {REBUILD}")
    for key in ("handler", "serializedFile", "configFile"):
        if model.get(key) not in names:
            raise ArchiveError(f"{path}: {MANIFEST} names {key} {model.get(key)!r}; it must be a file of the archive")
    for key in ("modelName", "modelVersion"):
        if not isinstance(model.get(key), str) or not re.fullmatch(r"\w[\w.-]*", model[key], re.ASCII):
            raise ArchiveError(f"{path}: {MANIFEST}: {key} is {model.get(key)!r}; use letters, digits, _ . and -")
    if model["modelVersion"] in RESERVED:
        raise ArchiveError(
            f"{path}: {MANIFEST}: modelVersion is {model['modelVersion']!r}, which has a meaning of its own; "
            "use another, such as 1.0"
        )


def checksum_path(path: Path) -> Path:
    """``X.mar`` -> ``X.mar.sha256``."""
    return path.with_name(path.name + ".sha256")


def sha256(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sealing = commands.add_parser("seal", help="make the bytes reproducible and write the checksum")
    sealing.add_argument("source", type=Path)
    sealing.add_argument("target", type=Path)
    commands.add_parser("verify", help="refuse a changed or malformed archive").add_argument("archive", type=Path)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "seal":
            print(f"wrote {arguments.target}  sha256 {seal(arguments.source, arguments.target)}")
        else:
            print(f"verified {arguments.archive}  sha256 {verify(arguments.archive)}")
    except (ArchiveError, zipfile.BadZipFile, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
