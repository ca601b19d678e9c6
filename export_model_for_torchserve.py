"""Write a trained model as the files an archive is made of: a state_dict, its config and the ONNX files.

python export_model_for_torchserve.py [--model-path models/best_model] [--output-path torchserve/model.pt]
"""

import argparse
import shutil
import sys
from pathlib import Path

from src.inference.archive import CONFIG_NAME, save_archived_model
from src.inference.onnx_runtime import OnnxRuntime
from src.inference.runtimes import FILES
from src.models import ModelError, load_model
from src.models.storage import weights_sha256


def export(model_path: str | Path, output_path: str | Path) -> list[Path]:
    """Load ``model_path``; write the state_dict to ``output_path``, and model_config.json and the model's ONNX files
    beside it; return their paths.

    Raises ModelError when the model cannot be loaded, or an ONNX file is broken or was made of other weights, and
    ImportError when it needs packages that a server does not have. Then nothing is written.
    """
    output = Path(output_path)
    if output.is_dir():
        raise IsADirectoryError(f"--output-path {output} is a folder; name a file, for example {output / 'model.pt'}")
    model, config = load_model(model_path)
    files = [name for name in FILES.values() if name is not None]
    found = [name for name in files if (Path(model_path) / name).is_file()]
    for name in found:
        OnnxRuntime(Path(model_path) / name).check_weights(weights_sha256(model.state_dict()))
    save_archived_model(output.parent, model, config, output.name)
    for name in files:
        (output.parent / name).unlink(missing_ok=True)  # one of an older export
    for name in found:
        shutil.copyfile(Path(model_path) / name, output.parent / name)
    return [output, output.parent / CONFIG_NAME, *(output.parent / name for name in found)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model-path", default="models/best_model", help="folder with config.json and model.safetensors"
    )
    parser.add_argument("--output-path", default="torchserve/model.pt", help="where the state_dict goes")
    arguments = parser.parse_args(argv)
    try:
        paths = export(arguments.model_path, arguments.output_path)
    except (ModelError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"wrote {path} ({path.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
