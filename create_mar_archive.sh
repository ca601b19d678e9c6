#!/usr/bin/env bash
# Pack the exported model, its config, the handler and the rooms it imports into a TorchServe archive.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
Usage: ./create_mar_archive.sh [--experiment NAME] [--version 1.0] [--runtime onnx-int8|onnx|torch]
                               [--output torchserve/model-store]

Packs torchserve/model.pt and torchserve/model_config.json (python export_model_for_torchserve.py makes them) into
OUTPUT/<model name>.mar and writes its SHA-256 beside it. What is not the model that models/best_model holds now is
refused. With --experiment it exports models/NAME/best_model itself and leaves what lies in torchserve/ alone;
./run_torchserve.sh --models NAME serves it beside the flagship. The same inputs give the same bytes. The runtime is the
one of torchserve/model-config.yaml when none is given; the archive holds the state_dict in every case. PYTHON names the
interpreter; it needs torchserve/requirements.txt.
TEXT
}

experiment='' version=1.0 runtime=() output=torchserve/model-store
while (($#)); do
    case $1 in
        --experiment) experiment=${2:?--experiment needs a name, for example clothing}; shift 2 ;;
        --version) version=${2:?--version needs a value, for example 2.0}; shift 2 ;;
        --runtime) runtime=(--runtime "${2:?--runtime needs a name: onnx-int8, onnx or torch}"); shift 2 ;;
        --output) output=${2:?--output needs a folder}; shift 2 ;;
        -h | --help) usage; exit ;;
        *) echo "error: unknown argument $1; see ./create_mar_archive.sh --help" >&2; exit 2 ;;
    esac
done

fail() { echo "error: $*" >&2; exit 1; }
exec 7<create_mar_archive.sh
flock 7  # two at once would write the same archive, and the checksum of one beside the other
# An experiment's network may come from timm, which only the training environment has.
candidates=(python torchserve/.venv/bin/python .venv/bin/python)
if [[ -n $experiment ]]; then candidates=(.venv/bin/python python torchserve/.venv/bin/python); fi
for candidate in "${PYTHON:-}" "${candidates[@]}"; do
    if [[ -n $candidate ]] && ORT_DISABLE_TELEMETRY=1 "$candidate" -c 'import model_archiver, onnxruntime, yaml' 2>/dev/null; then python=$candidate; break; fi
done
[[ -n ${python:-} ]] || fail "no Python with torch-model-archiver and onnxruntime; run ./run_torchserve.sh, which makes one, or set PYTHON"

folder_of() { if [[ $1 == fashion_mnist ]]; then echo models/best_model; else echo "models/$1/best_model"; fi; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
source=torchserve
if [[ -n $experiment ]]; then
    model_path=$(folder_of "$experiment") source=$work/exported
    [[ -f $model_path/config.json ]] || fail "$model_path is missing; train it with: python src/training/train.py --config configs/config.yaml experiment=$experiment"
    "$python" export_model_for_torchserve.py --model-path "$model_path" --output-path "$source/model.pt"
fi
for file in "$source"/model.pt "$source"/model_config.json; do
    [[ -f $file ]] || fail "$file does not exist; make it with: python export_model_for_torchserve.py"
done
name=$("$python" -c '
import sys
from pathlib import Path
from src.models.config import ModelConfig, ModelError
try:
    print(ModelConfig.load(Path(sys.argv[1])).name)
except ModelError as error:
    sys.exit(f"error: {error}")' "$source/model_config.json")

# The archiver unpacks the contents of a folder given as an extra file, and deletes $TMPDIR/<model name>.
mkdir -p "$work/tmp" "$work/out" "$work/extra/src" "$output"
cp src/__init__.py src/preprocessing.py src/image_limits.py src/plain_png.py src/styles.py "$work/extra/src/"
cp -r src/models src/inference "$work/extra/src/"
mkdir "$work/extra/src/serving"  # what the container's entry point and health check need
cp src/serving/{__init__,client,draining,management,scaling,tls,tokens}.py "$work/extra/src/serving/"
find "$work/extra" -name __pycache__ -prune -exec rm -rf {} +
cp "$source/model_config.json" torchserve/sitecustomize.py "$work/extra/"
env -u PYTHONPATH "$python" -m src.export.staging "$work" --source "$source" --trained "$(folder_of "$name")" \
    "${runtime[@]}"
if [[ -z $experiment && -f dvc.lock ]]; then
    # What the model was made from; the stages after it would put this archive's own hash into itself.
    "$python" - "$work/extra/dvc.lock" <<'PY'
import sys, yaml
lock = yaml.safe_load(open("dvc.lock")) or {}
stages = lock.get("stages") or {}
lock["stages"] = {name: stage for name, stage in stages.items() if name not in ("export", "archive")}
yaml.safe_dump(lock, open(sys.argv[1], "w"), sort_keys=False)
PY
fi

env -u PYTHONPATH TMPDIR="$work/tmp" "$python" -c \
    'from model_archiver.model_packaging import generate_model_archive; generate_model_archive()' \
    --model-name "$name" --version "$version" --serialized-file "$source/model.pt" --handler torchserve/handler.py \
    --config-file "$work/model-config.yaml" --extra-files "$work/extra" --export-path "$work/out"
"$python" src/export/archive.py seal "$work/out/$name.mar" "$output/$name.mar"
