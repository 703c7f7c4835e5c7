#!/usr/bin/env bash
# prox24 on SLURM: sbatch slurm.sh. Ray runs on all nodes of the allocation for as long as the job;
# submit the same file again, and the job goes on at the last committed block.
#
# EDIT: these lines, and the five below.
#SBATCH --job-name=prox24
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
# One Ray per node, on whole nodes: `ray stop` at the end ends all Ray processes of yours there.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
# A node that fails puts the job back into the queue; near the time limit prox24 is told to stop.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120

MODEL=${MODEL:-/shared/models/Llama-3.1-70B}
OUTPUT=${OUTPUT:-/shared/pruned/Llama-3.1-70B-2-4}
OPTIONS=${OPTIONS:---dataset /shared/text/c4.jsonl --nsamples 128 --seqlen 2048}
ENVIRONMENT=${ENVIRONMENT:-/shared/venvs/prox24} # a virtual environment that all nodes see
INTERFACE=${INTERFACE:-}                         # the fast network, as in `ip address`: ib0

set -euo pipefail
# shellcheck disable=SC1091
source "$ENVIRONMENT/bin/activate"

# The first node's address that the others reach. Not its name: that may resolve to 127.0.0.1.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
if [ -n "$INTERFACE" ]; then
    # shellcheck disable=SC2016
    address=$(srun --nodes=1 --ntasks=1 --nodelist="$first" \
        sh -c 'ip -4 -o address show dev "$0" | head -n 1' "$INTERFACE" |
        sed 's/.*inet \([0-9.]*\).*/\1/')
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
else
    address=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname -I | cut -d ' ' -f 1)
fi
if [ -z "$address" ]; then
    echo "slurm.sh: $first tells no address; set INTERFACE to one of its networks" >&2
    exit 1
fi
# Another port for another job: two may have had the same node one after the other.
port=$((20000 + SLURM_JOB_ID % 10000))

# A token of this job alone, which srun hands to every node.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
# /tmp/ray may be another user's. Sockets are made here: keep it short.
export RAY_TMPDIR=/tmp/prox24-$USER
# So that the step which waits for the nodes asks this cluster and no other.
export RAY_ADDRESS=$address:$port
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
ulimit -n "$(ulimit -Hn)"

status=0
# shellcheck disable=SC2086,SC2016
srun --export=ALL sh -c 'mkdir -p "$RAY_TMPDIR" && exec "$@"' sh \
    ray symmetric-run --address "$address:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --dashboard-host 127.0.0.1 --object-store-memory 1000000000 -- \
    python -m cluster prune "$MODEL" "$OUTPUT" $OPTIONS --ray-address "$address:$port" || status=$?

# symmetric-run ends with 0 where Ray itself did not start: only the output tells (not looked for
# in an object store).
if [ "$status" -eq 0 ] && [[ $OUTPUT != *://* ]] && [ ! -e "$OUTPUT/prox24.json" ]; then
    echo "slurm.sh: $OUTPUT is not there: Ray did not start; see above" >&2
    status=1
fi
exit "$status"
