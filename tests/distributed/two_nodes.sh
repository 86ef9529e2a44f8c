#!/usr/bin/env bash
# Two machines on one: network namespaces joined by a pair of virtual cables. Runs launch/multinode.sh over them, as root:
#
#   tests/distributed/two_nodes.sh CONFIG score --preset P.yaml ...
#
# With KILL_WHEN=FILE, all processes of the second machine are killed as soon as FILE exists.
set -euo pipefail
config=$1
shift
one=tokenseek-$$-1 two=tokenseek-$$-2

cleanup() {
    for node in "$one" "$two"; do
        ip netns pids "$node" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns delete "$node" 2>/dev/null || true
    done
}
trap cleanup EXIT
for node in "$one" "$two"; do
    ip netns add "$node"
    ip -n "$node" link set lo up
done
ip link add eth0 netns "$one" type veth peer name eth0 netns "$two"
ip -n "$one" address add 10.77.0.1/24 dev eth0
ip -n "$two" address add 10.77.0.2/24 dev eth0
ip -n "$one" link set eth0 up
ip -n "$two" link set eth0 up

export REMOTE="ip netns exec" ACCELERATE_CONFIG=$config PROCESSES_PER_NODE=1 MASTER_ADDR=10.77.0.1
export FORWARD="GLOO_SOCKET_IFNAME HF_DATASETS_CACHE DS_ACCELERATOR" GLOO_SOCKET_IFNAME=eth0
"$(dirname "${BASH_SOURCE[0]}")/../../launch/multinode.sh" "$one $two" "$@" &
launcher=$!
if [ -n "${KILL_WHEN:-}" ]; then
    while [ ! -e "$KILL_WHEN" ] && kill -0 "$launcher" 2>/dev/null; do sleep 0.05; done
    ip netns pids "$two" | xargs -r kill -9
    echo "killed the second machine"
fi
wait "$launcher"
