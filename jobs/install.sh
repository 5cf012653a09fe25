#!/usr/bin/env bash
# Install the project into .venv with the pinned versions of constraints.txt. Run by `make install`.
#
# torch comes first: on Linux its default build brings several gigabytes of CUDA libraries that a machine without an
# NVIDIA GPU cannot use. There, a CPU build is taken from the configured index, else from TORCH_CPU_INDEX.
set -euo pipefail
cd "$(dirname "$0")/.."
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
torch=$(grep '^torch==' constraints.txt)
if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
  "${pip[@]}" "$torch+cpu" 2>/dev/null || "${pip[@]}" --retries 1 --timeout 20 --extra-index-url "$TORCH_CPU_INDEX" "$torch+cpu" || "${pip[@]}" "$torch"
else
  "${pip[@]}" "$torch"
fi
"${pip[@]}" --constraint constraints.txt --editable '.[dev]'
