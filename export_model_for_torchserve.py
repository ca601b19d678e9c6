"""Write a trained model as the two files an archive holds: a state_dict and its config.

python export_model_for_torchserve.py [--model-path models/best_model] [--output-path torchserve/model.pt]
"""

import argparse
import sys
from pathlib import Path

from src.inference.archive import CONFIG_NAME, save_archived_model
from src.models import ModelError, load_model


def export(model_path: str | Path, output_path: str | Path) -> tuple[Path, Path]:
    """Load ``model_path``, write the state_dict to ``output_path`` and model_config.json beside it; return both paths.

    Raises ModelError when the model cannot be loaded, or needs packages that a server does not have.
    """
    output = Path(output_path)
    if output.is_dir():
        raise IsADirectoryError(f"--output-path {output} is a folder; name a file, for example {output / 'model.pt'}")
    model, config = load_model(model_path)
    save_archived_model(output.parent, model, config, output.name)
    return output, output.parent / CONFIG_NAME


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
