#!/usr/bin/env bash
# Write the SHA256SUMS.* files of a release again. Run this for each release after you change a diff:
#   bash scripts/patch_sums.sh patches/openrlhf-0.11.2 PRISTINE [--cpu]
# PRISTINE is the folder that holds the original openrlhf/. It is only read. --cpu: also for the CPU patch.
set -euo pipefail

if [ $# = 3 ] && [ "$3" = --cpu ]; then cpu=1; elif [ $# = 2 ]; then cpu=0; else
    echo "usage: bash scripts/patch_sums.sh RELEASE_FOLDER PRISTINE [--cpu]" >&2
    exit 2
fi
mkdir -p "$1"
sums=$(CDPATH='' cd "$1" && pwd)
patches=$(dirname "$sums")
pristine=$(CDPATH='' cd "$2" && pwd)
[ -d "$pristine/openrlhf" ] || { echo "error: $pristine holds no openrlhf/" >&2; exit 1; }
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

diffs=("$patches/0001-depo.patch")
if [ "$cpu" = 1 ]; then diffs+=("$patches/0002-cpu.patch"); fi
# The files that any of them changes or adds.
mapfile -t names < <(sed -n 's|^diff --git a/.* b/||p' "${diffs[@]}" | LC_ALL=C sort -u)
cd "$made"

# make_sums STATE DIFF...: the sums of the original files with these diffs applied.
make_sums() {
    local state=$1 name diff present=()
    shift
    rm -rf openrlhf
    for name in "${names[@]}"; do
        mkdir -p "$(dirname "$name")"
        if [ -e "$pristine/$name" ]; then cp "$pristine/$name" "$name"; fi
    done
    for diff in "$@"; do
        patch -p1 --force --fuzz=0 --no-backup-if-mismatch --quiet -i "$patches/$diff"
    done
    for name in "${names[@]}"; do
        if [ -e "$name" ]; then present+=("$name"); fi
    done
    sha256sum "${present[@]}" >"SHA256SUMS.$state"
}

make_sums original
make_sums depo 0001-depo.patch
if [ "$cpu" = 1 ]; then
    make_sums cpu 0002-cpu.patch
    make_sums depo+cpu 0001-depo.patch 0002-cpu.patch
fi
cp SHA256SUMS.* "$sums"
