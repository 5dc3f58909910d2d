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
# Logs are in runs/slurm/. A job that is pre-empted is begun again by itself, and goes on where it was.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
shards='' dry_run='' code=0 wait=() flags=() grade_flags=() words=()

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

submit() {
  if [[ -n $dry_run ]]; then
    { printf 'sbatch'; printf ' %q' "$@"; echo; } >&2
    return
  fi
  sbatch --parsable "$@"
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
    --shards) shards=${2-}; shift ;;
    --grade-flag=*) grade_flags+=("${1#*=}") ;;
    --grade-flag) grade_flags+=("${2-}"); shift ;;
    *) flags+=("$1") ;;
  esac
  shift
done
((${#words[@]})) || fail "$command needs the options of the command behind --: see --help"
[[ -n $dry_run ]] || command -v sbatch > /dev/null || fail 'sbatch is not here: run this on a login node of the cluster'
[[ -n $dry_run ]] || mkdir -p runs/slurm

job=$root/launch/job.sbatch
if [[ $command == train ]]; then
  id=$(submit --job-name=train --output=runs/slurm/%x-%j.log "${flags[@]}" "${wait[@]}" "$job" \
    python -m mathscale_jax.train "${words[@]}") || code=$?
  [[ -z $id ]] || echo "job ${id%%;*}: runs/slurm/train-${id%%;*}.log"
  exit "$code"
fi

[[ $shards =~ ^[1-9][0-9]*$ ]] || fail "--shards=$shards: say how many jobs share the sampling, such as --shards 8"
out=''
for ((i = 0; i < ${#words[@]}; i++)); do
  case ${words[i]} in
    --out) out=${words[i + 1]-} ;;
    --out=*) out=${words[i]#--out=} ;;
    --shard | --shard=*) fail '--shard is said by slurm.sh: give --shards N before --' ;;
  esac
done
[[ -n $out ]] || fail 'evaluate needs --out DIR behind --: all shards write there'
array=$(submit --job-name=sample --output=runs/slurm/%x-%A_%a.log "--array=0-$((shards - 1))" "${flags[@]}" "$job" \
  python -m eval sample "${words[@]}" --shard '{shard}')
array=${array%%;*} # with several clusters their name follows
[[ -n $dry_run ]] || echo "job $array: $shards shards, runs/slurm/sample-${array}_*.log; so far: python -m eval report $out"
# Whatever the shards ended with, what is there is graded, and the report says what is missing.
# shellcheck disable=SC2016  # expanded by that shell
grade=$(submit --job-name=grade --output=runs/slurm/%x-%j.log "--dependency=afterany:${array:-SHARDS}" --nodes=1 \
  "${grade_flags[@]}" "${wait[@]}" "$job" bash -c 'python -m eval grade "$0" && python -m eval report "$0"' "$out") || code=$?
[[ -z $grade ]] || echo "job ${grade%%;*}: grades and reports, runs/slurm/grade-${grade%%;*}.log"
exit "$code"
