"""The archives that a TorchServe may serve, and the record of those that were deployed."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from src.export.archive import ArchiveError, checksum_path, sha256
from src.serving.lock import run_folder


@dataclass(frozen=True)
class Store:
    """The model store of one model. ``MODEL.deployed`` in it names the deployed archives, oldest first, one a line.

    The last one is served, by ./run_torchserve.sh too; without the file MODEL.mar is, the one built from
    models/best_model. MODEL.served.mar is the copy that the script keeps of it: MODEL.mar may be built again meanwhile.
    """

    folder: Path
    model: str

    @property
    def record(self) -> Path:
        return self.folder / f"{self.model}.deployed"

    @property
    def served(self) -> Path:
        return self.folder / f"{self.model}.served.mar"

    @property
    def run(self) -> Path:
        return run_folder(self.folder)

    def archive_of(self, version: str) -> Path:
        """Where a deployed archive lies."""
        return self.folder / f"{self.model}-{version}.mar"

    def deployed(self) -> list[str]:
        """The names of the deployed archives."""
        return self.record.read_text().split() if self.record.is_file() else []

    def write(self, names: list[str]) -> None:
        """Record ``names`` as the deployed archives."""
        if not names:
            self.record.unlink(missing_ok=True)
            return
        partial = self.record.with_name(f".{self.record.name}.part")
        try:
            partial.write_text("".join(f"{name}\n" for name in names))
            partial.replace(self.record)
        finally:
            partial.unlink(missing_ok=True)

    def add(self, archive: Path, digest: str, target: Path) -> None:
        """Copy a verified archive to ``target``, its checksum beside it. Raises ArchiveError when it changed."""
        partial = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(archive, partial)
            if sha256(partial) != digest:
                raise ArchiveError(f"{archive} was changed while it was copied; deploy it again when it is whole")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        checksum_path(target).write_text(f"{digest}  {target.name}\n")

    def remove(self, archive: Path) -> None:
        """Delete an archive of the store, if it is there, and its checksum."""
        for path in (archive, checksum_path(archive)):
            path.unlink(missing_ok=True)
