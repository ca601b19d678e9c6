# Sourced by run_torchserve.sh: the server as processes of this machine.
# shellcheck shell=bash

pid_file=$run/tmp/.model_server.pid

running_pid() {  # prints the PID of the server that this script started, if it is alive
    [[ -f $pid_file ]] || return 1
    local pid; pid=$(<"$pid_file")
    # The config's path tells it from another checkout's server that got the number of one of ours.
    [[ -r /proc/$pid/cmdline ]] && grep -qzxF "$run/config.properties" "/proc/$pid/cmdline" && echo "$pid"
}

check_ports() {
    "$python" -m src.serving.ports "$inference" "$management" "$metrics" \
        || fail "stop the program on that port, or choose others: --ports 9080,9081,9082"
}

start_native() {
    check_ports
    say "Starting TorchServe"
    mkdir -p "$run/logs" "$run/logs.before"
    rm -f "$run/logs.before"/*
    find "$run/logs" -type f -exec mv -t "$run/logs.before" {} +  # why the last server ended may stand in them
    # A worker's socket lies in the temporary folder, and a socket's path must stay below 108 bytes.
    if (($(LC_ALL=C; echo "${#run}") < 80)); then mkdir -p "$run/tmp"; else ln -s "$(mktemp -d)" "$run/tmp"; fi
    local tmp; tmp=$(readlink -f "$run/tmp")
    mv "$run/next.properties" "$run/config.properties"
    local root=$PWD options=(--disable-token-auth) models=() name path
    if [[ $secure == yes ]]; then options=(); fi
    for name in "${names[@]}"; do
        path=${archives[$name]}
        models+=("$name=${path##*/}")
        if [[ $path == "$store/$name.mar" ]]; then  # the next build replaces it; the watcher and rollback want this one
            cp "$path" "$store/$name.served.mar"
            cp "$path.sha256" "$store/$name.served.mar.sha256"
        fi
    done
    printf '%s\n' "${names[@]}" >"$run/models"
    # In a folder of its own, because TorchServe reads and writes files in the current one.
    (
        cd "$run"
        ln -sfn "$root"/torchserve/java/{io,org} .  # before TorchServe's own classes; see the sources there
        umask 077  # the keys of --secure are written here
        env -u PYTHONPATH -u TS_CONFIG_FILE TMPDIR="$tmp" TEMP="$tmp" LOG_LOCATION="$run/logs" METRICS_LOCATION="$run/logs" \
            setsid "$root/$python" -c 'from ts.model_server import start; start()' --start --ncs "${options[@]}" \
            --ts-config "$run/config.properties" --log-config "$root/torchserve/log4j2.xml" \
            --model-store "$root/torchserve/model-store" --models "${models[@]}" \
            >"$run/logs/console.log" 2>&1 </dev/null 8>&-
    ) || { cat "$run/logs/console.log" >&2; fail "TorchServe did not start; its message is above"; }
}

watcher_pid() {  # prints the PID of torchserve/watch.sh, if it is alive
    [[ -f $run/watcher ]] || return 1
    local pid; pid=$(<"$run/watcher")
    grep -qzxF "$PWD/torchserve/watch.sh" "/proc/$pid/cmdline" 2>/dev/null && echo "$pid"
}

watch_server() {
    if watcher_pid >/dev/null; then return; fi
    setsid "$PWD/torchserve/watch.sh" "$caller" --native "${given[@]}" >"$run/restarts.log" 2>&1 </dev/null 8>&- &
    echo "$!" >"$run/watcher"
}
