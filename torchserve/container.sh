# Sourced by run_torchserve.sh: the server in a Docker container.
# shellcheck shell=bash

image=mymodel-serve:v1 container=torchserve-fashion-mnist

engine_answers() { command -v docker >/dev/null && timeout 10 docker info >/dev/null 2>&1; }

start_docker() {
    say "Building the image $image"
    docker build --quiet --tag "$image" torchserve
    say "Starting the container $container"
    mv "$run/next.properties" "$run/config.properties"
    local arguments=() secrets=()
    if [[ $secure == yes ]]; then
        arguments=(--models "$model=$model.mar")  # the image's own add --disable-token-auth
        secrets=(--env TORCHSERVE_CERTIFICATE=/opt/model-server/tls/certificate.pem
            --volume "$run/config.properties:/opt/model-server/config.properties:ro" --volume "$tls:/opt/model-server/tls:ro")
        if [[ -n $certificate ]]; then install -m 600 "$certificate" "$private_key" "$tls"; fi
        # The container must be able to read what only the owner may.
        if [[ $(id -u) == 0 ]]; then
            chown -R 10001 "$tls" "$run/config.properties"
        else
            secrets+=(--user "$(id -u):$(id -g)")
        fi
    fi
    docker run --detach --restart unless-stopped --name "$container" --env DRAIN_SECONDS=60 --stop-timeout 70 \
        --read-only --tmpfs /tmp:exec --tmpfs /home/model-server \
        --publish "127.0.0.1:$inference:8080" --publish "127.0.0.1:$management:8081" \
        --publish "127.0.0.1:$metrics:8082" "${secrets[@]}" "$image" "${arguments[@]}" >/dev/null
}
