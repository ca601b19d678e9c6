#!/usr/bin/env bash
# Build the three images with buildah, where there is no Docker engine and perhaps no registry.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
Usage: scripts/build_images.sh FOLDER

Builds the three images into the buildah storage under FOLDER. Needs root on Debian 12 and nothing else: buildah and
debootstrap are installed when missing, the base image is made once from the Debian mirror that apt uses, and pip in the
builds uses this machine's pip configuration and certificates, mounted read-only. To use what was built:
    CONTAINERS_STORAGE_CONF=FOLDER/storage.conf BUILDAH_ISOLATION=chroot buildah images
TEXT
}
case ${1:-} in -h | --help) usage; exit ;; esac

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

archive=torchserve/model-store/fashion_mnist.mar
base=localhost/debian-python:bookworm
store=${1:?name a folder for the images; see scripts/build_images.sh --help}
((EUID == 0)) || fail "this needs root, to make a base image and to mount folders into the builds"
[[ -f $archive ]] || fail "$archive is missing; ./run_torchserve.sh --native makes it, then ./run_torchserve.sh --stop"
mkdir -p "$store"
store=$(realpath "$store")
export BUILDAH_ISOLATION=chroot CONTAINERS_STORAGE_CONF=$store/storage.conf
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s"\nrunroot = "%s"\n' "$store/root" "$store/run" >"$CONTAINERS_STORAGE_CONF"
work=$(mktemp -d)
trap 'buildah rm base-build >/dev/null 2>&1 || true; rm -rf "$work"' EXIT

install_tools() {
    local missing=() tool
    for tool in buildah debootstrap curl; do command -v "$tool" >/dev/null || missing+=("$tool"); done
    ((${#missing[@]})) || return 0
    say "Installing ${missing[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -qq -y "${missing[@]}"; } \
        >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "apt-get could not install ${missing[*]}"; }
}

make_base() {
    if buildah inspect --type image "$base" >/dev/null 2>&1; then say "The base image is there"; return; fi
    local mirror
    # shellcheck disable=SC2016  # apt expands it
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' 'Component: main' | sed -n 1p)
    [[ -n $mirror ]] || fail "apt knows no mirror of Debian 12 (bookworm); run this on Debian 12, after apt-get update"
    say "Making the base image from $mirror"
    timeout 600 debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/root" "$mirror" \
        >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; fail "debootstrap could not make a Debian system"; }
    tar -C "$work/root" --exclude='./var/cache/apt/archives/*.deb' --exclude='./var/lib/apt/lists/*' -cf "$work/base.tar" .
    buildah from --name base-build scratch >/dev/null
    buildah add -q base-build "$work/base.tar" / >/dev/null
    buildah commit -q --rm base-build "$base" >/dev/null
    rm -rf "$work/root" "$work/base.tar"
}

# Writes a pip.conf that says what this machine's pip is told, and prints the local files and folders it names.
read_pip_configuration() {
    local python
    for python in python3 torchserve/.venv/bin/python .venv/bin/python; do
        if "$python" -m pip --version >/dev/null 2>&1; then break; fi
    done
    "$python" - "$1" <<'PY'
import os, subprocess, sys
from ast import literal_eval
from urllib.parse import unquote, urlsplit

names = "index-url extra-index-url find-links no-index cert trusted-host proxy timeout default-timeout retries".split()
listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
lines = [line.split("=", 1) for line in listed.stdout.splitlines() if "=" in line]
options = {}
for key, value in sorted(lines, key=lambda line: line[0].startswith(":env:")):  # the environment wins
    name = key.rsplit(".", 1)[1]
    if name in names:
        options[name] = literal_eval(value).split()
bundle = "/etc/ssl/certs/ca-certificates.crt"
if os.path.exists(bundle):
    options.setdefault("cert", [bundle])
with open(sys.argv[1], "w") as file:
    file.write("[global]\n" + "".join(f"{name} = " + "\n    ".join(words) + "\n" for name, words in options.items()))
paths = set()
for word in sum(options.values(), []):
    path = (unquote(urlsplit(word).path) if word.startswith("file:") else word).rstrip("/")
    if path.startswith("/") and os.path.exists(path):
        # The pages of a local index link to files beside it.
        paths.add(os.path.dirname(path) if path.endswith("/simple") else path)
print("\n".join(sorted(paths)))
PY
}

build() {  # build TAG FOLDER [OPTION...]
    local began=$SECONDS
    timeout 1800 buildah build --format docker --layers=false --force-rm "${options[@]}" "${@:3}" --tag "$1" "$2" >"$work/log" 2>&1 \
        || { tail -n 40 "$work/log" >&2; fail "the build of $1 failed"; }
    say "Built $1 in $((SECONDS - began)) s"
}

install_tools
make_base
read_pip_configuration "$work/pip.conf" >"$work/paths"
options=(--build-arg "BASE_IMAGE=$base" --volume "$work/pip.conf:/etc/pip.conf:ro")
while read -r path; do options+=(--volume "$path:$path:ro"); done <"$work/paths"
torch_index=$(sed -n 's/^ARG TORCH_INDEX=//p' Dockerfile)
if ! curl -fs --max-time 20 --output /dev/null "$torch_index/"; then
    say "$torch_index does not answer: torch comes from pip's own sources"
    options+=(--build-arg TORCH_INDEX=)
fi
build localhost/ml-app:v1 .
build localhost/mymodel-serve:v1 torchserve
build localhost/mlflow-server:v1 . --file deploy/mlflow/Dockerfile
timeout 300 buildah rmi --prune >/dev/null 2>&1 || true  # what an earlier run left without a name
