#!/usr/bin/env bash
# Submits training, or an evaluation in shards, to Slurm.
#
#   slurm.sh train --nodes=2 --gpus-per-node=8 --time=12:00:00 -- --config configs/llama2_7b_8xh100.yaml
#   slurm.sh evaluate --shards 8 --gpus=1 --time=4:00:00 -- --task gsm8k --checkpoint runs/x --out runs/x/eval
#
# Behind -- stand the options of python -m mathscale_jax.train, or of python -m eval sample. evaluate submits an array of
# jobs, each of which draws a share of the samples, and a job that grades and reports when they have ended; run again
# after a failure, it draws what is missing. Every other option goes to sbatch, save these:
#
#   --shards N           evaluate: jobs that share the sampling
#   --grade-flag FLAG    evaluate: an option of sbatch for the job that grades, which needs CPUs only, such as
#                        --grade-flag=--partition=cpu; may be repeated
#   --wait               wait until all has ended; exit with its exit code
#   --dry-run            say what would be submitted, and submit nothing
#
# Logs are in runs/slurm/. A job that is pre-empted is begun again by itself, and goes on where it was. The settings are
# checked before anything is submitted. Exit codes: 0 submitted, or with --wait done; 1 failed; 2 wrong use.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
shards='' dry_run='' code=0 id='' wait=() flags=() grade_flags=() words=()

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# Submits a job, and says which and where its log is: submit LOG FLAGS... Its number is in `id`.
submit() {
  local log=$1 code=0
  shift
  if [[ -n $dry_run ]]; then
    { printf 'sbatch'; printf ' %q' "$@"; echo; } >&2
    id=NUMBER
    return
  fi
  id=''
  while read -r line; do
    id=${line%%;*} # with several clusters their name follows
    echo "job $id: ${log//NUMBER/$id}"
  done < <(stdbuf -oL sbatch --parsable "$@" || echo "$?" > "$failed") # with --wait, too, at once
  [[ ! -s $failed ]] || code=$(< "$failed")
  return "$code"
}

command=${1-}
case $command in
  -h | --help) usage; exit 0 ;;
  train | evaluate) shift ;;
  *) usage >&2; exit 2 ;;
esac
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; words=("$@"); break ;;
    --dry-run) dry_run=1 ;;
    --wait) wait=(--wait) ;;
    --shards=*) shards=${1#*=} ;;
    --shards) shards=${2-}; shift "$(($# > 1))" ;;
    --grade-flag=*) grade_flags+=("${1#*=}") ;;
    --grade-flag) grade_flags+=("${2-}"); shift "$(($# > 1))" ;;
    *) flags+=("$1") ;;
  esac
  shift
done
((${#words[@]})) || fail "$command needs the options of the command behind --: see --help"
[[ -n $dry_run ]] || command -v sbatch > /dev/null || fail 'sbatch is not here: run this on a login node of the cluster'
[[ -n $dry_run ]] || mkdir -p runs/slurm

failed=$(mktemp)
trap 'rm -f "$failed"' EXIT
if [[ $command == train ]]; then
  checked=(python -m mathscale_jax.train "${words[@]}")
else
  checked=(python -m eval sample "${words[@]}")
fi
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
code=0
"$python" "$root/launch/check.py" --here "${checked[@]}" > /dev/null || code=$?
((code != 2)) || exit 2
((code == 0)) || echo 'warning: the settings were not checked: the packages are not installed here' >&2
code=0

job=("$root/launch/job.sbatch" "$root")
if [[ $command == train ]]; then
  [[ -z $shards ]] || fail '--shards is for evaluate'
  submit 'runs/slurm/train-NUMBER.log' --job-name=train --output=runs/slurm/train-%j.log "${flags[@]}" "${wait[@]}" \
    "${job[@]}" python -m mathscale_jax.train "${words[@]}"
  exit
fi

[[ $shards =~ ^[1-9][0-9]*$ ]] || fail "--shards '$shards': say how many jobs share the sampling, such as --shards 8"
out=''
for ((i = 0; i < ${#words[@]}; i++)); do
  case ${words[i]} in
    --out) out=${words[i + 1]-} ;;
    --out=*) out=${words[i]#--out=} ;;
    --shard | --shard=*) fail '--shard is said by slurm.sh: give --shards N before --' ;;
  esac
done
submit 'runs/slurm/sample-NUMBER_*.log' --job-name=sample --output=runs/slurm/sample-%A_%a.log \
  "--array=0-$((shards - 1))" "${flags[@]}" "${job[@]}" python -m eval sample "${words[@]}" --shard '{shard}'
array=$id
[[ -n $dry_run ]] || printf 'so far: python -m eval report %q\n' "$out"
# Whatever the shards ended with, what is there is graded; where something is missing, this job says so and fails.
# shellcheck disable=SC2016  # expanded by that shell
submit 'runs/slurm/grade-NUMBER.log' --job-name=grade --output=runs/slurm/grade-%j.log "--dependency=afterany:$array" \
  --nodes=1 "${grade_flags[@]}" "${wait[@]}" "${job[@]}" \
  bash -c 'python -m eval grade "$0" && python -m eval report "$0" --complete' "$out" || code=$?
if [[ -z $id ]]; then
  echo "error: the job that grades was refused; the others are in the queue: scancel $array ends them" >&2
fi
exit "$code"
