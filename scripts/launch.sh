# shellcheck shell=bash
# Sourced by the train_depo_*.sh scripts: launch COMMAND... checks a launch, runs it, and says where its results are.
# Reads OUT, the folder of the run. The array RUN_ON stands before each command, if the launch runs elsewhere
# (`ray job submit ... --`). DOCTOR=0 skips the check. Returns the training's exit status, or 1 if a check fails.
if [ -z "${RUN_ON[*]-}" ]; then RUN_ON=(); fi

launch() {
    local status=0
    if [ "${DOCTOR:-1}" != 0 ]; then
        # `python3 -m depo_plugin doctor` is `depo doctor`, with the Python that the launch uses.
        if ! "${RUN_ON[@]}" python3 -m depo_plugin doctor -- "$@"; then
            echo "Not started: depo doctor names what to mend. DOCTOR=0 starts the launch without this check." >&2
            return 1
        fi
    fi
    (set -x && "${RUN_ON[@]}" "$@") || status=$?
    printf '\nexit status: %s\nreport:      depo report %q\nmetrics:     %s\n' \
        "$status" "$OUT/model" "$OUT/model/depo/metrics.jsonl"
    return "$status"
}
