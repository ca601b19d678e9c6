# Sourced by run_torchserve.sh: the archive to serve, exported, built and verified.
# shellcheck shell=bash

archive=torchserve/model-store/$model.mar
deployed=torchserve/model-store/$model.deployed  # written by operate deploy; its last line names the archive to serve

build_archive() {
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
    if [[ $mode == native && -s $deployed ]]; then
        archive=torchserve/model-store/$(tail -n 1 "$deployed")
        say "Verifying the deployed archive $archive; without $deployed models/best_model is served"
    elif [[ $mode == native && $(watcher_pid) == "$PPID" ]]; then
        say "Verifying $archive, which was served; a model trained since is not"
    else
        build_archive
        return
    fi
    "$python" src/export/archive.py verify "$archive"
}

verify_others() {  # those of --models; sets their checksums' files
    checksums=()
    local name path
    for name in "${others[@]}"; do
        path=torchserve/model-store/$name.mar
        [[ $mode == native ]] || fail "--models needs --native: the image holds one archive"
        [[ -f $path ]] || fail "--models names $name, but $path does not exist; make it with: ./create_mar_archive.sh --experiment $name"
        say "Verifying $path"
        "$python" src/export/archive.py verify "$path"
        checksums+=("$path.sha256")
    done
}

export_state() {  # a hash of what the export reads and writes
    {
        cat models/best_model/* export_model_for_torchserve.py src/inference/archive.py torchserve/model.pt \
            torchserve/model_config.json torchserve/*.onnx 2>/dev/null || true  # there may be no ONNX file
    } | sha256sum
}
