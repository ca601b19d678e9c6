# Sourced by run_torchserve.sh: the archives to serve, exported, built and verified.
# shellcheck shell=bash

store=torchserve/model-store
declare -A archives  # the one to serve, by the name of the model

archive_of() {  # prints the archive of model $1 that a native server serves
    if [[ -s $store/$1.deployed ]]; then
        echo "$store/$(tail -n 1 "$store/$1.deployed")"  # operate deploy writes it; its last line serves
    elif [[ $(watcher_pid) == "$PPID" ]]; then
        echo "$store/$1.served.mar"  # kept by start_native, whatever was built since
    else
        echo "$store/$1.mar"
    fi
}

build_archive() {
    local archive=${archives[$model]}
    [[ -f models/best_model/config.json ]] || fail "models/best_model is missing; restore it with \`git checkout models/best_model\` or train one"
    if [[ -f $run/exported && $(<"$run/exported") == "$(export_state)" ]]; then
        say "Export of models/best_model is up to date"
    else
        say "Exporting models/best_model"
        "$python" export_model_for_torchserve.py
        mkdir -p "$run"
        export_state >"$run/exported"
    fi
    say "Building and verifying the archive"
    PYTHON=$python ./create_mar_archive.sh "${runtime[@]}"
    # Its content was checked when it was sealed; these must still be the same bytes.
    (cd "${archive%/*}" && sha256sum --quiet --check "${archive##*/}.sha256") \
        || fail "$archive was changed after it was built; delete ${archive%/*} and run this again"
}

choose_archive() {
    local path=$store/$model.mar
    if [[ $mode == native ]]; then path=$(archive_of "$model"); fi
    archives[$model]=$path
    case $path in
        "$store/$model.mar") build_archive; return ;;
        *.served.mar) say "Verifying $path, which was served; a model trained since is not" ;;
        *)
            local otherwise="without $store/$model.deployed models/best_model is served"
            [[ -z ${runtime[*]} || $(watcher_pid) == "$PPID" ]] \
                || fail "${runtime[*]} does not change the deployed archive $path; deploy one made with" \
                    "./create_mar_archive.sh ${runtime[*]}, or remove the record: $otherwise"
            say "Verifying the deployed archive $path; $otherwise"
            ;;
    esac
    "$python" src/export/archive.py verify "$path"
}

choose_others() {  # those of --models
    local name path
    for name in "${others[@]}"; do
        [[ $mode == native ]] || fail "--models needs --native: the image holds one archive"
        path=$(archive_of "$name")
        [[ -f $path || $path != "$store/$name.mar" ]] \
            || fail "--models names $name, but $path does not exist; make it with: ./create_mar_archive.sh --experiment $name"
        say "Verifying $path"
        "$python" src/export/archive.py verify "$path"
        archives[$name]=$path
    done
}

export_state() {  # a hash of what the export reads and writes
    {
        cat models/best_model/* export_model_for_torchserve.py src/inference/archive.py torchserve/model.pt \
            torchserve/model_config.json torchserve/*.onnx 2>/dev/null || true  # there may be no ONNX file
    } | sha256sum
}
