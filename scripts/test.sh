#!/usr/bin/env bash
# Set up the missing parts and run all checks: lint, types, unit and patch tests, then the real stack end to end.
#   bash scripts/test.sh [--torch-index URL] [pytest arguments, e.g. tests/unit -k filter]
# The variable TORCH_INDEX does the same as --torch-index.
set -euo pipefail

torch_index=${TORCH_INDEX:-}
if [ "${1:-}" = --torch-index ]; then
    torch_index=${2:?--torch-index needs a URL}
    shift 2
fi

source "$(dirname "${BASH_SOURCE[0]}")/setup_cpu.sh"
install_stack
patch_openrlhf
# The files of every release that can be patched, as they are on PyPI.
for folder in "$root"/patches/openrlhf-*; do
    release=${folder##*-} pristine=$venv/openrlhf-releases/${folder##*-}
    if [ ! -d "$pristine/openrlhf" ]; then
        "$venv/bin/pip" install -qq --no-deps --no-compile --target "$pristine" "openrlhf==$release"
    fi
done
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
# Ray cannot start workers if the path has a space, so cpu_ray makes a link to .venv then.
python=$(CDPATH='' cd scripts/quickstart && "$venv/bin/python" -c 'import cpu_ray; print(cpu_ray.PYTHON)')
if [ $# -gt 0 ]; then exec "$python" -m pytest "$@"; fi
say "Unit tests (one minute)"
"$python" -m pytest tests/unit -m "not wheel and not slow" -n auto --maxprocesses 4 --dist worksteal
# The launches need DeepSpeed's operators. They are compiled beside the next tests, which wait for other processes a lot.
(cd scripts/quickstart && exec "$venv/bin/python" -c 'import cpu_ray; cpu_ray.compile_operators()') &
compiling=$!
say "Tests of the real classes, of every release and of processes of our own (ten minutes)"
"$python" -m pytest tests/unit -m "wheel or slow" -n auto --maxprocesses 4 --dist worksteal
wait "$compiling" || say "DeepSpeed's operators were not compiled ahead: the first launch does it"
say "Launches of the real stack (half an hour)"
exec "$python" -m pytest tests/e2e -n 2
