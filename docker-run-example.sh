#!/usr/bin/env bash
# Classify the images of a folder in the container ml-app:v1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
Usage: ./docker-run-example.sh [ARGUMENTS of src/predict.py]

Builds the image ml-app:v1 when it is missing, classifies the images in ./input and writes ./output/predictions.csv.
Further arguments go to src/predict.py, for example --batch_size 64.
TEXT
}

case ${1:-} in -h | --help) usage; exit ;; esac
fail() { echo "error: $*" >&2; exit 1; }

command -v docker >/dev/null || fail "docker is not installed; without it: python src/predict.py --input_path input --output_path output/predictions.csv"
timeout 20 docker info >/dev/null 2>&1 || fail "no Docker engine answers; start it (systemctl start docker), or without it: python src/predict.py --input_path input --output_path output/predictions.csv"
[[ -d input ]] || fail "there is no folder ./input; make it and put images into it"
docker image inspect ml-app:v1 >/dev/null 2>&1 || docker build -t ml-app:v1 .

mkdir -p output
# As the caller, so that the CSV is the caller's file; with an init, so that Ctrl-C and docker stop end it at once.
docker run --rm --init --user "$(id -u):$(id -g)" --network none \
    -v "$PWD/input:/app/input:ro" -v "$PWD/output:/app/output" \
    ml-app:v1 --input_path input --output_path output/predictions.csv "$@"
