#!/usr/bin/env bash
# Train a small language model with DEPO on the real OpenRLHF (Ray, DeepSpeed, vLLM), on a machine without a GPU.
#   bash scripts/quickstart_cpu.sh [--steps N] [--method depo|shadow|grpo|dynamic] [--model tiny|smollm2]
#                                  [--out DIR] [--seed N] [--torch-index URL]
# The first run installs everything into .venv; later runs start training at once.
set -euo pipefail

torch_index=
args=()
while [ $# -gt 0 ]; do
    case $1 in
    --torch-index) torch_index=${2:?--torch-index needs a URL}; shift 2 ;;
    --torch-index=*) torch_index=${1#*=}; shift ;;
    *) args+=("$1"); shift ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/setup_cpu.sh"
install_stack
patch_openrlhf
exec "$venv/bin/python" "$root/scripts/quickstart/run.py" "${args[@]}"
