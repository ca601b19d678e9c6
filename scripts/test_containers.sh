#!/usr/bin/env bash
# Build both images without a Docker engine, run them, and check what they promise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
Usage: scripts/test_containers.sh      (or: make test-containers)

Needs root on Debian 12, and nothing else: buildah and debootstrap are installed when missing, a base image is made
from the Debian mirror that apt uses, and pip in the builds uses this machine's pip configuration and certificates.
Images and the base are kept in /var/tmp/fashion-mnist-containers for the next run; remove that folder freely.
TEXT
}
case ${1:-} in -h | --help) usage; exit ;; esac

store=/var/tmp/fashion-mnist-containers
base=localhost/debian-python:bookworm ml_app=localhost/ml-app:v1 serve=localhost/mymodel-serve:v1
archive=torchserve/model-store/fashion_mnist.mar
buildah=(buildah --root "$store/root" --runroot "$store/run" --storage-driver vfs)
work=$(mktemp -d)
server=

say() { printf '==> [%3d s] %s\n' "$SECONDS" "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
bld() { timeout "${limit:-120}" "${buildah[@]}" "$@"; }

clean() {
    # The server's first process is the init of its process namespace: with it end all the others.
    if [[ -n $server ]]; then kill -9 "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
    for container in ml-app-test serve-test base-build; do bld rm "$container" >/dev/null 2>&1 || true; done
    rm -rf "$work"
}

install_tools() {
    local missing=()
    for tool in buildah debootstrap curl; do command -v "$tool" >/dev/null || missing+=("$tool"); done
    command -v ip >/dev/null || missing+=(iproute2)
    ((${#missing[@]})) || return 0
    say "Installing ${missing[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -qq -y "${missing[@]}"; } \
        >"$work/apt.log" 2>&1 || { cat "$work/apt.log" >&2; fail "apt-get could not install ${missing[*]}"; }
}

make_base() {
    if bld inspect --type image "$base" >/dev/null 2>&1; then say "Base image is there"; return; fi
    local mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' 'Component: main' | sed -n 1p)
    [[ -n $mirror ]] || fail "apt knows no mirror of Debian 12 (bookworm); run this on Debian 12, after apt-get update"
    say "Making the base image from $mirror"
    timeout 600 debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/root" "$mirror" \
        >"$work/debootstrap.log" 2>&1 || { tail -n 20 "$work/debootstrap.log" >&2; fail "debootstrap failed"; }
    tar -C "$work/root" --exclude=./var/cache/apt/archives/*.deb -cf "$work/base.tar" .
    bld from --name base-build scratch >/dev/null
    bld add -q base-build "$work/base.tar" / >/dev/null
    bld commit -q --rm base-build "$base" >/dev/null
    rm -rf "$work/root" "$work/base.tar"
}

# Writes a pip.conf like this machine's into $work, and the local folders and files that it names, one a line.
read_pip_configuration() {
    local python
    for python in python3 torchserve/.venv/bin/python; do "$python" -m pip --version >/dev/null 2>&1 && break; done
    "$python" - "$work/pip.conf" >"$work/mounts" <<'PY'
import os, subprocess, sys
from ast import literal_eval
from urllib.parse import unquote, urlsplit

names = "index-url extra-index-url find-links no-index cert trusted-host proxy timeout default-timeout retries".split()
listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
options = {}
for key, value in (line.split("=", 1) for line in listed.stdout.splitlines() if "=" in line):  # the environment is last
    name = key.rsplit(".", 1)[1]
    if name in names:
        options[name] = literal_eval(value).split()
bundle = "/etc/ssl/certs/ca-certificates.crt"
if os.path.exists(bundle):
    options.setdefault("cert", [bundle])
with open(sys.argv[1], "w") as file:
    file.write("[global]\n" + "".join(f"{name} = " + "\n    ".join(words) + "\n" for name, words in options.items()))
for word in sum(options.values(), []):
    path = unquote(urlsplit(word).path) if word.startswith("file:") else word
    if path.startswith("/") and os.path.exists(path):
        # The pages of a local index link to files beside it.
        print(os.path.dirname(path.rstrip("/")) if path.rstrip("/").endswith("/simple") else path)
PY
}

build() {  # build TAG FOLDER
    local tag=$1 folder=$2 began=$SECONDS options=() path
    while read -r path; do options+=(--volume "$path:$path:ro"); done < <(sort -u "$work/mounts")
    limit=900 bld build --format docker --isolation chroot --layers=false "${index[@]}" --build-arg "BASE_IMAGE=$base" \
        --volume "$work/pip.conf:/etc/pip.conf:ro" "${options[@]}" --tag "$tag" "$folder" >"$work/build.log" 2>&1 \
        || { tail -n 40 "$work/build.log" >&2; fail "the build of $tag failed"; }
    say "Built $tag in $((SECONDS - began)) s"
}

# Prints a part of an image's configuration, one word a line: image_words IMAGE Entrypoint|Cmd|Healthcheck|User
image_words() {
    bld inspect --type image --format '{{json .Docker.config}}' "$1" | python3 -c '
import json, sys
value = json.load(sys.stdin).get(sys.argv[1]) or []
value = value["Test"][1:] if isinstance(value, dict) else value
print("\n".join([value] if isinstance(value, str) else value))' "$2"
}

start_container() {  # start_container NAME IMAGE
    bld from --name "$1" "$2" >/dev/null
    local user; user=$(image_words "$2" User)
    [[ $user =~ ^[1-9][0-9]*$ ]] || fail "$2 runs as user '$user'; it must be a number above 0"
    say "$2 holds $(du -sm "$(bld mount "$1")" | cut -f1) MB"
}

check_ml_app() {
    local run=(run --isolation chroot --volume "$work/output:/app/output") words status=0
    start_container ml-app-test "$ml_app"
    mapfile -t words < <(image_words "$ml_app" Entrypoint)
    [[ ${words[*]} == "python src/predict.py" ]] || fail "the entry point of $ml_app is ${words[*]}"
    mkdir -p "$work/input" "$work/output"
    chmod 755 "$work" "$work/input" && chmod 777 "$work/output"
    python3 - "$work/input" <<'PY'
import base64, json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
sample = base64.b64decode(json.load(open("torchserve/sample_input.json"))["image"].split(",")[-1])
for name in ("sample.png", "again.jpg", "more.bmp"):
    (folder / name).write_bytes(sample)
(folder / "broken.png").write_text("no image")
(folder / "notes.txt").write_text("not looked at")
PY
    bld "${run[@]}" --volume "$work/input:/app/input:ro" ml-app-test -- "${words[@]}" \
        --input_path input --output_path output/predictions.csv >"$work/ml-app.log" 2>&1 || status=$?
    ((status == 1)) || { cat "$work/ml-app.log" >&2; fail "predict.py ended with $status; 1 says that an image was broken"; }
    [[ $(stat -c %u "$work/output/predictions.csv") != 0 ]] || fail "the CSV belongs to root"
    [[ $(wc -l <"$work/output/predictions.csv.errors.csv") == 2 ]] || fail "the broken image is not in the errors' CSV"
}

wait_for() {  # wait_for SECONDS COMMAND...
    local until=$((SECONDS + $1)); shift
    while ! "$@" >/dev/null 2>&1; do
        ((SECONDS < until)) && kill -0 "$server" 2>/dev/null || return 1
        sleep 0.5
    done
}
inside() { timeout 60 nsenter --target "$init" --net -- "$@"; }
healthy() { inside "${buildah[@]}" run --isolation chroot serve-test -- "${health[@]}"; }

# In network and process namespaces of its own: the image's own ports, whatever else runs here, and nothing survives.
start_server() {
    local words
    start_container serve-test "$serve"
    mapfile -t words < <(image_words "$serve" Entrypoint; image_words "$serve" Cmd)
    mapfile -t health < <(image_words "$serve" Healthcheck)
    [[ ${health[0]} == CMD ]] && health=("${health[@]:1}")
    unshare --net --pid --fork --kill-child --mount-proc bash -c 'ip link set lo up && exec "$@"' bash \
        "${buildah[@]}" run --isolation chroot serve-test -- "${words[@]}" >"$work/serve.log" 2>&1 &
    server=$!
    wait_for 10 pgrep -P "$server" || fail "the container did not start: $(<"$work/serve.log")"
    init=$(pgrep -P "$server")
    wait_for 120 healthy || { cat "$work/serve.log" >&2; fail "the server did not become healthy"; }
    say "The server is healthy: $(healthy)"
}

check_server() {
    local inference=http://127.0.0.1:8080 management=http://127.0.0.1:8081/models/fashion_mnist metrics=http://127.0.0.1:8082
    inside curl -fsS -X POST "$inference/predictions/fashion_mnist" -T torchserve/sample_input.json \
        -H "Content-Type: application/json" >"$work/answer.json"
    python3 - "$work/answer.json" "$work/output/predictions.csv" <<'PY'
import csv, json, sys
answer = json.load(open(sys.argv[1]))
rows = list(csv.DictReader(open(sys.argv[2])))
assert [row["filename"] for row in rows] == ["again.jpg", "more.bmp", "sample.png"], rows
for row in rows:
    assert row["predicted_label"] == answer["predicted_label"], (row, answer)
    worst = max(abs(float(row[f"prob_{name}"]) - value) for name, value in answer["probabilities"].items())
    assert worst < 1e-5, f"the CSV and the server differ by {worst}"
print(f"The CSV and the server agree: {answer['predicted_label']}, {answer['confidence']:.3f}")
PY
    inside curl -fsS "$management" | grep -q '"status": "READY"' || fail "management shows no READY worker"
    inside curl -fsS "$metrics/metrics" | grep -q '^Predictions{' || fail "the metrics hold no Predictions"
    inside curl -fsS -X PUT "$management?min_worker=0&max_worker=1&synchronous=true" >/dev/null
    ! healthy >/dev/null || fail "the health check passes with no worker"
    inside curl -fsS "$inference/ping" >/dev/null
    inside curl -fsS -X PUT "$management?min_worker=1&synchronous=true" >/dev/null
    healthy >/dev/null || fail "the health check fails with a worker back"
    say "Prediction, management, metrics and health check answer as they should"
}

stop_server() {
    local pid began=$SECONDS status=0
    for name in tini python java; do
        pid=$(pgrep --ns "$init" --nslist net --oldest --exact "$name") || fail "no process $name runs in the container"
        [[ $(stat -c %u "/proc/$pid") != 0 ]] || fail "$name runs as root"
    done
    pid=$(pgrep --ns "$init" --nslist net --exact tini)
    kill -TERM "$pid"
    timeout 30 tail --pid "$server" -f /dev/null || fail "the server still runs 30 s after SIGTERM"
    wait "$server" || status=$?
    server=
    ((status == 0)) || fail "the container ended with $status after SIGTERM; $(tail -n 5 "$work/serve.log")"
    grep -q 'Torchserve stopped' "$work/serve.log" || fail "TorchServe was killed and did not stop by itself"
    say "SIGTERM stopped the server in $((SECONDS - began)) s"
}

((EUID == 0)) || fail "this needs root, to make a base image and to bind folders into the builds"
[[ -f $archive ]] || fail "$archive is missing; make it with ./run_torchserve.sh, or export_model_for_torchserve.py and create_mar_archive.sh"
trap clean EXIT
mkdir -p "$store"
exec 9>"$store/lock"
flock --wait 60 9 || fail "another run holds $store/lock"
install_tools
for container in ml-app-test serve-test base-build; do bld rm "$container" >/dev/null 2>&1 || true; done
make_base
read_pip_configuration
index=()
torch_index=$(sed -n 's/^ARG TORCH_INDEX=//p' Dockerfile)
if ! curl -fsS --max-time 20 --output /dev/null "$torch_index/"; then
    say "$torch_index cannot be reached from here: torch comes from pip's own sources"
    index=(--build-arg TORCH_INDEX=)
fi
build "$ml_app" .
build "$serve" torchserve
check_ml_app
start_server
check_server
stop_server
say "Both images keep their promises"
