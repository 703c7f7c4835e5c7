#!/usr/bin/env bash
# prox24 on hosts of your own. On each host, with prox24's dependencies installed, or prox24:
#
#   ./hosts.sh token                 on the first: makes ~/.ray/auth_token; copy it to the others
#   ./hosts.sh head                  on the first
#   ./hosts.sh join FIRST_ADDRESS    on every other
#   ./hosts.sh prune                 on the first; again after whatever happened
#   ./hosts.sh stop                  on each, when done
#
# EDIT: these lines.
MODEL=${MODEL:-/shared/models/Llama-3.1-8B}
OUTPUT=${OUTPUT:-/shared/pruned/Llama-3.1-8B-2-4}
OPTIONS=${OPTIONS:---dataset /shared/text/c4.jsonl --nsamples 128 --seqlen 2048}
ADDRESS=${ADDRESS:-}     # this host's address on the network between the hosts; empty: the first
PORT=${PORT:-6379}       # of the first host. Also open between the hosts: 20000 to 20999
RAY_OPTIONS=${RAY_OPTIONS:-} # more options for `ray start`: --num-gpus 4

set -euo pipefail
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
DASHBOARD_HOST=${DASHBOARD_HOST:-127.0.0.1}

start() {
    if ! ray get-auth-token >/dev/null 2>&1; then
        echo "hosts.sh: no token: run '$0 token' on the first host, and copy its" \
            "\$HOME/.ray/auth_token to this one" >&2
        exit 1
    fi
    ulimit -n "$(ulimit -Hn)"
    # shellcheck disable=SC2086
    ray start "$@" --node-ip-address "${ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}" \
        --object-store-memory 1000000000 --node-manager-port 20000 --object-manager-port 20001 \
        --runtime-env-agent-port 20002 --dashboard-agent-listen-port 20003 \
        --dashboard-agent-grpc-port 20004 --metrics-export-port 20005 \
        --min-worker-port 20100 --max-worker-port 20999 $RAY_OPTIONS
}

case ${1:-} in
token)
    ray get-auth-token --generate >/dev/null
    chmod 600 ~/.ray/auth_token
    echo "made ~/.ray/auth_token: copy it to the other hosts (scp -p)"
    ;;
head)
    start --head --port "$PORT" --dashboard-host "$DASHBOARD_HOST"
    ;;
join)
    start --address "${2:?the address of the first host}:$PORT"
    ;;
prune)
    address=${ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}
    # shellcheck disable=SC2086
    exec python -m cluster prune "$MODEL" "$OUTPUT" $OPTIONS --ray-address "$address:$PORT"
    ;;
stop)
    ray stop
    ;;
*)
    sed -n '2,9s/^#//p' "$0" >&2
    exit 2
    ;;
esac
