#!/usr/bin/env bash
# Checks the difficulty estimator on a GPU and measures it: both backends, both modes, checkpoints, memory. No vLLM
# runs. Prints tables to paste and "all checks passed", or the failures and exit status 1. Without a GPU it does the
# same on the CPU with small sizes, in about two minutes; DeepSpeed compiles once before, which takes another minute.
#   bash scripts/gpu_check.sh [--quick] [--json FILE]
# PYTHON names the interpreter. Default: that of .venv (the CPU stack of quickstart_cpu.sh) if it is there, else python3.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_cpu.sh" # sets root, venv, patched; installs nothing
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    if [ -x "$venv/bin/python" ]; then python=$venv/bin/python; fi
fi
if [ "$python" -ef "$venv/bin/python" ] && [ -d "$patched" ]; then
    export PYTHONPATH=$patched${PYTHONPATH:+:$PYTHONPATH} TORCH_EXTENSIONS_DIR=$venv/torch_extensions
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$root"
exec "$python" -m benchmarks.gpu_check "$@"
