#!/usr/bin/env bash
# What cluster/Dockerfile does, without Docker: verify_image.sh [cpu|cuda] copies the files that the Dockerfile copies into
# an empty folder, installs there with an empty environment, and runs the jobs from it. Docker's own part (base image, apt
# packages, user) is not covered.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-cpu}
folder=$(mktemp -d "${TMPDIR:-/tmp}/ultralong-image.XXXXXX")
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/app/cluster" "$folder/home"
cp -r pyproject.toml constraints.txt LICENSE README.md ultralong_ray jobs "$folder/app/"
cp cluster/install_image.sh "$folder/app/cluster/"
clean=(env -i PATH="$folder/venv/bin:/usr/local/bin:/usr/bin:/bin" HOME="$folder/home" LANG=C.UTF-8)
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE PIP_CERT SSL_CERT_FILE HTTPS_PROXY https_proxy TORCH_CPU_INDEX; do
  [ -z "${!name:-}" ] || clean+=("$name=${!name}") # where packages come from is this machine's business
done
cd "$folder/app"
"${clean[@]}" cluster/install_image.sh "$target" "$folder/venv"
rm -rf ultralong_ray # the image has the installed package and jobs/ only
"${clean[@]}" python - <<'PY'
import importlib.metadata, re
pins = dict(line.strip().split("==") for line in open("constraints.txt") if "==" in line)
wrong = []
for distribution in importlib.metadata.distributions():
    name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
    pinned = next((pins[key] for key in pins if re.sub(r"[-_.]+", "-", key).lower() == name), None)
    if pinned is not None and distribution.version.split("+")[0] != pinned:
        wrong.append(f"{name} {distribution.version}, pinned {pinned}")
assert not wrong, wrong
import deepspeed, ray, torch, transformers
print("torch", torch.__version__, "ray", ray.__version__, "deepspeed", deepspeed.__version__)
PY
"${clean[@]}" python jobs/pipeline.py jobs/recipes/quickstart.toml --dry-run >/dev/null
echo "image steps ($target): ok"
