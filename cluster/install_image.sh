#!/usr/bin/env bash
# The installing step of cluster/Dockerfile: install_image.sh cpu|cuda FOLDER makes a virtual environment with this
# project in the versions of constraints.txt. Runs in the project's folder.
set -euo pipefail
target=$1 venv=$2
python3 -m venv "$venv"
pip=("$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check --quiet)
torch=$(grep '^torch==' constraints.txt)
if [ "$target" = cpu ]; then # a CPU build from the configured index, else from PyTorch's own
  "${pip[@]}" "$torch+cpu" 2>/dev/null \
    || "${pip[@]}" --retries 1 --timeout 20 --extra-index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" "$torch+cpu" \
    || { echo "no CPU build of $torch is in reach: the default build is taken, which is larger" >&2; "${pip[@]}" "$torch"; }
  "${pip[@]}" --constraint constraints.txt '.[eval]'
else
  "${pip[@]}" "$torch"
  "${pip[@]}" --constraint constraints.txt '.[gpu,eval]'
fi
"$venv/bin/python" -m pip check
