#!/usr/bin/env bash
# Started by run_torchserve.sh beside a native server: when that ends without --stop, starts it again in the same way.
# Arguments: the folder that the script was called from, then the script's own arguments.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=$root/torchserve/.run
# shellcheck source=torchserve/native.sh
source "$root/torchserve/native.sh"  # running_pid
cd "$1" || exit
shift

start_again() {
    local delay
    for delay in 1 2 4 8 16 32; do
        echo "$(date '+%F %T') the server has ended by itself; starting it again"
        "$root/run_torchserve.sh" "$@" && return
        sleep "$delay"
    done
    echo "$(date '+%F %T') given up: start it with ./run_torchserve.sh when the reason above is gone"
    return 1
}

while sleep 0.5; do
    running_pid >/dev/null || start_again "$@" || exit
done
