#!/usr/bin/env bash
# One part of the reproduction, from data to scores, by the project's jobs alone. What is done is not done again, so a
# part that was cut short continues when it is called again.
#
#   jobs/recipes/reproduction/run.sh base|128k|1m|128k_long_sft|1m_long_sft [overrides, as in --cluster.num_workers 1]
#
# base: base_512.toml, then base_4k.toml; the model lands in runs/reproduction/models/base. Without one there, the other
# parts extend jobs/models/reproduction-base, which was trained so. RECIPES: another folder.
# EVALUATE: further overrides of what is evaluated, each without blanks; "none": the models alone.
set -euo pipefail
cd "$(dirname "$0")/../../.."
recipes=${RECIPES:-jobs/recipes/reproduction}
models=runs/reproduction/models
part=${1:-}
overrides=("${@:2}")
job() { "${PYTHON:-python3}" "jobs/$1.py" "$recipes/$2.toml" "${overrides[@]}"; }
evaluate() { # and the report of everything
  [ "${EVALUATE:-}" != none ] || return 0
  local more
  read -r -a more <<<"${EVALUATE:-}"
  overrides+=("${more[@]}")
  job evaluate "$1"
  job report "$1"
}
# adopt STAGE RECIPE NAME: the model that a stage has made becomes the base of other recipes
adopt() {
  local made
  made=$(ls -td "runs/reproduction/$2/$1"-*/_SUCCESS.json | head -n 1)
  cp -r "$(dirname "$made")/model/." "$models/$3"
}
case $part in
base)
  mkdir -p "$models/base-512" "$models/base"
  cp -r jobs/models/reproduction-tokenizer/. "$models/base-512" # all that preparing the second half needs
  job prepare base_512
  job extend base_512
  job prepare base_4k &
  preparing=$!
  trap 'kill "$preparing"' EXIT # in the background it hears no Ctrl-C
  job pretrain base_512
  adopt pretrain base_512 base-512
  wait "$preparing"
  trap - EXIT
  for stage in extend pretrain sft export; do job "$stage" base_4k; done
  adopt export base_4k base
  evaluate base_4k
  ;;
128k | 1m | 128k_long_sft | 1m_long_sft)
  if [ ! -e "$models/base/model.safetensors" ]; then # none was trained here
    mkdir -p "$models/base"
    cp -r jobs/models/reproduction-base/. "$models/base"
  fi
  plain=runs/reproduction/extend_${part%_long_sft}
  for made in "$plain"/{prepare,extend,pretrain}-*/_SUCCESS.json; do # all before SFT is the same
    stage=$(dirname "$made")
    copy=runs/reproduction/extend_$part/$(basename "$stage")
    [ -e "$made" ] && [ ! -e "$copy" ] || continue
    rm -rf "$copy.part"
    mkdir -p "$(dirname "$copy")"
    cp -r "$stage" "$copy.part"
    mv "$copy.part" "$copy" # whole, or not at all
  done
  for stage in prepare extend pretrain sft export; do job "$stage" "extend_$part"; done
  evaluate "extend_$part"
  ;;
*)
  echo "run.sh: no part '$part'; there are base, 128k, 1m, 128k_long_sft and 1m_long_sft" >&2
  exit 2
  ;;
esac
