#!/usr/bin/env bash
# Makes the environments of the systems that the benchmarks run beside ours: setup_peers.sh [reverb] [torchrl]
# dm-reverb's newest wheels need Python 3.10 and TensorFlow 2.14. An environment that is ready is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

make_env() { # NAME PYTHON LEAST REQUIREMENTS...
    local venv=.venv-$1 python
    if [ -e "$venv/bin/ready" ]; then echo "peers  $venv is there"; return; fi
    python=$(PYTHON=$2 tools/find_python.sh "$3") || return 1
    echo "peers  $venv with $("$python" --version): ${*:4}"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${@:4}"
    touch "$venv/bin/ready"
}

for name in ${*:-reverb torchrl}; do
    case $name in
        reverb) make_env reverb python3.10 3.10 dm-reverb==0.14.0 tensorflow==2.14.1 ;;
        torchrl) make_env torchrl "python3.11 python3.12" 3.11 torch==2.13.0 torchrl==0.14.1 ;;
        *) echo "setup_peers.sh knows reverb and torchrl, not $name" >&2; exit 1 ;;
    esac
done
