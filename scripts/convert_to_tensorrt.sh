#!/usr/bin/env bash
# Build a TensorRT engine of an exported model, by trtexec or else by the Python package tensorrt.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/convert_to_tensorrt.sh IN OUT BATCH fp32|fp16|int8 [--unverified] [key=value ...]

IN is an ONNX file in its model's folder, such as models/best_model/model.onnx (python -m src.export.onnx makes it);
OUT, the engine, is written whole or not at all, for batches of 1 to BATCH images. int8 is calibrated on training images.
key=value overrides the config, for example experiment=fashion_mnist, whose data calibrate and check the engine.
The Python package tensorrt compares the engine with PyTorch; without it, --unverified keeps what trtexec built.
Needs an NVIDIA GPU. trtexec is looked for on PATH, in $TENSORRT_HOME/bin and where NVIDIA's packages put it; PYTHON
names the interpreter, which needs requirements.txt.
TEXT
}

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
wrong() { printf 'error: %s\n\n' "$*" >&2; usage >&2; exit 2; }

case ${1:-} in -h | --help) usage; exit ;; esac
(($# >= 4)) || wrong "$# arguments given, 4 needed"
[[ $3 =~ ^[1-9][0-9]*$ ]] || wrong "BATCH is $3; it must be a whole number from 1"
[[ $4 =~ ^(fp32|fp16|int8)$ ]] || wrong "the precision is $4; it must be fp32, fp16 or int8"
unverified=() overrides=()
for word in "${@:5}"; do
    case $word in
        --unverified) unverified=("$word") ;;
        *=*) overrides+=("$word") ;;
        *) wrong "$word is no override; write key=value" ;;
    esac
done
[[ -f $1 ]] || fail "$1 does not exist; make it with: python -m src.export.onnx"
source=$(realpath -- "$1") target=$(realpath -m -- "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

has() { "$1" -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' "${@:2}" 2>/dev/null; }
for candidate in "${PYTHON:-}" .venv/bin/python python; do
    if [[ -n $candidate ]] && has "$candidate" hydra onnx onnxruntime torch; then python=$candidate; break; fi
done
[[ -n ${python:-} ]] || fail "no Python with requirements.txt; run make env, or set PYTHON"

tool=()
for candidate in "$(command -v trtexec || true)" "${TENSORRT_HOME:+$TENSORRT_HOME/bin/trtexec}" \
    /usr/src/tensorrt/bin/trtexec /opt/tensorrt/bin/trtexec /usr/local/tensorrt/bin/trtexec; do
    if [[ -n $candidate && -x $candidate ]]; then tool=(--trtexec "$candidate"); break; fi
done
if ((${#tool[@]})); then
    say "Building with ${tool[1]}"
elif has "$python" tensorrt; then
    say "No trtexec; building with the Python package tensorrt"
else
    fail "neither trtexec nor the Python package tensorrt is here; install NVIDIA TensorRT 10, put trtexec on PATH or set TENSORRT_HOME, or: pip install 'tensorrt-cu12==10.*'"
fi

say "$source -> $target: batches of 1 to $3, $4"
"$python" -m src.export.tensorrt build "${tool[@]}" "${unverified[@]}" "$source" "$target" "$3" "$4" "${overrides[@]}"
say "$target has $(stat -c %s "$target") bytes"
