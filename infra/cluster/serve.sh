#!/bin/sh
# Starts the run of a run file, or goes on with it where it was: serve.sh RUN.yaml [table.key=value ...]
# Run folders lie in $RUNS (/runs).
set -eu
file=$1
shift
runs=${RUNS:-/runs}
if [ -e "$runs/$(basename "${file%.*}")/run.json" ]; then
    exec fleet up "$file" "$@" --runs "$runs" --resume
fi
exec fleet up "$file" "$@" --runs "$runs"
