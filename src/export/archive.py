"""Seal and verify a TorchServe archive: ``python src/export/archive.py seal IN.mar OUT.mar`` or ``verify X.mar``.

Needs nothing but what a server has. ``seal`` makes equal content equal bytes and writes the SHA-256 beside it;
``verify`` refuses an archive that was changed since, or that TorchServe should not unpack.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import hashlib
import json
import zipfile

import yaml

from src.models import ModelConfig, ModelError

MANIFEST = "MAR-INF/MANIFEST.json"
MODEL_SETTINGS = "model-config.yaml"
SETTINGS = {"minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "handler"}
REQUIRED = ("model.pt", "model_config.json", MODEL_SETTINGS, "handler.py", "src/preprocessing.py", MANIFEST)
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip can hold


class ArchiveError(ValueError):
    """An archive that must not be served; the message says why and what to do."""


def seal(source: Path, target: Path) -> str:
    """Rewrite ``source`` to ``target`` without dates and in sorted order; write ``target``.sha256 and return it.

    Raises ArchiveError when the result does not verify.
    """
    partial = target.with_name(f".{target.name}.part")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as new:
        for name in sorted(name for name in old.namelist() if not name.endswith("/")):
            content = old.read(name)
            if name == MANIFEST:
                manifest = json.loads(content)
                manifest.pop("createdOn", None)
                content = json.dumps(manifest, indent=2, sort_keys=True).encode()
            new.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED)
    partial.replace(target)
    digest = sha256(target)
    checksum_path(target).write_text(f"{digest}  {target.name}\n")
    verify(target)
    return digest


def verify(path: Path) -> str:
    """Check the checksum, the names inside, the settings and the model's config; return the SHA-256.

    Raises ArchiveError.
    """
    rebuild = "build it again: ./create_mar_archive.sh"
    if not path.is_file():
        raise ArchiveError(f"{path} does not exist; {rebuild}")
    if not checksum_path(path).is_file():
        raise ArchiveError(f"{checksum_path(path)} does not exist, so {path.name} cannot be trusted; {rebuild}")
    expected, found = checksum_path(path).read_text().split()[0], sha256(path)
    if found != expected:
        raise ArchiveError(f"{path} was changed: its SHA-256 is {found}, {path.name}.sha256 says {expected}; {rebuild}")
    try:
        with zipfile.ZipFile(path) as archive:
            check_names(archive.namelist(), path)
            check_settings(yaml.safe_load(archive.read(MODEL_SETTINGS)), path)
            check_manifest(json.loads(archive.read(MANIFEST)), path)
            ModelConfig.from_dict(json.loads(archive.read("model_config.json")), f"{path.name}: model_config.json")
    except (zipfile.BadZipFile, json.JSONDecodeError, yaml.YAMLError, ModelError) as error:
        raise ArchiveError(f"{path} is damaged: {error}; {rebuild}") from error
    return found


def check_names(names: list[str], path: Path) -> None:
    """Every required file is there, and none would be unpacked outside the model's folder."""
    for name in names:
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            raise ArchiveError(f"{path} holds {name!r}, which leads out of its folder; do not serve it")
    if missing := [name for name in REQUIRED if name not in names]:
        raise ArchiveError(f"{path} misses {', '.join(missing)}; build it again: ./create_mar_archive.sh")


def check_settings(settings: object, path: Path) -> None:
    """model-config.yaml has exactly the keys that TorchServe and the handler read, with positive whole numbers."""
    if not isinstance(settings, dict) or set(settings) != SETTINGS:
        found = sorted(settings) if isinstance(settings, dict) else type(settings).__name__
        raise ArchiveError(f"{path}: {MODEL_SETTINGS} has the keys {found}; it must have {sorted(SETTINGS)}")
    handler = settings["handler"]
    if not isinstance(handler, dict) or set(handler) != {"threads"}:
        raise ArchiveError(f"{path}: {MODEL_SETTINGS}: handler is {handler!r}; it must hold threads and nothing else")
    numbers = {key: value for key, value in settings.items() if key != "handler"} | {"threads": handler["threads"]}
    for key, value in numbers.items():
        least = 0 if key == "maxBatchDelay" else 1
        if not isinstance(value, int) or value < least:
            raise ArchiveError(f"{path}: {MODEL_SETTINGS}: {key} is {value!r}; it must be a number from {least}")
    if settings["minWorkers"] > settings["maxWorkers"]:
        raise ArchiveError(f"{path}: {MODEL_SETTINGS}: minWorkers must not be above maxWorkers")


def check_manifest(manifest: dict, path: Path) -> None:
    """The manifest names plain files of the archive."""
    model = manifest.get("model", {})
    for key in ("handler", "serializedFile", "configFile"):
        value = model.get(key)
        if not isinstance(value, str) or "/" in value or "\\" in value or ".." in value:
            raise ArchiveError(f"{path}: {MANIFEST} names {key} {value!r}; it must be a file of the archive")


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
    except (ArchiveError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
