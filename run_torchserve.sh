#!/usr/bin/env bash
# Serve the trained model with TorchServe: from a fresh clone to an answered request.
set -euo pipefail
caller=$PWD given=("$@")
cd -P "$(dirname "${BASH_SOURCE[0]}")"  # one name for a checkout that is also reached through a link
export LC_ALL=C.UTF-8  # in another locale Java opens no file whose name is not ASCII

usage() {
    cat <<'TEXT'
Usage: ./run_torchserve.sh [--native | --docker] [--runtime NAME] [--secure [--certificate CERT.pem --key KEY.pem]]
                           [--models NAME,...] [--ports INFERENCE,MANAGEMENT,METRICS] [--stop]

Makes what it needs, exports models/best_model, builds and verifies the archive, starts the server, waits until the
model is ready, sends torchserve/sample_input.json and prints the answer. Run again, it changes only what changed.
A server that ends by itself is started again.

  --native    run TorchServe on this machine (default when no Docker engine answers)
  --docker    run it in the image mymodel-serve:v1 (default when an engine answers)
  --runtime   what runs the network: onnx-int8, onnx or torch (default: the one of torchserve/model-config.yaml)
  --secure    https, and a token on every request to inference and management; docs/security.md tells more
  --certificate, --key   PEM files for --secure (default: a certificate for localhost, made here)
  --models    serve these beside the flagship; ./create_mar_archive.sh --experiment NAME makes the archive of each
  --ports     other ports than 8080,8081,8082
  --stop      stop the server that this script started: new requests get 503, those taken are answered first
TEXT
}

mode=auto runtime=() secure=no certificate='' private_key='' ports=8080,8081,8082 stop=no others=()
while (($#)); do
    case $1 in
        --native | --docker) mode=${1#--}; shift ;;
        --runtime) runtime=(--runtime "${2-}"); shift $(($# > 1 ? 2 : 1)) ;;
        --secure) secure=yes; shift ;;
        --certificate) certificate=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
        --key) private_key=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
        --models) IFS=, read -ra others <<<"${2-}"; shift $(($# > 1 ? 2 : 1)) ;;
        --ports) ports=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
        --stop) stop=yes; shift ;;
        -h | --help) usage; exit ;;
        *) echo "error: unknown argument $1; see ./run_torchserve.sh --help" >&2; exit 2 ;;
    esac
done

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

IFS=, read -r inference management metrics <<<"$ports"
for port in "$inference" "$management" "$metrics"; do
    [[ $ports =~ ^[^,]+,[^,]+,[^,]+$ && $port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535 ]] \
        || fail "--ports is '$ports'; give three numbers from 1 to 65535, for example 9080,9081,9082"
done
[[ $inference != "$management" && $inference != "$metrics" && $management != "$metrics" ]] \
    || fail "--ports is $ports; the three must be different, for example 9080,9081,9082"
[[ ${runtime[*]} =~ ^(--runtime (onnx-int8|onnx|torch))?$ ]] \
    || fail "--runtime is '${runtime[1]}'; it must be onnx-int8, onnx or torch"
