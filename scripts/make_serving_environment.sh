#!/usr/bin/env bash
# Make torchserve/.venv, the environment of a server, as run_torchserve.sh does: make serving-env
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

source torchserve/environment.sh
make_environment
