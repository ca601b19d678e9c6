"""Empty MLflow stores for tests: MLflow's migrations take seconds, so they run once and the file is copied."""

import functools
import shutil
from pathlib import Path

from mlflow import MlflowClient


@functools.cache
def _template(parent: Path) -> Path:
    path = parent / "empty_mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def new_store(parent: Path, folder: Path) -> str:
    """Put an empty store into ``folder`` and return its address; the template lies in ``parent``."""
    # Never the relative default: MLflow keeps a store open by its address, and would go on in another test's folder.
    return f"sqlite:///{shutil.copy(_template(parent), folder / 'mlflow.db')}"
