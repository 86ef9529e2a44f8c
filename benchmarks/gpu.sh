#!/usr/bin/env bash
# All GPU measurements and the tests marked `gpu`, inside 9 minutes, with a short table last. From anywhere:
#     benchmarks/gpu.sh [OUTPUT_FOLDER]        PYTHON=/path/to/python chooses the interpreter
# Needs torch, transformers, accelerate, peft, pytest; bitsandbytes and liger-kernel are used where installed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-benchmarks/results/gpu}
deadline=$((SECONDS + 530))
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"

# part NAME SECONDS COMMAND...: runs it for at most SECONDS, and never past the deadline.
status=0
part() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) code
  shift 2
  ((left < limit)) && limit=$left
  if ((limit < 5)); then
    echo "$name: not run, no time left" | tee "$out/$name.txt"
    status=1
    return
  fi
  echo "== $name (at most $limit s)"
  timeout "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.err"
  code=$?
  if ((code)); then
    echo "$name: exit status $code" | tee -a "$out/$name.txt"
    tail -n 15 "$out/$name.err"
    status=1
  fi
}

quick="full,full+checkpoint,full+checkpoint+chunked-ce,algorithm1@0.1,tokenseek@0.1,tokenseek@0.1+recompute"
ratios="tokenseek@0.05,tokenseek@0.2,tokenseek@0.5,tokenseek@1.0"
storages="tokenseek@0.1+kv-host,tokenseek@0.1+kv-int8"
lora="full+lora,full+lora+checkpoint,tokenseek@0.1+lora"
qlora="full+qlora,full+qlora+checkpoint,tokenseek@0.1+qlora,tokenseek@0.1+qlora+recompute"
"$python" -c "import bitsandbytes" 2>/dev/null && lora+=",$qlora"
step=("$python" -m benchmarks.step --device cuda --dtype bf16 --repeats 1 --steps 10)

part tests 110 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu
part llama-3.2-1b 180 "${step[@]}" --shape llama-3.2-1b --lengths 2048,4096 --methods "$quick" \
  --json "$out/llama-3.2-1b.json"
part seek-llama-3.2-1b 45 "$python" -m benchmarks.seek --device cuda --dtype bf16 --shape llama-3.2-1b \
  --lengths 512,2048,4096 --repeats 10 --json "$out/seek-llama-3.2-1b.json"
part llama-3.2-1b-more 165 "${step[@]}" --shape llama-3.2-1b --lengths 2048 --methods "full,$ratios,$storages,$lora" \
  --json "$out/llama-3.2-1b-more.json"
# Short sequences, where launching kernels costs more than running them.
part qwen2.5-0.5b 60 "${step[@]}" --shape qwen2.5-0.5b --lengths 512 --methods "full,tokenseek@0.1" \
  --json "$out/qwen2.5-0.5b.json"
part llama-3.2-3b 90 "${step[@]}" --shape llama-3.2-3b --lengths 2048 \
  --methods "full,full+checkpoint+chunked-ce,tokenseek@0.1" --json "$out/llama-3.2-3b.json"

echo
for name in tests llama-3.2-1b seek-llama-3.2-1b llama-3.2-1b-more qwen2.5-0.5b llama-3.2-3b; do
  echo "== $name"
  if [[ $name == tests ]]; then tail -n 1 "$out/$name.txt"; else cat "$out/$name.txt"; fi
done
exit $status
