#!/usr/bin/env bash
# Build the images without a Docker engine, run them, and check what they promise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
Usage: scripts/test_containers.sh      (or: make test-containers)

Builds the images with scripts/build_images.sh, which tells what that needs, then checks ml-app:v1 on a folder of
images, and mymodel-serve:v1 on its three APIs, its health check, its user and SIGTERM. The images stay in
/var/tmp/fashion-mnist-containers, so that the next run need not make the base again; remove that folder freely.
TEXT
}
case ${1:-} in -h | --help) usage; exit ;; esac

store=/var/tmp/fashion-mnist-containers
ml_app=localhost/ml-app:v1 serve=localhost/mymodel-serve:v1
export BUILDAH_ISOLATION=chroot CONTAINERS_STORAGE_CONF=$store/storage.conf
work=$(mktemp -d)
server=

say() { printf '==> [%3d s] %s\n' "$SECONDS" "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
bld() { timeout 300 buildah "$@"; }

remove_containers() {
    for container in ml-app-test serve-test; do bld rm "$container" >/dev/null 2>&1 || true; done
}

clean() {
    # With this process its namespace's first one ends, and so do all the others in it.
    if [[ -n $server ]]; then kill -9 "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
    remove_containers
    rm -rf "$work"
}

# Prints a part of an image's configuration, one word a line: image_words IMAGE Entrypoint|Cmd|Healthcheck|User
image_words() {
    bld inspect --type image "$1" | python3 -c '
import json, sys
value = json.load(sys.stdin)["Docker"]["config"].get(sys.argv[1]) or []
value = value["Test"][1:] if isinstance(value, dict) else value
print("\n".join([value] if isinstance(value, str) else value))' "$2"
}

make_container() {  # make_container NAME IMAGE
    bld from --name "$1" "$2" >/dev/null
    local user; user=$(image_words "$2" User)
    [[ $user =~ ^[1-9][0-9]*$ ]] || fail "$2 runs as user '$user'; it must be a number above 0"
    say "$2 holds $(du -sm "$(bld mount "$1")" | cut -f1) MB"
}

check_ml_app() {
    local words runtime status=0
    make_container ml-app-test "$ml_app"
    mapfile -t words < <(image_words "$ml_app" Entrypoint)
    [[ ${words[*]} == "python src/predict.py" ]] || fail "the entry point of $ml_app is ${words[*]}"
    mkdir -p "$work/input" "$work/output"
    chmod 755 "$work" "$work/input" && chmod 777 "$work/output"
    python3 - "$work/input" <<'PY'
import base64, json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
sample = base64.b64decode(json.load(open("torchserve/sample_input.json"))["image"].split(",")[-1])
for name in ("again.jpg", "more.bmp", "sample.png"):
    (folder / name).write_bytes(sample)
(folder / "broken.png").write_text("no image")
(folder / "notes.txt").write_text("not looked at")
PY
    runtime=$(awk '/^ *runtime:/ {print $2}' torchserve/model-config.yaml)  # the server's; another differs in the digits
    bld run --volume "$work/input:/app/input:ro" --volume "$work/output:/app/output" ml-app-test -- "${words[@]}" \
        --runtime "$runtime" --input_path input --output_path output/predictions.csv >"$work/ml-app.log" 2>&1 || status=$?
    ((status == 1)) || { cat "$work/ml-app.log" >&2; fail "predict.py ended with $status; 1 says that an image was broken"; }
    [[ $(stat -c %u "$work/output/predictions.csv") != 0 ]] || fail "the CSV belongs to root"
    grep -q '^broken.png,' "$work/output/predictions.csv.errors.csv" || fail "broken.png is not in the errors' CSV"
    say "ml-app:v1 classified a folder and named its broken image"
}

wait_for() {  # wait_for SECONDS COMMAND...: until it succeeds; fails when the server ends
    local until=$((SECONDS + $1)); shift
    while ! "$@" >/dev/null 2>&1; do
        ((SECONDS < until)) && kill -0 "$server" 2>/dev/null || return 1
        sleep 0.5
    done
}
inside() { timeout 120 nsenter --target "$init" --net -- "$@"; }
healthy() { inside buildah run serve-test -- "${health[@]}"; }

# In network and process namespaces of its own: the image's own ports, whatever else runs here, and nothing survives.
start_server() {
    local words home
    make_container serve-test "$serve"
    home=$(bld mount serve-test)/home/model-server
    [[ $(stat -c %a "$home") == 1777 ]] || fail "$home has mode $(stat -c %a "$home"); a tmpfs there takes it, and needs 1777"
    mapfile -t words < <(image_words "$serve" Entrypoint; image_words "$serve" Cmd)
    mapfile -t health < <(image_words "$serve" Healthcheck)
    unshare --net --pid --fork --kill-child --mount-proc bash -c 'ip link set lo up && exec "$@"' bash \
        buildah run --hostname localhost serve-test -- "${words[@]}" >"$work/serve.log" 2>&1 &
    server=$!
    wait_for 30 pgrep -P "$server" || fail "the container did not start: $(<"$work/serve.log")"
    init=$(pgrep -P "$server")
    wait_for 300 healthy || { cat "$work/serve.log" >&2; fail "the server did not become healthy"; }
    say "The health check says: $(healthy)"
}

check_server() {
    local inference=http://127.0.0.1:8080 management=http://127.0.0.1:8081/models/fashion_mnist metrics=http://127.0.0.1:8082
    inside curl -fsS -X POST "$inference/predictions/fashion_mnist" -T torchserve/sample_input.json \
        -H "Content-Type: application/json" >"$work/answer.json"
    python3 - "$work/answer.json" "$work/output/predictions.csv" <<'PY'
import csv, json, sys
answer = json.load(open(sys.argv[1]))
rows = list(csv.DictReader(open(sys.argv[2])))
if (names := [row["filename"] for row in rows]) != ["again.jpg", "more.bmp", "sample.png"]:
    sys.exit(f"error: the CSV has rows for {names}")
for row in rows:
    worst = max(abs(float(row[f"prob_{name}"]) - value) for name, value in answer["probabilities"].items())
    if row["predicted_label"] != answer["predicted_label"] or worst > 1e-5:
        sys.exit(f"error: the CSV and the server differ by {worst}; is the archive older than models/best_model?")
print(f"The CSV and the server agree: {answer['predicted_label']}, {answer['confidence']:.3f}")
PY
    inside curl -sS "$inference/predictions/fashion_mnist" -H 'Content-Type: multipart/form-data; boundary=a' \
        --data-binary $'--a\r\n\r\n\r\n--a--\r\n' | grep broken_form >/dev/null || fail "Java takes forms apart itself"
    inside curl -fsS "$management" | grep '"status": "READY"' >/dev/null || fail "management shows no READY worker"
    counted() { inside curl -fsS "$metrics/metrics" | grep '^Predictions{'; }
    wait_for 10 counted || fail "the metrics hold no Predictions"  # workers report them a little later
    inside curl -fsS -X PUT "$management?min_worker=0&max_worker=1&synchronous=true" >/dev/null
    if healthy >/dev/null 2>&1; then fail "the health check passes with no worker"; fi
    inside curl -fsS -X PUT "$management?min_worker=1&synchronous=true" >/dev/null
    healthy >/dev/null || fail "the health check fails with a worker back"
    say "Prediction, management, metrics and health check answer as they should"
}

stop_server() {
    local name pid tini='' began=$SECONDS status=0
    for name in java python tini; do
        pid=$(pgrep --ns "$init" --nslist net --oldest --exact "$name") || fail "no process $name runs in the container"
        [[ $(stat -c %u "/proc/$pid") != 0 ]] || fail "$name runs as root"
        tini=$pid
    done
    kill -TERM "$tini"
    timeout 60 tail --pid "$server" -f /dev/null || fail "the server still runs 60 s after SIGTERM"
    wait "$server" || status=$?
    server=
    # 0 comes from the entry point, which ends only after the Java server has.
    ((status == 0)) || { tail "$work/serve.log" >&2; fail "the container ended with $status after SIGTERM"; }
    say "SIGTERM stopped the server in $((SECONDS - began)) s"
}

trap clean EXIT
mkdir -p "$store"
exec 9>"$store/lock"
flock --wait 60 9 || fail "another run holds $store/lock"
scripts/build_images.sh "$store"
remove_containers
check_ml_app
start_server
check_server
stop_server
say "Both images keep their promises"