if [[ -n $certificate$private_key ]]; then
    [[ $secure == yes ]] || fail "--certificate and --key belong to --secure"
    [[ $certificate == /* ]] || certificate=$caller/$certificate
    [[ $private_key == /* ]] || private_key=$caller/$private_key
    [[ -f $certificate && -f $private_key ]] \
        || fail "--certificate is $certificate and --key is $private_key; give two PEM files that exist"
fi
model=fashion_mnist
names=("$model" "${others[@]}")  # of the models that are served
run=$PWD/torchserve/.run tls=$PWD/torchserve/.run/tls
export TORCHSERVE_CERTIFICATE=$tls/certificate.pem  # what the clients below trust behind https

source torchserve/environment.sh  # makes the Python environment, chooses the Java
source torchserve/archive.sh      # exports, builds and verifies what is served
source torchserve/native.sh       # --native
source torchserve/container.sh    # --docker

one_at_a_time() {  # until this script ends; what it starts must not hold the lock, hence 8>&- there
    (umask 077; mkdir -p "$run")
    exec 8>"$run/lock"
    flock --nonblock 8 && return
    local other="another ./run_torchserve.sh, operate deploy, rollback, scale or drain"
    say "Waiting for $other"
    flock --timeout 900 8 || fail "$other of this checkout has been at work for 15 minutes; end it first"
}

is_running() {  # sets pid in native mode
    pid=
    if [[ $mode == native ]]; then pid=$(running_pid); else [[ $(docker inspect -f '{{.State.Running}}' "$container" 2>/dev/null) == true ]]; fi
}

stop_server() {
    local pid
    if [[ $(watcher_pid) != "$PPID" ]]; then  # the watcher starts the server by this script, too
        if pid=$(watcher_pid); then kill -- "-$pid" 2>/dev/null || true; fi
        rm -f "$run/watcher"
    fi
    if pid=$(running_pid); then
        drain || say "Not every request could be answered first"
        say "Stopping TorchServe (process $pid)"
        kill "$pid" 2>/dev/null || true  # it may have ended by itself meanwhile
        for _ in $(seq 100); do running_pid >/dev/null || break; sleep 0.2; done
        if running_pid >/dev/null; then say "It did not end in 20 s; ending it"; kill -9 "$pid" 2>/dev/null || true; fi
    fi
    if [[ -f $run/running && $(<"$run/running") == docker* ]]; then
        say "Removing container $container"
        docker stop --time 70 "$container" >/dev/null 2>&1 || true  # its entry point drains
        docker rm -f "$container" >/dev/null
    fi
    rm -rf "$run/running" "$run/models" "$run"/{io,org} "$run/key_file.json" "$(readlink -f "$run/tmp")" "$run/tmp"
}

address() {  # of an API of the native server that runs
    sed -n "s#^$1_address=##p" "$run/config.properties" | sed 's#//0\.0\.0\.0:#//127.0.0.1:#'
}

drain() {  # TorchServe itself closes every connection at once
    local token='' name each status=0 names=("$model") drains=()
    if [[ -s $run/key_file.json ]]; then token=$(key management) || return; fi
    if [[ -s $run/models ]]; then mapfile -t names <"$run/models"; fi
    for name in "${names[@]}"; do  # all in the same 60 s
        TORCHSERVE_MANAGEMENT_TOKEN=$token timeout 90 "$python" -m src.serving.operate drain --lock-held --model "$name" \
            --management "$(address management)" --metrics "$(address metrics)" --timeout 60 8>&- &
        drains+=("$!")
    done
    for each in "${drains[@]}"; do wait "$each" || status=1; done
    return "$status"
}

serves_archives() {  # whether the server that runs answers with those chosen; operate deploy may have changed them
    local name file found token=
    if [[ -s $run/key_file.json ]]; then token=$(key management) || return; fi
    for name in "${names[@]}"; do
        file=${archives[$name]##*/}
        found=$(TORCHSERVE_MANAGEMENT_TOKEN=$token "$python" -m src.serving.operate status --model "$name" \
            --management "$(<"$run/management_url")" 2>/dev/null || true)
        # After a crash or a rollback the same bytes are served from the copy that was kept.
        grep -qF -e "(default)  $file " -e "(default)  ${file/#"$name.mar"/"$name.served.mar"} " <<<"$found" || return
    done
}

