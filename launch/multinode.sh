#!/usr/bin/env bash
# Score or train on several hosts that ssh reaches, all with this folder and this environment at the same place:
#
#   launch/multinode.sh "node1 node2" train --preset llama-3.2-1b --set output_dir=/shared/runs/two
#
# ACCELERATE_CONFIG     engine (default: accelerate_configs/multinode_ddp.yaml)
# PROCESSES_PER_NODE    default: the GPUs of this host, or 1
# MASTER_ADDR           name or address under which the hosts reach the first (default: its name in the list)
# MASTER_PORT           a port that is free there (default: 29500)
# FORWARD               names of further variables to set on the hosts, such as "NCCL_SOCKET_IFNAME HF_HOME"
# REMOTE                what runs a command on a host: `$REMOTE HOST bash -c COMMAND` (default: ssh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 2 ]; then
    sed -n '2,4p' "$0" | cut -c3-
    exit 2
fi
read -ra hosts <<<"$1"
script=$2
shift 2

config=${ACCELERATE_CONFIG:-accelerate_configs/multinode_ddp.yaml}
per_node=${PROCESSES_PER_NODE:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
forwarded=
for name in PATH HF_HUB_OFFLINE OMP_NUM_THREADS ${FORWARD:-}; do
    if [ -n "${!name:-}" ]; then forwarded+=$(printf '%s=%q ' "$name" "${!name}"); fi
done

on_host() { # RANK: the shell's own words are quoted once more for ssh, whose remote shell takes them apart again
    local command
    command="cd $(printf %q "$PWD") && exec env $forwarded accelerate launch --config_file $(printf %q "$config")"
    command+=" --num_machines ${#hosts[@]} --machine_rank $1 --num_processes $((per_node * ${#hosts[@]}))"
    command+=" --main_process_ip ${MASTER_ADDR:-${hosts[0]}} --main_process_port ${MASTER_PORT:-29500}"
    command+=" launch/$script.py $arguments"
    if [ -n "${REMOTE:-}" ]; then
        exec $REMOTE "${hosts[$1]}" bash -c "$command"
    else
        # A terminal, so that the remote processes end with this one.
        exec ssh -tt -o BatchMode=yes "${hosts[$1]}" "$(printf '%q ' bash -c "$command")"
    fi
}

arguments=$(printf '%q ' "$@")
pids=()
for rank in "${!hosts[@]}"; do
    on_host "$rank" </dev/null &
    pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
# The first that fails ends all.
for _ in "${pids[@]}"; do
    status=0
    wait -n || status=$?
    if [ "$status" -ne 0 ]; then
        echo "tokenseek: a host ended with status $status; the others are stopped" >&2
        exit "$status"
    fi
done
