"""What an archive holds for its runtime: ``python -m src.export.staging --trained MODEL --runtime NAME FOLDER``.

Called by ./create_mar_archive.sh. Refuses an export of another model than the folder MODEL holds, if it holds one.
Writes FOLDER/model-config.yaml, which names the runtime, and copies the ONNX file that it reads to FOLDER/extra.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import yaml

from src.export.archive import MODEL_SETTINGS, check_settings
from src.inference.archive import CONFIG_NAME, STATE_NAME, load_state
from src.inference.runtimes import FILES, runtime_file
from src.models.config import CONFIG_NAME as TRAINED_CONFIG
from src.models.config import WEIGHTS_NAME, ModelConfig, ModelError, saved_weights_sha256
from src.models.registry import NEED_TIMM
from src.models.storage import weights_sha256

SERVER = Path("torchserve")  # the settings; and where export_model_for_torchserve.py writes when not told


def check_export(source: Path, trained: Path) -> None:
    """What was exported to ``source`` is what ``trained`` holds, weights and config, if it holds a model.

    Raises ModelError.
    """
    if not (trained / WEIGHTS_NAME).is_file():
        return
    same_weights = saved_weights_sha256(trained) == weights_sha256(load_state(source / STATE_NAME))
    if not same_weights or ModelConfig.load(trained / TRAINED_CONFIG) != ModelConfig.load(source / CONFIG_NAME):
        raise ModelError(
            f"{source / STATE_NAME} is not the model that {trained} holds now; "
            f"export that: python export_model_for_torchserve.py --model-path {trained}"
        )


def remedy(source: Path) -> str:
    """What makes the ONNX files of the model that was exported to ``source``, and what does without the missing one."""
    card = ModelConfig.load(source / CONFIG_NAME)
    remake = f"python -m src.export.onnx --config configs/config.yaml experiment={card.name}"
    if source == SERVER:
        remake = "python -m src.export.onnx && python export_model_for_torchserve.py"
    others = ["onnx"] if (source / FILES["onnx"]).is_file() else []
    if card.architecture not in NEED_TIMM:
        others.append("torch")
    return f"make it with: {remake}" + (f"; or give --runtime {' or '.join(others)}" if others else "")


def stage(folder: Path, runtime: str | None, source: Path = SERVER) -> str:
    """Do what the module says for the model exported to ``source``; return the runtime's name.

    ``runtime`` None takes the one that torchserve/model-config.yaml names.
    Raises ValueError for an unknown runtime, ModelError for an ONNX file that is missing, broken or of other weights.
    """
    settings = (SERVER / MODEL_SETTINGS).read_text()
    content = yaml.safe_load(settings)
    check_settings(content, set(FILES.values()), SERVER)
    runtime = runtime or content["handler"]["runtime"]
    name = runtime_file(runtime)
    if name is None:
        architecture = ModelConfig.load(source / CONFIG_NAME).architecture
        if architecture in NEED_TIMM:
            raise ModelError(f"{architecture} needs timm, which a server has not: give --runtime onnx-int8 or onnx")
    else:
        from src.inference.onnx_runtime import OnnxRuntime

        if not (source / name).is_file():
            raise ModelError(f"{source / name} does not exist, which the runtime {runtime} reads; {remedy(source)}")
        OnnxRuntime(source / name).check_weights(weights_sha256(load_state(source / STATE_NAME)))
        shutil.copyfile(source / name, folder / "extra" / name)
    (folder / MODEL_SETTINGS).write_text(
        re.sub(r"^(  runtime: )[\w-]+", rf"\g<1>{runtime}", settings, flags=re.MULTILINE)
    )
    return runtime


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=SERVER, help="where the model was exported to: %(default)s")
    parser.add_argument("--trained", type=Path, required=True, help="the model's folder in models")
    parser.add_argument("--runtime")
    arguments = parser.parse_args(argv)
    try:
        check_export(arguments.source, arguments.trained)
        print(f"runtime {stage(arguments.folder, arguments.runtime, arguments.source)}")
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