check_modes() {  # whoever may write here decides what is served
    (umask 077; mkdir -p "$tls")
    chmod 700 "$run" "$tls"
    local found
    found=$(
        find -L . ./*.sh ./*.py -maxdepth 0 ! -type l -perm -o=w \
            && find -L src torchserve models \( -path torchserve/.venv -o -path torchserve/.run \) -prune \
                -o ! -type l -perm -o=w -print -quit \
            && if [[ -d $venv ]]; then find -H "$venv" ! -type l -perm -o=w -print -quit; fi
    )
    if [[ -z $found ]]; then return; fi
    found=${found%%$'\n'*}
    local remedy="anyone can write to $found; run: chmod -R o-w ${found@Q}"
    if [[ $secure == yes ]]; then fail "$remedy"; fi
    echo "warning: $remedy" >&2  # an error would stop those whose file system knows no modes
}

prepare_settings() {  # checks and writes next.properties; sets the host for URLs
    local inside="$ports" options=(--output "$run/next.properties")
    if [[ $mode == docker ]]; then inside=8080,8081,8082 options+=(--container); fi
    if [[ -n $certificate ]]; then
        options+=(--certificate "$certificate" --key "$private_key")
    elif [[ $secure == yes ]]; then
        "$python" -m src.serving.certificate "$tls" || exit
        options+=(--keystore "$tls/made.p12" --password "$tls/made.password")
    fi
    host=$("$python" -m src.serving.settings --ports "$inside" "${options[@]}")
}

url() {  # of the API $1, for this machine; $2 is its port
    if [[ $mode == docker ]]; then echo "$scheme://127.0.0.1:$2"; else address "$1"; fi
}

fetch_keys() {  # waits until TorchServe has written them
    for _ in $(seq 150); do
        if [[ $mode == docker ]]; then
            (umask 077; docker exec "$container" cat key_file.json >"$run/key_file.json" 2>/dev/null) || true
        fi
        if [[ -s $run/key_file.json ]]; then return; fi
        sleep 0.2
    done
    fail "TorchServe wrote no $run/key_file.json; see $run/logs"
}

key() {  # prints the key for inference or management, a new one if it has expired
    local header
    header=$("$python" -m src.serving.tokens "$1") || return
    echo "${header##* }"
}

one_at_a_time
if [[ $stop == yes ]]; then
    stop_server
    say "Stopped"
    exit
fi
if [[ $mode == auto ]]; then
    # The image holds one model; more of them are for a native server.
    if ((${#others[@]} == 0)) && engine_answers; then mode=docker; else mode=native; fi
elif [[ $mode == docker ]]; then
    engine_answers || fail "--docker: no Docker engine answers; start it, or use --native"
fi
check_modes
if [[ $(watcher_pid) != "$PPID" ]]; then  # the watcher starts with what is there
    if ! environment_is_made && running_pid >/dev/null; then
        say "The server that runs needs another environment, so it stops before that is made"
        stop_server
    fi
    make_environment
fi
if [[ $mode == native || $secure == yes ]]; then choose_java; fi
prepare_settings
if [[ $mode == native ]]; then
    if ! running_pid >/dev/null; then check_ports; fi
fi
choose_archive
choose_others
made_of=("$venv/.requirements")  # not requirements.txt, which may be newer than the environment
if [[ $mode == docker ]]; then made_of=(torchserve/{requirements.txt,Dockerfile,entrypoint.py,healthcheck.py}); fi
settings=$(cat "$run/next.properties" ${certificate:+"$certificate" "$private_key"} "${made_of[@]}" \
    torchserve/metrics.yaml torchserve/log4j2.xml torchserve/java/*.java | sha256sum)
state="$mode $secure $ports ${names[*]} $settings"
as_started() {
    local name path
    [[ -f $run/running && $(head -n 1 "$run/running") == "$state" ]] || return
    for name in "${names[@]}"; do
        path=${archives[$name]}
        # A deployed archive was registered later.
        [[ $path != "$store/$name.mar" ]] || grep -qxF "$(<"$path.sha256")" "$run/running" || return
    done
}
if as_started && is_running && serves_archives; then
    say "TorchServe is running with this archive${pid:+ (process $pid)}"
else
    if running_pid >/dev/null; then say "The server that runs is another one than asked for"; fi
    stop_server
    {
        echo "$state"
        for name in "${names[@]}"; do cat "${archives[$name]}.sha256"; done
    } >"$run/running"
    if [[ $secure == yes ]]; then (umask 077; cp "${certificate:-$tls/made.pem}" "$tls/certificate.pem"); fi
    "start_$mode"
fi

rm -f "$run/next.properties"
scheme=http
if [[ $secure == yes ]]; then scheme=https; fi
inference_url=$(url inference "$inference") management_url=$(url management "$management")
echo "$management_url" >"$run/management_url"

say "Waiting until the model is ready"
watch=()
if [[ $mode == native ]]; then
    pid=$(<"$pid_file")
    watch=(--process "$pid")
fi
if [[ $secure == yes ]]; then
    fetch_keys
    TORCHSERVE_MANAGEMENT_TOKEN=$(key management) TORCHSERVE_INFERENCE_TOKEN=$(key inference)
    export TORCHSERVE_MANAGEMENT_TOKEN TORCHSERVE_INFERENCE_TOKEN
fi
for name in "${names[@]}"; do
    "$python" -m src.serving.operate ready --management "$management_url" --model "$name" --timeout 120 \
        "${watch[@]}" || {
        tail -n 40 "$run/logs"/*.log >&2 2>/dev/null || docker logs --tail 40 "$container" >&2 2>/dev/null || true
        stop_server
        fail "the model $name did not become ready; the log above is from $run/logs"
    }
done
say "Sending torchserve/sample_input.json"
"$python" -m src.serving.operate send torchserve/sample_input.json --inference "$inference_url" --model "$model"
if [[ $mode == native ]]; then watch_server; fi
curl=curl
if [[ $secure == yes ]]; then
    curl="curl --cacert torchserve/.run/tls/certificate.pem -H @<($python -m src.serving.tokens inference)"
    if [[ $host != 127.0.0.1 && $host != localhost ]]; then curl+=" --resolve $host:$inference:127.0.0.1"; fi
fi
cat <<TEXT

Inference   $scheme://$host:$inference/predictions/$model${others[0]:+, and beside it ${others[*]}}
Management  $scheme://$host:$management/models
Metrics     $scheme://$host:$metrics/metrics
Try it:     $curl -X POST $scheme://$host:$inference/predictions/$model -F "data=@torchserve/golden/bag_1.png"
Stop it:    ./run_torchserve.sh --stop
TEXT
if [[ $secure == yes ]]; then
    echo "Tokens:     $run/key_file.json, for an hour; $python -m src.serving.tokens prints one and renews it"
fi
