"""The archives that a TorchServe may serve, and the record of those that were deployed."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from src.export.archive import checksum_path


@dataclass(frozen=True)
class Store:
    """The model store of one model. ``MODEL.deployed`` in it names the deployed archives, oldest first, one a line.

    The last one is served, by ./run_torchserve.sh too; without the file MODEL.mar is, the one built from
    models/best_model.
    """

    folder: Path
    model: str

    @property
    def record(self) -> Path:
        return self.folder / f"{self.model}.deployed"

    def deployed(self) -> list[str]:
        """The names of the deployed archives."""
        return self.record.read_text().split() if self.record.is_file() else []

    def write(self, names: list[str]) -> None:
        """Record ``names`` as the deployed archives."""
        if not names:
            self.record.unlink(missing_ok=True)
            return
        partial = self.record.with_name(f".{self.record.name}.part")
        partial.write_text("".join(f"{name}\n" for name in names))
        partial.replace(self.record)

    def add(self, archive: Path, digest: str, version: str) -> Path:
        """Copy a verified archive into the store as MODEL-VERSION.mar, its checksum beside it."""
        target = self.folder / f"{self.model}-{version}.mar"
        partial = target.with_name(f".{target.name}.part")
        shutil.copyfile(archive, partial)
        os.replace(partial, target)
        checksum_path(target).write_text(f"{digest}  {target.name}\n")
        return target
