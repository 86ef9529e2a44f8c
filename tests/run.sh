#!/usr/bin/env bash
# All tests, from nothing but Python >= 3.10, gcc and PyPI: no GPU, no model hub.
#
#   bash tests/run.sh             everything but the slow tests
#   bash tests/run.sh -m slow     the slow ones: two machines, Slurm, random kills, a browser
#   bash tests/run.sh ARGUMENTS   of pytest
#
# The environment is made in .venv-test (or $TOKENSEEK_TEST_VENV, with $PYTHON) and kept until constraints.txt,
# pyproject.toml or this file change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=${TOKENSEEK_TEST_VENV:-$PWD/.venv-test}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python >= 3.10 is needed, this is {sys.version}")'

wanted="$("$python" --version) $PWD $(cat constraints.txt pyproject.toml tests/run.sh | cksum)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "== Installing the pinned versions into $venv"
    "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)
    "${pip[@]}" torch  # first: others look for it while they are built
    "${pip[@]}" --editable '.[dev,deepspeed,bitsandbytes,trl,quickstart,report,eval]'
    echo "$wanted" > "$venv/installed"
fi

# Each of some hundred processes would compile this package anew, a tenth of its start.
unset PYTHONDONTWRITEBYTECODE
# One thread each, for there are as many processes as cores; DeepSpeed finds ninja on the PATH to compile an operator.
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# It does so now: a test that runs out of time while it compiles leaves a lock, for which all later ones wait.
export TORCH_EXTENSIONS_DIR="$venv/torch-extensions"
find "$venv/torch-extensions" -name lock -delete 2>/dev/null || true
DS_ACCELERATOR=cpu python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)' \
    > "$venv/torch-extensions.log" 2>&1 || { cat "$venv/torch-extensions.log"; exit 1; }
ruff check .
ruff format --check --quiet .
mypy
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# File after file to two processes, also those whose tests start processes of their own: these import libraries most of
# the time, one after the other.
exec python -m pytest -m "not slow" -n 2 --dist loadfile
