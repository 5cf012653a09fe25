#!/usr/bin/env bash
# One part of the reproduction, from data to scores, by the project's jobs alone. What is done is not done again, so a
# part that was cut short continues when it is called again.
#
#   jobs/recipes/reproduction/run.sh base|128k|1m|128k_long_sft|1m_long_sft|1m_from_start_sft [overrides]
#   jobs/recipes/reproduction/run.sh records|restore
# Overrides are those of the jobs, as in --cluster.num_workers 1.
#
# base: base_512.toml, then base_4k.toml; the model lands in runs/reproduction/models/base. Without one there, the other
# parts extend jobs/models/reproduction-base, which was trained so. RECIPES: another folder.
# records: what the run folders hold beside packed text, models and checkpoints, to jobs/results/reproduction_runs.tar.gz.
# restore: the run folders from there, with the models of jobs/models in them; what is evaluated next goes on from that.
# EVALUATE: further overrides of what is evaluated, each without blanks; "none": the models alone.
set -euo pipefail
cd "$(dirname "$0")/../../.."
recipes=${RECIPES:-jobs/recipes/reproduction}
models=runs/reproduction/models
records=jobs/results/reproduction_runs.tar.gz
part=${1:-}
overrides=("${@:2}")
refuse() {
  echo "run.sh: $1" >&2
  exit 2
}
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
128k | 1m | 128k_long_sft | 1m_long_sft | 1m_from_start_sft)
  if [ ! -e "$models/base/model.safetensors" ]; then # none was trained here
    mkdir -p "$models/base"
    cp -r jobs/models/reproduction-base/. "$models/base"
  fi
  plain=runs/reproduction/extend_${part%%_*}
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
records)
  root=$PWD
  cd runs/reproduction
  if [ -e "$root/$records" ]; then
    for known in $(tar tzf "$root/$records" | cut -d/ -f2 | sort -u); do
      [ -e "$known" ] || refuse "records: runs/reproduction lacks $known, which $records has; restore it first"
    done
  fi
  # where the model lies here is nobody else's matter
  find . -path './*/export-*/_SUCCESS.json' -exec sed -i "s#$root/##" {} +
  find . -name '*.json*' -type f -path './*/*-*/*' ! -path '*/corpus-*' ! -path '*/model/*' ! -path '*/checkpoints/*' \
    ! -path '*/ray/*' | sort | tar czf "$root/$records" -T -
  ;;
restore)
  [ ! -e runs/reproduction ] || refuse "restore: runs/reproduction is there already; move it aside, it would be written over"
  mkdir -p "$models/base"
  tar xzf "$records" -C runs/reproduction
  rm -f runs/reproduction/*/prepare*/_SUCCESS.json # the text is not there, and is packed again where it is wanted
  # models of the ablations are not kept either: trials that share one make it again
  rm -f runs/reproduction/ablations/{extend,pretrain,sft,export}-*/_SUCCESS.json
  cp jobs/models/reproduction-base/* "$models/base"
  for model in long_sft/pretrain:1m-pretrained long_sft/sft:1m long_sft/export:1m \
    from_start_sft/pretrain:1m-pretrained from_start_sft/sft:1m-from-start from_start_sft/export:1m-from-start; do
    for folder in runs/reproduction/extend_1m_"${model%:*}"-*/; do
      [ -d "$folder" ] || continue
      mkdir -p "$folder/model"
      cp jobs/models/reproduction-"${model#*:}"/* "$folder/model"
    done
  done
  ;;
*)
  refuse "no part '$part'; there are base, 128k, 1m, 128k_long_sft, 1m_long_sft, 1m_from_start_sft, records, restore"
  ;;
esac
