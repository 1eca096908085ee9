#!/usr/bin/env bash
# Makes a virtual environment with the named extras and marks it ready: setup.sh FOLDER MARK EXTRAS
# PYTHON=/path/to/python chooses the interpreter, else find_python.sh does. LEAST_PYTHON (3.11) and CONSTRAINTS
# (constraints/main.txt) are for environments that differ from the usual one.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 mark=$2 extras=$3
least=${LEAST_PYTHON:-3.11} constraints=${CONSTRAINTS:-constraints/main.txt}

usable() { PYTHON=$1 tools/find_python.sh "$least" >/dev/null 2>&1; }

if [ -x "$venv/bin/python" ] && ! usable "$venv/bin/python"; then
    echo "setup  $venv has an interpreter that does not run or is older than $least: making it anew"
    rm -rf "$venv"
fi
if [ ! -x "$venv/bin/python" ]; then
    python=$(tools/find_python.sh "$least")
    echo "setup  $venv with $("$python" --version)"
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "$python has no venv module. Debian: apt-get install python$version-venv" >&2
        exit 1
    fi
    "$python" -m venv "$venv"
fi
echo "setup  installing .[$extras] (a few minutes the first time)"
start=$SECONDS
log=$venv/setup-$mark.log
# The log has everything; of it the large downloads and the installation itself are shown.
"$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar=off -c "$constraints" -e ".[$extras]" 2>&1 |
    tee "$log" |
    awk '/^ *(Downloading|Using cached|Processing) .*\([0-9.]+ MB\)/ { size = $NF == "MB)" ? substr($(NF-1), 2) + 0 : 0
             if (size >= 15) { print "setup    " $1, $2, $(NF-1), $NF; fflush() } }
         /^Installing collected/ { print "setup    installing " NF - 3 " packages"; fflush() }
         /^ERROR/ { print; fflush() }' ||
    { echo "setup  failed; all of it is in $log" >&2; exit 1; }
touch "$venv/.ready-$mark"
if [ "$mark" = dev ]; then touch "$venv/.ready-demo"; fi
echo "setup  ready in $((SECONDS - start)) s"
