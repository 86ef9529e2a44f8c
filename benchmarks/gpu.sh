#!/usr/bin/env bash
# All GPU measurements and the tests marked `gpu`, in parts of at most 150 seconds, the most wanted first. From anywhere:
#     benchmarks/gpu.sh [FOLDER [PART...]]        PYTHON=/path/to/python chooses the interpreter
#     benchmarks/gpu.sh --list
#     benchmarks/gpu.sh --rehearse [FOLDER]       the same with tiny shapes on a CPU, in one process
# Without PART all of them run, in about 20 minutes at most; where a GPU is lent for fewer, name those that fit. Every row
# is in FOLDER/PART.jsonl as soon as it is known, so that a part that is ended loses one row.
# Needs torch, transformers, accelerate and pytest; peft, bitsandbytes and liger-kernel are used where installed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
if [[ ${1-} == --list ]]; then
  exec "$python" -m benchmarks.gpu --list
elif [[ ${1-} == --rehearse ]]; then
  exec timeout -k 5 170 "$python" -m benchmarks.gpu --rehearse --folder "${2:-benchmarks/results/gpu-rehearsed}" "${@:3}"
fi
limits=$("$python" -m benchmarks.gpu --list) || exit 1
folder=${1:-benchmarks/results/gpu}
parts=("${@:2}")
((${#parts[@]})) || mapfile -t parts < <(cut -d' ' -f1 <<<"$limits")
mkdir -p "$folder"

status=0
for part in "${parts[@]}"; do
  limit=$(sed -n "s/^$part //p" <<<"$limits")
  echo "== $part${limit:+, at most $limit s}" >&2
  timeout -k 5 "${limit:-60}" "$python" -m benchmarks.gpu "$part" --folder "$folder" 2>"$folder/$part.err"
  code=$?
  if ((code)); then
    echo "$part: exit status $code; from $folder/$part.err:" >&2
    tail -n 5 "$folder/$part.err" >&2
    status=1
  fi
done
exit $status
