#!/usr/bin/env bash
# Prints the path of an interpreter that is at least this old: find_python.sh 3.11
# PYTHON=/path/to/python names one; else python3.11, python3.12, python3.13, python3 are tried, on PATH and under pyenv.
set -euo pipefail
least=$1
names=${PYTHON:-python3.11 python3.12 python3.13 python3}

usable() { "$1" -c "import sys; sys.exit(sys.version_info < (${least/./, }))" >/dev/null 2>&1; }

for name in $names; do
    # A pyenv shim may stand on PATH for a version that is not active: type -a shows what lies behind it.
    while read -r path; do
        if usable "$path"; then echo "$path"; exit; fi
    done < <(type -aP "$name" 2>/dev/null; ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"$name" 2>/dev/null || true)
done
echo "Python $least or newer is needed; none of these is: $names (python3 is $(python3 --version 2>&1 || echo missing))." >&2
echo "Install it (Debian: apt-get install python$least python$least-venv), or name one: make ... PYTHON=/path/to/python" >&2
exit 1
